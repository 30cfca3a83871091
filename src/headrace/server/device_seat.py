"""The server's seat for environments in torch: a step of all of them never leaves the device.

```
rows ─▶ policy ─▶ actions ─▶ environments ─▶ rows        tensors of all N environments
  └────────┴─▶ a row of the unrolls' tape
```
What `server.Seat` decides on the host for some environments is decided here by masks for all. The
host only says which row of the tape is written, with which version of the weights, and hands full
blocks over; on a GPU it launches one captured graph a step, and waits for nothing. Ends of episodes
are noted in a log on the device, which is read every so many steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.algorithms.base import Capture
from headrace.experience.device_unrolls import DeviceUnrolls
from headrace.pools.device import DevicePool
from headrace.records import PolicyState
from headrace.rows import read_later, write_rows
from headrace.server.acting import Acting, cleared
from headrace.server.server import OnEpisodes, Seat
from headrace.server.state_table import copy_state, repeated
from headrace.telemetry.metrics import Quantiles, Waits


class DeviceSeat:
    """A `DevicePool` at the server, and everything that is kept for its environments."""

    def __init__(
        self,
        pool: DevicePool,
        actor: Acting,
        example: PolicyState,
        *,
        unrolls: DeviceUnrolls,
        on_episodes: OnEpisodes,
        exploration: Tensor | None = None,
    ) -> None:
        """Takes a pool, whose device is the policy's; the rest is as for `server.Seat`."""
        device = pool.device
        self.pool = pool
        self.unrolls = unrolls
        self.turnaround_s = Quantiles(4096)
        self.agent_steps = 0
        self.actor: Acting = actor
        self.sizes = (pool.num_envs,)
        self._on_episodes = on_episodes
        self._device = device
        self._exploration = None if exploration is None else exploration.to(device)
        self._policy = repeated(example, pool.num_envs)
        self._return = torch.zeros(pool.num_envs, dtype=torch.float64, device=device)
        self._length = torch.zeros(pool.num_envs, dtype=torch.int64, device=device)
        # One row for each step of an unroll: ended, return and length of every environment.
        kinds = {"ended": torch.bool, "return": torch.float64, "length": torch.int64}
        shape = (unrolls.steps, pool.num_envs)
        self._log = {
            name: torch.zeros(shape, dtype=kind, device=device) for name, kind in kinds.items()
        }
        self._log_at = torch.zeros(1, dtype=torch.int64, device=device)
        self._log_row = 0
        self._reading: list[Callable[[], NDArray[Any]]] = []  # a log on its way to the host
        self._replay: Callable[[], None] | None = None

    @property
    def explores(self) -> bool:
        """Whether each environment has an epsilon of its own."""
        return self._exploration is not None

    def serve(self, pull: Callable[[], int], timeout_s: float, waits: Waits) -> int:
        """Answers all environments and steps them; returns how many. On a GPU it only says so.

        `pull` gets the weights and their version.
        """
        start_s = time.perf_counter()
        version = pull()
        block = self.unrolls.begin_row()
        if block is not None:
            self.unrolls.begin_block(block, cleared(self._policy, self.pool.rows.reset))
        self._log_at.fill_(self._log_row)
        (self._replay or self._step)()
        self.unrolls.end_row(version)
        self._end_log_row()
        self.turnaround_s.add(time.perf_counter() - start_s)
        self.agent_steps += self.pool.num_envs
        return self.pool.num_envs

    def warm_up(self, capture: Capture | None) -> None:
        """Makes a step so that all is compiled, and forgets it; `capture` records one for good.

        Before anything was served.
        """
        environments = self.pool.snapshot()
        kept = [tensor.clone() for tensor in self._kept()]
        try:
            if capture is None:
                self._step()
            else:
                self.pool.stay_in_place(finals=self.pool.env.truncates)
                self._replay, _ = capture(self._step_in_place)
        finally:  # also where something cannot be compiled, and is run as it is
            self.pool.restore(environments)
            for tensor, before in zip(self._kept(), kept, strict=True):
                tensor.copy_(before)

    def _kept(self) -> list[Tensor]:
        """What a step changes, but for the row that it writes anyway and the environments."""
        policy = self._policy
        return [
            *(policy.stack, *policy.recurrent, policy.previous_action),
            *(self._return, self._length),
        ]

    def _step_in_place(self) -> None:
        before = self._policy
        self._step()
        copy_state(before, self._policy)
        self._policy = before

    def _step(self) -> None:
        """Answers the rows that are there, notes them, and makes the next ones."""
        rows, final = self.pool.rows, self.pool.rows.final_observation
        bootstrap = None
        # To look is free on a CPU; on a GPU it would cost the wait that all this avoids.
        if final is not None and (self._device.type != "cpu" or bool(rows.truncated.any())):
            bootstrap = self._final_value(final)
        state = cleared(self._policy, rows.reset)
        done, self._policy = self.actor.act(
            state, rows.observation, rows.reward, rows.reset, None, self._exploration
        )
        self.unrolls.write(
            frames=rows.observation,
            reward=rows.reward,
            reset=rows.reset,
            terminated=rows.terminated,
            truncated=rows.truncated,
            finals=final,
            action=done.action,
            previous_action=state.previous_action,
            log_prob=done.log_prob,
            value=done.value,
            action_value=done.action_value,
            bootstrap=bootstrap,
        )
        self._note_ends()
        told = done.action if done.env_action is None else done.env_action
        self.pool.advance(told, finals=self.pool.env.truncates)

    def _final_value(self, final: Tensor) -> Tensor:
        """Values of final observations, with the old episode's stack, state and action."""
        rows = self.pool.rows
        going_on = torch.zeros_like(rows.reset)
        done, _ = self.actor.act(
            self._policy, final, rows.reward, going_on, None, self._exploration
        )
        return done.value

    def _note_ends(self) -> None:
        rows = self.pool.rows
        started = self._length > 0  # the first observation of all ends nothing
        self._return += torch.where(started, rows.reward, 0.0)
        ended = rows.reset & started
        for name, value in (("ended", ended), ("return", self._return), ("length", self._length)):
            write_rows(self._log[name], self._log_at, value.unsqueeze(0))
        self._return.masked_fill_(rows.reset, 0.0)
        self._length.masked_fill_(rows.reset, 0).add_(1)

    def _end_log_row(self) -> None:
        """Has the log read once it is full; on a GPU it is told a round later, when it is here."""
        self._log_row += 1
        if self._log_row < self.unrolls.steps:
            return
        self._log_row = 0
        self._tell_episodes()
        self._reading = [read_later(self._log[name]) for name in ("ended", "return", "length")]
        if self._device.type == "cpu":
            self._tell_episodes()

    def _tell_episodes(self) -> None:
        reading, self._reading = self._reading, []
        if not reading:
            return
        ended, returns, lengths = (read() for read in reading)
        if ended.any():
            env_id = np.nonzero(ended)[1].astype(np.int32)
            self._on_episodes(env_id, returns[ended], lengths[ended], [])

    def state_dict(self) -> dict[str, Any]:
        """Returns what a bit-equal resume needs, the pool apart."""
        self._tell_episodes()  # what is on its way to the host is in no tensor that is saved
        policy = self._policy
        return {
            "stack": policy.stack,
            "recurrent": list(policy.recurrent),
            "previous_action": policy.previous_action,
            "return": self._return,
            "length": self._length,
            "log": self._log,
            "log_row": self._log_row,
            "unrolls": self.unrolls.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        recurrent = tuple(state["recurrent"])
        copy_state(self._policy, PolicyState(state["stack"], recurrent, state["previous_action"]))
        self._return.copy_(state["return"])
        self._length.copy_(state["length"])
        for name, rows in self._log.items():
            rows.copy_(state["log"][name])
        self._log_row = state["log_row"]
        self.unrolls.load_state_dict(state["unrolls"])


AnySeat = Seat | DeviceSeat
"""A pool at the server in this process."""
