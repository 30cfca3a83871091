"""Categorical policies as functions of their logits.

Shape suffix A = actions; any leading dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sample(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draws one action per row by the Gumbel-max trick (Gumbel 1954): argmax of logits plus noise.

    Never waits for the device, and gives a valid index even where logits are NaN: such an action
    must not hang an environment before the learner reports that the run diverged.
    """
    logits = logits.float()
    # Minus the log of an exponential variate is Gumbel noise.
    noise = torch.empty_like(logits).exponential_(generator=generator).log_()
    return (logits - noise).argmax(dim=-1)


def greedy(logits: Tensor) -> Tensor:
    """Takes the most likely action, the first of equals."""
    return logits.argmax(dim=-1)


def log_prob(logits: Tensor, action: Tensor) -> Tensor:
    """Log-probability of `action` [...] under `logits` [..., A], in nats."""
    return logits.log_softmax(dim=-1).gather(-1, action.unsqueeze(-1)).squeeze(-1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy per row, in nats."""
    log_prob_A = logits.log_softmax(dim=-1)
    return -(log_prob_A.exp() * log_prob_A).sum(dim=-1)
