"""The server: one role that acts for every environment of every pool.

```
pool ──EnvStep──▶ seat: state table ▶ policy ▶ state table ──actions──▶ pool
                          │
                          └─ rows ▶ unroll table ▶ slot queue ▶ learner
```

A seat is one pool at the server: training, or evaluation, whose rows go nowhere. Evaluation acts
for its pool with the same weights and the same code.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.experience.fifo import Slots
from headrace.experience.unrolls import UnrollTable
from headrace.pools.base import Pool
from headrace.records import PolicyState, PolicyStep
from headrace.rows import upload
from headrace.server.acting import Acting, cleared
from headrace.server.state_table import StateTable
from headrace.steps import EnvStep
from headrace.telemetry.metrics import Quantiles, Waits
from headrace.weights import WeightsEnd

Infos = list[Mapping[str, float]]
OnEpisodes = Callable[[NDArray[np.int32], NDArray[np.float64], NDArray[np.int64], Infos], None]
"""Told of episodes that ended: env ids, raw returns, lengths in agent steps, numbers of the last
`info` (empty where an environment gave none)."""

_ENOUGH_POLL_S = 0.005  # how often a server with nothing to do looks whether it has
_QUEUE_POLL_S = 0.2  # how often a waiting server looks whether it should stop


def batch_sizes(max_batch: int) -> tuple[int, ...]:
    """Sizes to which batches are padded: a quarter, a half and the whole of the largest."""
    return tuple(sorted({max(1, max_batch // 4), max(1, max_batch // 2), max_batch}))


class Seat:
    """One pool at the server, and everything that is kept for its environments."""

    def __init__(
        self,
        pool: Pool,
        actor: Acting,
        example: PolicyState,
        *,
        unrolls: UnrollTable | None,
        on_episodes: OnEpisodes,
        device: torch.device,
        exploration: Tensor | None = None,
    ) -> None:
        """Takes a pool.

        Args:
            pool: What steps the environments.
            actor: What acts for them.
            example: Policy state of one environment at the start of an episode.
            unrolls: Where rows go; None for evaluation.
            on_episodes: Told of episodes that ended.
            device: Of the policy.
            exploration: [environments] float32, the epsilon of each; None for the actor's own.
        """
        self.pool = pool
        self.unrolls = unrolls
        self.turnaround_s = Quantiles(4096)
        self.agent_steps = 0
        self.actor: Acting = actor
        self._on_episodes = on_episodes
        self._table = StateTable(example, pool.num_envs)
        self._device = device
        self._exploration: Tensor | None = None
        if exploration is not None:  # and a last one, for padding
            self._exploration = torch.cat([exploration, exploration[:1]]).to(device)
        self.sizes = batch_sizes(pool.max_batch)
        self._return = np.zeros(pool.num_envs, np.float64)
        self._length = np.zeros(pool.num_envs, np.int64)

    def serve(self, pull: Callable[[], int], timeout_s: float, waits: Waits) -> int:
        """Answers the environments that are due; returns how many, 0 if none was in `timeout_s`.

        `pull` gets the weights and their version: after the wait, so that they are the newest.
        """
        before_s = time.perf_counter()
        step = self.pool.receive(timeout_s)
        start_s = time.perf_counter()
        waits.add("server_for_environments", start_s - before_s)
        if step is None:
            return 0
        action = self._answer(step, pull())
        # Before the reply, which gives the arrays of `step` back to the pool.
        self._log_episodes(step)
        count = len(step.env_id)
        self.pool.reply(action)
        self.turnaround_s.add(time.perf_counter() - start_s)
        self.agent_steps += count
        return count

    def _answer(self, step: EnvStep, version: int) -> NDArray[Any]:
        count = len(step.env_id)
        size = next(size for size in self.sizes if size >= count)
        ids = self._upload(_padded(step.env_id, size, self._table.spare_row).astype(np.int64))
        frames = self._upload(_padded(step.observation, size))
        reward = self._upload(_padded(step.reward, size))
        reset = self._upload(_padded(step.reset, size))
        mask = None if step.action_mask is None else self._upload(_padded(step.action_mask, size))
        state = self._table.gather(ids)
        epsilon = None if self._exploration is None else self._exploration.index_select(0, ids)
        bootstrap = None
        if self.unrolls is not None and step.truncated.any():
            bootstrap = self._final_value(step, state, reward, epsilon)
        if step.reset.any():
            state = cleared(state, reset)
        done, after = self.actor.act(state, frames, reward, reset, mask, epsilon)
        self._table.scatter(ids, after)
        if self.unrolls is not None:
            self.unrolls.append(
                step,
                frames[:count],
                PolicyStep(
                    done.action[:count],
                    done.log_prob[:count],
                    done.value[:count],
                    action_value=None if done.action_value is None else done.action_value[:count],
                ),
                previous_action=state.previous_action[:count],
                recurrent=tuple(part[:count] for part in state.recurrent),
                version=version,
                bootstrap=bootstrap,
                action_mask=None if mask is None else mask[:count],
            )
        # The one wait for the device: actions must reach the host.
        told = done.action if done.env_action is None else done.env_action
        actions: NDArray[Any] = told[:count].cpu().numpy()
        return actions

    def _final_value(
        self,
        step: EnvStep,
        state: PolicyState,
        reward: Tensor,
        epsilon: Tensor | None,
    ) -> Tensor:
        """Values of final observations, with the old episode's stack, state, action and mask."""
        if step.final_observation is None:
            raise RuntimeError("a truncated step came without its final observation")
        final = self._upload(_padded(step.final_observation, len(reward)))
        mask = None
        if step.final_action_mask is not None:
            allowed = step.final_action_mask | ~step.truncated[:, None]
            mask = self._upload(_padded(allowed, len(reward)))
        going_on = torch.zeros_like(reward, dtype=torch.bool)
        done, _ = self.actor.act(state, final, reward, going_on, mask, epsilon)
        # A copy: a captured actor writes its next outputs where these are.
        return done.value[: len(step.env_id)].clone()

    @property
    def explores(self) -> bool:
        """Whether each environment has an epsilon of its own."""
        return self._exploration is not None

    def _log_episodes(self, step: EnvStep) -> None:
        env = step.env_id
        started = self._length[env] > 0  # the first observation of all ends nothing
        self._return[env] += np.where(started, step.reward, 0.0)
        # A reset alone is an environment started anew: its episode ended nowhere.
        over = np.flatnonzero(step.reset & started & (step.terminated | step.truncated))
        if over.size:
            ended, infos = env[over], step.episode_info or {}
            given = [infos.get(int(row), {}) for row in over]
            self._on_episodes(ended, self._return[ended], self._length[ended], given)
        first = env[step.reset]
        self._return[first], self._length[first] = 0.0, 0
        self._length[env] += 1

    def _upload(self, array: NDArray[Any]) -> Tensor:
        return upload(array, self._device)

    def state_dict(self) -> dict[str, Any]:
        """Returns what a bit-equal resume needs, the pool apart."""
        unrolls = {} if self.unrolls is None else self.unrolls.state_dict()
        return {
            "table": self._table.state_dict(),
            "unrolls": unrolls,
            "return": self._return,
            "length": self._length,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        self._table.load_state_dict(state["table"])
        if self.unrolls is not None:
            self.unrolls.load_state_dict(state["unrolls"])
        self._return[:], self._length[:] = state["return"], state["length"]


class Serving(Protocol):
    """What `run_server` needs of a seat, whichever kind it is."""

    def serve(self, pull: Callable[[], int], timeout_s: float, waits: Waits) -> int:
        """See `Seat.serve`."""


def run_server(
    seats: Sequence[Serving],
    weights: WeightsEnd,
    queue: Slots,
    stop: threading.Event,
    *,
    waits: Waits,
    timeout_s: float = 1.0,
    enough: Callable[[], bool] = lambda: False,
) -> None:
    """Serves the seats in turn until `stop`; waits while the learner is behind by a full queue.

    And while `enough` says that no more steps are wanted, which is asked before each round.
    """
    while not stop.is_set():
        if enough():
            stop.wait(_ENOUGH_POLL_S)
            continue
        for place, seat in enumerate(seats):
            # Training waits for nobody's evaluation.
            seat.serve(weights.pull, 0.0 if place else timeout_s, waits)
        before_s = time.perf_counter()
        while not queue.wait_for_space(_QUEUE_POLL_S) and not stop.is_set():
            pass
        waits.add("server_for_slots", time.perf_counter() - before_s)


def _padded(array: NDArray[Any], size: int, fill: int = 0) -> NDArray[Any]:
    if len(array) == size:
        return array
    padded = np.full((size, *array.shape[1:]), fill, array.dtype)
    padded[: len(array)] = array
    return padded
