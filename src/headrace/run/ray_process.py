"""A Ray of one node, on loopback, as a process group of its own; for `--cluster local`.

Signals of a terminal or a scheduler go to the driver's whole group. Were Ray in it, they would take
it from under a run that is about to save. And whatever kills the driver ends this group
(pools/processes.py), before Ray itself has noticed.
"""

from __future__ import annotations

import importlib
import shutil
from typing import Any

from headrace.errors import PeerLost
from headrace.pools.processes import WorkerEnd
from headrace.run.cluster_ray import job_config


def main() -> None:
    """Starts Ray with the parent's settings, tells its address, and ends it when asked to."""
    end = WorkerEnd.open()
    ray: Any = importlib.import_module("ray")
    ray.init(
        address="local",
        job_config=job_config(),
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        logging_level="error",
        _temp_dir=end.settings["folder"],
        num_cpus=end.settings["cpus"],
        object_store_memory=end.settings["object_store_nbytes"],
    )
    end.status({"address": ray.get_runtime_context().gcs_address})
    try:
        while True:
            end.receive()
    except PeerLost:
        ray.shutdown()
        shutil.rmtree(end.settings["folder"], ignore_errors=True)


if __name__ == "__main__":
    main()
