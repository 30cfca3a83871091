"""The seam between a learning rule and the system that feeds it.

An algorithm is a config, `act` and `update`: no process, clock or file. The system asks
`experience` how to cut the stream of steps and never asks which algorithm it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from headrace.errors import ConfigError
from headrace.records import Batch, PolicyInput, PolicyStep, Update

ActionMode = Literal["sample", "greedy", "epsilon"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExperienceSpec:
    """How an algorithm wants the stream of steps cut and kept."""

    unroll_steps: int
    """T: agent steps per unroll; an unroll has T + 1 rows."""
    batch_unrolls: int
    """B: unrolls per update."""
    passes: int = 1
    """How often every row of a batch goes through a gradient in one update."""

    def __post_init__(self) -> None:
        if self.unroll_steps < 1 or self.batch_unrolls < 1 or self.passes < 1:
            raise ConfigError("unroll_steps, batch_unrolls and passes must be at least 1")


class Model(Protocol):
    """A network with its recurrent state, as algorithms and the server see it."""

    def __call__(
        self, inputs: PolicyInput, recurrent: tuple[Tensor, ...]
    ) -> tuple[Any, tuple[Tensor, ...]]:
        """Runs rows [U, B] in order, clearing the recurrent state before rows that reset."""

    def initial_state(self, batch: int) -> tuple[Tensor, ...]:
        """Zero recurrent state for `batch` environments."""


class Algorithm(Protocol):
    """A learning rule, made with (model, config, *, spec: EnvSpec, precision: torch.dtype)."""

    experience: ExperienceSpec
    model: torch.nn.Module

    def act(
        self,
        model: Model,
        inputs: PolicyInput,
        recurrent: tuple[Tensor, ...],
        *,
        mode: ActionMode,
        generator: torch.Generator | None = None,
        epsilon: float = 0.0,
    ) -> tuple[PolicyStep, tuple[Tensor, ...]]:
        """Acts for one batch [1, N] with the given weights: the server's, not the learner's."""

    def update(self, batch: Batch, *, progress: float) -> Update:
        """Learns from one batch. `progress` is the share of the run that is done, in [0, 1]."""

    def warm_up(self, batch: Batch) -> None:
        """Runs what `update` compiles and chooses kernels for, without learning from `batch`."""

    def state_dict(self) -> dict[str, Any]:
        """Everything but the model's weights that a resumed run needs."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
