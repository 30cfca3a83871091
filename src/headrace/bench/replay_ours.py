"""Our replay as `headrace bench replay` drives it: what the learner's thread does with it."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch

from headrace.bench.replay_peers import (
    ACTIONS,
    IMPORTANCE_EXPONENT,
    PRIORITY_EXPONENT,
    Problem,
    Stream,
    Turns,
)
from headrace.experience.replay import Replay, Sample
from headrace.experience.replay_layout import ReplayLayout
from headrace.experience.segments import Segment
from headrace.specs import EnvSpec

_CPU = torch.device("cpu")


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
