"""Named settings: what they set, and where the numbers come from."""

from __future__ import annotations

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
}

DEFAULT_PRESETS = {"ALE/": "atari-desktop", "catch": "catch", "recall": "recall"}
"""What `headrace train ENV` takes where no --preset is given, by how the name begins."""


def find(name: str) -> Preset:
    """Returns a preset.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in PRESETS:
        raise ConfigError(f"no preset named {name!r}; {catalog.nearest(name, PRESETS)}")
    return PRESETS[name]


def default_for(env: str) -> str | None:
    """Returns the name of the preset that an environment is trained with unasked."""
    return next((name for start, name in DEFAULT_PRESETS.items() if env.startswith(start)), None)
