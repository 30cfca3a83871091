"""The worker: steps groups of environments, and knows nothing of policies.

    control pipe --- group --->  reads the actions of the group's rows
                                 steps the group's environments
    ready pipe  <--- record ---  writes what they showed into the same rows

Run as a program by `pools.shm`. It imports no torch: a worker is ready in a second and small. An
exception ends it; `pools.processes` tells the parent, which decides whether to start it again.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TextIO, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from headrace import catalog
from headrace.envs.base import BatchEnv, Closable
from headrace.errors import ConfigError, PeerLost
from headrace.pools.processes import WorkerEnd
from headrace.pools.shm_layout import (
    GROUP,
    RECORD,
    Rows,
    Table,
    as_step,
    cut,
    layout,
    write_infos,
    write_step,
)
from headrace.run.seeds import Use, derived_seed
from headrace.steps import INFO_NBYTES, RUN_IDS, EnvStep, EpisodeInfo
from headrace.transport.messages import ensure_same_spec

TOGETHER_S = 100e-6
"""Groups whose actions are there are stepped as one if that takes no longer. A call and a message
cost about as much as 16 environments that do nothing; a slow group would keep the server waiting
for what is ready."""


@runtime_checkable
class WritesRows(Protocol):
    """A `BatchEnv` that can write its steps where they belong."""

    def step_into(self, out: EnvStep, action: NDArray[Any]) -> tuple[bool, EpisodeInfo | None]:
        """Steps the copies `out.env_id`; see `envs.gymnasium_batch`."""


class Group(NamedTuple):
    """Environments that are asked together: some of the worker's own, which count from 0."""

    first: int
    end: int
    record: bytes


class Hosted(NamedTuple):
    """The environments of a worker."""

    env: BatchEnv
    rows: Rows
    groups: Sequence[Group]


class NamedOutput(io.TextIOWrapper):
    """A stream that says whose code prints, where the environments tell."""

    def __init__(self, stream: TextIO, envs: Sequence[BatchEnv]) -> None:
        """Writes where `stream` writes."""
        super().__init__(
            stream.buffer, encoding="utf-8", errors="backslashreplace", line_buffering=True
        )
        self._stream = stream  # it would close what both write to
        self._envs = envs
        self._fresh = True  # whether a line begins

    def write(self, text: str) -> int:
        """Puts the environment's number before each line."""
        running = [getattr(env, "current_env", None) for env in self._envs]
        name = "".join(f"environment {env_id}: " for env_id in running if env_id is not None)
        for line in text.splitlines(keepends=True):
            super().write(name + line if self._fresh else line)
            self._fresh = line.endswith("\n")
        return len(text)


def run_worker(end: WorkerEnd, hosted: Hosted, *, ready_fd: int, run_offset: int) -> None:
    """Steps some groups while the others wait for actions, until the parent is gone.

    Args:
        end: pipes to the parent.
        hosted: environments, their rows and their groups.
        ready_fd: the pipe that all workers write into.
        run_offset: added to run ids.
    """
    env, rows, groups = hosted
    notices: Sequence[str] = getattr(env, "notices", ())
    told = len(notices)  # the parent has seen these for itself
    steppers: dict[tuple[int, int], Callable[[], int]] = {}
    env_s = math.inf  # seconds of the last step, by environment
    too_long = write_step(rows, env.reset(), run_offset=run_offset)
    os.write(ready_fd, b"".join(group.record for group in groups))
    while True:
        try:
            asked = [number for (number,) in GROUP.iter_unpack(end.receive() or b"")]
        except PeerLost:
            break
        while asked:
            turn = groups[asked[0] : asked[0] + _together(asked, groups, env_s)]
            del asked[: len(turn)]
            span = turn[0].first, turn[-1].end
            if span not in steppers:
                steppers[span] = _stepper(env, rows, span, run_offset)
            start_s = time.perf_counter()
            left_out = steppers[span]()
            env_s = (time.perf_counter() - start_s) / (span[1] - span[0])
            os.write(ready_fd, b"".join([group.record for group in turn]))
            if left_out and not too_long:
                end.status({"note": f"a final info of over {INFO_NBYTES} bytes was left out"})
            too_long += left_out
            for notice in notices[told:]:
                end.status({"note": notice})
                told += 1
    if isinstance(env, Closable):
        env.close()


