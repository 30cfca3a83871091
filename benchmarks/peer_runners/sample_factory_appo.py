"""Sample Factory APPO on Atari: prints one JSON line with the rate of a steady window.

Run by `benchmarks/peers.py` with the Python of the peer's own environment. Thread counts are Sample
Factory's own; the layout is the fastest of those tried for it on a machine with 2 cores.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

from sample_factory.algo.runners.runner import AlgoObserver, Runner
from sample_factory.envs.env_utils import register_env
from sample_factory.train import make_runner
from sf_examples.atari.atari_utils import make_atari_env
from sf_examples.atari.train_atari import parse_atari_args
from window import Window, parse_times

SETTINGS = {
    "algo": "APPO",
    "env": "atari_pong",
    "device": "cpu",
    "async_rl": True,
    "serial_mode": False,
    "num_workers": 2,
    "num_envs_per_worker": 16,
    "worker_num_splits": 2,
    "rollout": 32,
    "batch_size": 1024,
    "num_batches_per_epoch": 1,
    "num_epochs": 1,
    "normalize_input": False,
    "summaries_use_frameskip": False,  # counts agent steps, not frames
    "train_for_env_steps": 10**9,
    "save_every_sec": 10**6,
    # Random steps before training, which would still go on during the warm-up.
    "decorrelate_envs_on_one_worker": False,
    "decorrelate_experience_max_seconds": 0,
}


def make_pong(name: str, cfg: Any, env_config: Any, render_mode: str | None = None) -> Any:
    """Makes Sample Factory's Pong after telling Gymnasium of it.

    Sample Factory makes environments in processes of its own, where ALE has not registered its
    games.
    """
    from ale_py.registration import register_v0_v4_envs  # noqa: PLC0415  # rollout workers only

    register_v0_v4_envs()
    return make_atari_env(name, cfg, env_config, render_mode)


class Stopwatch(AlgoObserver):  # type: ignore[misc]
    """Tells the window of each update, and ends the run when it is measured."""

    def __init__(self, window: Window) -> None:
        self._window = window

    def on_training_step(self, runner: Runner, training_iteration_since_resume: int) -> None:
        """Called by the runner after an update; its counter is what the learner consumed."""
        if self._window.update_ended(runner.env_steps.get(0, 0)):
            runner.cfg.train_for_env_steps = 0  # the runner's own way to end


def main() -> None:
    """Trains until the window is measured."""
    args = parse_times(argparse.ArgumentParser(description=__doc__))
    register_env("atari_pong", make_pong)
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--{name}={value}" for name, value in SETTINGS.items()]
        cfg = parse_atari_args([*flags, f"--train_dir={folder}", "--experiment=peer"])
        _, runner = make_runner(cfg)
        runner.register_observer(Stopwatch(Window(warmup_s=args.warmup_s, seconds=args.seconds)))
        runner.init()
        runner.run()


if __name__ == "__main__":
    main()
