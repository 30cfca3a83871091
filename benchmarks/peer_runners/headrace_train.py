"""`headrace train`, as a user types it: prints one JSON line with the rate of a steady window.

    python headrace_train.py --warmup-s 10 --seconds 25 -- headrace train HalfCheetah-v5 …

The numbers are those that the run itself writes to metrics.jsonl.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from window import Window, parse_times

_LOOK_S = 0.2
_STOP_TIMEOUT_S = 60.0


def rows(path: Path, process: subprocess.Popen[bytes]) -> Iterator[dict[str, Any]]:
    """Yields the rows of a run as they come, while it lives."""
    while not path.exists() and process.poll() is None:
        time.sleep(_LOOK_S)
    with path.open() as file:
        begun = ""
        while process.poll() is None:
            begun += file.readline()
            if begun.endswith("\n"):
                yield json.loads(begun)
                begun = ""
            else:
                time.sleep(_LOOK_S)


def main() -> None:
    """Trains until the window is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", nargs="+", help="the run, without --out; after a --")
    parser.add_argument(
        "--steps", action="store_true", help="count agent steps alone, not one update for each"
    )
    args = parse_times(parser)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        now_s = 0.0
        window = Window(warmup_s=args.warmup_s, seconds=args.seconds, now_s=lambda: now_s)
        process = subprocess.Popen([*args.command, "--out", str(run), "--log-interval-s", "1"])
        for row in rows(run / "metrics.jsonl", process):
            now_s = row["elapsed_s"]
            updates = None if args.steps else row["updates"]
            if row["updates"] and window.update_ended(row["agent_steps"], updates):
                break
        process.send_signal(signal.SIGINT)
        status = process.wait(_STOP_TIMEOUT_S)
        if window.result is None:
            raise SystemExit(f"the run ended by itself, with {status}")


if __name__ == "__main__":
    main()
