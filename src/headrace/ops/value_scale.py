"""The scale in which values of any size are learned without clipping rewards.

Source: Pohlen et al. 2018, "Observe and Look Further: Achieving Consistent Performance on Atari"
(arXiv:1805.11593); used by R2D2 (Kapturowski et al. 2019, section 2.3).
"""

from __future__ import annotations

from torch import Tensor


def rescale(x: Tensor, epsilon: float = 1e-3) -> Tensor:
    """Returns h(x) = sign(x) (sqrt(|x| + 1) - 1) + epsilon x, any shape.

    Args:
        x: values in the unit of the rewards.
        epsilon: slope that is left far from zero, so that the inverse is Lipschitz; 0 for none.
    """
    # sqrt(a + 1) - 1 = a / (sqrt(a + 1) + 1), which loses nothing near zero.
    return x / ((x.abs() + 1.0).sqrt() + 1.0) + epsilon * x


def unrescale(x: Tensor, epsilon: float = 1e-3) -> Tensor:
    """Returns the x for which `rescale` with the same epsilon gives this one, any shape.

    The published form subtracts numbers that are nearly equal, twice, and divides by epsilon. With
    u = sqrt(|x| + 1) - 1 the equation is epsilon u^2 + (1 + 2 epsilon) u = |h|; its root is written
    so that only positive numbers are added.
    """
    slope = 1.0 + 2.0 * epsilon
    u = 2.0 * x / (slope + (slope**2 + 4.0 * epsilon * x.abs()).sqrt())
    return u * (u.abs() + 2.0)
