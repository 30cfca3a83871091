"""Settings of Gymnasium environments, and the wrappers behind them.

From the inside out: time limit, action repeat, grey, resize. Frames are stacked where the policy
runs; rewards are clipped and scaled by the algorithm; observations are normalised in the network.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, SupportsFloat, get_args

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from headrace.envs.checks import Strictness
from headrace.envs.returned import kept
from headrace.errors import ConfigError

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, section 2.5.1

Env = gym.Env[Any, Any]
Info = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class GymnasiumConfig:
    """Settings of every Gymnasium environment; the defaults change nothing."""

    frame_stack: int = 1
    """Newest observations that the policy sees at once."""
    frame_skip: int = 1
    """env_frames per agent step: the action is repeated, rewards are summed."""
    resize: int = 0
    """Height and width in pixels to which images are averaged; 0 leaves them as they are."""
    grey: bool = False
    """Show images in grey (the luma of ITU-R BT.601)."""
    time_limit: int = 0
    """env_frames after which an episode is truncated; 0 is the environment's own limit."""
    env_kwargs: str = "{}"
    """Keyword arguments for gymnasium.make or the factory, in JSON."""
    strictness: Strictness = "normal"
    """What is an error: all that is not as declared (strict), what cannot be used (normal: the
    rest is said once), or only wrong shapes (off)."""

    def __post_init__(self) -> None:
        for name in ("frame_stack", "frame_skip"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("resize", "time_limit"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, not {getattr(self, name)}")
        if self.strictness not in get_args(Strictness):
            known = ", ".join(get_args(Strictness))
            raise ConfigError(f"strictness must be one of {known}, not {self.strictness!r}")
        self.keywords()

    def keywords(self) -> dict[str, Any]:
        """Returns `env_kwargs` as a dictionary.

        Raises:
            ConfigError: it is not a JSON object.
        """
        try:
            keywords = json.loads(self.env_kwargs)
        except (RecursionError, ValueError) as error:
            raise ConfigError(f"env_kwargs is not JSON: {error}") from error
        if not isinstance(keywords, dict):
            raise ConfigError(f'env_kwargs must be as {{"key": value}}, not {self.env_kwargs}')
        return keywords


def wrapped(env: Env, config: GymnasiumConfig, name: str) -> Env:
    """Returns an environment with what the settings ask for around it.

    Raises:
        ConfigError: pixels are asked of observations that are no images.
    """
    if config.time_limit:
        env = gym.wrappers.TimeLimit(_without_time_limit(env), config.time_limit)
    if config.frame_skip > 1:
        env = ActionRepeat(env, config.frame_skip)
    if config.grey or config.resize:
        if not _is_image(env.observation_space):
            raise ConfigError(
                f"{name}: grey and resize need images of uint8, not {env.observation_space}"
            )
        env = Picture(env, grey=config.grey, size=config.resize)
    return env


class ActionRepeat(gym.Wrapper[Any, Any, Any, Any]):
    """Repeats each action until the episode ends, and adds the rewards up."""

    def __init__(self, env: Env, times: int) -> None:
        super().__init__(env)
        self._times = times

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, Info]:
        """Makes up to `times` steps; shows what the last one showed."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        total = kept(reward)  # the environment may write the next one into the same array
        for _ in range(self._times - 1):
            # What is no number cannot be added up; it is refused for what it is.
            if terminated or truncated or not hasattr(reward, "__float__"):
                break
            observation, reward, terminated, truncated, info = self.env.step(action)
            total = total + reward if hasattr(reward, "__float__") else reward
        return observation, total, terminated, truncated, info


class Picture(gym.ObservationWrapper[Any, Any, Any]):
    """Makes images grey [H, W], or another size, or both."""

    def __init__(self, env: Env, *, grey: bool, size: int) -> None:
        super().__init__(env)
        height, width, *colours = env.observation_space.shape or ()
        self._grey = grey and colours == [3]
        self._rows = _area_weights(height, size) if size else None
        self._columns = _area_weights(width, size) if size else None
        shape = (size or height, size or width, *([] if self._grey else colours))
        self.observation_space = gym.spaces.Box(0, 255, shape, np.uint8)

    def observation(self, observation: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Returns the image as bytes, rounded."""
        image = observation.astype(np.float32)
        if self._grey:
            image = image @ _LUMA
        if self._rows is not None and self._columns is not None:
            height, width, *colours = image.shape
            image = (self._rows @ image.reshape(height, -1)).reshape(-1, width, *colours)
            # Columns last: of [size, width] or, with colours, of each row's [width, colours].
            image = self._columns @ image if colours else image @ self._columns.T
        return (image + np.float32(0.5)).astype(np.uint8)


def _area_weights(old: int, new: int) -> NDArray[np.float32]:
    """Weights [new, old]: which share of each new pixel every old one covers (INTER_AREA)."""
    edges = np.arange(new + 1) * (old / new)
    pixel = np.arange(old)
    covered = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    return np.asarray(np.maximum(covered, 0.0) * (new / old), np.float32)


class Rendered(gym.Wrapper[Any, Any, Any, Any]):
    """Shows what a person would see, instead of the observation."""

    def __init__(self, env: Env) -> None:
        super().__init__(env)
        env.reset()
        frame: Any = env.render()
        shape = np.shape(frame)
        self.observation_space = gym.spaces.Box(0, 255, shape, np.uint8)

    def reset(self, *, seed: int | None = None, options: Info | None = None) -> tuple[Any, Info]:
        """Starts an episode and draws its first frame."""
        _, info = self.env.reset(seed=seed, options=options)
        return self.env.render(), info

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, Info]:
        """Makes a step and draws what came of it."""
        _, reward, terminated, truncated, info = self.env.step(action)
        return self.env.render(), reward, terminated, truncated, info


def _is_image(space: gym.Space[Any]) -> bool:
    return (
        isinstance(space, gym.spaces.Box) and space.dtype == np.uint8 and len(space.shape) in (2, 3)
    )


def _without_time_limit(env: Env) -> Env:
    """Takes the outermost wrapper off if it is a time limit, so that a longer one can hold."""
    return env.env if isinstance(env, gym.wrappers.TimeLimit) else env
