"""Stop 5: acting for a batch, the same for training, evaluation and a user's own loop.

`PolicyState` goes in and a new one comes out; who keeps it (a table, a user's variable) is not
known here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from headrace.algorithms.base import ActionMode, Algorithm, Model
from headrace.records import PolicyInput, PolicyState, PolicyStep
from headrace.specs import EnvSpec


def initial_state(spec: EnvSpec, model: Model, count: int, device: torch.device) -> PolicyState:
    """Returns the state at the start of an episode, for `count` environments."""
    dtype = torch.from_numpy(np.empty(0, spec.observation_space.dtype)).dtype
    return PolicyState(
        stack=torch.zeros(count, *spec.stacked_shape, dtype=dtype, device=device),
        recurrent=tuple(part.to(device) for part in model.initial_state(count)),
        previous_action=no_action(spec, count, device),
    )


def no_action(spec: EnvSpec, count: int, device: torch.device) -> Tensor:
    """Returns what stands for the previous action at the start of an episode: -1, or 0.0."""
    dtype = torch.float32 if spec.action_dtype is np.float32 else torch.int64
    start = torch.zeros(count, *spec.action_shape, dtype=dtype, device=device)
    return start if dtype.is_floating_point else start - 1


def cleared(state: PolicyState, reset: Tensor) -> PolicyState:
    """Returns `state` as at the start of an episode where `reset` [N] is set."""
    return PolicyState(
        # A stack of one frame is replaced whole.
        stack=state.stack if state.stack.shape[1] == 1 else _filled(state.stack, reset, 0),
        recurrent=tuple(_filled(part, reset, 0) for part in state.recurrent),
        previous_action=_filled(
            state.previous_action, reset, 0 if state.previous_action.is_floating_point() else -1
        ),
    )


class Acting(Protocol):
    """What a seat needs of an actor."""

    def act(
        self,
        state: PolicyState,
        observation: Tensor,
        reward: Tensor,
        reset: Tensor,
        action_mask: Tensor | None = None,
        epsilon: Tensor | None = None,
    ) -> tuple[PolicyStep, PolicyState]:
        """See `Actor.act`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Actor:
    """An algorithm's rule with one set of weights and one way to choose among actions."""

    algorithm: Algorithm
    model: Model
    mode: ActionMode = "sample"
    epsilon: float = 0.0
    """Share of uniformly random actions, where mode and algorithm take any."""
    generator: torch.Generator | None = None

    @torch.no_grad()
    def act(
        self,
        state: PolicyState,
        observation: Tensor,
        reward: Tensor,
        reset: Tensor,
        action_mask: Tensor | None = None,
        epsilon: Tensor | None = None,
    ) -> tuple[PolicyStep, PolicyState]:
        """Sees one observation per environment, acts, and returns the state for the next step.

        Args:
            state: `cleared` where `reset` is set.
            observation: [N, ...] newest frames.
            reward: [N] float32 raw reward of the step that led here.
            reset: [N] bool.
            action_mask: [N, A] bool, where the environment says what is allowed.
            epsilon: [N] float32 share of random actions of each, which the algorithm may anneal;
                None for the actor's own.
        """
        if epsilon is not None:
            epsilon = self.algorithm.annealed(self.model, epsilon)
        stack = torch.cat([state.stack[:, 1:], observation.unsqueeze(1)], dim=1)
        inputs = PolicyInput(
            observation=stack.unsqueeze(0),
            reward=torch.where(reset, 0.0, reward).unsqueeze(0),
            previous_action=state.previous_action.unsqueeze(0),
            reset=reset.unsqueeze(0),
            action_mask=None if action_mask is None else action_mask.unsqueeze(0),
        )
        step, recurrent = self.algorithm.act(
            self.model,
            inputs,
            state.recurrent,
            mode=self.mode,
            generator=self.generator,
            epsilon=self.epsilon if epsilon is None else epsilon,
        )
        return step, PolicyState(stack, recurrent, step.action)


def _filled(part: Tensor, reset: Tensor, value: int) -> Tensor:
    return part.masked_fill(reset.view(-1, *[1] * (part.dim() - 1)), value)
