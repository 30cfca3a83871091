"""`headrace worker --connect HOST:PORT`: a machine that steps environments for a run elsewhere."""

from __future__ import annotations

import time
from dataclasses import dataclass

import tyro

from headrace.run.host import HostConfig, run_host
from headrace.run.stop import stop_signals
from headrace.run.system import keep_memory
from headrace.run_files import escaped_lines
from headrace.transport.settings import LinkConfig


@dataclass(frozen=True, kw_only=True)
class WorkerArguments:
    """Steps environments on this machine for a run on another one, until that is over.

    A run that was started with headrace train ENV --listen HOST:PORT waits for such hosts. A host
    needs headrace and the packages of the environment, and no settings. It may come and go at any
    time: what it stepped goes to another host, or back to it, and starts anew. Where the connection
    is lost it tries again. Exit code 0: the run is over, or Ctrl-C; 1: the environments fail, or
    the run stayed away; 2: something that you can mend.
    """

    link: LinkConfig
    host: HostConfig


def worker_command(argv: list[str]) -> None:
    """Steps environments for a run elsewhere."""
    arguments = tyro.cli(
        tyro.conf.OmitArgPrefixes[WorkerArguments], args=argv, prog="headrace worker"
    )
    keep_memory()
    with stop_signals() as stop:
        run_host(
            arguments.link,
            arguments.host,
            stop=lambda: stop.requested,
            on_message=_say,
        )


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {escaped_lines(line)}", flush=True)
