"""`headrace bench wire` and `benchmarks/scale.py` run and print what they promise."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from headrace.bench import command
from headrace.bench.wire_tally import Tally
from headrace.errors import ConfigError

SCALE = Path(__file__).parents[2] / "benchmarks" / "scale.py"
BENCHMARKED = ("THREADS", "RPC", "RPC_TCP")

pytest.importorskip("grpc")


def measured(capsys: pytest.CaptureFixture[str], *argv: str) -> list[dict[str, Any]]:
    command.run(["wire", "--smoke", "--seconds", "0.1", *argv, "--json"])
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["rows"]
    return rows


def check(row: dict[str, Any], envs: int) -> None:
    assert row["agent_steps_per_s"] > 0
    assert 0 < row["round_trip_us_p50"] <= row["round_trip_us_p99"]
    assert row["bytes_per_s"] / row["agent_steps_per_s"] > 84 * 84
    assert row["bytes_per_s"] / row["agent_steps_per_s"] < 84 * 84 + 40 + 600 / envs


@pytest.mark.net
def test_wire(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["headrace", "grpc-asyncio"]
    ours, bare = measured(capsys, "--implementations", *names, "--envs", "16")
    assert [ours["name"], bare["name"]] == names
    for row in (ours, bare):
        check(row, 16)
    ratio = ours["agent_steps_per_s"] / bare["agent_steps_per_s"]
    assert bare["headrace_over_it"] == pytest.approx(ratio)
    assert ours["headrace_over_it"] == 1.0


@pytest.mark.net
@pytest.mark.slow
@pytest.mark.parametrize("name", ["ray-actor", *(f"wire_peers:{name}" for name in BENCHMARKED)])
def test_what_others_use(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SCALE.parent))
    if name == "ray-actor":
        pytest.importorskip("ray")
    (row,) = measured(capsys, "--implementations", name, "--in-flight", "2")
    check(row, 64)


def test_an_unknown_implementation_is_told_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean ray-actor"):
        command.run(["wire", "--implementations", "ray-actr"])


def test_a_tally_counts_only_between_its_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr("headrace.bench.wire_tally.time.perf_counter", lambda: now_s)
    tally = Tally(1.0, host_cpu_s=lambda: now_s / 2)
    while not tally.over:
        tally.arrived(0)
        tally.answered(0)
        now_s += 0.125
    result = tally.result()
    assert result["elapsed_s"] == 1.0
    assert result["messages"] == 8
    assert result["latency_s"] == [0.125] * 8
    assert result["host_cpu_s"] == 0.5


@pytest.mark.net
def test_scale() -> None:
    # With latencies, stragglers, and hosts that leave and come back.
    argv = ["--hosts", "3", "--step-ms", "1", "--delay-ms", "0.2", "--lifetime-s", "0.2"]
    ended = subprocess.run(
        [sys.executable, str(SCALE), "--smoke", *argv, "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout)
    (row,) = result["rows"]
    assert (row["hosts"], row["envs"]) == (3, 24)
    assert row["agent_steps_per_s"] > 0
    assert 0 < row["batch_fill"] <= 1
    assert 0 < row["share_of_offered"] < 1.5
    assert math.isfinite(row["round_trip_us_p99"])
    assert result["knee"] is None or result["knee"] == row
