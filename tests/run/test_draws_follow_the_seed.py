"""What is drawn in updates follows `--seed`."""

from __future__ import annotations

import pytest

from headrace import catalog, make_config
from headrace.run.build import make_learning


@pytest.mark.parametrize(
    ("env", "algorithm", "settings"),
    [
        ("catch", "ppo", {}),
        ("catch", "impala", {"passes": 2, "minibatches": 2}),
        ("pointmass", "sac", {}),
    ],
)
def test_shuffles_and_noise_follow_the_seed(
    env: str, algorithm: str, settings: dict[str, int]
) -> None:
    def drawn(seed: int) -> list[int]:
        config = make_config(env, algorithm=algorithm, seed=seed, device="cpu", **settings)
        spec = catalog.environment_family(env).spec(env, config.environment)
        state = make_learning(config, spec)[2].state_dict()["generator"]
        return list(state)

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
