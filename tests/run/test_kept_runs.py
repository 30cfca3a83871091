"""Runs of earlier versions, kept in tests/kept_runs: resumed, evaluated and loaded by this one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headrace import load
from headrace.cli import main
from headrace.config import read_toml
from headrace.learner import checkpoint
from headrace.learner.flattening import flatten, unflatten
from headrace.run.api import prepare, start
from headrace.run.local import Hooks, TrainResult
from headrace.telemetry.record import read_metrics
from tests.run.test_local import newest

KEPT = Path(__file__).parents[1] / "kept_runs"
RUNS = sorted(path.parent.name for path in KEPT.glob("*/config.toml"))
MORE_FRAMES = 600


@pytest.fixture(params=RUNS)
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return copied(request.param, tmp_path)


def copied(name: str, folder: Path) -> Path:
    return Path(shutil.copytree(KEPT / name, folder / name))


def resumed(run: Path) -> tuple[TrainResult, list[str]]:
    """Goes on with a run; returns what was said too."""
    said: list[str] = []
    frames = read_metrics(run / "metrics.jsonl")[-1]["env_frames"] + MORE_FRAMES
    changes = {"total_frames": frames, "schedule_frames": frames}  # or the rate would be zero
    prepared = prepare(resume=run, changes=changes)
    nothing = Hooks(lambda _: None, lambda *_: None, lambda _: None, on_message=said.append)
    return start(prepared, nothing), said


def changed(run: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Writes the checkpoint of a run again, as `change` has left its weights and training state."""
    saved = newest(run)
    weights = saved.tensors["weights"]
    training = unflatten(saved.tensors["training"], saved.meta["training"])
    change(weights, training)
    tensors, skeleton = flatten(training)
    meta = {k: v for k, v in saved.meta.items() if k not in ("schema", "files", "meta_sha256")}
    steps = meta.pop("agent_steps")
    checkpoint.save(
        run / "checkpoints",
        agent_steps=steps,
        tensors={**saved.tensors, "weights": weights, "training": tensors},
        meta={**meta, "training": skeleton},
        keep=1,
    )


def test_every_algorithm_has_a_kept_run() -> None:
    kept = {read_toml(KEPT / name / "config.toml")["algorithm"] for name in RUNS}
    assert kept == {"impala", "ppo", "r2d2", "sac"}


def test_a_kept_run_goes_on(run: Path) -> None:
    before, rows = newest(run), read_metrics(run / "metrics.jsonl")
    result, said = resumed(run)
    assert result.finished
    after = newest(run)
    for name in ("agent_steps", "updates", "samples", "episodes", "elapsed_s"):
        assert after.meta["counters"][name] > before.meta["counters"][name] > 0, name
    assert after.meta["resume_count"] == 1
    all_rows = read_metrics(run / "metrics.jsonl")
    assert all_rows[: len(rows)] == rows
    for name in ("env_frames", "updates", "samples", "episodes", "elapsed_s"):
        values = [row[name] for row in all_rows]
        assert values == sorted(values), name
    assert all(np.isfinite(value) for value in result.metrics.values() if isinstance(value, float))
    assert any(
        not torch.equal(tensor, before.tensors["weights"][name])
        for name, tensor in after.tensors["weights"].items()
    )
    assert sum("resumed from" in text for text in said) == 1
    assert not [text for text in said if "anew" in text or "skipped" in text], said
    if read_toml(run / "config.toml")["lockstep"]:
        assert not any("new episodes start" in text for text in said)


def test_a_kept_run_is_evaluated(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["eval", str(run), "--episodes", "3", "--json", "--device", "cpu"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["episodes"] == 3
    assert printed["agent_steps"] == newest(run).meta["agent_steps"]
    assert np.isfinite(printed["mean_return"])


def test_a_kept_run_is_loaded_and_acts(run: Path) -> None:
    policy = load(run, device="cpu")
    env = policy.make_env(seed=3)
    observation, _ = env.reset()
    state, reset = policy.initial_state(), True
    for _ in range(20):
        action, state = policy.act(observation, state, reset=reset)
        assert env.action_space.contains(action)
        observation, _, terminated, truncated, _ = env.step(action)
        reset = terminated or truncated
        if reset:
            observation, _ = env.reset()
    env.close()
    weights = policy.actor("greedy", 0.0).model
    assert isinstance(weights, torch.nn.Module)
    for name, tensor in weights.state_dict().items():
        assert torch.equal(tensor, newest(run).tensors["weights"][name])


def one_parameter_more(_: Any, training: dict[str, Any]) -> None:
    training["optimizer"]["param_groups"][0]["params"].append(99)


def other_moments(_: Any, training: dict[str, Any]) -> None:
    for moments in training["optimizer"]["state"].values():
        moments["other"] = moments.pop("exp_avg")


def flat_moments(_: Any, training: dict[str, Any]) -> None:
    for moments in training["optimizer"]["state"].values():
        moments["exp_avg"] = moments["exp_avg"].flatten()[:1].repeat(77)


def no_optimizer(_: Any, training: dict[str, Any]) -> None:
    del training["optimizer"]


@pytest.mark.parametrize("change", [one_parameter_more, other_moments, flat_moments, no_optimizer])
def test_moments_that_do_not_fit_start_anew_and_this_is_said(
    tmp_path: Path, change: Callable[[Any, dict[str, Any]], None]
) -> None:
    run = copied("impala-recall", tmp_path)
    changed(run, change)
    updates = newest(run).meta["counters"]["updates"]
    result, said = resumed(run)
    assert result.finished
    assert result.metrics["updates"] > updates
    assert [text.partition("whole or in part: ")[2] for text in said if "anew" in text] == [
        "optimizer"
    ]


def test_an_option_that_the_optimiser_lacked_then_is_as_today(tmp_path: Path) -> None:
    run = copied("impala-recall", tmp_path)
    changed(run, lambda _, training: training["optimizer"]["param_groups"][0].pop("amsgrad"))
    result, said = resumed(run)
    assert result.finished
    assert not any("anew" in text for text in said)


@pytest.mark.parametrize(
    ("name", "part", "inner"),
    [
        ("ppo-pointmass", "rewards", "mean"),
        ("sac-pointmass", "critic_optimizer", "first"),
        ("sac-pointmass", "alpha_optimizer", None),
        ("r2d2-recall", "updates", None),
    ],
)
def test_what_a_learning_rule_did_not_save_starts_anew_and_this_is_said(
    tmp_path: Path, name: str, part: str, inner: str | None
) -> None:
    def change(_: Any, training: dict[str, Any]) -> None:
        if inner is None:
            del training[part]
        else:
            del training[part][inner]

    run = copied(name, tmp_path)
    changed(run, change)
    result, said = resumed(run)
    assert result.finished
    assert [text.partition("whole or in part: ")[2] for text in said if "anew" in text] == [part]


def test_statistics_that_a_network_lacked_start_anew_and_this_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = copied("ppo-pointmass", tmp_path)
    names = [name for name in newest(run).tensors["weights"] if name.endswith(".variance")]
    assert names
    changed(run, lambda weights, _: [weights.pop(name) for name in names])
    with caplog.at_level("WARNING", "headrace"):
        load(run, device="cpu")
    assert [names[0] in record.message for record in caplog.records] == [True]
    result, said = resumed(run)
    assert result.finished
    assert [text.partition("whole or in part: ")[2] for text in said if "anew" in text] == [
        ", ".join(sorted(names))
    ]
