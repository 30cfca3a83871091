"""What `headrace bench replay` compares: the same stream of steps in our replay and in others.

Everyone is given the same rows: a single frame, action, reward and flags, and the recurrent state
where a sequence starts. Each stores them as its users would; what is handed over is made before
the clock runs.

```
headrace   rows once; sequences, their priorities and their state every `stride_steps`
torchrl    rows once, each with its state and priority: a slice may start at any
copy       no replay: the same bytes from random places to one place, the wall for all
```
`benchmarks/replay_peers.py` has two more, and anybody's can be named as "module:Class", which is
made and driven like these.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray

from headrace.errors import ConfigError
from headrace.experience.replay import Replay, Sample
from headrace.experience.replay_layout import ReplayLayout
from headrace.experience.segments import Segment
from headrace.specs import EnvSpec

_CPU = torch.device("cpu")
ACTIONS = 18
PRIORITY_EXPONENT = 0.9
IMPORTANCE_EXPONENT = 0.6
_EPISODE_STEPS = 1000  # on average
_STATES = 2  # of an LSTM: h and c
_PERIOD_STRIDES = 3  # strides, or segments if those are longer, until the stream repeats itself


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """What is stored and sampled."""

    capacity: int = 1024
    """Sequences kept; a multiple of `num_envs`."""
    batch_size: int = 64
    """Sequences of a batch."""
    num_envs: int = 32
    """Streams that are inserted side by side."""
    segment_steps: int = 40
    """Steps of each environment per insertion."""
    sequence_steps: int = 120
    """Steps of a sequence, the burn-in among them; it has one row more."""
    stride_steps: int = 80
    """Steps from the start of one sequence to the start of the next."""
    frame_shape: tuple[int, ...] = (84, 84)
    """Of a single frame of uint8."""
    state_size: int = 512
    """Width of each of the two parts of the recurrent state; 0 for none."""

    @property
    def rows(self) -> int:
        """Rows of a sequence."""
        return self.sequence_steps + 1

    @property
    def capacity_steps(self) -> int:
        """Steps that `capacity` sequences cover."""
        return self.capacity * self.stride_steps

    @property
    def inserted_sequences(self) -> int:
        """Sequences that one segment of every environment is worth."""
        return self.num_envs * self.segment_steps // self.stride_steps

    @property
    def frame_nbytes(self) -> int:
        """Bytes of a single frame."""
        return int(np.prod(self.frame_shape))

    @property
    def state_nbytes(self) -> int:
        """Bytes of a recurrent state."""
        return _STATES * self.state_size * 4


class Stream:
    """What the environments do, again and again: columns [num_envs, period, ...].

    The first two bytes of a frame say which environment and which row of the period it is.
    """

    def __init__(self, problem: Problem, generator: np.random.Generator) -> None:
        envs = problem.num_envs
        period = _PERIOD_STRIDES * math.lcm(problem.stride_steps, problem.segment_steps)
        self.period = period
        shape = (envs, period)
        frames = generator.integers(0, 256, (*shape, problem.frame_nbytes), dtype=np.uint8)
        frames[..., 0] = np.arange(envs)[:, None] % 256
        frames[..., 1] = np.arange(period) % 256
        ended = generator.random(shape) < 1 / _EPISODE_STEPS
        ended[:, 0] = True  # a stream begins with an episode
        self.columns: dict[str, NDArray[Any]] = {
            "frame": frames.reshape(*shape, *problem.frame_shape),
            "action": generator.integers(0, ACTIONS, shape),
            "reward": generator.standard_normal(shape, dtype=np.float32),
            "reset": ended,
            "terminated": ended,
            "truncated": np.zeros(shape, np.bool_),
        }
        self.state = tuple(
            generator.standard_normal((*shape, problem.state_size), dtype=np.float32)
            for _ in range(_STATES if problem.state_size else 0)
        )

    def window(self, start: int, rows: int) -> dict[str, NDArray[Any]]:
        """Copies rows [num_envs, rows, ...] from `start` on, over the end of the period."""
        at = np.arange(start, start + rows) % self.period
        return {name: values[:, at] for name, values in self.columns.items()}

    def states(self, start: int, rows: int = 1) -> tuple[NDArray[np.float32], ...]:
        """Copies the recurrent states [num_envs, rows, ...] of these rows."""
        at = np.arange(start, start + rows) % self.period
        return tuple(part[:, at] for part in self.state)


class Implementation(Protocol):
    """A replay under test."""

    bytes_per_step: float
    """Bytes allocated for rows, states and priorities of ours, for rows and states of others, per
    step that there is room for."""

    def insert(self) -> int:
        """Stores the next steps of all environments; returns how many sequences they are worth."""

    def sample(self) -> list[Any]:
        """Samples a batch and gives it new priorities.

        Returns:
            All arrays that came, the frames first and as [B, rows, ...].
        """


class Turns:
    """What is inserted, one after the other and again from the start."""

    def __init__(self, items: list[Any]) -> None:
        self._items = items
        self._next = 0

    def take(self) -> Any:
        """Returns the next."""
        item = self._items[self._next]
        self._next = (self._next + 1) % len(self._items)
        return item


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


def env_spec(problem: Problem) -> EnvSpec:
    """Returns an environment that would make such rows."""
    return EnvSpec(
        name="synthetic",
        observation_space=gym.spaces.Box(0, 255, problem.frame_shape, np.uint8),
        action_space=gym.spaces.Discrete(ACTIONS),
    )


def make_replay(problem: Problem, stream: Stream) -> Replay:
    """Returns an empty replay on the CPU that keeps what R2D2 needs of each step."""
    layout = ReplayLayout(
        spec=env_spec(problem),
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


class Copy:
    """The bytes of a batch, copied and nothing else.

    By numpy, whose plain assignment is a memcpy: on bytes it was 1.4 times as fast as Tensor.copy_.
    """

    def __init__(self, problem: Problem, stream: Stream, generator: np.random.Generator) -> None:
        self._problem, self._generator = problem, generator
        row_nbytes = sum(values[0, 0].nbytes for values in stream.columns.values())
        self._sequence_nbytes = problem.rows * row_nbytes + problem.state_nbytes
        # The least there is to store: frames once, and a state for each sequence.
        self.bytes_per_step = problem.frame_nbytes + problem.state_nbytes / problem.stride_steps
        size = int(problem.capacity_steps * self.bytes_per_step) + self._sequence_nbytes
        # Written before it is read: memory that never was costs a page fault at the first touch,
        # and the wall would look lower than it is.
        self._stored = np.frombuffer(bytearray(generator.bytes(size)), np.uint8)
        self._batch = np.ones((problem.batch_size, self._sequence_nbytes), np.uint8)
        self._pieces = np.ones((problem.num_envs, problem.segment_steps * row_nbytes), np.uint8)

    def insert(self) -> int:
        """Copies the bytes of an insertion to random places."""
        length = self._pieces.shape[1]
        for piece, start in zip(self._pieces, self._starts(len(self._pieces), length), strict=True):
            self._stored[start : start + length] = piece
        return self._problem.inserted_sequences

    def sample(self) -> list[Any]:
        """Copies the bytes of a batch from random places."""
        length = self._sequence_nbytes
        for row, start in zip(self._batch, self._starts(len(self._batch), length), strict=True):
            row[:] = self._stored[start : start + length]
        return [self._batch]

    def _starts(self, count: int, length: int) -> list[int]:
        starts: list[int] = self._generator.integers(
            0, len(self._stored) - length + 1, count
        ).tolist()
        return starts


class TorchrlSlices:
    """TorchRL's prioritised slice sampler over a storage [steps, environments].

    All that spares it work is on: ends of streams are cached between insertions, and it adds no
    flags of its own to a batch, for which it would gather the batch twice. Of each slice it is told
    one priority, that of the first row, from which it chooses.
    """

    def __init__(self, problem: Problem, stream: Stream, generator: np.random.Generator) -> None:
        data, tensordict = import_torchrl()
        envs, steps = problem.num_envs, problem.segment_steps
        pieces = []
        for start in range(0, stream.period, steps):
            columns = stream.window(start, steps)
            columns["h"], columns["c"] = stream.states(start, steps)
            columns["stream"] = np.repeat(np.arange(envs)[:, None], steps, axis=1)
            pieces.append(tensordict_of(tensordict, columns, [envs, steps]))
        self._pieces = Turns(pieces)
        self._problem, self._generator = problem, generator
        self._buffer = data.TensorDictReplayBuffer(
            storage=data.LazyTensorStorage(problem.capacity_steps, ndim=2),
            dim_extend=1,
            sampler=data.PrioritizedSliceSampler(
                problem.capacity_steps,
                alpha=PRIORITY_EXPONENT,
                beta=IMPORTANCE_EXPONENT,
                slice_len=problem.rows,
                traj_key="stream",
                cache_values=True,
                truncated_key=None,
                init_key=None,
            ),
            batch_size=problem.batch_size * problem.rows,
        )
        self.insert()  # makes the storage
        stored = sum(part.nbytes for part in self._buffer[:].values())
        self.bytes_per_step = stored / len(self._buffer)

    def insert(self) -> int:
        """Stores the next segment of all environments."""
        self._buffer.extend(self._pieces.take())
        return self._problem.inserted_sequences

    def sample(self) -> list[Any]:
        """Samples slices; the rows of a batch come as [B * rows, ...]."""
        problem = self._problem
        batch = self._buffer.sample()
        priority = self._generator.random(problem.batch_size, np.float32)
        self._buffer.update_priority(batch["index"][:: problem.rows], torch.from_numpy(priority))
        frames = batch["frame"].view(problem.batch_size, problem.rows, *problem.frame_shape)
        return [frames, *(part for name, part in batch.items() if name != "frame")]


def import_peer(name: str) -> ModuleType:
    """Imports a package that the extra `bench` has.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as missing:
        raise ConfigError(
            f'no module {missing.name}: pip install "headrace[bench]" has it'
        ) from missing


def import_torchrl() -> tuple[Any, Callable[..., Any]]:
    """Returns `torchrl.data` and the class TensorDict.

    Raises:
        ConfigError: it is not installed, or does not fit this version of PyTorch.
    """
    # A wheel of TorchRL is built for one version of PyTorch and found on many. Its segment trees
    # work with others if functions that they never call need not be found when it is loaded.
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_LAZY)
    try:
        import_peer("torchrl")
        importlib.import_module("torchrl._torchrl")
        data = importlib.import_module("torchrl.data")
    except ImportError as mismatch:
        raise ConfigError(f"TorchRL does not fit torch {torch.__version__}: {mismatch}") from None
    finally:
        sys.setdlopenflags(flags)
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    # For the author of TorchRL to mend; it asks on import that they be shown, so this comes after.
    warnings.filterwarnings("ignore", module="torchrl|tensordict")
    return data, importlib.import_module("tensordict").TensorDict


def tensordict_of(
    tensordict: Callable[..., Any], columns: dict[str, NDArray[Any]], batch_size: list[int]
) -> Any:
    """Returns columns as TorchRL wants them."""
    tensors = {name: torch.from_numpy(values) for name, values in columns.items()}
    return tensordict(tensors, batch_size=batch_size)
