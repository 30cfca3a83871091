"""Learning rules with every kind of action, real networks, masks and statistics."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from headrace.algorithms.impala import Impala, ImpalaConfig
from headrace.algorithms.optimizers import OptimizerConfig
from headrace.algorithms.ppo import Ppo, PpoConfig
from headrace.networks.models import NetworkConfig, mlp
from headrace.ops.distributions import make_distribution
from headrace.records import Batch, PolicyInput
from headrace.specs import EnvSpec

T, B = 6, 4
KINDS = ["discrete", "multi", "continuous"]
MakeSpec = Callable[..., EnvSpec]
MakeBatch = Callable[..., Batch]
ADAM = OptimizerConfig(
    optimizer="adam",
    learning_rate=3e-3,
    learning_rate_schedule="constant",
    max_gradient_norm=1.0,
)
RULES = [
    pytest.param(Impala, ImpalaConfig, id="impala"),
    pytest.param(Ppo, PpoConfig, id="ppo"),
]


def config_of(config_type: Any, **settings: Any) -> Any:
    return config_type(unroll_steps=T, batch_unrolls=B, optimizer=ADAM, **settings)


@pytest.mark.parametrize("lstm_size", [0, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_impala_sees_a_ratio_of_1_on_policy(
    spec_of: MakeSpec, random_batch: MakeBatch, kind: str, lstm_size: int
) -> None:
    spec = spec_of(kind, mask=kind == "discrete")
    network = NetworkConfig(lstm_size=lstm_size, normalize_observations=True)
    model = mlp(spec, network)
    algorithm = Impala(model, config_of(ImpalaConfig), spec=spec)
    batch = random_batch(spec, model.initial_state(B), T=T, B=B)
    distribution = make_distribution(spec.action_space)
    with torch.no_grad():
        output, _ = model(batch.inputs, batch.recurrent)
    mask = batch.inputs.action_mask
    parameters = distribution.masked(output.parameters, mask)[:-1]
    behaved = batch._replace(log_prob=distribution.log_prob(parameters, batch.action))
    metrics = algorithm.update(behaved, progress=0.0).metrics
    assert metrics["importance_ratio_mean"].item() == pytest.approx(1.0, abs=1e-5)
    entropy = distribution.entropy(parameters).mean().item()
    assert metrics["loss/entropy"].item() == pytest.approx(entropy, abs=1e-5)
    # The statistics learned from this batch only afterwards, each row once.
    assert model.normalizer is not None
    assert model.normalizer.total == T * B
    rows = batch.inputs.observation[:-1, :, 0].flatten(0, 1).double()
    torch.testing.assert_close(model.normalizer.mean, rows.mean(dim=0))


@pytest.mark.parametrize(("rule", "config_type"), RULES)
def test_rewards_are_normalised_by_what_was_seen(
    spec_of: MakeSpec, random_batch: MakeBatch, rule: Any, config_type: Any
) -> None:
    spec = spec_of("continuous")
    config = config_of(config_type, reward_transform="normalize")
    algorithm = rule(mlp(spec, NetworkConfig()), config, spec=spec)
    batch = random_batch(spec, (), T=T, B=B)
    large = batch._replace(reward=1e4 * batch.reward, bootstrap=torch.zeros(T, B))
    metrics = algorithm.update(large, progress=0.0).metrics
    assert metrics["loss/value"] < 10  # in units of the deviation, not of the reward
    assert algorithm.state_dict()["rewards"]["total"] == T * B


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rule", "config_type"), RULES)
def test_every_kind_learns_what_pays(
    spec_of: MakeSpec, random_batch: MakeBatch, rule: Any, config_type: Any, kind: str
) -> None:
    """A bandit whose reward is how near the action is to one that the observation names."""
    torch.manual_seed(0)
    spec = spec_of(kind)
    model = mlp(spec, NetworkConfig(hidden_sizes=(32,), activation="tanh"))
    settings = {"epochs": 2, "minibatches": 2} if rule is Ppo else {}
    config = config_of(config_type, entropy_cost=0.0, reward_transform="none", **settings)
    algorithm = rule(model, config, spec=spec)
    generator = torch.Generator().manual_seed(0)
    never = torch.zeros(T, B, dtype=torch.bool)
    template = random_batch(spec, (), T=T, B=B)
    rewards = []
    for _ in range(150):
        observation = torch.randn(T + 1, B, 1, 5, generator=generator)
        inputs = template.inputs._replace(
            observation=observation, reset=torch.ones(T + 1, B).bool()
        )
        flat = PolicyInput(*(None if x is None else x.flatten(0, 1)[None] for x in inputs))
        with torch.no_grad():
            step, _ = algorithm.act(model, flat, (), mode="sample", generator=generator)
        action = step.action.unflatten(0, (T + 1, B))[:-1]
        wanted = observation[:-1, :, 0, 0] > 0
        if kind == "continuous":
            assert step.env_action is not None
            told = step.env_action.unflatten(0, (T + 1, B))[:-1, :, 0]
            reward = 1 - (told - torch.where(wanted, 0.7, -0.7)).abs()
        else:
            first = action if kind == "discrete" else action[..., 0]
            reward = (first == wanted.long()).float()
        rewards.append(reward.mean().item())
        batch = template._replace(
            inputs=inputs,
            action=action,
            log_prob=step.log_prob.unflatten(0, (T + 1, B))[:-1],
            reward=reward,
            terminated=~never,
            truncated=never,
            bootstrap=torch.zeros(T, B),
        )
        assert algorithm.update(batch, progress=0.0).finite
    assert sum(rewards[-30:]) / 30 > sum(rewards[:30]) / 30 + 0.2
    assert sum(rewards[-30:]) / 30 > 0.55


def test_a_target_entropy_is_reached_where_actions_are_continuous(
    spec_of: MakeSpec, random_batch: MakeBatch
) -> None:
    """Differential entropy may be negative; the adaptive weight steers to it all the same."""
    spec = spec_of("continuous")
    model = mlp(spec, NetworkConfig())
    config = ImpalaConfig(
        unroll_steps=T,
        batch_unrolls=B,
        optimizer=ADAM,
        entropy_cost=0.01,
        target_entropy=-1.0,
        reward_transform="none",
    )
    algorithm = Impala(model, config, spec=spec)
    batch = random_batch(spec, (), T=T, B=B)
    metrics = algorithm.update(batch, progress=0.0).metrics
    assert 0.5 < metrics["loss/entropy"] < 2 * math.log(2.0)
    costs = [algorithm.update(batch, progress=0.0).metrics["entropy_cost"] for _ in range(5)]
    assert costs[-1] < costs[0], "above its target the entropy costs less and less"


def test_impala_resumes_with_its_statistics(spec_of: MakeSpec, random_batch: MakeBatch) -> None:
    spec = spec_of("continuous")
    network = NetworkConfig(normalize_observations=True)
    config = config_of(ImpalaConfig, reward_transform="normalize")
    straight = Impala(mlp(spec, network), config, spec=spec)
    batches = [random_batch(spec, (), T=T, B=B, seed=seed) for seed in range(3)]
    for batch in batches[:2]:
        straight.update(batch, progress=0.0)
    resumed = Impala(mlp(spec, network), config, spec=spec)
    resumed.model.load_state_dict(copy.deepcopy(straight.model.state_dict()))
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    for algorithm in (straight, resumed):
        algorithm.update(batches[2], progress=0.0)
    for name, expected in straight.model.state_dict().items():
        assert torch.equal(expected, resumed.model.state_dict()[name]), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rule", "config_type"), RULES)
def test_neither_acting_nor_learning_waits_for_the_device(
    spec_of: MakeSpec, random_batch: MakeBatch, rule: Any, config_type: Any, kind: str
) -> None:
    spec = spec_of(kind, mask=kind == "discrete")
    model = mlp(spec, NetworkConfig(normalize_observations=True)).cuda()
    config = config_of(config_type, reward_transform="normalize")
    algorithm = rule(model, config, spec=spec)
    host = random_batch(spec, (), T=T, B=B)
    inputs = PolicyInput(*(None if x is None else x.cuda() for x in host.inputs))
    rest = {name: getattr(host, name).cuda() for name in Batch._fields[2:]}
    batch = Batch(inputs=inputs, recurrent=(), **rest)
    row = PolicyInput(*(None if x is None else x[:1] for x in inputs))
    for mode in ("default", "error"):  # the first time, libraries and constants are set up
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for action_mode in ("sample", "greedy", "epsilon"):
                algorithm.act(model, row, (), mode=action_mode, epsilon=0.5)
            algorithm.update(batch, progress=0.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
