r"""More replays for `headrace bench replay`, which keep whole sequences as entries.

    PYTHONPATH=benchmarks headrace bench replay \
        --implementation headrace torchrl replay_peers:TorchrlSequences replay_peers:Cpprb copy

TorchrlSequences is an ordinary prioritised buffer of TorchRL, Cpprb one of cpprb, which knows no
other sequences. Rows that two sequences share are stored twice.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from headrace.bench.replay_kinds import (
    IMPORTANCE_EXPONENT,
    PRIORITY_EXPONENT,
    Problem,
    Stream,
    Turns,
    import_peer,
    import_torchrl,
    tensordict_of,
)


class _Entries:
    """Insertions of whole sequences: all that start at the same row of the period."""

    def __init__(self, problem: Problem, stream: Stream) -> None:
        self.entries = []
        for start in range(0, stream.period, problem.stride_steps):
            h, c = stream.states(start)
            columns = stream.window(start, problem.rows)
            self.entries.append({**columns, "h": h[:, 0], "c": c[:, 0]})
        first = self.entries[0]
        # The buffers hold `capacity` entries as they are.
        self.bytes_per_step = sum(part[0].nbytes for part in first.values()) / problem.stride_steps


class TorchrlSequences:
    """TorchRL's prioritised buffer with a whole sequence as one entry."""

    def __init__(self, problem: Problem, stream: Stream, generator: np.random.Generator) -> None:
        data, tensordict = import_torchrl()
        source = _Entries(problem, stream)
        self.bytes_per_step = source.bytes_per_step
        self._entries = Turns(
            [tensordict_of(tensordict, entry, [problem.num_envs]) for entry in source.entries]
        )
        self._problem, self._generator = problem, generator
        self._buffer = data.TensorDictReplayBuffer(
            storage=data.LazyTensorStorage(problem.capacity),
            sampler=data.PrioritizedSampler(
                problem.capacity, alpha=PRIORITY_EXPONENT, beta=IMPORTANCE_EXPONENT
            ),
            batch_size=problem.batch_size,
        )

    def insert(self) -> int:
        """Stores the next sequence of all environments."""
        self._buffer.extend(self._entries.take())
        return self._problem.num_envs

    def sample(self) -> list[Any]:
        """Samples entries."""
        batch = self._buffer.sample()
        priority = self._generator.random(self._problem.batch_size, np.float32)
        self._buffer.update_priority(batch["index"], torch.from_numpy(priority))
        return [batch["frame"], *(part for name, part in batch.items() if name != "frame")]


class Cpprb:
    """The prioritised buffer of cpprb, a segment tree in C++, with a sequence as one entry."""

    def __init__(self, problem: Problem, stream: Stream, generator: np.random.Generator) -> None:
        cpprb = import_peer("cpprb")
        source = _Entries(problem, stream)
        self.bytes_per_step = source.bytes_per_step
        self._entries = Turns(source.entries)
        self._problem, self._generator = problem, generator
        self._buffer: Any = cpprb.PrioritizedReplayBuffer(
            problem.capacity,
            {
                name: {"shape": values.shape[1:], "dtype": values.dtype}
                for name, values in source.entries[0].items()
            },
            alpha=PRIORITY_EXPONENT,
        )

    def insert(self) -> int:
        """Stores the next sequence of all environments."""
        self._buffer.add(**self._entries.take())
        return self._problem.num_envs

    def sample(self) -> list[Any]:
        """Samples entries."""
        batch = self._buffer.sample(self._problem.batch_size, beta=IMPORTANCE_EXPONENT)
        priority = self._generator.random(self._problem.batch_size, np.float32)
        self._buffer.update_priorities(batch["indexes"], priority)
        return [batch["frame"], *(part for name, part in batch.items() if name != "frame")]
