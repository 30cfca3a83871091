"""Plays full episodes with a trained policy, on the server's own code."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headrace.algorithms.base import ActionMode
from headrace.envs.scores import human_normalised
from headrace.errors import ConfigError, DeadlineExceeded
from headrace.run.policy import Policy
from headrace.server.server import Infos, Seat
from headrace.telemetry.metrics import Waits

_MOST_ENVS = 16
_SILENCE_S = 120.0


class Evaluation(NamedTuple):
    """Raw returns of full episodes."""

    returns: NDArray[np.float64]  # [episodes]
    lengths: NDArray[np.int64]  # [episodes] in agent steps
    human_normalised: (
        float | None
    )  # 0 is random play, 1 a human's; None where no human score is known

    def summary(self) -> dict[str, Any]:
        """Returns the numbers that `headrace eval --json` prints."""
        returns = self.returns
        low, median, high = np.quantile(returns, (0.25, 0.5, 0.75))
        return {
            "episodes": len(returns),
            "mean_return": float(returns.mean()),
            "median_return": float(median),
            "std_return": float(returns.std()),
            "quartiles_return": [float(low), float(high)],
            "min_return": float(returns.min()),
            "max_return": float(returns.max()),
            "mean_length": float(self.lengths.mean()),
            "human_normalised": self.human_normalised,
        }


def evaluate(
    policy: Policy,
    *,
    episodes: int,
    mode: ActionMode = "greedy",
    epsilon: float = 0.001,
    seed: int | None = None,
    in_process: bool = False,
    attend: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Plays full episodes, equally many in each environment, so that short ones count no more.

    Args:
        policy: Who plays.
        episodes: How many.
        mode: See `Policy.act`.
        epsilon: See `Policy.act`.
        seed: Of the environments; None for one made of the run's.
        in_process: Start no worker process.
        attend: Called between two steps; what it raises ends the evaluation.

    Raises:
        ConfigError: no episodes were asked for.
    """
    if episodes < 1:
        raise ConfigError(f"episodes must be at least 1, not {episodes}")
    num_envs = policy.spec.whole_vectors(min(_MOST_ENVS, episodes))
    quota = np.full(num_envs, episodes // num_envs)
    quota[: episodes % num_envs] += 1
    returns: list[float] = []
    lengths: list[int] = []

    def keep(
        env: NDArray[np.int32], ended: NDArray[np.float64], steps: NDArray[np.int64], _: Infos
    ) -> None:
        for index, value, length in zip(env, ended, steps, strict=True):
            if quota[index] > 0:
                quota[index] -= 1
                returns.append(float(value))
                lengths.append(int(length))

    pool = policy.make_pool(
        num_envs=num_envs, batch_size=num_envs, seed=seed, in_process=in_process
    )
    seat = Seat(
        pool,
        policy.actor(mode, epsilon),
        policy.initial_state(1),
        unrolls=None,
        on_episodes=keep,
        device=policy.device,
    )
    waits, last_s = Waits(), time.monotonic()
    try:
        while quota.any():
            attend()
            if seat.serve(lambda: 0, 1.0, waits):
                last_s = time.monotonic()
            elif time.monotonic() - last_s > _SILENCE_S:
                raise DeadlineExceeded(f"{policy.spec.name} gave no step for {_SILENCE_S:.0f} s")
    finally:
        pool.close()
    mean = float(np.mean(returns))
    return Evaluation(
        np.asarray(returns), np.asarray(lengths), human_normalised(policy.spec.name, mean)
    )
