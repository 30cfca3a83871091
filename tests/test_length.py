"""How far a run is: by its frames or its clock, whichever is ahead."""

from __future__ import annotations

import math

import pytest

from headrace.length import Length


@pytest.mark.parametrize(
    ("env_frames", "elapsed_s", "progress"),
    [
        (0, 0.0, 0.0),
        (0, 240.0, 0.5),
        (100, 240.0, 0.5),
        (750, 240.0, 0.75),
        (0, 480.0, 1.0),
        (0, 500.0, 1.0),
        (1003, 0.0, 1.0),
    ],
)
def test_the_larger_share_counts(env_frames: int, elapsed_s: float, progress: float) -> None:
    assert Length(1000, 8.0).progress(env_frames, elapsed_s) == progress


def test_without_a_clock_frames_alone_count() -> None:
    assert Length(1000).progress(250, 1e9) == 0.25
    assert math.isnan(Length(1000).progress(math.nan, 0.0))
