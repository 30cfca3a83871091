"""Wall-clock time until an agent plays well: training that is paused while it is judged.

```
training     ──▶ checkpoint ──▶ ⏸ (SIGSTOP)          ▶ (SIGCONT) ──▶ checkpoint ──▶ …
evaluator                          5 greedy episodes
clock        ──────────────────▶ ⏸                   ▶ ─────────────────────────▶ …
```
The same rule for all: the clock starts with the command, so imports, compilation and random steps
count, and so does the writing of checkpoints; what stands still is only the time in which training
stands still. A checkpoint's time is that of its file. Episodes, seeds and the loop that plays them
are the same (`peer_runners/greedy.py`), in a process that waits for checkpoints and keeps no core
busy meanwhile.
"""

from __future__ import annotations

import json
import select
import signal
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from peer_processes import failure, running, signal_session

EVALUATION_TIMEOUT_S = 300.0
_LOOK_S = 0.1


@dataclass(frozen=True, kw_only=True)
class Trial:
    """How one contestant trains, and how what it leaves is judged."""

    training: list[str]
    """Command that writes checkpoints named agent_steps_N."""
    evaluator: list[str]
    """Command that reads paths of checkpoints and answers each with a JSON object of returns."""
    checkpoints: Path
    folder: str
    """Where both run."""


def until_return(
    trial: Trial, *, target: float, max_seconds: float, start_timeout_s: float
) -> dict[str, Any]:
    """Trains until greedy episodes have `target` as their mean, or for `max_seconds`.

    Returns:
        seconds and agent_steps of the first checkpoint that did, None if none; the curve.

    Raises:
        RuntimeError: training or evaluator ended or fell silent.
    """
    curve: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryFile("w+") as said,
        tempfile.TemporaryFile("w+") as judged,
        running(trial.evaluator, judged, folder=trial.folder, talks=True) as evaluator,
    ):
        _answer(evaluator, trial.evaluator, judged, "")  # it has started, and is quiet from now on
        launched_s, paused_s = time.time(), 0.0
        seen: set[Path] = set()
        with running(trial.training, said, folder=trial.folder) as training:
            while True:
                time.sleep(_LOOK_S)
                if training.poll() is not None:
                    raise failure(trial.training, training.returncode, said)
                trained_s = time.time() - launched_s - paused_s
                fresh = set(trial.checkpoints.glob("agent_steps_*")) - seen
                if not seen and not fresh and trained_s > start_timeout_s:
                    raise failure(trial.training, "it wrote no checkpoint", said)
                if trained_s > max_seconds:
                    return _result(None, curve, trained_s)
                if not fresh:
                    continue
                seen |= fresh
                newest = max(fresh)
                signal_session(training.pid, signal.SIGSTOP)
                stopped_s = time.time()
                returns = _answer(evaluator, trial.evaluator, judged, str(newest))
                mean = statistics.mean(returns)
                point = {
                    "seconds": _written_s(newest) - launched_s - paused_s,
                    "agent_steps": int(newest.name.split("_")[2].split(".")[0]),
                    "return_mean": mean,
                    "returns": returns,
                }
                curve.append(point)
                if mean >= target:
                    return _result(point, curve, stopped_s - launched_s - paused_s)
                signal_session(training.pid, signal.SIGCONT)
                paused_s += time.time() - stopped_s


def _result(
    reached: dict[str, Any] | None, curve: list[dict[str, Any]], trained_s: float
) -> dict[str, Any]:
    return {
        "seconds": reached and reached["seconds"],
        "agent_steps": reached and reached["agent_steps"],
        "trained_s": trained_s,
        "curve": curve,
    }


def _written_s(checkpoint: Path) -> float:
    """Returns when the last file of a checkpoint was written."""
    files = list(checkpoint.iterdir()) if checkpoint.is_dir() else [checkpoint]
    return max(file.stat().st_mtime for file in files)


def _answer(
    evaluator: subprocess.Popen[str], command: list[str], judged: IO[str], checkpoint: str
) -> list[float]:
    """Asks for the returns of a checkpoint; of none, "", the answer is an empty list."""
    stdin, stdout = evaluator.stdin, evaluator.stdout
    if stdin is None or stdout is None:
        raise ValueError("the evaluator must talk")
    stdin.write(checkpoint + "\n")
    stdin.flush()
    until_s = time.monotonic() + EVALUATION_TIMEOUT_S
    while select.select([stdout], [], [], max(0.0, until_s - time.monotonic()))[0]:
        line = stdout.readline()
        if not line:
            break
        if line.startswith("{"):
            returns: list[float] = json.loads(line)["returns"]
            return returns
    raise failure(command, evaluator.poll() or "it fell silent", judged)
