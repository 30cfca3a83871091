"""Presets of R2D2 and of DQN, which is the same rule without a recurrent state."""

from __future__ import annotations

from typing import Any

from headrace.presets.parts import ATARI, Preset

# The published loss is summed over the T learned steps of a sequence; ours is a mean.
_R2D2_STEPS = 80

_R2D2_ATARI: dict[str, Any] = {
    "unroll_steps": _R2D2_STEPS,
    "burn_in_steps": 40,
    "overlap_steps": 40,
    "batch_unrolls": 64,
    "discount": 0.997,
    "n_steps": 5,
    "double_q": True,
    "rescale_values": True,
    "value_scale_epsilon": 1e-3,
    "target_update_interval": 2500,
    "priority_eta": 0.9,
    "epsilon_base": 0.4,
    "epsilon_power": 7.0,
    "reward_transform": "none",
    "optimizer": {
        "optimizer": "adam",
        "learning_rate": 1e-4,
        "learning_rate_schedule": "constant",
        "optimizer_eps": 1e-3 / _R2D2_STEPS,
        "max_gradient_norm": 80.0 / _R2D2_STEPS,
    },
    "replay": {
        "replay_capacity": 100_000,
        "replay_min": 5_000,
        "samples_per_insert": 0.8,
        "priority_exponent": 0.9,
        "importance_exponent": 0.6,
    },
}

_SMALL: dict[str, Any] = {
    "algorithm": "r2d2",
    "network": {"network": "impala_shallow", "lstm_size": 256},
    "learning": {
        **_R2D2_ATARI,
        "unroll_steps": 20,
        "burn_in_steps": 10,
        "overlap_steps": 0,
        "batch_unrolls": 16,
        "discount": 0.99,
        "target_update_interval": 200,
        "reward_transform": "clip",
        "optimizer": {
            **_R2D2_ATARI["optimizer"],
            "learning_rate": 2.5e-4,
            "optimizer_eps": 1e-5,
            "max_gradient_norm": 1.0,
        },
        "replay": {
            **_R2D2_ATARI["replay"],
            "replay_capacity": 15_000,
            "replay_min": 1_000,
            "samples_per_insert": 4.0,
        },
    },
}

_CONTROL: dict[str, Any] = {
    "algorithm": "r2d2",
    "total_frames": 150_000,
    "server": {"num_envs": 16},
    "network": {"network": "r2d2", "lstm_size": 64},
    "learning": {
        "unroll_steps": 20,
        "burn_in_steps": 5,
        "batch_unrolls": 32,
        "discount": 0.99,
        "n_steps": 3,
        "target_update_interval": 100,
        "epsilon_base": 0.4,
        "epsilon_power": 7.0,
        "optimizer": {
            "optimizer": "adam",
            "learning_rate": 1e-3,
            "learning_rate_schedule": "constant",
            "optimizer_eps": 1e-5,
            "max_gradient_norm": 1.0,
        },
        "replay": {
            "replay_capacity": 5_000,
            "replay_min": 100,
            "samples_per_insert": 8.0,
        },
    },
}

R2D2 = {
    "r2d2-atari": Preset(
        "One Atari game as R2D2 trains it: 256 environments, LSTM, a replay of 4 million steps.",
        "Kapturowski et al. 2019 (R2D2), section 3 and appendix; clip as SEED RL, "
        "gcp/train_atari.sh; summed loss converted to a mean. Needs 30 GB for the replay",
        {
            "algorithm": "r2d2",
            "total_frames": 10_000_000_000,
            "environment": {
                **ATARI,
                "life_loss_ends_episode": False,
                "full_action_space": True,
            },
            "server": {"num_envs": 256, "eval_envs": 8},
            "network": {"network": "r2d2", "lstm_size": 512},
            "learning": _R2D2_ATARI,
        },
    ),
    "r2d2-small": Preset(
        "One Atari game with R2D2 on a few cores and 8 GB: small network, short sequences.",
        "ours (docs/results.md); environment as in preset atari, but for lost lives",
        {
            **_SMALL,
            "total_frames": 20_000_000,
            "environment": {**ATARI, "life_loss_ends_episode": False},
            "server": {"num_envs": 32, "eval_envs": 2},
        },
    ),
    "r2d2-control": Preset(
        "Small tasks with vectors or few numbers, recall among them, with R2D2.",
        "ours; the test of learning in tests/learning",
        _CONTROL,
    ),
    "r2d2-vectors": Preset(
        "Vectors of any kind and discrete actions with R2D2.",
        "ours: r2d2-control, observations normalised",
        {**_CONTROL, "network": {**_CONTROL["network"], "normalize_observations": True}},
    ),
    "r2d2-images": Preset(
        "Images of any game with R2D2 on a few cores; rewards are not clipped.",
        "ours: r2d2-small without what is Atari's, images normalised; not measured",
        {
            **_SMALL,
            "total_frames": 2_000_000,
            "server": {"num_envs": 16},
            "network": {**_SMALL["network"], "normalize_observations": True},
            "learning": {**_SMALL["learning"], "reward_transform": "none"},
        },
    ),
    "dqn-atari": Preset(
        "One Atari game with double DQN, feed-forward and uniform, eight environments.",
        "Mnih et al. 2015 (network, discount, batch, replay, learning once in four steps) and van "
        "Hasselt et al. 2016 (double Q); ours: Adam and its settings, the squared error in place "
        "of Huber's, fixed epsilons, a target network for 10 000 steps",
        {
            "algorithm": "r2d2",
            "total_frames": 40_000_000,
            "environment": ATARI,
            "server": {"num_envs": 8},
            "network": {"network": "nature", "heads": "action_value", "lstm_size": 0},
            "learning": {
                "unroll_steps": 1,
                "burn_in_steps": 0,
                "batch_unrolls": 32,
                "discount": 0.99,
                "n_steps": 1,
                "full_returns": True,
                "rescale_values": False,
                "double_q": True,
                "target_update_interval": 2500,
                "reward_transform": "clip",
                "optimizer": {
                    "optimizer": "adam",
                    "learning_rate": 1e-4,
                    "learning_rate_schedule": "constant",
                    "optimizer_eps": 1.5e-4,
                    "max_gradient_norm": 10.0,
                },
                "replay": {
                    "replay_capacity": 1_000_000,
                    "replay_min": 50_000,
                    "samples_per_insert": 8.0,
                    "priority_exponent": 0.0,
                    "importance_exponent": 0.0,
                },
            },
        },
    ),
    "dqn-control": Preset(
        "Small control tasks such as CartPole-v1 with double DQN, feed-forward and uniform.",
        "ours, chosen among six on CartPole-v1 (docs/results.md)",
        {
            "algorithm": "r2d2",
            "total_frames": 50_000,
            "server": {"num_envs": 8},
            "network": {"network": "mlp", "heads": "action_value", "hidden_sizes": [256, 256]},
            "learning": {
                "unroll_steps": 1,
                "burn_in_steps": 0,
                "batch_unrolls": 64,
                "discount": 0.99,
                "n_steps": 1,
                "full_returns": True,
                "rescale_values": False,
                "target_update_interval": 128,
                "reward_transform": "none",
                "optimizer": {
                    "optimizer": "adam",
                    "learning_rate": 2.3e-3,
                    "learning_rate_schedule": "constant",
                    "optimizer_eps": 1e-8,
                    "max_gradient_norm": 10.0,
                },
                "replay": {
                    "replay_capacity": 50_000,
                    "replay_min": 1_000,
                    "samples_per_insert": 32.0,
                    "priority_exponent": 0.0,
                    "importance_exponent": 0.0,
                },
            },
        },
    ),
}
