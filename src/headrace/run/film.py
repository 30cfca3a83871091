"""Films one episode of a trained policy, as a person would see it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.algorithms.base import ActionMode
from headrace.run.policy import Policy
from headrace.run.pools import derived_seed
from headrace.telemetry.video import VideoWriter

_FPS = 15  # of agent steps; an Atari game runs at 60 frames per second, 4 to a step
_MOST_STEPS = 27_000  # 30 minutes of play


def film(
    policy: Policy, path: Path, *, mode: ActionMode = "greedy", epsilon: float = 0.001
) -> float:
    """Plays one episode and writes it to an MP4 file; returns its raw return."""
    seed = derived_seed(policy.config.seed, 6)
    state = policy.initial_state(1)
    reward, reset, total = 0.0, True, 0.0
    with ExitStack() as stack:
        env = policy.make_env(seed)
        stack.callback(env.close)
        view = policy.make_view(seed)
        observation, info = env.reset()
        picture = observation
        if view is not None:
            stack.callback(view.close)
            picture, _ = view.reset()
        video = stack.enter_context(VideoWriter(path, _FPS))
        for _ in range(_MOST_STEPS):
            video.write(_pixels(picture))
            action, state = policy.act(
                observation,
                state,
                reward=reward,
                reset=reset,
                mode=mode,
                epsilon=epsilon,
                action_mask=info.get("action_mask"),
            )
            observation, earned, terminated, truncated, info = env.step(action)
            # The twin started from the same seed and gets the same actions, so it plays the same.
            picture = observation if view is None else view.step(action)[0]
            reward, reset = float(earned), False
            total += reward
            if terminated or truncated:
                video.write(_pixels(picture))
                break
    return total


def _pixels(observation: Any) -> NDArray[np.uint8]:
    """Turns an observation into pixels: images as they are, numbers scaled to black and white.

    Of several parts it takes the first image; without one, all their numbers in a row.
    """
    parts = _parts(observation)
    images = [part for part in parts if _is_image(part)]
    if images:
        array = images[0]
    else:
        array = parts[0] if len(parts) == 1 else np.concatenate([part.ravel() for part in parts])
    array = np.atleast_2d(array)
    if array.dtype == np.uint8:
        return array
    low, high = float(array.min()), float(array.max())
    return np.asarray((array - low) / max(high - low, 1e-9) * 255, np.uint8)


def _parts(observation: Any) -> list[NDArray[Any]]:
    """Returns the arrays of an observation, nested or not."""
    if not isinstance(observation, Mapping | tuple):
        return [np.asarray(observation)]
    inner = observation.values() if isinstance(observation, Mapping) else observation
    return [array for part in inner for array in _parts(part)]


def _is_image(array: NDArray[Any]) -> bool:
    grey_or_rgb = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    return array.dtype == np.uint8 and grey_or_rgb
