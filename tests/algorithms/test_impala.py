"""IMPALA's loss by hand, its fixed point under truncation, and how it acts."""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from headrace.algorithms.impala import Impala, ImpalaConfig
from headrace.algorithms.optimizers import OptimizerConfig
from headrace.errors import ConfigError
from headrace.records import Batch, PolicyInput
from headrace.specs import EnvSpec

STATES, ACTIONS = 10, 3


class Output(NamedTuple):
    parameters: Tensor
    value: Tensor


class Table(nn.Module):
    """Logits and value of every state, looked up by the number that the observation is."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(STATES, ACTIONS, dtype=dtype))
        self.value = nn.Parameter(torch.zeros(STATES, dtype=dtype))

    def forward(
        self, inputs: PolicyInput, recurrent: tuple[Tensor, ...]
    ) -> tuple[Output, tuple[Tensor, ...]]:
        state = inputs.observation[:, :, 0, 0].nan_to_num().long()
        # Adds nothing, but a NaN that was seen.
        seen = inputs.observation[:, :, 0, 0] * 0
        return Output(self.logits[state] + seen[..., None], self.value[state] + seen), recurrent

    def initial_state(self, batch: int) -> tuple[Tensor, ...]:
        return ()


SPEC = EnvSpec(
    name="table",
    observation_space=gym.spaces.Box(0, STATES, (1,), np.float32),
    action_space=gym.spaces.Discrete(ACTIONS),
)


def impala_of(model: nn.Module, config: ImpalaConfig | None = None, spec: EnvSpec = SPEC) -> Impala:
    return Impala(model, config or ImpalaConfig(), spec=spec)


def a_batch(state_UB: Tensor, **fields: Any) -> Batch:
    dtype = fields.pop("dtype", torch.float32)
    shape = (len(state_UB) - 1, state_UB.shape[1])
    never = torch.zeros(shape, dtype=torch.bool)
    inputs = PolicyInput(
        observation=state_UB.to(dtype)[:, :, None, None],
        reward=torch.zeros(state_UB.shape, dtype=dtype),
        previous_action=torch.full(state_UB.shape, -1),
        reset=torch.zeros(state_UB.shape, dtype=torch.bool),
    )
    batch = Batch(
        inputs=inputs,
        recurrent=(),
        action=torch.zeros(shape, dtype=torch.int64),
        log_prob=torch.full(shape, -math.log(ACTIONS), dtype=dtype),
        reward=torch.zeros(shape, dtype=dtype),
        terminated=never,
        truncated=never,
        bootstrap=torch.zeros(shape, dtype=dtype),
        version=torch.zeros(shape, dtype=torch.int64),
    )
    return batch._replace(**fields)


def constant_sgd(**settings: Any) -> ImpalaConfig:
    optimizer = OptimizerConfig(
        optimizer="adam",
        learning_rate=0.2,
        learning_rate_schedule="linear",
        max_gradient_norm=0.0,
    )
    return ImpalaConfig(**{"optimizer": optimizer, "entropy_cost": 0.0, **settings})


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_a_clock_that_cuts_episodes_does_not_lower_the_value(reward: float) -> None:
    # Ten states in a ring; every tenth step is truncated, and the ring goes on in another episode.
    discount, length = 0.9, 10
    truth = reward / (1 - discount)
    table = Table()
    nn.init.constant_(table.value, 3.0)
    table.logits.requires_grad_(False)  # one policy, so that the value of one policy is learned
    impala = impala_of(table, constant_sgd(discount=discount, value_cost=1.0))
    state_UB = (torch.arange(21)[:, None] + torch.arange(5)) % length
    truncated_TB = state_UB[1:] == 0
    updates = 400
    for update in range(updates):
        # What the server saw past the clock: the state that would have come is as good as any.
        bootstrap = torch.where(truncated_TB, table.value.detach()[0], 0.0)
        batch = a_batch(
            state_UB,
            reward=torch.full(truncated_TB.shape, reward),
            truncated=truncated_TB,
            bootstrap=bootstrap,
        )
        assert impala.update(batch, progress=update / updates).finite
    assert truncated_TB.any()
    torch.testing.assert_close(
        table.value.detach(), torch.full((length,), truth), atol=0.02, rtol=0.0
    )


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_at_the_true_value_a_truncation_asks_for_no_change(reward: float) -> None:
    discount = 0.9
    truth = reward / (1 - discount)
    table = Table()
    nn.init.constant_(table.value, truth)
    impala = impala_of(table, constant_sgd(discount=discount))
    state_UB = torch.arange(21)[:, None] % 10
    truncated = state_UB[1:] == 0
    batch = a_batch(
        state_UB,
        reward=torch.full(truncated.shape, reward),
        truncated=truncated,
        bootstrap=torch.where(truncated, truth, 0.0),
    )
    _, metrics = impala.loss(batch)
    assert metrics["loss/value"].item() == pytest.approx(0.0, abs=1e-9)
    assert metrics["loss/policy"].item() == pytest.approx(0.0, abs=1e-5)
    # Without the bootstrap every target lacks what lies past the clock, k steps away.
    cut = batch._replace(bootstrap=torch.zeros_like(batch.bootstrap))
    lacks = [0.5 * (discount**k * truth) ** 2 for k in range(1, 11)]
    assert impala.loss(cut)[1]["loss/value"].item() == pytest.approx(sum(lacks) / 10, rel=1e-4)


def test_a_terminated_step_is_worth_its_reward_alone() -> None:
    table = Table()
    nn.init.constant_(table.value, 7.0)
    with torch.no_grad():
        table.value[0] = 1.0
    impala = impala_of(table, constant_sgd(discount=0.9))
    # Wrong bootstraps must not get in: only a truncation has one.
    batch = a_batch(
        torch.tensor([[0], [5]]),
        reward=torch.ones(1, 1),
        terminated=torch.ones(1, 1, dtype=torch.bool),
    )
    assert impala.loss(batch)[1]["loss/value"].item() == 0.0


def targets_by_hand(
    table: Table, batch: Batch, config: ImpalaConfig, first_TB: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What values should be, and the weight of every log-probability, one number at a time.

    The weight has the ratio of the policy that said `first_TB`, or else of this one.
    """
    T, B = batch.action.shape
    states = batch.inputs.observation[:, :, 0, 0].long()
    targets = torch.zeros(2, T, B, dtype=torch.float64)
    for b in range(B):
        value = [table.value[s].item() for s in states[:, b]]
        log_prob = [table.logits[s].log_softmax(0).tolist() for s in states[:, b]]
        discount, reward, ratio = [], [], []
        for t in range(T):
            over = bool(batch.terminated[t, b] or batch.truncated[t, b])
            discount.append(0.0 if over else config.discount)
            clipped = max(-1.0, min(1.0, batch.reward[t, b].item()))
            reward.append(clipped + config.discount * batch.bootstrap[t, b].item())
            target = log_prob[t][batch.action[t, b]]
            ratio.append(math.exp(target - batch.log_prob[t, b].item()))
        vs = []
        for s in range(T + 1):
            total, weight = value[s], 1.0
            for t in range(s, T):
                delta = reward[t] + discount[t] * value[t + 1] - value[t]
                total += weight * min(config.vtrace_rho_max, ratio[t]) * delta
                weight *= discount[t] * config.vtrace_lambda * min(config.vtrace_c_max, ratio[t])
            vs.append(total)
        for t in range(T):
            advantage = reward[t] + discount[t] * vs[t + 1] - value[t]
            targets[0, t, b] = vs[t]
            weight = ratio[t]
            if first_TB is not None:
                weight = math.exp(first_TB[t, b].item() - batch.log_prob[t, b].item())
            targets[1, t, b] = min(config.vtrace_pg_rho_max, weight) * advantage
    return targets[0], targets[1]


