"""One update: what is published, what is counted, what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from headrace.algorithms.base import ExperienceSpec
from headrace.errors import TrainingDiverged
from headrace.experience.fifo import SlotQueue
from headrace.experience.unrolls import UnrollTable
from headrace.learner.feeds import FifoFeed
from headrace.learner.loop import LAG_BINS, Learner
from headrace.records import Batch, PolicyStep, Update
from headrace.specs import EnvSpec
from headrace.steps import EnvStep
from headrace.telemetry.metrics import Waits
from headrace.weights import Weights

CPU = torch.device("cpu")
T, B = 4, 2


class Counting:
    """Adds one to its only weight at every update."""

    experience = ExperienceSpec(unroll_steps=T, batch_unrolls=B)

    def __init__(self) -> None:
        self.model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.model.weight)
        self.finite = True
        self.batches: list[Batch] = []
        self.progress: list[float] = []

    def update(self, batch: Batch, *, progress: float) -> Update:
        self.batches.append(batch)
        self.progress.append(progress)
        with torch.no_grad():
            self.model.weight.add_(1.0)
        return Update({}, torch.tensor(self.finite))


class Bench:
    """A learner, and a hand that fills its unrolls."""

    def __init__(self, version: int = 0) -> None:
        spec = EnvSpec(
            name="numbers",
            observation_space=gym.spaces.Box(-1e6, 1e6, (1,), np.float32),
            action_space=gym.spaces.Discrete(3),
        )
        self.queue = SlotQueue(20, capacity=B)
        self.table = UnrollTable(
            spec,
            num_envs=B,
            experience=Counting.experience,
            num_slots=20,
            queue=self.queue,
            recurrent=(),
            device=CPU,
        )
        self.algorithm = Counting()
        self.server_model = nn.Linear(1, 1, bias=False)
        self.weights = Weights(self.server_model)
        self.feed = FifoFeed(self.table, self.queue, batch_unrolls=B, device=CPU)
        self.learner = Learner(self.algorithm, self.feed, self.weights, device=CPU, version=version)

    def append(self, version: int) -> None:
        never = np.zeros(B, np.bool_)
        step = EnvStep(
            env_id=np.arange(B, dtype=np.int32),
            run_id=np.zeros(B, np.int64),
            observation=np.zeros((B, 1), np.float32),
            reward=np.zeros(B, np.float32),
            reset=never,
            terminated=never,
            truncated=never,
            final_observation=None,
        )
        nothing = torch.zeros(B)
        self.table.append(
            step,
            torch.zeros(B, 1),
            PolicyStep(nothing.long(), nothing, nothing),
            previous_action=nothing.long(),
            recurrent=(),
            version=version,
            bootstrap=None,
        )

    def learn(self) -> Update | None:
        return self.learner.learn(progress=0.25, timeout_s=0.0, waits=Waits())

    def published(self) -> tuple[int, float]:
        return self.weights.pull(), self.server_model.weight.item()


def test_the_first_weights_are_published_before_any_update() -> None:
    assert Bench(version=7).published() == (7, 0.0)


def test_an_update_takes_a_batch_and_publishes_the_next_version() -> None:
    bench = Bench()
    for _ in range(T):
        bench.append(0)
    assert bench.learn() is None
    assert bench.published() == (0, 0.0)
    bench.append(0)
    update = bench.learn()
    assert update is not None
    assert bench.published() == (1, 1.0)
    assert (bench.learner.version, bench.learner.samples) == (1, T * B)
    assert bench.algorithm.progress == [0.25]
    assert bench.algorithm.batches[0].action.shape == (T, B)
    assert bench.learn() is None, "the unrolls are used up"


def test_passes_that_were_left_out_are_no_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    four = dataclasses.replace(bench.algorithm.experience, passes=4)
    monkeypatch.setattr(bench.algorithm, "experience", four)
    for passes in (3, None):
        update = Update({}, torch.tensor(True), passes=passes)
        monkeypatch.setattr(bench.algorithm, "update", lambda *_, update=update, **__: update)
        for _ in range(T + (passes is not None)):
            bench.append(0)
        assert bench.learn() is update
    assert bench.learner.samples == (3 + 4) * T * B


def test_running_statistics_are_published_as_the_mean_of_all_learners() -> None:
    class Two:
        count = 2

        def average(self, tensors: list[Tensor]) -> None:
            for tensor in tensors:  # the other has seen nothing but zeros
                tensor.div_(2)

    class Seeing(Counting):
        def __init__(self) -> None:
            super().__init__()
            self.seen = nn.BatchNorm1d(1)
            self.model: Any = nn.Sequential(self.model, self.seen)

        def update(self, batch: Batch, *, progress: float) -> Update:
            assert self.seen.running_mean is not None
            self.seen.running_mean.add_(6.0)
            return Update({}, torch.tensor(True))

    bench, algorithm, group = Bench(), Seeing(), cast(Any, Two())
    acting: Any = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    weights = Weights(acting)
    learner = Learner(algorithm, bench.feed, weights, device=CPU, group=group)
    for _ in range(T + 1):
        bench.append(0)
    assert learner.learn(progress=0.0, timeout_s=0.0, waits=Waits()) is not None
    weights.pull()
    assert (acting[1].running_mean.item(), acting[1].running_var.item()) == (3.0, 0.5)
    assert torch.equal(acting[0].weight, algorithm.model[0].weight), "gradients were averaged"


def test_unrolls_that_wait_or_are_too_old_are_not_used() -> None:
    bench = Bench()
    assert bench.feed.metrics() == {}
    for _ in range(2 * T + 1):
        bench.append(0)
    assert bench.learn() is not None
    assert bench.feed.metrics() == {"samples_used_share": 0.5}  # the others wait
    assert bench.learn() is not None
    assert bench.feed.metrics() == {"samples_used_share": 1.0}
    bench.feed._max_policy_lag = 1  # those that come now are two updates old
    for _ in range(T):
        bench.append(0)
    assert bench.learn() is None
    assert bench.queue.stale == B
    assert bench.feed.metrics()["samples_used_share"] == pytest.approx(2 / 3)


def test_weights_of_an_update_that_diverged_are_not_published() -> None:
    bench = Bench()
    for _ in range(T + 1):
        bench.append(0)
    bench.algorithm.finite = False
    with pytest.raises(TrainingDiverged, match=r"at update 0: .*--learning-rate"):
        bench.learn()
    assert bench.published() == (0, 0.0)
    assert bench.learner.version == 0


def test_a_check_that_is_read_later_is_read_before_weights_are_saved() -> None:
    bench = Bench()
    bench.learner._defer_check = True  # as on a GPU
    for _ in range(T + 1):
        bench.append(0)
    bench.algorithm.finite = False
    assert bench.learn() is not None
    with pytest.raises(TrainingDiverged):
        bench.learner.ensure_finite()
    bench.learner.ensure_finite()


def test_a_check_that_is_read_later_ends_the_next_update() -> None:
    bench = Bench()
    bench.learner._defer_check = True
    bench.algorithm.finite = False
    for _ in range(2 * T + 1):
        bench.append(0)
    assert bench.learn() is not None
    bench.algorithm.finite = True
    with pytest.raises(TrainingDiverged):
        bench.learn()


def test_the_lag_is_the_updates_made_since_each_action() -> None:
    bench = Bench(version=100)
    # The last row's version belongs to the next unroll.
    for version in (10, 98, 100, 100, 99):
        bench.append(version)
    bench.learn()
    counts: Tensor = bench.learner.lag_counts
    found: dict[int, Any] = {i: counts[i].item() for i in counts.nonzero().flatten().tolist()}
    assert found == {0: 2 * B, 2: B, LAG_BINS - 1: B}
    for _ in range(T):
        bench.append(101)
    bench.learn()
    assert counts[0].item() == 2 * B + (T - 1) * B
    assert counts[2].item() == 2 * B
