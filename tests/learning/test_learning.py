"""The whole system learns: presets reach the best return of games whose best return is known."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from headrace import evaluate, load, preset, train


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", ["catch", "recall"])
def test_a_preset_solves_its_game(name: str, seed: int, tmp_path: Path) -> None:
    config = preset(
        name,
        name,
        seed=seed,
        out=str(tmp_path / "run"),
        device="cpu",
        precision="float32",
        lockstep=True,
        tensorboard=False,
    )
    start_s = time.perf_counter()
    assert train(config).finished
    result = evaluate(load(tmp_path / "run", device="cpu"), episodes=500, seed=1000 + seed)
    seconds = time.perf_counter() - start_s
    print(f"{name}, seed {seed}: {result.returns.mean():.3f} in {seconds:.0f} s")  # noqa: T201
    assert result.returns.mean() >= 0.95
