"""The stages of a run, each by itself: what one does when nothing else makes it wait.

```
environment   pool ◀─ random actions        no policy
inference     free pool ─▶ seat ─▶ unrolls  as the server does it, without environments
learner       the same unrolls ─▶ update ─▶ weights, again and again
```
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray

from headrace.bench.device_stages import free_device_seat
from headrace.config import RunConfig
from headrace.errors import DeadlineExceeded
from headrace.experience.device_unrolls import DeviceUnrolls
from headrace.experience.limiter import SampleLimiter
from headrace.experience.unrolls import UnrollTable
from headrace.learner.feeds import FifoFeed, ReplayFeed
from headrace.learner.loop import Learner
from headrace.pools.base import Pool
from headrace.records import Batch
from headrace.run.build import Parts, build, exploration
from headrace.run.experience import first_priority, make_unrolls
from headrace.run.warmup import warm_up
from headrace.server.acting import Actor, initial_state
from headrace.server.device_seat import AnySeat, DeviceSeat
from headrace.server.server import Seat
from headrace.specs import EnvSpec
from headrace.steps import EnvStep
from headrace.telemetry.metrics import Waits

_TIMEOUT_S = 60.0
_WARM_UP_SHARE = 0.1  # of the time that is measured
_LATENCIES_KEPT = 4096  # batches


class Timing(NamedTuple):
    """How much was done, and how long it took."""

    amount: int  # in the unit of what was timed
    rounds: int
    elapsed_s: float

    @property
    def per_s(self) -> float:
        """Amount per second."""
        return self.amount / self.elapsed_s

    @property
    def rounds_per_s(self) -> float:
        """Rounds per second."""
        return self.rounds / self.elapsed_s


def timed(work: Callable[[], int], seconds: float, device: torch.device) -> Timing:
    """Repeats `work`, which returns how much it did, for `seconds`, after a tenth to warm up."""
    _repeated(work, seconds * _WARM_UP_SHARE, device)
    return _repeated(work, seconds, device)


def _repeated(work: Callable[[], int], seconds: float, device: torch.device) -> Timing:
    _synchronize(device)
    start_s = now_s = time.perf_counter()
    count = rounds = 0
    while now_s - start_s < seconds or not rounds:
        count += work()
        rounds += 1
        now_s = time.perf_counter()
    _synchronize(device)
    return Timing(count, rounds, time.perf_counter() - start_s)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ready(config: RunConfig, *, compiling: bool = True) -> Parts:
    """Builds what a run has, with its threads, and compiles what it compiles."""
    parts = build(
        config,
        resume_count=0,
        on_episodes=lambda *_: None,
        on_eval_episodes=lambda *_: None,
    )
    torch.set_num_threads(parts.compute.threads)
    try:
        return warm_up(parts) if compiling and parts.compute.needs_warm_up else parts
    except BaseException:
        parts.close()
        raise


class RandomPlayer:
    """Answers a pool with random valid actions, drawn beforehand."""

    def __init__(self, pool: Pool, *, seed: int = 0) -> None:
        self.latency_s: deque[NDArray[np.float64]] = deque(maxlen=_LATENCIES_KEPT)
        """Newest batches: seconds from the reply to an environment until its next row is here."""
        self._pool = pool
        self._actions = itertools.cycle(random_actions(pool.spec, (64, pool.max_batch), seed))
        self._replied_s = np.full(pool.num_envs, math.nan)

    def start(self) -> None:
        """Plays until every environment has answered: a first row can take seconds (ALE)."""
        while np.isnan(self._replied_s).any():
            self.play()
        self.latency_s.clear()

    def play(self) -> int:
        """Answers one batch; returns its agent steps.

        Raises:
            DeadlineExceeded: the pool gave none.
        """
        step = self._pool.receive(_TIMEOUT_S)
        if step is None:
            raise DeadlineExceeded(f"{self._pool.spec.name}: no step in {_TIMEOUT_S:.0f} s")
        now_s = time.perf_counter()
        self.latency_s.append(now_s - self._replied_s[step.env_id])
        self._replied_s[step.env_id] = now_s
        self._pool.reply(next(self._actions)[: len(step.env_id)])
        return len(step.env_id)


def random_actions(spec: EnvSpec, shape: tuple[int, ...], seed: int) -> NDArray[Any]:
    """Draws actions [*shape, ...] uniformly from a space."""
    rng = np.random.default_rng(seed)
    if isinstance(spec.action_space, gym.spaces.Box):
        low, high = spec.action_space.low, spec.action_space.high
        return rng.uniform(low, high, (*shape, *spec.action_shape)).astype(np.float32)
    return rng.integers(
        spec.action_choices if spec.action_shape else spec.num_actions,
        size=(*shape, *spec.action_shape),
        dtype=np.int64,
    )


class FreePool:
    """A pool whose steps cost nothing: the environments take turns to show the same frames."""

    def __init__(self, spec: EnvSpec, *, num_envs: int, batch_size: int, seed: int = 0) -> None:
        self.spec = spec
        self.num_envs = num_envs
        self.max_batch = batch_size
        space = copy.deepcopy(spec.observation_space)  # drawing from it changes it
        space.seed(seed)
        never = np.zeros(batch_size, np.bool_)
        step = EnvStep(
            env_id=np.arange(batch_size, dtype=np.int32),
            run_id=np.zeros(batch_size, np.int64),
            observation=np.stack([space.sample() for _ in range(batch_size)]),
            reward=np.random.default_rng(seed).integers(-1, 2, batch_size).astype(np.float32),
            reset=never,
            terminated=never,
            truncated=never,
            final_observation=None,
        )
        turns = math.lcm(num_envs, batch_size) // batch_size
        steps = [
            step._replace(env_id=(step.env_id + turn * batch_size) % num_envs)
            for turn in range(turns)
        ]
        first = [step._replace(reset=~never) for step in steps]
        self._steps = itertools.chain(first, itertools.cycle(steps))

    def receive(self, timeout_s: float) -> EnvStep | None:
        """Returns the environments whose turn it is, at once."""
        return next(self._steps)

    def reply(self, action: NDArray[Any]) -> None:
        """Forgets the actions."""

    def close(self) -> None:
        """Has nothing to give back."""


class ServerAlone:
    """A run's server at a free pool. Its unrolls are thrown away as fast as they are filled."""

    def __init__(
        self, config: RunConfig, parts: Parts, *, num_envs: int, batch_size: int | None = None
    ) -> None:
        """Takes policy and weights from `parts`, whose own pool and unrolls are left alone.

        Args:
            config: of the run.
            parts: of the run.
            num_envs: environments of the free pool.
            batch_size: how many are due at once; None for the run's own.
        """
        batch = batch_size or parts.training.pool.max_batch
        server = dataclasses.replace(config.server, num_envs=num_envs, inference_batch=0)
        config = dataclasses.replace(config, server=server)
        device = parts.compute.device
        model: Any = parts.server_model
        actor = Actor(algorithm=parts.algorithm, model=model, generator=parts.generator)
        self._weights, self._waits = parts.weights, Waits()
        self.unrolls: UnrollTable | DeviceUnrolls
        if isinstance(parts.source, DeviceSeat):
            self._seat: AnySeat = free_device_seat(
                config, actor, parts.spec, device=parts.compute.acting, reader=device
            )
            self.unrolls = self._seat.unrolls
            self.queue = self.unrolls.queue
            return
        self.queue, self.unrolls = make_unrolls(
            config, parts.algorithm, parts.spec, parts.server_model, batch, device
        )
        self._seat = Seat(
            FreePool(parts.spec, num_envs=num_envs, batch_size=batch),
            actor,
            initial_state(parts.spec, model, 1, device),
            unrolls=self.unrolls,
            on_episodes=lambda *_: None,
            device=device,
            exploration=exploration(parts.algorithm, num_envs),
        )

    def serve(self) -> int:
        """Answers one batch; returns its agent steps."""
        return self._seat.serve(self._weights.pull, 0.0, self._waits)

    def serve_and_drop(self) -> int:
        """Answers one batch and frees the unrolls that it filled; returns its agent steps."""
        count = self.serve()
        full = len(self.queue)
        if full:
            with self.queue.reading(full, timeout_s=0.0):
                pass
        return count


