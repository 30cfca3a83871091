"""Runs one command of a comparison, and leaves nothing of it behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
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
    command: list[str], output: IO[str], *, folder: str, talks: bool = False
) -> Iterator[subprocess.Popen[str]]:
    """Runs a command for the block, in a session of its own; then ends what is left of it.

    Args:
        command: what to run.
        output: takes what it says, but for its standard output if it talks.
        folder: where it runs.
        talks: whether to it is spoken through pipes.
    """
    process = subprocess.Popen(
        command,
        cwd=folder,
        stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
        stdout=subprocess.PIPE if talks else output,
        stderr=output,
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


def failure(command: list[str], status: int | str | None, output: IO[str]) -> RuntimeError:
    """Returns an error that says what a command said last."""
    output.seek(0)
    return RuntimeError(f"{' '.join(command)}\nstatus {status}, said:\n{output.read()[-3000:]}")


def measure(command: list[str], timeout_s: float) -> dict[str, Any]:
    """Runs one turn and returns the JSON object that it printed.

    Raises:
        RuntimeError: the turn printed none, failed, or took longer than `timeout_s`.
    """
    status: int | str
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryDirectory() as folder:
        with running(command, output, folder=folder) as process:
            try:
                status = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                status = f"still running after {timeout_s:.0f} s"
        output.seek(0)
        lines = output.read().splitlines()
        found = [line for line in lines if line.startswith("{") and "agent_steps_per_s" in line]
        if status != 0 or not found:
            raise failure(command, status, output)
    result: dict[str, Any] = json.loads(found[-1])
    return result
