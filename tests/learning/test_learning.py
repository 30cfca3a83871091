"""The whole system learns: presets reach the best return of games whose best return is known."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from headrace import evaluate, load, preset, train
from headrace.envs.pointmass import BEST_RETURN, RANDOM_RETURN

# Environment, two returns, and the share of the way from the first to the second that is wanted.
GOALS = {
    "catch": ("catch", 0.0, 1.0, 0.95),
    "recall": ("recall", 0.0, 1.0, 0.95),
    "pointmass": ("pointmass", RANDOM_RETURN, BEST_RETURN, 0.95),
    "control": ("CartPole-v1", 0.0, 500.0, 0.95),
}


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", GOALS)
def test_a_preset_solves_its_game(name: str, seed: int, tmp_path: Path) -> None:
    env, worst, best, goal = GOALS[name]
    config = preset(
        name,
        env,
        seed=seed,
        out=str(tmp_path / "run"),
        device="cpu",
        precision="float32",
        lockstep=True,
        tensorboard=False,
    )
    start_s = time.perf_counter()
    assert train(config).finished
    episodes = 500 if env == name else 20
    result = evaluate(load(tmp_path / "run", device="cpu"), episodes=episodes, seed=1000 + seed)
    seconds = time.perf_counter() - start_s
    mean = result.returns.mean()
    print(f"{name}, seed {seed}: {mean:.3f} in {seconds:.0f} s")  # noqa: T201
    assert (mean - worst) / (best - worst) >= goal
