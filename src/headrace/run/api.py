"""The Python twin of the command line."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from headrace import presets
from headrace.config import (
    FREE_ON_RESUME,
    RunConfig,
    completed,
    from_dict,
    merged,
    read_toml,
    to_toml,
)
from headrace.errors import ConfigError
from headrace.run.local import Hooks, TrainResult, run_training
from headrace.run.report import Row
from headrace.telemetry.record import RunDirectory, log_to

logger = logging.getLogger("headrace")


def preset(name: str, env: str, **overrides: Any) -> RunConfig:
    """Returns the settings of a preset for an environment, with some of them replaced.

    Args:
        name: See `headrace presets`.
        env: Environment, such as ALE/Pong-v5.
        overrides: Settings as in config.toml; a section is a dict, such as `server={"num_envs": 16}`.

    Raises:
        ConfigError: no such preset or setting.
    """
    return from_dict(merged(presets.find(name).values, {"env": env, **overrides}))


def default_run_directory(config: RunConfig) -> Path:
    """Returns runs/ENV-ALGORITHM-DATE."""
    env = config.env.removeprefix("ALE/").removesuffix("-v5").replace("/", "-").replace(":", "-")
    date = datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{env.lower()}-{config.algorithm.replace(':', '-')}-{date}"


def train(
    config: RunConfig | None = None,
    *,
    resume: str | Path | None = None,
    changes: Mapping[str, Any] | None = None,
    on_update: Callable[[int, Mapping[str, Tensor]], None] | None = None,
    on_checkpoint: Callable[[Path], None] | None = None,
    on_row: Callable[[Row], None] | None = None,
    on_message: Callable[[str], None] | None = None,
    on_start: Callable[[RunConfig, Path], None] | None = None,
    trust_code: bool = True,
) -> TrainResult:
    """Trains a new run, or goes on with one.

    Args:
        config: A new run's settings.
        resume: Run directory to go on with, instead of `config`.
        changes: On resume: settings that replace the run's; only those in `config.FREE_ON_RESUME` may.
        on_update: Called after every update with the number of updates and metrics on the device.
        on_checkpoint: Called after every checkpoint with its folder.
        on_row: Called at every report with the row that metrics.jsonl gets.
        on_message: Called with things worth a line; they are logged in any case.
        on_start: Called once with the complete settings and the run directory, before anything starts.
        trust_code: Whether to import code that the settings name from outside headrace.

    Returns:
        The run directory, its last row of metrics, and whether total_frames was reached.

    Raises:
        ConfigError: something was wrong before anything started.
        TrainingDiverged: a loss or a gradient was not finite.
    """
    if (config is None) == (resume is None):
        raise ConfigError("give either a config for a new run, or resume=RUN to go on with one")
    if resume is not None:
        run = RunDirectory.open(Path(resume))
        full = resumed_config(run, changes or {}, trust_code=trust_code)
    else:
        assert config is not None  # checked above; mypy cannot see it
        full = completed(config, trust_code=trust_code)
        path = Path(full.out) if full.out else default_run_directory(full)
        full = dataclasses.replace(full, out=str(path))
        run = RunDirectory.create(path, to_toml(full))

    def tell(text: str) -> None:
        logger.info(text)
        if on_message is not None:
            on_message(text)

    hooks = Hooks(
        on_row=on_row or (lambda _: None),
        on_update=on_update or (lambda *_: None),
        on_checkpoint=on_checkpoint or (lambda _: None),
        on_message=tell,
    )
    if on_start is not None:
        on_start(full, run.path)
    with log_to(run.log_path):
        return run_training(
            full, run, resume=resume is not None, hooks=hooks, trust_code=trust_code
        )


def resumed_config(
    run: RunDirectory, changes: Mapping[str, Any], *, trust_code: bool
) -> RunConfig:
    """Returns the run's own settings with `changes`.

    Raises:
        ConfigError: names a setting that a resumed run may not change.
    """
    kept = sorted(set(changes) - FREE_ON_RESUME)
    if kept:
        raise ConfigError(
            f"{kept[0]} belongs to the run and cannot change on --resume; "
            f"these can: {', '.join(sorted(FREE_ON_RESUME))}"
        )
    return from_dict(merged(read_toml(run.config_path), changes), trust_code=trust_code)
