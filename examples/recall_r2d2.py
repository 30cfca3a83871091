"""Trains Q-learning on recall twice: with an LSTM (R2D2) and without, which can only guess.

A cue is shown once and asked for twelve steps later. No stack of the newest frames reaches back so
far, so what the policy has not kept in its recurrent state is lost.
"""

import tempfile
from pathlib import Path
from typing import Any

import headrace

NETWORKS: dict[str, dict[str, Any]] = {
    "with an LSTM": {"network": "r2d2", "lstm_size": 64},
    "without": {"network": "mlp", "lstm_size": 0},
}


def main() -> None:
    """Trains both and plays 200 greedy episodes with each: at best 1, and 0 by guessing."""
    with tempfile.TemporaryDirectory() as folder:
        for name, network in NETWORKS.items():
            config = headrace.preset(
                "r2d2-control",
                "recall",
                total_frames=30_000,
                network=network,
                out=str(Path(folder) / name),
            )
            headrace.train(config)
            played = headrace.evaluate(headrace.load(config.out), episodes=200)
            print(f"{name}: {played.returns.mean():.2f}")


if __name__ == "__main__":
    main()
