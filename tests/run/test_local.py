"""Training on one machine: order, resume, signals, failures."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headrace import RunConfig, TrainResult, preset, train
from headrace.config import from_dict, merged
from headrace.envs.catch import CATCH
from headrace.errors import ConfigError, DeadlineExceeded, PeerLost, TrainingDiverged
from headrace.learner import checkpoint
from headrace.learner.loop import Learner
from headrace.pools.inline import InlinePool
from headrace.presets import find
from headrace.run import local, saving
from headrace.run.local import check_alive
from headrace.steps import EnvStep
from headrace.telemetry.record import RunDirectory, read_metrics

# What a clock decides, and so differs between two runs that are otherwise the same.
CLOCKED = ("elapsed_s", "_per_s", "_hz", "_load", "wait/", "turnaround", "bottleneck")


def a_config(out: Path, env: str = "catch", **settings: Any) -> RunConfig:
    base = {
        "env": env,
        "out": str(out),
        "device": "cpu",
        "precision": "float32",
        "lockstep": True,
        "tensorboard": False,
        "total_frames": 2500,
        "log_interval_s": 1e-9,
        "server": {"num_envs": 8},
        "learning": {"unroll_steps": 7, "batch_unrolls": 6},
    }
    return from_dict(merged(merged(find(env).values, base), settings))


def newest(run: Path) -> checkpoint.Checkpoint:
    found, warnings = checkpoint.newest_whole(run / "checkpoints")
    assert warnings == []
    assert found is not None
    return found


def assert_same_weights(run: Path, other: Path) -> None:
    one, two = newest(run).tensors, newest(other).tensors
    assert one.keys() == two.keys()
    for group, tensors in one.items():
        assert tensors.keys() == two[group].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, two[group][name]), f"{group}: {name}"


def timeless(run: Path) -> list[dict[str, Any]]:
    rows = read_metrics(run / "metrics.jsonl")
    return [
        {key: value for key, value in row.items() if not any(part in key for part in CLOCKED)}
        for row in rows
    ]


def stop_after(updates: int) -> Any:
    def on_update(version: int, _: Mapping[str, Tensor]) -> None:
        if version == updates:
            os.kill(os.getpid(), signal.SIGTERM)

    return on_update


@pytest.mark.parametrize(("env", "lstm_size"), [("catch", 0), ("recall", 16)])
def test_one_seed_gives_one_run(tmp_path: Path, env: str, lstm_size: int) -> None:
    for name in ("a", "b"):
        config = a_config(tmp_path / name, env, network={"lstm_size": lstm_size})
        assert train(config).finished
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    rows = timeless(tmp_path / "a")
    assert len(rows) > 50
    assert rows == timeless(tmp_path / "b")
    assert any("policy_lag_mean" in row for row in rows)


def test_another_seed_gives_another_run(tmp_path: Path) -> None:
    for seed in (1, 2):
        train(a_config(tmp_path / str(seed), seed=seed, total_frames=1000))
    one, two = (newest(tmp_path / str(seed)).tensors["weights"] for seed in (1, 2))
    assert all(not torch.equal(one[name], two[name]) for name in one if name.endswith("weight"))


@pytest.mark.parametrize(
    ("env", "settings"),
    [
        ("catch", {}),
        ("catch", {"environment": {"truncate_after": 4}, "server": {"eval_envs": 3}}),
        ("recall", {"network": {"lstm_size": 16}, "learning": {"target_entropy": 0.3}}),
        (
            "catch",
            {
                "network": {"normalize_values": True},
                "learning": {
                    "passes": 2,
                    "minibatches": 2,
                    "clip_range": 0.2,
                    "clip_range_schedule": "cosine",
                    "entropy_cost_schedule": "linear",
                    "stop_kl": 0.01,
                    "optimizer": {"learning_rate_schedule": "kl", "target_kl": 0.001},
                },
            },
        ),
    ],
    ids=["catch", "truncated-and-evaluated", "recall-lstm", "reuse"],
)
def test_a_resumed_run_is_the_run_that_never_stopped(
    tmp_path: Path, env: str, settings: dict[str, Any]
) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(a_config(whole, env, **settings))
    for stop in (11, 30):
        resume = halves if halves.exists() else None
        config = None if resume else a_config(halves, env, **settings)
        result = train(config, resume=resume, on_update=stop_after(stop))
        assert not result.finished
        assert result.metrics["updates"] == stop
    result = train(resume=halves)
    assert result.finished
    assert_same_weights(whole, halves)
    last, other = read_metrics(whole / "metrics.jsonl")[-1], result.metrics
    for name in ("env_frames", "agent_steps", "updates", "samples", "episodes", "return_max"):
        assert last[name] == other[name], name
    assert newest(halves).meta["resume_count"] == 2
    assert last["updates"] > 40


def test_counters_of_a_second_session_go_on(tmp_path: Path) -> None:
    config = a_config(tmp_path / "run", lockstep=False, log_interval_s=0.05)
    train(config, on_update=stop_after(10))
    first = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    result = train(resume=tmp_path / "run", changes={"total_frames": 4000})
    assert result.finished
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    for name in ("env_frames", "agent_steps", "updates", "samples", "episodes", "elapsed_s"):
        values = [row[name] for row in rows]
        assert values == sorted(values), name
        assert values[-1] > first[name] > 0, name
    assert rows[-1]["env_frames"] >= 4000
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "resumed from" in log
    assert "new episodes start" in log


def test_a_fixed_setting_cannot_change(tmp_path: Path) -> None:
    train(a_config(tmp_path / "run", total_frames=500))
    with pytest.raises(ConfigError, match="seed belongs to the run"):
        train(resume=tmp_path / "run", changes={"seed": 5})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("lockstep", [True, False])
def test_a_signal_saves_and_ends(tmp_path: Path, number: int, lockstep: bool) -> None:
    def on_update(version: int, _: Mapping[str, Tensor]) -> None:
        if version == 5:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    config = a_config(tmp_path / "run", lockstep=lockstep, total_frames=10**9)
    result = train(config, on_update=on_update)
    assert not result.finished
    assert newest(tmp_path / "run").meta["counters"]["updates"] == 5
    assert signal.getsignal(number) == before
    assert not server_threads()


def server_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "server"]


def test_overlapped_training(tmp_path: Path) -> None:
    seen: list[int] = []
    saved: list[Path] = []
    rows: list[Any] = []
    result = train(
        a_config(tmp_path / "run", lockstep=False, server={"eval_envs": 2}),
        on_update=lambda version, metrics: seen.append(
            version + 0 * len(metrics["loss/total"].shape)
        ),
        on_checkpoint=saved.append,
        on_row=rows.append,
    )
    assert isinstance(result, TrainResult)
    assert result.finished
    assert seen == list(range(1, len(seen) + 1))
    assert result.metrics["env_frames"] >= 2500
    assert result.metrics["eval_episodes"] > 0
    # One before the first update, to go on from if that one diverges, and one at the end.
    assert [path.name for path in saved[:-1]] == ["agent_steps_000000000000"]
    assert saved[-1] == newest(tmp_path / "run").path
    assert rows[-1] == result.metrics
    assert not server_threads()
    text = (tmp_path / "run" / "config.toml").read_text()
    assert 'env = "catch"' in text


def test_checkpoints_come_at_intervals(tmp_path: Path) -> None:
    saved: list[Path] = []
    config = a_config(
        tmp_path / "run", checkpoint_interval_s=1e-9, keep_checkpoints=2, total_frames=1500
    )
    result = train(config, on_checkpoint=saved.append)
    assert len(saved) >= result.metrics["updates"] + 2  # between batches too
    left = sorted(path for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == sorted(set(saved))[-2:]


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = saving.save, []

    def save(*arguments: Any) -> Path:
        calls.append(1)
        if 3 <= len(calls) <= 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(saving, "save", save)
    saved: list[Path] = []
    alive: list[bool] = []
    config = a_config(tmp_path / "run", checkpoint_interval_s=1e-9, total_frames=1500)
    result = train(
        config,
        on_checkpoint=saved.append,
        on_update=lambda version, _: version == 8 and alive.append(saved[-1].is_dir()),
    )
    assert result.finished
    assert alive == [True], "the earlier checkpoint must stay"
    assert saved[-1] == newest(tmp_path / "run").path
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("could not write (No space left on device)") == 6


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    train(a_config(tmp_path / "run", total_frames=500))
    before = (tmp_path / "run" / "config.toml").read_bytes()
    with pytest.raises(ConfigError, match="is not empty: go on with"):
        train(a_config(tmp_path / "run", seed=7))
    assert (tmp_path / "run" / "config.toml").read_bytes() == before


def test_a_run_in_training_is_refused_to_another_process(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(a_config(run, total_frames=500))
    code = "import headrace, sys; headrace.train(resume=sys.argv[1])"
    with RunDirectory.open(run).lock():
        other = subprocess.run(
            [sys.executable, "-c", code, str(run)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert other.returncode != 0
    assert f"is being trained by another process (pid {os.getpid()})" in other.stderr


def test_either_a_config_or_a_run(tmp_path: Path) -> None:
    for arguments in ({}, {"config": preset("catch", "catch"), "resume": tmp_path}):
        with pytest.raises(ConfigError, match="give either"):
            train(**arguments)


def test_weights_that_diverged_are_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Learner._check

    def check(self: Learner, finite: Tensor) -> None:
        real(self, finite & (self.version < 8))

    monkeypatch.setattr(Learner, "_check", check)
    config = a_config(tmp_path / "run", lockstep=False, checkpoint_interval_s=1e-9)
    with pytest.raises(TrainingDiverged, match="at update 8"):
        train(config)
    assert newest(tmp_path / "run").meta["counters"]["updates"] == 8
    assert not server_threads()


class Broken(InlinePool):
    """Fails at its hundredth batch."""

    made: list[Broken] = []  # noqa: RUF012 - the test looks at what the run made

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.left, self.closed = 100, False
        Broken.made.append(self)

    def receive(self, timeout_s: float) -> EnvStep | None:
        self.left -= 1
        if self.left < 0:
            raise PeerLost("the environments are gone")
        return super().receive(timeout_s)

    def close(self) -> None:
        self.closed = True
        super().close()


@pytest.mark.parametrize("lockstep", [True, False])
def test_what_ends_the_server_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lockstep: bool
) -> None:
    monkeypatch.setattr("headrace.pools.inline.InlinePool", Broken)
    Broken.made.clear()
    config = a_config(
        tmp_path / "run", lockstep=lockstep, total_frames=10**9, server={"eval_envs": 2}
    )
    with pytest.raises(PeerLost, match="the environments are gone"):
        train(config)
    assert not server_threads()
    assert [pool.closed for pool in Broken.made] == [True, True]
    # The lock is free again.
    with RunDirectory.open(tmp_path / "run").lock():
        pass


FRAGILE = """
    from headrace.envs.catch import CatchFamily
    from headrace.envs.toys import NUMPY, ToyEnv

    class Fragile(ToyEnv):
        def step(self, env_id, action):
            if self.snapshot()["episode"].max() > 20:
                raise RuntimeError("the bridge broke")
            return super().step(env_id, action)

    class Family(CatchFamily):
        def spec(self, name, config):
            return super().spec("catch", config)

        def make(self, name, config, *, num_envs, batch_size, threads, seed):
            spec, rules = self.spec(name, config), self.rules(config, NUMPY)
            return Fragile(spec, rules, num_envs=num_envs, seed=seed)

    FAMILY = Family()
