"""What a user would pick instead, on the same environment and network, in turns A B C A B C.

    python benchmarks/peers.py --rounds 3

Pong, Nature CNN, 84x84x4, action repeat 4. Every rate is agent steps that a learner consumed per
second of wall time, acting and learning included, start-up and warm-up excluded. Each peer gets an
environment of its own in a cache folder, made on first use; headrace runs from the environment that
runs this file. A machine that does other work meanwhile spoils every number: run it alone.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RUNNERS = Path(__file__).parent / "peer_runners"
ACTION_REPEAT = 4
START_TIMEOUT_S = 240.0
"""Added to warm-up and window: imports, compilation, and the last update of the window."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A package with an environment of its own."""

    packages: tuple[str, ...]
    """What pip installs, exact; every line is also a constraint on the others."""
    runner: str
    """Script in `peer_runners`, run with that environment's Python."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One line of the table."""

    passes: int
    """Times that each sample goes through a gradient; compare like with like."""
    flags: tuple[str, ...] = ()
    peer: str | None = None
    """Name in PEERS; None is headrace."""


# torch comes first and alone, so that nothing that follows can choose another build of it.
PEERS = {
    "sb3": Peer(
        packages=(
            "torch==2.13.0",
            "stable-baselines3==2.9.2",
            "gymnasium==1.4.0",
            "ale-py==0.12.1",
            "opencv-python-headless==5.0.0.93",
        ),
        runner="sb3_ppo.py",
    ),
    "sample-factory": Peer(
        packages=(
            "torch==2.13.0",
            "sample-factory==2.1.1",
            "gymnasium==0.29.1",
            "numpy==1.26.4",
            "ale-py==0.12.1",
            "opencv-python-headless==4.11.0.86",
        ),
        runner="sample_factory_appo.py",
    ),
}
CONTESTANTS = {
    "headrace": Contestant(passes=1),
    "headrace-float32": Contestant(passes=1, flags=("--precision", "float32")),
    "sample-factory-appo": Contestant(passes=1, peer="sample-factory"),
    "sb3-ppo-1-epoch": Contestant(passes=1, peer="sb3", flags=("--epochs", "1")),
    "sb3-ppo": Contestant(passes=4, peer="sb3", flags=("--epochs", "4")),
}


def make_environment(name: str, cache: Path) -> Path:
    """Returns the Python of a peer's environment, made unless it is there with these versions."""
    peer = PEERS[name]
    folder = cache.resolve() / name
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    wanted = "\n".join(peer.packages) + "\n"
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    print(f"making the environment of {name} in {folder}", file=sys.stderr, flush=True)
    venv.create(folder, with_pip=True, clear=True)
    constraints = folder / "constraints.txt"
    constraints.write_text(wanted)
    pip = [str(python), "-m", "pip", "install", "--quiet", "-c", str(constraints)]
    subprocess.run([*pip, peer.packages[0]], check=True, stdout=sys.stderr)
    subprocess.run([*pip, *peer.packages], check=True, stdout=sys.stderr)
    stamp.write_text(wanted)
    return python


def command_of(contestant: Contestant, args: argparse.Namespace) -> list[str]:
    """Returns the command that measures one contestant once."""
    seconds = ["--seconds", str(args.seconds)]
    if contestant.peer is None:
        headrace = str(Path(sys.executable).with_name("headrace"))
        bench = [headrace, "bench", "end-to-end", "--env", "ALE/Pong-v5", "--network", "nature"]
        return [*bench, *seconds, "--json", *contestant.flags]
    python = make_environment(contestant.peer, args.cache)
    script = str(RUNNERS / PEERS[contestant.peer].runner)
    return [str(python), script, "--warmup-s", str(args.warmup_s), *seconds, *contestant.flags]


def kill_group(group: int) -> None:
    """Ends whatever a turn has left running, so that it cannot slow the next one."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:  # nothing was left
        return


def measure(command: list[str], timeout_s: float) -> dict[str, Any]:
    """Runs one turn in a process group of its own and returns the JSON object that it printed.

    Raises:
        RuntimeError: the turn printed none, failed, or took longer than `timeout_s`.
    """
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            command, cwd=folder, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status: int | str = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            status = f"still running after {timeout_s:.0f} s"
        finally:
            kill_group(process.pid)
            process.wait()
        output.seek(0)
        text = output.read()
    lines = text.splitlines()
    found = [line for line in lines if line.startswith("{") and "agent_steps_per_s" in line]
    if status != 0 or not found:
        raise RuntimeError(f"{' '.join(command)}\nstatus {status}, said:\n{text[-3000:]}")
    result: dict[str, Any] = json.loads(found[-1])
    return result


def summarise(rates: dict[str, list[float]], against: str) -> dict[str, dict[str, Any]]:
    """Returns a row per contestant. Ratios are paired by round: `against` over this one."""
    rows = {}
    for name, values in rates.items():
        ratios = [ours / theirs for ours, theirs in zip(rates[against], values, strict=True)]
        rows[name] = {
            "passes": CONTESTANTS[name].passes,
            "agent_steps_per_s": values,
            "median": statistics.median(values),
            "ratio_median": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
        }
    return rows


def print_table(rows: dict[str, dict[str, Any]], against: str) -> None:
    """Prints the rows, fastest first."""
    ratio = f"{against} / this (min-max)"
    print(f"{'':22}{'passes':>7}{'agent steps/s (min-max)':>27}{'frames/s':>10}{ratio:>40}")
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["median"]):
        values = row["agent_steps_per_s"]
        rate = f"{row['median']:.0f} ({min(values):.0f}-{max(values):.0f})"
        paired = f"{row['ratio_median']:.2f} ({row['ratio_min']:.2f}-{row['ratio_max']:.2f})"
        frames = row["median"] * ACTION_REPEAT
        print(f"{name:22}{row['passes']:>7}{rate:>27}{frames:>10.0f}{paired:>40}")


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=25.0, help="window of one turn")
    parser.add_argument(
        "--warmup-s", type=float, default=10.0, help="from a peer's first update to its window"
    )
    parser.add_argument("--cache", type=Path, default=Path(".peers"), help="peers' environments")
    parser.add_argument(
        "--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), metavar="NAME"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, no table")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    return args


def main() -> None:
    """Measures every contestant once a round, and prints the table."""
    args = parse()
    commands = {name: command_of(CONTESTANTS[name], args) for name in args.contestants}
    timeout_s = START_TIMEOUT_S + args.warmup_s + 3 * args.seconds
    rates: dict[str, list[float]] = {name: [] for name in args.contestants}
    for turn in range(args.rounds):
        for name, command in commands.items():
            started_s = time.monotonic()
            rate = measure(command, timeout_s)["agent_steps_per_s"]
            rates[name].append(rate)
            took_s = time.monotonic() - started_s
            note = f"round {turn + 1} {name}: {rate:.0f} agent steps/s ({took_s:.0f} s)"
            print(note, file=sys.stderr, flush=True)
    against = args.contestants[0]
    rows = summarise(rates, against)
    if args.json:
        print(json.dumps({"against": against, "cpus": os.cpu_count(), "contestants": rows}))
    else:
        print_table(rows, against)


if __name__ == "__main__":
    main()
