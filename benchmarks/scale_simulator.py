"""A process of simulated hosts, seen from its parent: started, told, heard and ended."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import queue
import subprocess
import sys
import threading
from pathlib import Path

from scale_hosts import Task


class Simulator:
    """A process of simulated hosts."""

    def __init__(self, task: Task) -> None:
        script = Path(__file__).with_name("scale_hosts.py")
        self.said: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._process = subprocess.Popen(
            [sys.executable, str(script), json.dumps(dataclasses.asdict(task))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def tell(self, word: str) -> None:
        """Says a line to it."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # what it had to say is read by then
            self._process.stdin.write(f"{word}\n")
            self._process.stdin.flush()

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.said.put(line)
        self.said.put("")
