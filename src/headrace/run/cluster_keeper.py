"""What Ray places: an actor that keeps one process of ours, and never does the work itself.

    driver (run/cluster.py)     Ray      Keeper, on some node          pipes    the process
      start  ------------------------->  starts it  ----------------------------> works
      look   ------------------------->  waits a moment  <----- status, prints -- tells
      say, hang_up  ------------------>  ------------------------- control -----> ends by itself

A learner inside an actor would share its interpreter with Ray's threads, and have neither signals
nor a main thread of its own. The process dies with the actor, and so with its node and its run
(pools/processes.py). Only text goes this way, and little of it: a row of metrics every few seconds.
"""

from __future__ import annotations

import os
import select
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from headrace.pools.processes import WorkerProcess


class Heard(NamedTuple):
    """What a look has brought."""

    messages: Sequence[Mapping[str, Any]] = ()
    printed: Sequence[str] = ()
    death: str | None = None  # why the process is dead; None while it lives


class Keeper:
    """Keeps one process. Ray calls one method at a time."""

    def __init__(self) -> None:
        """Keeps nothing yet."""
        self._process: WorkerProcess | None = None

    def start(
        self,
        module: str,
        settings: Mapping[str, Any],
        name: str,
        variables: Mapping[str, str],
        *,
        paths: Sequence[str],
        folder: str,
    ) -> str:
        """Starts the process and returns the name of this machine.

        Args:
            module: The program.
            settings: Its settings.
            name: Shown by ps.
            variables: Of its environment: secrets come this way, since Ray logs what it is asked to
                put into the environment of an actor.
            paths: Where else to look for modules: the driver's, as far as they exist here.
            folder: Its working folder, if it exists here: the driver's.
        """
        os.environ.update(variables)
        sys.path.extend(path for path in paths if path not in sys.path and Path(path).exists())
        if Path(folder).is_dir():
            os.chdir(folder)
        self._process = WorkerProcess(module, settings, name=name)
        return socket.gethostname()

    def look(self, wait_s: float) -> Heard:
        """Waits until the process tells something or is dead, for `wait_s` at most."""
        process = self._process
        if process is None:
            return Heard(death="it was never started")
        poller = select.poll()
        poller.register(process.status_fd, select.POLLIN)
        poller.poll(wait_s * 1000.0)
        death = process.death()
        heard = Heard(process.messages(), process.printed(), death)
        if death is not None:
            process.close()
            self._process = None
        return heard

    def say(self, data: bytes) -> None:
        """Sends the process something."""
        if self._process is not None:
            self._process.send(data)

    def hang_up(self) -> None:
        """Asks the process to end."""
        if self._process is not None:
            self._process.hang_up()
