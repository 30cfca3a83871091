"""How a new run's settings come together: defaults < preset < --config < flags."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from headrace import catalog, presets
from headrace.commands.help import HELP_WORDS, show_help
from headrace.config import (
    DEFAULT_ALGORITHM,
    RunConfig,
    foreign_code,
    leaf_paths,
    merged,
    nested,
    reaches_out,
    read_toml,
    section,
    section_types,
    to_dict,
)
from headrace.errors import ConfigError
from headrace.networks.config import NetworkConfig
from headrace.run.complete import complete, layer_below


class Request(NamedTuple):
    """What the user wants trained."""

    config: RunConfig
    asked: dict[str, Any]  # of these, what they asked for: preset, file and flags, nested
    pinned: frozenset[str]  # names of settings in file and flags


def first_pass(
    argv: Sequence[str], parser: argparse.ArgumentParser | None = None
) -> tuple[argparse.Namespace, list[str]]:
    """Reads what decides which other settings there are, and what `parser` knows besides.

    Raises:
        ConfigError: a flag lacks its value, or has a wrong one.
    """
    parser = parser or new_parser()
    for flag in ("--algorithm", "--preset", "--config", "--resume"):
        parser.add_argument(flag)
    parser.add_argument("--trust-code", action="store_true")
    try:
        chosen, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}: see `headrace train --help`") from error
    # The one word that is no flag comes before all flags that only the second pass knows.
    chosen.env = rest.pop(0) if rest and not rest[0].startswith("-") else None
    return chosen, rest


def new_parser() -> argparse.ArgumentParser:
    """Returns a parser for `first_pass`, to add flags to."""
    return argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)


def read_request(
    chosen: argparse.Namespace,
    rest: list[str],
    *,
    prog: str,
    description: str,
    more: type[Any] | None = None,
) -> Request:
    """Puts the layers together, and the remaining flags on top.

    Args:
        chosen: Of `first_pass`.
        rest: Its flags.
        prog: The command, for its help.
        description: The rest of its help.
        more: What else the command takes, for its help.

    Raises:
        ConfigError: names what is wrong.
    """
    file = read_toml(Path(chosen.config)) if chosen.config else {}
    _ensure_trusted(file, chosen, rest)
    named = {key: getattr(chosen, key) for key in ("env", "algorithm", "preset")}
    if HELP_WORDS.intersection(rest):
        named["env"] = chosen.env or file.get("env") or "ALE/Pong-v5"
    given = merged(file, {key: value for key, value in named.items() if value})
    layer = None
    if isinstance(given.get("env"), str):
        layer = layer_below(merged(given, _peeked(given, rest)))
    base = complete(given, layer)
    config = parse_flags(base, rest, prog=prog, description=description, more=more)
    flags = difference(to_dict(base), to_dict(config))
    own = presets.find(chosen.preset).values if chosen.preset else {}
    asked = merged(merged(own, file), flags)
    return Request(config, asked, frozenset(_typed(rest) | set(_leaves(file))))


def _typed(rest: list[str]) -> set[str]:
    """Returns the names of the settings that flags give, --no-NAME for a false one too.

    A name stands for one setting, whatever its section: no two flags have the same.
    """
    names = {word.partition("=")[0] for word in rest if word.startswith("--")}
    names = {name.removeprefix("--").replace("-", "_") for name in names}
    return names | {name.removeprefix("no_") for name in names}


def _ensure_trusted(file: Mapping[str, Any], chosen: argparse.Namespace, rest: list[str]) -> None:
    """Refuses code that only the file names: who has typed a name knows what it stands for.

    Raises:
        ConfigError: names it.
    """
    if chosen.trust_code:
        return
    typed = _typed(rest) | {key for key in ("env", "algorithm") if getattr(chosen, key)}
    left = {key: value for key, value in file.items() if key not in typed}
    for kind, name in foreign_code(left):
        raise catalog.not_trusted(kind, name, who=chosen.config)


def typed_again(base: RunConfig, config: RunConfig, rest: list[str]) -> dict[str, Any]:
    """Returns what a resumed run is to change, nested: what flags in `rest` made of `base`.

    That is also what reaches out and was typed as the run has it: see `config.ensure_typed`.
    """
    changes = _config_difference(base, config)
    given = _typed(rest)
    for name, path in leaf_paths(base.env, base.algorithm).items():
        if name in given and reaches_out(".".join(path)):
            value: Any = config
            for part in path:
                value = getattr(value, part)
            changes = merged(changes, nested(path, value))
    return changes


def _peeked(given: Mapping[str, Any], rest: list[str]) -> dict[str, Any]:
    """Reads the flags that decide what lies below all flags: the environment's, and the LSTM's."""
    rule = given.get("algorithm", DEFAULT_ALGORITHM)
    kinds = {
        "environment": section_types(given["env"], rule)["environment"],
        "network": NetworkConfig,
    }
    found: dict[str, Any] = {}
    for name, kind in kinds.items():
        found[name], _ = tyro.cli(
            kind,
            args=[word for word in _whole_numbers(rest) if word not in HELP_WORDS],
            default=section(kind, given.get(name, {}), name),
            return_unknown_args=True,
            config=(tyro.conf.OmitArgPrefixes,),
        )
    return {
        "environment": found["environment"],
        "network": {"lstm_size": found["network"].lstm_size},
    }


def values_for_file(request: Request, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a --config file must say for `request` with `chosen` on top, and little else.

    That is what was asked for and what was chosen. `train --config` lays them over the preset that
    they name: where that sets more than was wanted, this is said too.

    Raises:
        ConfigError: a setting is None where that preset has a value: TOML cannot say so.
    """
    config = request.config
    named = {"env": config.env, "algorithm": config.algorithm, "preset": config.preset}
    wanted = merged(to_dict(config), chosen)
    values = merged(merged(named, request.asked), chosen)
    got = to_dict(complete(values))
    values = merged(values, difference(got, wanted))
    lost = set(_leaves(got)) - set(_leaves(wanted))
    if lost:
        raise ConfigError(
            f"{min(lost)} is None, and a TOML file cannot say so where a preset has a value: give "
            f"--{min(lost).replace('_', '-')} a value"
        )
    return values


