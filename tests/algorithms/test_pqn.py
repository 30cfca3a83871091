"""PQN's returns beside a walk backwards in numpy, and what it refuses and keeps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from headrace.algorithms.optimizers import OptimizerConfig
from headrace.algorithms.pqn import Pqn, PqnConfig
from headrace.errors import ConfigError
from headrace.networks.models import NetworkConfig, mlp
from headrace.records import Batch, PolicyInput
from headrace.specs import EnvSpec

T, B, GAMMA, LAMBDA = 6, 4, 0.9, 0.7
MakeSpec = Callable[..., EnvSpec]
MakeBatch = Callable[..., Batch]


def pqn_of(spec: EnvSpec, network: dict[str, Any] | None = None, **settings: Any) -> Pqn:
    sizes = {"heads": "action_value", "hidden_sizes": (16,), "layer_norm": True, **(network or {})}
    learning = {
        "unroll_steps": T,
        "batch_unrolls": B,
        "minibatches": 2,
        "discount": GAMMA,
        "q_lambda": LAMBDA,
        "optimizer": OptimizerConfig(optimizer="radam", learning_rate=0.01),
        **settings,
    }
    return Pqn(
        mlp(spec, NetworkConfig(**sizes)), PqnConfig(**learning), spec=spec, precision=torch.float32
    )


@pytest.mark.parametrize("mask", [False, True])
def test_returns_are_those_of_a_walk(
    spec_of: MakeSpec, random_batch: MakeBatch, mask: bool
) -> None:
    algorithm = pqn_of(spec_of("discrete", mask=mask), reward_scale=2.0)
    batch = random_batch(spec_of("discrete", mask=mask), (), T=T, B=B)
    assert batch.terminated.any()
    assert batch.truncated.any()
    with torch.no_grad():
        q = algorithm.model(batch.inputs, ())[0].value.double().numpy()
    allowed = np.ones_like(q, bool)
    if batch.inputs.action_mask is not None:
        allowed = batch.inputs.action_mask.numpy()
    expected = np.zeros((T, B))
    for b in range(B):
        behind = 0.0
        for t in reversed(range(T)):
            row = allowed[t + 1, b] if allowed[t + 1, b].any() else np.ones(4, bool)
            best = q[t + 1, b][row].max()
            goes_on = (1 - LAMBDA) * best + LAMBDA * (best if t == T - 1 else behind)
            if batch.terminated[t, b]:
                goes_on = 0.0
            elif batch.truncated[t, b]:
                goes_on = float(batch.bootstrap[t, b])
            behind = expected[t, b] = 2.0 * float(batch.reward[t, b]) + GAMMA * goes_on
    samples = algorithm.samples(batch)
    np.testing.assert_allclose(samples.target.view(T, B).numpy(), expected, rtol=1e-4, atol=1e-5)
    total, said = algorithm.loss(samples)
    taken = np.take_along_axis(q[:-1], batch.action.numpy()[..., None], -1)[..., 0]
    assert total.item() == pytest.approx(0.5 * ((taken - expected) ** 2).mean(), rel=1e-4)
    assert said["loss/td_error_mean"].item() == pytest.approx(
        np.abs(taken - expected).mean(), rel=1e-4
    )


def test_a_batch_is_gone_over_in_minibatches(spec_of: MakeSpec, random_batch: MakeBatch) -> None:
    algorithm = pqn_of(spec_of("discrete"), epochs=3)
    batch = random_batch(spec_of("discrete"), (), T=T, B=B)
    before = algorithm.loss(algorithm.samples(batch))[0].item()
    for _ in range(20):
        update = algorithm.update(batch, progress=0.0)
        assert update.passes == 3
        assert update.finite
    steps = {int(state["step"]) for state in algorithm._optimizer.state.values()}
    assert steps == {20 * 3 * 2}
    assert algorithm.loss(algorithm.samples(batch))[0].item() < 0.5 * before


def test_exploration_falls_to_its_end(spec_of: MakeSpec, random_batch: MakeBatch) -> None:
    algorithm = pqn_of(
        spec_of("discrete"), initial_epsilon=0.9, final_epsilon=0.1, epsilon_decay=0.5
    )
    batch = random_batch(spec_of("discrete"), (), T=T, B=B)
    ends = algorithm.exploration(3)
    for progress, share in ((0.0, 0.9), (0.25, 0.5), (0.5, 0.1), (1.0, 0.1)):
        algorithm.update(batch, progress=progress)
        assert algorithm.annealed(algorithm.model, ends).tolist() == pytest.approx([share] * 3)


def test_forbidden_actions_are_never_taken(spec_of: MakeSpec, random_batch: MakeBatch) -> None:
    spec = spec_of("discrete", mask=True)
    algorithm = pqn_of(spec)
    inputs = random_batch(spec, (), T=T, B=B).inputs
    mask = torch.zeros(1, 200, 4, dtype=torch.bool)
    mask[..., 2] = True
    row = PolicyInput(*(x[:1, :1].expand(1, 200, *x.shape[2:]) for x in inputs[:4]), mask)
    for mode in ("sample", "greedy", "epsilon"):
        step, _ = algorithm.act(algorithm.model, row, (), mode=mode, epsilon=0.5)
        assert set(step.action.tolist()) == {2}


def test_a_resumed_rule_goes_on_alike(spec_of: MakeSpec, random_batch: MakeBatch) -> None:
    spec = spec_of("discrete")
    straight = pqn_of(spec, reward_transform="normalize")
    batches = [random_batch(spec, (), T=T, B=B, seed=seed) for seed in range(3)]
    for batch in batches[:2]:
        straight.update(batch, progress=0.3)
    resumed = pqn_of(spec, reward_transform="normalize")
    resumed.model.load_state_dict(copy.deepcopy(straight.model.state_dict()))
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    for algorithm in (straight, resumed):
        algorithm.warm_up(batches[0])
        algorithm.update(batches[2], progress=0.4)
    for name, expected in straight.model.state_dict().items():
        assert torch.equal(expected, resumed.model.state_dict()[name]), name
    epsilon = torch.tensor([0.1])
    assert torch.equal(
        straight.annealed(straight.model, epsilon), resumed.annealed(resumed.model, epsilon)
    )


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"q_lambda": 1.5}, "must be in"),
        ({"epsilon_decay": 0.0}, "epsilon_decay"),
        ({"minibatches": 5}, "say --minibatches 4"),
        ({"epochs": 0}, "at least 1"),
        ({"optimizer": OptimizerConfig(learning_rate_schedule="kl")}, "no policy for kl"),
        ({"network": {"lstm_size": 8}}, "say --lstm-size 0, or --algorithm r2d2"),
    ],
)
def test_what_cannot_be_is_refused(
    spec_of: MakeSpec, settings: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        pqn_of(spec_of("discrete"), **settings)


@pytest.mark.parametrize("kind", ["continuous", "multi"])
def test_actions_must_be_one_choice(spec_of: MakeSpec, kind: str) -> None:
    model = mlp(spec_of("discrete"), NetworkConfig(heads="action_value"))
    with pytest.raises(ConfigError, match="pqn needs one discrete choice of action"):
        Pqn(model, PqnConfig(), spec=spec_of(kind), precision=torch.float32)
