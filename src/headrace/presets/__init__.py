"""Named settings: what they set, and where the numbers come from. A preset is one file, NAME.toml.

It begins with what is said of the preset: `summary`, `source` and, where docs/results.md has them,
`score` and `command`. The rest is written as in a run's config.toml. A preset that `extends`
another is that one's settings, less the sections that `without` names, with its own laid on top.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from importlib import resources
from typing import Any, NamedTuple

from headrace import catalog
from headrace.config import merged
from headrace.errors import ConfigError


class Preset(NamedTuple):
    """One layer of settings, between the defaults and the user's own."""

    summary: str
    source: str
    values: dict[str, Any]  # nested as in config.toml
    score: str = ""  # what came out, as in docs/results.md; empty: nothing to tell yet
    command: str = ""  # what was typed for that


_SAID = ("summary", "source", "score", "command", "extends", "without")


def _read_all() -> dict[str, Preset]:
    """Returns all presets, those of one algorithm together."""
    files = {
        file.name.removesuffix(".toml"): tomllib.loads(file.read_text(encoding="utf-8"))
        for file in resources.files(__name__).iterdir()
        if file.name.endswith(".toml")
    }
    found = {}
    for name, said in files.items():
        values = _values(name, files)
        result = {key: said[key] for key in ("score", "command") if key in said}
        found[name] = Preset(said["summary"], said["source"], values, **result)
    return dict(sorted(found.items(), key=lambda item: (_algorithm(item[1]), item[0])))


def _values(name: str, files: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns the settings of one file, over those of the one that it extends."""
    file = files[name]
    own = {key: value for key, value in file.items() if key not in _SAID}
    if "extends" not in file:
        return own
    base = _values(file["extends"], files)
    return merged({key: base[key] for key in base if key not in file.get("without", ())}, own)


def _algorithm(preset: Preset) -> str:
    algorithm: str = preset.values.get("algorithm", "impala")
    return algorithm


PRESETS = _read_all()

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
    (f"pointmass|(envpool:)?{_CONTINUOUS}", "td3-control"),
    (f"catch|(envpool:)?{_CLASSIC}", "pqn-control"),
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
    ("td3", "vector", "continuous"): "td3-continuous",
    ("td3", "image", "continuous"): "td3-images",
    ("pqn", "vector", "discrete"): "pqn-control",
    ("pqn", "image", "discrete"): "pqn-images",
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
        if re.fullmatch(names, env) and _algorithm(PRESETS[name]) == (algorithm or "impala"):
            return name
    return None
