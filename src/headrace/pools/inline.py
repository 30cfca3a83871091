"""Environments in the server's own thread: no other thread, no clock, the same order every time.

An environment steps while its action is replied to, so before each `receive` all of them wait, with
their newest rows in a table by environment. The line of those that wait says whose rows are next.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.apart import Apart
from headrace.envs.base import BatchEnv, Closable
from headrace.errors import PeerLost
from headrace.pools.batcher import Batcher
from headrace.pools.checks import check_batch
from headrace.specs import check_action
from headrace.steps import EnvStep

_PER_ROW = ("run_id", "observation", "reward", "reset", "terminated", "truncated")


class InlinePool:
    """A `BatchEnv` as a pool; `Restorable` where the environments are."""

    def __init__(
        self,
        env: BatchEnv,
        *,
        batch_size: int,
        apart: Apart | None = None,
        groups: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        """Starts the environments, and gives `batch_size` rows of them at a time.

        What they change of this process stays theirs, within `apart` if they were made there.
        `groups` only step together: each first row and the row behind the last.
        """
        check_batch(batch_size, env.num_envs)
        self.spec = env.spec
        self.num_envs = env.num_envs
        self.max_batch = batch_size
        self.restorable = hasattr(env, "snapshot") and hasattr(env, "restore")
        self._env: BatchEnv | None = env
        self._apart = Apart() if apart is None else apart
        self._lent = np.empty(0, dtype=np.int32)  # environments received and not replied to
        self.on_message: Callable[[str], None] = lambda _: None
        """Told what the environments notice about themselves while they step."""
        self._notices: Sequence[str] = getattr(env, "notices", ())
        self._told = len(self._notices)  # these are known from trying one
        with self._apart:
            first = env.reset()
        self._table: dict[str, NDArray[Any]] = {
            name: np.empty_like(getattr(first, name)) for name in _PER_ROW
        }
        self._table["final_observation"] = np.zeros_like(first.observation)
        if env.spec.has_action_mask:
            for name in ("action_mask", "final_action_mask"):
                self._table[name] = np.ones_like(first.action_mask, dtype=np.bool_)
        self._infos: dict[int, dict[str, float]] = {}  # of the rows, by environment
        self._groups = None if groups is None else [np.arange(*span) for span in groups]
        self._taken: list[int] = []  # blocks of the line that the lent rows are of
        self._waiting = self._line(first.env_id)
        self._store(first)

    def receive(self, timeout_s: float) -> EnvStep | None:
        """Returns the rows that have waited longest; never waits, as all that can step has stepped.

        Raises:
            PeerLost: the pool was closed.
            RuntimeError: the last batch was not replied to.
        """
        self._open_env()
        if len(self._lent):
            raise RuntimeError("receive came twice: reply to the last batch first")
        self._taken = self._waiting.take()
        self._lent = np.array(self._taken, dtype=np.int32)
        if self._groups is not None:
            rows = np.concatenate([self._groups[group] for group in self._taken])
            absent = self._table["terminated"][rows] & self._table["truncated"][rows]
            self._lent = rows[~absent].astype(np.int32)
        columns: dict[str, Any] = {
            name: column[self._lent]
            for name, column in self._table.items()
            if not name.startswith("final")
        }
        infos = {
            row: self._infos[env_id]
            for row, env_id in enumerate(self._lent.tolist())
            if env_id in self._infos
        }
        step = EnvStep(
            env_id=self._lent.copy(), **columns, final_observation=None, episode_info=infos or None
        )
        if not (step.reset & (step.terminated | step.truncated)).any():
            return step
        finals: dict[str, Any] = {
            name: column[self._lent]
            for name, column in self._table.items()
            if name.startswith("final")
        }
        return step._replace(**finals)

    def reply(self, action: NDArray[Any]) -> None:
        """Steps the environments received last.

        Raises:
            PeerLost: the pool was closed.
            RuntimeError: nothing was received since the last reply.
            ValueError: wrong count or dtype, or an action outside the space; nothing was stepped.
        """
        env = self._open_env()
        if not len(self._lent):
            raise RuntimeError("reply came twice: receive a batch first")
        check_action(action, len(self._lent), self.spec.action_space)
        with self._apart.light:
            step = env.step(self._lent, action)
        self._store(step)
        for notice in self._notices[self._told :]:
            self.on_message(notice)
            self._told += 1
        self._waiting.add(self._taken)
        self._lent = np.empty(0, dtype=np.int32)

    def close(self) -> None:
        """Lets the environments go."""
        if self._env is not None and isinstance(self._env, Closable):
            with self._apart:
                self._env.close()
        self._env = None

    def snapshot(self) -> dict[str, NDArray[np.generic]]:
        """Returns environments, newest rows and the line; lent rows stand first in it again."""
        state = {f"env/{name}": value for name, value in self._restorable_env().snapshot().items()}
        state |= {f"row/{name}": column.copy() for name, column in self._table.items()}
        if self._infos:
            state["infos"] = np.frombuffer(json.dumps(self._infos).encode(), np.uint8)
        state["waiting"] = np.concatenate([self._lent, np.array(self._waiting.blocks(), np.int32)])
        return state

    def restore(self, state: dict[str, NDArray[np.generic]]) -> None:
        """Puts back what `snapshot` gave. The next call is `receive`, also where rows were lent."""
        env = self._restorable_env()
        parts = {name: value for name, value in state.items() if name.startswith("env/")}
        env.restore({name.removeprefix("env/"): value for name, value in parts.items()})
        for name, column in self._table.items():
            column[:] = state[f"row/{name}"]
        infos = json.loads(state["infos"].tobytes()) if "infos" in state else {}
        self._infos = {int(env_id): scalars for env_id, scalars in infos.items()}
        self._waiting = self._line(state["waiting"])
        self._lent = np.empty(0, dtype=np.int32)

    def _line(self, env_id: NDArray[np.generic]) -> Batcher:
        # At every `receive` all have stepped, so a batch is full and age never decides.
        sizes = [1] * self.num_envs if self._groups is None else list(map(len, self._groups))
        line = Batcher(sizes, max_envs=self.max_batch, max_wait_s=0.0)
        line.add(env_id.tolist() if self._groups is None else range(len(self._groups)))
        return line

    def _store(self, step: EnvStep) -> None:
        for name in _PER_ROW:
            self._table[name][step.env_id] = getattr(step, name)
        if "action_mask" in self._table:
            self._table["action_mask"][step.env_id] = step.action_mask
        if step.final_observation is not None:
            self._table["final_observation"][step.env_id] = step.final_observation
            if step.final_action_mask is not None:
                self._table["final_action_mask"][step.env_id] = step.final_action_mask
        if self._infos:
            for env_id in step.env_id.tolist():
                self._infos.pop(env_id, None)
        for row, scalars in (step.episode_info or {}).items():
            self._infos[int(step.env_id[row])] = dict(scalars)

    def _restorable_env(self) -> Any:
        env = self._open_env()
        if not self.restorable:
            raise RuntimeError(f"{self.spec.name} cannot be saved")
        return env

    def _open_env(self) -> BatchEnv:
        if self._env is None:
            raise PeerLost("the pool is closed")
        return self._env
