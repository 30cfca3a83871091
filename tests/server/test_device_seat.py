"""The seat of environments in torch gives the unrolls of the seat that all others have."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headrace import RunConfig, train
from headrace.config import from_dict, merged
from headrace.envs.catch import CATCH
from headrace.envs.pointmass import POINTMASS
from headrace.errors import ConfigError
from headrace.learner import checkpoint
from headrace.learner.batches import align
from headrace.presets import default_for, find
from headrace.records import Batch, Unrolls
from headrace.run.build import Parts, build
from headrace.run.validate import check
from headrace.server.acting import Actor
from headrace.server.device_seat import DeviceSeat
from headrace.server.graphs import cuda_capture
from headrace.telemetry.metrics import Waits
from headrace.telemetry.record import read_metrics

NUM_ENVS, STEPS = 5, 7
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CASES: dict[str, dict[str, Any]] = {
    "catch": {"env": "catch"},
    "catch, truncated, lstm": {
        "env": "catch",
        "environment": {"truncate_after": 4},
        "network": {"network": "mlp", "lstm_size": 8},
    },
    "pointmass": {"env": "pointmass", "environment": {"episode_steps": 5}},
    "catch, r2d2": {
        "env": "catch",
        "algorithm": "r2d2",
        "environment": {"truncate_after": 4},
        "network": {"network": "mlp", "lstm_size": 8},
        "learning": {"unroll_steps": STEPS, "burn_in_steps": STEPS, "replay": {"replay_min": 10}},
    },
}


def stacking(family: Any, depth: int) -> Callable[..., Any]:
    """The family's spec, but with frames to be stacked."""
    plain = family.spec

    def spec(name: str, config: Any) -> Any:
        return dataclasses.replace(plain(name, config), frame_stack=depth)

    return spec


@pytest.fixture(params=[1, 3], ids=["one frame", "stacks"])
def depth(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    value: int = request.param
    for family in (CATCH, POINTMASS):
        monkeypatch.setattr(family, "spec", stacking(family, value))
    return value


class Episodes:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.ended: list[tuple[int, float, int]] = []

    def __call__(self, env_id: Any, returns: Any, lengths: Any, _: Any) -> None:
        rows = zip(env_id.tolist(), returns.tolist(), lengths.tolist(), strict=True)
        self.ended += list(rows)


def a_config(pool: str, **settings: Any) -> RunConfig:
    base = {
        "pool": pool,
        "lockstep": True,
        "device": "cpu",
        "precision": "float32",
        "server": {"num_envs": NUM_ENVS},
        "learning": {"unroll_steps": STEPS, "batch_unrolls": 3},
    }
    return from_dict(merged(base, settings))


def make(pool: str, told: Callable[..., None] = lambda *_: None, **settings: Any) -> Parts:
    return build(
        a_config(pool, **settings),
        resume_count=0,
        on_episodes=told,
        on_eval_episodes=lambda *_: None,
    )


def called_again(step: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """In place of a graph's capture: warms up, and does the same on the same tensors again."""
    for _ in range(3):
        step()
    return step, None


def fields_of(record: Any, name: str = "") -> dict[str, Tensor]:
    """Returns the tensors of a record by name."""
    if isinstance(record, Tensor):
        return {name: record}
    if isinstance(record, tuple):
        names = getattr(record, "_fields", range(len(record)))
        parts = zip(names, record, strict=True)
        return {
            key: value
            for part, field in parts
            for key, value in fields_of(field, f"{name}/{part}").items()
        }
    return {}


def assert_same(one: Unrolls | Batch, other: Unrolls | Batch) -> None:
    ours, theirs = fields_of(one), fields_of(other)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        assert torch.equal(ours[name], value), name


def served(parts: Parts, rounds: int) -> list[Any]:
    """Serves, and takes what is full by threes, so that batches lie across environments."""
    taken: list[Any] = []
    for number in range(rounds):
        parts.training.serve(lambda number=number: number, 1.0, Waits())
        while len(parts.queue) >= 3:
            with parts.queue.reading(3, timeout_s=0.0) as slots:
                if parts.algorithm.experience.replay is None:
                    taken.append(align(parts.unrolls.gather(slots)))
                else:
                    taken.append(parts.unrolls.segments(slots))
    return taken


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "in place"])
def test_its_unrolls_are_those_of_the_other_seat(case: str, captured: bool, depth: int) -> None:
    heard, expected = Episodes(), Episodes()
    with torch.random.fork_rng():
        parts, plain = make("device", heard, **CASES[case]), make("inline", expected, **CASES[case])
    seat = parts.training
    assert isinstance(seat, DeviceSeat)
    if captured:
        before = parts.generator.get_state()
        seat.warm_up(called_again)
        parts.generator.set_state(before)
    rounds = 8 * STEPS + 1
    ours, theirs = served(parts, rounds), served(plain, rounds)
    assert len(ours) == len(theirs) >= 13
    for mine, its in zip(ours, theirs, strict=True):
        if isinstance(mine, Batch):
            assert_same(mine, its)
            continue
        for name in ("env_id", "run_id", "final_at"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(its, name), name)
        for name, host in its.host.items():
            np.testing.assert_array_equal(mine.host[name], host, name)
        assert mine.columns.keys() == its.columns.keys()
        for name in ("frames", "recurrent", "final_frames", "final_value"):
            assert_same((getattr(mine, name),), (getattr(its, name),))
        assert_same(tuple(mine.columns.values()), tuple(its.columns[key] for key in mine.columns))
    # Its log is read when it is full: the newest episodes are yet to come.
    assert len(heard.ended) >= 30
    assert heard.ended == expected.ended[: len(heard.ended)]
    assert len(expected.ended) - len(heard.ended) <= NUM_ENVS * 2


