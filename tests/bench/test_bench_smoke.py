"""Every benchmark runs and prints what it promises; how fast it was is not tested."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest

from headrace.bench import command
from headrace.bench.end_to_end import ceiling_of
from headrace.bench.settings import PolicyArguments, learning_settings, run_config
from headrace.bench.stages import FreePool
from headrace.catalog import environment_family
from headrace.config import from_dict
from headrace.errors import ConfigError
from headrace.presets import find
from headrace.run.complete import make_config


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    command.run(list(argv))
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


NO_SIZES: dict[str, Any] = {"unroll_steps": None, "batch_unrolls": None}
SAC = ("--algorithm", "sac", "--env", "pointmass", "--compile", "off")
FIGURES = {
    *("sampling_hz", "updates_per_s", "update_frame_rate_hz"),
    *("samples_used_share", "transmission_loss"),
    *("cpu_load", "cpu_load_machine", "gpu_load", "gpu_memory_gib"),
}


def test_end_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    result = printed(capsys, "end-to-end", "--smoke", "--json")
    assert result.keys() >= {"network", "precision", "device", "cores", "threads", "updates_per_s"}
    assert result.keys() >= FIGURES
    assert result["env"] == "catch"
    assert result["num_envs"] == 16
    assert result["sampling_hz"] == result["agent_steps_per_s"]
    assert result["env_frames_per_s"] == result["agent_steps_per_s"] > 0  # catch repeats no action
    assert result["policy_lag_mean"] >= 0
    # One pass over each sample; a short window ends in the middle of some unrolls.
    assert result["samples_per_agent_step"] == pytest.approx(1.0, rel=0.3)
    ceiling = result["ceiling"]
    assert ceiling.keys() == {"model", "environment", "inference", "learner", "combined"}
    assert result["share_of_ceiling"] == result["agent_steps_per_s"] / ceiling["combined"]


@pytest.mark.parametrize("settings", [("--env", "catch"), ("--env", "pointmass")])
def test_end_to_end_beside_the_policy(
    capsys: pytest.CaptureFixture[str], settings: tuple[str, ...]
) -> None:
    result = printed(
        capsys, "end-to-end", "--smoke", "--json", "--pool", "device", "--seconds", "0.3", *settings
    )
    assert result["pool"] == "device"
    assert min(result["agent_steps_per_s"], *list(result["ceiling"].values())[1:]) > 0


def test_end_to_end_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    command.run(["end-to-end", "--smoke", "--seconds", "0.2", "--lstm-size", "8"])
    assert "share of ceiling" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        (
            "pools",
            {
                *("pool", "env", "envs", "agent_steps_per_s"),
                *("latency_us_p50", "latency_us_p99"),
            },
        ),
        ("inference", {"precision", "agent_steps_per_s", "batch_ms"}),
        (
            "learner",
            {
                *("precision", "compiled", "batch_samples", "updates_per_s", "samples_per_s"),
                "update_frame_rate_hz",
            },
        ),
    ],
)
def test_rows(name: str, keys: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    result = printed(capsys, name, "--smoke", "--json")
    assert result["rows"]
    only = result["rows"][0] if len(result["rows"]) == 1 else {}
    assert result == {**only, "rows": result["rows"]}
    for row in result["rows"]:
        assert row.keys() >= keys
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))


def test_learner_updates_have_the_size_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("--batch-size", "40", "80", "--unroll-steps", "5", "--seconds", "0.05")
    rows = printed(capsys, "learner", "--smoke", "--json", *argv)["rows"]
    assert [row["batch_unrolls"] for row in rows] == [8, 16]
    for row in rows:
        assert row["samples_per_s"] / row["updates_per_s"] == pytest.approx(row["batch_samples"])


def test_learner_of_a_replay(capsys: pytest.CaptureFixture[str]) -> None:
    argv = (*SAC, "--batch-size", "200", "--seconds", "0.1")
    result = printed(capsys, "learner", "--smoke", "--json", *argv)
    assert result["batch_samples"] == 200
    ratio = result["update_frame_rate_hz"] / result["updates_per_s"]
    assert ratio == pytest.approx(200)


def test_end_to_end_with_a_replay_waits_for_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    argv = (*SAC, "--num-envs", "4", "--seconds", "0.5")
    result = printed(capsys, "end-to-end", "--smoke", "--json", *argv)
    assert result.keys() >= FIGURES
    assert result["env"] == "pointmass"
    batch = result["update_frame_rate_hz"] / result["updates_per_s"]
    assert batch == pytest.approx(8)  # what --smoke asks for
    assert 0.0 < result["samples_used_share"] <= 1.0
    assert result["cpu_load"] > 0.0
    assert result["gpu_load"] is None


def test_a_benchmark_takes_the_settings_of_the_preset() -> None:
    asked = PolicyArguments(env="HalfCheetah-v5", algorithm="sac")
    config = run_config(asked, server={}, learning=learning_settings("sac", **NO_SIZES))
    preset, other_preset = (
        from_dict({"env": asked.env, **find(name).values}) for name in ("sac-mujoco", "sac-control")
    )
    assert config.network == preset.network
    assert config.server.num_envs == preset.server.num_envs
    assert config.learning.batch_unrolls == preset.learning.batch_unrolls
    assert config.learning.replay.replay_min == 1 < preset.learning.replay.replay_min
    other = run_config(dataclasses.replace(asked, preset="sac-control"), server={})
    assert other.network == other_preset.network != preset.network
    assert other.env == "HalfCheetah-v5"
    with pytest.raises(ConfigError, match="mujoco-impala is for impala, not sac"):
        run_config(dataclasses.replace(asked, preset="mujoco-impala"), server={})


def test_help_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    command.run(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in command.BENCHMARKS)


def test_a_wrong_name_is_told_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean inference"):
        command.run(["inferense"])


def test_stages_that_share_cores_add_up_their_time() -> None:
    # 2 ms environment, 1 ms inference, 3 samples of 1 ms each: 6 ms of core time a step.
    ceiling = ceiling_of(500.0, 1000.0, 1000.0, samples_per_agent_step=3.0, cores=4)
    assert ceiling.model == "core-time"
    assert ceiling.learner == pytest.approx(1000 / 3)
    assert ceiling.combined == pytest.approx(4 / 0.006)


@pytest.mark.parametrize(("environment", "combined"), [(100.0, 100.0), (9000.0, 1 / 0.004)])
def test_with_an_accelerator_the_slower_side_limits(environment: float, combined: float) -> None:
    ceiling = ceiling_of(environment, 1000.0, 1000.0, samples_per_agent_step=3.0, cores=None)
    assert ceiling.model == "accelerator"
    assert ceiling.combined == pytest.approx(combined)


def test_a_free_pool_gives_every_environment_its_turn() -> None:
    family = environment_family("catch")
    pool = FreePool(family.spec("catch", family.config_type()), num_envs=6, batch_size=4)
    turns = []
    for _ in range(3):
        step = pool.receive(0.0)
        assert step is not None
        assert len(set(step.env_id.tolist())) == 4
        turns.append(step.env_id)
    assert np.bincount(np.concatenate(turns)).tolist() == [2] * 6


def test_end_to_end_takes_turns_where_training_does(capsys: pytest.CaptureFixture[str]) -> None:
    # Two updates a turn, so that a window from one to the next would have no step at all.
    argv = ("--algorithm", "ppo", "--unroll-steps", "4", "--seconds", "0.05")
    result = printed(capsys, "end-to-end", "--smoke", "--json", *argv)
    passes = make_config("catch", algorithm="ppo").learning.epochs
    assert result["samples_per_agent_step"] == pytest.approx(passes)  # in whole turns
    assert result["agent_steps_per_s"] > 0
