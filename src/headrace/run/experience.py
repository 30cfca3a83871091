"""What lies between server and learner: slots, unrolls, a replay where an algorithm wants one."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headrace.algorithms.base import Algorithm, ExperienceSpec
from headrace.config import RunConfig, takes_turns
from headrace.errors import ConfigError
from headrace.experience.fifo import SlotQueue, Slots
from headrace.experience.limiter import SampleLimiter
from headrace.experience.replay import Replay
from headrace.experience.replay_layout import ReplayLayout
from headrace.experience.unrolls import UnrollTable
from headrace.learner.feeds import Feed, FifoFeed, Filled, ReplayFeed, insert_sizes
from headrace.records import Batch
from headrace.run.system import free_memory_nbytes, is_in_memory
from headrace.specs import EnvSpec

_SHARE = 0.85  # of free memory that a replay may take: the rest is for networks and batches
_GIB = 2**30


class Place(NamedTuple):
    """Where a replay lies, and how large it is."""

    layout: ReplayLayout
    device: torch.device
    folder: Path | None  # of the mapped file; None for memory

    def __str__(self) -> str:
        where = f"a file in {self.folder}" if self.folder else f"{self.device.type} memory"
        return (
            f"replay: {self.layout.capacity} sequences, {self.layout.nbytes / _GIB:.1f} GiB in "
            f"{where}"
        )


def queue_capacity(config: RunConfig, algorithm: Algorithm) -> int:
    """Returns how many full unrolls may wait for the learner.

    Raises:
        ConfigError: fewer than one batch.
    """
    experience = algorithm.experience
    if experience.replay is not None:
        # All environments fill theirs at the same time, and the learner may be in a long update.
        return config.server.queue_unrolls or 2 * config.server.num_envs
    wanted = experience.batch_unrolls
    # Environments in torch fill theirs together; one of each may wait while the next is filled.
    together = config.server.num_envs if config.pool == "device" else 0
    capacity = config.server.queue_unrolls or wanted + together
    if capacity < wanted:
        raise ConfigError(
            f"queue_unrolls={capacity} can never hold a batch of batch_unrolls={wanted}: "
            "raise --queue-unrolls or lower --batch-unrolls"
        )
    return capacity


def spreads_ends(config: RunConfig, experience: ExperienceSpec) -> bool:
    """Whether environments end their unrolls in different steps; see `UnrollTable`.

    Environments in torch never do: they step as one, and their queue holds a whole round.
    """
    return (
        config.server.spread_unrolls
        and config.pool != "device"
        and experience.replay is None
        and not takes_turns(config)
        and experience.batch_unrolls < config.server.num_envs
    )


def make_unrolls(
    config: RunConfig,
    algorithm: Algorithm,
    spec: EnvSpec,
    server_model: Any,
    max_batch: int,
    device: torch.device,
) -> tuple[SlotQueue, UnrollTable]:
    """Allocates slots for what is under construction, waiting, read, and filled by one batch."""
    experience = algorithm.experience
    capacity = queue_capacity(config, algorithm)
    num_envs = config.server.num_envs
    num_slots = num_envs + capacity + max_batch + experience.batch_unrolls
    queue = SlotQueue(num_slots, capacity=capacity)
    unrolls = UnrollTable(
        spec,
        num_envs=num_envs,
        experience=experience,
        num_slots=num_slots,
        queue=queue,
        recurrent=server_model.initial_state(1),
        device=device,
    )
    unrolls.spreads_ends = spreads_ends(config, experience)
    return queue, unrolls


def place_replay(
    config: RunConfig,
    algorithm: Algorithm,
    spec: EnvSpec,
    model: Any,
    device: torch.device,
    *,
    learners: int = 1,
) -> Place | None:
    """Decides where the replay goes; None if the algorithm has none.

    Of several `learners` who are yet to start, each takes as much main memory or disk. A GPU is
    taken to be one learner's.

    Raises:
        ConfigError: it does not fit where it should, or settings contradict each other.
    """
    replay = algorithm.experience.replay
    if replay is None:
        return None
    settings = replay.settings
    if config.max_policy_lag is not None:
        raise ConfigError(
            f"{config.algorithm} learns from a replay, which is old on purpose: leave out "
            "--max-policy-lag"
        )
    layout = replay_layout(algorithm, spec, model, num_envs=config.server.num_envs)
    if settings.replay_gib and layout.capacity < settings.replay_min:
        raise ConfigError(
            f"--replay-gib {settings.replay_gib:g} holds {layout.capacity} sequences, fewer than "
            f"--replay-min {settings.replay_min}: raise it, or lower that"
        )
    folder = Path(settings.replay_folder or tempfile.gettempdir())
    memory = free_memory_nbytes()
    room = {"cuda": _free_on(device), "cpu": memory, "disk": _free_in(folder)}
    wanted = [settings.replay_place]
    if settings.replay_place == "auto":
        wanted = ["cuda", "cpu", "disk"] if device.type == "cuda" else ["cpu", "disk"]
        if not settings.replay_folder and is_in_memory(folder):
            wanted.remove("disk")
    if settings.replay_place == "cuda" and device.type != "cuda":
        raise ConfigError("--replay-place cuda needs a run on a GPU: say cpu or auto")
    for place in wanted:
        needs = layout.frame_nbytes if place == "disk" else layout.nbytes
        beside = learners * (layout.nbytes - needs)  # only frames lie in the file
        needs *= 1 if place == "cuda" else learners
        if _has_room(needs, room[place]) and _has_room(beside, memory):
            return Place(
                layout,
                device if place == "cuda" else torch.device("cpu"),
                folder if place == "disk" else None,
            )
    each = f" for each of {learners} learners" if learners > 1 else ""
    sizes = ", ".join(f"{place} {(room[place] or 0) / _GIB:.1f} GiB" for place in wanted)
    raise ConfigError(
        f"a replay of {layout.capacity} sequences{each} takes {layout.nbytes / _GIB:.1f} GiB, and "
        f"{_SHARE:.0%} of what is free must hold it ({sizes}): lower --replay-capacity, or name a "
        "larger disk by --replay-place disk --replay-folder"
    )


def replay_layout(
    algorithm: Algorithm, spec: EnvSpec, model: Any, *, num_envs: int
) -> ReplayLayout:
    """Returns the shapes of an algorithm's replay.

    Raises:
        ConfigError: it has none, or not even a sequence for each environment fits in replay_gib.
    """
    experience = algorithm.experience
    replay = experience.replay
    if replay is None:
        raise ConfigError("the algorithm learns from no replay")
    said = ("value", "action_value") if first_priority(algorithm) is not None else ()
    layout = ReplayLayout(
        spec=spec,
        num_envs=num_envs,
        capacity=replay.settings.replay_capacity,
        segment_steps=experience.unroll_steps,
        sequence_steps=replay.sequence_steps,
        stride_steps=replay.stride_steps,
        burn_in_steps=replay.burn_in_steps,
        recurrent=model.initial_state(1),
        columns=said,
    )
    gib = replay.settings.replay_gib
    if not gib:
        return layout
    capacity = layout.sequences_in(int(gib * _GIB))
    if not capacity:
        least = dataclasses.replace(layout, capacity=num_envs).nbytes / _GIB
        raise ConfigError(
            f"--replay-gib {gib:g} holds no sequence for each of {num_envs} environments, which "
            f"takes {least:.3g}: raise it, or lower --num-envs"
        )
    return dataclasses.replace(layout, capacity=capacity)


def make_feed(
    config: RunConfig,
    algorithm: Algorithm,
    place: Place | None,
    *,
    queue: Slots,
    unrolls: Filled,
    device: torch.device,
    seed: int,
) -> Feed:
    """Builds what gives the learner its batches; allocates the replay, if there is one."""
    experience = algorithm.experience
    if place is None or experience.replay is None:
        return FifoFeed(
            unrolls,
            queue,
            batch_unrolls=experience.batch_unrolls,
            device=device,
            max_policy_lag=config.max_policy_lag,
        )
    settings = experience.replay.settings
    try:
        replay = Replay(
            place.layout,
            device=place.device,
            folder=place.folder,
            priority_exponent=settings.priority_exponent,
            importance_exponent=settings.importance_exponent,
        )
    except (MemoryError, OSError, torch.cuda.OutOfMemoryError) as error:
        raise ConfigError(f"{place}: there is not so much: lower --replay-capacity") from error
    return ReplayFeed(
        unrolls,
        queue,
        replay,
        SampleLimiter(
            settings.samples_per_insert,
            min_inserted=settings.replay_min,
            batch=experience.unrolls_per_call,
            max_insert=insert_sizes(experience)[1],
        ),
        experience=experience,
        device=device,
        seed=seed,
        initial_priority=first_priority(algorithm),
    )


def first_priority(algorithm: Algorithm) -> Callable[[Batch], Tensor] | None:
    """Returns what says the priority of new sequences; None where all are sampled alike."""
    replay = algorithm.experience.replay
    if replay is None or replay.settings.priority_exponent == 0 or not replay.judges_new:
        return None
    return algorithm.initial_priority


def _has_room(nbytes: int, free: int | None) -> bool:
    return free is None or nbytes <= _SHARE * free


def _free_on(device: torch.device) -> int | None:
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()  # what an earlier run in this process left
    return torch.cuda.mem_get_info(device)[0]


def _free_in(folder: Path) -> int:
    if not folder.is_dir():
        raise ConfigError(f"--replay-folder {folder} is no folder: make it, or name another")
    return shutil.disk_usage(folder).free
