"""The worker: steps groups of environments, and knows nothing of policies.

    control pipe --- group --->  reads the actions of the group's rows
                                 steps the group's environments
    ready pipe  <--- record ---  writes what they showed into the same rows

Run as a program by `pools.shm`. It imports no torch: a worker is ready in a second and small. An
exception ends it; `pools.processes` tells the parent, which decides whether to start it again.
"""

from __future__ import annotations

import io
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
    INFO_NBYTES,
    RECORD,
    Rows,
    Table,
    as_step,
    layout,
    write_infos,
    write_step,
)
from headrace.steps import EnvStep, EpisodeInfo

RUN_IDS = 1 << 32
"""Run ids of one generation of workers; an environment may use them up by itself."""
HOLD_S = 100e-6
"""Seconds for which a group that is ready may wait for the next one: to wake the server for each
costs more than to step a few cheap environments."""


@runtime_checkable
class WritesRows(Protocol):
    """A `BatchEnv` that can write its steps where they belong."""

    def step_into(self, out: EnvStep, action: NDArray[Any]) -> tuple[bool, EpisodeInfo | None]:
        """Steps the copies `out.env_id`; see `envs.gymnasium_batch`."""


class Group(NamedTuple):
    """Environments that step together."""

    env: BatchEnv
    rows: Rows
    record: bytes
    notices: Sequence[str]  # grows where the environment has something to say of itself


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


def run_worker(end: WorkerEnd, groups: Sequence[Group], *, ready_fd: int, run_offset: int) -> None:
    """Steps one group while the others wait for actions, until the parent is gone.

    Args:
        end: pipes to the parent.
        groups: environments, their rows, and what to write when these are ready.
        ready_fd: the pipe that all workers write into.
        run_offset: added to run ids.
    """
    steppers = [_stepper(group.env, group.rows, run_offset) for group in groups]
    told = [len(group.notices) for group in groups]  # the parent has seen these for itself
    too_long = 0
    for group in groups:
        too_long += write_step(group.rows, group.env.reset(), run_offset=run_offset)
        os.write(ready_fd, group.record)
    while True:
        try:
            asked = end.receive()
        except PeerLost:
            break
        held, held_since_s = b"", time.perf_counter()
        for (number,) in GROUP.iter_unpack(asked or b""):
            left_out = steppers[number]()
            notices = groups[number].notices
            held += groups[number].record
            if time.perf_counter() - held_since_s > HOLD_S:
                os.write(ready_fd, held)
                held, held_since_s = b"", time.perf_counter()
            if left_out and not too_long:
                end.status({"note": f"a final info of over {INFO_NBYTES} bytes was left out"})
            too_long += left_out
            for notice in notices[told[number] :]:
                end.status({"note": notice})
                told[number] += 1
        if held:
            os.write(ready_fd, held)
    for group in groups:
        if isinstance(group.env, Closable):
            group.env.close()


def _stepper(env: BatchEnv, rows: Rows, run_offset: int) -> Callable[[], int]:
    """Returns what steps a group and writes its rows, and says how many infos were left out."""
    env_id = np.arange(env.num_envs, dtype=np.int32)
    if not isinstance(env, WritesRows):
        return lambda: write_step(
            rows, env.step(env_id, rows.action.copy()), run_offset=run_offset
        )
    out = as_step(rows, env_id)

    def step() -> int:
        ended, infos = env.step_into(out, rows.action)
        return write_infos(rows, infos or {}) if ended else 0

    return step


def make_groups(settings: Mapping[str, Any]) -> list[Group]:
    """Makes the environments of a worker.

    Raises:
        ConfigError: they are not those that the parent has laid the table for.
    """
    family = catalog.environment_family(settings["env"])
    config = family.config_type(
        **{name: _as_tuples(value) for name, value in settings["settings"].items()}
    )
    seed = generation_seed(settings["seed"], settings["generation"])
    envs = [
        family.make(
            settings["env"],
            config,
            num_envs=end - first,
            batch_size=end - first,
            threads=1,
            seed=seed,
            first_env=first,
        )
        for first, end in settings["groups"]
    ]
    plan = layout(envs[0].spec, settings["num_envs"])
    if plan.nbytes != settings["nbytes"]:
        raise ConfigError(f"{settings['env']} has another spec in a worker than in its parent")
    table = Table(mmap.mmap(settings["block_fd"], plan.nbytes), plan)
    return [
        Group(
            env,
            table.rows(first, end),
            RECORD.pack(settings["worker"], number, settings["generation"]),
            getattr(env, "notices", ()),
        )
        for number, (env, (first, end)) in enumerate(zip(envs, settings["groups"], strict=True))
    ]


def generation_seed(seed: int, generation: int) -> int:
    """Returns the run's own seed for the first start, and another one for each later start."""
    if not generation:
        return seed
    return int(np.random.SeedSequence((seed, generation)).generate_state(1)[0] >> 1)


def _as_tuples(value: Any) -> Any:
    """JSON has made lists of tuples; configs are frozen and have no lists."""
    if isinstance(value, list):
        return tuple(_as_tuples(item) for item in value)
    return value


def main() -> None:
    """Takes the settings from the parent and works until it leaves."""
    end = WorkerEnd.open()
    settings = end.settings
    groups = make_groups(settings)
    envs = [group.env for group in groups]
    sys.stdout, sys.stderr = NamedOutput(sys.stdout, envs), NamedOutput(sys.stderr, envs)
    run_worker(
        end,
        groups,
        ready_fd=settings["ready_fd"],
        run_offset=settings["generation"] * RUN_IDS,
    )


if __name__ == "__main__":
    main()
