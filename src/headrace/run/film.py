"""Plays episodes of a policy as a person would see them, and films one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Self

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from headrace import tree
from headrace.algorithms.base import ActionMode
from headrace.errors import ConfigError, HeadraceError
from headrace.pictures import Picture, picture_of
from headrace.run.policy import Policy
from headrace.run.seeds import Use, derived_seed
from headrace.telemetry.video import VideoWriter

_FPS = 15  # of agent steps; an Atari game runs at 60 frames per second, 4 to a step
_MOST_STEPS = 27_000  # 30 minutes of play

logger = logging.getLogger("headrace")


class Scene(NamedTuple):
    """What there is to see of an episode after so many steps."""

    picture: NDArray[np.uint8]  # [H, W] grey or [H, W, 3] RGB, of one shape all through a player
    earned: float  # raw return so far
    steps: int  # agent steps so far
    last: bool  # the episode has ended, or is as long as one may be


class Strayed(HeadraceError):
    """The twin that draws has gone another way than the agent's environment: play once more."""


def film(
    policy: Policy,
    path: Path,
    *,
    mode: ActionMode = "greedy",
    epsilon: float = 0.001,
    on_message: Callable[[str], None] = logger.warning,
) -> float:
    """Plays one episode and writes it to an MP4 file; returns its raw return.

    Args:
        policy: Who plays.
        path: Of the file; its name ends in .mp4.
        mode: See `Policy.act`.
        epsilon: See `Policy.act`.
        on_message: Told if the agent's observations are filmed because nothing can be drawn here.

    Raises:
        ConfigError: the file cannot be written.
    """
    path = path.absolute()  # environments may change the folder
    with Player(
        policy, seed=derived_seed(policy.config.seed, Use.FILM), on_message=on_message
    ) as player:
        return write_film(lambda: player.episode(mode, epsilon), path)


def write_film(episode: Callable[[], Iterator[Scene]], path: Path) -> float:
    """Writes the scenes of an episode to an MP4 file; returns its raw return.

    Args:
        episode: Starts one. Called once more if the first goes astray.
        path: Of the file, which appears when it is whole.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        return _filmed(episode(), path)
    except Strayed:  # from here on the player shows observations, and cannot stray
        return _filmed(episode(), path)


def _filmed(scenes: Iterator[Scene], path: Path) -> float:
    earned = 0.0
    with VideoWriter(path, _FPS) as video:
        for scene in scenes:
            video.write(scene.picture)
            earned = scene.earned
    return earned


class Player:
    """Plays episode after episode in an environment of its own, and shows each step.

    It shows what a person would see: a twin of the environment draws, which starts from the same
    seed and gets the same actions. Where there is none, or nothing can be drawn on this machine, it
    shows the agent's observations. As a context manager it closes both environments.
    """

    def __init__(
        self, policy: Policy, *, seed: int, on_message: Callable[[str], None] = logger.warning
    ) -> None:
        """Makes nothing yet.

        Args:
            policy: Who plays. Its weights may be replaced at any time.
            seed: Of the first environment; others follow from it.
            on_message: Told, once, why observations are shown instead of what a person would see.
        """
        self._policy = policy
        self._seed = seed
        self._on_message = on_message
        self._drawable = True
        self._under_way = False
        self._made = 0
        self._open = ExitStack()
        self._env: gym.Env[Any, Any] | None = None
        self._view: gym.Env[Any, Any] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the environments; the next episode makes new ones."""
        self._env = self._view = None
        self._open.close()

    def episode(self, mode: ActionMode, epsilon: float) -> Iterator[Scene]:
        """Yields the next episode: what is there before its first step, then after each.

        An episode that is left before its end is over; the next one is new.

        Raises:
            Strayed: pictures would be of another game. From the next episode on it shows
                observations.
        """
        if self._under_way or self._env is None:  # an environment cannot leave an episode
            self.close()
            self._env, self._view = self._make()
        env, view = self._env, self._view
        self._under_way = True
        state = self._policy.initial_state(1)
        observation, info = env.reset()
        picture = observation if view is None else view.reset()[0]
        reward, total = 0.0, 0.0
        space = (env if view is None else view).observation_space
        yield Scene(_pixels(picture, space), total, 0, last=False)
        for steps in range(1, _MOST_STEPS + 1):
            action, state = self._policy.act(
                observation,
                state,
                reward=reward,
                reset=steps == 1,
                mode=mode,
                epsilon=epsilon,
                action_mask=info.get("action_mask"),
            )
            observation, earned, terminated, truncated, info = env.step(action)
            picture = observation
            if view is not None:
                picture, *seen, _ = view.step(action)
                self._compare([float(earned), terminated, truncated], seen)
            reward = float(earned)
            total += reward
            over = terminated or truncated
            self._under_way = not over
            shown = _pixels(picture, space)
            yield Scene(shown, total, steps, last=over or steps == _MOST_STEPS)
            if over:
                return

    def _make(self) -> tuple[gym.Env[Any, Any], gym.Env[Any, Any] | None]:
        """Returns the environment and, where it can be, the twin that draws."""
        seed = self._seed if self._made == 0 else derived_seed(self._seed, Use.EPISODE, self._made)
        self._made += 1
        env = self._policy.make_env(seed)
        self._open.callback(env.close)
        if not self._drawable:
            return env, None
        try:
            view = self._policy.make_view(seed)
        except ConfigError as error:
            self._show_observations(str(error))
            return env, None
        if view is not None:
            self._open.callback(view.close)
        return env, view

    def _compare(self, played: list[Any], seen: list[Any]) -> None:
        """Compares reward, terminated and truncated with the twin's."""
        if np.array_equal(played, seen, equal_nan=True):
            return
        self._show_observations(
            f"{self._policy.spec.name} does not play the same game twice from one seed (is there "
            "a random number that is not of self.np_random?)"
        )
        raise Strayed(f"two copies of {self._policy.spec.name} from one seed went two ways")

    def _show_observations(self, why: str) -> None:
        self._drawable = False
        self._on_message(f"{why}; the pictures are of what the agent observes instead")