def environment_alone(pool: Pool, seconds: float) -> tuple[Timing, NDArray[np.float64]]:
    """Measures a pool with random actions.

    Returns:
        Agent steps, and the seconds from a reply to an environment until its next row, one each for
        the newest steps.
    """
    player = RandomPlayer(pool)
    player.start()
    timing = timed(player.play, seconds, torch.device("cpu"))
    return timing, np.concatenate(player.latency_s)


def inference_alone(
    config: RunConfig,
    parts: Parts,
    seconds: float,
    *,
    num_envs: int,
    batch_size: int | None = None,
) -> Timing:
    """Measures a run's server without environments, in agent steps; a round is a batch."""
    server = ServerAlone(config, parts, num_envs=num_envs, batch_size=batch_size)
    return timed(server.serve_and_drop, seconds, parts.compute.device)


def learner_alone(config: RunConfig, parts: Parts, seconds: float, *, num_envs: int) -> Timing:
    """Measures a run's learner where experience is always there, in samples; a round is an update.

    What is compiled, is so by then: see `run.warmup`, or else the first update pays for it, which
    is never measured.

    A replay is the run's own, as full as it is, or filled with one batch.

    Raises:
        TrainingDiverged: a loss was not finite.
    """
    if isinstance(parts.feed, ReplayFeed):
        num_envs = config.server.num_envs  # its rings are theirs
    server = ServerAlone(config, parts, num_envs=num_envs)
    feed = endless_feed(parts, server)
    while not feed.ready():
        server.serve()
        feed.fill()
    learner = Learner(parts.algorithm, feed, parts.weights, device=parts.compute.device)
    waits = Waits()

    def update() -> int:
        before = learner.samples
        learner.learn(progress=0.0, timeout_s=0.0, waits=waits)
        return learner.samples - before

    timing = timed(update, seconds, parts.compute.device)
    learner.ensure_finite()
    # A call may take several updates.
    return timing._replace(rounds=timing.amount * learner.version // learner.samples)


class EndlessFifo(FifoFeed):
    """Gives the same unrolls again and again."""

    def __init__(self, server: ServerAlone, *, batch_unrolls: int, device: torch.device) -> None:
        super().__init__(server.unrolls, server.queue, batch_unrolls=batch_unrolls, device=device)
        self._slots = server.queue
        self._filled: dict[str, list[int]] | None = None

    def fill(self) -> None:
        """Has nothing to do: full slots stay where they are."""

    def next(self, *, version: int, timeout_s: float, waits: Waits) -> Batch | None:
        """Gives the oldest slots, which are full again at once."""
        if self._filled is None:
            self._filled = self._slots.state()
        self._slots.restore(self._filled)
        return super().next(version=version, timeout_s=timeout_s, waits=waits)


class EndlessReplay(ReplayFeed):
    """Samples as often as it is asked."""

    def fill(self) -> None:
        """Takes in what has come."""
        self._take_in(waiting=len(self._queue))


def endless_feed(parts: Parts, server: ServerAlone) -> EndlessFifo | EndlessReplay:
    """Returns what a learner can be measured with."""
    experience, device = parts.algorithm.experience, parts.compute.device
    if not isinstance(parts.feed, ReplayFeed):
        return EndlessFifo(server, batch_unrolls=experience.batch_unrolls, device=device)
    replay, batch = parts.feed.replay, experience.unrolls_per_call
    replay.forget_streams()  # the free environments continue nothing
    limiter = SampleLimiter(0.0, min_inserted=batch, batch=batch, max_insert=1)
    limiter.inserted(replay.sequences)
    return EndlessReplay(
        server.unrolls,
        server.queue,
        replay,
        limiter,
        experience=experience,
        device=device,
        seed=0,
        initial_priority=first_priority(parts.algorithm),
    )
