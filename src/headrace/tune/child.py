"""The trial's own program: trains for some seconds without writing anything, and says how fast.

```
parent   tune.trials                          child   main
  status   <-- {"figures": {...}} ---------------       of the measured window, or
           <-- {"error": sentence} --------------       of an error that nobody caught
```
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from headrace.bench.end_to_end import Window, measure_ceiling
from headrace.config import RunConfig, from_dict, takes_turns
from headrace.learner.feeds import ReplayFeed
from headrace.learner.loop import Learner
from headrace.pools.processes import WorkerEnd
from headrace.run.beside import more_threads
from headrace.run.build import Parts, build
from headrace.run.local import train_in_turns, train_overlapped
from headrace.run.system import keep_memory
from headrace.run.warmup import warm_up
from headrace.telemetry.metrics import Waits

_WARM_UP = 0.3  # times the seconds that are measured, before them
_APPROACH = 2.0  # times these, at most, until both sides are in balance


class Approach:
    """Trains until samples and steps are in balance: what `run.local` drives before the window.

    At the start either side of a replay may run ahead of the other, for seconds where updates are
    slow: a window would see environments that wait for nobody. It is over when the limiter holds
    one of them back for the first time. Where neither is for long, they are about as fast.
    """

    def __init__(
        self,
        parts: Parts,
        learner: Learner,
        waits: Waits,
        *,
        longest_s: float,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.parts, self.waits = parts, waits
        self._learner, self._longest_s, self._now_s = learner, longest_s, now_s
        self._since_s: float | None = None  # the first update

    def over(self) -> bool:
        """Whether the limiter has held a side back, or `longest_s` have passed since an update."""
        feed = self.parts.feed
        if not isinstance(feed, ReplayFeed) or not feed.limiter.samples_per_insert:
            return True
        if self._since_s is None:
            return False
        limiter, batch = feed.limiter, self.parts.algorithm.experience.unrolls_per_call
        held = not (limiter.may_insert(1) and limiter.may_sample(batch))
        return held or self._now_s() - self._since_s >= self._longest_s

    def enough(self) -> bool:
        """Never: the server goes on until it is over."""
        return False

    def attend(self) -> None:
        """Has nothing else to do."""

    def learn(self, timeout_s: float) -> None:
        """Takes one update if a batch is there."""
        update = self._learner.learn(progress=0.0, timeout_s=timeout_s, waits=self.waits)
        if update is not None and self._since_s is None:
            self._since_s = self._now_s()


def measured_run(parts: Parts, config: RunConfig, *, seconds: float) -> Window:
    """Trains as a run would, in turns too, until the window is measured.

    Raises:
        TrainingDiverged: a loss was not finite.
    """
    waits = Waits()
    learner = Learner(parts.algorithm, parts.feed, parts.weights, device=parts.compute.device)
    drive = train_in_turns if takes_turns(config) else train_overlapped
    with more_threads(parts):
        approach = Approach(parts, learner, waits, longest_s=_APPROACH * seconds)
        if not approach.over():  # a server's thread takes a while to start and end
            drive(approach)
        window = Window(parts, learner, waits, warmup_s=_WARM_UP * seconds, seconds=seconds)
        drive(window)
    learner.ensure_finite()
    return window


def held_ratio(parts: Parts) -> float | None:
    """Returns the samples per agent step that the limiter holds; None where there is no such."""
    replay = parts.algorithm.experience.replay
    if replay is None or not replay.settings.samples_per_insert:
        return None
    return replay.settings.samples_per_insert * replay.learned_steps / replay.stride_steps


def balanced(steps: float, samples: float, held: float | None) -> tuple[float, float]:
    """Returns agent steps/s and samples/s of the long run, in which a limit holds exactly.

    In the seconds of a window one side is still a little ahead: then the other one tells.
    """
    if held is None:
        return steps, samples
    slower = min(steps, samples / held)
    return slower, slower * held


def figures_of(window: Window, parts: Parts) -> dict[str, Any]:
    """Returns what the parent is told; rates are per second of wall clock."""
    row = window.row()
    ratio, held = window.samples_per_agent_step(), held_ratio(parts)
    learned = float(row["update_frame_rate_hz"])
    steps, samples = balanced(float(row["agent_steps_per_s"]), learned, held)
    return {
        "agent_steps_per_s": steps,
        "env_frames_per_s": steps * parts.spec.action_repeat,
        "samples_per_s": samples,
        "samples_per_agent_step": ratio if held is None else held,
        "updates_per_s": float(row["updates_per_s"]) * samples / learned,
        "bottleneck": row["bottleneck"],
        "wait": {name.removeprefix("wait/"): row[name] for name in row if name.startswith("wait/")},
        "policy_lag_mean": row.get("policy_lag_mean"),
        "precision": row["precision"],
        "compiled": parts.compute.compiled,
        "compute_threads": parts.compute.threads,
    }


def work(settings: dict[str, Any]) -> dict[str, Any]:
    """Measures a run, or its stages alone, as the parent has asked."""
    config = from_dict(settings["config"])
    with ExitStack() as stack:
        parts = build(
            config,
            resume_count=0,
            on_episodes=lambda *_: None,
            on_eval_episodes=lambda *_: None,
        )
        stack.callback(parts.close)
        torch.set_num_threads(parts.compute.threads)
        if parts.compute.needs_warm_up:
            parts = warm_up(parts)
        if "samples_per_agent_step" not in settings:
            return figures_of(measured_run(parts, config, seconds=settings["seconds"]), parts)
        parts.close()  # its workers would take the stages' time
        torch.set_num_threads(1)
        ceiling = measure_ceiling(
            config,
            parts,
            samples_per_agent_step=settings["samples_per_agent_step"],
            seconds=settings["seconds"],
        )
        return ceiling._asdict()


def main() -> None:
    """Takes the settings from the parent, measures, and tells."""
    end = WorkerEnd.open()
    keep_memory()
    end.status({"figures": work(end.settings)})
    gc.freeze()  # else Python's last search for garbage goes through all of torch for a second


if __name__ == "__main__":
    main()
