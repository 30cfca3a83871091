"""Muon: a hidden weight takes a step of the same size in each of its directions.

The gradient of a matrix is mostly a few directions that many samples agree on. Muon takes the
nearest matrix to its running mean whose singular values are all one, so that rare directions move
as far as common ones. All other parameters are Adam's.

Sources: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks" (momentum,
iteration and its coefficients); Liu et al. 2025, "Muon is Scalable for LLM Training",
arXiv:2502.16982, section 2.2 (steps as large as Adam's, so that learning rates carry over). PyTorch
has a Muon since 2.9, in bfloat16 alone, which is slow where a processor emulates it.

Shape suffixes: R and C = rows and columns of a matrix, R the fewer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headrace.algorithms.closures import WithoutClosure

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_RMS = 0.2  # of Adam's steps, in learning rates


class Muon(WithoutClosure):
    """Muon for hidden weights, PyTorch's Adam for the rest."""

    def __init__(
        self,
        hidden: Sequence[Tensor],
        rest: Sequence[Tensor],
        *,
        lr: float,
        momentum: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        """Takes what Muon steps, outputs first in every shape, and what Adam steps.

        Args:
            hidden: Weights of two or more dimensions.
            rest: All other parameters.
            lr: Of both.
            momentum: Decay of Muon's mean of gradients.
            betas: Adam's.
            eps: Adam's.
        """
        super().__init__([{"params": list(hidden), "momentum": momentum}], {"lr": lr})
        group = {"params": list(rest)}  # which may be empty, as a list may not
        self._adam = torch.optim.Adam([group], lr=lr, betas=betas, eps=eps, fused=True)
        self.param_groups += self._adam.param_groups

    def _step(self) -> None:
        group, *self._adam.param_groups = self.param_groups
        self._adam.state = self.state  # one state, which is saved and loaded as a whole
        self._adam.step()
        for param in group["params"]:
            if param.grad is None:
                continue
            state = self.state[param]
            if not state:
                state["momentum"] = torch.zeros_like(param)
            mean = state["momentum"].lerp_(param.grad, 1 - group["momentum"])
            ahead = param.grad.lerp(mean, group["momentum"])  # Nesterov's
            step = orthogonalized(ahead.flatten(1)).view(param.shape)
            size = _RMS * max(len(param), param[0].numel()) ** 0.5
            param.add_(step, alpha=-group["lr"] * size)


def orthogonalized(matrix: Tensor) -> Tensor:
    """Returns U V^T of a matrix U S V^T, roughly: singular values from 0.7 to 1.2 instead of one.

    Five steps X <- a X + b (X X^T) X + c (X X^T)^2 X. All of them multiply X from the left by
    polynomials of the small square X X^T, so only these are iterated, and X is multiplied once.
    Rounding grows on the way: products of float32 must not be cut to fewer bits
    (`torch.set_float32_matmul_precision`).
    """
    a, b, c = _COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x_RC = matrix.t() if is_tall else matrix
    x_RC = x_RC / (torch.linalg.matrix_norm(x_RC) + 1e-7)
    square_RR = x_RC @ x_RC.t()  # of the X that has been reached
    product_RR = torch.eye(len(x_RC), dtype=matrix.dtype, device=matrix.device)
    for _ in range(_ITERATIONS):
        factor_RR = torch.addmm(square_RR, square_RR, square_RR, beta=b, alpha=c)
        factor_RR.diagonal().add_(a)
        product_RR = factor_RR @ product_RR
        square_RR = factor_RR @ square_RR @ factor_RR
    result_RC: Tensor = product_RR @ x_RC
    return result_RC.t() if is_tall else result_RC
