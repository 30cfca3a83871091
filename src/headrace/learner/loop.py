"""The learner: takes batches, updates the weights, publishes them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from headrace.algorithms.base import Algorithm
from headrace.errors import TrainingDiverged
from headrace.learner.feeds import Feed
from headrace.records import Update
from headrace.rows import read_later
from headrace.telemetry.metrics import Waits
from headrace.weights import WeightsEnd

LAG_BINS = 64
"""Bins of the policy-lag histogram: lags of 0, 1, … updates; the last takes all beyond."""


class Learner:
    """What one update needs, and what it leaves behind."""

    def __init__(
        self,
        algorithm: Algorithm,
        feed: Feed,
        weights: WeightsEnd,
        *,
        device: torch.device,
        version: int = 0,
        samples: int = 0,
    ) -> None:
        """Goes on from `version` updates and publishes the weights that the model has."""
        self.algorithm = algorithm
        self.feed = feed
        self.version = version
        self.samples = samples
        self.lag_counts = torch.zeros(LAG_BINS, dtype=torch.int64, device=device)
        self._weights = weights
        # On a GPU the check is read one update later, when it has long been computed.
        self._defer_check = device.type == "cuda"
        self._unchecked: Callable[[], bool] | None = None
        weights.publish(algorithm.model, version)

    def learn(self, *, progress: float, timeout_s: float, waits: Waits) -> Update | None:
        """Takes one update, or as many as the algorithm takes at once.

        Returns None if there was no batch within `timeout_s`.

        Raises:
            TrainingDiverged: a loss or a gradient norm was not finite; those weights are not
                published.
        """
        experience = self.algorithm.experience
        batch = self.feed.next(version=self.version, timeout_s=timeout_s, waits=waits)
        if batch is None:
            return None
        update = self.algorithm.update(batch, progress=progress)
        self._check(update.finite)
        self.feed.learned(update)
        if experience.replay is None:  # what a replay gives is old on purpose
            lag = (self.version - batch.version).clamp(0, LAG_BINS - 1).flatten()
            # Not bincount: on a GPU it waits, to learn how many bins there are.
            self.lag_counts.scatter_add_(0, lag, torch.ones_like(lag))
        self.version += experience.updates_per_call
        self.samples += experience.samples_per_update * experience.updates_per_call
        self._weights.publish(self.algorithm.model, self.version)
        return update

    def ensure_finite(self) -> None:
        """Reads the check that is still open, before weights are saved."""
        if self._unchecked is not None:
            finite, self._unchecked = self._unchecked, None
            self._raise_unless(finite())

    def _check(self, finite: Tensor) -> None:
        if self._defer_check:
            self.ensure_finite()
            read = read_later(finite)
            self._unchecked = lambda: bool(read())
        else:
            self._raise_unless(bool(finite))

    def _raise_unless(self, finite: bool) -> None:
        if not finite:
            raise TrainingDiverged(
                f"the loss or its gradient was not finite at update {self.version}: "
                "lower --learning-rate or --max-gradient-norm, or try --precision float32"
            )
