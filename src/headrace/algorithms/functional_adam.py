"""Adam as a function of tensors: for an update that is one graph, from gradients to new weights.

Source: Kingma & Ba 2015, "Adam: A method for stochastic optimization" (arXiv:1412.6980), algorithm
1. What depends on the number of the update is two numbers, which come in as a tensor: a graph that
read a counter would compute powers of it for every weight. PyTorch's has such counters, and its
`step` cannot be part of a larger graph (docs/log.md, 2026-12-01).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from headrace.algorithms.base import ALONE, Learners
from headrace.algorithms.optimizers import OptimizerConfig

_FLOOR = 1e-30
"""Added to both moments at every step. Where gradients have stopped they would else decay into
denormal numbers, each of which costs a processor a hundred others' time; a step sees nothing of it,
since it is far below eps."""


class FunctionalAdam:
    """Some parameters by name, and the moments of their gradients. Steps in place."""

    def __init__(self, params: Mapping[str, Tensor], config: OptimizerConfig) -> None:
        """Takes the parameters, which get no `grad`: gradients are handed to `step`."""
        self.learners: Learners = ALONE
        """Over whom gradients are averaged; several cannot be part of a graph."""
        self.params = dict(params)
        self.first = {name: torch.zeros_like(param) for name, param in self.params.items()}
        self.second = {name: torch.zeros_like(param) for name, param in self.params.items()}
        self._beta1, self._beta2 = config.adam_beta1, config.adam_beta2
        self._eps, self._max_norm = config.optimizer_eps, config.max_gradient_norm

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        """Differentiates by the parameters, in order; zeros by those that are not used."""
        params = list(self.params.values())
        return torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)

    def step(self, grads: Sequence[Tensor], scale: Tensor) -> Tensor:
        """Clips the global norm, and steps, under `torch.no_grad`; returns the norm before, scalar.

        Args:
            grads: One for each parameter, in order.
            scale: `scales` of this update, [2].
        """
        grad = list(grads)
        if self.learners.count > 1:
            grad = [part.clone() for part in grad]  # a gradient may be a view of fewer numbers
            self.learners.average(grad)
        norm = torch.stack([part.square().sum() for part in grad]).sum().sqrt()
        if self._max_norm > 0:
            grad = list(torch._foreach_mul(grad, (self._max_norm / (norm + 1e-12)).clamp(max=1.0)))
        first, second = list(self.first.values()), list(self.second.values())
        torch._foreach_lerp_(first, grad, 1.0 - self._beta1)
        torch._foreach_mul_(second, self._beta2)
        torch._foreach_addcmul_(second, grad, grad, 1.0 - self._beta2)
        torch._foreach_add_([*first, *second], _FLOOR)
        root = torch._foreach_sqrt(torch._foreach_mul(second, scale[1]))
        change = torch._foreach_div(first, torch._foreach_add(root, self._eps))
        torch._foreach_sub_(list(self.params.values()), torch._foreach_mul(change, scale[0]))
        return norm

    def scales(self, number: int, learning_rate: float) -> tuple[float, float]:
        """Returns what makes the step of update `number`, counted from 1, of the moments.

        These are the step size over 1 - beta1^number, and one over 1 - beta2^number.
        """
        bias1, bias2 = 1.0 - self._beta1**number, 1.0 - self._beta2**number
        return learning_rate / bias1, 1.0 / bias2

    def state_dict(self) -> dict[str, Any]:
        """Returns both moments by name."""
        return {"first": dict(self.first), "second": dict(self.second)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copies moments in: addresses stay, for graphs that know them."""
        for mine, saved in ((self.first, state["first"]), (self.second, state["second"])):
            for name, moment in mine.items():
                moment.copy_(saved[name])
