"""The whole system learns: presets reach the best return of games whose best return is known."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace import evaluate, load, make_config, preset, train
from headrace.envs.pointmass import BEST_RETURN, RANDOM_RETURN
from headrace.records import PolicyInput

# Environment, two returns, and the share of the way from the first to the second that is wanted.
GOALS = {
    "catch": ("catch", 0.0, 1.0, 0.95),
    "recall": ("recall", 0.0, 1.0, 0.95),
    "pointmass": ("pointmass", RANDOM_RETURN, BEST_RETURN, 0.95),
    "control": ("CartPole-v1", 0.0, 500.0, 0.95),
}


def play(preset_name: str, env: str, seed: int, out: Path, **settings: Any) -> float:
    """Trains in lockstep and returns the mean return of greedy episodes."""
    config = preset(
        preset_name,
        env,
        seed=seed,
        out=str(out),
        device="cpu",
        precision="float32",
        lockstep=True,
        tensorboard=False,
        **settings,
    )
    start_s = time.perf_counter()
    assert train(config).finished
    episodes = {"CartPole-v1": 20, "Pendulum-v1": 100}.get(env, 500)
    result = evaluate(load(out, device="cpu"), episodes=episodes, seed=1000 + seed)
    seconds = time.perf_counter() - start_s
    mean = float(result.returns.mean())
    print(f"{preset_name}, {env}, seed {seed}: {mean:.3f} in {seconds:.0f} s")  # noqa: T201
    return mean


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", GOALS)
def test_a_preset_solves_its_game(name: str, seed: int, tmp_path: Path) -> None:
    env, worst, best, goal = GOALS[name]
    mean = play(name, env, seed, tmp_path / "run")
    assert (mean - worst) / (best - worst) >= goal


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_r2d2_remembers(seed: int, tmp_path: Path) -> None:
    assert play("r2d2-control", "recall", seed, tmp_path / "run", total_frames=40_000) >= 0.95


def test_the_same_rule_without_recurrent_state_can_only_guess(tmp_path: Path) -> None:
    network = {"network": "mlp", "lstm_size": 0}
    mean = play("r2d2-control", "recall", 1, tmp_path / "run", total_frames=40_000, network=network)
    assert abs(mean) < 0.3  # 500 episodes of 1 or -1: the deviation of their mean is 0.045


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("order", ["sequential", "simultaneous"])
def test_sac_swings_a_pendulum_up(order: str, seed: int, tmp_path: Path) -> None:
    """In either order of updates: to learn at the same time costs no return."""
    learning = {"update_order": order}
    assert play("sac-control", "Pendulum-v1", seed, tmp_path / "run", learning=learning) >= -200


@pytest.mark.parametrize("sides", ["one", pytest.param("two", marks=pytest.mark.slow)])
def test_sac_pushes_a_point_to_the_middle(sides: str, tmp_path: Path) -> None:
    devices = {"actor_device": "cpu", "critic_device": "cpu"} if sides == "two" else {}
    mean = play("sac-control", "pointmass", 1, tmp_path / "run", **devices)
    assert (mean - RANDOM_RETURN) / (BEST_RETURN - RANDOM_RETURN) >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [{"lockstep": True}, {"num_workers": 2}, {"inference": "worker"}],
    ids=["lockstep", "workers", "acting workers"],
)
def test_what_lies_behind_a_clock_is_worth_what_is_allowed_there(
    how: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reward -1 a step for ever: the value is -1 / (1 - discount), whatever is forbidden."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    config = make_config(
        "clock_env:Clock",
        preset="dqn-control",
        total_frames=12_000,
        discount=0.9,
        target_update_interval=100,
        rescale_values=False,
        learning_rate=3e-3,
        device="cpu",
        tensorboard=False,
        out=str(tmp_path / "run"),
        **how,
    )
    assert train(config).finished
    model = load(tmp_path / "run", device="cpu", trust_code=True)._algorithm.model
    shown = PolicyInput(
        observation=torch.ones(1, 1, 1, 1),
        reward=torch.full((1, 1), -1.0),
        previous_action=torch.zeros(1, 1, dtype=torch.int64),
        reset=torch.zeros(1, 1, dtype=torch.bool),
        action_mask=torch.tensor([[[True, False]]]),
    )
    with torch.no_grad():
        value_11A = model(shown, model.initial_state(1))[0].value
    assert value_11A[0, 0, 0].item() == pytest.approx(-10.0, abs=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_pqn_balances_a_pole(seed: int, tmp_path: Path) -> None:
    assert play("pqn-control", "CartPole-v1", seed, tmp_path / "run") >= 475


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_td3_swings_a_pendulum_up(seed: int, tmp_path: Path) -> None:
    assert play("td3-control", "Pendulum-v1", seed, tmp_path / "run") >= -200
