"""Judges checkpoints of a headrace run; see `greedy.py`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from greedy import Act, judge
from numpy.typing import NDArray

import headrace
from headrace.learner import checkpoint
from headrace.run import saving


def load(path: str, num_envs: int) -> Act:
    """Returns the greedy policy of one checkpoint, in float32."""
    saved = checkpoint.read(Path(path), without=("replay", "training"))
    policy = headrace.load(Path(path).parents[1], device="cpu")  # the newest one's weights
    saving.load_weights(policy.actor("greedy", 0.0).model, saved)
    state, reset = policy.initial_state(num_envs), True

    def act(observations: NDArray[Any]) -> NDArray[Any]:
        nonlocal state, reset
        actions, state = policy.act(observations, state, reset=reset)
        reset = False
        return np.asarray(actions)

    return act


def main() -> None:
    """Judges until its input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", required=True)
    parser.add_argument("--episodes", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    judge(args.env, args.episodes, load)


if __name__ == "__main__":
    main()
