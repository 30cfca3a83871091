"""How settings become complete: defaults < preset < what was given, in Python as by flags.

Where no preset was asked for, it is the one that is made for environment and algorithm, or else
the one for observations and actions like the environment's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import gymnasium as gym

from headrace import catalog, pictures, presets
from headrace.config import (
    DEFAULT_ALGORITHM,
    RunConfig,
    from_dict,
    leaf_paths,
    merged,
    nested,
    section,
    section_types,
)
from headrace.envs import gymnasium
from headrace.errors import ConfigError
from headrace.networks.models import default_network
from headrace.networks.structured import image_of
from headrace.pools.settings import WorkerConfig
from headrace.run.trial import try_environment
from headrace.specs import EnvSpec


class Layer(NamedTuple):
    """What lies below the settings that were given."""

    name: str  # of a preset; empty for none
    values: dict[str, Any]  # nested as in config.toml


def make_config(
    env: str, *, algorithm: str | None = None, preset: str | None = None, **settings: Any
) -> RunConfig:
    """Returns the complete settings that `headrace train ENV` has with the same words as flags.

    Args:
        env: Environment, such as ALE/Pong-v5 or my_module:factory.
        algorithm: Learning rule; None for the preset's, or else impala.
        preset: Named settings to begin with; None for those that suit the environment.
        settings: By the names of the flags, such as `learning_rate=1e-3`; or whole sections of
            config.toml: a dict is laid over, an object such as a `ServerConfig` is taken as it
            stands.

    Raises:
        ConfigError: there is no such environment, preset or setting, or a value does not fit.
    """
    gymnasium.forget()
    named = {"env": env, "algorithm": algorithm, "preset": preset}
    named = {name: value for name, value in named.items() if value is not None}
    rule = algorithm or (_rule_of(preset) if preset else DEFAULT_ALGORITHM)
    return complete({**_nested(env, rule, settings), **named})


def completed_as_typed(config: RunConfig) -> RunConfig:
    """Returns `config` with all that it was not given filled in as `headrace train` does.

    Raises:
        ConfigError: a value does not fit.
    """
    fields = (entry.name for entry in dataclasses.fields(config))
    values = {name: getattr(config, name) for name in fields}
    return complete({name: value for name, value in values.items() if value is not None})


def complete(given: Mapping[str, Any], layer: Layer | None = None) -> RunConfig:
    """Returns complete settings from some, nested as in config.toml; sections may be objects.

    `layer` is what lies below, where that is known already: see `layer_below`.

    Raises:
        ConfigError: names what is wrong.
    """
    words = (given.get(name, "") for name in ("env", "algorithm", "preset"))
    if "env" not in given or not all(isinstance(word, str) for word in words):
        from_dict(given)  # raises
    name, below = layer_below(given) if layer is None else layer
    whole = {key: value for key, value in given.items() if dataclasses.is_dataclass(value)}
    rest = {key: value for key, value in given.items() if key not in whole}
    below = {key: value for key, value in below.items() if key not in whole}
    if not (given.get("preset") or below.keys() - rest.keys() or _has_dicts(rest)):
        name = ""  # nothing is left for it to say
    config = from_dict(merged(below, {**rest, "preset": name}))
    kinds = {key: type(getattr(config, key)) for key in whole if hasattr(config, key)}
    return dataclasses.replace(
        config, **{key: section(kinds[key], value, key) for key, value in whole.items()}
    )


def layer_below(given: Mapping[str, Any]) -> Layer:
    """Returns the preset below `given`, as it suits what is given.

    An algorithm of the user's own has its own defaults, and server and length as IMPALA's.

    Raises:
        ConfigError: there is no such preset, or it is another algorithm's.
    """
    env, rule = given["env"], given.get("algorithm")
    name = given.get("preset") or presets.default_for(env, rule)
    values = presets.find(name).values if name else {}
    if rule and name and values.get("algorithm", DEFAULT_ALGORITHM) != rule:
        own = values.get("algorithm", DEFAULT_ALGORITHM)
        raise ConfigError(
            f"preset {name} is for {own}, not {rule}: say --algorithm {own}, or another --preset"
        )
    if not name:
        name, values = _by_structure(given, rule or DEFAULT_ALGORITHM)
    network = given.get("network")
    if isinstance(network, Mapping) and network.get("lstm_size"):
        # Policy and value share an LSTM, so that they cannot have torsos of their own.
        values = merged(values, {"network": {"separate_value": False}})
    return Layer(name, values)


def structure_of(spec: EnvSpec, kinds: pictures.Kinds = "any") -> tuple[str, str]:
    """Says what a policy deals with: "image" or "vector", and "discrete" or "continuous"."""
    if spec.structure is not None:
        sees_images = any(image_of(leaf, kinds) for leaf in pictures.parts_of(spec))
    else:
        sees_images = default_network(spec, kinds) == "nature"
    is_continuous = isinstance(spec.action_space, gym.spaces.Box)
    return "image" if sees_images else "vector", "continuous" if is_continuous else "discrete"


def _by_structure(given: Mapping[str, Any], rule: str) -> Layer:
    """Returns the preset for observations and actions like those of `given`'s environment."""
    env = given["env"]
    kind = section_types(env, rule)["environment"]
    settings = section(kind, given.get("environment") or {}, "environment")
    if given.get("pool") != "inline" and not given.get("lockstep"):
        # Made here below, it could take this process with it.
        try_environment(env, settings, timeout_s=WorkerConfig().start_timeout_s)
    spec = catalog.environment_family(env).spec(env, settings)
    network = given.get("network")
    only_bytes = isinstance(network, Mapping) and network.get("pictures") == "bytes"
    structure = structure_of(spec, "bytes" if only_bytes else "any")
    name = presets.BY_STRUCTURE.get((rule, *structure), "")
    if name:
        values = presets.find(name).values
        if spec.structure is not None:
            values = merged(values, {"network": {"network": "auto"}})
        return Layer(name, values)
    if rule in catalog.ALGORITHMS:  # it does not take such actions, and will say so
        return Layer("", {"algorithm": rule})
    values = presets.find(presets.BY_STRUCTURE[DEFAULT_ALGORITHM, *structure]).values
    kept = {key: values[key] for key in ("server", "total_frames")}
    return Layer("", {**kept, "algorithm": rule, "network": {"normalize_observations": True}})