def parse_flags(
    base: RunConfig,
    argv: list[str],
    *,
    prog: str,
    description: str,
    more: type[Any] | None = None,
) -> RunConfig:
    """Lays flags over `base`; every setting is a flag, named as its field.

    Where help is asked for, it is shown, and the process ends.

    Raises:
        ConfigError: names what is wrong.
    """
    if HELP_WORDS.intersection(argv):
        show_help(base, argv, prog=prog, description=description, more=more)
    config: RunConfig = tyro.cli(
        tyro.conf.OmitArgPrefixes[RunConfig],
        args=_whole_numbers(argv),
        default=base,
        prog=prog,
        description=description,
    )
    if (config.env, config.algorithm) != (base.env, base.algorithm):
        raise ConfigError("name the environment first: headrace train ENV [settings]")
    return config


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what `after` sets otherwise, nested as both are."""
    changes: dict[str, Any] = {}
    for key, value in after.items():
        if isinstance(value, Mapping):
            nested = difference(before.get(key, {}), value)
            changes |= {key: nested} if nested else {}
        elif value != before.get(key):
            changes[key] = value
    return changes


def _whole_numbers(argv: list[str]) -> list[str]:
    """Turns --total-frames 1e7 and 10_000_000 into digits; frames are counted in millions."""
    words = [part for word in argv for part in _split_total_frames(word)]
    for index in range(1, len(words)):
        if words[index - 1] == "--total-frames":
            try:
                words[index] = str(int(float(words[index].replace("_", ""))))
            except (ValueError, OverflowError) as error:
                raise ConfigError(
                    f"--total-frames must be a number such as 2e7, not {words[index]!r}"
                ) from error
    return words


def _split_total_frames(word: str) -> list[str]:
    flag, equals, value = word.partition("=")
    if flag not in ("--total-frames", "--total_frames"):
        return [word]
    return ["--total-frames", value] if equals else ["--total-frames"]


def _leaves(values: Mapping[str, Any]) -> Iterator[str]:
    """Yields the own name of every value."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value)
        else:
            yield key


def _config_difference(before: RunConfig, after: RunConfig) -> dict[str, Any]:
    """Returns the settings that two configs differ in; None is one too."""
    return difference(dataclasses.asdict(before), dataclasses.asdict(after))
