"""Wrappers by setting, each against a slow reference."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from headrace.envs.wrappers import GymnasiumConfig, wrapped
from headrace.errors import ConfigError


class Pictures(gym.Env[Any, Any]):
    """Random pictures, rewards 1, 2, 3 …, and an end after `length` steps."""

    action_space = gym.spaces.Discrete(2)

    def __init__(self, shape: tuple[int, ...] = (12, 8, 3), length: int = 7) -> None:
        self.observation_space = gym.spaces.Box(0, 255, shape, np.uint8)
        self.length = length

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        self.actions: list[int] = []
        return self._show(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        self.actions.append(action)
        return self._show(), float(self.steps), self.steps == self.length, False, {"n": self.steps}

    def _show(self) -> np.ndarray:
        shape = self.observation_space.shape
        assert shape is not None
        self.shown = self.np_random.integers(0, 256, shape).astype(np.uint8)
        return self.shown


def test_nothing_is_wrapped_unasked() -> None:
    env = Pictures()
    assert wrapped(env, GymnasiumConfig(), "Pictures") is env


def test_actions_are_repeated_and_rewards_added_up() -> None:
    own = Pictures(length=7)
    env = wrapped(own, GymnasiumConfig(frame_skip=3), "Pictures")
    env.reset(seed=0)
    results = [env.step(action) for action in (1, 0, 1)]
    assert own.actions == [1, 1, 1, 0, 0, 0, 1]
    assert [result[1] for result in results] == [1 + 2 + 3, 4 + 5 + 6, 7]
    assert [result[2] for result in results] == [False, False, True]
    assert [result[4]["n"] for result in results] == [3, 6, 7]
    np.testing.assert_array_equal(results[-1][0], own.shown)


def test_a_time_limit_counts_env_frames_and_truncates() -> None:
    env = wrapped(Pictures(length=99), GymnasiumConfig(frame_skip=2, time_limit=5), "Pictures")
    env.reset(seed=0)
    ends = [env.step(0)[2:4] for _ in range(3)]
    assert ends == [(False, False), (False, False), (False, True)]


def test_a_time_limit_may_be_longer_than_the_environments_own() -> None:
    limited = gym.wrappers.TimeLimit(Pictures(length=99), 2)
    env = wrapped(limited, GymnasiumConfig(time_limit=4), "Pictures")
    env.reset(seed=0)
    assert [env.step(0)[3] for _ in range(4)] == [False, False, False, True]


def luma(picture: np.ndarray) -> np.ndarray:
    return picture.astype(np.float64) @ np.array([0.299, 0.587, 0.114])


def averaged(picture: np.ndarray, size: int) -> np.ndarray:
    """The mean over what each new pixel covers, from a picture blown up so that it divides."""
    height, width = picture.shape[:2]
    blown = picture.astype(np.float64).repeat(size, axis=0).repeat(size, axis=1)
    blocks = blown.reshape(size, height, size, width, *picture.shape[2:])
    return blocks.mean(axis=(1, 3))


@pytest.mark.parametrize("size", [4, 5, 13])
@pytest.mark.parametrize("shape", [(12, 8, 3), (12, 8), (9, 7, 1), (12, 8, 4)])
def test_resize_averages(shape: tuple[int, ...], size: int) -> None:
    own = Pictures(shape)
    env = wrapped(own, GymnasiumConfig(resize=size), "Pictures")
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    assert observation.shape == (size, size, *shape[2:])
    np.testing.assert_allclose(observation, averaged(own.shown, size), atol=0.51)


def test_grey_weighs_colours_as_an_eye_does() -> None:
    own = Pictures()
    env = wrapped(own, GymnasiumConfig(grey=True), "Pictures")
    observation, _ = env.reset(seed=0)
    assert observation.shape == (12, 8)
    assert env.observation_space.contains(observation)
    np.testing.assert_allclose(observation, luma(own.shown), atol=0.51)


def test_grey_and_resize_together() -> None:
    own = Pictures((40, 60, 3))
    env = wrapped(own, GymnasiumConfig(grey=True, resize=8), "Pictures")
    env.reset(seed=0)
    observation = env.step(0)[0]
    assert observation.shape == (8, 8)
    np.testing.assert_allclose(observation, averaged(luma(own.shown), 8), atol=0.51)


@pytest.mark.parametrize(
    ("shape", "places"),  # where height, width and colours lie
    [
        ((3, 12, 9), (1, 2, 0)),
        ((2, 12, 9, 3), (1, 2, 3)),
        ((2, 3, 12, 9), (2, 3, 1)),
    ],
)
@pytest.mark.parametrize(
    ("grey", "resize"), [(True, 0), (False, 5), (True, 5)], ids=["grey", "resize", "both"]
)
def test_pictures_are_found_where_they_lie(
    shape: tuple[int, ...], places: tuple[int, ...], grey: bool, resize: int
) -> None:
    own = Pictures(shape)
    env = wrapped(own, GymnasiumConfig(grey=grey, resize=resize), "Pictures")
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    expected = np.moveaxis(own.shown, places, (-3, -2, -1)).reshape(-1, 12, 9, 3)
    expected = luma(expected) if grey else expected
    if resize:
        expected = np.stack([averaged(picture, resize) for picture in expected])
    if not grey:
        expected = expected[0] if len(shape) == 3 else expected
        expected = np.moveaxis(expected, (-3, -2, -1), places)
    elif len(shape) == 3:
        expected = expected[0]
    np.testing.assert_allclose(observation, expected, atol=0.51)


@pytest.mark.parametrize(("dtype", "high"), [(np.uint8, 7), (np.float32, 1), (np.float32, 255)])
def test_pictures_keep_dtype_and_bounds(dtype: Any, high: float) -> None:
    own = Pictures((12, 8))
    own.observation_space = gym.spaces.Box(0, high, (12, 8), dtype)
    env = wrapped(own, GymnasiumConfig(resize=4), "Pictures")
    assert env.observation_space == gym.spaces.Box(0, high, (4, 4), dtype)
    shown = np.random.default_rng(1).uniform(0, high, (12, 8)).astype(dtype)
    small: Any = env
    seen = small.observation(shown)
    assert seen.dtype == dtype
    near = 0.51 if dtype == np.uint8 else 1e-5 * high
    np.testing.assert_allclose(seen, averaged(shown, 4), atol=near)


@pytest.mark.parametrize("setting", [{"grey": True}, {"resize": 8}])
@pytest.mark.parametrize(
    "space",
    [
        gym.spaces.Box(-1, 1, (12, 12, 3), np.float32),
        gym.spaces.Box(0, 255, (12,), np.uint8),
        gym.spaces.Discrete(3),
    ],
)
def test_pixels_need_pictures(setting: dict[str, Any], space: gym.Space[Any]) -> None:
    env = Pictures()
    env.observation_space = space
    with pytest.raises(ConfigError, match="Pictures: grey and resize need images"):
        wrapped(env, GymnasiumConfig(**setting), "Pictures")


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"frame_stack": 0}, "frame_stack must be at least 1, not 0"),
        ({"frame_skip": 0}, "frame_skip must be at least 1, not 0"),
        ({"resize": -1}, "resize must be at least 0"),
        ({"time_limit": -1}, "time_limit must be at least 0"),
        ({"strictness": "lax"}, "strictness must be one of strict, normal, off, not 'lax'"),
        ({"env_kwargs": "{a: 1}"}, "env_kwargs is not JSON"),
        ({"env_kwargs": "[" * 100_000}, "env_kwargs is not JSON"),
        ({"env_kwargs": '{"a": ' + "9" * 5000 + "}"}, "env_kwargs is not JSON"),
        ({"env_kwargs": "[1]"}, r"env_kwargs must be as"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        GymnasiumConfig(**settings)


@pytest.mark.parametrize(
    ("reward", "total"),
    [(np.bool_(True), 4.0), (np.uint8(200), 800.0), (np.int8(100), 400.0), (0.5, 2.0)],
)
def test_repeated_rewards_add_up_whatever_their_dtype(reward: Any, total: float) -> None:
    class Paid(Pictures):
        def step(self, action: Any) -> Any:
            observation, _, *rest = super().step(action)
            return observation, reward, *rest

    env = wrapped(Paid(), GymnasiumConfig(frame_skip=4), "Paid")
    env.reset(seed=0)
    assert env.step(0)[1] == total
