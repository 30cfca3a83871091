"""Acting workers as processes, with environments that say who they are and what step it is."""

from __future__ import annotations

import gc
import mmap
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from headrace import catalog
from headrace.algorithms.base import ExperienceSpec
from headrace.algorithms.impala import ImpalaConfig
from headrace.config import RunConfig, completed
from headrace.errors import ConfigError, DeadlineExceeded, PeerLost
from headrace.networks.models import NetworkConfig
from headrace.pools.memory import anonymous_block
from headrace.pools.settings import WorkerConfig
from headrace.records import Unrolls
from headrace.run import acting_workers
from headrace.run.acting_workers import ActingWorkers
from headrace.run.build import make_model
from headrace.server.settings import ServerConfig
from headrace.telemetry.metrics import Waits

MODULE = '''
import os, time
from dataclasses import dataclass
import gymnasium as gym
import numpy as np
from headrace.specs import EnvSpec
from headrace.steps import EnvStep

EPISODE = 7

@dataclass(frozen=True)
class Config:
    fault: str = ""

class Numbers:
    """Shows process, environment and number of the step since the process began."""

    def __init__(self, spec, config, num_envs, first_env):
        self.spec, self.num_envs, self.fault = spec, num_envs, config.fault
        self.env = first_env + np.arange(num_envs)
        self.number = np.zeros(num_envs, np.int64)

    def show(self, env_id, reset):
        rows = [np.full(len(env_id), os.getpid()), self.env[env_id], self.number[env_id]]
        ended = reset & (self.number[env_id] > 0)
        return EnvStep(
            env_id=env_id, run_id=np.zeros(len(env_id), np.int64),
            observation=np.stack(rows, 1).astype(np.float32),
            reward=self.number[env_id].astype(np.float32), reset=reset,
            terminated=ended, truncated=np.zeros(len(env_id), bool),
            final_observation=np.zeros((len(env_id), 3), np.float32) if ended.any() else None,
            episode_info={int(row): {"number": float(self.number[env_id[row]])}
                          for row in np.flatnonzero(ended)},
        )

    def reset(self):
        every = np.arange(self.num_envs, dtype=np.int32)
        return self.show(every, np.ones(self.num_envs, bool))

    def step(self, env_id, action):
        self.number[env_id] += 1
        if self.fault and self.number.max() == 12:
            if self.fault == "hang":
                print("thinking for ever")
                time.sleep(600.0)
            raise RuntimeError("boom in environment 0")
        return self.show(env_id, self.number[env_id] % EPISODE == 0)

class Family:
    config_type = Config
    pool = "shm"

    def spec(self, name, config):
        return EnvSpec(name=name, observation_space=gym.spaces.Box(0, 1e7, (3,), np.float32),
                       action_space=gym.spaces.Discrete(3))

    def evaluation(self, config):
        return config

    def make(self, name, config, *, num_envs, batch_size, threads, seed, first_env=0):
        return Numbers(self.spec(name, config), config, num_envs, first_env)

FAMILY = Family()
'''
T, B, NUM_ENVS = 4, 3, 5


def open_files() -> list[str]:
    """Names what is open here; nothing where there is no /proc."""
    names = []
    for fd in os.listdir("/proc/self/fd") if Path("/proc/self/fd").exists() else []:
        with suppress(FileNotFoundError):  # the folder itself, while it was read
            names.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sorted(names)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    gc.collect()  # what earlier tests left to be collected is not ours
    before = open_files()
    yield
    gc.collect()  # shared memory goes when nobody looks at it any more
    assert open_files() == before


class Run(NamedTuple):
    workers: ActingWorkers
    model: Any
    messages: list[str]
    episodes: list[tuple[int, float, int, dict[str, float]]]


