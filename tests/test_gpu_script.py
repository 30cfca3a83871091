"""scripts/gpu: parts fail apart from each other, are in time, and can be tried without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu"

# Stands in for headrace: does what its arguments say.
PROGRAM = """
import sys, time
if "fails" in sys.argv:
    sys.exit("no such environment")
if "hangs" in sys.argv:
    time.sleep(600)
print("a line before")
print('{"rate": %d}' % len(sys.argv) if "speaks" in sys.argv else "a table")
"""
TESTS = """
import pytest

def test_good(): pass
def test_other(): assert {other}
@pytest.mark.skip
def test_not_here(): pass
"""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module; it has no suffix by which Python would know it."""
    loader = SourceFileLoader("gpu", str(SCRIPT))
    spec = importlib.util.spec_from_loader("gpu", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    loader.exec_module(module)
    module.HEADRACE = [sys.executable, "-c", PROGRAM]
    return module


def test_all_parts_together_take_less_than_ten_minutes(gpu: Any) -> None:
    assert sum(part.timeout_s for part in gpu.PARTS.values()) <= 590
    for part in gpu.PARTS.values():
        if part.command:
            assert "--device cuda" in part.command
            assert "--device cpu" in part.dry  # the last of two counts


def test_a_part_that_fails_stops_no_other(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.PARTS = {
        "broken": gpu.Part("fails", "", 60.0),
        "mute": gpu.Part("shows", "", 60.0),
        "late": gpu.Part("hangs", "", 0.5),
        "fine": gpu.Part("speaks", "--tiny 1", 60.0),
    }
    assert gpu.main(["--dry"]) == 1
    printed = json.loads(capsys.readouterr().out)
    parts = printed["parts"]
    assert printed["dry"] is True
    assert "no such environment" in parts["broken"]["error"]
    assert "it printed no JSON" in parts["mute"]["error"]
    assert "still running" in parts["late"]["error"]
    assert parts["fine"]["result"] == {"rate": 4}  # its dry flags came too
    assert parts["fine"]["command"] == "headrace speaks"


def test_where_all_works_the_exit_code_says_so(
    gpu: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu.PARTS = {"fine": gpu.Part("speaks", "", 60.0)}
    assert gpu.main(["--dry"]) == 0
    assert json.loads(capsys.readouterr().out)["parts"]["fine"]["result"] == {"rate": 2}


def made_up_tests(gpu: Any, folder: Path, *, other: bool) -> None:
    (folder / "test_made_up.py").write_text(TESTS.format(other=other))
    gpu.PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]


def test_tests_are_counted(gpu: Any, tmp_path: Path) -> None:
    made_up_tests(gpu, tmp_path, other=True)
    part = gpu.Part("", "", 60.0)
    assert gpu.result_of_tests(part, dry=False) == {"passed": 2, "failed": 0, "skipped": 1}
    assert gpu.result_of_tests(part, dry=True) == {"collected": 3}


def test_a_test_that_fails_is_an_error_that_shows_it(gpu: Any, tmp_path: Path) -> None:
    made_up_tests(gpu, tmp_path, other=False)
    with pytest.raises(gpu.PartFailed, match=r'"passed": 1, "failed": 1.*(\n.*)*assert False'):
        gpu.result_of_tests(gpu.Part("", "", 60.0), dry=False)


def test_no_test_at_all_is_an_error(gpu: Any, tmp_path: Path) -> None:
    made_up_tests(gpu, tmp_path, other=True)
    gpu.PYTEST += ["-k", "test_not_here"]
    with pytest.raises(gpu.PartFailed, match="no test ran"):
        gpu.result_of_tests(gpu.Part("", "", 60.0), dry=False)


def test_without_a_gpu_it_says_so(
    gpu: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "scripts/gpu: there is no GPU here; --dry tries every command without\n"


@pytest.mark.slow
def test_dry_tries_every_command() -> None:
    pytest.importorskip("ale_py")
    pytest.importorskip("mujoco")
    ended = subprocess.run(
        [str(SCRIPT), "--dry"],
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=590,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    parts = json.loads(ended.stdout)["parts"]
    assert parts["tests"]["result"]["collected"] > 0
    rates = [parts[name]["result"] for name in ("impala_deep_learner", "sac_update_rate")]
    assert all(rate["updates_per_s"] > 0 for rate in rates)
    assert parts["impala_deep_inference"]["result"]["rows"]
    assert parts["pong_end_to_end"]["result"]["agent_steps_per_s"] > 0
