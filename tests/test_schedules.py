"""Numbers that change with progress."""

from __future__ import annotations

import math

import pytest

from headrace.schedules import Schedule, between, remaining


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0]),
        ("linear", [1.0, 0.75, 0.5, 0.0]),
        ("cosine", [1.0, 0.5 + 0.5 * math.cos(math.pi / 4), 0.5, 0.0]),
    ],
)
def test_what_is_left_falls_from_one_to_zero(schedule: Schedule, wanted: list[float]) -> None:
    found = [remaining(schedule, progress) for progress in (0.0, 0.25, 0.5, 1.0)]
    assert found == pytest.approx(wanted)
    assert remaining(schedule, 1.5) == wanted[-1]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_before_the_last_share_nothing_falls(schedule: Schedule) -> None:
    found = [remaining(schedule, progress, decay=0.4) for progress in (0.0, 0.6, 0.8, 1.0)]
    assert found == pytest.approx([1.0, 1.0, 0.5, 0.0])


def test_between_two_numbers() -> None:
    assert [between(0.4, 1.0, "linear", p) for p in (0.0, 0.5, 1.0)] == pytest.approx([0.4, 0.7, 1])
    assert between(0.4, 1.0, "constant", 1.0) == 0.4
    assert between(0.4, 1.0, "cosine", 0.5) == pytest.approx(0.7)
