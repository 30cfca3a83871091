"""RLlib: IMPALA on Atari, or SAC on MuJoCo. Prints one JSON line with the rate of a steady window.

Run by `benchmarks/peers.py` with the Python of the peer's own environment. What is learned is that
of the other contestants: for IMPALA the Nature network, 84 x 84 x 4 frames, batches of 640 from
unrolls of 20, each sample once; for SAC the paper's settings, two layers of 256, one update of 256
samples for each step, from a replay without priorities. Thread counts are RLlib's own. An iteration
of RLlib, at whose end the window looks, holds many updates.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import gymnasium as gym
import ray
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.algorithms.impala import IMPALAConfig
from ray.rllib.algorithms.sac import SACConfig
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.env.wrappers.atari_wrappers import wrap_atari_for_new_api_stack
from ray.tune.registry import register_env
from window import Window, parse_times

BATCH = {"impala": 640, "sac": 256}
UNROLL_STEPS = 20
ENV_RUNNERS = 2
"""Processes of IMPALA that step environments and act in them."""


def make_pong(_: Any) -> gym.Env[Any, Any]:
    """Makes Pong, whose wrapper repeats each action four times; called in RLlib's processes."""
    import ale_py  # noqa: PLC0415  # SAC needs no Atari

    gym.register_envs(ale_py)
    env = gym.make("ALE/Pong-v5", frameskip=1, repeat_action_probability=0.0)
    wrapped: gym.Env[Any, Any] = wrap_atari_for_new_api_stack(env, dim=84, framestack=4)
    return wrapped


def impala() -> AlgorithmConfig:
    """Returns the settings of Pong."""
    register_env("pong", make_pong)
    model = DefaultModelConfig(
        conv_filters=[[32, 8, 4], [64, 4, 2], [64, 3, 1]],
        conv_activation="relu",
        head_fcnet_hiddens=[512],
        head_fcnet_activation="relu",
        vf_share_layers=True,
    )
    return (
        IMPALAConfig()
        .environment("pong")
        .env_runners(
            num_env_runners=ENV_RUNNERS,
            num_envs_per_env_runner=16,
            rollout_fragment_length=UNROLL_STEPS,
        )
        .learners(num_learners=0)
        .training(train_batch_size_per_learner=BATCH["impala"], lr=6e-4)
        .rl_module(model_config=model)
    )


def sac(env: str, learning_starts: int) -> AlgorithmConfig:
    """Returns the paper's settings."""
    return (
        SACConfig()
        .environment(env)
        .env_runners(num_env_runners=0, rollout_fragment_length=1)
        .training(
            actor_lr=3e-4,
            critic_lr=3e-4,
            alpha_lr=3e-4,
            tau=0.005,
            gamma=0.99,
            train_batch_size_per_learner=BATCH["sac"],
            num_steps_sampled_before_learning_starts=learning_starts,
            replay_buffer_config={"type": "EpisodeReplayBuffer", "capacity": 1_000_000},
        )
        .rl_module(
            model_config=DefaultModelConfig(fcnet_hiddens=[256, 256], fcnet_activation="relu")
        )
    )


def main() -> None:
    """Trains until the window is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--algorithm", choices=BATCH, required=True)
    parser.add_argument("--env", default="HalfCheetah-v5", help="of SAC")
    parser.add_argument("--learning-starts", type=int, default=1000, help="agent steps, of SAC")
    args = parse_times(parser)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Ray counts a core for each process, and waits for ever where there are too few.
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, ENV_RUNNERS + 1),
        include_dashboard=False,
        log_to_driver=False,
    )
    own = impala() if args.algorithm == "impala" else sac(args.env, args.learning_starts)
    algorithm = own.reporting(min_time_s_per_iteration=1).build_algo()
    window = Window(warmup_s=args.warmup_s, seconds=args.seconds)
    learned, measured = 0, False
    while not measured:
        result = algorithm.train()
        learners = result.get("learners", {}).get("default_policy", {})
        trained = int(learners.get("num_module_steps_trained_lifetime", 0))
        if trained == learned:  # an iteration can end without an update
            continue
        learned = trained
        if args.algorithm == "impala":
            # RLlib counts the row that only bootstraps, one to each unroll.
            measured = window.update_ended(trained * UNROLL_STEPS // (UNROLL_STEPS + 1))
        else:
            stepped = int(result["env_runners"]["num_env_steps_sampled_lifetime"])
            measured = window.update_ended(stepped, trained // BATCH["sac"])
    algorithm.stop()
    ray.shutdown()


if __name__ == "__main__":
    main()
