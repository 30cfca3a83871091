"""The evaluator: plays full episodes with each new version of the weights that it can keep up with.

Run as a program by `run.roles`. Its environments step in its own process, whatever training uses.
"""

from __future__ import annotations

import time

from headrace.run.evaluate import evaluate
from headrace.run.role import Follower, follow
from headrace.run.seeds import Use, derived_seed

_ANSWER_S = 10.0  # longest wait for weights: an update of a large batch may take seconds
_SAME_S = 0.5  # before it asks again where there was no update since
_LONG_S = 600.0


def judge(follower: Follower) -> None:
    """Evaluates until the run is over.

    Raises:
        PeerLost: it is.
    """
    settings = follower.config.evaluator
    mode, epsilon = follower.policy.judged_mode()
    judged = -1
    while True:
        start_s = time.monotonic()
        version = follower.newest(_ANSWER_S)
        if version == judged:
            follower.rest(_SAME_S)
            continue
        patience = Patience(follower, start_s)
        evaluation = evaluate(
            follower.policy,
            episodes=settings.eval_episodes,
            mode=mode,
            epsilon=epsilon,
            # Other episodes each time.
            seed=derived_seed(follower.config.seed, Use.EVALUATOR, version),
            in_process=True,
            attend=patience.attend,
        )
        follower.tell(
            {
                "evaluation": {
                    "version": version,
                    "agent_steps": follower.agent_steps,
                    "returns": evaluation.returns.tolist(),
                    "lengths": evaluation.lengths.tolist(),
                    "seconds": time.monotonic() - start_s,
                }
            }
        )
        judged = version
        follower.rest(max(0.0, start_s + settings.eval_interval_s - time.monotonic()))


class Patience:
    """What is done between two steps of an evaluation: it ends with the run, and says if it drags.

    An episode that a greedy policy never ends is possible where nothing bounds its length.
    """

    def __init__(self, follower: Follower, start_s: float) -> None:
        self._follower = follower
        self._long_s = start_s + _LONG_S

    def attend(self) -> None:
        """Looks at the run and at the clock.

        Raises:
            PeerLost: the run is over.
        """
        self._follower.rest(0.0)
        if time.monotonic() >= self._long_s:
            self._long_s = float("inf")
            self._follower.tell(
                {
                    "note": f"one evaluation has taken {_LONG_S / 60:.0f} minutes so far: lower "
                    "--eval-episodes, or bound the length of episodes"
                }
            )


def main() -> None:
    """Judges until the parent leaves."""
    follow(judge)


if __name__ == "__main__":
    main()
