"""What several benchmarks ask the user, and how it becomes a `RunConfig`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import tyro
from rich.console import Console
from rich.table import Table

from headrace.config import RunConfig, algorithm_class
from headrace.errors import ConfigError
from headrace.run.complete import complete

Asked = TypeVar("Asked")
"""Arguments of a benchmark."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyArguments:
    """What acts and learns, and where."""

    env: str = "ALE/Pong-v5"
    """Names the environment; its preset gives all settings that are not flags here."""
    algorithm: str = "impala"
    """Names the learning rule; the preset is that of both."""
    preset: str | None = None
    """Names another preset of that learning rule to take all other settings from; None takes the
    environment's."""
    network: str | None = None
    """Names the network: one of the catalog, or auto; None takes the preset's."""
    lstm_size: int | None = None
    """Sets the width of the LSTM after the torso, in units; 0 takes no LSTM, None the preset's."""
    normalize_observations: bool | None = None
    """Normalises observations; None takes the preset's choice."""
    device: str = "auto"
    """Says where networks learn and act: cpu, cuda, cuda:N, or auto, which takes a GPU if there is
    one."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compiles with torch.compile, before the measuring; auto does what a run does here."""
    compute_threads: int = 0
    """Gives each compute stage so many threads; 0 fits them to the cores, as training does."""


SMOKE_POLICY = PolicyArguments(env="catch")


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputArguments:
    """How much, and in which form."""

    json: bool = False
    """Prints one JSON object and nothing else."""
    smoke: bool = False
    """Runs everything for a moment, on catch unless --env is given; the numbers mean nothing."""


def parsed(name: str, argv: Sequence[str], usual: Asked, *, smoke: Asked) -> Asked:
    """Returns what `argv` asks of the benchmark `name`, over what is usual, or over `smoke`."""
    return tyro.cli(
        type(usual),
        config=(tyro.conf.OmitArgPrefixes,),
        args=argv,
        default=smoke if "--smoke" in argv else usual,
        prog=f"headrace bench {name}",
    )


def run_config(
    policy: PolicyArguments,
    *,
    server: Mapping[str, Any],
    learning: Mapping[str, Any] | None = None,
    **settings: Any,
) -> RunConfig:
    """Returns the settings of the environment's preset with the benchmark's own on top.

    Raises:
        ConfigError: the preset that was asked for is that of another learning rule, or none.
    """
    own = {
        "env": policy.env,
        "algorithm": policy.algorithm,
        "preset": policy.preset or "",
        "device": policy.device,
        "compile": policy.compile,
        "compute_threads": policy.compute_threads,
        "inference": "server",  # a stage alone is one of this process, wherever a run has it
        "network": {
            key: value
            for key, value in (
                ("network", policy.network),
                ("lstm_size", policy.lstm_size),
                ("normalize_observations", policy.normalize_observations),
            )
            if value is not None
        },
        "server": {"inference_batch": 0, "eval_envs": 0, **server},
        "learning": learning or {},
        **settings,
    }
    if own["inference"] == "auto":
        del own["inference"]
    return complete(own)


def has_replay(algorithm: str) -> bool:
    """Whether an algorithm learns from a replay."""
    return "replay" in algorithm_class(algorithm).config_type.__dataclass_fields__


def learning_settings(
    algorithm: str,
    *,
    unroll_steps: int | None,
    batch_unrolls: int | None,
    samples_per_insert: float | None = None,
) -> dict[str, Any]:
    """Returns the sizes of unrolls that were given; all others are the preset's.

    A replay is learned from as soon as there is any, so that a benchmark need not wait.
    """
    sizes = {"unroll_steps": unroll_steps, "batch_unrolls": batch_unrolls}
    given: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
    if has_replay(algorithm):
        replay: dict[str, Any] = {"replay_min": 1}
        if samples_per_insert is not None:
            replay["samples_per_insert"] = samples_per_insert
        return {**given, "replay": replay}
    if samples_per_insert is not None:
        raise ConfigError(f"{algorithm} has no replay: leave out --samples-per-insert")
    return given


def check_positive(**values: float) -> None:
    """Refuses what must be above zero.

    Raises:
        ConfigError: names the first that is not.
    """
    for name, value in values.items():
        if value <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be positive, not {value:g}")


def check_rates(**rates: float | None) -> None:
    """Refuses what no stage can have; None is unknown.

    Raises:
        ConfigError: names the first that is not a positive, finite number.
    """
    for name, rate in rates.items():
        if rate is not None and not (math.isfinite(rate) and rate > 0):
            raise ConfigError(f"{name} must be a positive number, not {rate:g}")


def print_rows(title: str, rows: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    """Prints measurements that have the same keys, as a table or as {"rows": [...]}.

    Where there is but one, its keys stand beside "rows" too.
    """
    if as_json:
        only = rows[0] if len(rows) == 1 else {}
        print(json.dumps({**only, "rows": list(rows)}))
        return
    table = Table(title=title)
    for name in rows[0] if rows else ():
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*map(cell, row.values()))
    Console().print(table)


def cell(value: Any) -> str:
    """Returns a value as tables show it: large numbers whole, small ones with three digits."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
