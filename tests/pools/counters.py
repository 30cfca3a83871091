"""One environment that counts, alone and in vectors of each kind. A worker finds it by the path."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array

LENGTHS = (1, 3, 1, 1, 4, 2)
"""Of episodes, in turn; those of a row begin with its number."""
_STATE = gym.spaces.Box(-1e6, 1e6, (4,), np.float32)


class Counter(gym.Env[Any, Any]):
    """Shows its row, episode, step and last action. Of four actions, one is forbidden."""

    def __init__(
        self,
        row: int = 0,
        *,
        kind: str = "plain",
        mask: str = "",
        lengths: tuple[int, ...] = LENGTHS,
    ) -> None:
        self.action_space = gym.spaces.Discrete(4, start=2 if kind == "tuple" else 0)
        parts: dict[str, gym.Space[Any]] = {"state": _STATE, "steps": gym.spaces.Discrete(99)}
        if mask == "part":
            parts["action_mask"] = gym.spaces.MultiBinary(4)
        self.observation_space = {
            "plain": _STATE,
            "dict": gym.spaces.Dict(parts),
            "tuple": gym.spaces.Tuple((_STATE, gym.spaces.Discrete(99))),
        }[kind]
        self.kind, self.mask, self.lengths, self.row = kind, mask, lengths, row
        self.episode, self.steps, self.last, self.closed = -1, 0, -1, False

    def _shown(self) -> tuple[Any, dict[str, Any]]:
        state = np.array([self.row, self.episode, self.steps, self.last], np.float32)
        allowed = (np.arange(4) != (self.row + self.steps) % 4).astype(np.int8)
        parts = {"state": state, "steps": np.int64(self.steps)}
        if self.mask == "part":
            parts["action_mask"] = allowed
        info = {"score": float(self.steps + self.row)}
        if self.mask == "info":
            info["action_mask"] = allowed
        shown: Any = {"plain": state, "dict": parts, "tuple": tuple(parts.values())}[self.kind]
        return shown, info

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.episode, self.steps, self.last = self.episode + 1, 0, -1
        return self._shown()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        length = self.lengths[(self.row + self.episode) % len(self.lengths)]
        assert self.steps < length, "it has ended"
        choice = int(action - self.action_space.start)
        assert self.mask == "" or choice != (self.row + self.steps) % 4, "forbidden"
        self.steps, self.last = self.steps + 1, choice
        ended = self.steps == length
        kind = (self.row + self.episode) % 3  # terminated, truncated, or both at once
        observation, info = self._shown()
        reward = 100.0 * self.episode + 10.0 * self.steps + choice
        return observation, reward, ended and kind != 1, ended and kind != 0, info

    def close(self) -> None:
        self.closed = True


class Counters(VectorEnv[Any, Any, Any]):
    """N of them, made by hand: whatever it returns it writes into the same arrays."""

    def __init__(
        self, num_envs: int, mode: AutoresetMode, *, batched: bool = False, **settings: Any
    ) -> None:
        """With `batched`, final observations are one batch, and final infos one for each."""
        self.envs = [Counter(row, **settings) for row in range(num_envs)]
        self.num_envs, self.mode, self.batched = num_envs, mode, batched
        self.metadata = {"autoreset_mode": mode}
        self.single_observation_space = self.envs[0].observation_space
        self.single_action_space = self.envs[0].action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.shown, self.finals = (
            create_empty_array(self.single_observation_space, num_envs) for _ in range(2)
        )
        self.newest: list[Any] = [None] * num_envs
        self.reward = np.zeros(num_envs)
        self.terminated, self.truncated, self.over = np.zeros((3, num_envs), np.bool_)

    def _show(self) -> Any:
        return concatenate(self.single_observation_space, self.newest, self.shown)

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        assert seed is None or isinstance(seed, int)
        mask = np.ones(self.num_envs, np.bool_) if options is None else options["reset_mask"]
        infos: dict[str, Any] = {}
        for row in np.flatnonzero(mask):
            self.newest[row], info = self.envs[row].reset()
            infos = self._add_info(infos, info, row)
        self.over[mask] = False
        return self._show(), infos

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        assert actions in self.action_space
        infos: dict[str, Any] = {}
        finals: list[Any] = list(self.newest)
        final_infos: list[Any] = [None] * self.num_envs
        for row, (env, action) in enumerate(zip(self.envs, actions, strict=True)):
            if self.over[row]:
                assert self.mode is AutoresetMode.NEXT_STEP
                self.newest[row], info = env.reset()
                result: tuple[Any, ...] = (0.0, False, False)
            else:
                self.newest[row], *result, info = env.step(action)
            self.reward[row], self.terminated[row], self.truncated[row] = result
            if any(result[1:]) and self.mode is AutoresetMode.SAME_STEP:
                if not self.batched:
                    final = {"final_obs": self.newest[row], "final_info": info}
                    infos = self._add_info(infos, final, row)
                finals[row], final_infos[row] = self.newest[row], info
                self.newest[row], info = env.reset()
            infos = self._add_info(infos, info, row)
        if self.mode is not AutoresetMode.SAME_STEP:
            self.over = self.terminated | self.truncated
        elif self.batched and (self.terminated | self.truncated).any():
            batch = concatenate(self.single_observation_space, finals, self.finals)
            infos |= {"final_obs": batch, "final_info": np.array(final_infos, np.object_)}
        return self._show(), self.reward, self.terminated, self.truncated, infos

    def close_extras(self) -> None:
        for env in self.envs:
            env.close()


def next_step(num_envs: int) -> VectorEnv[Any, Any, Any]:
    return Counters(num_envs, AutoresetMode.NEXT_STEP, mask="info")


def same_step(num_envs: int) -> VectorEnv[Any, Any, Any]:
    return Counters(num_envs, AutoresetMode.SAME_STEP, mask="info")


def disabled(num_envs: int) -> VectorEnv[Any, Any, Any]:
    return Counters(num_envs, AutoresetMode.DISABLED, mask="info")


def held(num_envs: int) -> VectorEnv[Any, Any, Any]:
    return Counters(num_envs, AutoresetMode.NEXT_STEP)


def reset_by_us(num_envs: int) -> VectorEnv[Any, Any, Any]:
    return Counters(num_envs, AutoresetMode.DISABLED)


def of_two() -> VectorEnv[Any, Any, Any]:
    return Counters(2, AutoresetMode.NEXT_STEP)


def of_three() -> VectorEnv[Any, Any, Any]:
    return Counters(3, AutoresetMode.NEXT_STEP)


def of_gymnasium(num_envs: int, mode: str = "NextStep") -> VectorEnv[Any, Any, Any]:
    return SyncVectorEnv([lambda: gym.make("CartPole-v1")] * num_envs, autoreset_mode=mode)


def not_a_vector(num_envs: int = 7) -> gym.Env[Any, Any]:
    return Counter(num_envs)


def without_a_mode(num_envs: int) -> VectorEnv[Any, Any, Any]:
    vector = Counters(num_envs, AutoresetMode.NEXT_STEP)
    vector.metadata = {}
    return vector


def too_few(num_envs: int) -> VectorEnv[Any, Any, Any]:
    return Counters(1, AutoresetMode.NEXT_STEP)
