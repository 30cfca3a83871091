"""What a user would pick instead, on the same environment and network, in turns A B C A B C.

    python benchmarks/peers.py --rounds 3
    python benchmarks/peers.py --job sac --rounds 3
    python benchmarks/peers.py --job sac --until-return 5000 --max-seconds 2400

pong: Nature CNN, 84x84x4, action repeat 4. sac: HalfCheetah-v5, two layers of 256, batches of 256,
one update per agent step, Adam at 3e-4. Every rate is agent steps that a learner consumed per
second of wall time, acting and learning included, start-up, steps before learning, and warm-up
excluded. With --until-return it is seconds until greedy episodes earn so much, start-up included
(`peer_return.py`).

Each peer gets an environment of its own in a cache folder, made on first use; headrace runs from
the environment that runs this file. Who cannot be installed, fails, or takes too long is named with
the reason and left out; the round goes on. A machine that does other work meanwhile spoils every
number: run it alone.

    python benchmarks/peers.py --script mine=mine.py --script other=./other.sh

Any program can take part: it is called with --warmup-s and --seconds, and the last line that it
prints is {"agent_steps_per_s": …, "passes": …}. A .py file is run with this Python, any other as a
program.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

from peer_jobs import JOBS, RUNNERS, SAC_ENV, Contestant, Job, make_environment
from peer_processes import measure, result_anywhere, result_last
from peer_return import Trial, until_return

HEADRACE = str(Path(sys.executable).with_name("headrace"))
_SAME_JOB = (
    *("--network", "nature", "--num-envs", "64", "--unroll-steps", "20", "--batch-unrolls", "32"),
    "--no-normalize-observations",
)
"""What the peers do: frames scaled to [0, 1], batches of 640 samples."""


def rate_command(contestant: Contestant, args: argparse.Namespace) -> list[str]:
    """Returns the command that measures one contestant's rate once."""
    window = ["--warmup-s", str(args.warmup_s), "--seconds", str(args.seconds)]
    if contestant.script is not None:
        interpreter = [sys.executable] if contestant.script.suffix == ".py" else []
        return [*interpreter, str(contestant.script), *window]
    if contestant.peer is not None:
        return [*peer_command(contestant, args), *window]
    if args.job == "pong":
        bench = [HEADRACE, "bench", "end-to-end", "--env", "ALE/Pong-v5", *_SAME_JOB]
        flags = [*contestant.flags, *args.headrace_flags]
        return [*bench, "--seconds", str(args.seconds), "--json", *flags]
    runner = [sys.executable, str(RUNNERS / "headrace_train.py"), *window, "--"]
    return [*runner, *sac_training(contestant, args)]


def peer_command(contestant: Contestant, args: argparse.Namespace) -> list[str]:
    """Returns the start of every command of a peer."""
    name = str(contestant.peer)
    script, *flags = JOBS[args.job].runners[name]
    python = make_environment(name, args.cache)
    command = [str(python), str(RUNNERS / script), *flags, *contestant.flags]
    starts = ["--learning-starts", str(args.learning_starts)]
    return [*command, *(starts if args.job == "sac" else ())]


def sac_training(contestant: Contestant, args: argparse.Namespace) -> list[str]:
    """Returns what a user types, without the run directory."""
    train = [HEADRACE, "train", SAC_ENV, "--algorithm", "sac", "--preset", "sac-mujoco"]
    # The preset's learning rate is constant, so that a longer run is no other run.
    length = ["--replay-min", str(args.learning_starts), "--total-frames", str(10**9)]
    return [*train, *length, *contestant.flags, *args.headrace_flags]


def trial_of(contestant: Contestant, args: argparse.Namespace, folder: str) -> Trial:
    """Returns how one contestant is trained and judged."""
    run, interval = Path(folder) / "run", str(args.checkpoint_s)
    judged = ["--env", SAC_ENV, "--episodes", str(args.episodes)]
    if contestant.peer is None:
        training = [*sac_training(contestant, args), "--checkpoint-interval-s", interval]
        training += ["--keep-checkpoints", "0", "--out", str(run)]
        evaluator = [sys.executable, str(RUNNERS / "headrace_greedy.py"), *judged]
    else:
        peer = peer_command(contestant, args)
        training = [*peer, "--save-to", str(run / "checkpoints"), "--save-interval-s", interval]
        evaluator = [*peer, "--judge", *judged]
    return Trial(
        training=training, evaluator=evaluator, checkpoints=run / "checkpoints", folder=folder
    )


