"""Every kind of policy against torch.distributions, against counting, and where rows are masked."""

from __future__ import annotations

import itertools

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor

from headrace.ops.distributions import (
    Categorical,
    Distribution,
    MultiCategorical,
    make_distribution,
)
from headrace.ops.squashed_normal import SquashedNormal

CHOICES = (3, 2, 4)
KINDS = [
    pytest.param(Categorical(5), id="categorical"),
    pytest.param(MultiCategorical(CHOICES), id="multi"),
    pytest.param(SquashedNormal((-2.0, 0.0), (2.0, 1.0)), id="normal"),
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def parts(logits: Tensor) -> list[torch.distributions.Categorical]:
    return [torch.distributions.Categorical(logits=x) for x in logits.split(CHOICES, dim=-1)]


def all_actions() -> Tensor:
    return torch.tensor(list(itertools.product(*map(range, CHOICES))))


def test_the_space_chooses_the_kind() -> None:
    assert make_distribution(gym.spaces.Discrete(4)) == Categorical(4)
    assert make_distribution(gym.spaces.MultiDiscrete([3, 2])) == MultiCategorical((3, 2))
    box = gym.spaces.Box(np.float32([-1, 0]), np.float32([1, 3]))
    assert make_distribution(box) == SquashedNormal((-1.0, 0.0), (1.0, 3.0))


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_the_generator(kind: Distribution) -> None:
    parameters = torch.randn(7, 4, kind.num_parameters)
    first, again, other = (kind.sample(parameters, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    for action in (first, kind.greedy(parameters), kind.uniform(parameters)):
        assert action.shape == first.shape
        assert action.dtype == first.dtype
    assert kind.log_prob(parameters, first).shape == kind.entropy(parameters).shape == (7, 4)
    assert kind.encode(first).shape == (7, 4, kind.encoded_size)
    assert kind.encode(first).dtype == torch.float32


def test_components_are_independent_choices() -> None:
    kind = MultiCategorical(CHOICES)
    logits = torch.randn(6, 9, dtype=torch.float64)
    action = kind.sample(logits, generator())
    reference = parts(logits)
    expected = sum(part.log_prob(action[:, i]) for i, part in enumerate(reference))
    torch.testing.assert_close(kind.log_prob(logits, action), expected)
    torch.testing.assert_close(kind.entropy(logits), sum(part.entropy() for part in reference))
    assert torch.equal(kind.greedy(logits), torch.stack([x.mode for x in reference], dim=-1))
    # Over all joint actions: probabilities sum to 1, and the entropy is the mean of their logs.
    every = all_actions()
    log_prob = kind.log_prob(logits[:1].expand(len(every), -1), every)
    torch.testing.assert_close(log_prob.exp().sum().item(), 1.0)
    torch.testing.assert_close(-(log_prob.exp() * log_prob).sum(), kind.entropy(logits[0]))


def test_joint_actions_are_drawn_as_often_as_they_are_likely() -> None:
    kind, draws = MultiCategorical(CHOICES), 100_000
    logits = torch.randn(9)
    action = kind.sample(logits.expand(draws, 9), generator())
    for candidate in all_actions():
        probability = kind.log_prob(logits, candidate).exp()
        share = (action == candidate).all(dim=-1).float().mean()
        assert (share - probability).abs() < 5 * (probability / draws).sqrt() + 1e-4


def test_what_is_encoded_can_be_read_back() -> None:
    assert Categorical(3).encode(torch.tensor([2, -1, 0])).tolist() == [
        [0, 0, 1],
        [0, 0, 0],
        [1, 0, 0],
    ]
    rows = MultiCategorical((2, 3)).encode(torch.tensor([[1, 2], [-1, -1], [0, 0]]))
    assert rows.tolist() == [[0, 1, 0, 0, 1], [0] * 5, [1, 0, 1, 0, 0]]


MASKED = [
    pytest.param(Categorical(9), id="categorical"),
    pytest.param(MultiCategorical(CHOICES), id="multi"),
]


def allowed_components(kind: Distribution, mask: Tensor) -> list[Tensor]:
    sizes = CHOICES if isinstance(kind, MultiCategorical) else (9,)
    return list(mask.split(sizes, dim=-1))


def components(kind: Distribution, action: Tensor) -> list[Tensor]:
    return list(action.unbind(-1)) if isinstance(kind, MultiCategorical) else [action]


@pytest.mark.parametrize("kind", MASKED)
@pytest.mark.parametrize("forbidden_logit", [0.0, 50.0, 1e30, torch.inf, torch.nan])
@pytest.mark.parametrize("allowed_logit", [0.0, -1e30, -torch.inf, torch.nan])
def test_a_forbidden_action_is_never_taken(
    kind: Distribution, forbidden_logit: float, allowed_logit: float
) -> None:
    mask = torch.tensor([True, False, True, False, True, True, False, False, True])
    logits = torch.where(mask, allowed_logit, forbidden_logit).expand(500, 9)
    mask = mask.expand(500, 9)
    masked = kind.masked(logits, mask)
    for action in (
        kind.sample(masked, generator()),
        kind.greedy(masked),
        kind.uniform(logits, mask=mask, generator=generator()),
    ):
        pairs = zip(components(kind, action), allowed_components(kind, mask), strict=True)
        for chosen, allowed in pairs:
            assert allowed.gather(-1, chosen[:, None]).all()


@pytest.mark.parametrize("kind", MASKED)
def test_masking_is_renormalising(kind: Distribution) -> None:
    logits = torch.randn(9, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, False, True, False, True, True, False, False, True])
    masked = kind.masked(logits, mask)
    expected = 0.0
    for x, allowed in zip(
        allowed_components(kind, logits), allowed_components(kind, mask), strict=True
    ):
        probability = x.exp()[allowed] / x.exp()[allowed].sum()
        expected = expected - (probability * probability.log()).sum()
    entropy = kind.entropy(masked)
    torch.testing.assert_close(entropy, expected)
    ours, slow = (torch.autograd.grad(y, logits, retain_graph=True)[0] for y in (entropy, expected))
    torch.testing.assert_close(ours, slow)
    assert (ours[~mask] == 0).all()


@pytest.mark.parametrize("kind", MASKED)
def test_a_mask_that_allows_nothing_is_none(kind: Distribution) -> None:
    logits = torch.randn(3, 9)
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1] = False
    assert torch.equal(kind.masked(logits, mask), logits)
    assert torch.equal(kind.masked(logits, None), logits)


def test_a_component_without_a_choice_leaves_the_others_masked() -> None:
    kind = MultiCategorical((2, 2))
    mask = torch.tensor([False, False, True, False])
    action = kind.sample(kind.masked(torch.zeros(200, 4), mask.expand(200, 4)), generator())
    assert (action[:, 1] == 0).all()
    assert 0 < action[:, 0].float().mean() < 1


def test_uniform_draws_what_is_allowed_alike() -> None:
    mask = torch.tensor([True, False, True, True]).expand(30_000, 4)
    logits = torch.tensor([0.0, 0.0, 9.0, -9.0]).expand(30_000, 4)
    action = Categorical(4).uniform(logits, mask=mask, generator=generator())
    shares = action.bincount(minlength=4) / len(action)
    assert shares.tolist() == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3], abs=0.015)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_actions_are_valid_even_when_parameters_are_not(kind: Distribution, bad: float) -> None:
    parameters = torch.randn(300, kind.num_parameters)
    parameters[::2] = bad
    parameters[1::2, -1] = bad
    for action in (kind.sample(parameters), kind.greedy(parameters)):
        told = kind.to_env(action)
        if told is not None:
            assert told.isfinite().all()
            assert action.isfinite().all()
        for chosen, count in (
            zip(action.view(300, -1).unbind(-1), getattr(kind, "choices", ()) or (), strict=False)
            if isinstance(kind, MultiCategorical)
            else []
        ):
            assert ((chosen >= 0) & (chosen < count)).all()


def test_continuous_actions_have_no_mask() -> None:
    kind = SquashedNormal((-1.0,), (1.0,))
    with pytest.raises(ValueError, match="masked"):
        kind.masked(torch.zeros(1, 2), torch.ones(1, 1, dtype=torch.bool))
