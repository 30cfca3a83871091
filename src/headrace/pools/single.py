"""One environment of a pool as a Gymnasium environment, for videos and for other libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np

from headrace import tree
from headrace.envs.spaces import pool_action
from headrace.errors import ConfigError, DeadlineExceeded
from headrace.pools.base import Pool
from headrace.steps import EnvStep


class PoolEnv(gym.Env[Any, Any]):
    """A pool of one environment, whose episodes the pool starts itself.

    At an end `step` returns the final observation, and the first of the next episode is held
    until `reset`. After a lost life (terminated, but the emulator goes on) `reset` returns the
    present observation.

    Observations are in `spec.structure` where there is one: dicts and tuples again, less texts,
    which do not travel. Where the spec says so, every info has "action_mask", bool [A]: what may
    be done next; where an episode ended by its clock, what could still have been done. At an end
    the info also has the numbers of the environment's own last info.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        timeout_s: float = 60.0,
        again: Callable[[int | None], Pool] | None = None,
    ) -> None:
        """Takes over the pool.

        Args:
            pool: has one environment, and nothing was received from it yet.
            timeout_s: how long one step may take.
            again: makes another pool like it, by a seed, or by one that was not used yet; None if
                there is none: a pool itself takes no seed, and leaves no episode.
        """
        if pool.num_envs != 1:
            raise ConfigError(f"PoolEnv takes a pool of 1 environment, not of {pool.num_envs}")
        self._pool = pool
        self._again = again
        self._timeout_s = timeout_s
        self._held: tuple[Any, dict[str, Any]] | None = None  # what the next reset returns
        self._started = False
        structure = pool.spec.structure
        self._leaves = () if structure is None else tree.leaves(structure)
        self.observation_space = pool.spec.observation_space if structure is None else structure
        self._own_actions = pool.spec.own_action_space
        self.action_space = pool.spec.env_action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Returns the first observation of the next episode.

        A seed, or the middle of an episode, has the environment made anew, where that can be.

        Raises:
            ValueError: a seed was given, which belongs to the pool; or options, which do not come
                through one.
            RuntimeError: the episode has not ended, and the pool cannot leave one.
        """
        if options:
            raise ValueError(f"options of reset do not reach the environment: {options}")
        under_way = self._started and self._held is None
        if self._again is not None and (seed is not None or under_way):
            self._pool.close()
            self._pool = self._again(seed)
            self._started, self._held = False, None
        if seed is not None and self._again is None:
            raise ValueError("the seed is set where the pool is made")
        if not self._started:
            self._started = True
            row = self._receive()
            self._held = self._shown(row.observation[0]), _mask_of(row)
        if self._held is None:
            raise RuntimeError("the episode has not ended, and a pool cannot leave one")
        held, self._held = self._held, None
        return held

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Makes one step; the reward is raw.

        Raises:
            RuntimeError: no episode is under way.
        """
        if not self._started or self._held is not None:
            raise RuntimeError("reset comes before the first step of an episode")
        spec = self._pool.spec
        if self._own_actions is not None:
            action = pool_action(self._own_actions, action)
        numbers = tree.as_dtype(action, np.dtype(spec.action_dtype), "the action")
        self._pool.reply(numbers.reshape(1, *spec.action_shape))
        row = self._receive()
        terminated, truncated = bool(row.terminated[0]), bool(row.truncated[0])
        observation, info = self._shown(row.observation[0]), _mask_of(row)
        if terminated or truncated:
            self._held = observation, _mask_of(row)
            if row.reset[0] and row.final_observation is not None:
                observation = self._shown(row.final_observation[0])
                if truncated and row.final_action_mask is not None:
                    info = {"action_mask": row.final_action_mask[0].copy()}
            info = {**(row.episode_info or {}).get(0, {}), **info}
        return observation, float(row.reward[0]), terminated, truncated, info

    def close(self) -> None:
        """Closes the pool."""
        self._pool.close()

    def _shown(self, observation: Any) -> Any:
        """Returns a copy of an observation, which the pool only lends, as its space has it."""
        if not self._leaves:
            return observation.copy()
        return tree.nest(self.observation_space, self._leaves, observation)

    def _receive(self) -> EnvStep:
        row = self._pool.receive(self._timeout_s)
        if row is None:
            raise DeadlineExceeded(f"the environment gave no step in {self._timeout_s} s")
        return row


def _mask_of(row: EnvStep) -> dict[str, Any]:
    """Returns the part of an info that says what may be done next."""
    return {} if row.action_mask is None else {"action_mask": row.action_mask[0].copy()}
