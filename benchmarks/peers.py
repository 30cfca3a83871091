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
the environment that runs this file. A machine that does other work meanwhile spoils every number:
run it alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from peer_jobs import JOBS, RUNNERS, SAC_ENV, Contestant, Job, make_environment
from peer_processes import measure
from peer_return import Trial, until_return

START_TIMEOUT_S = 240.0
"""Added to warm-up and window: imports, compilation, and the last update of the window."""
HEADRACE = str(Path(sys.executable).with_name("headrace"))
_SAME_JOB = (
    *("--network", "nature", "--num-envs", "64", "--unroll-steps", "20", "--batch-unrolls", "32"),
    "--no-normalize-observations",
)
"""What the peers do: frames scaled to [0, 1], batches of 640 samples."""


def rate_command(contestant: Contestant, args: argparse.Namespace) -> list[str]:
    """Returns the command that measures one contestant's rate once."""
    window = ["--warmup-s", str(args.warmup_s), "--seconds", str(args.seconds)]
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
    script = str(RUNNERS / JOBS[args.job].runners[name])
    command = [str(make_environment(name, args.cache)), script, *contestant.flags]
    if args.job == "pong":
        return command
    starts = ["--learning-starts", str(args.learning_starts)]
    return [*command, "--library", name, "--env", SAC_ENV, *starts]


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


def summarise(job: Job, rates: dict[str, list[float]], against: str) -> dict[str, dict[str, Any]]:
    """Returns a row per contestant: ratios are `against` over this one.

    The spread is of ratios within a round.
    """
    rows = {}
    for name, values in rates.items():
        ratios = [ours / theirs for ours, theirs in zip(rates[against], values, strict=True)]
        rows[name] = {
            "passes": job.contestants[name].passes,
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
        start = f"{name:22}{row['passes']:>7}{values:>{rounds}}{row['median']:>10.1f}"
        print(f"{start}{frames}{paired:>40}")


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--job", choices=JOBS, default="pong")
    parser.add_argument("--rounds", type=int, help="3, or 1 with --until-return")
    parser.add_argument("--seconds", type=float, default=25.0, help="window of one turn")
    parser.add_argument(
        "--warmup-s", type=float, default=10.0, help="from a peer's first update to its window"
    )
    parser.add_argument("--cache", type=Path, default=Path(".peers"), help="peers' environments")
    parser.add_argument("--contestants", nargs="+", metavar="NAME", help="the first is ours")
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
    known, until = JOBS[args.job].contestants, args.until_return is not None
    if until and args.job != "sac":
        parser.error("--until-return is for --job sac")
    args.rounds = (1 if until else 3) if args.rounds is None else args.rounds
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    if args.contestants is None:
        usual = [name for name, contestant in known.items() if not contestant.extra]
        args.contestants = ["headrace", "sb3"] if until else usual
    if unknown := sorted(set(args.contestants) - set(known)):
        parser.error(f"no contestant {unknown[0]}; known: {', '.join(known)}")
    if args.learning_starts is None:
        args.learning_starts = 10_000 if until else 1_000
    return args


def compare_rates(args: argparse.Namespace) -> None:
    """Measures every contestant once a round, and prints the table."""
    job = JOBS[args.job]
    commands = {name: rate_command(job.contestants[name], args) for name in args.contestants}
    timeout_s = START_TIMEOUT_S + args.warmup_s + 3 * args.seconds
    rates: dict[str, list[float]] = {name: [] for name in args.contestants}
    for turn in range(args.rounds):
        for name, command in commands.items():
            started_s = time.monotonic()
            result = measure(command, timeout_s)
            rates[name].append(result["agent_steps_per_s"])
            took_s = time.monotonic() - started_s
            note = f"round {turn + 1} {name}: {rates[name][-1]:.1f} agent steps/s"
            if "updates_per_agent_step" in result:
                note += f", {result['updates_per_agent_step']:.2f} updates per step"
            print(f"{note} ({took_s:.0f} s)", file=sys.stderr, flush=True)
    against = args.contestants[0]
    rows = summarise(job, rates, against)
    if args.json:
        print(json.dumps({"against": against, "cpus": os.cpu_count(), "contestants": rows}))
    else:
        print_table(job, rows, against)


def compare_returns(args: argparse.Namespace) -> None:
    """Trains every contestant once a round until it plays well; prints a JSON line for each."""
    for turn in range(args.rounds):
        for name in args.contestants:
            with tempfile.TemporaryDirectory() as folder:
                trial = trial_of(JOBS[args.job].contestants[name], args, folder)
                result = until_return(
                    trial,
                    target=args.until_return,
                    max_seconds=args.max_seconds,
                    start_timeout_s=START_TIMEOUT_S,
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
