"""ale-py's vector environment as a stream of `EnvStep`.

What ale-py 0.12.1 does, by experiment: with batch_size < num_envs `reset` returns the first
`batch_size` emulators that are ready, in any order, and `recv` the others later, mixed with steps;
so an emulator's first row is recognised here and not by the call that gave it. A start takes as
long as many steps (0.1 s an emulator): the last ones join late. With same-step autoreset a row that
ended shows the next episode; `final_obs` is there only if some row of the batch ended, and holds
the last frame only where the emulator was reset. Lives never read 0, and a lost life is
`terminated` like a game over. Truncation counts frames after the no-ops.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from headrace.specs import EnvSpec
from headrace.steps import EnvStep

Info = dict[str, Any]
Arrays = tuple[NDArray[np.uint8], NDArray[np.int32], NDArray[np.bool_], NDArray[np.bool_], Info]


class Emulators(Protocol):
    """What is used of `ale_py.vector_env.AtariVectorEnv`."""

    num_envs: int
    batch_size: int

    def reset(self, *, seed: NDArray[np.int64]) -> tuple[NDArray[np.uint8], Info]:
        """Starts all emulators and returns those of the first batch."""

    def send(self, actions: NDArray[np.int64]) -> None:
        """Answers the batch received last."""

    def recv(self) -> Arrays:
        """Waits for `batch_size` emulators, without the interpreter lock and without a deadline."""


class AtariVector:
    """N emulators of one game, `batch_size` are due at a time (a `pools.native.NativeEnv`)."""

    def __init__(self, emulators: Any, spec: EnvSpec, *, seed: int, first_env: int = 0) -> None:
        self.spec = spec
        self._emulators: Emulators = emulators
        self.num_envs = self._emulators.num_envs
        self.batch_size = self._emulators.batch_size
        # int32 on the other side; consecutive seeds would make run 1 share games with run 0.
        words = np.random.SeedSequence(seed).generate_state(first_env + self.num_envs)[first_env:]
        self._seeds = (words >> 1).astype(np.int64)
        # Frame of its episode where each emulator will be if it just goes on; -1 before it started.
        self._next_frame = np.full(self.num_envs, -1, dtype=np.int32)
        self._run_id = np.zeros(self.batch_size, dtype=np.int64)

    def reset(self) -> EnvStep:
        """Starts all emulators and returns the first batch."""
        observation, info = self._emulators.reset(seed=self._seeds)
        never = np.zeros(self.batch_size, dtype=np.bool_)
        return self._row((observation, np.zeros(self.batch_size, np.int32), never, never, info))

    def send(self, action: NDArray[np.int64]) -> None:
        """Answers the rows received last. An action outside the space hangs `recv` for ever."""
        self._emulators.send(action)

    def recv(self) -> EnvStep:
        """Waits for the next batch, without the interpreter lock and without a deadline."""
        return self._row(self._emulators.recv())

    def _row(self, arrays: Arrays) -> EnvStep:
        stacked, reward, terminated, truncated, info = arrays
        env_id, frame = info["env_id"], info["episode_frame_number"]
        # Every row but the first of an episode moves one skip on, lost life or not. To ask only if
        # the number got smaller would miss an end among the first frames, as no-ops differ.
        reset = truncated | (frame != self._next_frame[env_id])
        self._next_frame[env_id] = frame + self.spec.action_repeat
        final = info.get("final_obs") if (reset & (terminated | truncated)).any() else None
        return EnvStep(
            env_id=env_id,
            run_id=self._run_id,
            observation=stacked[:, 0],
            reward=reward.astype(np.float32),
            reset=reset,
            terminated=terminated,
            truncated=truncated & ~terminated,
            final_observation=None if final is None else final[:, 0],
        )
