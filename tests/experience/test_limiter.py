"""Samples per insert: both sides wait, never at once, and the ratio is exact."""

from __future__ import annotations

import numpy as np
import pytest

from headrace.errors import ConfigError
from headrace.experience.limiter import SampleLimiter


@pytest.mark.parametrize("ratio", [0.1, 0.8, 1.0, 7.3])
@pytest.mark.parametrize(("batch", "burst"), [(1, 1), (64, 3), (4, 50)])
@pytest.mark.parametrize("eager", [0.05, 0.5, 0.95])
def test_one_side_may_always_go_on_and_the_ratio_holds(
    ratio: float, batch: int, burst: int, eager: float
) -> None:
    """`eager` is how often inserts try first: at both ends one side is far faster."""
    rng = np.random.default_rng(1)
    limiter = SampleLimiter(ratio, min_inserted=20, batch=batch, max_insert=burst)
    waits = {"insert": 0, "sample": 0}
    for _ in range(4000):
        may = {"insert": limiter.may_insert(burst), "sample": limiter.may_sample(batch)}
        assert any(may.values())
        tries = "insert" if rng.random() < eager else "sample"
        waits[tries] += not may[tries]
        if may[tries] and tries == "insert":
            limiter.inserted(int(rng.integers(burst + 1)))
        elif may[tries]:
            limiter.sampled(batch)
        counted = limiter.num_inserted - 20
        if counted > 0:
            assert abs(limiter.num_sampled / counted - ratio) <= limiter.slack / counted + 1e-9
        else:
            assert limiter.num_sampled == 0 or counted == 0
    assert sum(waits.values()) > 0


def test_each_side_waits_for_the_other() -> None:
    limiter = SampleLimiter(2.0, min_inserted=0, batch=4, max_insert=3)
    while limiter.may_insert(3):
        limiter.inserted(3)
    assert limiter.may_sample(4)
    assert limiter.num_inserted == 3  # 10 samples of slack: 6 are due, 12 would be too many
    while limiter.may_sample(4):
        limiter.sampled(4)
    assert limiter.may_insert(3)
    assert limiter.num_sampled == 16  # 6 were due, 10 of slack


def test_nothing_is_sampled_before_the_first_have_come() -> None:
    limiter = SampleLimiter(1.0, min_inserted=10, batch=2, max_insert=4)
    limiter.inserted(9)
    assert limiter.may_insert(4)
    assert not limiter.may_sample(2)
    limiter.inserted(1)
    assert limiter.may_sample(2)


def test_without_a_ratio_nobody_waits_once_it_is_full_enough() -> None:
    limiter = SampleLimiter(0.0, min_inserted=3, batch=64, max_insert=1)
    assert not limiter.may_sample(64)
    limiter.inserted(10_000)
    assert limiter.may_insert(500)
    limiter.sampled(1_000_000)
    assert limiter.may_sample(64)


def test_a_larger_insert_than_was_said_only_delays_the_next() -> None:
    limiter = SampleLimiter(1.0, min_inserted=1, batch=2, max_insert=1)
    limiter.inserted(500)
    assert not limiter.may_insert(1)
    while not limiter.may_insert(1):
        assert limiter.may_sample(2)
        limiter.sampled(2)
    assert limiter.due <= limiter.slack


def test_a_slack_that_could_stop_both_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 12"):
        SampleLimiter(0.8, min_inserted=1, batch=4, max_insert=10, slack=11.9)
    assert SampleLimiter(0.8, min_inserted=1, batch=4, max_insert=10, slack=12.0).slack == 12.0


def test_counts_survive() -> None:
    limiter = SampleLimiter(1.0, min_inserted=1, batch=2, max_insert=1)
    limiter.inserted(7)
    limiter.sampled(4)
    resumed = SampleLimiter(1.0, min_inserted=1, batch=2, max_insert=1)
    resumed.load_state_dict(limiter.state_dict())
    assert (resumed.due, resumed.num_inserted, resumed.num_sampled) == (2.0, 7, 4)
