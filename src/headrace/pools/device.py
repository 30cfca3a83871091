"""Environments in torch beside the policy, as a pool with two faces.

```
server/device_seat.py   state, rows, `advance`    all environments at once, on the device
everybody else          `receive`, `reply`        some of them, in numpy
```
Either face steps the same environments; who has begun with one stays with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.envs.device import DeviceEnv, DeviceRows, State, advance, first_rows
from headrace.errors import ConfigError, PeerLost
from headrace.pools.checks import check_batch
from headrace.specs import check_action
from headrace.steps import EnvStep


class DevicePool:
    """A `DeviceEnv` as a pool. Everything that is kept of the environments lies here."""

    restorable = True

    def __init__(self, env: DeviceEnv, *, batch_size: int) -> None:
        """Starts the environments; `receive` gives `batch_size` rows of them at a time."""
        check_batch(batch_size, env.num_envs)
        if env.spec.has_action_mask:
            raise ConfigError(f"{env.spec.name}: environments in torch cannot mask actions")
        self.spec = env.spec
        self.num_envs = env.num_envs
        self.max_batch = batch_size
        self.env = env
        self.state: State = env.begin()
        """What is kept of the environments."""
        self.rows: DeviceRows = first_rows(env, self.state)
        """What all of them show, to be answered."""
        self._in_place = False
        self._advance: Callable[..., tuple[State, DeviceRows]] = advance
        self._closed = False
        # At every `receive` all have stepped, so those that wait are always enough for a batch.
        self._waiting = np.arange(self.num_envs, dtype=np.int32)
        self._lent = self._waiting[:0]  # environments received and not replied to

    @property
    def device(self) -> torch.device:
        """Where the environments are."""
        return self.rows.observation.device

    def stay_in_place(self, *, finals: bool) -> None:
        """Gives every tensor of state and rows memory of its own, which stays where it is.

        A CUDA graph finds and leaves them there. `finals`: rows have final observations too.
        """
        if finals:
            self.rows = self._with_finals()
        whole = dict(named(self.state, self.rows))
        self.state, self.rows = unnamed({name: _own(value) for name, value in whole.items()})
        self._in_place = True

    def advance(self, action: Tensor, *, finals: bool) -> None:
        """Steps all environments on the device; `finals`: show final observations too."""
        self._keep(*self._advance(self.env, self.state, action, finals=finals))

    def compile(self, wanted: bool) -> None:
        """Has `advance` compiled at its next call, as few loops in place of many; or no more."""
        self._advance = torch.compile(advance, dynamic=False) if wanted else advance

    def receive(self, timeout_s: float) -> EnvStep | None:
        """Returns the rows that have waited longest; never waits, as all that can step has stepped.

        Raises:
            PeerLost: the pool was closed.
            RuntimeError: the last batch was not replied to.
        """
        self._check_open()
        if len(self._lent):
            raise RuntimeError("receive came twice: reply to the last batch first")
        self._lent, self._waiting = np.split(self._waiting, [self.max_batch])
        at = self._at(self._lent)
        rows: dict[str, Any] = {"final_observation": None}
        for name, value in self.rows._asdict().items():
            if value is not None:
                rows[name] = value.index_select(0, at).cpu().numpy()
        step = EnvStep(env_id=self._lent.copy(), run_id=np.zeros(len(self._lent), np.int64), **rows)
        ended = step.terminated | step.truncated
        return step if ended.any() else step._replace(final_observation=None)

    def reply(self, action: NDArray[Any]) -> None:
        """Steps the environments received last.

        Raises:
            PeerLost: the pool was closed.
            RuntimeError: nothing was received since the last reply.
            ValueError: wrong count or dtype, or an action outside the space; nothing was stepped.
        """
        self._check_open()
        if not len(self._lent):
            raise RuntimeError("reply came twice: receive a batch first")
        check_action(action, len(self._lent), self.spec.action_space)
        at = self._at(self._lent)
        told = torch.from_numpy(np.ascontiguousarray(action)).to(at.device)
        part = {name: value.index_select(0, at) for name, value in self.state.items()}
        part, rows = advance(self.env, part, told, finals=True)
        self.rows = self._with_finals()
        whole = dict(named(self.state, self.rows))
        for name, value in named(part, rows):
            whole[name] = whole[name].index_copy(0, at, value)
        self._keep(*unnamed(whole))
        self._waiting = np.concatenate([self._waiting, self._lent])
        self._lent = self._lent[:0]

    def close(self) -> None:
        """Lets the environments go."""
        self._closed = True

    def snapshot(self) -> dict[str, NDArray[np.generic]]:
        """Returns environments, newest rows and the line; lent rows stand first in it again."""
        self._check_open()
        state: dict[str, NDArray[np.generic]] = {
            name: value.to("cpu", copy=True).numpy() for name, value in named(self.state, self.rows)
        }
        state["waiting"] = np.concatenate([self._lent, self._waiting])
        return state

    def restore(self, state: dict[str, NDArray[np.generic]]) -> None:
        """Puts back what `snapshot` gave. The next call is `receive`, also where rows were lent."""
        self._check_open()
        if "row/final_observation" in state:
            self.rows = self._with_finals()
        whole = dict(named(self.state, self.rows))
        for name in whole.keys() & state.keys():
            whole[name] = torch.from_numpy(state[name].copy()).to(whole[name].device)
        self._keep(*unnamed(whole))
        self._waiting = state["waiting"].astype(np.int32)
        self._lent = self._waiting[:0]

    def _keep(self, state: State, rows: DeviceRows) -> None:
        if not self._in_place:
            self.state, self.rows = state, rows
            return
        new, kept = dict(named(state, rows)), dict(named(self.state, self.rows))
        places = {_place(into) for into in kept.values()}
        for name, value in new.items():
            if value is not kept.get(name) and _place(value) in places:
                new[name] = _own(value)  # else it may be written over before it is copied
        for name, into in kept.items():
            if name in new:
                into.copy_(new[name])

    def _with_finals(self) -> DeviceRows:
        if self.rows.final_observation is not None:
            return self.rows
        return self.rows._replace(final_observation=torch.zeros_like(self.rows.observation))

    def _at(self, env_id: NDArray[np.int32]) -> Tensor:
        return torch.from_numpy(env_id.astype(np.int64)).to(self.device)

    def _check_open(self) -> None:
        if self._closed:
            raise PeerLost("the pool is closed")


def named(state: State, rows: DeviceRows) -> Iterator[tuple[str, Tensor]]:
    """Yields all that is kept of environments between two steps."""
    yield from ((f"env/{name}", value) for name, value in state.items())
    yield from (
        (f"row/{name}", value) for name, value in rows._asdict().items() if value is not None
    )


def unnamed(whole: dict[str, Tensor]) -> tuple[State, DeviceRows]:
    """Takes apart what `named` has put together."""
    state: State = {}
    rows: State = {}
    for name, value in whole.items():
        kind, _, own = name.partition("/")
        (state if kind == "env" else rows)[own] = value
    return state, DeviceRows(**rows)


def _place(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


def _own(value: Tensor) -> Tensor:
    return value.clone(memory_format=torch.contiguous_format)