def said_by(table: Table, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Values, log-probabilities of what was done, and entropies, all but those of the last row."""
    states_TB = batch.inputs.observation[:-1, :, 0, 0].long()
    log_probs_TBA = table.logits[states_TB].log_softmax(-1)
    log_prob_TB = log_probs_TBA.gather(-1, batch.action[..., None])[..., 0]
    return table.value[states_TB], log_prob_TB, -(log_probs_TBA.exp() * log_probs_TBA).sum(-1)


def by_hand(table: Table, batch: Batch, config: ImpalaConfig) -> tuple[float, float, float]:
    """Policy loss, value loss and entropy, from the paper's equations."""
    target_TB, weight_TB = targets_by_hand(table, batch, config)
    value_TB, log_prob_TB, entropy_TB = said_by(table, batch)
    return (
        -(weight_TB * log_prob_TB).mean().item(),
        0.5 * (target_TB - value_TB).square().mean().item(),
        entropy_TB.mean().item(),
    )


def random_batch() -> tuple[Table, Batch]:
    generator = torch.Generator().manual_seed(4)
    table = Table(torch.float64)
    with torch.no_grad():
        table.logits.normal_(generator=generator)
        table.value.normal_(generator=generator)
    shape = (6, 3)
    truncated = torch.zeros(shape, dtype=torch.bool)
    truncated[2, 0] = truncated[5, 1] = True
    terminated = torch.zeros(shape, dtype=torch.bool)
    terminated[3, 1] = terminated[0, 2] = True
    batch = a_batch(
        torch.randint(0, STATES, (7, 3), generator=generator),
        dtype=torch.float64,
        action=torch.randint(0, ACTIONS, shape, generator=generator),
        log_prob=-2 * torch.rand(shape, dtype=torch.float64, generator=generator),
        reward=2 * torch.randn(shape, dtype=torch.float64, generator=generator),
        terminated=terminated,
        truncated=truncated,
        bootstrap=torch.where(truncated, 0.7, 0.0).double(),
    )
    return table, batch


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"vtrace_rho_max": 0.6, "vtrace_c_max": 0.8, "vtrace_pg_rho_max": 0.7},
        {"vtrace_rho_max": 2.0, "vtrace_c_max": 1.5, "vtrace_pg_rho_max": 1.2},
        {"vtrace_lambda": 0.5, "discount": 0.75},
    ],
    ids=["paper", "low-clips", "high-clips", "lambda"],
)
def test_the_loss_is_what_the_paper_writes(settings: dict[str, float]) -> None:
    table, batch = random_batch()
    # Numbers that float32 holds exactly: the discount is one.
    config = ImpalaConfig(
        **{"discount": 63 / 64, **settings},
        entropy_cost=0.03,
        value_cost=0.4,
        reward_transform="clip",
    )
    total, metrics = impala_of(table, config).loss(batch)
    policy_loss, value_loss, entropy = by_hand(table, batch, config)
    assert metrics["loss/policy"].item() == pytest.approx(policy_loss, abs=1e-12)
    assert metrics["loss/value"].item() == pytest.approx(value_loss, abs=1e-12)
    assert metrics["loss/entropy"].item() == pytest.approx(entropy, abs=1e-12)
    # Policies that differ this much have ratios on both sides of every clip.
    wanted = policy_loss + 0.4 * value_loss - 0.03 * entropy
    assert total.item() == pytest.approx(wanted, abs=1e-12)


