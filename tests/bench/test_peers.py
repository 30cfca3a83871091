"""`benchmarks/peers.py` with made-up scripts: what takes part, what is left out and why."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

GOOD = """
import argparse, json, sys
parser = argparse.ArgumentParser()
parser.add_argument("--warmup-s", type=float, required=True)
parser.add_argument("--seconds", type=float, required=True)
args = parser.parse_args()
print("it says this first, and this on the side", file=sys.stderr)
print("a line before")
print(json.dumps({"agent_steps_per_s": 100 * args.seconds, "passes": 4 * args.warmup_s}))
"""


def script(folder: Path, name: str, text: str) -> str:
    """Writes a script; returns what to say of it."""
    path = folder / f"{name}.py"
    path.write_text(text)
    return f"--script={name}={path}"


def ran(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "peers.py"), *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def compared(*argv: str) -> tuple[dict[str, Any], str]:
    """Returns the JSON of a comparison of scripts alone, and what it said meanwhile."""
    ended = ran("--warmup-s", "0.5", "--seconds", "0.25", "--json", *argv)
    assert ended.returncode == 0, ended.stderr
    result: dict[str, Any] = json.loads(ended.stdout)
    return result, ended.stderr


def test_scripts_take_part_in_turns(tmp_path: Path) -> None:
    slow = GOOD.replace("100 *", "50 *")
    two = (script(tmp_path, "fast", GOOD), script(tmp_path, "slow", slow))
    result, said = compared("--contestants", *two, "--rounds", "2")
    assert result["against"] == "fast"
    assert result["left_out"] == {}
    fast, slower = result["contestants"]["fast"], result["contestants"]["slow"]
    assert fast["agent_steps_per_s"] == [25.0, 25.0]
    assert (fast["passes"], slower["ratio_of_medians"]) == (2.0, 2.0)
    order = [line.split(":")[0] for line in said.splitlines() if line.startswith("round")]
    assert order == ["round 1 fast", "round 1 slow", "round 2 fast", "round 2 slow"]


def test_a_program_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "program.sh"
    path.write_text('#!/bin/sh\necho "{\\"agent_steps_per_s\\": 7, \\"passes\\": 1}"\n')
    path.chmod(0o755)
    result, _ = compared("--contestants", "--rounds", "1", "--script", f"sh={path}")
    assert result["contestants"]["sh"]["median"] == 7.0


BAD = {
    "fails": ("import sys; print('so far'); sys.exit('no such game')", "it ended with 1"),
    "says-no-json": ("print('42 steps')", "its last line is no JSON object: '42 steps'"),
    "says-nothing": ("", "its last line is no JSON object: ''"),
    "says-a-list": ("print('[1]')", "no positive number agent_steps_per_s"),
    "has-no-passes": ("print('{\"agent_steps_per_s\": 5}')", "no positive number passes"),
    "has-a-text": (GOOD.replace("100 * args.seconds", "'9'"), "no positive number agent_steps"),
    "is-not-last": (GOOD + "print('bye')", "its last line is no JSON object: 'bye'"),
    "stands-still": (GOOD.replace("100 *", "0 *"), "no positive number agent_steps_per_s"),
    "hangs": ("import time; time.sleep(600)", "it was still running after"),
}


def test_who_fails_is_named_and_the_round_goes_on(tmp_path: Path) -> None:
    scripts = [script(tmp_path, name, text) for name, (text, _) in BAD.items()]
    good = script(tmp_path, "good", GOOD)
    quick = ("--rounds", "2", "--warmup-s", "0.1", "--seconds", "0.1", "--start-timeout-s", "5")
    result, said = compared(*quick, "--contestants", *scripts, good)
    assert list(result["contestants"]) == ["good"]
    assert len(result["contestants"]["good"]["agent_steps_per_s"]) == 2
    assert result["left_out"].keys() == BAD.keys()
    for name, (_, reason) in BAD.items():
        assert reason in result["left_out"][name]
        assert said.count(f"{name} left out: ") == 1  # once, and no second try
    assert "no such game" in said


def test_what_cannot_be_installed_is_named(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.write_text("no folder")
    for job, name in (("pong", "rllib-impala"), ("sac", "rllib")):
        argv = ("--job", job, "--cache", str(cache), "--contestants", name, "--rounds", "1")
        result, said = compared(*argv, script(tmp_path, "good", GOOD))
        assert list(result["left_out"]) == [name]
        assert f"{name} left out: " in said
        assert result["against"] == "good"


def test_a_table_says_who_is_missing(tmp_path: Path) -> None:
    scripts = [script(tmp_path, "good", GOOD), script(tmp_path, "bad", "1 / 0")]
    ended = ran("--warmup-s", "1", "--seconds", "1", "--rounds", "1", "--contestants", *scripts)
    assert ended.returncode == 0, ended.stderr
    assert "good / this" in ended.stdout
    assert "bad left out: it ended with 1" in ended.stdout


def test_nobody_left_is_a_failure(tmp_path: Path) -> None:
    ended = ran("--rounds", "1", "--contestants", script(tmp_path, "bad", "1 / 0"))
    assert ended.returncode == 1
    assert ended.stderr.endswith("nobody is left to compare\n")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--script", "mine"), "write NAME=PATH, not 'mine'"),
        (("--script", "=mine.py"), "write NAME=PATH"),
        (("--script", "mine="), "write NAME=PATH"),
        (("--script", "mine=/no/such.py"), "no file /no/such.py"),
        (("--script", f"headrace={__file__}"), "there is a contestant of that name"),
        (("--script", f"a={__file__}", "--script", f"a={__file__}"), "a contestant of that name"),
        (("--contestants", "rlib"), "no contestant rlib; known: headrace"),
        (("--contestants",), "nobody to compare"),
        (("--job", "sac", "--until-return", "5", "--script", f"a={__file__}"), "not for --script"),
        (("--job", "sac", "--until-return", "5", "--contestants", "rllib"), "not for rllib"),
    ],
)
def test_a_mistake_is_one_sentence(argv: tuple[str, ...], said: str) -> None:
    ended = ran(*argv)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert said in ended.stderr
    assert ended.stdout == ""


def test_a_runner_that_learned_from_nothing_has_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    read = importlib.import_module("peer_processes").result_anywhere
    line = '{"agent_steps_per_s": 3.5, "agent_steps": 7}'
    assert read(f"loading\n{line}\nbye {{}}\n")["agent_steps_per_s"] == 3.5
    with pytest.raises(ValueError, match="learned from nothing"):
        read(line.replace("3.5", "0.0"))
    with pytest.raises(ValueError, match="printed no agent_steps_per_s"):
        read("{}")
