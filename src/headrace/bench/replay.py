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

import gymnasium as gym
import numpy as np
import torch
import tyro
from numpy.typing import NDArray

from headrace import catalog
from headrace.bench import stages
from headrace.bench.replay_peers import (
    ACTIONS,
    IMPORTANCE_EXPONENT,
    PRIORITY_EXPONENT,
    Copy,
    Cpprb,
    Implementation,
    Problem,
    Stream,
    TorchrlSequences,
    TorchrlSlices,
    Turns,
)
from headrace.bench.settings import (
    OutputArguments,
    PolicyArguments,
    check_positive,
    print_rows,
    run_config,
)
from headrace.errors import ConfigError
from headrace.experience.replay import Replay, Sample
from headrace.experience.replay_layout import ReplayLayout
from headrace.experience.unrolls import Segment
from headrace.run.build import choose_compute
from headrace.run.system import keep_memory
from headrace.specs import EnvSpec

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
    """Sequences kept; about 4 MB each, all implementations together."""
    batch_size: int = 64
    """Sequences of a batch."""
    implementation: tuple[str, ...] = ()
    """Which ones; empty for all that are installed."""
    curve: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    """Capacities of the curve."""
    seconds: float = 5.0
    """Seconds that each implementation is measured; half of them it inserts."""
    compute_threads: int = 0
    """Threads of PyTorch, the same for all; 0 fits it to the cores, as for the learner."""
    output: OutputArguments = field(default_factory=OutputArguments)

    def __post_init__(self) -> None:
        check_positive(
            capacity=self.capacity,
            batch_size=self.batch_size,
            seconds=self.seconds,
            curve=min(self.curve, default=1),
        )
        for name in self.implementation:
            if name not in IMPLEMENTATIONS:
                raise ConfigError(
                    f"--implementation: {catalog.nearest(name, IMPLEMENTATIONS)}, not {name!r}"
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


class Headrace:
    """Ours."""

    def __init__(self, problem: Problem, stream: Stream, generator: np.random.Generator) -> None:
        self._problem, self._generator = problem, generator
        steps = problem.segment_steps
        self._segments = Turns(
            [segment(stream, start, steps) for start in range(0, stream.period, steps)]
        )
        self.replay = make_replay(problem, stream)
        self.bytes_per_step = self.replay.bytes_per_step

    def insert(self) -> int:
        """Stores the next segment of all environments."""
        self.store()
        return self._problem.inserted_sequences

    def store(self) -> Sample:
        """Stores the next segment of all environments; returns the sequences that became whole."""
        return self.replay.insert(self._segments.take())

    def sample(self) -> list[Any]:
        """Samples sequences; they come time first."""
        sample = self.draw()
        unrolls = self.replay.gather(sample, _CPU)
        frames = unrolls.observation.squeeze(2).transpose(0, 1)
        others = [part for part in unrolls[1:] if isinstance(part, torch.Tensor)]
        return [frames, *others, *unrolls.recurrent]

    def draw(self) -> Sample:
        """Chooses a batch and gives it new priorities, without its rows."""
        size = self._problem.batch_size
        sample = self.replay.sample(size, self._generator)
        priority = self._generator.random(size, np.float32)
        self.replay.set_priority(sample.slot, sample.generation, priority)
        return sample


IMPLEMENTATIONS: dict[str, Callable[[Problem, Stream, np.random.Generator], Implementation]] = {
    "headrace": Headrace,
    "torchrl": TorchrlSlices,
    "torchrl-sequences": TorchrlSequences,
    "cpprb": Cpprb,
    "copy": Copy,
}


class Rates(NamedTuple):
    """Sequences per second of one implementation, a number for each round."""

    sampled: NDArray[np.float64]
    inserted: NDArray[np.float64]


def run(argv: list[str]) -> None:
    """Measures what `argv` asks for and prints it."""
    smoke = "--smoke" in argv
    arguments = tyro.cli(
        tyro.conf.OmitArgPrefixes[Arguments],
        args=argv,
        default=SMOKE if smoke else Arguments(),
        prog="headrace bench replay",
    )
    keep_memory()
    base = _SMOKE_PROBLEM if smoke else Problem()
    problem = replace(base, capacity=arguments.capacity, batch_size=arguments.batch_size)
    threads = _learner_threads(arguments.compute_threads, problem)
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(threads)
        stack.enter_context(warnings.catch_warnings())
        for package in ("torchrl", "tensordict", "cpprb"):
            warnings.filterwarnings("ignore", module=package)  # theirs to mend
        rows = compare(arguments, problem)
        curve = measure_curve(arguments)
    shape = (
        f"{problem.batch_size} x {problem.rows} rows of {problem.frame_nbytes} bytes, "
        f"no stacks, {threads} thread{'s' * (threads > 1)}"
    )
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
    print_rows(f"replay: {shape}", rows, as_json=False)
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
        try:
            made[name] = IMPLEMENTATIONS[name](problem, stream, np.random.default_rng(1))
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


def make_replay(problem: Problem, stream: Stream) -> Replay:
    """Returns an empty replay on the CPU that keeps what R2D2 needs of each step."""
    layout = ReplayLayout(
        spec=_spec(problem),
        num_envs=problem.num_envs,
        capacity=problem.capacity,
        segment_steps=problem.segment_steps,
        sequence_steps=problem.sequence_steps,
        stride_steps=problem.stride_steps,
        burn_in_steps=problem.sequence_steps - problem.stride_steps,
        recurrent=tuple(torch.zeros(1, *part.shape[2:]) for part in stream.state),
        columns=("value", "action_value"),
    )
    return Replay(
        layout,
        device=_CPU,
        priority_exponent=PRIORITY_EXPONENT,
        importance_exponent=IMPORTANCE_EXPONENT,
    )


def segment(stream: Stream, start: int, steps: int) -> Segment:
    """Returns what the server's thread would hand over for rows `start` to `start + steps`."""
    columns = stream.window(start, steps + 1)
    frames, shape = columns["frame"], columns["reward"].shape
    return Segment(
        env_id=np.arange(shape[0]),
        run_id=np.zeros(shape[0], np.int64),
        frames=torch.from_numpy(frames),
        columns={
            "action": torch.from_numpy(columns["action"]),
            **{name: torch.zeros(shape) for name in ("log_prob", "value", "action_value")},
        },
        host={
            **{name: columns[name] for name in ("reward", "reset", "terminated", "truncated")},
            "version": np.zeros(shape, np.int64),
        },
        recurrent=tuple(torch.from_numpy(part[:, 0]) for part in stream.states(start)),
        final_frames=torch.from_numpy(frames[:0, 0]),
        final_at=np.zeros((0, 2), np.int64),
        final_value=torch.zeros(0),
    )


def _spread(rates: NDArray[np.float64]) -> float:
    """Difference of the best and the worst, as a share of the median."""
    return float(np.ptp(rates) / np.median(rates))


def _spec(problem: Problem) -> EnvSpec:
    """Returns an environment that would make such rows."""
    return EnvSpec(
        name="synthetic",
        observation_space=gym.spaces.Box(0, 255, problem.frame_shape, np.uint8),
        action_space=gym.spaces.Discrete(ACTIONS),
    )


def _learner_threads(compute_threads: int, problem: Problem) -> int:
    """Returns the threads that a learner has on this machine."""
    policy = PolicyArguments(env="catch", network="auto", compute_threads=compute_threads)
    return choose_compute(run_config(policy, server={}), _spec(problem)).threads
