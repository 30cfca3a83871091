"""Values in units of their spread, schedules, and passes that look at the divergence."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headrace.algorithms.impala import Impala, ImpalaConfig
from headrace.algorithms.optimizers import OptimizerConfig, StepSize
from headrace.algorithms.ppo import Ppo, PpoConfig
from headrace.networks.config import NetworkConfig
from headrace.networks.heads import PopArtHead
from headrace.networks.models import mlp
from headrace.ops.losses import clipped_surrogate_loss, divergence
from headrace.records import Batch
from headrace.specs import EnvSpec

T, B = 6, 8


def plain_adam(**settings: Any) -> OptimizerConfig:
    return OptimizerConfig(
        **{
            "learning_rate": 1e-2,
            "learning_rate_schedule": "constant",
            "max_gradient_norm": 0.0,
            **settings,
        }
    )


def made(
    kind: str, spec: EnvSpec, *, network: dict[str, Any] | None = None, **settings: Any
) -> Impala | Ppo:
    torch.manual_seed(7)
    config = NetworkConfig(hidden_sizes=(16,), **(network or {}))
    sizes = {"unroll_steps": T, "batch_unrolls": B}
    optimizer = settings.pop("optimizer", plain_adam())
    if kind == "impala":
        learning = ImpalaConfig(**{**sizes, "optimizer": optimizer, **settings})
        return Impala(mlp(spec, config), learning, spec=spec)
    settings = {"epochs": settings.pop("passes", 1), "minibatches": 1, **settings}
    return Ppo(
        mlp(spec, config), PpoConfig(**{**sizes, "optimizer": optimizer, **settings}), spec=spec
    )


@pytest.fixture
def spec(spec_of: Callable[..., EnvSpec]) -> EnvSpec:
    return spec_of("discrete")


@pytest.fixture
def batch(spec: EnvSpec, random_batch: Callable[..., Batch]) -> Batch:
    return random_batch(spec, (), T=T, B=B)


def head_of(algorithm: Impala | Ppo) -> PopArtHead:
    value = algorithm.model.value
    assert isinstance(value, PopArtHead)
    return value


def test_a_divergence_from_actions_of_a_third_policy_is_weighed() -> None:
    """Old, new and acting policies over three actions, by ten thousand of them."""
    old, new = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.3, 0.3, 0.4])
    acting = torch.tensor([0.2, 0.2, 0.6])
    action = torch.multinomial(acting, 100_000, replacement=True)
    found = divergence((new / old).log()[action], (old / acting)[action])
    assert float(found) == pytest.approx(float((old * (old / new).log()).sum()), rel=0.03)
    unweighed = divergence((new / old).log()[action])
    assert float(unweighed) != pytest.approx(float(found), rel=0.2)


@pytest.mark.parametrize("kind", ["impala", "ppo"])
def test_compiled_networks_learn_normalised_values_alike(
    kind: str, spec: EnvSpec, batch: Batch
) -> None:
    """One node of the graph has saved the weight that the statistics move."""
    plain, compiled = (made(kind, spec, network={"normalize_values": True}) for _ in range(2))
    compiled.model.compile(backend="aot_eager")
    for algorithm in (plain, compiled):
        algorithm.update(batch, progress=0.0)
    torch.testing.assert_close(compiled.model.state_dict(), plain.model.state_dict())


def test_first_batches_are_averaged_with_the_start_as_one() -> None:
    head = PopArtHead(3, step=0.1)
    means = []
    for value in (8.0, 2.0, 5.0):
        head.observe_targets(torch.full((4,), value))
        means.append(float(head.mean_N))
    assert means == pytest.approx([4.0, 10 / 3, 15 / 4])
    for _ in range(20):
        head.observe_targets(torch.zeros(1))
    before = float(head.mean_N)
    head.observe_targets(torch.full((4,), before + 1.0))
    assert float(head.mean_N) == pytest.approx(before + 0.1)  # the step's turn


@pytest.mark.parametrize("settings", [{}, {"passes": 2}, {"minibatches": 2}])
@pytest.mark.parametrize("kind", ["impala", "ppo"])
def test_a_scale_of_all_rewards_changes_nothing_that_is_learned(
    kind: str, settings: dict[str, Any], spec: EnvSpec, batch: Batch
) -> None:
    """From statistics that fit: values follow the scale, the policy is the same."""
    learned = {}
    for scale in (1.0, 1000.0):
        algorithm = made(
            kind, spec, network={"normalize_values": True, "popart_step": 0.1}, **settings
        )
        head = head_of(algorithm)
        head.mean_N.fill_(0.3 * scale)
        head.square_N.fill_((0.3 * scale) ** 2 + scale**2)
        head.count_N.fill_(1e6)
        scaled = batch._replace(reward=batch.reward * scale, bootstrap=batch.bootstrap * scale)
        for _ in range(3):
            assert algorithm.update(scaled, progress=0.0).finite
        with torch.no_grad():
            output = algorithm.model(batch.inputs, ())[0]
        learned[scale] = (output.parameters, output.value / scale, head.deviation_N() / scale)
    for small, large in zip(*learned.values(), strict=True):
        torch.testing.assert_close(small, large, rtol=1e-3, atol=1e-4)


def test_the_order_is_values_then_statistics_then_losses(spec: EnvSpec, batch: Batch) -> None:
    """One step of plain gradient descent on the normalised error, after the layer has moved."""
    network = {"normalize_values": True, "popart_step": 0.5}
    algorithm, twin = (made("impala", spec, network=network, entropy_cost=0.0) for _ in range(2))
    head = head_of(twin)
    algorithm._optimizer = torch.optim.SGD(algorithm.model.parameters(), lr=1e-2)
    scaled = batch._replace(reward=batch.reward * 50)
    output = twin._forward(scaled)
    targets = twin._targets(scaled, output)
    head.observe_targets(targets.value_TB)
    unit, mean = head.deviation_N(), head.mean_N.float()
    fresh = twin._forward(scaled)
    torch.testing.assert_close(fresh.value_UB, output.value_UB, rtol=1e-5, atol=1e-4)
    normalized = (fresh.value_UB[:-1] - mean) / unit
    loss = 0.25 * ((targets.value_TB - mean) / unit - normalized).square().mean()
    loss = loss - (fresh.log_prob_TB * targets.advantage_TB / unit).mean()
    loss.backward()
    for parameter in twin.model.parameters():
        assert parameter.grad is not None
        parameter.data.sub_(1e-2 * parameter.grad)
    algorithm.update(scaled, progress=0.0)
    torch.testing.assert_close(
        algorithm.model.state_dict(), twin.model.state_dict(), rtol=1e-4, atol=1e-5
    )


def test_targets_move_the_statistics_once_a_batch(spec: EnvSpec, batch: Batch) -> None:
    found = []
    for passes in (1, 3):
        algorithm = made("impala", spec, network={"normalize_values": True}, passes=passes)
        algorithm.update(batch, progress=0.0)
        found.append(head_of(algorithm).square_N.clone())
    assert torch.equal(*found)
    assert found[0] != 1


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_ratio_that_exp_has_no_number_for_has_a_gradient(advantage: float) -> None:
    log_ratio = torch.tensor([100.0, 0.1], requires_grad=True)
    clipped_surrogate_loss(log_ratio, torch.tensor([advantage, 1.0]), 0.2).backward()
    assert log_ratio.grad is not None
    assert torch.isfinite(log_ratio.grad).all()
    assert log_ratio.grad[1] < 0


@pytest.mark.parametrize("kind", ["impala", "ppo"])
def test_a_policy_that_acted_long_ago_leaves_weights_that_are_numbers(
    kind: str, spec: EnvSpec, batch: Batch
) -> None:
    algorithm = made(kind, spec, passes=2)
    old = batch._replace(log_prob=torch.full_like(batch.log_prob, -200.0))
    update = algorithm.update(old, progress=0.0)
    assert update.finite
    assert all(torch.isfinite(parameter).all() for parameter in algorithm.model.parameters())
    assert all(torch.isfinite(value) for value in update.metrics.values())


def test_the_step_size_follows_a_sequence_of_divergences() -> None:
    config = plain_adam(learning_rate_schedule="kl", target_kl=0.01, learning_rate=1e-3)
    size = StepSize(config)
    found = []
    for kl in (0.03, 0.021, 0.019, 0.012, 0.006, 0.004, 0.0):
        size.observe(torch.tensor(kl))
        found.append(size.at(0.5) / 1e-3)
    third = 1 / 1.5
    assert found == pytest.approx([third, third**2, third**2, third**2, third**2, third, 1.0])
    other = StepSize(config)
    other.load_state_dict(size.state_dict())
    assert other.at(0.0) == size.at(0.0)
    for _ in range(50):
        size.observe(torch.tensor(0.0))
    assert size.at(0.0) == pytest.approx(1e-2)
    for _ in range(50):
        size.observe(torch.tensor(1.0))
    assert size.at(0.0) == pytest.approx(1e-5)


@pytest.mark.parametrize("minibatches", [1, 2])
@pytest.mark.parametrize("kind", ["impala", "ppo"])
def test_a_warm_up_is_no_reason_for_larger_steps(
    kind: str, minibatches: int, spec: EnvSpec, batch: Batch
) -> None:
    optimizer = plain_adam(learning_rate_schedule="kl", learning_rate_warmup=0.5, target_kl=1e3)
    algorithm = made(kind, spec, passes=2, minibatches=minibatches, optimizer=optimizer)
    rates = [
        float(algorithm.update(batch, progress=progress).metrics["learning_rate"])
        for progress in (0.1, 0.2, 0.5, 0.6)
    ]
    assert rates == pytest.approx([2e-3, 4e-3, 1e-2, 1.5e-2])


@pytest.mark.parametrize("minibatches", [1, 2])
@pytest.mark.parametrize("kind", ["impala", "ppo"])
def test_an_update_steers_the_next_ones_step_size(
    kind: str, minibatches: int, spec: EnvSpec, batch: Batch
) -> None:
    for target, factor in ((1e-6, 1 / 1.5), (1e3, 1.5)):
        optimizer = plain_adam(learning_rate_schedule="kl", target_kl=target)
        algorithm = made(kind, spec, passes=2, minibatches=minibatches, optimizer=optimizer)
        first = algorithm.update(batch, progress=0.0).metrics
        second = algorithm.update(batch, progress=0.9).metrics
        assert first["kl_divergence"] > 0
        assert first["learning_rate"] == pytest.approx(1e-2)
        assert second["learning_rate"] == pytest.approx(1e-2 * factor)
        twin = made(kind, spec, passes=2, minibatches=minibatches, optimizer=optimizer)
        twin.load_state_dict(algorithm.state_dict())
        third = twin.update(batch, progress=0.9).metrics["learning_rate"]
        assert third == pytest.approx(1e-2 * factor**2)


@pytest.mark.parametrize("kind", ["impala", "ppo"])
@pytest.mark.parametrize("minibatches", [1, 2])
def test_no_pass_begins_where_those_before_moved_the_policy_too_far(
    kind: str, minibatches: int, spec: EnvSpec, batch: Batch
) -> None:
    def passes(stop_kl: float) -> int | None:
        algorithm = made(kind, spec, passes=2, minibatches=minibatches, stop_kl=stop_kl)
        return algorithm.update(batch, progress=0.0).passes

    assert passes(1e-9) == 1
    assert passes(1e3) == 2
    two = made(kind, spec, passes=4, minibatches=minibatches, stop_kl=1e-9)
    one = made(kind, spec, passes=1, minibatches=minibatches)
    for algorithm in (one, two):
        algorithm.update(batch, progress=0.0)
    torch.testing.assert_close(one.model.state_dict(), two.model.state_dict(), rtol=0, atol=0)


def cost(algorithm: Any, batch: Batch, progress: float) -> float:
    """What an update says the entropy weighs, by its loss."""
    said = algorithm.update(batch, progress=progress).metrics
    rest = said["loss/policy"] + 0.5 * said["loss/value"]
    return float((rest - said["loss/total"]) / said["loss/entropy"])


@pytest.mark.parametrize("kind", ["impala", "ppo"])
def test_the_entropy_cost_goes_where_it_shall_end(kind: str, spec: EnvSpec, batch: Batch) -> None:
    settings = {
        "entropy_cost": 0.2,
        "final_entropy_cost": 0.1,
        "entropy_cost_schedule": "linear",
        "optimizer": plain_adam(learning_rate=0.0),
    }
    algorithm = made(kind, spec, **settings)
    found = [cost(algorithm, batch, progress) for progress in (0.0, 0.5, 1.0)]
    assert found == pytest.approx([0.2, 0.15, 0.1], rel=1e-3)


def test_the_clip_narrows_and_is_never_lifted(spec: EnvSpec, batch: Batch) -> None:
    """At the end of its schedule a clip of 0 stops all that would go on: it is not "no clip"."""
    moved = {}
    for schedule in ("constant", "linear"):
        algorithm = made(
            "impala",
            spec,
            passes=2,
            clip_range=0.2,
            clip_range_schedule=schedule,
            value_cost=0.0,
            entropy_cost=0.0,
            optimizer=plain_adam(learning_rate=3e-2),
        )
        moved[schedule] = float(algorithm.update(batch, progress=1.0).metrics["kl_divergence"])
    assert 0 < moved["linear"] < math.inf
    assert algorithm._clip_range == 0.0
    assert moved["linear"] <= moved["constant"]


@pytest.mark.parametrize("kind", ["impala", "ppo"])
def test_shuffles_follow_the_seed_and_go_on_in_a_checkpoint(
    kind: str, spec: EnvSpec, batch: Batch
) -> None:
    def learned(seed: int, state: dict[str, Any] | None = None) -> dict[str, Tensor]:
        algorithm = made(kind, spec, minibatches=4, passes=2)
        algorithm.draw_apart(seed)
        if state is not None:
            algorithm.load_state_dict(state)
        algorithm.update(batch, progress=0.0)
        return {name: value.clone() for name, value in algorithm.model.state_dict().items()}

    def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
        return all(torch.equal(one[name], other[name]) for name in one)

    assert equal(learned(1), learned(1))
    assert not equal(learned(1), learned(2))
    saved = made(kind, spec, minibatches=4, passes=2)
    saved.draw_apart(1)
    assert equal(learned(2, saved.state_dict()), learned(1))


def test_the_head_alone_is_a_linear_layer_until_it_has_seen_targets() -> None:
    torch.manual_seed(0)
    head = PopArtHead(5, step=0.1)
    plain = nn.Linear(5, 1)
    plain.load_state_dict({"weight": head.weight, "bias": head.bias})
    features = torch.randn(3, 5)
    assert torch.equal(head(features), plain(features))
    head.observe_targets(torch.full((7,), 500.0))
    torch.testing.assert_close(head(features), plain(features), rtol=1e-4, atol=1e-3)
