"""`headrace train`: a new run, tuned first if that is asked for, or one to go on with."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from headrace.commands.settings import (
    first_pass,
    new_parser,
    parse_flags,
    read_request,
    typed_again,
)
from headrace.commands.tune import say_beginning, say_trial
from headrace.config import algorithm_class, flags_again, foreign_code, to_dict
from headrace.errors import ConfigError
from headrace.length import clock_from
from headrace.run import api
from headrace.run.local import Hooks
from headrace.telemetry.record import RunDirectory, log_to
from headrace.telemetry.terminal import open_display
from headrace.telemetry.wandb_log import ensure_wandb
from headrace.tune.report import sentences, trial_line
from headrace.tune.tuner import TuneConfig, tune

HELP = """Trains an agent and leaves everything in a run directory.

    headrace train ENV [--algorithm NAME] [--preset NAME] [settings]
    headrace train [ENV] --config FILE [settings]
    headrace train ENV --autotune [--autotune-budget-s 120] [settings]
    headrace train --resume RUN [--total-frames N] [--total-minutes N] …

  Order: defaults < preset < --config (TOML) < flags. `headrace presets` lists
  presets; the values below are those of the preset that ENV takes unasked.
  --autotune first looks for the fastest settings by short trials, as `headrace
  tune` does. Code that FILE or RUN names from outside headrace needs
  --trust-code. What reaches out of a RUN (--listen, --cluster, --wandb, …) is
  typed again on --resume. Ctrl-C saves and ends; a second one ends at once."""

_BUDGET_S = 120.0

logger = logging.getLogger("headrace")


def train_command(argv: list[str], *, started_s: float | None = None) -> None:
    """Trains an agent; the clock of --total-minutes began at `started_s`, or begins now."""
    started_s = time.monotonic() if started_s is None else started_s
    parser = new_parser()
    parser.add_argument("--autotune", action="store_true")
    parser.add_argument("--autotune-budget-s", type=float)
    chosen, rest = first_pass(argv, parser)
    if chosen.autotune_budget_s is not None and not chosen.autotune:
        raise ConfigError("--autotune-budget-s is for --autotune: add that, or leave it out")
    if chosen.resume:
        _resume(chosen, rest, started_s)
        return
    request = read_request(chosen, rest, prog="headrace train ENV", description=HELP)
    if not chosen.autotune:
        _train(started_s, config=request.config)
        return
    if request.config.lockstep:
        raise ConfigError("--autotune looks for speed, and --lockstep gives it up: leave one out")
    budget_s = _BUDGET_S if chosen.autotune_budget_s is None else chosen.autotune_budget_s
    options = TuneConfig(budget_s=budget_s)
    if request.config.out:  # what would be refused then is refused before minutes are spent
        RunDirectory.ensure_unused(Path(request.config.out))
    if request.config.wandb:
        ensure_wandb()
    tuned = tune(
        request.config,
        options,
        pinned=request.pinned,
        on_begin=partial(say_beginning, request.config, options),
        on_trial=say_trial,
    )
    said = sentences(tuned)
    if tuned.result.stopped:
        print("\n".join(said), file=sys.stderr)
        raise KeyboardInterrupt
    trials = [
        trial_line(trial, tuned.space.settings(trial.choice)) for trial in tuned.result.trials
    ]
    # Tuning has minutes of its own.
    _train(time.monotonic(), config=tuned.winner, messages=said, logged=trials)


def _resume(chosen: argparse.Namespace, rest: list[str], started_s: float) -> None:
    flags = ("algorithm", "preset", "config", "autotune")
    named = [f"--{key}" for key in flags if getattr(chosen, key)]
    if chosen.env or named:
        raise ConfigError(
            f"{chosen.env or named[0]} cannot go with --resume: a resumed run keeps its settings"
        )
    run = RunDirectory.open(Path(chosen.resume))
    base = api.resumed_config(run, {}, trust_code=chosen.trust_code)
    config = parse_flags(base, rest, prog="headrace train --resume RUN", description=HELP)
    changes = typed_again(base, config, rest)
    _train(started_s, resume=chosen.resume, changes=changes, trust_code=chosen.trust_code)


def _train(
    started_s: float,
    *,
    messages: list[str] | None = None,
    logged: list[str] | None = None,
    **arguments: Any,
) -> None:
    """Trains; `messages` are shown and logged before, `logged` is logged alone."""
    prepared = api.prepare(**arguments)
    config, path = prepared.config, prepared.directory.typed
    title = f"{config.env} · {config.algorithm} · {path}"
    shown = algorithm_class(config.algorithm).shown
    with open_display(config.length, title, shown) as display:
        hooks = Hooks(
            on_row=display.update,
            on_update=lambda *_: None,
            on_checkpoint=lambda _: None,
            on_message=display.message,
        )
        with log_to(prepared.directory.log_path):
            for line in [*(logged or []), *(messages or [])]:
                logger.info(line)
        for line in messages or []:
            display.message(line)
        result = api.start(prepared, hooks, clock_s=clock_from(started_s))
    end, more = "stopped and saved", ""
    if result.finished:
        by_frames = int(result.metrics["env_frames"]) >= config.total_frames
        unit = "frames" if by_frames else "minutes"
        end, more = "done", f" --total-{unit} MORE --schedule-{unit} MORE"
    trust = ["--trust-code"] if any(foreign_code(to_dict(config))) else []
    again = " ".join([str(path), *trust, *flags_again(config)])
    print(f"{end}; go on with: headrace train --resume {again}{more}")
    print(f"evaluate and film: headrace eval {' '.join([str(path), *trust])} --video agent.mp4")
    print(f"curves: tensorboard --logdir {path}")
