"""`headrace tune ENV`: the fastest settings for this machine, as a file for `train --config`."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from headrace.commands.settings import Request, first_pass, read_request, values_for_file
from headrace.config import RunConfig, foreign_code, to_dict
from headrace.errors import ConfigError
from headrace.tune import file, report
from headrace.tune.machine import Machine
from headrace.tune.search_space import SearchSpace
from headrace.tune.tuner import TuneConfig, Tuned, tune
from headrace.tune.types import Trial

HELP = """Finds the fastest settings for this machine, and writes them to a file.

    headrace tune ENV [--algorithm NAME] [--preset NAME] [settings of train]
    headrace tune [ENV] --config FILE [settings of train]
    headrace train --config tuned-ENV-ALGORITHM.toml

  It starts from what `headrace train ENV` would do, changes one setting at a
  time (it says at the start which there are), and keeps what makes more agent
  steps per second with as many samples learned from for each step. Where
  nothing ties samples to steps (--samples-per-insert 0), or with --tune-batch,
  it is the geometric mean of agent steps/s and samples/s.

  Every trial is a short run of its own that leaves nothing behind. The winner
  is measured against the defaults again, which stay unless they are clearly
  beaten. At the end it says which stage limits, and what one more core or GPU
  may bring.

  Settings that you give, as flags or in FILE, stay as they are; --help-all
  lists them. Ctrl-C ends the search; what had clearly won is written."""

_SMOKE = TuneConfig(budget_s=100.0, seconds_per_trial=0.3, pairs=1, max_trials=3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneArguments:
    """How long to look, and what to write."""

    budget_s: float | None = None
    """Spends at most so many seconds on all of it; None takes 300."""
    budget_minutes: float | None = None
    """Spends at most so many minutes, in place of budget_s."""
    seconds_per_trial: float | None = None
    """Measures so many seconds in a trial, after it has started and warmed up; None takes 4, or
    less where the budget is short."""
    tune_batch: bool = False
    """Tunes the learner's batch too, which changes what is learned: with a replay there are as many
    updates per step as before, each of more samples; without one there are fewer updates."""
    out: str = ""
    """Names the file to write; empty takes tuned-ENV-ALGORITHM.toml in this folder."""
    force: bool = False
    """Replaces the file of --out if it is there."""
    json: bool = False
    """Prints one JSON object and nothing else."""
    smoke: bool = False
    """Makes a few trials of a moment each, on catch unless ENV is given; the numbers mean
    nothing."""

    def options(self) -> TuneConfig:
        """Returns what the tuner wants to know.

        Raises:
            ConfigError: the numbers do not fit.
        """
        if self.smoke:
            return dataclasses.replace(_SMOKE, tune_batch=self.tune_batch)
        if self.budget_s is not None and self.budget_minutes is not None:
            raise ConfigError("give --budget-s or --budget-minutes, not both")
        budget_s = 300.0 if self.budget_s is None else self.budget_s
        if self.budget_minutes is not None:
            budget_s = 60.0 * self.budget_minutes
        return TuneConfig(
            budget_s=budget_s,
            seconds_per_trial=self.seconds_per_trial,
            tune_batch=self.tune_batch,
        )


def tune_command(argv: list[str]) -> None:
    """Tunes, prints and writes."""
    arguments, rest = tyro.cli(
        TuneArguments,
        args=argv,
        prog="headrace tune ENV",
        description=HELP,
        return_unknown_args=True,
    )
    options = arguments.options()
    chosen, rest = first_pass(rest)
    if chosen.resume:
        raise ConfigError("--resume is for train: a run that exists keeps its settings")
    if arguments.smoke and not chosen.env and not chosen.config:
        chosen.env = "catch"
    request = read_request(
        chosen, rest, prog="headrace tune ENV", description=HELP, more=TuneArguments
    )
    config = request.config
    values_for_file(request, {})  # refuses now what could not be written then
    path = Path(arguments.out or file.default_name(config.env, config.algorithm))
    file.ensure_free(path, force=arguments.force)
    tuned = tune(
        config,
        options,
        pinned=request.pinned,
        on_begin=partial(say_beginning, config, options),
        on_trial=say_trial,
    )
    words = shlex.join(["headrace", "tune", *argv])
    # What was cut short is worth a file only if it is worth training with.
    written = not tuned.result.stopped or tuned.result.beaten
    failure: ConfigError | None = None
    if written:
        try:
            _write(path, request, tuned, command=words, force=arguments.force)
        except ConfigError as error:  # what took minutes is shown first
            written, failure = False, error
    if arguments.json:
        print(json.dumps({**report.as_dict(tuned), "file": str(path) if written else None}))
    else:
        Console().print(report.table(tuned))
        print("\n".join(report.sentences(tuned)))
        if written:
            trust = " --trust-code" if any(foreign_code(to_dict(config))) else ""
            print(f"train with it: headrace train --config {shlex.quote(str(path))}{trust}")
    if failure is not None:
        raise failure
    if tuned.result.stopped:
        raise KeyboardInterrupt


def say_beginning(
    config: RunConfig, options: TuneConfig, machine: Machine, space: SearchSpace
) -> None:
    """Tells what is about to happen."""
    print(report.beginning(config, options, machine, space), file=sys.stderr, flush=True)


def say_trial(trial: Trial, settings: Mapping[str, Any]) -> None:
    """Tells of a trial as soon as it has ended."""
    print(report.trial_line(trial, settings), file=sys.stderr, flush=True)


def _write(path: Path, request: Request, tuned: Tuned, *, command: str, force: bool) -> None:
    values = values_for_file(request, tuned.settings)
    text = file.text_of(values, tuned, command=command, now=datetime.now())
    file.write(path, text, force=force)
