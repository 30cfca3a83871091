"""How often a sequence should come back, and what its loss then weighs.

Source: R2D2, Kapturowski et al. 2019, "Recurrent Experience Replay in Distributed Reinforcement
Learning", section 2.3; weights of Schaul et al. 2016, "Prioritized Experience Replay"
(arXiv:1511.05952), section 3.4.

Shape suffixes: T = learned steps of a sequence, B = sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def sequence_priority(td_error_TB: Tensor, mask_TB: Tensor, eta: float = 0.9) -> Tensor:
    """Mixes the largest and the mean absolute error of each sequence; returns [B].

    Args:
        td_error_TB: temporal-difference errors, of any sign.
        mask_TB: bool, steps that count; a sequence without any has priority 0.
        eta: share of the largest. A mean alone would level long sequences out.
    """
    counts_TB = mask_TB.bool()
    error_TB = td_error_TB.abs().masked_fill(~counts_TB, 0.0)
    mean_B = error_TB.sum(dim=0) / counts_TB.sum(dim=0).clamp(min=1)
    return eta * error_TB.amax(dim=0) + (1.0 - eta) * mean_B


@torch.no_grad()
def importance_weights(probability_B: Tensor, total: int, exponent: float) -> Tensor:
    """Weights (N P)^-exponent over the largest of the batch; returns [B], in (0, 1].

    Args:
        probability_B: P, with which each sequence was drawn; positive.
        total: N, sequences there were. It cancels, and keeps the powers near 1.
        exponent: 0 leaves the bias of drawing unevenly as it is, 1 undoes it wholly.
    """
    weight_B = (total * probability_B) ** -exponent
    return weight_B / weight_B.amax()
