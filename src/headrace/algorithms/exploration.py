"""Exploration that gives way: how far it has come lies in a buffer of whatever acts.

What acts knows of no progress; it has the weights alone, perhaps on another machine. So the learner
writes into a buffer `exploration_left` of the network what is left of exploration, from 1 to 0.

Shape suffix: N = environments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from headrace.errors import ConfigError
from headrace.schedules import Schedule, remaining


class AnnealedEpsilon:
    """Epsilon that comes from one share for all environments down to a share of each."""

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        *,
        initial: float,
        decay: float,
        fix: str = "make yours by it, or say --network mlp",
    ) -> None:
        """Begins at the start of a run.

        Args:
            model: What learns.
            schedule: How epsilon comes down; constant: it is there from the start.
            initial: Where it begins.
            decay: Share of the run, its first part, in which it comes down.
            fix: What a user can say where the network has no buffer for it.

        Raises:
            ConfigError: there is a schedule, and the network has no buffer for it.
        """
        self._schedule, self._initial, self._decay = schedule, initial, decay
        self.left: Tensor | None = None
        """What is left, []; None where epsilon is constant."""
        if schedule == "constant":
            return
        self.left = dict(model.named_buffers()).get("exploration_left")
        if self.left is None:
            raise ConfigError(
                "exploration that falls needs a network with a buffer exploration_left, as "
                f"headrace.networks.assemble makes it: {fix}"
            )
        self.advance(0.0)

    def at(self, model: Any, epsilon_N: Tensor) -> Tensor:
        """Epsilon [N] now, of what acts by `model`, of those that environments come to."""
        if self.left is None:
            return epsilon_N
        first_N = torch.full_like(epsilon_N, self._initial)
        return torch.lerp(epsilon_N, first_N, model.exploration_left)

    def advance(self, progress: float) -> None:
        """Writes down how far exploration has come when the share `progress` of the run is done."""
        if self.left is not None:
            share = min(1.0, progress / self._decay)
            self.left.fill_(remaining(self._schedule, share))

    def load(self, left: Tensor | None) -> None:
        """Goes on from what `left` was; None leaves the start."""
        if self.left is not None and left is not None:
            self.left.copy_(left)
