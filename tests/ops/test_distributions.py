import pytest
import torch

from headrace.ops import distributions


def test_sampling_frequencies_are_the_probabilities() -> None:
    logits = torch.tensor([1.0, -1.0, 0.5, 3.0, -torch.inf])
    generator = torch.Generator().manual_seed(0)
    draws = 200_000
    action = distributions.sample(logits.expand(draws, 5), generator)
    frequency = action.bincount(minlength=5) / draws
    probability = logits.softmax(dim=0)
    deviation = (probability * (1 - probability) / draws).sqrt()
    assert action.dtype == torch.int64
    assert ((frequency - probability).abs() <= 4 * deviation).all()


def test_a_generator_fixes_the_draws() -> None:
    logits = torch.randn(3, 64, 6)
    first, second = (
        distributions.sample(logits, torch.Generator().manual_seed(seed)) for seed in (5, 5)
    )
    other = distributions.sample(logits, torch.Generator().manual_seed(6))
    assert first.shape == (3, 64)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("columns", [slice(0, 6), slice(5, 6)])
def test_every_action_is_valid_even_when_logits_are_not(bad: float, columns: slice) -> None:
    logits = torch.randn(1000, 6)
    logits[:, columns] = bad
    for action in (distributions.sample(logits), distributions.greedy(logits)):
        assert ((action >= 0) & (action < 6)).all()


def test_log_prob_and_entropy_agree_with_torch() -> None:
    logits = torch.randn(4, 7, 5, dtype=torch.float64)
    action = torch.randint(5, (4, 7))
    reference = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(distributions.log_prob(logits, action), reference.log_prob(action))
    torch.testing.assert_close(distributions.entropy(logits), reference.entropy())
    assert torch.equal(distributions.greedy(logits), reference.mode)


def test_gradients_agree_with_finite_differences() -> None:
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    action = torch.tensor([4, 0, 2])
    assert torch.autograd.gradcheck(lambda x: distributions.log_prob(x, action), logits)
    assert torch.autograd.gradcheck(distributions.entropy, logits)
