"""The learner: takes batches, updates the weights, publishes them.

Of several learners each normalises by its own share of a batch where a network has batch norm; the
running statistics are averaged after every update, so that all act, and save, by the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from headrace.algorithms.base import Algorithm
from headrace.apart import Apart
from headrace.errors import TrainingDiverged
from headrace.learner.feeds import Feed, ReplayFeed
from headrace.learner.group import Group
from headrace.records import Batch, Update
from headrace.rows import read_later
from headrace.telemetry.metrics import Waits
from headrace.weights import WeightsEnd

LAG_BINS = 64
"""Bins of the policy-lag histogram: lags of 0, 1, … updates; the last takes all beyond."""


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Returns what batch norm, and whatever names its statistics alike, has seen on average."""
    found = (
        getattr(module, name, None)
        for module in model.modules()
        for name in ("running_mean", "running_var")
    )
    return [statistic for statistic in found if isinstance(statistic, Tensor)]


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
        group: Group | None = None,
    ) -> None:
        """Goes on from `version` updates and publishes the weights that the model has.

        Args:
            algorithm: What learns; shares gradients already, where there is a group.
            feed: Gives batches.
            weights: Where weights go.
            device: Of the algorithm.
            version: Updates so far.
            samples: Rows through a gradient so far, of all learners.
            group: The other learners; None for one that is alone.
        """
        self.algorithm = algorithm
        self.feed = feed
        self.version = version
        self.samples = samples
        self.lag_counts = torch.zeros(LAG_BINS, dtype=torch.int64, device=device)
        self._weights = weights
        self._group = group
        self._apart = Apart(keeps=False)  # the algorithm, or the network, may be the user's
        self._statistics = running_statistics(algorithm.model)
        self._held: Batch | None = None
        # On a GPU the check is read one update later, when it has long been computed.
        self._defer_check = device.type == "cuda"
        self._unchecked: Callable[[], bool] | None = None
        weights.publish(algorithm.model, version)

    def ready(self) -> bool:
        """Whether `hold` has something to do at once, or has done it."""
        return self._held is not None or self.feed.ready()

    def hold(self, *, timeout_s: float, waits: Waits) -> bool:
        """Takes a batch, and keeps it for the next `learn`; False: none came within `timeout_s`."""
        if self._held is None:
            self._held = self.feed.next(version=self.version, timeout_s=timeout_s, waits=waits)
        return self._held is not None

    def go_on(self, progress: float) -> None:
        """Sets what the next batch depends on, for a share `progress` of the run that is done."""
        if isinstance(self.feed, ReplayFeed):
            self.feed.go_on(progress)

    def learn(self, *, progress: float, timeout_s: float, waits: Waits) -> Update | None:
        """Takes one update, or as many as the algorithm takes at once.

        Returns None if there was no batch within `timeout_s`.

        Raises:
            TrainingDiverged: a loss or a gradient norm was not finite; those weights are not
                published.
        """
        experience = self.algorithm.experience
        self.go_on(progress)
        self.hold(timeout_s=timeout_s, waits=waits)
        batch, self._held = self._held, None
        if batch is None:
            return None
        if self._group is not None and batch.weight is not None:
            batch = batch._replace(weight=batch.weight / self._group.largest(batch.weight.amax()))
        with self._apart.light:
            update = self.algorithm.update(batch, progress=progress)
        self._check(update.finite)
        if self._group is not None:
            self._group.average(self._statistics)
        self.feed.learned(update)
        if experience.replay is None:  # what a replay gives is old on purpose
            lag = (self.version - batch.version).clamp(0, LAG_BINS - 1).flatten()
            # Not bincount: on a GPU it waits, to learn how many bins there are.
            self.lag_counts.scatter_add_(0, lag, torch.ones_like(lag))
        self.version += experience.updates_per_call
        learners = 1 if self._group is None else self._group.count
        samples = experience.samples_per_update * experience.updates_per_call * learners
        if update.passes is not None:  # fewer than there could have been
            samples = samples * update.passes // experience.passes
        self.samples += samples
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