"""


def test_an_environment_of_the_user_that_raises_ends_the_run_with_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fragile_environment.py").write_text(textwrap.dedent(FRAGILE))
    monkeypatch.syspath_prepend(tmp_path)
    config = from_dict(
        {
            "env": "fragile_environment:FAMILY",
            "out": str(tmp_path / "run"),
            "device": "cpu",
            "tensorboard": False,
            "server": {"num_envs": 8},
            "learning": {"unroll_steps": 7, "batch_unrolls": 6},
        }
    )
    with pytest.raises(RuntimeError, match="the bridge broke"):
        train(config)
    assert not server_threads()


def test_a_pool_that_is_silent_too_long_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    env = CATCH.make("catch", CATCH.config_type(), num_envs=1, batch_size=1, threads=1, seed=0)
    pool: Any = InlinePool(env, batch_size=1)
    check_alive(pool)
    monkeypatch.setattr(local.time, "monotonic", lambda: 1000.0)
    pool.waiting_since = None
    check_alive(pool)
    pool.waiting_since = 1000.0 - 119.0
    check_alive(pool)
    pool.waiting_since = 1000.0 - 121.0
    with pytest.raises(DeadlineExceeded, match="catch: no environment gave a step"):
        check_alive(pool)


def test_settings_that_do_not_fit_are_named_before_anything_starts(tmp_path: Path) -> None:
    config = a_config(tmp_path / "run", server={"queue_unrolls": 2})
    with pytest.raises(ConfigError, match="queue_unrolls=2 can never hold a batch"):
        train(config)
    with pytest.raises(ConfigError, match="use network mlp"):
        train(a_config(tmp_path / "other", network={"network": "nature"}))


def test_time_limits_of_the_rewards_are_those_of_the_logs(tmp_path: Path) -> None:
    # Nine steps a board: what is logged as an episode is a whole one.
    result = train(a_config(tmp_path / "run"))
    assert result.metrics["length_mean"] == 9
    assert result.metrics["return_max"] == 1
    assert np.isfinite(result.metrics["return_mean"])


def test_a_signal_that_comes_twice_at_once_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """timeout(1) signals the process, and then its group."""
    now_s = 100.0
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    stop = local.Stop(lambda: now_s)
    assert not stop.requested
    for moment_s in (100.0, 100.001, 100.4):
        now_s = moment_s
        stop(signal.SIGINT, None)
        assert stop.requested
    assert codes == []
    now_s = 100.6
    stop(signal.SIGTERM, None)
    assert codes == [128 + signal.SIGTERM]
