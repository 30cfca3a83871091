"""The native pool alone: its watch, on environments that are made up."""

from typing import cast

import numpy as np
import pytest

from headrace.envs.catch import CATCH, CatchConfig
from headrace.pools.native import NativePool
from headrace.steps import EnvStep


class SelfStepping:
    """Catch with the calls of a native environment; `recv` tells what the pool says of itself."""

    def __init__(self) -> None:
        self._boards = CATCH.make(
            "catch", CatchConfig(), num_envs=2, batch_size=2, threads=1, seed=0
        )
        self.spec = self._boards.spec
        self.num_envs = self.batch_size = 2
        self.fails = False
        self.pool: NativePool | None = None
        self.waiting_since: list[float | None] = []
        self._action = np.zeros(2, dtype=np.int64)

    def reset(self) -> EnvStep:
        self.waiting_since.append(cast(NativePool, self.pool).waiting_since)
        return self._boards.reset()

    def send(self, action: np.ndarray) -> None:
        self._action = action

    def recv(self) -> EnvStep:
        self.waiting_since.append(cast(NativePool, self.pool).waiting_since)
        if self.fails:
            raise OSError("the emulator is gone")
        return self._boards.step(np.arange(2, dtype=np.int32), self._action)


def test_a_watchdog_can_see_since_when_it_waits() -> None:
    env = SelfStepping()
    times = iter([10.0, 20.0, 30.0])
    pool = env.pool = NativePool(env, batch_size=2, now_s=lambda: next(times))
    assert pool.waiting_since is None
    pool.receive(0.0)
    assert pool.waiting_since is None
    pool.reply(np.zeros(2, dtype=np.int64))
    pool.receive(0.0)
    pool.reply(np.zeros(2, dtype=np.int64))
    env.fails = True
    with pytest.raises(OSError, match="emulator"):
        pool.receive(0.0)
    assert env.waiting_since == [10.0, 20.0, 30.0]
    assert pool.waiting_since is None
