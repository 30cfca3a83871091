"""`headrace bench replay`: what it prints, and that all it compares do the same work."""

from __future__ import annotations

import json
import math
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headrace import catalog
from headrace.bench import command
from headrace.bench.replay import IMPLEMENTATIONS, Rates, in_turns, row_of
from headrace.bench.replay_kinds import Implementation, Problem, Stream, segment
from headrace.errors import ConfigError

PROBLEM = Problem(
    capacity=16,
    batch_size=6,
    num_envs=4,
    segment_steps=4,
    sequence_steps=12,
    stride_steps=8,
    frame_shape=(3, 5),
    state_size=2,
)
SEQUENCES, CPPRB = "replay_peers:TorchrlSequences", "replay_peers:Cpprb"  # of benchmarks/
MODULES = {"torchrl": "torchrl", SEQUENCES: "torchrl", CPPRB: "cpprb"}


def installed(*names: str) -> list[str]:
    return [name for name in names if not (m := MODULES.get(name)) or find_spec(m)]


OURS = installed(*IMPLEMENTATIONS)
INSTALLED = installed("headrace", "torchrl", SEQUENCES, CPPRB, "copy")


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with PYTHONPATH=benchmarks."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))


def made_of(name: str) -> Implementation:
    make = catalog.resolve("implementation", IMPLEMENTATIONS, name)
    made: Implementation = make(PROBLEM, stream(), np.random.default_rng(1))
    return made


def stream() -> Stream:
    return Stream(PROBLEM, np.random.default_rng(0))


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    command.run(["replay", "--smoke", "--json", *argv])
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    result = printed(capsys)
    assert [row["implementation"] for row in result["rows"]] == OURS
    for row in result["rows"]:
        assert row.keys() >= {"capacity", "bytes_per_batch", "share_of_copy", "times_torchrl"}
        for name in ("sampled_sequences_per_s", "inserted_sequences_per_s", "bytes_per_step"):
            assert 0 < row[name] < math.inf
    assert result["rows"][-1]["share_of_copy"] == 1.0
    assert [point["capacity"] for point in result["curve"]] == [100, 1000]
    assert all(0 < point["sample_us"] < math.inf for point in result["curve"])
    assert result["setting"]["threads"] >= 1
    assert torch.get_num_threads() == threads


def test_others_take_part_by_their_module(capsys: pytest.CaptureFixture[str]) -> None:
    rows = printed(capsys, "--seconds", "0.05", "--implementation", *INSTALLED)["rows"]
    assert [row["implementation"] for row in rows] == INSTALLED
    assert all(row["sampled_sequences_per_s"] > 0 for row in rows)


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    command.run(["replay", "--smoke", "--seconds", "0.05", "--implementation", "headrace", "copy"])
    text = capsys.readouterr().out
    assert "headrace" in text
    assert "sample us" in text


def test_what_is_not_installed_is_left_out_with_the_way_to_have_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cpprb", None)
    command.run(["replay", "--smoke", "--json", "--seconds", "0.05", "--implementation", "copy"])
    assert not capsys.readouterr().err
    with pytest.raises(ConfigError, match="nothing is left"):
        command.run(["replay", "--smoke", "--implementation", CPPRB])
    assert 'replay_peers:Cpprb left out: no module cpprb: pip install "headrace[bench]"' in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--implementation", "headrase"), "did you mean headrace"),
        (("--capacity", "18"), "multiple of 4, not 18"),
        (("--batch-size", "0"), "--batch-size must be positive"),
    ],
)
def test_mistakes(argv: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        command.run(["replay", "--smoke", *argv])


@pytest.mark.parametrize("name", [name for name in INSTALLED if name != "copy"])
def test_every_one_delivers_rows_of_one_environment_in_their_order(name: str) -> None:
    made = made_of(name)
    stored = 0
    # TorchRL's slices may cross the place that is written next, once it has come around.
    while stored < PROBLEM.capacity * (0.5 if name == "torchrl" else 2.5):
        stored += made.insert()
    seen = set()
    for _ in range(20):
        frames = np.asarray(made.sample()[0]).reshape(PROBLEM.batch_size, PROBLEM.rows, -1)
        env, row = frames[..., 0].astype(int), frames[..., 1].astype(int)
        assert (env == env[:, :1]).all()
        assert (np.diff(row, axis=1) % stream().period == 1).all()
        seen.update(env[:, 0].tolist())
    assert seen == set(range(PROBLEM.num_envs))


def test_all_deliver_at_least_the_bytes_of_the_copy() -> None:
    delivered = {}
    for name in INSTALLED:
        made = made_of(name)
        for _ in range(PROBLEM.capacity // PROBLEM.inserted_sequences):
            made.insert()
        delivered[name] = sum(part.nbytes for part in made.sample())
    assert min(delivered, key=delivered.__getitem__) == "copy"


def test_the_copy_reads_memory_that_was_written() -> None:
    copy = made_of("copy")
    first = copy.sample()[0].copy()
    # Untouched memory reads as zeros, and the first reading of it is slow: no wall for others.
    assert len(np.unique(first)) > 100
    assert not np.array_equal(first, copy.sample()[0])


def test_segments_follow_upon_each_other() -> None:
    steps, source = PROBLEM.segment_steps, stream()
    first, second = segment(source, 0, steps), segment(source, steps, steps)
    assert torch.equal(first.frames[:, steps], second.frames[:, 0])
    assert (first.host["reward"][:, steps] == second.host["reward"][:, 0]).all()
    last = segment(source, source.period - steps, steps)
    assert torch.equal(last.frames[:, steps], first.frames[:, 0])
    assert torch.equal(second.recurrent[1], torch.from_numpy(source.state[1][:, steps]))


class Counted:
    """Does nothing; knows how often it was asked."""

    bytes_per_step = 1.0

    def __init__(self, log: list[str], name: str) -> None:
        self._log, self._name = log, name

    def insert(self) -> int:
        return 1

    def sample(self) -> list[Any]:
        if self._log[-1:] != [self._name]:
            self._log.append(self._name)
        return [np.zeros((2, 3))]


def test_all_take_turns() -> None:
    log: list[str] = []
    rates = in_turns({name: Counted(log, name) for name in "ab"}, 0.01)
    assert log == ["a", "b"] * 5
    assert all(len(taken) == 5 and (taken > 0).all() for taken in rates["a"])


def test_ratios_are_of_the_same_round() -> None:
    rates = {
        "headrace": Rates(np.array([30.0, 3.0, 6.0]), np.ones(3)),
        "torchrl": Rates(np.array([10.0, 1.0, 2.0]), np.ones(3)),
    }
    row = row_of("headrace", Counted([], ""), rates, PROBLEM, delivered=600)
    assert row["times_torchrl"] == 3.0
    assert row["share_of_copy"] is None
    assert row["sampled_sequences_per_s"] == 6.0
    assert row["gb_per_s"] == pytest.approx(6.0 * 100 / 1e9)
