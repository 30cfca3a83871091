"""Who goes where on a cluster: the learner, the worker hosts, and each host's environments."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from headrace.config import RunConfig, takes_turns
from headrace.errors import ConfigError

LEARNER_CPUS = 4
"""Processors that the learner's bundle reserves where there are so many: for the learner, its
server, and the threads that receive."""
LEAST_CPUS = 0.5
"""A node with less free than that gets no worker host."""
MAX_ENVS_PER_MESSAGE = 64


class Node(NamedTuple):
    """A machine of the cluster that lives."""

    id: str
    name: str  # of the machine
    address: str  # without a port
    cpus: float
    gpus: float


class Slot(NamedTuple):
    """Room for a worker host."""

    node: str  # id
    cpus: float


def gpus_wanted(config: RunConfig, most: int) -> int:
    """Returns the GPUs that the learner's settings name, on one node; `most` is what a node has.

    Raises:
        ConfigError: no node has so many.
    """
    devices = [config.actor_device, config.critic_device]
    for several in (config.learner_devices, config.inference_devices):
        devices += [name.strip() for name in several.split(",")]
    if not config.learner_devices and not config.actor_device:
        devices.append(config.device)
    wanted = 0
    for device in filter(None, devices):
        kind, _, index = device.partition(":")
        if device == "all":
            wanted = max(wanted, most)
        elif device == "auto":
            wanted = max(wanted, min(1, most))
        elif kind == "cuda":
            wanted = max(wanted, 1 + int(index) if index.isdigit() else 1)
    if wanted > most:
        raise ConfigError(
            f"the learner wants {wanted} GPUs on one node, and no node of the cluster has more "
            f"than {most}: change --device or --learner-devices"
        )
    return wanted


def choose_learner(
    nodes: Sequence[Node], gpus: int, *, home: str = "", crowded: Collection[str] = ()
) -> tuple[Node, float] | None:
    """Returns the learner's node and the processors to reserve there; None if none fits.

    Worker hosts give way for the learner, so they are not in its way here.

    Args:
        nodes: Those that live.
        gpus: What it wants.
        home: Id of the node that it had before, which is preferred: its files may be there.
        crowded: Ids of nodes where others have had the room; the last choice, to be waited for.
    """
    fit = [node for node in nodes if node.gpus >= gpus and node.cpus >= LEAST_CPUS]
    if not fit:
        return None

    def rank(node: Node) -> tuple[bool, bool, bool, float]:
        # Where GPUs are not wanted, those who want them may have theirs.
        spares_gpus = bool(gpus) or not node.gpus
        return node.id not in crowded, node.id == home, spares_gpus, node.cpus

    best = max(fit, key=rank)
    alone = not any(other.cpus >= 1 for other in nodes if other.id != best.id)
    return best, _whole(min(LEARNER_CPUS, best.cpus / 2 if alone else best.cpus))


def new_slots(
    free: Mapping[str, float], taken: Sequence[Slot], *, hosts: int, host_cpus: int
) -> list[Slot]:
    """Returns room for the worker hosts that are still missing, as far as there is any.

    Args:
        free: Processors that are left on each node, by its id, beside the learner and the hosts
            that there are.
        taken: Of the hosts that there are.
        hosts: How many are wanted in all; 0 for one on every node.
        host_cpus: Processors of each; 0 for all that are free.
    """
    free = {node: cpus for node, cpus in free.items() if cpus >= (host_cpus or LEAST_CPUS)}
    if not hosts:
        busy = {slot.node for slot in taken}
        return [
            Slot(node, float(host_cpus) or _whole(cpus))
            for node, cpus in free.items()
            if node not in busy
        ]
    chosen: Counter[str] = Counter()
    for _ in range(hosts - len(taken)):
        room = [node for node in free if chosen[node] < max(1, int(free[node] / (host_cpus or 1)))]
        if not room:
            break
        # Even over the nodes: the one whose hosts would have most processors each.
        chosen[max(room, key=lambda node: free[node] / (chosen[node] + 1))] += 1
    return [
        Slot(node, float(host_cpus) or _whole(free[node] / count))
        for node, count in chosen.items()
        for _ in range(count)
    ]


def envs_per_message(config: RunConfig, hosts: int) -> int:
    """Returns the environments of a block, so that each of `hosts` can have two of them."""
    if config.remote.envs_per_message:
        return config.remote.envs_per_message
    num_envs = config.server.num_envs
    batch = num_envs
    if not takes_turns(config) and config.inference == "server":
        batch = config.server.inference_batch or (num_envs + 1) // 2
    return max(1, min(MAX_ENVS_PER_MESSAGE, batch, num_envs // (2 * max(1, hosts))))


def shares(num_envs: int, block: int, cpus: Mapping[int, float]) -> dict[int, int]:
    """Divides environments among hosts by their processors, in whole blocks.

    Args:
        num_envs: Of the run.
        block: Environments that step together.
        cpus: Processors of each host, by its number.

    Returns:
        What each host takes at most. One that gets none, because there are more hosts than blocks,
        is left out; the earlier a number, the sooner it has its first block.
    """
    blocks = -(-num_envs // block)
    largest = -(-num_envs // blocks)
    hosts = sorted(cpus)[:blocks]
    if not hosts:
        return {}
    spare, total = blocks - len(hosts), sum(cpus[host] for host in hosts)
    exact = {host: spare * cpus[host] / total for host in hosts}
    counts = {host: 1 + math.floor(exact[host]) for host in hosts}
    left = blocks - sum(counts.values())
    for host in sorted(hosts, key=lambda host: math.floor(exact[host]) - exact[host])[:left]:
        counts[host] += 1
    return {host: count * largest for host, count in counts.items()}


def _whole(cpus: float) -> float:
    return float(math.floor(cpus)) if cpus >= 1 else cpus
