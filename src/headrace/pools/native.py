"""Environments in C++ threads of this process.

No Python runs per environment step: a batch is a few numpy operations on whole arrays, and the
threads go on with the other environments meanwhile. The state of the emulators cannot be saved, so
this pool is not `Restorable`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

from numpy.typing import NDArray

from headrace.errors import ConfigError, PeerLost
from headrace.specs import EnvSpec, check_action
from headrace.steps import EnvStep


class NativeEnv(Protocol):
    """A vector environment that steps itself; `reset` or `recv`, and `send`, in turns."""

    spec: EnvSpec
    num_envs: int
    batch_size: int

    def reset(self) -> EnvStep:
        """Starts all environments and returns the first `batch_size` of them."""

    def send(self, action: NDArray[Any]) -> None:
        """Answers the rows given last."""

    def recv(self) -> EnvStep:
        """Waits for the next `batch_size` rows, an environment's first among them."""


class NativePool:
    """Strict alternation and checked actions around a `NativeEnv`."""

    def __init__(
        self,
        env: NativeEnv,
        *,
        batch_size: int,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """Takes over the environments, which start at the first `receive`.

        Args:
            env: the environments.
            batch_size: that with which they were made.
            now_s: clock of `waiting_since`.
        """
        if batch_size != env.batch_size:
            raise ConfigError(
                f"batch_size must be {env.batch_size}, that of the environments, not {batch_size}"
            )
        self.spec = env.spec
        self.num_envs = env.num_envs
        self.max_batch = env.batch_size
        self.waiting_since: float | None = None
        """`now_s()` at which the present `receive` began to wait, else None; for a watchdog."""
        self._env: NativeEnv | None = env
        self._now_s = now_s
        self._started = False
        self._rows_due = 0

    def receive(self, timeout_s: float) -> EnvStep | None:
        """Waits for the next full batch, whatever `timeout_s`: the environments take no deadline.

        Raises:
            PeerLost: the pool was closed.
            RuntimeError: the last batch was not replied to.
        """
        env = self._open_env()
        if self._rows_due:
            raise RuntimeError("receive came twice: reply to the last batch first")
        self.waiting_since = self._now_s()
        try:
            step = env.recv() if self._started else env.reset()
        finally:
            self.waiting_since = None
        self._started = True
        self._rows_due = len(step.env_id)
        return step

    def reply(self, action: NDArray[Any]) -> None:
        """Hands the actions to the environments' threads; returns at once.

        Raises:
            PeerLost: the pool was closed.
            RuntimeError: nothing was received since the last reply.
            ValueError: wrong count or dtype, or an action outside the space; nothing was sent.
        """
        env = self._open_env()
        if not self._rows_due:
            raise RuntimeError("reply came twice: receive a batch first")
        check_action(action, self._rows_due, self.spec.action_space)
        env.send(action)
        self._rows_due = 0

    def close(self) -> None:
        """Lets the environments go; their threads end after the step that they are at."""
        self._env = None

    def _open_env(self) -> NativeEnv:
        if self._env is None:
            raise PeerLost("the pool is closed")
        return self._env
