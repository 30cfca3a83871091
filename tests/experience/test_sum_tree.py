"""Draws by priority: frequencies against a chi-square test, sums against fresh ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headrace.experience.sum_tree import FAN_OUT, SumTree

SIZES = [1, FAN_OUT, FAN_OUT + 1, FAN_OUT**2 + 5]


def chi_square_p(counts: np.ndarray, expected: np.ndarray) -> float:
    """Chance of a statistic at least this large: the regularised upper incomplete gamma."""
    statistic = float(((counts - expected) ** 2 / expected).sum())
    half = torch.tensor([(len(counts) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def made(priority: np.ndarray) -> SumTree:
    tree = SumTree(len(priority))
    tree.set(np.arange(len(priority)), priority)
    return tree


def test_the_p_value_is_that_of_tables() -> None:
    # Ten cells, one of which holds all of the statistic: 16.919 is the 5 % point for 9 degrees.
    counts = np.full(10, 100.0)
    counts[0] += np.sqrt(16.919 * 100.0)
    assert chi_square_p(counts, np.full(10, 100.0)) == pytest.approx(0.05, abs=1e-4)


@pytest.mark.parametrize("size", [5, FAN_OUT + 3, FAN_OUT**2 + 5])
def test_frequencies_match_priorities(size: int) -> None:
    rng = np.random.default_rng(7)
    priority = rng.uniform(0.5, 4.0, size)
    counts = np.bincount(made(priority).sample(rng.random(100_000)), minlength=size)
    expected = priority / priority.sum() * 100_000
    assert chi_square_p(counts, expected) > 1e-6
    assert chi_square_p(counts, np.full(size, 100_000 / size)) < 1e-6


@pytest.mark.parametrize("size", SIZES)
def test_each_share_of_the_total_has_its_leaf(size: int) -> None:
    priority = np.random.default_rng(3).integers(0, 4, size).astype(np.float64)
    priority[-1] = 2.0
    ends = np.cumsum(priority)  # whole numbers: sums are exact in any order
    share = (np.arange(ends[-1]) + 0.5) / ends[-1]
    leaf = made(priority).sample(share)
    np.testing.assert_array_equal(leaf, np.searchsorted(ends, share * ends[-1], side="right"))


def test_a_leaf_of_priority_zero_never_comes_whatever_the_rounding() -> None:
    rng = np.random.default_rng(11)
    edge = np.array([0.0, np.nextafter(0.0, 1.0), 0.5, np.nextafter(1.0, 0.0), 1.0])
    for _ in range(200):
        # Magnitudes that make sums in another order differ, most leaves 0, also the last ones.
        priority = 10.0 ** rng.uniform(-20, 20, 3000) * (rng.random(3000) < 0.05)
        priority[rng.integers(3000) :] = 0.0
        priority[rng.integers(3000)] = 1e-300
        tree = made(priority)
        assert (tree.get(tree.sample(np.concatenate([edge, rng.random(64)]))) > 0).all()


def test_only_the_smallest_of_numbers() -> None:
    tree = SumTree(100)
    tree.set(np.array([57]), 5e-324)
    assert tree.sample(np.array([0.0, 0.9])).tolist() == [57, 57]


@pytest.mark.parametrize("size", SIZES)
def test_sums_never_drift(size: int) -> None:
    rng = np.random.default_rng(5)
    tree = SumTree(size)
    for _ in range(300):
        index = rng.integers(size, size=rng.integers(20))
        tree.set(index, 10.0 ** rng.uniform(-8, 8, len(index)))
    fresh = SumTree(size)
    fresh.restore(tree.state())
    assert tree.total == fresh.total
    share = rng.random(500)
    np.testing.assert_array_equal(tree.sample(share), fresh.sample(share))
    tree.set(np.arange(size), 0.0)
    assert tree.total == 0.0


def test_the_last_of_two_priorities_for_one_leaf_stays() -> None:
    tree = SumTree(1000)
    tree.set(np.array([900, 3, 900]), np.array([5.0, 1.0, 2.0]))
    assert tree.get(np.array([900, 3])).tolist() == [2.0, 1.0]
    assert tree.total == 3.0


@pytest.mark.parametrize("size", SIZES)
def test_bytes_are_known_before(size: int) -> None:
    assert SumTree.required_nbytes(size) == SumTree(size).nbytes
