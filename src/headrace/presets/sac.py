"""Presets of SAC."""

from __future__ import annotations

from typing import Any

from headrace.presets.parts import Preset

_UNIFORM: dict[str, Any] = {"priority_exponent": 0.0, "importance_exponent": 0.0}


def _adam(learning_rate: float) -> dict[str, Any]:
    return {
        "optimizer": "adam",
        "learning_rate": learning_rate,
        "learning_rate_schedule": "constant",
        "optimizer_eps": 1e-8,
        "max_gradient_norm": 0.0,
    }


_PUBLISHED: dict[str, Any] = {
    "discount": 0.99,
    "n_steps": 1,
    "target_tau": 0.005,
    "reward_transform": "none",
    "optimizer": _adam(3e-4),
}
"""Of Haarnoja et al. 2018, arXiv:1812.05905, table 1, as far as size and speed do not matter."""
_NETWORK: dict[str, Any] = {"network": "mlp", "hidden_sizes": [256, 256], "num_critics": 2}


def _one_update_per_step(*, replay_min: int) -> dict[str, Any]:
    return {
        "batch_unrolls": 256,
        **_PUBLISHED,
        "replay": {
            **_UNIFORM,
            "replay_capacity": 1_000_000,
            "replay_min": replay_min,
            "samples_per_insert": 256.0,  # of batches of 256
        },
    }


SAC = {
    "sac-mujoco": Preset(
        "MuJoCo with SAC as published: one environment, one update per step.",
        "Haarnoja et al. 2018, arXiv:1812.05905, table 1; learning starts after 10 000 steps as in "
        "RL Baselines3 Zoo, sac.yml, but those are of the policy as it starts, nearly uniform; "
        "where the policy acts is ours: in the worker, so that Python is the learner's alone",
        {
            "algorithm": "sac",
            "inference": "worker",
            "total_frames": 1_000_000,
            "server": {"num_envs": 1},
            "network": _NETWORK,
            "evaluator": {"evaluator": True, "eval_interval_s": 30.0},
            "learning": {**_one_update_per_step(replay_min=10_000), "updates_per_call": 8},
        },
    ),
    "sac-throughput": Preset(
        "MuJoCo with SAC and all that the machine has: sampling and learning never wait for each "
        "other, batches are large.",
        "Spreeze, arXiv:2312.06126: batches of 8192 and no ratio held between sampling and "
        "learning, a policy in each sampler; the learning rule as in sac-mujoco; the number of "
        "environments is ours",
        {
            "algorithm": "sac",
            "inference": "worker",
            "total_frames": 10_000_000,
            "server": {"num_envs": 64},
            "network": {"network": "mlp", "hidden_sizes": [256, 256], "num_critics": 2},
            "evaluator": {"evaluator": True, "eval_interval_s": 30.0},
            "learning": {
                "batch_unrolls": 8192,
                "updates_per_call": 4,
                **_PUBLISHED,
                "replay": {
                    **_UNIFORM,
                    "replay_capacity": 1_000_000,
                    "replay_min": 10_000,
                    "samples_per_insert": 0.0,
                },
            },
        },
    ),
    "sac-continuous": Preset(
        "Vectors and continuous actions, such as Pendulum-v1 or MuJoCo's: one update per step.",
        "ours: sac-mujoco, observations normalised, which begins to learn after 1 000 steps",
        {
            "algorithm": "sac",
            "total_frames": 200_000,
            "server": {"num_envs": 1},
            "network": {**_NETWORK, "normalize_observations": True},
            "learning": _one_update_per_step(replay_min=1_000),
        },
    ),
    "sac-images": Preset(
        "Images and continuous actions, one update in four steps.",
        "ours; not measured",
        {
            "algorithm": "sac",
            "total_frames": 500_000,
            "server": {"num_envs": 4},
            "network": {
                "network": "impala_shallow",
                "hidden_sizes": [256, 256],
                "normalize_observations": True,
            },
            "learning": {
                "batch_unrolls": 128,
                **_PUBLISHED,
                "replay": {
                    **_UNIFORM,
                    "replay_capacity": 100_000,
                    "replay_min": 1_000,
                    "samples_per_insert": 32.0,
                },
            },
        },
    ),
    "sac-control": Preset(
        "Small tasks with continuous actions such as Pendulum-v1 with SAC, within a minute.",
        "ours; the test of learning in tests/learning",
        {
            "algorithm": "sac",
            "total_frames": 10_000,
            "server": {"num_envs": 4},
            "network": {"network": "mlp", "hidden_sizes": [64, 64], "num_critics": 2},
            "learning": {
                "batch_unrolls": 128,
                "discount": 0.98,
                "n_steps": 1,
                "target_tau": 0.01,
                "initial_temperature": 0.05,
                "optimizer": _adam(1e-3),
                "replay": {
                    **_UNIFORM,
                    "replay_capacity": 100_000,
                    "replay_min": 1_000,
                    "samples_per_insert": 128.0,
                },
            },
        },
    ),
}