def test_the_gradient_is_that_of_the_published_loss() -> None:
    table, batch = random_batch()
    config = ImpalaConfig(entropy_cost=0.0, value_cost=0.0)
    impala_of(table, config).loss(batch)[0].backward()
    assert table.value.grad is None or not table.value.grad.any(), "the advantage is a constant"
    assert table.logits.grad is not None
    assert table.logits.grad.any()


@pytest.mark.parametrize("normalize_advantage", [False, True])
@pytest.mark.parametrize("clip_range", [0.0, 0.05])
@pytest.mark.parametrize("minibatches", [1, 3])
def test_passes_are_clipped_against_the_policy_of_the_first(
    minibatches: int, clip_range: float, normalize_advantage: bool
) -> None:
    table, batch = random_batch()
    optimizer = OptimizerConfig(
        learning_rate=0.1, learning_rate_schedule="constant", max_gradient_norm=0.0
    )
    config = ImpalaConfig(
        passes=3,
        minibatches=minibatches,
        clip_range=clip_range,
        normalize_advantage=normalize_advantage,
        batch_unrolls=3,
        discount=63 / 64,  # which float32 holds exactly
        entropy_cost=0.03,
        value_cost=0.4,
        reward_transform="clip",
        optimizer=optimizer,
    )
    impala, twin = impala_of(copy.deepcopy(table), config), copy.deepcopy(table)
    generator = torch.Generator().manual_seed(0)
    adam = torch.optim.Adam(twin.parameters(), lr=0.1, eps=optimizer.optimizer_eps)
    first_TB = said_by(twin, batch)[1].detach()
    low, high = (1 - clip_range, 1 + clip_range) if clip_range else (0, math.inf)
    for _ in range(3):
        target_TB, weight_TB = targets_by_hand(twin, batch, config, first_TB)
        for columns in torch.rand(3, generator=generator).argsort().chunk(minibatches):
            some = columns if minibatches > 1 else slice(None)
            value_TM, log_prob_TM, entropy_TM = (x[:, some] for x in said_by(twin, batch))
            ratio_TM = (log_prob_TM - first_TB[:, some]).exp()
            weight_TM = weight_TB[:, some]
            if normalize_advantage:
                weight_TM = weight_TM - weight_TM.mean()
                weight_TM = weight_TM / (weight_TM.std(correction=0) + 1e-8)
            gain_TM = torch.minimum(ratio_TM * weight_TM, ratio_TM.clamp(low, high) * weight_TM)
            error_TM = target_TB[:, some] - value_TM
            loss = 0.2 * error_TM.square().mean() - gain_TM.mean() - 0.03 * entropy_TM.mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
    update = impala.update(batch, progress=0.0)
    assert update.finite
    torch.testing.assert_close(impala.model.state_dict(), twin.state_dict(), atol=1e-9, rtol=1e-9)
    assert not torch.equal(twin.logits, table.logits)


