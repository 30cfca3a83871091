"""The learner and its server as a process of their own, on a node of a cluster.

    run/cluster.py   --- settings, then lines of JSON: {"counts": ...} ---->   run_training
                     <-- {"address"}, {"row"}, {"message"}, {"checkpoint"} --
                     <-- {"done"}, or {"failed": sentence, "kind"} ----------

When the control pipe closes, the run is saved and ends, as with Ctrl-C. What training raises on
purpose is told and is final; what kills this process is found out by whoever looks after it.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import signal
import threading
import time
from pathlib import Path

from headrace import STARTED_S
from headrace.config import RunConfig, from_dict, to_toml
from headrace.errors import ConfigError, HeadraceError, PeerLost
from headrace.length import clock_from
from headrace.pools.processes import WorkerEnd
from headrace.run.local import Hooks, run_training
from headrace.run.report import Row
from headrace.run.stop import Stop, stop_signals
from headrace.telemetry.record import RunDirectory
from headrace.transport.auth import parse_address

_AGAIN_S = 0.1


class Told:
    """What the driver says while the run goes on. One thread listens, the main thread reads."""

    def __init__(self, end: WorkerEnd) -> None:
        """Listens from now on."""
        self.counts: dict[str, int] = {}  # replaced as a whole, never changed
        self._end = end
        threading.Thread(target=self._listen, name="driver", daemon=True).start()

    def _listen(self) -> None:
        rest = b""
        while True:
            try:
                *lines, rest = (rest + (self._end.receive() or b"")).split(b"\n")
            except PeerLost:
                break
            for line in lines:
                self.counts = json.loads(line)["counts"]
        while True:  # training has a `Stop` of its own, and may be about to put it in place
            handler = signal.getsignal(signal.SIGTERM)
            if isinstance(handler, Stop):
                handler.requested = True
            time.sleep(_AGAIN_S)


class ClusterRun(RunDirectory):
    """The run's folder, whose config.toml keeps what the user has set.

    Where the learner listens and how blocks are cut is found anew in each life.
    """

    def __init__(self, path: Path) -> None:
        """Names only, as always."""
        super().__init__(path)
        self.text = ""

    def rewrite_config(self, config_text: str) -> None:
        """Writes the user's settings instead."""
        super().rewrite_config(self.text)


def open_run(
    path: Path, text: str, *, mark: str, resume: bool, again: bool
) -> tuple[ClusterRun, bool]:
    """Opens the run's folder, or makes it where the driver's disk is not this node's.

    Args:
        path: The folder.
        text: Of config.toml.
        mark: Name of a file that the driver has put into its folder.
        resume: Whether the run has checkpoints somewhere.
        again: Whether another life of the learner may have made the folder.

    Returns:
        The folder, and whether it is the driver's.

    Raises:
        ConfigError: there is another run, or none to go on with.
    """
    shared = (path / mark).exists()
    run = ClusterRun(path)
    there = run.config_path.is_file()
    if shared or (there and (resume or (again and run.read_config() == text.encode()))):
        run = ClusterRun.open(path)
    elif resume:
        raise ConfigError(
            f"the run folder {path} cannot be seen from this node, so its checkpoints are lost to "
            "it: put --out on a file system that all nodes share"
        )
    else:
        run = ClusterRun.create(path, text)
    run.text = text
    return run, shared


def at_its_address(config: RunConfig, kept: Path) -> RunConfig:
    """Returns the settings, to listen where the life before did: there worker hosts look for it.

    Only once: whoever has that port now may keep it.

    Args:
        config: Of the run.
        kept: The file in which that life has left its address, if it came so far.
    """
    if not kept.exists():
        return config
    before = parse_address(kept.read_text(), flag="--listen")
    kept.unlink()
    own = parse_address(config.remote.listen, flag="--listen")
    if own.host != before.host or own.port:  # on another node, or fixed
        return config
    listen = config.remote.listen.removesuffix(":0") + f":{before.port}"
    return dataclasses.replace(config, remote=dataclasses.replace(config.remote, listen=listen))


def run_learner(end: WorkerEnd, told: Told, stop: Stop) -> None:
    """Trains until the run is complete or the driver wants it to end, and tells the outcome."""
    settings = end.settings
    config = from_dict(settings["config"], trust_code=settings["trust_code"])
    path = Path(config.out)
    run, shared = open_run(
        path,
        to_toml(from_dict(settings["asked"], trust_code=settings["trust_code"])),
        mark=settings["mark"],
        resume=settings["resume"],
        again=settings["again"],
    )
    end.status({"shared": shared})
    kept = path / f"{settings['mark']}.address"
    if settings["again"]:
        config = at_its_address(config, kept)

    def on_listen(address: str) -> None:
        kept.write_text(address)
        end.status({"address": address})

    # A life that ended before its first checkpoint has left nothing to go on from.
    resume = settings["resume"] or any(run.checkpoints.glob("agent_steps_*"))

    def on_row(row: Row) -> None:
        row.update(told.counts)  # before it is written: so they are in metrics.jsonl, too
        end.status({"row": row})

    hooks = Hooks(
        on_row=on_row,
        on_update=lambda *_: None,
        on_checkpoint=lambda saved: end.status({"checkpoint": str(saved)}),
        on_message=lambda text: end.status({"message": text}),
        on_listen=on_listen,
    )
    if stop.requested:  # before it began
        return
    result = run_training(
        config,
        run,
        resume=resume,
        hooks=hooks,
        trust_code=settings["trust_code"],
        clock_s=clock_from(STARTED_S),
    )
    kept.unlink(missing_ok=True)
    end.status({"done": {"metrics": result.metrics, "finished": result.finished}})


def main() -> None:
    """Takes the settings from the parent and trains."""
    end = WorkerEnd.open()
    with stop_signals() as stop:
        told = Told(end)
        try:
            run_learner(end, told, stop)
        except HeadraceError as error:
            end.status({"failed": str(error), "kind": type(error).__name__})
    gc.freeze()  # else Python's last search for garbage goes through all of torch for a second


if __name__ == "__main__":
    main()