def test_a_checkpoint_loses_no_episode_that_is_on_its_way_to_the_host() -> None:
    heard = Episodes()
    seat = make("device", heard, **CASES["catch, truncated, lstm"]).training
    assert isinstance(seat, DeviceSeat)
    seat._device = torch.device("cuda")  # logs are then told a round later
    for _ in range(3 * STEPS):
        seat.serve(lambda: 0, 1.0, Waits())
    told = len(heard.ended)
    seat.state_dict()
    assert len(heard.ended) > told


def test_a_warm_up_leaves_no_trace_even_if_it_fails() -> None:
    seat = make("device", **CASES["catch, truncated, lstm"]).training
    assert isinstance(seat, DeviceSeat)
    before = {name: value.copy() for name, value in seat.pool.snapshot().items()}

    def fails(step: Callable[[], Any]) -> Any:
        step()
        raise ValueError("no graph here")

    with pytest.raises(ValueError, match="no graph"):
        seat.warm_up(fails)
    after = seat.pool.snapshot()
    assert {name: value.tolist() for name, value in before.items()} == {
        name: after[name].tolist() for name in before
    }
    state = seat.state_dict()
    assert not state["length"].any()
    assert not any(part.any() for part in state["recurrent"])
    assert bool((state["previous_action"] == -1).all())


RUNS: dict[str, dict[str, Any]] = {
    "impala": {"env": "catch", "learning": {"batch_unrolls": 6}},
    "ppo": {"env": "pointmass", "algorithm": "ppo"},
    "r2d2": {
        "env": "catch",
        "algorithm": "r2d2",
        "learning": {"batch_unrolls": 8, "replay": {"replay_min": 16}},
    },
    "sac": {
        "env": "pointmass",
        "algorithm": "sac",
        "compile": "off",
        "learning": {"replay": {"replay_min": 100}},
    },
}
FRAMES = {"sac": 200, "r2d2": 1200}


def stop_after(updates: int | None) -> Callable[..., None]:
    """Asks a run to end, as Ctrl-C does."""

    def on_update(version: int, _: Any) -> None:
        if version == updates:
            signal.raise_signal(signal.SIGINT)

    return on_update


def run(
    out: Path, pool: str, name: str, total_frames: int, *, stop: int | None = None, **settings: Any
) -> Path:
    chosen = RUNS[name]
    preset = default_for(chosen["env"], chosen.get("algorithm", "impala"))
    base = {
        "out": str(out),
        "pool": pool,
        "device": "cpu",
        "precision": "float32",
        "lockstep": True,
        "tensorboard": False,
        "total_frames": total_frames,
        "log_interval_s": 1e9,
        "server": {"num_envs": 8},
    }
    values = merged(find(preset).values if preset else {}, base)
    train(from_dict(merged(merged(values, chosen), settings)), on_update=stop_after(stop))
    return out


