"""Gathers what the stages count into one row, for metrics.jsonl, TensorBoard and the terminal.

What Spreeze (arXiv:2312.06126) judges a desktop by is in every row under these names:

```
sampling_hz            agent steps/s that the environments gave: agent_steps_per_s
updates_per_s          network update frequency
update_frame_rate_hz   samples through the gradient per second: batch times updates/s
samples_used_share     of the sequences or unrolls that came, how many were learned from (feeds.py)
transmission_loss      of the agent steps made, how many never reached replay or learner
cpu_load, gpu_load     how much of the machine that takes (telemetry/load.py)
```
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from typing import NamedTuple

from headrace.learner.loop import Learner
from headrace.records import Update
from headrace.run.build import Parts
from headrace.telemetry.load import LoadMeter
from headrace.telemetry.metrics import EpisodeStats, Rate, Waits

Row = dict[str, float | int | str]


_SMOOTHING = 0.1  # weight of the newest row in what names the bottleneck


class Counts(NamedTuple):
    """What one learner, or several together, have counted in this session."""

    agent_steps: int = 0
    dropped_unrolls: int = 0
    stale_unrolls: int = 0
    unrolls_waiting: int = 0
    worker_deaths: int = 0


def counts_of(parts: Parts) -> Counts:
    """Returns the counts of this process."""
    return Counts(
        parts.source.agent_steps,
        parts.dropped_unrolls,
        parts.queue.stale,
        len(parts.queue),
        parts.worker_deaths,
    )


def hosts_row(parts: Parts) -> dict[str, int]:
    """Returns what there is of worker hosts on other machines; nothing where none are asked for.

    worker_hosts and worker_host_envs are as of now, and bytes_received and bytes_sent of the
    session.
    """
    source = parts.source
    counters = getattr(source, "counters", getattr(getattr(source, "pool", None), "counters", {}))
    names = {
        "worker_hosts": "hosts",
        "worker_host_envs": "envs",
        "bytes_received": "bytes_in",
        "bytes_sent": "bytes_out",
    }
    return {name: counters[count] for name, count in names.items() if count in counters}


# Where a stage waits for less than this share of the time, nothing holds the others up.
_IDLE_SHARE = 0.15


class Reporter:
    """Reads the counters of a run, at most once per interval."""

    def __init__(
        self,
        parts: Parts,
        learner: Learner,
        waits: Waits,
        episodes: EpisodeStats,
        eval_episodes: EpisodeStats,
        *,
        interval_s: float,
        agent_steps: int,
        elapsed_s: Callable[[], float],
    ) -> None:
        """Goes on from `agent_steps` of earlier sessions; `elapsed_s` is the whole run's clock."""
        self.others: Callable[[], Counts] = Counts
        """What other learners have counted; rows are of all, but for waits, losses and replay."""
        self._parts, self._learner, self._waits = parts, learner, waits
        self._episodes, self._eval_episodes = episodes, eval_episodes
        self._interval_s = interval_s
        self._agent_steps_before, self._elapsed_s = agent_steps, elapsed_s
        self._start_s = self._last_s = time.monotonic()
        self._steps = Rate("agent_steps", self._start_s)
        self._updates = Rate("updates", self._start_s)
        self._updates_seen = learner.version
        self._samples = Rate("samples", self._start_s)
        self._samples_seen = learner.samples
        self._steps_seen, self._lost_seen = parts.source.agent_steps, self._lost_unrolls()
        models = learner.algorithm.model.parameters()
        self._load = LoadMeter({parameter.device for parameter in models}, self._start_s)
        self.lag_histogram: list[int] = []
        self._usual_shares: dict[str, float] = {}

    @property
    def agent_steps(self) -> int:
        """Agent steps of the whole run."""
        # Asked for at every step of the loops: counts nothing else.
        session = self._parts.source.agent_steps + self.others().agent_steps
        return self._agent_steps_before + session

    @property
    def env_frames(self) -> int:
        """Emulator frames of the whole run."""
        return self.agent_steps * self._parts.spec.action_repeat

    @property
    def elapsed_s(self) -> float:
        """Seconds that the run has taken: every session from its start, imports included."""
        return self._elapsed_s()

    def episode_counters(self) -> dict[str, float | int | None]:
        """Returns what the statistics of a resumed run start from; None for no maximum yet."""
        counts = self._episodes.read()
        highest = counts["return_max"]
        return {
            "episodes": counts["episodes"],
            "return_max": highest if math.isfinite(highest) else None,
        }

    def due(self) -> bool:
        """Whether an interval has passed since the last row."""
        return time.monotonic() - self._last_s >= self._interval_s

    def row(self, update: Update | None) -> Row:
        """Returns the row of the interval that ends now. Reads `update` from the device."""
        now_s = time.monotonic()
        interval_s = max(now_s - self._last_s, 1e-9)
        self._last_s = now_s
        parts, learner = self._parts, self._learner
        counts = self._counts()  # once: the server's thread goes on
        steps = counts.agent_steps
        agent_steps = self._agent_steps_before + steps
        self._steps.add(steps - self._steps.total)
        self._updates.add(learner.version - self._updates_seen - self._updates.total)
        self._samples.add(learner.samples - self._samples_seen - self._samples.total)
        steps_per_s = self._steps.read(now_s)[0]
        median_s, slow_s = parts.source.turnaround_s.read()
        row: Row = {
            "env_frames": agent_steps * parts.spec.action_repeat,
            "agent_steps": agent_steps,
            "updates": learner.version,
            "samples": learner.samples,
            "elapsed_s": self.elapsed_s,
            "env_frames_per_s": steps_per_s * parts.spec.action_repeat,
            "agent_steps_per_s": steps_per_s,
            "sampling_hz": steps_per_s,
            "updates_per_s": self._updates.read(now_s)[0],
            "update_frame_rate_hz": self._samples.read(now_s)[0],
            "transmission_loss": self._transmission_loss(),
            **self._episodes.read(),
            "server_turnaround_ms_p50": median_s * 1000,
            "server_turnaround_ms_p99": slow_s * 1000,
            "unrolls_waiting": counts.unrolls_waiting,
            "unrolls_dropped": counts.dropped_unrolls,
            "unrolls_too_old": counts.stale_unrolls,
            "worker_deaths": counts.worker_deaths,
            **hosts_row(parts),
            "precision": str(parts.compute.precision).removeprefix("torch."),
            **self._load.read(now_s),
        }
        shares = {f"wait/{name}": s / interval_s for name, s in self._waits.read().items()}
        row |= shares
        row["bottleneck"] = bottleneck(self._smoothed(shares))
        row |= learner.feed.metrics()
        if parts.evaluation is not None:
            row |= {f"eval_{name}": value for name, value in self._eval_episodes.read().items()}
        self.lag_histogram = self._count_lags()
        row |= lag_summary(self.lag_histogram)
        if update is not None:
            row |= {name: float(value) for name, value in update.metrics.items()}
        return row

    def _counts(self) -> Counts:
        pairs = zip(counts_of(self._parts), self.others(), strict=True)
        return Counts(*(own + other for own, other in pairs))

    def _lost_unrolls(self) -> int:
        counts = self._counts()
        return counts.dropped_unrolls + counts.stale_unrolls

    def _transmission_loss(self) -> float:
        return transmission_loss(
            self._lost_unrolls() - self._lost_seen,
            unroll_steps=self._learner.algorithm.experience.unroll_steps,
            agent_steps=self.agent_steps - self._agent_steps_before - self._steps_seen,
        )

    def _smoothed(self, shares: dict[str, float]) -> dict[str, float]:
        """Returns shares as they have been of late: who is busy is not a matter of two seconds."""
        usual = self._usual_shares
        for name, share in shares.items():
            usual[name] = usual.get(name, share) + _SMOOTHING * (share - usual.get(name, share))
        return usual

    def _count_lags(self) -> list[int]:
        counts = self._learner.lag_counts.to("cpu", copy=True)
        self._learner.lag_counts.zero_()
        return [int(count) for count in counts]


