"""scripts/plot: what it draws from, and what it says of what is none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "plot"


def plot(run: Path) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("matplotlib")
    out = str(run.with_name("curve.png"))
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(run), "--out", out],
        capture_output=True,
        text=True,
        check=False,
    )


def test_rows_are_all_that_it_needs(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    rows = [{"elapsed_s": 60.0 * minute, "return_mean": minute / 2} for minute in range(3)]
    strange = [{"elapsed_s": "x", "return_mean": 1.0}, {"return_mean": 1.0}, {"elapsed_s": 9.0}]
    lines = [json.dumps(row) for row in [*rows, *strange]]
    (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    ended = plot(run)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "has no metrics.jsonl: check the path"),
        ("{}\n", "no episode has ended"),
        ("[\n", "line 1, is not JSON"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, text: str | None, complaint: str) -> None:
    run = tmp_path / "run\x1b[2J"
    run.mkdir()
    if text is not None:
        (run / "metrics.jsonl").write_text(text)
    ended = plot(run)
    assert ended.returncode == 1
    assert complaint in ended.stderr
    assert ended.stderr[:-1].isprintable()
