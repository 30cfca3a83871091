"""Settings of Gymnasium environments, and the wrappers behind them.

From the inside out: time limit, action repeat, grey, resize. Frames are stacked where the policy
runs; rewards are clipped and scaled by the algorithm; observations are normalised in the network.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, SupportsFloat, get_args

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from headrace import tree
from headrace.envs.checks import Strictness
from headrace.envs.returned import kept
from headrace.errors import ConfigError
from headrace.pictures import Picture, picture_of

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, section 2.5.1

Env = gym.Env[Any, Any]
Info = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class GymnasiumConfig:
    """Settings of every Gymnasium environment; the defaults change nothing."""

    frame_stack: int = 1
    """Shows the policy so many of the newest observations at once."""
    frame_skip: int = 1
    """Repeats each action for so many env_frames, one agent step, and sums their rewards."""
    resize: int = 0
    """Averages images to so many pixels in height and width; 0 leaves them as they are."""
    grey: bool = False
    """Shows images in grey (the luma of ITU-R BT.601)."""
    time_limit: int = 0
    """Truncates an episode after so many env_frames; 0 leaves the environment's own limit."""
    env_kwargs: str = "{}"
    """Passes keyword arguments to gymnasium.make or the factory, in JSON."""
    strictness: Strictness = "normal"
    """Says what is an error: all that is not as declared (strict), what cannot be used (normal: the
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
        space = env.observation_space
        picture = picture_of(tree.leaves(space)[0]) if isinstance(space, gym.spaces.Box) else None
        if picture is None:
            raise ConfigError(
                f"{name}: grey and resize need images (uint8, or bounds of 0 and 1 or 0 and 255), "
                f"not {space}: leave out --grey and --resize"
            )
        env = Resized(env, picture, grey=config.grey, size=config.resize)
    return env


class ActionRepeat(gym.Wrapper[Any, Any, Any, Any]):
    """Repeats each action until the episode ends, and adds the rewards up."""

    def __init__(self, env: Env, times: int) -> None:
        super().__init__(env)
        self._times = times

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, Info]:
        """Makes up to `times` steps; shows what the last one showed."""
        reward: Any
        observation, reward, terminated, truncated, info = self.env.step(action)
        total: Any = kept(reward)  # the environment may write the next one into the same array
        for _ in range(self._times - 1):
            # What is no number cannot be added up; it is refused for what it is.
            if terminated or truncated or not hasattr(reward, "__float__"):
                break
            observation, reward, terminated, truncated, info = self.env.step(action)
            # In their own dtype bytes would overflow, and bools be one bool.
            is_number = hasattr(reward, "__float__")
            total = np.add(total, reward, dtype=np.float64) if is_number else reward
        return observation, total, terminated, truncated, info


class Resized(gym.ObservationWrapper[Any, Any, Any]):
    """Makes images grey, which takes their colours away, or another size, or both."""

    def __init__(self, env: Env, picture: Picture, *, grey: bool, size: int) -> None:
        """Takes how the observations of `env` are pictures."""
        super().__init__(env)
        space: Any = env.observation_space
        shape, self._axis, _ = picture
        self._colours: int | None = None  # their axis
        if size:
            shape = (*shape[: self._axis], size, size, *shape[self._axis + 2 :])
        if grey and 3 in (shape[axis] for axis in picture.channel_axes[-1:]):
            self._colours = picture.channel_axes[-1]
            shape = tuple(n for axis, n in enumerate(shape) if axis != self._colours)
            self._axis -= self._colours < self._axis
        self._rows = _area_weights(picture.height, size) if size else None
        self._columns = _area_weights(picture.width, size) if size else None
        self._dtype = space.dtype
        low, high = float(space.low.min()), float(space.high.max())
        self.observation_space = gym.spaces.Box(low, high, shape, space.dtype)

    def observation(self, observation: NDArray[Any]) -> NDArray[Any]:
        """Returns the image in its own dtype, rounded where that is of integers."""
        image = observation.astype(np.float32)
        if self._colours is not None:
            image = np.moveaxis(image, self._colours, -1) @ _LUMA
        if self._rows is not None and self._columns is not None:
            places = (self._axis, self._axis + 1)
            image = np.moveaxis(image, places, (0, 1))
            height, width, *channels = image.shape
            image = (self._rows @ image.reshape(height, -1)).reshape(-1, width, math.prod(channels))
            # Columns last: of [size, width] or, with channels, of each row's [width, channels].
            flat = image.shape[2] == 1
            image = image[:, :, 0] @ self._columns.T if flat else self._columns @ image
            image = np.moveaxis(image.reshape(*image.shape[:2], *channels), (0, 1), places)
        if self._dtype.kind == "b":
            return np.ascontiguousarray(image >= 0.5)
        if self._dtype.kind != "f":
            image = image + np.float32(0.5)
        return np.ascontiguousarray(image, self._dtype)


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


def _without_time_limit(env: Env) -> Env:
    """Takes the outermost wrapper off if it is a time limit, so that a longer one can hold."""
    return env.env if isinstance(env, gym.wrappers.TimeLimit) else env
