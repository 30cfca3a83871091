"""From raw rewards to targets: the order of scale and transform, and the running deviation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from headrace.algorithms.impala import Impala, ImpalaConfig
from headrace.algorithms.rewards import RewardRule
from headrace.networks.models import NetworkConfig, mlp
from headrace.records import Batch
from headrace.specs import EnvSpec

T, B = 6, 3
MakeBatch = Callable[[int], Batch]


@pytest.fixture
def spec(spec_of: Callable[..., EnvSpec]) -> EnvSpec:
    return spec_of("discrete")


@pytest.fixture
def batch_of(spec: EnvSpec, random_batch: Callable[..., Batch]) -> MakeBatch:
    return lambda seed: random_batch(spec, (), T=T, B=B, seed=seed)


def rule_of(transform: Any, *, scale: float = 1.0) -> RewardRule:
    return RewardRule(
        transform, scale=scale, discount=0.9, batch_unrolls=B, device=torch.device("cpu")
    )


def test_the_scale_comes_before_the_clip_and_the_bootstrap_after(
    spec: EnvSpec, batch_of: MakeBatch
) -> None:
    batch = batch_of(0)
    reward_TB, discount_TB = rule_of("clip", scale=2.0)(batch)
    expected = (2.0 * batch.reward).clamp(-1, 1) + 0.9 * batch.bootstrap
    torch.testing.assert_close(reward_TB, expected)
    assert (batch.reward.abs() > 0.5).any()
    ended = batch.terminated | batch.truncated
    assert torch.equal(discount_TB, torch.where(ended, 0.0, 0.9))
    assert batch.truncated.any()
    assert batch.terminated.any()


def test_rewards_are_divided_by_the_deviation_of_all_returns_so_far(batch_of: MakeBatch) -> None:
    rule = rule_of("normalize")
    batches = [batch_of(seed) for seed in range(4)]
    returns: list[float] = []
    running = [0.0] * B
    for batch in batches:
        rule.observe(batch)
        for t in range(T):
            for b in range(B):
                running[b] = 0.9 * running[b] + batch.reward[t, b].item()
                returns.append(running[b])
                if batch.terminated[t, b] or batch.truncated[t, b]:
                    running[b] = 0.0
    deviation = torch.tensor(returns).std(correction=0)
    reward_TB, _ = rule(batches[-1])
    expected = batches[-1].reward / deviation + 0.9 * batches[-1].bootstrap
    torch.testing.assert_close(reward_TB, expected)


def test_the_running_deviation_is_saved(spec: EnvSpec, batch_of: MakeBatch) -> None:
    batches = [batch_of(seed) for seed in range(3)]
    straight, resumed = rule_of("normalize"), rule_of("normalize")
    for batch in batches[:2]:
        straight.observe(batch)
    state = {name: value.clone() for name, value in straight.state_dict().items()}
    resumed.load_state_dict(state)
    for rule in (straight, resumed):
        rule.observe(batches[2])
    assert torch.equal(straight(batches[2])[0], resumed(batches[2])[0])
    fresh = rule_of("normalize")
    fresh.observe(batches[2])
    assert not torch.equal(straight(batches[2])[0], fresh(batches[2])[0])
    assert rule_of("clip").state_dict() == {}


def test_impala_normalises_too(spec: EnvSpec, batch_of: MakeBatch) -> None:
    torch.manual_seed(0)
    config = ImpalaConfig(reward_transform="normalize", unroll_steps=T, batch_unrolls=B)
    algorithm = Impala(mlp(spec, NetworkConfig()), config, spec=spec)
    batch = batch_of(0)
    batch = batch._replace(reward=batch.reward * 1000, bootstrap=torch.zeros(T, B))
    before = algorithm.loss(batch)[1]["loss/value"]  # nothing seen yet: only clipped, to 10
    update = algorithm.update(batch, progress=0.0)
    assert update.finite
    assert update.metrics["loss/value"] < 0.2 * before
    assert algorithm.state_dict()["rewards"]["total"] == T * B


def test_runs_that_kept_no_deviation_load(spec: EnvSpec, batch_of: MakeBatch) -> None:
    algorithm = Impala(mlp(spec, NetworkConfig()), ImpalaConfig(), spec=spec)
    state = algorithm.state_dict()
    del state["rewards"]
    algorithm.load_state_dict(state)


@pytest.mark.parametrize("transform", ["none", "clip", "soft_asymmetric", "normalize"])
def test_every_transform_is_finite_on_extreme_rewards(transform: Any, batch_of: MakeBatch) -> None:
    rule = rule_of(transform)
    batch = batch_of(0)
    batch.reward[0, 0], batch.reward[1, 1] = 1e18, -1e18
    rule.observe(batch)
    assert rule(batch)[0].isfinite().all()