def _together(asked: Sequence[int], groups: Sequence[Group], env_s: float) -> int:
    """Returns how many of the groups that were asked are stepped as one, at least the first."""
    count = 1
    while (
        count < len(asked)
        and asked[count] == asked[0] + count
        and (groups[asked[count]].end - groups[asked[0]].first) * env_s <= TOGETHER_S
    ):
        count += 1
    return count


def _stepper(
    env: BatchEnv, rows: Rows, span: tuple[int, int], run_offset: int
) -> Callable[[], int]:
    """Returns what steps some environments, writes their rows, and counts infos left out."""
    env_id = np.arange(*span, dtype=np.int32)
    own = cut(rows, *span)
    if not isinstance(env, WritesRows):
        return lambda: write_step(own, env.step(env_id, own.action.copy()), run_offset=run_offset)
    out = as_step(own, env_id)

    def step() -> int:
        ended, infos = env.step_into(out, own.action)
        return write_infos(own, infos or {}) if ended else 0

    return step


def make_hosted(settings: Mapping[str, Any]) -> Hosted:
    """Makes the environments of a worker.

    Raises:
        ConfigError: they are not those that the parent has laid the table for.
    """
    family = catalog.environment_family(settings["env"])
    config = family.config_type(
        **{name: as_tuples(value) for name, value in settings["settings"].items()}
    )
    bounds = settings["groups"]
    first, end = bounds[0][0], bounds[-1][1]
    seed = generation_seed(settings["seed"], settings["generation"])
    env = family.make(
        settings["env"],
        config,
        num_envs=end - first,
        batch_size=min(end - first, settings.get("batch_size", end - first)),
        threads=1,
        seed=seed,
        first_env=settings.get("first_env", 0) + first,
        **(own_draws_of(seed) if settings.get("draws_apart") else {}),
    )
    ensure_same_spec(env.spec, settings.get("spec"))
    plan = layout(env.spec, settings["num_envs"])
    if plan.nbytes != settings["nbytes"]:
        raise ConfigError(f"{settings['env']} has another spec in a worker than in its parent")
    table = Table(mmap.mmap(settings["block_fd"], plan.nbytes), plan)
    worker, generation = settings["worker"], settings["generation"]
    groups = [
        Group(low - first, high - first, RECORD.pack(worker, number, generation))
        for number, (low, high) in enumerate(bounds)
    ]
    return Hosted(env, table.rows(first, end), groups)


def generation_seed(seed: int, generation: int) -> int:
    """Returns the run's own seed for the first start, and another one for each later start."""
    if not generation:
        return seed
    return derived_seed(seed, Use.RESTART, generation)


def own_draws_of(seed: int) -> dict[str, int]:
    """Returns what has Gymnasium environments of a pool draw apart, in whatever process they are.

    For `make`; that of another family does not know it.
    """
    return {"draws_seed": derived_seed(seed, Use.ENVIRONMENT_DRAWS)}


def as_tuples(value: Any) -> Any:
    """JSON has made lists of tuples; configs are frozen and have no lists."""
    if isinstance(value, list):
        return tuple(as_tuples(item) for item in value)
    return value


def main() -> None:
    """Takes the settings from the parent and works until it leaves."""
    end = WorkerEnd.open()
    settings = end.settings
    streams = sys.stdout, sys.stderr  # which environments may exchange
    hosted = make_hosted(settings)
    sys.stdout, sys.stderr = (NamedOutput(stream, [hosted.env]) for stream in streams)
    run_worker(
        end,
        hosted,
        ready_fd=settings["ready_fd"],
        run_offset=settings["generation"] * RUN_IDS,
    )


if __name__ == "__main__":
    main()
