"""Runs one command of a comparison, and leaves nothing of it behind."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def signal_session(session: int, number: signal.Signals) -> None:
    """Signals every process of a session: workers may have a group of their own, but not that."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        pid = int(entry.name)
        try:
            if os.getsid(pid) == session:
                os.kill(pid, number)
        except ProcessLookupError:  # it has just ended
            continue


@contextmanager
def running(
    command: list[str],
    output: IO[str],
    *,
    folder: str,
    talks: bool = False,
    complaints: IO[str] | None = None,
) -> Iterator[subprocess.Popen[str]]:
    """Runs a command for the block, in a session of its own; then ends what is left of it.

    Args:
        command: what to run.
        output: takes what it says, but for its standard output if it talks.
        folder: where it runs.
        talks: whether to it is spoken through pipes.
        complaints: takes its standard error; None for `output`.
    """
    process = subprocess.Popen(
        command,
        cwd=folder,
        stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
        stdout=subprocess.PIPE if talks else output,
        stderr=output if complaints is None else complaints,
        start_new_session=True,
        text=True,
    )
    try:
        yield process
    finally:
        signal_session(process.pid, signal.SIGKILL)
        process.wait()
        signal_session(process.pid, signal.SIGKILL)  # what was started during the first look
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def failure(command: list[str], status: int | str | None, *outputs: IO[str]) -> RuntimeError:
    """Returns an error whose first line is the reason; then comes what a command said last."""
    said = ""
    for output in outputs:
        output.seek(0)
        said += output.read()[-3000:]
    reason = status if isinstance(status, str) else f"it ended with {status}"
    return RuntimeError(f"{reason}\n{shlex.join(command)} said:\n{said}")


def result_anywhere(said: str) -> dict[str, Any]:
    """Returns the last JSON object with a rate that a runner of ours printed.

    Raises:
        ValueError: there is none, or its rate is zero.
    """
    lines = [line for line in said.splitlines() if line.startswith("{")]
    for line in reversed(lines):
        if "agent_steps_per_s" in line:
            result: dict[str, Any] = json.loads(line)
            if not result["agent_steps_per_s"] > 0:
                raise ValueError("it learned from nothing in its window")
            return result
    raise ValueError("it printed no agent_steps_per_s")


def result_last(said: str) -> dict[str, Any]:
    """Returns the JSON object of the last line of a user's script.

    Raises:
        ValueError: the last line is none, or lacks a positive rate or its passes.
    """
    last = (said.strip().splitlines() or [""])[-1]
    try:
        result = json.loads(last)
    except ValueError:
        raise ValueError(f"its last line is no JSON object: {last[:200]!r}") from None
    for name in ("agent_steps_per_s", "passes"):
        value: Any = result.get(name) if isinstance(result, dict) else None
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"its last line has no positive number {name}: {last[:200]!r}")
    found: dict[str, Any] = result
    return found


def measure(
    command: list[str],
    timeout_s: float,
    result_of: Callable[[str], dict[str, Any]] = result_anywhere,
) -> dict[str, Any]:
    """Runs one turn and returns the JSON object that `result_of` finds in its standard output.

    Raises:
        RuntimeError: the turn printed none, failed, could not start, or took longer than
            `timeout_s`.
    """
    with (
        tempfile.TemporaryFile("w+") as printed,
        tempfile.TemporaryFile("w+") as complaints,
        tempfile.TemporaryDirectory() as folder,
    ):
        status: int | str
        try:
            with running(command, printed, folder=folder, complaints=complaints) as process:
                status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            status = f"it was still running after {timeout_s:.0f} s"
        except OSError as error:
            status = f"it cannot start: {error.strerror}"
        if status != 0:
            raise failure(command, status, printed, complaints)
        printed.seek(0)
        try:
            return result_of(printed.read())
        except ValueError as error:
            raise failure(command, str(error), printed, complaints) from None
