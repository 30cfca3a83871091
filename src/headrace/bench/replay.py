"""The replay beside those of others: sequences in and out per second, and bytes per step.

All store and sample the same steps, in turns, so that a machine that is slower for a while is so
for all. Frames are single everywhere: stacks are rebuilt on the learner's device.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from headrace import catalog
from headrace.bench import stages
from headrace.bench.replay_kinds import Headrace, Implementation, Problem, Stream, env_spec
from headrace.bench.settings import (
    OutputArguments,
    PolicyArguments,
    check_positive,
    parsed,
    print_rows,
    run_config,
)
from headrace.errors import ConfigError
from headrace.run.compute import choose_compute
from headrace.run.system import keep_memory

_CPU = torch.device("cpu")
_ROUNDS = 5
_FILLED = 1.25  # of the capacity, so that rings have come around
_CURVE_ENVS = 100
_CURVE_STEPS = 25  # of a sequence and of a segment; a sequence starts at each


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """Measures replays on the same steps: sequences of 80 + 40 steps of single 84 x 84 frames.

    A batch is drawn by priority, delivered with all its rows, and given new priorities. The curve
    is what drawing and the new priorities cost alone, over the number of sequences kept.
    """

    capacity: int = 1024
    """Keeps so many sequences, of about 4 MB each, all implementations together."""
    batch_size: int = 64
    """Draws so many sequences in a batch."""
    implementation: tuple[str, ...] = ()
    """Names what to measure: headrace, torchrl, copy, or your own as module:Class; empty takes all
    three, as far as they are installed."""
    curve: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    """Draws the curve over these numbers of sequences."""
    seconds: float = 5.0
    """Measures each implementation for so many seconds; half of them it inserts."""
    compute_threads: int = 0
    """Gives PyTorch so many threads, the same for all; 0 fits them to the cores, as for the
    learner."""
    output: OutputArguments = field(default_factory=OutputArguments)

    def __post_init__(self) -> None:
        check_positive(
            capacity=self.capacity,
            batch_size=self.batch_size,
            seconds=self.seconds,
            curve=min(self.curve, default=1),
        )


SMOKE = Arguments(
    output=OutputArguments(smoke=True), capacity=16, batch_size=4, curve=(100, 1000), seconds=0.3
)
_SMOKE_PROBLEM = Problem(
    capacity=16,
    batch_size=4,
    num_envs=4,
    segment_steps=4,
    sequence_steps=12,
    stride_steps=8,
    frame_shape=(4, 4),
    state_size=8,
)


_KINDS = "headrace.bench.replay_kinds"
IMPLEMENTATIONS = {
    "headrace": f"{_KINDS}:Headrace",
    "torchrl": f"{_KINDS}:TorchrlSlices",
    "copy": f"{_KINDS}:Copy",
}


class Rates(NamedTuple):
    """Sequences per second of one implementation, a number for each round."""

    sampled: NDArray[np.float64]
    inserted: NDArray[np.float64]


def run(argv: list[str]) -> None:
    """Measures what `argv` asks for and prints it."""
    arguments = parsed("replay", argv, Arguments(), smoke=SMOKE)
    keep_memory()
    base = _SMOKE_PROBLEM if arguments.output.smoke else Problem()
    problem = replace(base, capacity=arguments.capacity, batch_size=arguments.batch_size)
    threads = _learner_threads(arguments.compute_threads, problem)
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(threads)
        stack.enter_context(warnings.catch_warnings())  # peers change what is shown
        rows = compare(arguments, problem)
        curve = measure_curve(arguments)
    if arguments.output.json:
        setting = {
            "threads": threads,
            "batch_size": problem.batch_size,
            "sequence_rows": problem.rows,
            "stride_steps": problem.stride_steps,
            "frame_stack": 1,
            "rounds": _ROUNDS,
        }
        print(json.dumps({"rows": rows, "curve": curve, "setting": setting}))
        return
    title = (
        f"replay: {problem.capacity} sequences, batches of {problem.batch_size} with "
        f"{problem.rows} rows, no stacks, {threads} thread{'s' * (threads > 1)}"
    )
    print_rows(title, [as_shown(row) for row in rows], as_json=False)
    if curve:
        print_rows("drawing a batch and its new priorities, no rows", curve, as_json=False)


def compare(arguments: Arguments, problem: Problem) -> list[dict[str, Any]]:
    """Returns a row for each implementation, the medians of turns.

    Raises:
        ConfigError: none of those that were asked for is installed, or they do not take this size.
    """
    if problem.capacity % problem.num_envs:
        raise ConfigError(
            f"--capacity must be a multiple of {problem.num_envs}, not {problem.capacity}"
        )
    stream = Stream(problem, np.random.default_rng(0))
    made: dict[str, Implementation] = {}
    for name in arguments.implementation or IMPLEMENTATIONS:
        make = catalog.resolve("implementation", IMPLEMENTATIONS, name)
        try:
            made[name] = make(problem, stream, np.random.default_rng(1))
        except ConfigError as missing:
            print(f"{name} left out: {missing}", file=sys.stderr)
    if not made:
        raise ConfigError("nothing is left to measure")
    for implementation in made.values():
        stored = 0
        while stored < _FILLED * problem.capacity:
            stored += implementation.insert()
    rates = in_turns(made, arguments.seconds)
    return [
        row_of(
            name, made[name], rates, problem, delivered=sum(p.nbytes for p in made[name].sample())
        )
        for name in made
    ]


def in_turns(made: Mapping[str, Implementation], seconds: float) -> dict[str, Rates]:
    """Measures each for a while, then again, so that all see the same good and bad times."""
    turn_s = seconds / (2 * _ROUNDS)
    taken = {name: Rates(np.zeros(_ROUNDS), np.zeros(_ROUNDS)) for name in made}
    for turn in range(_ROUNDS):
        for name, implementation in made.items():
            rates = taken[name]
            rates.sampled[turn] = stages.timed(_sampling(implementation), turn_s, _CPU).per_s
            rates.inserted[turn] = stages.timed(implementation.insert, turn_s, _CPU).per_s
    return taken


def _sampling(implementation: Implementation) -> Callable[[], int]:
    return lambda: len(implementation.sample()[0])


def _drawing(ours: Headrace) -> Callable[[], int]:
    return lambda: len(ours.draw().slot)


def row_of(
    name: str,
    implementation: Implementation,
    rates: Mapping[str, Rates],
    problem: Problem,
    *,
    delivered: int,
) -> dict[str, Any]:
    """Returns what is printed of one implementation; ratios are medians over the rounds."""
    own = rates[name]
    ratio = {
        other: float(np.median(own.sampled / rates[other].sampled)) if other in rates else None
        for other in ("torchrl", "copy")
    }
    return {
        "implementation": name,
        "capacity": problem.capacity,
        "sampled_sequences_per_s": float(np.median(own.sampled)),
        "sampled_spread": _spread(own.sampled),
        "inserted_sequences_per_s": float(np.median(own.inserted)),
        "inserted_spread": _spread(own.inserted),
        "times_torchrl": ratio["torchrl"],
        "share_of_copy": ratio["copy"],
        "bytes_per_batch": delivered,
        "gb_per_s": float(np.median(own.sampled)) * delivered / problem.batch_size / 1e9,
        "bytes_per_step": implementation.bytes_per_step,
    }


def as_shown(row: Mapping[str, Any]) -> dict[str, str]:
    """Returns a row with fewer and narrower columns, for a terminal."""

    def ratio(name: str) -> str:
        return "" if row[name] is None else f"{row[name]:.2f}"

    return {
        "": row["implementation"].rpartition(":")[2],  # module:Class would be cut
        "sampled per s": f"{row['sampled_sequences_per_s']:,.0f} ±{row['sampled_spread'] / 2:.0%}",
        "x torchrl": ratio("times_torchrl"),
        "x copy": ratio("share_of_copy"),
        "MB per batch": f"{row['bytes_per_batch'] / 1e6:.1f}",
        "inserted per s": f"{row['inserted_sequences_per_s']:,.0f}",
        "bytes per step": f"{row['bytes_per_step']:,.0f}",
    }


def measure_curve(arguments: Arguments) -> list[dict[str, Any]]:
    """Returns a row for each capacity: microseconds to draw a batch and set its priorities."""
    replays = {capacity: _filled(capacity, arguments) for capacity in arguments.curve}
    turn_s = arguments.seconds / (2 * _ROUNDS)
    taken: dict[int, list[float]] = {capacity: [] for capacity in replays}
    for _ in range(_ROUNDS):
        for capacity, ours in replays.items():
            timing = stages.timed(_drawing(ours), turn_s, _CPU)
            taken[capacity].append(1e6 / timing.rounds_per_s)
    return [
        {
            "implementation": "headrace",
            "capacity": capacity,
            "sample_us": float(np.median(sample_us)),
            "spread": _spread(np.asarray(sample_us)),
        }
        for capacity, sample_us in taken.items()
    ]


def _filled(capacity: int, arguments: Arguments) -> Headrace:
    """Returns a full replay of frames of 4 bytes, with priorities of all sizes."""
    envs = math.gcd(capacity, _CURVE_ENVS)
    problem = Problem(
        capacity=capacity,
        batch_size=arguments.batch_size,
        num_envs=envs,
        segment_steps=_CURVE_STEPS,
        sequence_steps=_CURVE_STEPS,
        stride_steps=1,
        frame_shape=(4,),
        state_size=0,
    )
    generator = np.random.default_rng(0)
    ours = Headrace(problem, Stream(problem, generator), generator)
    while ours.replay.sequences < capacity:
        new = ours.store()
        ours.replay.set_priority(new.slot, new.generation, generator.random(len(new.slot)))
    return ours


def _spread(rates: NDArray[np.float64]) -> float:
    """Difference of the best and the worst, as a share of the median."""
    return float(np.ptp(rates) / np.median(rates))


def _learner_threads(compute_threads: int, problem: Problem) -> int:
    """Returns the threads that a learner has on this machine."""
    policy = PolicyArguments(env="catch", network="auto", compute_threads=compute_threads)
    return choose_compute(run_config(policy, server={}), env_spec(problem)).threads
