"""Presets of PPO."""

from __future__ import annotations

from typing import Any

from headrace.presets.parts import ATARI, TANH_MLPS, Preset, adam

_CONTINUOUS: dict[str, Any] = {
    "algorithm": "ppo",
    "total_frames": 1_000_000,
    "server": {"num_envs": 1},
    "network": {**TANH_MLPS, "normalize_observations": True, "initial_log_std": 0.0},
    "learning": {
        "unroll_steps": 2048,
        "batch_unrolls": 1,
        "epochs": 10,
        "minibatches": 32,
        "discount": 0.99,
        "gae_lambda": 0.95,
        "clip_range": 0.2,
        "value_clip_range": 0.2,
        "entropy_cost": 0.0,
        "value_cost": 0.5,
        "reward_transform": "normalize",
        "optimizer": adam(3e-4),
    },
}

PPO = {
    "ppo-atari": Preset(
        "One Atari game with PPO: 8 environments, 128 steps, 4 epochs; environment as in atari.",
        "CleanRL ppo_atari.py@09f7a7f; 10 million steps of 4 frames",
        {
            "algorithm": "ppo",
            "total_frames": 40_000_000,
            "environment": ATARI,
            "server": {"num_envs": 8},
            "network": {"network": "nature", "lstm_size": 0},
            "learning": {
                "unroll_steps": 128,
                "batch_unrolls": 8,
                "epochs": 4,
                "minibatches": 4,
                "discount": 0.99,
                "gae_lambda": 0.95,
                "clip_range": 0.1,
                "value_clip_range": 0.1,
                "entropy_cost": 0.01,
                "value_cost": 0.5,
                "reward_transform": "clip",
                "optimizer": adam(2.5e-4),
            },
        },
    ),
    "ppo-mujoco": Preset(
        "MuJoCo tasks with PPO: one environment, 2048 steps, 10 epochs of 32 minibatches.",
        "CleanRL ppo_continuous_action.py@016ca33; there actions are clipped, here squashed",
        _CONTINUOUS,
    ),
    "ppo-control": Preset(
        "Vectors and discrete actions, such as CartPole-v1, with PPO, in a minute on two cores.",
        "ours (docs/results.md)",
        {
            "algorithm": "ppo",
            "total_frames": 300_000,
            "server": {"num_envs": 8},
            "network": {**TANH_MLPS, "normalize_observations": True},
            "learning": {
                "unroll_steps": 32,
                "batch_unrolls": 8,
                "epochs": 10,
                "minibatches": 1,
                "discount": 0.98,
                "gae_lambda": 0.9,
                "entropy_cost": 0.0,
                "reward_transform": "normalize",
                "optimizer": adam(1e-3),
            },
        },
    ),
    "ppo-continuous": Preset(
        "Vectors and continuous actions, such as Pendulum-v1 or MuJoCo's, with PPO.",
        "ours: ppo-mujoco, its 2048 steps a batch from eight environments",
        {
            **_CONTINUOUS,
            "server": {"num_envs": 8},
            "learning": {**_CONTINUOUS["learning"], "unroll_steps": 256, "batch_unrolls": 8},
        },
    ),
    "ppo-images": Preset(
        "Images of any game with PPO; rewards are scaled by the deviation of returns, not clipped.",
        "ours: ppo-atari without what is Atari's, images normalised; not measured",
        {
            "algorithm": "ppo",
            "total_frames": 2_000_000,
            "server": {"num_envs": 16},
            "network": {"network": "nature", "lstm_size": 0, "normalize_observations": True},
            "learning": {
                "unroll_steps": 128,
                "batch_unrolls": 16,
                "epochs": 4,
                "minibatches": 4,
                "clip_range": 0.2,
                "reward_transform": "normalize",
                "optimizer": adam(5e-4),
            },
        },
    ),
}
