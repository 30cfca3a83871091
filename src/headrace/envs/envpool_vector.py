"""EnvPool's vector environment with our conventions: same-step autoreset on top of its next-step.

What EnvPool 1.2.5 does, as measured: an ended environment shows its last observation; the next
action that it gets is ignored, and answered with the first observation of the next episode and
reward 0. `recv` waits for exactly `batch_size` rows. With `batch_size == num_envs` a row is
written where its action stood in its own `send`, so that two calls of `send` before a `recv`
overwrite each other in silence.

So an ended row is held back here, its environment gets an ignored action together with the next
reply, and the two rows are given as one. One `send` answers all that the last `recv` gave; when
`recv` is called every environment is on its way, so it cannot wait for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from headrace.specs import EnvSpec
from headrace.steps import EnvStep

Array = NDArray[Any]
Rows = tuple[Any, Array, NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]

_NOT_OF_THE_EPISODE = ("env_id", "elapsed_step")


class Engine(Protocol):
    """What is used of EnvPool's Gymnasium class."""

    def async_reset(self) -> None:
        """Starts all environments; `recv` gives their first rows."""

    def send(self, action: Array, env_id: NDArray[np.int32]) -> None:
        """Gives actions to the environments named."""

    def recv(self) -> Rows:
        """Waits for `batch_size` environments, without the interpreter lock and a deadline."""


class EnvpoolVector:
    """N environments of one kind, up to `batch_size` are due at a time (`pools.native.NativeEnv`).

    A batch lacks the rows whose episodes have just ended: these come when they have begun anew.
    """

    def __init__(
        self,
        engine: Engine,
        spec: EnvSpec,
        *,
        num_envs: int,
        batch_size: int,
        observation: Callable[[Any], Array],
        action: Callable[[Array], Array],
    ) -> None:
        """Takes over the environments, which start at `reset`.

        Args:
            engine: the environments.
            spec: of one environment, as given to the pool.
            num_envs: how many there are.
            batch_size: rows of one `recv` of the engine.
            observation: makes what the engine gives an array [N, ...] of the spec's space.
            action: makes actions of the spec's space what the engine takes.
        """
        self.spec = spec
        self.num_envs = num_envs
        self.batch_size = batch_size
        self._engine = engine
        self._observation = observation
        self._action = action
        shape, dtype = spec.observation_space.shape, spec.observation_space.dtype
        # By environment: whether its next row is the first of an episode, and how the last ended.
        self._begins = np.ones(num_envs, dtype=np.bool_)
        self._reward = np.zeros(num_envs, dtype=np.float32)
        self._terminated = np.zeros(num_envs, dtype=np.bool_)
        self._truncated = np.zeros(num_envs, dtype=np.bool_)
        self._final = np.zeros((num_envs, *shape), dtype=dtype)
        self._info: dict[int, dict[str, float]] = {}
        self._given = np.empty(0, dtype=np.int32)
        self._held = np.empty(0, dtype=np.int32)  # ended; they go on with the next `send`
        self._run_id = np.zeros(batch_size, dtype=np.int64)

    def reset(self) -> EnvStep:
        """Starts all environments and returns the first batch."""
        self._engine.async_reset()
        return self.recv()

    def send(self, action: Array) -> None:
        """Answers the rows given last, and lets those go on that have ended."""
        env_id = self._given
        if len(self._held):
            env_id = np.concatenate([self._given, self._held])
            ignored = np.zeros((len(self._held), *action.shape[1:]), dtype=action.dtype)
            order = np.argsort(env_id)  # in step, rows come as they were sent: keep them sorted
            env_id, action = env_id[order], np.concatenate([action, ignored])[order]
            self._held = self._held[:0]
        self._engine.send(self._action(action), env_id)

    def recv(self) -> EnvStep:
        """Waits for the next batch, which is smaller than `batch_size` where episodes ended."""
        step = self._receive()
        while step is None:
            # All of them ended: nobody replies, so they go on at once.
            self.send(np.zeros((0, *self.spec.action_shape), dtype=self.spec.action_dtype))
            step = self._receive()
        return step

    def _receive(self) -> EnvStep | None:
        raw, reward, terminated, truncated, info = self._engine.recv()
        observation = self._observation(raw)
        env_id = np.array(info["env_id"], dtype=np.int32)
        begins = self._begins[env_id]
        ended = (terminated | truncated) & ~begins
        goes_on = ~ended
        self._begins[env_id] = ended
        if ended.any():
            self._keep_ends(env_id, observation, (reward, terminated, truncated), info, ended)
            env_id, begins, observation = env_id[goes_on], begins[goes_on], observation[goes_on]
            reward = reward[goes_on]
        self._given = env_id
        return self._merged(env_id, begins, observation, reward) if len(env_id) else None

    def _keep_ends(
        self,
        env_id: NDArray[np.int32],
        observation: Array,
        outcome: tuple[Array, NDArray[np.bool_], NDArray[np.bool_]],
        info: dict[str, Any],
        ended: NDArray[np.bool_],
    ) -> None:
        """Stores the last rows of episodes until the first of the next."""
        reward, terminated, truncated = outcome
        self._held = env_id[ended]
        self._reward[self._held] = reward[ended]
        self._terminated[self._held] = terminated[ended]
        self._truncated[self._held] = truncated[ended] & ~terminated[ended]
        self._final[self._held] = observation[ended]
        scalars = _scalars(info, len(env_id))
        for row in np.flatnonzero(ended):
            self._info[int(env_id[row])] = {
                name: float(value[row]) for name, value in scalars.items()
            }

    def _merged(
        self,
        env_id: NDArray[np.int32],
        begins: NDArray[np.bool_],
        observation: Array,
        reward: Array,
    ) -> EnvStep:
        """Returns rows of which those that begin an episode say how the one before ended."""
        terminated, truncated = (
            begins & table[env_id] for table in (self._terminated, self._truncated)
        )
        over = np.flatnonzero(terminated | truncated)
        told = {int(row): self._info.pop(int(env_id[row])) for row in over}
        return EnvStep(
            env_id=env_id,
            run_id=self._run_id[: len(env_id)],
            observation=observation,
            reward=np.where(begins, self._reward[env_id], reward).astype(np.float32, copy=False),
            reset=begins,
            terminated=terminated,
            truncated=truncated,
            final_observation=self._final[env_id] if len(over) else None,
            episode_info={row: info for row, info in told.items() if info} or None,
        )


def _scalars(info: Mapping[str, Any], rows: int) -> dict[str, Array]:
    """Returns what has one number for each row; the numbers of the rows themselves apart."""
    return {
        name: value
        for name, value in info.items()
        if name not in _NOT_OF_THE_EPISODE
        and isinstance(value, np.ndarray)
        and value.shape == (rows,)
        and value.dtype.kind in "biuf"
    }
