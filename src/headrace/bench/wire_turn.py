"""One turn of `headrace bench wire`: `python -m headrace.bench.wire_turn TASK [ADDRESS]`.

Without an address it is the server's end: it starts the host's, measures, and prints one JSON line.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from headrace import catalog
from headrace.bench.wire_tally import Tally, Task, cpu_s_of
from headrace.errors import ConfigError

_OURS, _PEERS = "headrace.bench.wire_ours", "headrace.bench.wire_peers"


class Ends(NamedTuple):
    """Where the two ends of an implementation are."""

    server: str
    host: str  # empty: the server starts it
    through: str  # what bytes go through when both are on one machine


IMPLEMENTATIONS = {
    "headrace": Ends(f"{_OURS}:Server", f"{_OURS}:host", "loopback"),
    "grpc-asyncio": Ends(f"{_PEERS}:AsyncStreamServer", f"{_PEERS}:async_stream_host", "loopback"),
    "ray-actor": Ends(f"{_PEERS}:RayServer", "", "shared memory"),
}


def ends_of(implementation: str) -> Ends:
    """Returns the ends of one of these, or of another's "module:NAME", which is an `Ends`.

    Raises:
        ConfigError: there is none of that name.
    """
    known = IMPLEMENTATIONS.get(implementation)
    if known is None and ":" not in implementation:
        nearest = catalog.nearest(implementation, IMPLEMENTATIONS)
        raise ConfigError(f"--implementations: {nearest}, not {implementation!r}")
    found: Ends = known or catalog.import_attribute("implementation", implementation)
    return found


def task_of(text: str) -> Task:
    """Returns the task that `json.dumps` of its fields made."""
    fields = json.loads(text)
    return Task(**{**fields, "frame_shape": tuple(fields["frame_shape"])})


def serve(task: Task, text: str) -> dict[str, Any]:
    """Measures one implementation at the server's end."""
    ends = ends_of(task.implementation)
    server = catalog.import_attribute("benchmark", ends.server)(task)
    host: subprocess.Popen[bytes] | None = None
    try:
        if ends.host:
            command = [sys.executable, "-P", "-m", "headrace.bench.wire_turn"]
            command += [text, server.address]
            host = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        pid = host.pid if host is not None else None
        tally = Tally(task.seconds, host_cpu_s=lambda: None if pid is None else cpu_s_of(pid))
        server.measure(tally)
        return tally.result()
    finally:
        server.close()
        if host is not None:
            host.kill()
            host.wait()


def main(argv: list[str]) -> None:
    """Runs one end."""
    task = task_of(argv[0])
    if len(argv) == 1:
        sys.stdout.write(json.dumps(serve(task, argv[0])) + "\n")
        sys.stdout.flush()
        return
    ends = ends_of(task.implementation)
    host: Callable[[Task, str], None] = catalog.import_attribute("benchmark", ends.host)
    host(task, argv[1])


if __name__ == "__main__":
    main(sys.argv[1:])
