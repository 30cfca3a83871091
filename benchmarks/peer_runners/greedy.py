"""The one judge of all agents: greedy episodes on the same seeds, one checkpoint per line read."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

FIRST_SEED = 10_000

Act = Callable[[NDArray[Any]], NDArray[Any]]
"""From observations [N, ...] to actions [N, ...] of the environment itself, the greedy ones."""


def play(envs: list[gym.Env[Any, Any]], act: Act) -> list[float]:
    """Plays one whole episode in each environment, side by side, and returns the returns."""
    observations = [env.reset(seed=FIRST_SEED + index)[0] for index, env in enumerate(envs)]
    returns, going = [0.0] * len(envs), set(range(len(envs)))
    while going:
        actions = act(np.stack(observations))
        for index in sorted(going):
            observation, reward, terminated, truncated, _ = envs[index].step(actions[index])
            observations[index] = observation
            returns[index] += float(reward)
            if terminated or truncated:
                going.remove(index)
    return returns


def judge(env: str, episodes: int, load: Callable[[str, int], Act]) -> None:
    """Answers each path on standard input with the returns of that agent; an empty line with none.

    Args:
        env: Name at Gymnasium.
        episodes: For each agent.
        load: From a path, and the number of episodes played at once, to what acts.
    """
    envs = [gym.make(env) for _ in range(episodes)]
    for line in sys.stdin:
        path = line.strip()
        returns = play(envs, load(path, episodes)) if path else []
        print(json.dumps({"returns": returns}), flush=True)
