"""Presets of IMPALA."""

from __future__ import annotations

from typing import Any

from headrace.presets.parts import ATARI, ATARI_STICKY, TANH_MLPS, Preset, adam

# The paper's loss is a sum over T x B = 640 samples; ours is a mean (algorithms/optimizers.py).
_IMPALA_SAMPLES = 20 * 32

_IMPALA_ATARI: dict[str, Any] = {
    "algorithm": "impala",
    "total_frames": 200_000_000,
    "network": {"network": "impala_deep", "lstm_size": 0},
    "learning": {
        "unroll_steps": 20,
        "batch_unrolls": 32,
        "discount": 0.99,
        "entropy_cost": 0.01,
        "value_cost": 0.5,
        "reward_transform": "clip",
        "vtrace_lambda": 1.0,
        "vtrace_rho_max": 1.0,
        "vtrace_c_max": 1.0,
        "vtrace_pg_rho_max": 1.0,
        "optimizer": {
            "optimizer": "rmsprop_tf",
            "learning_rate": 6e-4,
            "learning_rate_schedule": "linear",
            "optimizer_eps": 0.01 / _IMPALA_SAMPLES**2,
            "initial_mean_square": 1.0 / _IMPALA_SAMPLES**2,
            "rmsprop_decay": 0.99,
            "momentum": 0.0,
            "max_gradient_norm": 40.0 / _IMPALA_SAMPLES,
        },
    },
}

_DESKTOP: dict[str, Any] = {
    "server": {"num_envs": 16},
    "network": {"network": "impala_shallow", "lstm_size": 0, "normalize_observations": True},
    "learning": {
        **_IMPALA_ATARI["learning"],
        "unroll_steps": 40,
        "batch_unrolls": 4,
        "entropy_cost": 0.003,
        "vtrace_lambda": 0.95,
        "optimizer": {
            "optimizer": "muon",
            "learning_rate": 1.5e-3,
            "learning_rate_schedule": "linear",
            "learning_rate_warmup": 0.06,
            "learning_rate_decay": 0.6,
            "optimizer_eps": 1e-5,
            "max_gradient_norm": 0.5,
        },
    },
}

_CONTINUOUS: dict[str, Any] = {
    "algorithm": "impala",
    "server": {"num_envs": 16},
    "network": {**TANH_MLPS, "normalize_observations": True, "initial_log_std": -0.5},
    "learning": {
        "unroll_steps": 32,
        "batch_unrolls": 16,
        "discount": 0.99,
        "entropy_cost": 1e-5,
        "value_cost": 0.5,
        "vtrace_lambda": 0.95,
        "reward_transform": "normalize",
        "optimizer": adam(1e-3),
    },
}

