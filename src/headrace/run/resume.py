"""What a run that goes on says of its length and its schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from headrace import catalog
from headrace.config import RunConfig
from headrace.learner.checkpoint import Checkpoint
from headrace.run.saving import Before

_LENGTHS = ("frames", "minutes")


def kept_horizon(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what keeps the schedules of a run where they are while its length changes.

    Args:
        values: The run's settings.
        changes: Those that were typed for it.
    """
    kept: dict[str, Any] = {}
    for unit in _LENGTHS:
        total, schedule = f"total_{unit}", f"schedule_{unit}"
        if total in changes and schedule not in changes and values.get(schedule) is None:
            kept[schedule] = values.get(total, 0.0 if unit == "minutes" else None)
    return kept


def horizon_kept_or_moved(config: RunConfig, before: Any) -> Iterator[str]:
    """Yields what a user should know of the schedules of a run that goes on.

    Args:
        config: Its settings now.
        before: Those of its checkpoint, nested; something else says nothing.
    """
    if not isinstance(before, Mapping):
        return
    for unit, now, length in zip(_LENGTHS, config.horizon, config.length, strict=True):
        total = before.get(f"total_{unit}")
        old = before.get(f"schedule_{unit}")
        old = (total if old is None else old) or None
        if now != old:
            yield f"schedules end at {_said(now, unit)} now, not at {_said(old, unit)}"
        elif length != total and now is not None:
            yield (
                f"schedules end at {_said(now, unit)}, as before, and stay at their end behind it: "
                f"say --schedule-{unit} {length or 0:g} to stretch them over the new length"
            )


def _said(length: float | None, unit: str) -> str:
    return f"no number of {unit}" if length is None else f"{length:,} {unit}".replace(",", " ")


def say_where_it_stands(
    config: RunConfig, saved: Checkpoint, before: Before, on_message: Callable[[str], None]
) -> bool:
    """Says what a checkpoint means for the length and the schedules; returns whether all is done.

    Args:
        config: The run's settings now.
        saved: What it goes on from.
        before: Its counters.
        on_message: Told.
    """
    if complete := already_complete(config, before):
        on_message(complete)
        return True
    for line in horizon_kept_or_moved(config, saved.meta.get("config")):
        on_message(line)
    return False


def already_complete(config: RunConfig, before: Before) -> str:
    """Returns what to say of a run that has nothing left to do; empty where it has."""
    spec = catalog.environment_family(config.env).spec(config.env, config.environment)
    frames = before.agent_steps * spec.action_repeat
    if config.length.progress(frames, before.elapsed_s) < 1.0:
        return ""
    flag, more = "frames", f"{2 * frames}"
    if frames < config.total_frames:
        flag, more = "minutes", f"{2 * (config.total_minutes or 0.0):g}"
    return (
        f"this run is complete: {frames} of {config.total_frames} frames, "
        f"{before.elapsed_s / 60:.1f} minutes; say --total-{flag} {more} to go on, and "
        f"--schedule-{flag} {more} to have its schedules stretched"
    )
