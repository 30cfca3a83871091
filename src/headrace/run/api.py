"""The Python twin of the command line."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from headrace.apart import Apart, known
from headrace.config import (
    FREE_ON_RESUME,
    RunConfig,
    ensure_typed,
    from_dict,
    merged,
    of_a_run,
    parse_toml,
    to_toml,
)
from headrace.envs import gymnasium
from headrace.errors import ConfigError
from headrace.length import clock_from
from headrace.run.complete import completed_as_typed, make_config
from headrace.run.local import Hooks, TrainResult, run_training
from headrace.run.report import Row
from headrace.run.resume import kept_horizon
from headrace.run.trial import try_environment
from headrace.run.validate import check
from headrace.telemetry.live_text import without_token
from headrace.telemetry.record import FolderInUse, RunDirectory, log_to
from headrace.telemetry.wandb_log import ensure_wandb
from headrace.transport.grpc_server import check_listen

logger = logging.getLogger("headrace")


def preset(name: str, env: str, **overrides: Any) -> RunConfig:
    """Returns the settings of a preset for an environment, with some of them replaced.

    Args:
        name: See `headrace presets`.
        env: Environment, such as ALE/Pong-v5.
        overrides: See `make_config`, such as `num_envs=16` or `server={"num_envs": 16}`.

    Raises:
        ConfigError: no such preset or setting.
    """
    return make_config(env, preset=name, **overrides)


def default_run_directory(config: RunConfig) -> Path:
    """Returns runs/ENV-ALGORITHM-DATE."""
    env = config.env.removeprefix("ALE/").removesuffix("-v5").replace("/", "-").replace(":", "-")
    date = datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{env.lower()}-{config.algorithm.replace(':', '-')}-{date}"


class Prepared(NamedTuple):
    """A run that is ready to start: complete settings, and the folder that holds them."""

    config: RunConfig
    directory: RunDirectory
    resume: bool
    trust_code: bool


def prepare(
    config: RunConfig | None = None,
    *,
    resume: str | Path | None = None,
    changes: Mapping[str, Any] | None = None,
    trust_code: bool = False,
) -> Prepared:
    """Checks the settings and makes the run directory, or opens that of a run to go on with.

    Code that a new run names is the caller's own; code that an old run names needs `trust_code`.

    Raises:
        ConfigError: something is wrong with the settings or the folder.
    """
    if changes and resume is None:
        raise ConfigError("changes are for resume=RUN: change the config of a new run itself")
    if resume is not None and config is None:
        run = RunDirectory.open(Path(resume))
        full = resumed_config(run, changes or {}, trust_code=trust_code)
        ensure_typed(full, changes or {})
        if full.cluster.cluster:
            _cluster().check_cluster(full)
        if full.wandb:
            ensure_wandb()
        return Prepared(full, run, True, trust_code)
    if config is None or resume is not None:
        raise ConfigError("give either a config for a new run, or resume=RUN to go on with one")
    full = completed_as_typed(config)
    if (full.remote.listen or full.pool == "grpc") and not full.cluster.cluster:
        check_listen(full.remote)
    on_cluster = bool(full.cluster.cluster)
    if on_cluster:
        _cluster().check_cluster(full)
    if full.pool != "inline" and not full.lockstep:  # else only this process need know its name
        try_environment(full.env, full.environment, timeout_s=full.workers.start_timeout_s)
    check(_without_devices(full) if on_cluster else full, elsewhere=on_cluster)
    if full.wandb:
        ensure_wandb()
    return _created(full)


def _created(config: RunConfig) -> Prepared:
    """Makes the folder of a new run; one that has no name yet gets one that nobody else has."""
    if config.out:
        run = RunDirectory.create(Path(config.out), to_toml(config))
        return Prepared(config, run, False, True)
    wanted = default_run_directory(config)
    for count in itertools.count(1):  # others may begin in the same second
        path = wanted if count == 1 else wanted.with_name(f"{wanted.name}-{count}")
        named = dataclasses.replace(config, out=str(path))
        with suppress(FolderInUse):
            return Prepared(named, RunDirectory.create(path, to_toml(named)), False, True)
    raise AssertionError("counting has no end")


def start(
    prepared: Prepared, hooks: Hooks, *, clock_s: Callable[[], float] | None = None
) -> TrainResult:
    """Trains a prepared run; messages are logged as well.

    `clock_s` says how many seconds have passed since the user asked for it; None: it begins now. On
    a cluster the clock is the learner's, and begins with its process.
    """
    clock_s = clock_s or clock_from(time.monotonic())

    def tell(text: str) -> None:
        logger.info(without_token(text))
        hooks.on_message(text)

    with known(), log_to(prepared.directory.log_path):
        on_cluster = bool(prepared.config.cluster.cluster)
        here = partial(run_training, clock_s=clock_s)
        drive = _cluster().run_on_cluster if on_cluster else here
        return drive(
            prepared.config,
            prepared.directory,
            resume=prepared.resume,
            hooks=hooks._replace(on_message=tell),
            trust_code=prepared.trust_code,
        )


def train(
    config: RunConfig | None = None,
    *,
    resume: str | Path | None = None,
    changes: Mapping[str, Any] | None = None,
    on_update: Callable[[int, Mapping[str, Tensor]], None] | None = None,
    on_checkpoint: Callable[[Path], None] | None = None,
    on_row: Callable[[Row], None] | None = None,
    trust_code: bool = False,
) -> TrainResult:
    """Trains a new run, or goes on with one.

    Args:
        config: A new run's settings.
        resume: Run directory to go on with, instead of `config`.
        changes: On resume: settings that replace the run's; only `config.FREE_ON_RESUME` may, and
            what is to reach out of the run's folder and this machine (`listen`, `insecure`,
            `cluster`, `wandb`, `replay_folder`, …) must be among them, as it must be typed again on
            the command line.
        on_update: Called after every update with the number of updates and metrics on the device;
            never on a cluster, where the device is another machine's.
        on_checkpoint: Called after every checkpoint with its folder.
        on_row: Called at every report with the row that metrics.jsonl gets.
        trust_code: On resume: whether to import code that the run names from outside headrace.

    Returns:
        The run directory, its last row of metrics, and whether it has come to its end.

    Raises:
        ConfigError: something was wrong before anything started.
        TrainingDiverged: a loss or a gradient was not finite.
    """
    clock_s = clock_from(time.monotonic())
    gymnasium.forget()
    prepared = prepare(config, resume=resume, changes=changes, trust_code=trust_code)
    hooks = Hooks(
        on_row=_put_back(on_row),
        on_update=_put_back(on_update),
        on_checkpoint=_put_back(on_checkpoint),
        on_message=lambda _: None,
    )
    return start(prepared, hooks, clock_s=clock_s)


def resumed_config(run: RunDirectory, changes: Mapping[str, Any], *, trust_code: bool) -> RunConfig:
    """Returns the run's own settings with `changes`.

    Raises:
        ConfigError: names a setting that a resumed run may not change.
    """
    kept = sorted(name for name in _leaves(changes) if not _is_free(name))
    if kept:
        raise ConfigError(
            f"{kept[0]} belongs to the run and cannot change on --resume; "
            f"these can: {', '.join(sorted(FREE_ON_RESUME))}"
        )
    values = of_a_run(parse_toml(run.read_config(), run.config_path))
    values = merged(values, kept_horizon(values, changes))
    return from_dict(merged(values, changes), trust_code=trust_code)


def _put_back(hook: Callable[..., None] | None) -> Callable[..., None]:
    """Returns a function of the caller's that leaves torch as it was: it runs amid training."""
    apart = Apart(keeps=False)

    def called(*arguments: Any) -> None:
        if hook is not None:
            with apart.light:
                hook(*arguments)

    return called


def _cluster() -> Any:
    """What speaks to a cluster, which needs packages that only who wants one has."""
    return importlib.import_module("headrace.run.cluster")


def _without_devices(config: RunConfig) -> RunConfig:
    """Returns what can be checked here of a run that learns on another machine."""
    return dataclasses.replace(
        config,
        device="cpu",
        actor_device="cpu" if config.actor_device else "",
        critic_device="cpu" if config.critic_device else "",
        learner_devices="",
        inference_devices="",
    )


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yields the dotted name of every value."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _is_free(name: str) -> bool:
    return any(name == free or name.startswith(f"{free}.") for free in FREE_ON_RESUME)