def transmission_loss(lost_unrolls: int, *, unroll_steps: int, agent_steps: int) -> float:
    """Returns the share of agent steps that never reached replay or learner, 0..1.

    Args:
        lost_unrolls: Never finished, as their environment began anew or its worker died; or
            refused by the learner as too old. Each counts as whole, so the share is never too low.
        unroll_steps: Agent steps of one.
        agent_steps: Agent steps made meanwhile.
    """
    return min(1.0, lost_unrolls * unroll_steps / agent_steps) if agent_steps else 0.0


def lag_summary(counts: list[int]) -> Row:
    """Returns mean, 99th percentile and maximum of the policy lag, in updates."""
    total = sum(counts)
    if not total:
        return {}
    running = list(itertools.accumulate(counts))
    return {
        "policy_lag_mean": sum(lag * count for lag, count in enumerate(counts)) / total,
        "policy_lag_p99": next(lag for lag, below in enumerate(running) if below >= 0.99 * total),
        "policy_lag_max": max(lag for lag, count in enumerate(counts) if count),
    }


def bottleneck(shares: dict[str, float]) -> str:
    """Names the stage that is busiest, from the shares of time in `Waits`: the others wait for it.

    The server waits for environments, or for slots that the learner has not freed; the learner
    waits for unrolls, which come late if environments or the server are slow. Where server and
    learner take turns neither waits for the other, and there are only the environments to wait for.
    """
    for_environments = shares.get("wait/server_for_environments", 0.0)
    for_slots = shares.get("wait/server_for_slots", 0.0)
    for_unrolls = shares.get("wait/learner_for_unrolls", 0.0)
    if max(for_environments, for_slots, for_unrolls) < _IDLE_SHARE:
        return "none"
    in_turns = "wait/server_for_slots" not in shares and for_unrolls < _IDLE_SHARE
    if in_turns:
        return "environments"
    if for_slots >= for_unrolls:
        return "learner"
    return "environments" if for_environments >= _IDLE_SHARE else "server"
