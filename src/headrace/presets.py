"""Named settings: what they set, and where the numbers come from."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from headrace import catalog
from headrace.errors import ConfigError


class Preset(NamedTuple):
    """One layer of settings, between the defaults and the user's own."""

    summary: str
    source: str
    values: dict[str, Any]  # nested as in config.toml


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

_ATARI: dict[str, Any] = {
    "frame_skip": 4,
    "max_pool": True,
    "frame_size": 84,
    "frame_stack": 4,
    "noop_max": 30,
    "sticky_probability": 0.0,
    "life_loss_ends_episode": True,
    "full_action_space": False,
    "max_episode_frames": 108_000,
}

_ATARI_STICKY = {
    **_ATARI,
    "noop_max": 0,
    "sticky_probability": 0.25,
    "life_loss_ends_episode": False,
    "full_action_space": True,
}

_TANH_MLPS: dict[str, Any] = {
    "network": "mlp",
    "hidden_sizes": [64, 64],
    "activation": "tanh",
    "separate_value": True,
}


# The published loss is summed over the T learned steps of a sequence; ours is a mean.
_R2D2_STEPS = 80

_R2D2_ATARI: dict[str, Any] = {
    "unroll_steps": _R2D2_STEPS,
    "burn_in_steps": 40,
    "overlap_steps": 80,
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


def _adam(learning_rate: float) -> dict[str, Any]:
    return {
        "optimizer": "adam",
        "learning_rate": learning_rate,
        "learning_rate_schedule": "linear",
        "optimizer_eps": 1e-5,
        "max_gradient_norm": 0.5,
    }


PRESETS = {
    "atari": Preset(
        "One Atari game as the IMPALA paper trains its experts: deep network, 200 million frames.",
        "Espeholt et al. 2018, arXiv:1802.01561, Table G.1; summed loss converted to a mean",
        {**_IMPALA_ATARI, "environment": _ATARI},
    ),
    "atari-sticky": Preset(
        "The same, modern protocol: sticky actions, whole games, all 18 actions, no no-ops.",
        "Machado et al. 2018, arXiv:1709.06009, sections 4 and 5; learning as in preset atari",
        {**_IMPALA_ATARI, "environment": _ATARI_STICKY},
    ),
    "atari-desktop": Preset(
        "One Atari game on a machine of few cores: shallow network, small batches, Adam.",
        "ours, measured in docs/results.md; environment as in preset atari",
        {
            **_IMPALA_ATARI,
            "total_frames": 20_000_000,
            "environment": _ATARI,
            "server": {"num_envs": 32},
            "network": {"network": "impala_shallow", "lstm_size": 0},
            "learning": {
                **_IMPALA_ATARI["learning"],
                "batch_unrolls": 4,
                "entropy_cost": 0.003,
                "vtrace_lambda": 0.95,
                "optimizer": {
                    "optimizer": "adam",
                    "learning_rate": 5e-4,
                    "learning_rate_schedule": "linear",
                    "optimizer_eps": 1e-5,
                    "max_gradient_norm": 0.5,
                },
            },
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
            "total_frames": 150_000,
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
        "Small control tasks such as CartPole-v1, in a minute on two cores.",
        "ours, chosen on CartPole-v1 among seven; the test of learning in tests/learning",
        {
            "algorithm": "impala",
            "total_frames": 300_000,
            "server": {"num_envs": 16},
            "network": _TANH_MLPS,
            "learning": {
                "unroll_steps": 20,
                "batch_unrolls": 16,
                "entropy_cost": 0.003,
                "vtrace_lambda": 0.95,
                "reward_transform": "none",
                "reward_scale": 0.1,
                "optimizer": _adam(2e-3),
            },
        },
    ),
    "mujoco-impala": Preset(
        "MuJoCo tasks with V-trace: two small networks, normalised observations and rewards.",
        "ours, chosen among five on HalfCheetah-v5 (docs/results.md); network, discount and "
        "value cost as SEED RL, google-research/seed_rl@0a4729d, mujoco/vtrace_main.py",
        {
            "algorithm": "impala",
            "total_frames": 3_000_000,
            "server": {"num_envs": 16},
            "network": {**_TANH_MLPS, "normalize_observations": True, "initial_log_std": -0.5},
            "learning": {
                "unroll_steps": 32,
                "batch_unrolls": 16,
                "discount": 0.99,
                "entropy_cost": 1e-5,
                "value_cost": 0.5,
                "vtrace_lambda": 0.95,
                "reward_transform": "normalize",
                "optimizer": _adam(1e-3),
            },
        },
    ),
    "ppo-atari": Preset(
        "One Atari game with PPO: 8 environments, 128 steps, 4 epochs; environment as in atari.",
        "CleanRL ppo_atari.py@09f7a7f; 10 million steps of 4 frames",
        {
            "algorithm": "ppo",
            "total_frames": 40_000_000,
            "environment": _ATARI,
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
                "optimizer": _adam(2.5e-4),
            },
        },
    ),
    "ppo-mujoco": Preset(
        "MuJoCo tasks with PPO: one environment, 2048 steps, 10 epochs of 32 minibatches.",
        "CleanRL ppo_continuous_action.py@016ca33; there actions are clipped, here squashed",
        {
            "algorithm": "ppo",
            "total_frames": 1_000_000,
            "server": {"num_envs": 1},
            "network": {**_TANH_MLPS, "normalize_observations": True, "initial_log_std": 0.0},
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
                "optimizer": _adam(3e-4),
            },
        },
    ),
    "ppo-control": Preset(
        "Small control tasks such as CartPole-v1 with PPO, in half a minute on two cores.",
        "ours, one of two tried on CartPole-v1, seeds 1 and 2 (docs/results.md)",
        {
            "algorithm": "ppo",
            "total_frames": 150_000,
            "server": {"num_envs": 8},
            "network": _TANH_MLPS,
            "learning": {
                "unroll_steps": 32,
                "batch_unrolls": 8,
                "epochs": 10,
                "minibatches": 1,
                "discount": 0.98,
                "gae_lambda": 0.9,
                "entropy_cost": 0.0,
                "reward_transform": "none",
                "optimizer": _adam(1e-3),
            },
        },
    ),
    "r2d2-atari": Preset(
        "One Atari game as R2D2 trains it: 256 environments, LSTM, a replay of 4 million steps.",
        "Kapturowski et al. 2019 (R2D2), section 3 and appendix; clip as SEED RL, "
        "gcp/train_atari.sh; summed loss converted to a mean. Needs 30 GB for the replay",
        {
            "algorithm": "r2d2",
            "total_frames": 10_000_000_000,
            "environment": {
                **_ATARI,
                "life_loss_ends_episode": False,
                "full_action_space": True,
            },
            "server": {"num_envs": 256},
            "network": {"network": "r2d2", "lstm_size": 512},
            "learning": _R2D2_ATARI,
        },
    ),
    "r2d2-small": Preset(
        "One Atari game with R2D2 on a few cores and 8 GB: shorter sequences, a smaller LSTM.",
        "ours (docs/results.md); environment as in preset atari, but for lost lives",
        {
            "algorithm": "r2d2",
            "total_frames": 20_000_000,
            "environment": {**_ATARI, "life_loss_ends_episode": False},
            "server": {"num_envs": 32},
            "network": {"network": "r2d2", "lstm_size": 256},
            "learning": {
                **_R2D2_ATARI,
                "unroll_steps": 20,
                "burn_in_steps": 10,
                "overlap_steps": 10,
                "batch_unrolls": 32,
                "discount": 0.99,
                "target_update_interval": 500,
                "reward_transform": "clip",
                "optimizer": {
                    **_R2D2_ATARI["optimizer"],
                    "learning_rate": 3e-4,
                    "optimizer_eps": 1e-5,
                    "max_gradient_norm": 1.0,
                },
                "replay": {
                    **_R2D2_ATARI["replay"],
                    "replay_capacity": 15_000,
                    "replay_min": 1_000,
                    "samples_per_insert": 2.0,
                },
            },
        },
    ),
    "r2d2-control": Preset(
        "Small tasks with vectors or few numbers, recall among them, with R2D2.",
        "ours; the test of learning in tests/learning",
        {
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
        },
    ),
    "dqn-atari": Preset(
        "One Atari game with double DQN, feed-forward and uniform, eight environments.",
        "Mnih et al. 2015 (network, discount, batch, target, learning from one step in four) and "
        "van Hasselt et al. 2016 (double Q); Adam in place of RMSProp, fixed epsilons",
        {
            "algorithm": "r2d2",
            "total_frames": 40_000_000,
            "environment": _ATARI,
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
        "ours; the test of learning in tests/learning",
        {
            "algorithm": "r2d2",
            "total_frames": 100_000,
            "server": {"num_envs": 8},
            "network": {"network": "mlp", "heads": "action_value", "hidden_sizes": [128, 128]},
            "learning": {
                "unroll_steps": 1,
                "burn_in_steps": 0,
                "batch_unrolls": 128,
                "discount": 0.99,
                "n_steps": 3,
                "full_returns": True,
                "rescale_values": False,
                "target_update_interval": 200,
                "reward_transform": "none",
                "optimizer": {
                    "optimizer": "adam",
                    "learning_rate": 1e-3,
                    "learning_rate_schedule": "linear",
                    "optimizer_eps": 1e-5,
                    "max_gradient_norm": 10.0,
                },
                "replay": {
                    "replay_capacity": 50_000,
                    "replay_min": 1_000,
                    "samples_per_insert": 16.0,
                    "priority_exponent": 0.0,
                    "importance_exponent": 0.0,
                },
            },
        },
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

_MUJOCO = "(Ant|HalfCheetah|Hopper|Humanoid|HumanoidStandup|Inverted(Double)?Pendulum|Pusher|"
_MUJOCO += "Reacher|Swimmer|Walker2d)-v[0-9]+"
_CLASSIC = "(Acrobot|CartPole|MountainCar|MountainCarContinuous|Pendulum|LunarLander)-v[0-9]+"

UNASKED = (
    ("ALE/.+", "atari-desktop"),
    ("ALE/.+", "ppo-atari"),
    ("ALE/.+", "r2d2-small"),
    ("catch", "catch"),
    ("recall", "recall"),
    ("pointmass", "pointmass"),
    ("envpool:gfootball/.+", "football"),
    (f"(envpool:)?{_MUJOCO}", "mujoco-impala"),
    (f"(envpool:)?{_MUJOCO}", "ppo-mujoco"),
    (f"(envpool:)?{_CLASSIC}", "control"),
    (f"(envpool:)?{_CLASSIC}", "ppo-control"),
    (f"catch|recall|(envpool:)?{_CLASSIC}", "r2d2-control"),
)
"""What `headrace train ENV` takes where no --preset is given: the first whose names (a regular
expression) and whose algorithm fit."""


def find(name: str) -> Preset:
    """Returns a preset.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in PRESETS:
        raise ConfigError(f"no preset named {name!r}; {catalog.nearest(name, PRESETS)}")
    return PRESETS[name]


def default_for(env: str, algorithm: str | None = None) -> str | None:
    """Returns the name of the preset that an environment is trained with unasked, if any."""
    for names, name in UNASKED:
        own = PRESETS[name].values.get("algorithm", "impala")
        if re.fullmatch(names, env) and own == (algorithm or "impala"):
            return name
    return None
