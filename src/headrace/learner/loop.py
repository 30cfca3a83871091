"""The learner: takes unrolls, updates the weights, publishes them."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from headrace.algorithms.base import Algorithm
from headrace.errors import DeadlineExceeded, TrainingDiverged
from headrace.experience.fifo import Slots
from headrace.experience.unrolls import UnrollTable
from headrace.learner.batches import align, moved
from headrace.records import Update
from headrace.telemetry.metrics import Waits
from headrace.weights import WeightsEnd

LAG_BINS = 64
"""Bins of the policy-lag histogram: lags of 0, 1, … updates; the last takes all beyond."""


class Learner:
    """What one update needs, and what it leaves behind."""

    def __init__(
        self,
        algorithm: Algorithm,
        unrolls: UnrollTable,
        queue: Slots,
        weights: WeightsEnd,
        *,
        device: torch.device,
        version: int = 0,
        samples: int = 0,
        max_policy_lag: int | None = None,
    ) -> None:
        """Goes on from `version` updates and publishes the weights that the model has.

        Unrolls whose first row is more than `max_policy_lag` updates old are dropped, and counted
        by the queue; None keeps all.
        """
        self.algorithm = algorithm
        self.version = version
        self.samples = samples
        self.lag_counts = torch.zeros(LAG_BINS, dtype=torch.int64, device=device)
        self._unrolls = unrolls
        self._queue = queue
        self._weights = weights
        self._device = device
        self._max_policy_lag = max_policy_lag
        # On a GPU the check is read one update later, when it has long been computed.
        self._defer_check = device.type == "cuda"
        self._unchecked: Callable[[], bool] | None = None
        weights.publish(algorithm.model, version)

    def learn(self, *, progress: float, timeout_s: float, waits: Waits) -> Update | None:
        """Takes one update; None if too few unrolls were full within `timeout_s`.

        Raises:
            TrainingDiverged: a loss or a gradient norm was not finite; those weights are not
                published.
        """
        experience = self.algorithm.experience
        before_s = time.perf_counter()
        try:
            with self._queue.reading(
                experience.batch_unrolls, timeout_s=timeout_s, keep=self._is_fresh
            ) as slots:
                waits.add("learner_for_unrolls", time.perf_counter() - before_s)
                batch = moved(align(self._unrolls.gather(slots)), self._device)
        except DeadlineExceeded:
            waits.add("learner_for_unrolls", time.perf_counter() - before_s)
            return None
        update = self.algorithm.update(batch, progress=progress)
        self._check(update.finite)
        lag = (self.version - batch.version).clamp(0, LAG_BINS - 1).flatten()
        # Not bincount: on a GPU it waits, to learn how many bins there are.
        self.lag_counts.scatter_add_(0, lag, torch.ones_like(lag))
        self.version += 1
        self.samples += batch.log_prob.numel() * experience.passes
        self._weights.publish(self.algorithm.model, self.version)
        return update

    def ensure_finite(self) -> None:
        """Reads the check that is still open, before weights are saved."""
        if self._unchecked is not None:
            finite, self._unchecked = self._unchecked, None
            self._raise_unless(finite())

    def _is_fresh(self, slot: int) -> bool:
        bound = self._max_policy_lag
        return bound is None or self.version - self._unrolls.oldest_version(slot) <= bound

    def _check(self, finite: Tensor) -> None:
        if self._defer_check:
            self.ensure_finite()
            self._unchecked = read_later(finite)
        else:
            self._raise_unless(bool(finite))

    def _raise_unless(self, finite: bool) -> None:
        if not finite:
            raise TrainingDiverged(
                f"the loss or its gradient was not finite at update {self.version}: "
                "lower --learning-rate or --max-gradient-norm, or try --precision float32"
            )


def read_later(flag: Tensor) -> Callable[[], bool]:
    """Starts copying a flag to the host; what it returns waits for that copy only."""
    if not flag.is_cuda:
        return lambda: bool(flag)
    host = torch.empty((), dtype=torch.bool, pin_memory=True)
    host.copy_(flag, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()

    def read() -> bool:
        copied.synchronize()
        return bool(host)

    return read