@contextmanager
def running(folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Iterator[Run]:
    """Two workers for five environments; then nothing may be left of them."""
    fault = settings.pop("fault", "")
    (folder / "numbers_env.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(folder))
    config = completed(
        RunConfig(
            env="numbers_env:FAMILY",
            inference="worker",
            device="cpu",
            precision="float32",
            server=ServerConfig(num_envs=NUM_ENVS),
            workers=WorkerConfig(num_workers=2, **settings),
            network=NetworkConfig(hidden_sizes=(8,)),
            learning=ImpalaConfig(unroll_steps=T, batch_unrolls=B),
            environment=catalog.resolve("environment", {}, "numbers_env:Config")(fault=fault),
        )
    )
    spec = catalog.environment_family(config.env).spec(config.env, config.environment)
    model = make_model(config, spec, torch.device("cpu"))
    run = Run(
        ActingWorkers(
            config,
            spec,
            model,
            experience=ExperienceSpec(unroll_steps=T, batch_unrolls=B),
            capacity=B,
            groups=1,
            resume_count=0,
        ),
        model,
        [],
        [],
    )
    try:
        run.workers.start(
            lambda *columns: run.episodes.extend(zip(*columns, strict=True)),
            run.messages.append,
        )
        yield run
    finally:
        run.workers.close()
        run.workers.close()


def batches(run: Run, *, timeout_s: float = 120.0) -> Iterator[Unrolls]:
    """Yields what a learner would get, and publishes a version after each."""
    version, waits, end_s = 0, Waits(), time.monotonic() + timeout_s
    run.workers.weights.publish(run.model, version)
    while True:
        assert time.monotonic() < end_s, run.messages
        run.workers.check(waits)
        try:
            with run.workers.queue.reading(B, timeout_s=0.2) as slots:
                unrolls = run.workers.unrolls.gather(slots)
        except DeadlineExceeded:
            continue
        version += 1
        run.workers.weights.publish(run.model, version)
        yield unrolls


def check_unrolls(
    unrolls: Unrolls,
    ends: dict[tuple[int, int], int],
    newest: int,
    starts: dict[int, set[int]],
) -> set[int]:
    """Checks a batch against what its rows say of themselves; returns the processes.

    Args:
        unrolls: The batch.
        ends: By process and environment, the last number seen; goes on from there.
        newest: Version that no row can be newer than.
        starts: By process, the numbers with which first unrolls began; grows.
    """
    rows = unrolls.observation[:, :, 0].long()  # [U, B, 3]
    pid, env, number = rows.unbind(-1)
    assert (pid == pid[0]).all()
    assert (env == env[0]).all()
    assert (number == number[0] + torch.arange(T + 1)[:, None]).all()
    assert torch.equal(unrolls.reward.long(), number)
    assert torch.equal(unrolls.reset, number % 7 == 0)
    assert torch.equal(unrolls.terminated, (number % 7 == 0) & (number > 0))
    assert (unrolls.version[1:] >= unrolls.version[:-1]).all()
    assert unrolls.version.min() >= 0
    assert unrolls.version.max() <= newest
    for who, which, first in zip(*rows[0].T.tolist(), strict=True):
        key = (who, which)
        if key not in ends:  # the first unroll begins late, so that not all end together
            assert first < T
            starts.setdefault(who, set()).add(first)
        assert first == ends.get(key, first), "unrolls of one environment follow each other"
        ends[key] = first + T
    return set(pid[0].tolist())


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_batches_are_consistent_and_go_on_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: dict[tuple[int, int], int] = {}
    pids: set[int] = set()
    starts: dict[int, set[int]] = {}
    victim = extra = 0
    with running(tmp_path, monkeypatch) as run:
        for version, unrolls in enumerate(batches(run)):
            pids |= check_unrolls(unrolls, ends, version, starts)
            if not victim and len({env for env, *_ in run.episodes}) == NUM_ENVS:
                victim = int(unrolls.observation[0, 0, 0, 0])
                os.kill(victim, signal.SIGKILL)
            extra += len(pids) == 3
            if extra == 20:
                break
        workers = run.workers
        assert workers.deaths == 1
        # Each worker's environments began apart, those of the one that was started anew too.
        assert len(starts) == 3
        assert all(len(numbers) >= 2 for numbers in starts.values())
        assert any("worker" in line and "SIGKILL" in line for line in run.messages), run.messages
        assert workers.dropped_unrolls >= 1
        assert {env for _, env in ends} == set(range(NUM_ENVS))
        assert workers.agent_steps >= sum(ends.values())
        assert 0 <= workers.unfinished() <= NUM_ENVS
        p50_s, p99_s = workers.turnaround_s.read()
        assert 0 < p50_s <= p99_s
        assert {env for env, *_ in run.episodes} == set(range(NUM_ENVS))
        for _, total, length, info in run.episodes:
            assert length == 7
            assert total == sum(range(int(info["number"]) - 6, int(info["number"]) + 1))
    assert all(gone(pid) for pid in pids)


def test_an_environment_that_raises_ends_the_run_with_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tmp_path, monkeypatch, fault="raise", max_worker_deaths=1) as run:
        lost = pytest.raises(PeerLost, match=r"worker \d \(environments .*boom in environment 0")
        with lost:
            list(batches(run))
        assert run.workers.deaths == 1


def test_a_worker_that_hangs_is_killed_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(
        tmp_path, monkeypatch, fault="hang", max_worker_deaths=1, step_timeout_s=1.5
    ) as run:
        lost = pytest.raises(PeerLost, match=r"gave no step after 1.5 s.*numbers_env.py.*step")
        with lost:
            list(batches(run))
        assert any("thinking for ever" in line for line in run.messages)


def test_too_little_memory_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = []

    def scarce(nbytes: int) -> tuple[int, mmap.mmap]:
        if blocks:
            raise ConfigError("no space")
        blocks.append(nbytes)
        return anonymous_block(nbytes)

    monkeypatch.setattr(acting_workers, "anonymous_block", scarce)
    no_space = pytest.raises(ConfigError, match="no space")
    with no_space, running(tmp_path, monkeypatch):
        pytest.fail("there was no space")
    assert len(blocks) == 1
