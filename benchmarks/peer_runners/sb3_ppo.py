"""Stable-Baselines3 PPO on Atari: prints one JSON line with the rate of a steady window.

Run by `benchmarks/peers.py` with the Python of the peer's own environment. Network, wrappers and
thread counts are Stable-Baselines3's own; the hyperparameters are its usual ones for Atari.
"""

from __future__ import annotations

import argparse

import ale_py
import gymnasium as gym
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack
from window import Window, parse_times


class Stopwatch(BaseCallback):
    """Tells the window each time a rollout begins, which is when the update before it has ended."""

    def __init__(self, window: Window) -> None:
        super().__init__()
        self._window = window
        self._measured = False

    def _on_rollout_start(self) -> None:
        if self.num_timesteps > 0:
            self._measured = self._window.update_ended(self.num_timesteps)

    def _on_step(self) -> bool:
        return not self._measured


def main() -> None:
    """Trains until the window is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4)
    args = parse_times(parser)
    gym.register_envs(ale_py)
    # Frameskip 1 and no sticky actions here: the Atari wrapper repeats each action 4 times itself.
    env = make_atari_env(
        "ALE/Pong-v5",
        n_envs=8,
        vec_env_cls=DummyVecEnv,
        env_kwargs={"frameskip": 1, "repeat_action_probability": 0.0},
    )
    model = PPO(
        "CnnPolicy",
        VecFrameStack(env, n_stack=4),
        n_steps=128,
        n_epochs=args.epochs,
        batch_size=256,
        learning_rate=2.5e-4,
        clip_range=0.1,
        ent_coef=0.01,
        vf_coef=0.5,
        device="cpu",
    )
    window = Window(warmup_s=args.warmup_s, seconds=args.seconds)
    model.learn(total_timesteps=10**9, callback=Stopwatch(window))


if __name__ == "__main__":
    main()
