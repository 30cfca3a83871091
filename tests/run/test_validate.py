"""What is refused before anything starts, and that the fix which a refusal names is one."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from headrace import ConfigError, RunConfig, train
from headrace.cli import main
from headrace.config import from_dict
from headrace.run import api, validate
from headrace.run.validate import steps_to_first_update

LEARNING: dict[str, dict[str, Any]] = {
    "impala": {"unroll_steps": 5, "batch_unrolls": 7},
    "ppo": {"unroll_steps": 6, "batch_unrolls": 8},
    "r2d2": {
        "unroll_steps": 6,
        "burn_in_steps": 3,
        "overlap_steps": 3,
        "batch_unrolls": 4,
        "replay": {"replay_capacity": 60, "replay_min": 10},
    },
    "sac": {
        "batch_unrolls": 8,
        "n_steps": 3,
        "replay": {"replay_capacity": 200, "replay_min": 50},
    },
}


def a_config(out: Path, algorithm: str, **settings: Any) -> RunConfig:
    return from_dict(
        {
            "env": "pointmass" if algorithm == "sac" else "catch",
            "algorithm": algorithm,
            "out": str(out),
            "device": "cpu",
            "lockstep": True,
            "tensorboard": False,
            "server": {"num_envs": 3},
            "network": {"lstm_size": 8 if algorithm == "r2d2" else 0, "hidden_sizes": [8]},
            "learning": LEARNING[algorithm],
            **settings,
        }
    )


def fix_of(message: str) -> list[str]:
    return shlex.split(message.partition("; say ")[2])


def refusal(config: RunConfig) -> str:
    with pytest.raises(ConfigError) as refused:
        train(config)
    return str(refused.value)


@pytest.mark.parametrize("algorithm", sorted(LEARNING))
def test_a_run_is_refused_exactly_where_it_cannot_learn(
    algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag, frames = fix_of(refusal(a_config(tmp_path / "a", algorithm, total_frames=1)))
    assert flag == "--total-frames"
    assert not (tmp_path / "a").exists()
    least = int(frames)
    assert train(a_config(tmp_path / "b", algorithm, total_frames=least)).metrics["updates"] >= 1
    short = a_config(tmp_path / "c", algorithm, total_frames=least - 1)
    assert f"--total-frames {least}" in refusal(short)
    monkeypatch.setattr(validate, "refuse", lambda _: None)
    assert train(short).metrics["updates"] == 0


def counted(
    num_envs: int, wanted: int, unroll: int, sequence: int, stride: int, together: bool
) -> int:
    """Steps one after the other, and looks at every sequence that may have come."""
    answered = [0] * num_envs
    for step in range(10**6):
        answered[step % num_envs] += 1
        if together and step % num_envs < num_envs - 1:
            continue
        rows = [(times - 1) // unroll * unroll for times in answered]  # the last that was handed on
        come = sum(
            1 for last in rows for first in range(0, last, stride) if first + sequence <= last
        )
        if come >= wanted:
            return step + 1
    raise AssertionError("never")


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(
    ("unroll", "sequence", "stride"), [(4, 4, 4), (3, 9, 6), (2, 7, 2), (16, 3, 1), (8, 11, 4)]
)
def test_steps_to_the_first_update(unroll: int, sequence: int, stride: int, together: bool) -> None:
    for num_envs in (1, 2, 5):
        for wanted in (1, 2, 5, 6, 23):
            assert steps_to_first_update(
                num_envs=num_envs,
                wanted=wanted,
                unroll_steps=unroll,
                sequence_steps=sequence,
                stride_steps=stride,
                together=together,
            ) == counted(num_envs, wanted, unroll, sequence, stride, together), (num_envs, wanted)


def test_several_learners_need_the_batch_of_all(tmp_path: Path) -> None:
    config = a_config(
        tmp_path / "a",
        "impala",
        total_frames=40,
        server={"num_envs": 4},
        learning={"unroll_steps": 5, "batch_unrolls": 8},
        learner_devices="cpu,cpu",
    )
    # Two unrolls of each of four environments: 11 rows.
    assert "8 unrolls of 5 steps, which 4 environments give after 44 frames" in refusal(config)


PPO = ["catch", "--algorithm", "ppo", "--batch-unrolls", "8"]
DQN = ["--algorithm", "r2d2", "--network", "mlp", "--lstm-size", "0", "--burn-in-steps", "0"]


class Passed(Exception):
    """Nothing was refused."""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["catch", "--total-frames", "100"], "total_frames=100 ends before anything is learned"),
        (
            [*PPO, "--num-envs", "64", "--unroll-steps", "128", "--total-frames", "8e3"],
            "8 unrolls of 128 steps, which",
        ),
        (["catch", "--algorithm", "r2d2", "--total-frames", "200"], "needs replay_min="),
        (
            ["catch", *DQN, "--unroll-steps", "1", "--n-steps", "3", "--no-full-returns"],
            "n_steps=3 rewards are in no target, since sequences have 1 steps",
        ),
        (
            [*PPO, "--unroll-steps", "4", "--minibatches", "32"],
            "minibatches=32 of unroll_steps=4 x batch_unrolls=8 samples have one each",
        ),
        (
            [*PPO, "--unroll-steps", "4", "--minibatches", "33"],
            "minibatches=33 must divide unroll_steps x batch_unrolls=32",
        ),
        (
            ["pointmass", "--algorithm", "sac", "--hidden-sizes", "1", "--critic-layer-norm"],
            "critic_layer_norm makes a constant of a layer of one unit",
        ),
        (
            ["catch", "--algorithm", "r2d2", "--replay-capacity", "20", "--replay-min", "20"],
            "batch_unrolls=32 sequences are more than replay_capacity=20",
        ),
        (
            ["counters:of_three", "--num-envs", "10"],
            "num_envs=10 is no multiple of the 3 environments that a vector of counters:of_three",
        ),
    ],
)
def test_the_fix_that_a_refusal_names_is_one(
    argv: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def create(*_: object) -> None:
        raise Passed

    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "pools"))
    monkeypatch.setattr(api.RunDirectory, "create", create)
    monkeypatch.chdir(tmp_path)
    argv = ["train", *argv, "--device", "cpu", "--pool", "inline"]
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]  # before it, perhaps, that no preset fits
    assert message in said
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(Passed):
        main([*argv, *shlex.split(said.replace(": say ", "; say ").partition("; say ")[2])])


def test_a_resumed_run_that_is_too_short_says_so(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = train(a_config(run, "impala", lockstep=False, turns="on", total_frames=100))
    made = int(first.metrics["agent_steps"])
    second = train(resume=run, changes={"total_frames": made + 1})
    assert second.metrics["updates"] == first.metrics["updates"]
    told = [line for line in (run / "log.txt").read_text().splitlines() if "anything" in line]
    last = told[-1]
    assert "the 1 frames that are left end before anything is learned" in last
    frames = int(fix_of(last)[1])
    steps = int(second.metrics["agent_steps"])
    third = train(resume=run, changes={"total_frames": frames + steps - made})
    assert third.metrics["updates"] > second.metrics["updates"]
    assert (run / "log.txt").read_text().count("before anything") == len(told)


def test_a_resumed_run_whose_unrolls_go_on_says_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(a_config(run, "impala", total_frames=100))
    train(resume=run, changes={"total_frames": 110})
    assert "before anything" not in (run / "log.txt").read_text()
