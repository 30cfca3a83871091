"""Named settings: what they set, and where the numbers come from."""

from __future__ import annotations

import re

from headrace import catalog
from headrace.errors import ConfigError
from headrace.presets.impala import IMPALA
from headrace.presets.parts import Preset
from headrace.presets.ppo import PPO
from headrace.presets.r2d2 import R2D2
from headrace.presets.sac import SAC

PRESETS = {**IMPALA, **PPO, **R2D2, **SAC}

_MUJOCO = "(Ant|HalfCheetah|Hopper|Humanoid|HumanoidStandup|Inverted(Double)?Pendulum|Pusher|"
_MUJOCO += "Reacher|Swimmer|Walker2d)-v[0-9]+"
_CONTINUOUS = "(MountainCarContinuous|Pendulum)-v[0-9]+"
_CLASSIC = "(Acrobot|CartPole|MountainCar|LunarLander)-v[0-9]+"

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
    (f"(envpool:)?{_MUJOCO}", "sac-mujoco"),
    (f"pointmass|(envpool:)?{_CONTINUOUS}", "sac-control"),
)
"""What `headrace train ENV` takes where no --preset is given: the first whose names (a regular
expression) and whose algorithm fit."""


BY_STRUCTURE = {
    ("impala", "vector", "discrete"): "control",
    ("impala", "vector", "continuous"): "continuous",
    ("impala", "image", "discrete"): "images",
    ("impala", "image", "continuous"): "images",
    ("ppo", "vector", "discrete"): "ppo-control",
    ("ppo", "vector", "continuous"): "ppo-continuous",
    ("ppo", "image", "discrete"): "ppo-images",
    ("ppo", "image", "continuous"): "ppo-images",
    ("r2d2", "vector", "discrete"): "r2d2-vectors",
    ("r2d2", "image", "discrete"): "r2d2-images",
    ("sac", "vector", "continuous"): "sac-continuous",
    ("sac", "image", "continuous"): "sac-images",
}
"""What it takes where none of `UNASKED` fits: by algorithm, observations and actions."""


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
