"""Numbers of a row as people read them: few digits, a dash for what is not known."""

from __future__ import annotations

import math
from collections.abc import Mapping

Row = Mapping[str, float | int | str]
"""One report of the run, by name; names that are missing are shown as a dash."""

MISSING = "\N{EN DASH}"


def number(row: Row, name: str) -> float:
    """Returns a number of the row; NaN where there is none."""
    value = row.get(name, math.nan)
    return math.nan if isinstance(value, str) else float(value)


def short(value: float) -> str:
    """Counts and rates in three to four digits: 999, 12.3 k, 4.21 M."""
    if not math.isfinite(value):
        return MISSING
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        # From 0.9995 up, three digits would round to 1000 of the smaller unit.
        if abs(value) >= 0.9995 * size:
            scaled = value / size
            return (
                f"{scaled:.{2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0}f} {unit}"
            )
    return f"{value:.0f}" if value == round(value) or abs(value) >= 99.95 else f"{value:.1f}"


def plain(value: float) -> str:
    """Returns and losses with their sign, in about four digits."""
    if not math.isfinite(value):
        return MISSING
    if value == 0 or 0.001 <= abs(value) < 1e5:
        return f"{value:.2f}" if abs(value) >= 10 else f"{value:.4f}".rstrip("0").rstrip(".")
    return f"{value:.2e}"


def some(count: float) -> str:
    """A count that is worth a place only once there is something to count."""
    return short(count) if count > 0 else MISSING


def fixed(value: float) -> str:
    """Few things, such as cores: 1.8."""
    return f"{value:.1f}" if math.isfinite(value) else MISSING


def pair(first: float, second: float) -> str:
    """Two that belong together."""
    return f"{fixed(first)} / {fixed(second)}"


def share(part: float, whole: float = 1.0) -> str:
    """In percent."""
    return f"{100 * part / whole:.1f} %" if whole and math.isfinite(part) else MISSING


def clock(seconds: float) -> str:
    """Returns 1 d 2:03:04."""
    if not math.isfinite(seconds):
        return MISSING
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{f'{days} d ' if days else ''}{hour}:{minute:02d}:{second:02d}"