def summarise(
    rates: dict[str, list[float]], passes: dict[str, float], against: str
) -> dict[str, dict[str, Any]]:
    """Returns a row per contestant: ratios are `against` over this one.

    The spread is of ratios within a round.
    """
    rows = {}
    for name, values in rates.items():
        ratios = [ours / theirs for ours, theirs in zip(rates[against], values, strict=True)]
        rows[name] = {
            "passes": passes[name],
            "agent_steps_per_s": values,
            "median": statistics.median(values),
            "ratio_of_medians": statistics.median(rates[against]) / statistics.median(values),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
        }
    return rows


def print_table(job: Job, rows: dict[str, dict[str, Any]], against: str) -> None:
    """Prints the rows, fastest first."""
    frames_per_step = job.frames_per_step
    rounds = max(len("agent steps/s"), 7 * len(rows[against]["agent_steps_per_s"])) + 2
    frames = f"{'frames/s':>10}" if frames_per_step > 1 else ""
    ratio = f"{against} / this (min-max)"
    print(f"{'':22}{'passes':>7}{'agent steps/s':>{rounds}}{'median':>10}{frames}{ratio:>40}")
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["median"]):
        values = " ".join(f"{value:.1f}" for value in row["agent_steps_per_s"])
        paired = f"{row['ratio_of_medians']:.2f} ({row['ratio_min']:.2f}-{row['ratio_max']:.2f})"
        frames = f"{row['median'] * frames_per_step:>10.0f}" if frames_per_step > 1 else ""
        start = f"{name:22}{row['passes']:>7g}{values:>{rounds}}{row['median']:>10.1f}"
        print(f"{start}{frames}{paired:>40}")


class Parser(argparse.ArgumentParser):
    """A mistake is one sentence and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Says it and ends."""
        self.exit(2, f"{self.prog}: {message}\n")


