"""Environments for tests of workers. A worker finds this module through the sys.path of the test.

What `Echo` shows says all that matters: its number among all environments, steps since its start,
the action that it took last, and its seed.
"""

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from headrace.specs import EnvSpec
from headrace.steps import EnvStep

ENV_ID, COUNT, ACTION, SEED = range(4)
EPISODE = 5
CUT = 3  # steps of a `Cut`


class Cut(gym.Env[Any, Any]):
    """Met by the clock after `CUT` steps; what is allowed, and shown, is its steps modulo 4."""

    observation_space = gym.spaces.Box(0.0, CUT, (1,), np.float32)
    action_space = gym.spaces.Discrete(4)

    def _shown(self) -> tuple[Any, dict[str, Any]]:
        return np.float32([self._steps]), {"action_mask": np.arange(4) == self._steps}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self._steps = 0
        return self._shown()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert action == self._steps, "forbidden"
        self._steps += 1
        observation, info = self._shown()
        return observation, 0.0, False, self._steps == CUT, info


SPACES = {
    "discrete": gym.spaces.Discrete(4),
    "multi": gym.spaces.MultiDiscrete([3, 5]),
    "box": gym.spaces.Box(-2.0, 2.0, (2,), np.float32),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class EchoConfig:
    """What to do, and what to do wrong."""

    space: str = "discrete"
    mask: bool = False
    trouble: str = ""
    """What `trouble_env` does at step `trouble_at`."""
    trouble_env: int = 0
    trouble_at: int = 1
    once: str = ""
    """A file: there is trouble only while it does not exist, and it is made then."""
    shape: tuple[int, ...] = (4,)


class Echo:
    """N environments; every `EPISODE` steps one ends, even ones terminated, odd ones truncated."""

    def __init__(
        self, spec: EnvSpec, config: EchoConfig, *, num_envs: int, seed: int, first_env: int
    ) -> None:
        self.spec = spec
        self.num_envs = num_envs
        self._config = config
        self._seed = seed % 9973
        self._global = first_env + np.arange(num_envs)
        self._count = np.zeros(num_envs, dtype=np.int64)
        self._action = np.zeros((num_envs, *spec.action_shape), dtype=spec.action_dtype)

    def reset(self) -> EnvStep:
        self._trouble("reset", np.arange(self.num_envs))
        never = np.zeros(self.num_envs, dtype=np.bool_)
        ids = np.arange(self.num_envs, dtype=np.int32)
        return self._step(ids, ~never, never)

    def step(self, env_id: np.ndarray, action: np.ndarray) -> EnvStep:
        self._count[env_id] += 1
        self._action[env_id] = action
        self._trouble("step", env_id)
        ended = self._count[env_id] % EPISODE == 0
        return self._step(env_id, ended, ended)

    def _step(self, env_id: np.ndarray, reset: np.ndarray, ended: np.ndarray) -> EnvStep:
        shown = np.zeros((len(env_id), *self._config.shape), dtype=np.float32)
        shown[:, ENV_ID] = self._global[env_id]
        shown[:, COUNT] = self._count[env_id]
        shown[:, ACTION] = self._action[env_id].reshape(len(env_id), -1)[:, 0]
        shown[:, SEED] = self._seed
        odd = self._global[env_id] % 2 == 1
        mask, infos = None, None
        if self._config.mask:
            choices = np.arange(self.spec.action_mask_size)
            mask = (choices + self._count[env_id][:, None]) % 2 == 0
        if ended.any():
            name = "x" * 2000 if self._config.trouble == "long info" else "count"
            infos = {int(row): {name: float(shown[row, COUNT])} for row in np.flatnonzero(ended)}
        return EnvStep(
            env_id=env_id,
            run_id=np.zeros(len(env_id), dtype=np.int64),
            observation=shown,
            reward=shown[:, COUNT].copy() if ended.any() else np.zeros(len(env_id), np.float32),
            reset=reset,
            terminated=ended & ~odd,
            truncated=ended & odd,
            final_observation=-shown if ended.any() else None,
            action_mask=mask,
            episode_info=infos,
        )

    def _trouble(self, where: str, env_id: np.ndarray) -> None:
        config = self._config
        here = env_id[self._global[env_id] == config.trouble_env]
        if not config.trouble or not len(here):
            return
        in_reset = config.trouble.endswith("in reset")
        if in_reset != (where == "reset"):
            return
        if not in_reset and self._count[here[0]] != config.trouble_at:
            return
        if config.once:
            if Path(config.once).exists():
                return
            Path(config.once).touch()
        TROUBLES[config.trouble.removesuffix(" in reset")]()


def _raise() -> None:
    raise ValueError("environment 0: the moon is in the wrong quarter")


def _print() -> None:
    for line in range(10):
        sys.stdout.write(f"line {line}\n")


def _hang() -> None:
    while True:
        time.sleep(1.0)


TROUBLES = {
    "raise": _raise,
    "print": _print,
    "hang": _hang,
    "exit": lambda: sys.exit(7),
    "close output": lambda: (os.close(1), os.close(2)),
    "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "long info": lambda: None,
}


class EchoFamily:
    config_type: type[Any] = EchoConfig
    pool = "shm"

    def spec(self, name: str, config: EchoConfig) -> EnvSpec:
        return EnvSpec(
            name=name,
            observation_space=gym.spaces.Box(-1e6, 1e6, config.shape, np.float32),
            action_space=SPACES[config.space],
            has_action_mask=config.mask,
        )

    def evaluation(self, config: EchoConfig) -> EchoConfig:
        return config

    def make(
        self,
        name: str,
        config: EchoConfig,
        *,
        num_envs: int,
        batch_size: int,
        threads: int,
        seed: int,
        first_env: int = 0,
    ) -> Echo:
        spec = self.spec(name, config)
        return Echo(spec, config, num_envs=num_envs, seed=seed, first_env=first_env)

    def make_view(self, name: str, config: EchoConfig, *, seed: int) -> None:
        return None


ECHO = EchoFamily()