def weights(out: Path) -> dict[str, Tensor]:
    saved, _ = checkpoint.newest_whole(out / "checkpoints")
    assert saved is not None
    return saved.tensors["weights"]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_in_lockstep_is_the_same_with_either(name: str, tmp_path: Path) -> None:
    runs = [
        run(tmp_path / pool, pool, name, FRAMES.get(name, 2500)) for pool in ("inline", "device")
    ]
    ours, theirs = (weights(out) for out in runs)
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key
    ends = [read_metrics(out / "metrics.jsonl")[-1] for out in runs]
    assert ends[0]["updates"] == ends[1]["updates"] > 1


@pytest.mark.parametrize("name", ["impala", "r2d2"])
def test_a_resumed_run_is_one_that_never_stopped(name: str, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", "device", name, 1500)
    half = run(tmp_path / "half", "device", name, 1500, stop=4)
    assert read_metrics(half / "metrics.jsonl")[-1]["updates"] == 4
    train(resume=half)
    expected = weights(whole)
    for key, value in weights(half).items():
        assert torch.equal(value, expected[key]), key
    rows = [read_metrics(out / "metrics.jsonl")[-1] for out in (whole, half)]
    assert rows[0]["episodes"] == rows[1]["episodes"] > 100


def test_it_learns_while_it_acts_and_the_queue_bounds_the_lag(tmp_path: Path) -> None:
    settings = {"lockstep": False, "server": {"num_envs": 64, "eval_envs": 4}}
    out = run(tmp_path / "run", "device", "impala", 20_000, **settings)
    row = read_metrics(out / "metrics.jsonl")[-1]
    assert row["episodes"] > 1500
    assert row["eval_episodes"] > 0
    # Waiting: one of each and a batch; then what is under construction, and a batch being read.
    assert row["policy_lag_max"] <= (3 * 64 + 2 * 6) / 6 + 1


def test_slots_that_come_back_in_disorder_are_refused() -> None:
    parts = make("device", **CASES["catch"])
    state = parts.unrolls.queue.state()
    parts.unrolls.queue.restore({**state, "free": state["free"][::-1]})
    with pytest.raises(RuntimeError, match="order"):
        served(parts, STEPS + 1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"env": "CartPole-v1"}, "not written in torch"),
        ({"env": "catch", "lockstep": False, "inference": "worker"}, "--inference worker"),
        ({"env": "catch", "server": {"inference_batch": 2}}, "--inference-batch"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        check(a_config("device", **settings))


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("case", CASES)
def test_a_captured_step_waits_for_nothing_and_its_unrolls_follow_the_rules(case: str) -> None:
    settings = {**CASES[case], "device": "cuda"}
    parts = make("device", **settings)
    seat = parts.training
    assert isinstance(seat, DeviceSeat)
    assert isinstance(seat.actor, Actor)
    seat.warm_up(cuda_capture(seat.actor.generator))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(STEPS + 1):
            seat.serve(lambda: 3, 1.0, Waits())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # The same actions on a CPU lead to the same rows.
    twin = make("device", **{**settings, "device": "cpu"}).training
    assert isinstance(twin, DeviceSeat)
    with parts.queue.reading(NUM_ENVS, timeout_s=0.0) as slots:
        if parts.algorithm.experience.replay is not None:
            segment = parts.unrolls.segments(slots)
            action = segment.columns["action"].cpu().transpose(0, 1)
            frames, reward = segment.frames.cpu().transpose(0, 1), segment.host["reward"].T
        else:
            unrolls = parts.unrolls.gather(slots)
            assert bool((unrolls.version == 3).all())
            action = unrolls.action.cpu()
            frames, reward = unrolls.observation[:, :, -1].cpu(), unrolls.reward.cpu().numpy()
    pool = twin.pool
    for row in range(STEPS + 1):
        torch.testing.assert_close(frames[row], pool.rows.observation)
        np.testing.assert_allclose(reward[row], pool.rows.reward.numpy(), rtol=1e-5, atol=1e-6)
        told = action[row]
        if told.is_floating_point():
            told = torch.tanh(told)  # the square has bounds of -1 and 1
        pool.advance(told, finals=True)


@pytest.mark.gpu
@NEEDS_GPU
def test_a_run_on_a_gpu_learns_and_resumes(tmp_path: Path) -> None:
    settings = {"device": "cuda", "lockstep": False, "server": {"num_envs": 256}}
    out = run(tmp_path / "run", "device", "impala", 200_000, **settings)
    train(resume=out, changes={"total_frames": 300_000})
    assert read_metrics(out / "metrics.jsonl")[-1]["episodes"] > 20_000
