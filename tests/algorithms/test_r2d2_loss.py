"""R2D2's loss and priorities against a walk along every sequence, one row at a time.

Shape suffixes: T = steps of a sequence, U = T + 1, B = sequences, A = actions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from headrace.algorithms.r2d2 import R2d2, R2d2Config
from headrace.networks.action_values import ActionValueNet
from headrace.networks.config import NetworkConfig
from headrace.networks.models import mlp
from headrace.records import Batch, Finals, PolicyInput
from headrace.specs import EnvSpec

MakeSpec = Callable[..., EnvSpec]
MakeBatch = Callable[..., Batch]
B = 5


class Values(NamedTuple):
    value: Tensor
    states: tuple[Tensor, ...]


class Echo(nn.Module):
    """One number of state that takes in all that a network sees."""

    def __init__(self, actions: int = 4, features: int = 5) -> None:
        super().__init__()
        self.see = nn.Parameter(torch.randn(features))
        self.hear = nn.Parameter(torch.randn(2))
        self.head = nn.Parameter(torch.randn(2, actions))

    def forward(
        self, inputs: PolicyInput, recurrent: tuple[Tensor, ...]
    ) -> tuple[Values, tuple[Tensor, ...]]:
        x_UB = inputs.observation[:, :, -1] @ self.see
        x_UB = x_UB + self.hear[0] * inputs.reward + self.hear[1] * inputs.previous_action
        (h_B1,) = recurrent
        states = []
        for x_B, reset_B in zip(x_UB, inputs.reset, strict=True):
            h_B1 = (h_B1.masked_fill(reset_B[:, None], 0.0) + x_B[:, None]).tanh()
            states.append(h_B1)
        h_UB1 = torch.stack(states)
        value_UBA = h_UB1 * self.head[0] + h_UB1.square() * self.head[1]
        return Values(3 * value_UBA, (h_UB1,)), (h_B1,)

    def initial_state(self, batch: int) -> tuple[Tensor, ...]:
        return (torch.zeros(batch, 1),)


def with_finals(batch: Batch, *, keep: float, seed: int = 0) -> Batch:
    """Final observations of a share of the truncated steps, and padding that is not a number."""
    generator = torch.Generator().manual_seed(seed)
    at = batch.truncated.nonzero()
    at = at[torch.rand(len(at), generator=generator) < keep]
    count = len(at)
    shape = batch.inputs.observation.shape[2:]
    observation = torch.full((count + 3, *shape), torch.nan, dtype=batch.reward.dtype)
    observation[:count] = torch.randn(count, *shape, generator=generator)
    step, column = torch.zeros(2, count + 3, dtype=torch.int64)
    step[:count], column[:count] = at[:, 0], at[:, 1]
    mask = None
    if batch.inputs.action_mask is not None:
        mask = torch.rand(count + 3, batch.inputs.action_mask.shape[-1], generator=generator) < 0.5
        mask[:, 1] |= ~mask.any(dim=1)
    return batch._replace(
        finals=Finals(observation, step, column, torch.arange(count + 3) < count, mask),
        weight=torch.rand(B, generator=generator).to(batch.reward.dtype),
    )


def in_double(batch: Batch) -> Batch:
    inputs = batch.inputs
    return batch._replace(
        inputs=inputs._replace(
            observation=inputs.observation.double(), reward=inputs.reward.double()
        ),
        reward=batch.reward.double(),
        recurrent=tuple(part.double() for part in batch.recurrent),
    )


class Walked(NamedTuple):
    loss: float
    priority: list[float]
    skipped: int


class Column:
    """One sequence, seen by both networks a row at a time."""

    def __init__(self, models: tuple[nn.Module, nn.Module], batch: Batch, b: int) -> None:
        self.models, self.batch, self.b = models, batch, b
        self.value: list[list[Tensor]] = [[], []]
        self.state: list[list[tuple[Tensor, ...]]] = [[], []]
        for which, model in enumerate(models):
            state = tuple(part[b : b + 1] for part in batch.recurrent)
            for u in range(len(batch.inputs.reward)):
                parts = batch.inputs
                row = PolicyInput(
                    *(None if x is None else x[u : u + 1, b : b + 1] for x in parts)  # type: ignore[arg-type]
                )
                output, state = model(row, state)
                self.value[which].append(output.value[0, 0])
                self.state[which].append(state)

    def best(self, values: list[Tensor], mask: Tensor | None, *, double_q: bool) -> float:
        chooser = values[0 if double_q else 1].tolist()
        allowed = range(len(chooser)) if mask is None or not mask.any() else mask.nonzero()[:, 0]
        return values[1][max((int(a) for a in allowed), key=lambda a: chooser[a])].item()

    def final(self, step: int) -> tuple[list[Tensor], Tensor | None] | None:
        finals = self.batch.finals
        for i in range(0 if finals is None else len(finals.step)):
            assert finals is not None
            if finals.valid[i] and (finals.step[i], finals.column[i]) == (step, self.b):
                row = PolicyInput(
                    finals.observation[None, i : i + 1],
                    self.batch.reward[step, self.b].view(1, 1),
                    self.batch.action[step, self.b].view(1, 1),
                    torch.zeros(1, 1, dtype=torch.bool),
                )
                pairs = zip(self.models, self.state, strict=True)
                values = [model(row, states[step])[0].value[0, 0] for model, states in pairs]
                return values, None if finals.action_mask is None else finals.action_mask[i]
        return None


def scales(config: R2d2Config) -> tuple[Callable[[float], float], Callable[[float], float]]:
    if not config.rescale_values:
        return (lambda x: x), (lambda x: x)
    e = config.value_scale_epsilon

    def h(x: float) -> float:
        return math.copysign(math.sqrt(abs(x) + 1) - 1, x) + e * x

    def inverse(x: float) -> float:
        root = math.sqrt(1 + 4 * e * (abs(x) + 1 + e)) - 1
        return math.copysign((root / (2 * e)) ** 2 - 1, x)

    return h, inverse


@torch.no_grad()
def walk(models: tuple[nn.Module, nn.Module], batch: Batch, config: R2d2Config) -> Walked:
    h, inverse = scales(config)
    burn_in, T = config.burn_in_steps, config.unroll_steps
    mask = batch.inputs.action_mask
    total, priorities, skipped = 0.0, [], 0
    for b in range(B):
        column, errors = Column(models, batch, b), []
        for start in range(burn_in, burn_in + T):
            y, weight, t, ended, known = 0.0, 1.0, start, False, True
            while t < min(start + config.n_steps, len(batch.reward)) and not ended:
                reward = config.reward_scale * batch.reward[t, b].item()
                if config.reward_transform == "clip":
                    reward = max(-1.0, min(1.0, reward))
                y += weight * reward
                weight *= config.discount
                ended = bool(batch.terminated[t, b] or batch.truncated[t, b])
                if batch.truncated[t, b] and not batch.terminated[t, b]:
                    final = column.final(t)
                    known = final is not None
                    if final is not None:
                        y += weight * inverse(column.best(*final, double_q=config.double_q))
                t += 1
            if not ended:
                values = [column.value[0][t], column.value[1][t]]
                allowed = None if mask is None else mask[t, b]
                y += weight * inverse(column.best(values, allowed, double_q=config.double_q))
            if known:
                errors.append(h(y) - column.value[0][start][batch.action[start, b]].item())
            else:
                skipped += 1
        importance = 1.0 if batch.weight is None else batch.weight[b].item()
        total += importance * sum(0.5 * e * e for e in errors) / T / B
        size = [abs(e) for e in errors] or [0.0]
        eta = config.priority_eta
        priorities.append(eta * max(size) + (1 - eta) * sum(size) / len(size))
    return Walked(total, priorities, skipped)


SETTINGS: dict[str, dict[str, Any]] = {
    "paper": {},
    "one-network": {"double_q": False},
    "plain-scale": {"rescale_values": False},
    "full-returns": {"full_returns": True},
    "one-step": {"n_steps": 1},
    "longer-than-the-sequence": {"n_steps": 12},
    "no-burn-in": {"burn_in_steps": 0},
    "clipped": {"reward_transform": "clip", "reward_scale": 3.0, "discount": 0.6},
    "mean": {"priority_eta": 0.25},
}


def config_of(**settings: Any) -> R2d2Config:
    return R2d2Config(
        **{"unroll_steps": 7, "burn_in_steps": 4, "n_steps": 3, "discount": 0.9, **settings}
    )


@pytest.mark.parametrize("mask", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_loss_is_that_of_a_walk_along_every_sequence(
    spec_of: MakeSpec, random_batch: MakeBatch, settings: dict[str, Any], keep: float, mask: bool
) -> None:
    config, spec = config_of(**settings), spec_of("discrete", mask=mask)
    algorithm = R2d2(Echo().double(), config, spec=spec)
    with torch.no_grad():  # the copy stays behind
        for parameter in algorithm.model.parameters():
            parameter.add_(0.7 * torch.randn_like(parameter))
    batch = random_batch(spec, (torch.randn(B, 1),), T=config.sequence_steps, B=B, seed=3)
    batch = with_finals(in_double(batch), keep=keep, seed=2)
    both = torch.rand(batch.truncated.shape) < 0.2  # a life lost as the clock runs out
    batch = batch._replace(terminated=batch.terminated | (both & batch.truncated))
    assert (batch.truncated.sum(dim=0) > 1).any(), "several in one sequence"
    total, metrics, priority_B = algorithm.loss(batch)
    expected = walk((algorithm.model, algorithm.target_model), batch, config)
    assert total.item() == pytest.approx(expected.loss, rel=1e-6)
    assert priority_B.tolist() == pytest.approx([p + 1e-6 for p in expected.priority], rel=1e-6)
    assert (priority_B > 0).all()
    assert metrics["truncated_skipped"].item() == expected.skipped
    assert (expected.skipped > 0) == (keep < 1)


def test_a_clock_within_the_burn_in_leaves_the_first_learned_step_alone(
    spec_of: MakeSpec, random_batch: MakeBatch
) -> None:
    config, spec = config_of(), spec_of("discrete")
    algorithm = R2d2(Echo().double(), config, spec=spec)
    batch = in_double(random_batch(spec, (torch.randn(B, 1),), T=config.sequence_steps, B=B))
    ended = torch.zeros_like(batch.truncated)
    ended[2:5] = True  # two steps of the burn-in, and the first that is learned from
    reset = torch.cat((torch.zeros(1, B, dtype=torch.bool), ended))
    batch = batch._replace(
        inputs=batch.inputs._replace(reset=reset),
        truncated=ended,
        terminated=torch.zeros_like(ended),
    )
    batch = with_finals(batch, keep=1.0)
    total, metrics, _ = algorithm.loss(batch)
    expected = walk((algorithm.model, algorithm.target_model), batch, config)
    assert total.item() == pytest.approx(expected.loss, rel=1e-6)
    assert metrics["truncated_skipped"].item() == 0


@pytest.mark.parametrize("lstm_size", [0, 6])
def test_the_real_network_is_walked_alike(
    spec_of: MakeSpec, random_batch: MakeBatch, lstm_size: int
) -> None:
    # Without a recurrent state there is nothing to warm up.
    config = config_of() if lstm_size else config_of(burn_in_steps=0)
    spec = spec_of("discrete")
    model = mlp(spec, NetworkConfig(heads="duelling", lstm_size=lstm_size))
    assert isinstance(model, ActionValueNet)
    algorithm = R2d2(model, config, spec=spec)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    state = tuple(torch.randn_like(part) for part in model.initial_state(B))
    batch = with_finals(random_batch(spec, state, T=config.sequence_steps, B=B), keep=0.8)
    total, _, priority_B = algorithm.loss(batch)
    expected = walk((algorithm.model, algorithm.target_model), batch, config)
    assert total.item() == pytest.approx(expected.loss, rel=1e-4)
    assert priority_B.tolist() == pytest.approx(expected.priority, rel=1e-4)


def test_a_target_that_nothing_is_known_of_teaches_nothing(
    spec_of: MakeSpec, random_batch: MakeBatch
) -> None:
    config, spec = config_of(burn_in_steps=0, n_steps=7), spec_of("discrete")
    algorithm = R2d2(Echo(), config, spec=spec)
    batch = random_batch(spec, (torch.zeros(B, 1),), T=7, B=B)
    last = torch.zeros(7, B, dtype=torch.bool)
    last[-1] = True
    batch = batch._replace(truncated=last, terminated=torch.zeros_like(last))
    update = algorithm.update(batch, progress=0.0)
    assert update.finite
    assert update.metrics["truncated_skipped"].item() == 7 * B
    assert update.metrics["gradient_norm"].item() == 0
    assert update.priority is not None
    torch.testing.assert_close(update.priority, torch.full((B,), 1e-6))
    # A termination between them and the clock shields the steps before it.
    shielded = batch.terminated.clone()
    shielded[4] = True
    metrics = algorithm.update(batch._replace(terminated=shielded), progress=0.0).metrics
    assert metrics["truncated_skipped"].item() == 2 * B


@pytest.mark.parametrize("rescale_values", [True, False])
def test_new_sequences_have_the_priority_that_the_loss_would_give(
    spec_of: MakeSpec, random_batch: MakeBatch, rescale_values: bool
) -> None:
    config, spec = config_of(rescale_values=rescale_values), spec_of("discrete", mask=True)
    algorithm = R2d2(Echo(), config, spec=spec)
    batch = random_batch(spec, (torch.randn(B, 1),), T=config.sequence_steps, B=B)
    batch = with_finals(batch, keep=1.0)
    value_UB, action_value_TB = torch.empty(len(batch.inputs.reward), B), batch.reward.clone()
    bootstrap_TB, finals = torch.zeros_like(batch.reward), batch.finals
    assert finals is not None
    for b in range(B):
        column = Column((algorithm.model, algorithm.target_model), batch, b)
        for u, output in enumerate(column.value[0]):
            mask = batch.inputs.action_mask
            assert mask is not None
            value_UB[u, b] = column.best([output, output], mask[u, b], double_q=True)
            if u < len(batch.action):
                action_value_TB[u, b] = output[batch.action[u, b]].item()
        for step in range(len(batch.action)):
            final = column.final(step)
            if final is not None:
                bootstrap_TB[step, b] = column.best(*final, double_q=True)
    inverse = scales(config)[1]
    for x in (value_UB, action_value_TB, bootstrap_TB):
        x.apply_(inverse)
    expected_B = algorithm.loss(batch).priority_B
    nothing = batch.inputs._replace(observation=torch.empty(0))
    told = batch._replace(
        inputs=nothing, value=value_UB, action_value=action_value_TB, bootstrap=bootstrap_TB
    )
    priority_B = algorithm.initial_priority(told._replace(finals=None))
    torch.testing.assert_close(priority_B, expected_B, rtol=1e-4, atol=1e-5)
    assert not priority_B.requires_grad
    with pytest.raises(ValueError, match="action_value"):
        algorithm.initial_priority(batch)
