"""The policy's state of every environment of a pool, on the policy's device, by id."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from headrace.records import PolicyState
from headrace.rows import write_rows


class StateTable:
    """One row per environment, and a last one that takes what padding writes."""

    def __init__(self, example: PolicyState, num_envs: int) -> None:
        """Allocates rows like the first of `example`: the state at the start of an episode."""
        self.spare_row = num_envs
        self._state = repeated(example, num_envs + 1)

    def gather(self, env_id: Tensor) -> PolicyState:
        """Copies the rows of `env_id` [N]."""
        state = self._state
        return PolicyState(
            stack=state.stack.index_select(0, env_id),
            recurrent=tuple(part.index_select(0, env_id) for part in state.recurrent),
            previous_action=state.previous_action.index_select(0, env_id),
        )

    def scatter(self, env_id: Tensor, state: PolicyState) -> None:
        """Writes `state` into the rows of `env_id` [N]."""
        write_rows(self._state.stack, env_id, state.stack)
        for part, new in zip(self._state.recurrent, state.recurrent, strict=True):
            write_rows(part, env_id, new)
        write_rows(self._state.previous_action, env_id, state.previous_action)

    def state_dict(self) -> dict[str, Any]:
        """Returns the rows, for a bit-equal resume."""
        state = self._state
        return {
            "stack": state.stack,
            "recurrent": list(state.recurrent),
            "previous_action": state.previous_action,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        self._state.stack.copy_(saved["stack"])
        for part, stored in zip(self._state.recurrent, saved["recurrent"], strict=True):
            part.copy_(stored)
        self._state.previous_action.copy_(saved["previous_action"])


def repeated(example: PolicyState, count: int) -> PolicyState:
    """Returns `count` rows like the first of `example`."""
    return PolicyState(
        stack=_repeated(example.stack, count),
        recurrent=tuple(_repeated(part, count) for part in example.recurrent),
        previous_action=_repeated(example.previous_action, count),
    )


def copy_state(into: PolicyState, state: PolicyState) -> None:
    """Copies a state over another, whose tensors stay where they are."""
    into.stack.copy_(state.stack)
    for part, new in zip(into.recurrent, state.recurrent, strict=True):
        part.copy_(new)
    into.previous_action.copy_(state.previous_action)


def _repeated(row: Tensor, count: int) -> Tensor:
    return row[:1].repeat(count, *[1] * (row.dim() - 1))
