"""Seeds: other numbers give other seeds, and no two uses have one."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from pathlib import Path

import pytest

import headrace
from headrace.config import from_dict
from headrace.errors import ConfigError
from headrace.run.seeds import Use, derived_seed


def test_no_two_lists_of_numbers_have_one_seed() -> None:
    numbers = [0, 1, 5, 1 << 32, (1 << 32) + 5, (1 << 64) - 1]
    lists = [
        (seed, stream, *parts)
        for seed, stream in itertools.product(numbers, (Use.NETWORK, Use.REPLAY))
        for count in range(4)
        for parts in itertools.product(numbers[:5], repeat=count)
    ]
    seeds = {derived_seed(*numbers) for numbers in lists}
    assert len(lists) > 1800
    assert len(seeds) == len(lists)
    assert all(0 <= seed < 1 << 31 for seed in seeds)


def test_every_name_has_one_use() -> None:
    """But for what is the same whoever does it, here or on another machine."""
    source = Path(headrace.__file__).parent
    text = "".join(path.read_text() for path in source.rglob("*.py"))
    uses = Counter(re.findall(r"\bUse\.([A-Z_]+)", text))
    assert uses == dict.fromkeys(Use.__members__, 1) | {
        "TRAINING_ENVIRONMENTS": 3,
        "ACTING_WORKER": 2,
    }


@pytest.mark.parametrize("seed", [-1, 1 << 64])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(ConfigError, match=r"seed must be from 0 to 2\*\*64 - 1, not .*--seed 1"):
        from_dict({"env": "catch", "seed": seed})
