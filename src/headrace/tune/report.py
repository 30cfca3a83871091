"""What a tuner has to say: a table of all that was tried, sentences, and plain values for JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from headrace.bench.settings import cell
from headrace.config import RunConfig
from headrace.tune.machine import Machine
from headrace.tune.search_space import SearchSpace
from headrace.tune.tuner import TuneConfig, Tuned
from headrace.tune.types import Choice, Trial

_DEFAULTS = "the defaults"


def named(settings: Mapping[str, Any]) -> str:
    """Returns settings, nested as in config.toml, in a few words."""
    return ", ".join(f"{name}={value}" for name, value in _leaves(settings)) or _DEFAULTS


def trial_line(trial: Trial, settings: Mapping[str, Any]) -> str:
    """Returns one line for a trial that has ended."""
    if trial.outcome.failure is not None:
        return f"{trial.stage}: {named(settings)}: failed: {trial.outcome.failure}"
    figures = trial.outcome.figures
    return (
        f"{trial.stage}: {named(settings)}: {cell(float(figures['agent_steps_per_s']))} agent "
        f"steps/s, {cell(float(figures['updates_per_s']))} updates/s, limited by "
        f"{figures['bottleneck']}"
    )


def beginning(config: RunConfig, options: TuneConfig, machine: Machine, space: SearchSpace) -> str:
    """Returns what is about to happen."""
    names = ", ".join(parameter.name for parameter in space.parameters)
    return (
        f"tuning {config.env} with {config.algorithm} on {machine}: for up to "
        f"{options.budget_s:.0f} s, in trials that measure {options.trial_s:.2g} s each; first the "
        f"defaults, then other values of {names}"
    )


def table(tuned: Tuned) -> Table:
    """Returns all that was tried, in the order of the trials."""
    shown = Table(title=f"{tuned.config.env}, {tuned.config.algorithm}: what was tried")
    shown.add_column("settings that differ from the defaults", overflow="fold")
    shown.add_column("for")
    for name in ("agent steps/s", "updates/s"):
        shown.add_column(name, justify="right")
    shown.add_column("what limits", overflow="fold")
    winner = tuned.space.key(tuned.result.winner)
    for trial in tuned.result.trials:
        figures = trial.outcome.figures
        rates = [
            cell(float(figures[name])) if name in figures else "failed"
            for name in ("agent_steps_per_s", "updates_per_s")
        ]
        shown.add_row(
            named(tuned.space.settings(trial.choice)),
            trial.stage,
            *rates,
            trial.outcome.failure or str(figures["bottleneck"]),
            style="bold" if tuned.space.key(trial.choice) == winner else None,
        )
    return shown


def sentences(tuned: Tuned) -> list[str]:
    """Returns the result: what won and by how much, what limits now, what more would bring."""
    result = tuned.result
    failed = sum(trial.outcome.failure is not None for trial in result.trials)
    count = len(result.trials)
    said = [
        f"tuned on {tuned.machine}: {count} trial{_s(count)} in {tuned.elapsed_s:.0f} s"
        f"{f', {failed} of which failed' if failed else ''}"
        f"{', then stopped' if result.stopped else ''}",
        _verdict(tuned),
    ]
    figures = tuned.figures(result.winner)
    if figures:
        said.append(f"what limits now: {_stage(str(figures['bottleneck']))}")
    said += _outlook(tuned)
    if result.beaten:
        said += [f"mind: {effect}" for effect in tuned.space.effects(result.winner)]
    return said


def as_dict(tuned: Tuned) -> dict[str, Any]:
    """Returns everything as plain values."""
    result, estimates = tuned.result, tuned.estimates
    return {
        "env": tuned.config.env,
        "algorithm": tuned.config.algorithm,
        "machine": tuned.machine._asdict(),
        "elapsed_s": tuned.elapsed_s,
        "stopped": result.stopped,
        "settings": tuned.settings,
        "beaten": result.beaten,
        "best_found": tuned.space.settings(result.best),
        "gain": result.gain,
        "gains": list(result.gains),
        "noise": result.noise,
        "default": tuned.figures(result.default),
        "winner": tuned.figures(result.winner),
        "estimates": None if estimates is None else estimates._asdict(),
        "effects": tuned.space.effects(result.winner),
        "trials": [
            {
                "settings": tuned.space.settings(trial.choice),
                "stage": trial.stage,
                "cost_s": trial.cost_s,
                "failure": trial.outcome.failure,
                **trial.outcome.figures,
            }
            for trial in result.trials
        ],
    }


def _verdict(tuned: Tuned) -> str:
    result = tuned.result
    best = named(tuned.space.settings(result.best))
    if tuned.space.key(result.best) == tuned.space.key(result.default):
        if len({tuned.space.key(trial.choice) for trial in result.trials}) <= 1:
            return f"the defaults stay: there was no time to try anything else{_advice(tuned)}"
        return "the defaults stay: nothing that was tried beat them"
    if result.gains:
        low, high = min(result.gains), max(result.gains)
        count = len(result.gains)
        pairs = f"{low:.2f} to {high:.2f} in {count} pairs" if count > 1 else "in 1 pair"
        noise = ""
        if result.noise:  # else nothing was measured twice
            noise = f", where trials of the same settings differ by {result.noise:.0%}"
        measured = f"{result.gain:.2f} times the defaults ({pairs} of trials{noise})"
    else:
        measured = (
            f"{result.gain:.2f} times the defaults, and there was no time to measure it against "
            f"them again{_advice(tuned)}"
        )
    if not result.beaten:
        said = f"the defaults stay: {best} came to {measured}"
        if result.gains and min(result.gains) > 1.0:
            said += "; a quieter machine or longer trials would tell better"
        return said
    return (
        f"{best}: {measured}; {_rates(tuned, result.best)}, against {_rates(tuned, result.default)}"
    )


def _advice(tuned: Tuned) -> str:
    return "" if tuned.result.stopped else ": give a larger budget"


def _s(count: int) -> str:
    return "" if count == 1 else "s"


def _rates(tuned: Tuned, choice: Choice) -> str:
    figures = tuned.figures(choice)
    return (
        f"{cell(float(figures['agent_steps_per_s']))} agent steps/s and "
        f"{cell(float(figures['updates_per_s']))} updates/s"
    )


def _stage(bottleneck: str) -> str:
    return "nothing waits for long" if bottleneck == "none" else f"the {bottleneck}"


def _outlook(tuned: Tuned) -> list[str]:
    if tuned.estimates is None:
        what = f"what one more core or GPU would bring was not measured{_advice(tuned)}"
        return [] if tuned.result.stopped else [what]
    now = float(tuned.figures(tuned.result.winner)["agent_steps_per_s"])
    core, gpu = tuned.estimates.one_more_core, tuned.estimates.one_more_gpu_at_most
    another = "another" if tuned.machine.gpu else "a"
    return [
        f"estimate, from each stage alone: one more core would bring about {cell(core)} agent "
        f"steps/s ({core / now:.2f} times); {another} GPU at most {cell(gpu)} ({gpu / now:.2f} "
        "times), where environments have the cores to themselves"
    ]


def _leaves(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields the flag's name and the value of every setting."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _leaves(value)
        else:
            yield name, value