def _pixels(observation: Any, space: gym.Space[Any]) -> NDArray[np.uint8]:
    """Turns an observation of `space` into pixels: images as they are, numbers scaled to 0..255.

    Of several parts it takes the first image; without one, all their numbers in a row.
    """
    leaves = tree.leaves(space)
    parts = [np.asarray(tree.part_of(leaf, observation)) for leaf in leaves]
    for leaf, part in zip(leaves, parts, strict=True):
        if picture := picture_of(leaf):
            return _as_bytes(_drawn(part, picture), 0.0, picture.high)
    array = parts[0] if len(parts) == 1 else np.concatenate([part.ravel() for part in parts])
    array = np.atleast_2d(array.reshape(-1, array.shape[-1]) if array.ndim > 2 else array)
    array = np.nan_to_num(array.astype(np.float64), posinf=0.0, neginf=0.0)
    return _as_bytes(array, float(array.min()), float(array.max()))


def _drawn(part: NDArray[Any], picture: Picture) -> NDArray[Any]:
    """Returns a picture as [H, W] or [H, W, 3], its channels one below the other if not RGB.

    Of a stack of pictures in colour it is the newest.
    """
    rows = picture.rows
    planes = np.moveaxis(part, (rows, rows + 1), (-2, -1))
    colours = planes.shape[-3] if planes.ndim > 2 else 1
    planes = planes.reshape(-1, *planes.shape[-2:])
    if colours == 3:
        return np.moveaxis(planes[-3:], 0, -1)
    return planes.reshape(-1, planes.shape[-1])


def _as_bytes(array: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    """Returns numbers from `low` to `high` as 0 to 255."""
    if array.dtype == np.uint8 and (low, high) == (0.0, 255.0):
        return array
    scaled = (array.astype(np.float64) - low) / max(high - low, 1e-9) * 255
    return np.asarray(np.nan_to_num(scaled).clip(0, 255), np.uint8)