def adaptive(target: float, *, start: float = 0.1) -> tuple[Table, Impala]:
    optimizer = OptimizerConfig(
        optimizer="adam",
        learning_rate=0.02,
        learning_rate_schedule="constant",
        max_gradient_norm=0.0,
    )
    config = ImpalaConfig(
        entropy_cost=start,
        target_entropy=target,
        entropy_cost_adjustment_speed=2.0,
        optimizer=optimizer,
    )
    table = Table()
    return table, impala_of(table, config)


def bandit_batch(table: Table) -> Batch:
    """Every action once; the first one earns, and would take the policy over by itself."""
    action = torch.arange(ACTIONS)[:, None]
    return a_batch(
        torch.zeros(ACTIONS + 1, 1, dtype=torch.int64),
        action=action,
        log_prob=table.logits[0].detach().log_softmax(0)[action],
        reward=(action == 0).float(),
        terminated=torch.ones(ACTIONS, 1, dtype=torch.bool),
    )


@pytest.mark.parametrize("target", [0.4, 0.8])
def test_the_adaptive_weight_lets_the_entropy_fall_and_brings_it_back(target: float) -> None:
    table, impala = adaptive(target)
    entropies = []
    for update in range(500):
        metrics = impala.update(bandit_batch(table), progress=0.0).metrics
        if update == 0:
            assert metrics["entropy_cost"].item() == pytest.approx(0.1, rel=1e-4)
        entropies.append(metrics["loss/entropy"].item())
    below = next(i for i, entropy in enumerate(entropies) if entropy < target)
    # A fixed weight of 0.1 would leave the entropy near zero for good.
    assert max(entropies[below:]) > target + 0.1


