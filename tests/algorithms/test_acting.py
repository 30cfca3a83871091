"""How actor-critics act, for every kind of action."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from headrace.algorithms.impala import Impala, ImpalaConfig
from headrace.algorithms.ppo import Ppo, PpoConfig
from headrace.networks.models import NetworkConfig, mlp
from headrace.ops.distributions import make_distribution
from headrace.records import PolicyInput
from headrace.specs import EnvSpec

N = 2000
KINDS = ["discrete", "multi", "continuous"]
MakeSpec = Callable[..., EnvSpec]
RULES = [
    pytest.param(Impala, ImpalaConfig(), id="impala"),
    pytest.param(Ppo, PpoConfig(), id="ppo"),
]


def inputs_of(spec: EnvSpec, mask: torch.Tensor | None = None) -> PolicyInput:
    floats = spec.action_dtype.__name__ == "float32"
    previous = torch.zeros(1, N, *spec.action_shape) if floats else None
    if previous is None:
        previous = torch.full((1, N, *spec.action_shape), -1)
    observation = torch.randn(1, N, 1, 5)
    return PolicyInput(
        observation, torch.zeros(1, N), previous, torch.zeros(1, N).bool(), action_mask=mask
    )


@pytest.mark.parametrize("mode", ["sample", "greedy", "epsilon"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rule", "config"), RULES)
def test_what_is_done_is_what_is_learned_from(
    spec_of: MakeSpec, rule: Any, config: Any, kind: str, mode: Any
) -> None:
    spec = spec_of(kind)
    model = mlp(spec, NetworkConfig(lstm_size=4))
    algorithm = rule(model, config, spec=spec)
    inputs, state = inputs_of(spec), model.initial_state(N)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        step, after = algorithm.act(
            model, inputs, state, mode=mode, generator=generator, epsilon=0.5
        )
        output, _ = model(inputs, state)
    assert step.action.shape == (N, *spec.action_shape)
    assert step.action.numpy().dtype == spec.action_dtype
    assert len(after) == 2
    distribution = make_distribution(spec.action_space)
    torch.testing.assert_close(
        step.log_prob, distribution.log_prob(output.parameters[0], step.action)
    )
    torch.testing.assert_close(step.value, output.value[0])
    if kind == "continuous":
        assert step.env_action is not None
        assert torch.equal(step.env_action, distribution.to_env(step.action))
        assert all(spec.action_space.contains(row) for row in step.env_action.numpy())
    else:
        assert step.env_action is None
        assert all(spec.action_space.contains(row) for row in step.action.numpy()[:50])


@pytest.mark.parametrize("kind", KINDS)
def test_epsilon_is_the_share_of_random_actions(spec_of: MakeSpec, kind: str) -> None:
    spec = spec_of(kind)
    model = mlp(spec, NetworkConfig())
    algorithm = Impala(model, ImpalaConfig(), spec=spec)
    inputs = inputs_of(spec)
    with torch.no_grad():
        greedy, _ = algorithm.act(model, inputs, (), mode="greedy")
        differs = []
        for epsilon in (0.0, 0.3, 1.0):
            step, _ = algorithm.act(model, inputs, (), mode="epsilon", epsilon=epsilon)
            same = (step.action == greedy.action).view(N, -1).all(dim=-1)
            differs.append(1.0 - same.float().mean().item())
    chance = {"discrete": 3 / 4, "multi": 5 / 6, "continuous": 1.0}[kind]
    # Whole actions are random: a component at a time would differ more often.
    assert differs == pytest.approx([0.0, 0.3 * chance, chance], abs=0.04)


@pytest.mark.parametrize("mode", ["sample", "greedy", "epsilon"])
@pytest.mark.parametrize("kind", ["discrete", "multi"])
def test_no_mode_takes_what_the_mask_forbids(spec_of: MakeSpec, kind: str, mode: Any) -> None:
    spec = spec_of(kind, mask=True)
    model = mlp(spec, NetworkConfig())
    mask = torch.rand(1, N, spec.action_mask_size) < 0.5
    start = 0
    for count in spec.action_choices:  # one choice of each is always there
        mask[..., start + count - 1] = True
        start += count
    with torch.no_grad():
        model.policy.bias[0] = 100.0  # the likeliest, where it may
        step, _ = Impala(model, ImpalaConfig(), spec=spec).act(
            model, inputs_of(spec, mask), (), mode=mode, epsilon=0.5
        )
    columns = step.action.view(N, -1).unbind(-1)
    parts = mask[0].split(spec.action_choices, dim=-1)
    for chosen, allowed in zip(columns, parts, strict=True):
        assert allowed.gather(-1, chosen[:, None]).all()
        assert len(chosen.unique()) > 1
    assert step.log_prob.isfinite().all()
    # Where only one action was allowed, nothing was decided.
    forced = torch.stack([part.sum(-1) == 1 for part in parts]).all(dim=0)
    assert forced.any()
    assert (step.log_prob[forced] == 0).all()