IMPALA = {
    "atari": Preset(
        "One Atari game as the IMPALA paper trains its experts: deep network, 200 million frames.",
        "Espeholt et al. 2018, arXiv:1802.01561, Table G.1; summed loss converted to a mean",
        {**_IMPALA_ATARI, "environment": ATARI},
    ),
    "atari-sticky": Preset(
        "The same, modern protocol: sticky actions, whole games, all 18 actions, no no-ops.",
        "Machado et al. 2018, arXiv:1709.06009, sections 4 and 5; learning as in preset atari",
        {**_IMPALA_ATARI, "environment": ATARI_STICKY},
    ),
    "atari-desktop": Preset(
        "One Atari game on a machine of few cores: small frames, shallow network, small batches.",
        "ours, measured in docs/results.md; environment as in preset atari, but for frames of 64 x "
        "64 pixels as in Hafner et al. 2023, DreamerV3, arXiv:2301.04104",
        {
            "algorithm": "impala",
            "total_frames": 8_000_000,
            "environment": {**ATARI, "frame_size": 64},
            **_DESKTOP,
        },
    ),
    "catch": Preset(
        "Catch in a quarter of a minute on one core.",
        "ours; the test of learning in tests/learning",
        {
            "total_frames": 150_000,
            "server": {"num_envs": 64},
            "network": {"network": "mlp"},
            "learning": {
                "unroll_steps": 10,
                "batch_unrolls": 32,
                "optimizer": {
                    "optimizer": "adam",
                    "learning_rate": 4e-3,
                    "max_gradient_norm": 1.0,
                },
            },
        },
    ),
    "recall": Preset(
        "Recall, which only a recurrent policy can solve, in a quarter of a minute on one core.",
        "ours; the test of learning in tests/learning",
        {
            "total_frames": 300_000,
            "server": {"num_envs": 64},
            "network": {"network": "mlp", "lstm_size": 32},
            "learning": {
                "unroll_steps": 20,
                "batch_unrolls": 32,
                # It may keep the cue in its own actions, which it sees: more entropy breaks that.
                "entropy_cost": 0.001,
                "optimizer": {
                    "optimizer": "adam",
                    "learning_rate": 5e-3,
                    "max_gradient_norm": 1.0,
                },
            },
        },
    ),
    "pointmass": Preset(
        "PointMass, continuous actions, in a quarter of a minute on one core.",
        "ours; the test of learning in tests/learning",
        {
            "total_frames": 300_000,
            "server": {"num_envs": 64},
            "network": {"network": "mlp"},
            "learning": {
                "unroll_steps": 20,
                "batch_unrolls": 32,
                "discount": 0.95,
                "entropy_cost": 0.001,
                "reward_transform": "none",
                "optimizer": {
                    "optimizer": "adam",
                    "learning_rate": 3e-3,
                    "max_gradient_norm": 1.0,
                },
            },
        },
    ),
    "control": Preset(
        "Vectors and discrete actions, such as CartPole-v1, in a minute on two cores.",
        "ours (docs/results.md); the test of learning in tests/learning",
        {
            "algorithm": "impala",
            "total_frames": 200_000,
            "server": {"num_envs": 16},
            "network": {**TANH_MLPS, "normalize_observations": True},
            "learning": {
                "unroll_steps": 20,
                "batch_unrolls": 4,
                "entropy_cost": 0.003,
                "vtrace_lambda": 0.95,
                "reward_transform": "normalize",
                "optimizer": adam(1e-3),
            },
        },
    ),
    "continuous": Preset(
        "Vectors and continuous actions, such as Pendulum-v1 or MuJoCo's.",
        "ours: mujoco-impala, for a shorter run",
        {**_CONTINUOUS, "total_frames": 1_000_000},
    ),
    "images": Preset(
        "Images of any game; rewards are scaled by the deviation of returns, not clipped.",
        "ours: atari-desktop without what is Atari's; not measured",
        {
            "algorithm": "impala",
            "total_frames": 2_000_000,
            **_DESKTOP,
            "learning": {**_DESKTOP["learning"], "reward_transform": "normalize"},
        },
    ),
    "mujoco-impala": Preset(
        "MuJoCo tasks with V-trace: two small networks, normalised observations and rewards.",
        "ours, chosen among five on HalfCheetah-v5 (docs/results.md); network, discount and "
        "value cost as SEED RL, google-research/seed_rl@0a4729d, mujoco/vtrace_main.py",
        {**_CONTINUOUS, "total_frames": 3_000_000},
    ),
    "football": Preset(
        "Google Research Football by EnvPool, with SEED RL's network and four stacked frames.",
        "SEED RL, google-research/seed_rl, gcp/train_football_scoring.sh and football/; not run to "
        "its 500 million frames",
        {
            "algorithm": "impala",
            "total_frames": 500_000_000,
            "environment": {"frame_stack": 4},
            "server": {"num_envs": 200},
            "network": {"network": "football", "lstm_size": 0},
            "learning": {
                "unroll_steps": 32,
                "batch_unrolls": 32,
                "discount": 0.997,
                "entropy_cost": 3.19483e-5,
                "value_cost": 0.5,
                "vtrace_lambda": 0.9,
                "reward_transform": "none",
                "optimizer": {
                    "optimizer": "adam",
                    "learning_rate": 5.53392e-5,
                    "learning_rate_schedule": "constant",
                    "max_gradient_norm": 0.0,
                },
            },
        },
    ),
}