def parse_script(text: str) -> tuple[str, Path]:
    """Returns name and file of NAME=PATH."""
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"write NAME=PATH, not {text!r}")
    if not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"no file {path}")
    return name, Path(path).resolve()


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", choices=JOBS, default="pong")
    parser.add_argument("--rounds", type=int, help="3, or 1 with --until-return")
    parser.add_argument("--seconds", type=float, default=25.0, help="window of one turn")
    parser.add_argument(
        "--warmup-s", type=float, default=10.0, help="from a peer's first update to its window"
    )
    parser.add_argument("--cache", type=Path, default=Path(".peers"), help="peers' environments")
    parser.add_argument("--contestants", nargs="*", metavar="NAME", help="the first is ours")
    parser.add_argument(
        "--script",
        action="append",
        type=parse_script,
        default=[],
        metavar="NAME=PATH",
        help="another contestant; can be given again",
    )
    parser.add_argument(
        "--start-timeout-s",
        type=float,
        default=240.0,
        help="added to warm-up and window: imports, compilation, the last update of the window",
    )
    parser.add_argument(
        "--headrace-flags", type=shlex.split, default=[], help="one string, for each headrace"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, no table")
    sac = parser.add_argument_group("sac")
    sac.add_argument(
        "--learning-starts", type=int, help="agent steps; 1000, or 10000 with --until-return"
    )
    sac.add_argument("--until-return", type=float, metavar="R", help="mean of greedy episodes")
    sac.add_argument("--max-seconds", type=float, default=3600.0, help="of training, for each")
    sac.add_argument("--checkpoint-s", type=float, default=15.0, help="training between judgements")
    sac.add_argument("--episodes", type=int, default=5, help="greedy ones, for each checkpoint")
    args = parser.parse_args()
    args.known = dict(JOBS[args.job].contestants)
    until = args.until_return is not None
    if until and args.job != "sac":
        parser.error("--until-return is for --job sac")
    if until and args.script:
        parser.error("--until-return is not for --script, which only says how fast it is")
    args.rounds = (1 if until else 3) if args.rounds is None else args.rounds
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    if args.contestants is None:
        usual = [name for name, contestant in args.known.items() if not contestant.extra]
        args.contestants = ["headrace", "sb3"] if until else usual
    if unknown := sorted(set(args.contestants) - set(args.known)):
        parser.error(f"no contestant {unknown[0]}; known: {', '.join(args.known)}")
    for name, path in args.script:
        if name in args.known:
            parser.error(f"--script {name}: there is a contestant of that name")
        args.known[name] = Contestant(passes=None, script=path)
        args.contestants.append(name)
    if not args.contestants:
        parser.error("nobody to compare: name --contestants or give a --script")
    if until and (unfit := [name for name in args.contestants if not args.known[name].judged]):
        parser.error(f"--until-return is not for {unfit[0]}")
    if args.learning_starts is None:
        args.learning_starts = 10_000 if until else 1_000
    return args


def compare_rates(args: argparse.Namespace) -> None:
    """Measures every contestant once a round, and prints the table.

    Who fails once is left out from then on, and of the table: rounds are compared as wholes.
    """
    timeout_s = args.start_timeout_s + args.warmup_s + 3 * args.seconds
    rates: dict[str, list[float]] = {name: [] for name in args.contestants}
    passes: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for turn in range(args.rounds):
        for name in list(rates):
            contestant, started_s = args.known[name], time.monotonic()
            find = result_anywhere if contestant.script is None else result_last
            try:
                result = measure(rate_command(contestant, args), timeout_s, find)
            except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
                del rates[name]
                left_out[name] = str(error).splitlines()[0]
                print(f"{name} left out: {error}", file=sys.stderr, flush=True)
                continue
            rates[name].append(float(result["agent_steps_per_s"]))
            passes[name] = contestant.passes or float(result["passes"])
            took_s = time.monotonic() - started_s
            note = f"round {turn + 1} {name}: {rates[name][-1]:.1f} agent steps/s"
            if "updates_per_agent_step" in result:
                note += f", {result['updates_per_agent_step']:.2f} updates per step"
            print(f"{note} ({took_s:.0f} s)", file=sys.stderr, flush=True)
    if not rates:
        raise SystemExit("nobody is left to compare")
    against = next(iter(rates))
    rows = summarise(rates, passes, against)
    if args.json:
        result = {"against": against, "cpus": os.cpu_count(), "contestants": rows}
        print(json.dumps({**result, "left_out": left_out}))
        return
    print_table(JOBS[args.job], rows, against)
    for name, reason in left_out.items():
        print(f"{name} left out: {reason}")


def compare_returns(args: argparse.Namespace) -> None:
    """Trains every contestant once a round until it plays well; prints a JSON line for each."""
    for turn in range(args.rounds):
        for name in args.contestants:
            with tempfile.TemporaryDirectory() as folder:
                trial = trial_of(args.known[name], args, folder)
                result = until_return(
                    trial,
                    target=args.until_return,
                    max_seconds=args.max_seconds,
                    start_timeout_s=args.start_timeout_s,
                )
            best = max((point["return_mean"] for point in result["curve"]), default=float("nan"))
            said = f"not reached in {result['trained_s']:.0f} s of training, best {best:.0f}"
            if result["seconds"] is not None:
                said = f"{result['seconds']:.0f} s, {result['agent_steps']} agent steps"
            note = f"round {turn + 1} {name}: return {args.until_return:g}: {said}"
            print(note, file=sys.stderr, flush=True)
            line = {"round": turn + 1, "contestant": name, "target": args.until_return, **result}
            print(json.dumps(line), flush=True)


def main() -> None:
    """Compares rates, or times to a return."""
    args = parse()
    if args.until_return is None:
        compare_rates(args)
    else:
        compare_returns(args)


if __name__ == "__main__":
    main()
