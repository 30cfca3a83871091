"""What presets of several algorithms share."""

from __future__ import annotations

from typing import Any, NamedTuple


class Preset(NamedTuple):
    """One layer of settings, between the defaults and the user's own."""

    summary: str
    source: str
    values: dict[str, Any]  # nested as in config.toml


ATARI: dict[str, Any] = {
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

ATARI_STICKY = {
    **ATARI,
    "noop_max": 0,
    "sticky_probability": 0.25,
    "life_loss_ends_episode": False,
    "full_action_space": True,
}

TANH_MLPS: dict[str, Any] = {
    "network": "mlp",
    "hidden_sizes": [64, 64],
    "activation": "tanh",
    "separate_value": True,
}


def adam(learning_rate: float) -> dict[str, Any]:
    """Returns Adam's settings as PPO's implementations have them, the step falling to zero."""
    return {
        "optimizer": "adam",
        "learning_rate": learning_rate,
        "learning_rate_schedule": "linear",
        "optimizer_eps": 1e-5,
        "max_gradient_norm": 0.5,
    }
