"""Trials: each is a process of its own, so that memory, threads and crashes stay apart."""

from __future__ import annotations

import dataclasses
import math
import select
import time
from collections.abc import Callable, Mapping
from typing import Any

from headrace.config import RunConfig, to_dict
from headrace.errors import ConfigError
from headrace.pools.processes import WorkerProcess
from headrace.tune.search_space import is_free_running, laid_over
from headrace.tune.types import Choice, Outcome

CHILD_MODULE = "headrace.tune.child"
_LOOK_S = 0.1  # at the clock
_LEAVE_S = 10.0  # that a child may take to end its workers
_MOST_WORDS = 300  # characters of a failure that are kept


def trial_config(config: RunConfig) -> RunConfig:
    """Returns `config` as a trial runs it: it writes nothing, and learns from the start.

    A replay must have filled before the first update; that wait is no part of a run's speed.
    """
    config = dataclasses.replace(
        config,
        wandb="",
        server=dataclasses.replace(config.server, eval_envs=0),
    )
    replay = getattr(config.learning, "replay", None)
    if replay is None:
        return config
    at_once = min(replay.replay_min, config.learning.batch_unrolls)
    return laid_over(config, {"learning": {"replay": {"replay_min": at_once}}})  # type: ignore[no-any-return]


class Trials:
    """Measures choices: the `Measure` of the search."""

    def __init__(
        self,
        config: RunConfig,
        settings_of: Callable[[Choice], Mapping[str, Any]],
        *,
        combined: bool,
    ) -> None:
        """Takes the defaults and the meaning of choices.

        Args:
            config: The defaults.
            settings_of: What a choice sets otherwise, nested as in config.toml.
            combined: Whether samples per agent step may differ, so that both rates count.
        """
        self._config, self._settings_of = config, settings_of
        self._combined = combined or is_free_running(config)

    def __call__(self, choice: Choice, *, seconds: float, deadline_s: float) -> Outcome:
        """Measures a choice in a child process."""
        try:
            config = trial_config(laid_over(self._config, self._settings_of(choice)))
        except ConfigError as error:
            return Outcome(0.0, str(error), {})
        settings = {"config": to_dict(config), "seconds": seconds}
        figures = run_child(settings, deadline_s=deadline_s)
        if isinstance(figures, str):
            return Outcome(0.0, figures, {})
        score = score_of(figures, combined=self._combined)
        return Outcome(score, None, figures, limits=str(figures["bottleneck"]))


def score_of(figures: Mapping[str, Any], *, combined: bool) -> float:
    """Returns what is made as large as possible.

    With as many samples through the gradient for each agent step whatever is chosen (a queue or a
    samples-per-insert limit sees to it), that is agent steps/s. Where that number is free, faster
    acting could be had by learning less: then it is the geometric mean of agent steps/s and
    samples/s, for which twice the one at half the other is a tie.
    """
    steps = float(figures["agent_steps_per_s"])
    return math.sqrt(steps * float(figures["samples_per_s"])) if combined else steps


def run_child(
    settings: Mapping[str, Any],
    *,
    deadline_s: float,
    module: str = CHILD_MODULE,
    now_s: Callable[[], float] = time.monotonic,
) -> dict[str, Any] | str:
    """Runs the child program.

    Args:
        settings: What it is to do.
        deadline_s: Seconds after which it is killed.
        module: The program.
        now_s: A clock.

    Returns:
        Its figures; or, in a sentence, why there are none.
    """
    until_s = now_s() + deadline_s
    child = WorkerProcess(module, settings, name="headrace trial")
    answered = False
    try:
        poller = select.poll()
        poller.register(child.status_fd, select.POLLIN)
        while True:
            child.printed()  # a full pipe would stop the child
            for message in child.messages():
                if "figures" in message:
                    answered = True
                    return dict(message["figures"])
            death = child.death()
            if death is not None:
                return _shortened(death)
            if now_s() >= until_s:
                where = child.stack().partition(", called from ")[0]
                at = f", at {where}" if where else ""
                return _shortened(f"gave no result within {deadline_s:.0f} s{at}")
            poller.poll(_LOOK_S * 1000.0)
    finally:
        # After an answer it may leave in peace. Else, and on Ctrl-C, it goes at once, and its
        # workers with it.
        child.close(_LEAVE_S if answered else 0.0)


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MOST_WORDS else f"{line[: _MOST_WORDS - 1]}…"
