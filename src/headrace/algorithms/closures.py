"""An optimiser of ours takes gradients that are there, never a closure that computes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import overload

import torch
from torch.optim import Optimizer


class WithoutClosure(Optimizer):
    """Says so once for all of them, which define `_step`."""

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Takes one step with the gradients that are there."""
        if closure is not None:
            name = type(self).__name__
            raise ValueError(f"{name} takes no closure: compute the gradients before the step")
        self._step()
        return None

    def _step(self) -> None:
        raise NotImplementedError
