"""What two processes and a stream between them cost: the same run in one process, and with a host.

    python benchmarks/loopback.py ALE/Pong-v5 --rounds 2 --seconds 20 -- --network nature

In turns: `headrace train ENV FLAGS`, and the same with `--listen` and one `headrace worker` on this
machine. The rates are those of steady windows that the runs themselves write.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

RUNNER = Path(__file__).resolve().parent / "peer_runners" / "headrace_train.py"
HEADRACE = "from headrace.cli import main; main()"
VARIANTS = ("one process", "worker host", "acting host")
_MARGIN_S = 120.0


def free_port() -> int:
    """Returns a port that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def measure(variant: str, args: argparse.Namespace, flags: list[str]) -> float:
    """Returns agent steps per second of one turn."""
    headrace = [sys.executable, "-c", HEADRACE]
    train = [*headrace, "train", args.env, "--total-frames", "1e9", *flags]
    times = ["--warmup-s", str(args.warmup_s), "--seconds", str(args.seconds), "--steps"]
    with ExitStack() as stack:
        log = stack.enter_context(tempfile.TemporaryFile("w+"))
        if variant != "one process":
            address = f"127.0.0.1:{free_port()}"
            train += ["--listen", address]
            train += ["--inference", "worker"] if variant == "acting host" else []
            worker = subprocess.Popen(
                [*headrace, "worker", "--connect", address], stdout=log, stderr=log
            )
            stack.callback(worker.wait, _MARGIN_S)
            stack.callback(worker.terminate)
        command = [sys.executable, str(RUNNER), *times, "--", *train]
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            timeout=args.warmup_s + args.seconds + _MARGIN_S,
            check=False,
        )
        lines = [line for line in done.stdout.splitlines() if "agent_steps_per_s" in line]
        if done.returncode or not lines:
            log.seek(0)
            raise SystemExit(f"{variant} failed:\n{done.stdout[-2000:]}\n{log.read()[-2000:]}")
    result: dict[str, Any] = json.loads(lines[-1])
    return float(result["agent_steps_per_s"])


def main() -> None:
    """Measures in turns and prints medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("env")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--warmup-s", type=float, default=8.0)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS[:2]))
    own = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    args = parser.parse_args(own)
    flags = sys.argv[len(own) + 2 :]
    rates: dict[str, list[float]] = {variant: [] for variant in args.variants}
    for number in range(args.rounds):
        for variant in args.variants:
            rates[variant].append(measure(variant, args, flags))
            print(f"round {number + 1}, {variant}: {rates[variant][-1]:,.0f} agent steps/s")
    first = rates[args.variants[0]]
    for variant in args.variants[1:]:
        ratios = [rate / own for rate, own in zip(rates[variant], first, strict=True)]
        said = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        print(f"{variant} / {args.variants[0]}: {statistics.median(ratios):.3f} ({said})")


if __name__ == "__main__":
    main()
