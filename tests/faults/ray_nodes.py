"""Ray's cluster of several nodes on one machine, as a program: a line in, a line out.

add CPUS -> the node's number      remove NUMBER -> ok      the first line says the address
"""

import os
import sys

import ray
from ray.cluster_utils import Cluster

SMALL = {"include_dashboard": False, "object_store_memory": 80 << 20}


def say(answer: object) -> None:
    sys.stdout.write(f"{answer}\n")
    sys.stdout.flush()


def main() -> None:
    os.makedirs(os.environ["RAY_TMPDIR"], exist_ok=True)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": int(sys.argv[1]), **SMALL})
    nodes = [cluster.head_node]
    say(cluster.address)
    try:
        for line in sys.stdin:
            word, number = line.split()
            if word == "add":
                nodes.append(cluster.add_node(num_cpus=int(number), **SMALL))
                say(len(nodes) - 1)
            else:  # as if its power had failed
                cluster.remove_node(nodes[int(number)], allow_graceful=False)
                say("ok")
    finally:
        cluster.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
