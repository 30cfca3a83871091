"""Films one episode of a trained policy, as a person would see it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

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
        observation, _ = env.reset()
        picture = observation
        if view is not None:
            stack.callback(view.close)
            picture, _ = view.reset()
        video = stack.enter_context(VideoWriter(path, _FPS))
        for _ in range(_MOST_STEPS):
            video.write(_pixels(picture))
            action, state = policy.act(
                observation, state, reward=reward, reset=reset, mode=mode, epsilon=epsilon
            )
            observation, earned, terminated, truncated, _ = env.step(action)
            # The twin started from the same seed and gets the same actions, so it plays the same.
            picture = observation if view is None else view.step(action)[0]
            reward, reset = float(earned), False
            total += reward
            if terminated or truncated:
                video.write(_pixels(picture))
                break
    return total


def _pixels(observation: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Turns an observation into pixels: images as they are, numbers scaled to black and white."""
    array = np.atleast_2d(np.asarray(observation))
    if array.dtype == np.uint8:
        return array
    low, high = float(array.min()), float(array.max())
    return np.asarray((array - low) / max(high - low, 1e-9) * 255, np.uint8)
