"""Tunes one run on this machine: search space, trials, search, and what the stages alone say."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from headrace.config import RunConfig, to_dict
from headrace.errors import ConfigError
from headrace.run.system import choose_device
from headrace.run.trial import try_environment
from headrace.run.validate import check
from headrace.tune.estimates import Estimates, Stages, estimate
from headrace.tune.machine import Machine
from headrace.tune.search import search
from headrace.tune.search_space import Facts, SearchSpace, laid_over
from headrace.tune.trials import Trials, run_child, trial_config
from headrace.tune.types import Budget, Choice, Result, Trial

_LEAST_S = 30.0  # of a budget: each of its trials takes some to start
_LEAST_TRIALS = 10  # that a budget must have room for
_USUAL_TRIAL_S, _USUAL_TRIALS = 4.0, 30
_FINAL = 2.0  # times a trial's length that each of the final comparison measures
_STAGES_SHARE = 0.1  # of the budget, for measuring the stages alone
_STAGES_LEAST_S = 15.0  # or so much, if that is not more than
_STAGES_MOST_SHARE = 0.25


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneConfig:
    """How long to look, and how freely."""

    budget_s: float = 300.0
    """Seconds that all trials may take together."""
    seconds_per_trial: float | None = None
    """Seconds that a trial measures, after it has started and warmed up; None for 4, or less where
    the budget is short."""
    tune_batch: bool = False
    """Tune the learner's batch too. That changes what is learned, not only how fast: with a replay
    there are as many updates per step as before, each of more samples; without one there are fewer
    updates."""
    pairs: int = 2
    """Pairs of longer trials in which the winner must beat the defaults in the end."""
    max_trials: int | None = None
    """Most trials before these; None for as many as there is time for."""

    def __post_init__(self) -> None:
        if not _LEAST_S <= self.budget_s < float("inf"):
            raise ConfigError(
                f"a budget of {self.budget_s:g} s is no time for trials, which take seconds to "
                f"start: give at least {_LEAST_S:g} s"
            )
        if not 0 < self.trial_s < float("inf"):
            raise ConfigError(f"--seconds-per-trial must be positive, not {self.trial_s:g}")
        least = _LEAST_TRIALS * self.trial_s
        if least > self.budget_s:
            raise ConfigError(
                f"a budget of {self.budget_s:g} s is no time for trials of {self.trial_s:g} s: "
                f"give at least {least:g} s, or lower --seconds-per-trial"
            )

    @property
    def trial_s(self) -> float:
        """Seconds that a trial measures."""
        if self.seconds_per_trial is not None:
            return self.seconds_per_trial
        return min(_USUAL_TRIAL_S, self.budget_s / _USUAL_TRIALS)


class Tuned(NamedTuple):
    """What was found, and on what."""

    config: RunConfig  # what was started from
    machine: Machine
    result: Result
    space: SearchSpace
    estimates: Estimates | None  # None: the stages could not be measured
    trial_s: float
    elapsed_s: float

    @property
    def settings(self) -> dict[str, Any]:
        """What the winner sets otherwise, nested as in config.toml; nothing if defaults stay."""
        return self.space.settings(self.result.winner)

    @property
    def winner(self) -> RunConfig:
        """What to train with."""
        config: RunConfig = laid_over(self.config, self.settings)
        return config

    def figures(self, choice: Choice) -> dict[str, Any]:
        """Returns the figures of the newest trial of a choice: of the final comparison, if any."""
        key = self.space.key(choice)
        found: Mapping[str, Any] = {}
        for trial in self.result.trials:
            if trial.outcome.failure is None and self.space.key(trial.choice) == key:
                found = trial.outcome.figures
        return dict(found)


def tune(
    config: RunConfig,
    options: TuneConfig,
    *,
    pinned: Collection[str] = (),
    on_begin: Callable[[Machine, SearchSpace], None] = lambda *_: None,
    on_trial: Callable[[Trial, Mapping[str, Any]], None] = lambda *_: None,
) -> Tuned:
    """Searches the fastest settings for `config`; Ctrl-C ends the search, and what is known stands.

    Args:
        config: Complete settings to start from, and to compare with.
        options: How long, and how freely.
        pinned: Names of settings that stay as they are.
        on_begin: Told before the first trial.
        on_trial: Told of every trial, and of what it set otherwise.

    Raises:
        ConfigError: the settings cannot be trained with, or have nothing to tune.
        NothingMeasured: the defaults failed in their trial.
    """
    if config.lockstep:
        raise ConfigError("lockstep is for equal results, not for speed: leave out --lockstep")
    if config.remote.listen or config.cluster.cluster or config.pool == "grpc":
        raise ConfigError(
            "tuning is for one machine, and no trial has worker hosts: leave out --listen and "
            "--pool grpc, and --cluster"
        )
    started_s = time.monotonic()
    if config.pool != "inline":
        try_environment(config.env, config.environment, timeout_s=config.workers.start_timeout_s)
    check(config)
    machine = Machine.look(choose_device(config.device))
    facts = Facts.of(config, cores=machine.cores, bfloat16=machine.bfloat16)
    if options.tune_batch and facts.turns:
        raise ConfigError(
            f"{config.algorithm} learns from whole turns, whose batch is not tuned: leave out "
            "--tune-batch"
        )
    if options.tune_batch and "batch_unrolls" in pinned:
        raise ConfigError("batch_unrolls is given, and --tune-batch tunes it: leave one out")
    space = SearchSpace(config, facts, pinned=pinned, tune_batch=options.tune_batch)
    if not space.parameters:
        raise ConfigError("every setting that could be tuned is given: leave some of them out")
    on_begin(machine, space)
    seconds, whole_s = options.trial_s, options.budget_s
    stages_s = max(_STAGES_SHARE * whole_s, min(_STAGES_LEAST_S, _STAGES_MOST_SHARE * whole_s))
    result = search(
        space.parameters,
        Trials(config, space.settings, combined=options.tune_batch),
        budget=Budget(
            total_s=options.budget_s - stages_s,
            trial_s=seconds,
            final_s=_FINAL * seconds,
            pairs=options.pairs,
            trials=options.max_trials,
        ),
        key=space.key,
        clock=time.monotonic,
        seed=config.seed,
        on_trial=lambda trial: on_trial(trial, space.settings(trial.choice)),
    )
    tuned = Tuned(config, machine, result, space, None, seconds, 0.0)
    if not result.stopped:
        left_s = started_s + options.budget_s - time.monotonic()
        try:
            if left_s > 0:
                tuned = tuned._replace(estimates=_estimates(tuned, facts, deadline_s=left_s))
        except KeyboardInterrupt:
            tuned = tuned._replace(result=result._replace(stopped=True))
    return tuned._replace(elapsed_s=time.monotonic() - started_s)


def _estimates(tuned: Tuned, facts: Facts, *, deadline_s: float) -> Estimates | None:
    """Measures the stages of the winner alone; None if that fails."""
    figures = tuned.figures(tuned.result.winner)
    config = trial_config(tuned.winner)
    workers_act = config.inference == "worker"
    on_gpu = tuned.machine.gpu is not None
    server = config.server
    if workers_act:  # the server's code acts in workers too
        config = dataclasses.replace(config, inference="server")
    if not on_gpu:  # one thread a stage
        workers = dataclasses.replace(config.workers, num_workers=1)
        config = dataclasses.replace(config, workers=workers, server=server)
    samples, seen = (float(figures[n]) for n in ("samples_per_agent_step", "agent_steps_per_s"))
    if not min(samples, seen) > 0:
        return None
    ceiling = run_child(
        {
            "config": to_dict(config),
            "samples_per_agent_step": samples,
            "seconds": tuned.trial_s / 4,
        },
        deadline_s=deadline_s,
    )
    if isinstance(ceiling, str):
        return None
    stages = Stages.of(
        ceiling,
        samples_per_agent_step=samples,
        cores=tuned.machine.cores,
        workers_act=workers_act,
        turns=facts.turns,
        inline=facts.pool == "inline",
    )
    return estimate(stages, seen)
