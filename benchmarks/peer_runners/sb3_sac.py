"""SAC of Stable-Baselines3 (PyTorch) or of SBX (JAX), which have one interface.

Prints one JSON line with the rate of a steady window (`--warmup-s`, `--seconds`); or trains for
ever and writes checkpoints (`--save-to`); or judges such checkpoints (`--judge`, see `greedy.py`).
Run by `benchmarks/peers.py` with the Python of the peer's own environment. Settings are those of
the paper, which are the packages' own, but for the steps before learning.
"""

from __future__ import annotations

import argparse
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from greedy import Act, judge
from numpy.typing import NDArray
from stable_baselines3.common.callbacks import BaseCallback
from window import Window

LIBRARIES = {"sb3": "stable_baselines3", "sbx": "sbx"}


class Stopwatch(BaseCallback):
    """Tells the window each time a rollout begins, which is when the update before it has ended."""

    def __init__(self, window: Window) -> None:
        super().__init__()
        self._window = window
        self._measured = False

    def _on_rollout_start(self) -> None:
        updates = self.model._n_updates
        if updates > 0:
            self._measured = self._window.update_ended(self.num_timesteps, updates)

    def _on_step(self) -> bool:
        return not self._measured


class Saver(BaseCallback):
    """Writes a checkpoint at the start and then every so many seconds, whole or not at all."""

    def __init__(self, folder: Path, interval_s: float) -> None:
        super().__init__()
        self._folder, self._interval_s = folder, interval_s
        self._last_s = float("-inf")

    def _on_rollout_start(self) -> None:
        if time.monotonic() - self._last_s < self._interval_s:
            return
        name = f"agent_steps_{self.num_timesteps:012d}.zip"
        self._folder.mkdir(parents=True, exist_ok=True)
        self.model.save(self._folder / f".{name}")
        (self._folder / f".{name}").rename(self._folder / name)
        self._last_s = time.monotonic()

    def _on_step(self) -> bool:
        return True


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", choices=LIBRARIES, required=True)
    parser.add_argument("--env", required=True)
    parser.add_argument("--threads", type=int, help="of PyTorch; its own choice if left out")
    parser.add_argument("--learning-starts", type=int, default=1000)
    parser.add_argument("--at-once", type=int, default=1, help="steps, then as many updates")
    parser.add_argument("--warmup-s", type=float)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--save-to", type=Path)
    parser.add_argument("--save-interval-s", type=float, default=10.0)
    parser.add_argument("--judge", action="store_true")
    parser.add_argument("--episodes", type=int, default=5)
    return parser.parse_args()


def main() -> None:
    """Measures, trains or judges."""
    args = parse()
    sac: Any = import_module(LIBRARIES[args.library]).SAC
    if args.judge:
        torch.set_num_threads(1)

        def load(path: str, _: int) -> Act:
            model = sac.load(path, device="cpu")

            def act(observations: NDArray[Any]) -> NDArray[Any]:
                actions: NDArray[Any] = model.predict(observations, deterministic=True)[0]
                return actions

            return act

        judge(args.env, args.episodes, load)
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    model = sac(
        "MlpPolicy",
        gym.make(args.env),
        learning_rate=3e-4,
        buffer_size=1_000_000,
        learning_starts=args.learning_starts,
        batch_size=256,
        tau=0.005,
        gamma=0.99,
        train_freq=args.at_once,
        gradient_steps=args.at_once,
        policy_kwargs={"net_arch": [256, 256]},
        device="cpu",
    )
    callback: BaseCallback
    if args.save_to is not None:
        callback = Saver(args.save_to, args.save_interval_s)
    else:
        callback = Stopwatch(Window(warmup_s=args.warmup_s, seconds=args.seconds))
    model.learn(total_timesteps=10**9, callback=callback)


if __name__ == "__main__":
    main()