def _has_dicts(given: Mapping[str, Any]) -> bool:
    return any(isinstance(value, Mapping) for value in given.values())


def _rule_of(preset: str) -> str:
    rule: str = presets.find(preset).values.get("algorithm", DEFAULT_ALGORITHM)
    return rule


def _nested(env: str, rule: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Puts settings that were given by their own names into their sections.

    Raises:
        ConfigError: there is none of that name.
    """
    sections = {entry.name for entry in dataclasses.fields(RunConfig)}
    paths = leaf_paths(env, rule)
    values: dict[str, Any] = {}
    for name, value in settings.items():
        is_section = isinstance(value, Mapping) or dataclasses.is_dataclass(value)
        if name in sections and is_section:
            path: tuple[str, ...] = (name,)
        elif name in paths:
            path = paths[name]
        elif name in sections:
            raise ConfigError(f"{name} is a section: give a dict of its settings, not {value!r}")
        else:
            known = {*paths, *sections}
            raise ConfigError(f"no setting named {name}; {catalog.nearest(name, known)}")
        both = values.get(path[0]), value
        if path[0] in values and any(map(dataclasses.is_dataclass, both)):
            raise ConfigError(
                f"{path[0]} was given whole, and a setting of it too: give {path[0]} as a dict, or "
                "put the setting into it"
            )
        values = merged(values, nested(path, value))
    return values
