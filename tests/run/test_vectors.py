"""Whole runs on vectors of the user's, and what is done with what they have learned."""

from pathlib import Path
from typing import Any

import pytest
import torch

import headrace


@pytest.fixture(autouse=True)
def counters_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "pools"))


def trained(out: Path, name: str, **settings: Any) -> Any:
    config = headrace.make_config(
        f"counters:{name}",
        **{
            "out": str(out),
            "device": "cpu",
            "tensorboard": False,
            "num_envs": 6,
            "batch_unrolls": 4,
            "unroll_steps": 5,
            "total_frames": 600,
            **settings,
        },
    )
    return headrace.train(config)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("of_two", {"pool": "inline"}),
        ("of_three", {"pool": "shm", "num_workers": 2, "eval_envs": 1}),
        ("next_step", {"pool": "shm", "num_workers": 2}),
        ("disabled", {"pool": "shm", "num_workers": 1}),
        ("same_step", {"inference": "worker", "num_workers": 2}),
        ("of_two", {"inference": "worker", "num_workers": 2}),
        ("next_step", {"algorithm": "ppo", "batch_unrolls": 6, "minibatches": 1}),
    ],
)
def test_a_run_learns_from_a_vector(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    result = trained(tmp_path, name, **settings)
    assert result.finished
    policy = headrace.load(result.run, trust_code=True, device="cpu")
    scores = headrace.evaluate(policy, episodes=3, in_process=True)
    assert len(scores.returns) == 3
    assert 1 <= scores.lengths.min() <= scores.lengths.max() <= 4
    env = policy.make_env(seed=1)
    observation, info = env.reset()
    state, ended, steps = policy.initial_state(), False, 0
    while not ended:
        action, state = policy.act(observation, state, action_mask=info.get("action_mask"))
        observation, _, terminated, truncated, info = env.step(action)
        ended, steps = terminated or truncated, steps + 1
    assert steps == 1  # the first episode of the first environment
    env.close()
    assert policy.make_view(1) is None


def test_runs_in_lockstep_are_equal(tmp_path: Path) -> None:
    weights = []
    for name in ("a", "b"):
        result = trained(tmp_path / name, "of_gymnasium", lockstep=True, num_envs=4)
        policy = headrace.load(result.run, trust_code=True, device="cpu")
        weights.append(list(policy._algorithm.model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
