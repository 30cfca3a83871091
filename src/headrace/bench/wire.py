"""Frames from one process to another: our pool beside bare gRPC streams and Ray.

Every implementation sends the same frames and gets the same actions back, in turns A B A B, each in
processes of its own, so that a machine that is slower for a while is so for all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from headrace.bench.settings import OutputArguments, cell, check_positive, parsed
from headrace.bench.wire_ours import messages
from headrace.bench.wire_tally import TIMEOUT_S, Task
from headrace.bench.wire_turn import IMPLEMENTATIONS, ends_of
from headrace.errors import HeadraceError, PeerLost
from headrace.transport.grpc_common import import_grpc

_START_S = 60.0  # of a turn: Ray takes some
_KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(2**28),
}
"""As `run.system.keep_memory` tells glibc in runs and worker hosts: else each message is mapped
anew, and page faults take as long as all the rest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """Sends frames from a host's process to a server's, which answers with actions.

    headrace is pools/grpc with its link, all but environments and policy. grpc-asyncio is a bare
    stream of as many bytes, with the settings of our channel. ray-actor calls a process that holds
    the frames; on one machine they go through shared memory, not through a socket. The round trip
    runs from the actions leaving the server until the next frames are there.
    """

    implementations: tuple[str, ...] = tuple(IMPLEMENTATIONS)
    """Names what to measure, in turns: these, or others as module:NAME
    (`benchmarks/wire_peers.py`)."""
    envs: int = 64
    """Sends the frames of so many environments in one message."""
    frame_shape: tuple[int, ...] = (84, 84)
    """Sets the shape of one environment's uint8 frame, in pixels."""
    in_flight: tuple[int, ...] = (1, 2)
    """Keeps so many messages under way at a time: a row for each."""
    seconds: float = 4.0
    """Measures each turn for so many seconds."""
    rounds: int = 3
    """Gives each so many turns; rates are their medians."""
    output: OutputArguments = field(default_factory=OutputArguments)

    def __post_init__(self) -> None:
        check_positive(
            envs=self.envs,
            in_flight=min(self.in_flight, default=0),
            seconds=self.seconds,
            rounds=self.rounds,
            frame_shape=min(self.frame_shape, default=0),
        )
        for name in self.implementations:
            ends_of(name)  # refuses what it does not know


SMOKE = Arguments(
    output=OutputArguments(smoke=True),
    implementations=("headrace", "grpc-asyncio"),
    in_flight=(2,),
    seconds=0.2,
    rounds=1,
)


def run(argv: list[str]) -> None:
    """Measures what `argv` asks for and prints it."""
    arguments = parsed("wire", argv, Arguments(), smoke=SMOKE)
    import_grpc()  # if it is missing, that is said here and not by every turn
    rows = []
    for in_flight in arguments.in_flight:
        rows += measure(arguments, in_flight)
    if arguments.output.json:
        print(json.dumps({"rows": rows}))
    else:
        Console().print(table(arguments, rows))


def measure(arguments: Arguments, in_flight: int) -> list[dict[str, Any]]:
    """Returns a row for each implementation that works here, measured in turns."""
    tasks = [
        Task(
            implementation=name,
            envs=arguments.envs,
            frame_shape=arguments.frame_shape,
            in_flight=in_flight,
            seconds=arguments.seconds,
        )
        for name in arguments.implementations
    ]
    turns: dict[str, list[dict[str, Any]]] = {}
    failed: dict[str, str] = {}
    for _ in range(arguments.rounds):
        for task in tasks:
            name = task.implementation
            if name in failed:
                continue
            try:
                turns.setdefault(name, []).append(turn(task))
            except HeadraceError as error:
                failed[name] = str(error)
                print(f"{name} left out: {error}", file=sys.stderr)
    if "headrace" in failed:
        raise PeerLost(failed["headrace"])
    kept = [task for task in tasks if task.implementation not in failed]
    rows = [row_of(task, turns[task.implementation]) for task in kept]
    ours = next((row["agent_steps_per_s"] for row in rows if row["name"] == "headrace"), None)
    for row in rows:
        row["headrace_over_it"] = ours and ours / row["agent_steps_per_s"]
    return rows


def row_of(task: Task, turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns what is printed of one implementation."""
    rates = np.array([task.envs * each["messages"] / each["elapsed_s"] for each in turns])
    latency_us = np.concatenate([each["latency_s"] for each in turns]) * 1e6
    rate = float(np.median(rates))
    return {
        "name": task.implementation,
        "in_flight": task.in_flight,
        "through": ends_of(task.implementation).through,
        "agent_steps_per_s": rate,
        "spread": float(np.ptp(rates)) / rate,
        "bytes_per_s": rate / task.envs * sum(map(len, messages(task))),
        "round_trip_us_p50": float(np.quantile(latency_us, 0.5)),
        "round_trip_us_p99": float(np.quantile(latency_us, 0.99)),
        "server_cores": _cores(turns, "server_cpu_s"),
        "host_cores": _cores(turns, "host_cpu_s"),
    }


def _cores(turns: list[dict[str, Any]], name: str) -> float | None:
    """Returns how many cores one end kept busy; None where that is not known."""
    shares = [each[name] / each["elapsed_s"] for each in turns if each[name] is not None]
    return float(np.median(shares)) if shares else None


def table(arguments: Arguments, rows: list[dict[str, Any]]) -> Table:
    """Returns the rows for people."""
    shape = " x ".join(map(str, (arguments.envs, *arguments.frame_shape)))
    shown = Table(
        title=f"messages of {shape} bytes, in turns",
        caption="n in flight; cores of server + host; ÷: headrace's steps/s over these",
        padding=(0, 0),
    )
    shown.add_column("")
    columns = ("n", "steps/s", "spread", "MB/s", "p50 µs", "p99 µs", "cores", "÷")
    for name in columns:
        shown.add_column(name, justify="right")
    for row in rows:
        ratio = row["headrace_over_it"]
        shown.add_row(
            row["name"],
            str(row["in_flight"]),
            cell(row["agent_steps_per_s"]),
            f"{row['spread']:.0%}",
            cell(row["bytes_per_s"] / 1e6),
            cell(row["round_trip_us_p50"]),
            cell(row["round_trip_us_p99"]),
            " + ".join(
                "?" if row[end] is None else f"{row[end]:.2f}"
                for end in ("server_cores", "host_cores")
            ),
            "" if ratio is None else f"{ratio:.2f}",
        )
    return shown


def turn(task: Task) -> dict[str, Any]:
    """Runs one turn in processes of its own, of which nothing is left.

    Raises:
        PeerLost: it failed; says what it said last.
    """
    plain = task.implementation == "ray-actor"  # its many processes are as its users have them
    environment = os.environ | ({} if plain else _KEEP_MEMORY)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # we may be there alone
    command = [sys.executable, "-P", "-m", "headrace.bench.wire_turn"]
    command.append(json.dumps(dataclasses.asdict(task)))
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            start_new_session=True,
        )
        try:
            printed, _ = process.communicate(timeout=2 * task.seconds + TIMEOUT_S + _START_S)
        except subprocess.TimeoutExpired as error:
            raise PeerLost(f"it did not end within {error.timeout:.0f} s") from error
        finally:
            _end(process)
        lines = printed.splitlines()
        if process.returncode or not lines:
            said.seek(0)
            last = (said.read().strip().splitlines() or ["it said nothing"])[-1]
            raise PeerLost(f"it ended with {process.returncode}: {last}")
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def _end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):  # it and its children have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
