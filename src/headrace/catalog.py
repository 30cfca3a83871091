"""name -> "module:attribute": the one place to register. What is not chosen is not imported."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from headrace.errors import ConfigError
from headrace.imports import has_no, import_named

ALGORITHMS = {
    "impala": "headrace.algorithms.impala:Impala",
    "ppo": "headrace.algorithms.ppo:Ppo",
    "pqn": "headrace.algorithms.pqn:Pqn",
    "r2d2": "headrace.algorithms.r2d2:R2d2",
    "sac": "headrace.algorithms.sac:Sac",
    "td3": "headrace.algorithms.td3:Td3",
}
NETWORKS = {
    "football": "headrace.networks.models:football",
    "impala_deep": "headrace.networks.models:impala_deep",
    "impala_shallow": "headrace.networks.models:impala_shallow",
    "mlp": "headrace.networks.models:mlp",
    "nature": "headrace.networks.models:nature",
    "r2d2": "headrace.networks.r2d2:r2d2",
    "structured": "headrace.networks.structured:structured",
}
ENVIRONMENTS = {  # a name that ends in / or : stands for all names that begin with it
    "ALE/": "headrace.envs.atari:ATARI",
    "catch": "headrace.envs.catch:CATCH",
    "envpool:": "headrace.envs.envpool:ENVPOOL",
    "pointmass": "headrace.envs.pointmass:POINTMASS",
    "recall": "headrace.envs.recall:RECALL",
}
GYMNASIUM = "headrace.envs.gymnasium:GYMNASIUM"
"""Family of every other name, and of a user's "module:factory"."""
POOLS = {
    "device": "headrace.pools.device:DevicePool",
    "grpc": "headrace.pools.grpc:GrpcPool",
    "inline": "headrace.pools.inline:InlinePool",
    "native": "headrace.pools.native:NativePool",
    "shm": "headrace.pools.shm:ShmPool",
}


def resolve(kind: str, table: Mapping[str, str], name: str, *, trust_code: bool = True) -> Any:
    """Imports what `name` stands for: an entry of `table`, or a user's own "module:attribute".

    Args:
        kind: What it is, for the error message.
        table: One of the tables above.
        name: What the user typed.
        trust_code: Whether a module outside the catalog may be imported. A run that somebody else
            made names such modules too: loading it must not run their code unasked.

    Raises:
        ConfigError: no such name, or code that is not trusted.
    """
    target = table.get(name)
    if target is None and ":" not in name:
        raise ConfigError(f"no {kind} named {name!r}; {nearest(name, table)}")
    if not trust_code and is_foreign(table, name):
        raise not_trusted(kind, name)
    return import_attribute(kind, target or name)


def is_foreign(table: Mapping[str, str], name: str) -> bool:
    """Whether `name` stands for code outside headrace, as Gymnasium's "module:ID-v0" does too."""
    return ":" in name and not any(_covers(entry, name) for entry in table)


def not_trusted(kind: str, name: str, *, who: str = "this run") -> ConfigError:
    """Returns what is raised where `who` names code that is not trusted."""
    return ConfigError(
        f"{who} names the {kind} {name!r}, which is code outside headrace: "
        "read it, then say --trust-code (trust_code=True) to import it"
    )


def import_attribute(kind: str, target: str) -> Any:
    """Imports "module:attribute"."""
    module_name, _, attribute = target.partition(":")
    try:
        module = import_named(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"cannot import the {kind} {target!r}: {error} (modules are looked for in PYTHONPATH "
            "and, last, in this folder)"
        ) from error
    except Exception as error:
        raise ConfigError(
            f"cannot import the {kind} {target!r}: {type(error).__name__}: {error}"
        ) from error
    if not attribute or not hasattr(module, attribute):
        raise ConfigError(f"cannot import the {kind} {target!r}: {has_no(module, attribute)}")
    return getattr(module, attribute)


def environment_family(env: str, *, trust_code: bool = True) -> Any:
    """Returns the `envs.base.Family` of an environment's name.

    A user's "module:attribute" is a family, or else a factory of Gymnasium environments; so is
    Gymnasium's own "module:ID-v0". Every name that is not ours is taken for a Gymnasium id; its
    family knows which there are.
    """
    for name, target in ENVIRONMENTS.items():
        if _covers(name, env):
            return import_attribute("environment", target)
    if not trust_code and is_foreign(ENVIRONMENTS, env):
        raise not_trusted("environment", env)
    if env.rpartition(":")[2].isidentifier() and ":" in env:
        own = import_attribute("environment", env)
        if hasattr(own, "config_type"):
            return own
    elif not re.search(r"/|-v\d+$", env):  # no name that Gymnasium could know
        ours = [name for name in ENVIRONMENTS if name[-1] not in "/:"]
        near = difflib.get_close_matches(env.lower(), ours, 1)
        atari = f"ALE/{env[:1].upper()}{env[1:]}-v5"
        raise ConfigError(
            f"no environment named {env!r}; did you mean {near[0] if near else atari}? Ours: "
            f"{', '.join(ours)}; all others have names such as ALE/Pong-v5, CartPole-v1 or "
            "my_module:factory; see `headrace envs`"
        )
    return import_attribute("environment", GYMNASIUM)


def _covers(entry: str, name: str) -> bool:
    return entry == name or (entry.endswith(("/", ":")) and name.startswith(entry))


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns a hint: the nearest known names, or all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, 3)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)}"
