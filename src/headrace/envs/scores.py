"""Reference returns of Atari-57, and the score that is made from them.

Random and human returns are those of `dqn_zoo/atari_data.py` (each row of the table names it).
"""

from __future__ import annotations

import csv
from functools import lru_cache
from importlib.resources import files


@lru_cache(maxsize=1)
def _returns() -> dict[str, tuple[float, float]]:
    """Random and human mean return by game id."""
    table = files("headrace").joinpath("data", "atari57_scores.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(table.splitlines())
    return {row["ale_id"]: (float(row["random"]), float(row["human"])) for row in rows}


def human_normalised(ale_id: str, mean_return: float) -> float | None:
    """Returns (mean - random) / (human - random): 0 plays at random, 1 plays as the human tester.

    Compare sets of games by the median. The table has 16256.9 for random Video Pinball; published
    means (957.6 % for the deep experts of IMPALA, arXiv:1802.01561) come out only with 0.0 there,
    published medians with either.

    Args:
        ale_id: such as ALE/Pong-v5.
        mean_return: mean of the raw, undiscounted returns of whole games.

    Returns:
        None where the game is not one of the 57.
    """
    reference = _returns().get(ale_id)
    if reference is None:
        return None
    random, human = reference
    return (mean_return - random) / (human - random)