@pytest.mark.parametrize(("target", "grows"), [(0.5, False), (1.5, True)])
def test_the_adaptive_weight_grows_only_below_the_target(target: float, grows: bool) -> None:
    table, impala = adaptive(target)
    costs = []
    for _ in range(5):
        metrics = impala.update(bandit_batch(table), progress=0.0).metrics
        costs.append(metrics["entropy_cost"].item())
    assert costs == sorted(costs, reverse=not grows)
    assert costs[0] != costs[-1]


def test_the_adaptive_weight_is_saved_and_bounded() -> None:
    table, impala = adaptive(1.5)
    for _ in range(5):
        impala.update(bandit_batch(table), progress=0.0)
    after = impala.loss(bandit_batch(table))[1]["entropy_cost"]
    twin_table, twin = adaptive(1.5)
    twin.load_state_dict(impala.state_dict())
    assert twin.loss(bandit_batch(twin_table))[1]["entropy_cost"] == after
    _, wild = adaptive(1.5, start=1e30)
    wild.update(bandit_batch(table), progress=0.0)
    assert wild.loss(bandit_batch(table))[1]["entropy_cost"].item() == pytest.approx(math.exp(20))


@pytest.mark.parametrize("where", ["observation", "reward", "bootstrap", "log_prob"])
def test_a_nan_anywhere_is_reported(where: str) -> None:
    impala = impala_of(Table())
    batch = a_batch(torch.zeros(6, 2, dtype=torch.int64))
    assert impala.update(batch, progress=0.0).finite
    if where == "observation":
        batch.inputs.observation[2, 1] = torch.nan
    else:
        getattr(batch, where)[2, 1] = torch.nan
    assert not impala.update(batch, progress=0.0).finite


def test_an_overflowing_loss_is_reported() -> None:
    table = Table()
    nn.init.constant_(table.value, 1e30)
    assert (
        not impala_of(table)
        .update(a_batch(torch.zeros(6, 2, dtype=torch.int64)), progress=0.0)
        .finite
    )


def inputs_of(count: int) -> PolicyInput:
    return PolicyInput(
        observation=torch.zeros(1, count, 1, 1),
        reward=torch.zeros(1, count),
        previous_action=torch.full((1, count), -1),
        reset=torch.zeros(1, count, dtype=torch.bool),
    )


PROBABILITY = torch.tensor([0.2, 0.7, 0.1])


def act(mode: Any, *, epsilon: float = 0.0, seed: int = 0, count: int = 20000) -> Any:
    table = Table()
    with torch.no_grad():
        table.logits[0] = PROBABILITY.log()
        table.value[0] = 5.0
    impala = impala_of(table)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        step, recurrent = impala.act(
            table, inputs_of(count), (), mode=mode, generator=generator, epsilon=epsilon
        )
    assert recurrent == ()
    assert (step.value == 5).all()
    torch.testing.assert_close(step.log_prob, PROBABILITY.log()[step.action])
    return step.action


def shares(action: Tensor) -> list[float]:
    return (torch.bincount(action, minlength=ACTIONS) / len(action)).tolist()


def test_greedy_takes_the_likeliest() -> None:
    assert shares(act("greedy")) == [0, 1, 0]


def test_sampling_follows_the_policy() -> None:
    assert shares(act("sample")) == pytest.approx(PROBABILITY.tolist(), abs=0.015)
    assert torch.equal(act("sample", seed=3), act("sample", seed=3))
    assert not torch.equal(act("sample", seed=3), act("sample", seed=4))


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_epsilon_is_the_share_of_uniform_actions(epsilon: float) -> None:
    third = epsilon / 3
    wanted = [third, 1 - epsilon + third, third]
    assert shares(act("epsilon", epsilon=epsilon)) == pytest.approx(wanted, abs=0.015)


@pytest.mark.parametrize(
    "settings",
    [
        {"discount": 1.1},
        {"vtrace_lambda": -0.1},
        {"entropy_cost": -1.0},
        {"entropy_cost": 0.0, "target_entropy": 0.5},
        {"passes": 0},
        {"passes": 5},
        {"clip_range": -0.1, "passes": 2},
        {"clip_range": 0.1},
        {"minibatches": 0},
        {"minibatches": 5},
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        ImpalaConfig(**settings)
