"""One of several learners, but the first: a process with its own server and share of environments.

It is started and watched by `run.learners`, learns by the same functions as the first one, and
leaves when all have agreed to end, or when the pipe to the first is closed. What it raises ends it,
and the first one says why.
"""

from __future__ import annotations

import contextlib
import gc
import mmap
import signal
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from headrace.config import RunConfig, from_dict, takes_turns
from headrace.errors import HeadraceError, PeerLost
from headrace.learner.group import ExchangeFailed, Group, connect
from headrace.learner.loop import Learner
from headrace.pools.processes import WorkerEnd
from headrace.run.beside import more_threads
from headrace.run.build import Parts, build
from headrace.run.draws import own_draws
from headrace.run.learners import calls_of, draws_seed, exchange_timeout_s
from headrace.run.local import train_overlapped
from headrace.run.meeting import (
    Meeting,
    in_turns_together,
    learn_together,
    share_learning,
    spread_state,
)
from headrace.run.share import Share, learner_devices, share_config
from headrace.run.system import keep_memory
from headrace.run.warmup import warm_up
from headrace.telemetry.metrics import Waits

_MOST_EPISODES = 2000  # of a message
_HANG_UP_S = 60.0  # until the first learner has found out who was lost, and ends


class FirstGone(HeadraceError):
    """The first learner has ended, or is dead."""


class Line:
    """What is said to the first learner, and heard of it.

    Notes and episodes come from any thread; the rest is for the main thread.
    """

    def __init__(self, end: WorkerEnd) -> None:
        self._end = end
        self._status_lock = threading.Lock()  # guards the status pipe of _end
        self._episodes_lock = threading.Lock()  # guards _episodes
        self._episodes: list[tuple[float, int, dict[str, float]]] = []

    def note(self, text: str) -> None:
        """Tells what is worth a line."""
        self._say({"note": text})

    def add(
        self,
        _env_id: NDArray[np.int32],
        returns: NDArray[np.float64],
        lengths: NDArray[np.int64],
        infos: Sequence[Mapping[str, float]],
    ) -> None:
        """Keeps episodes until `tell`."""
        given = [{name: float(value) for name, value in info.items()} for info in infos]
        given = given or [{} for _ in returns]
        ended = zip(returns.tolist(), lengths.tolist(), given, strict=True)
        with self._episodes_lock:
            self._episodes.extend(ended)

    def tell(self) -> None:
        """Tells of episodes that have ended.

        Raises:
            FirstGone: nobody listens.
        """
        self.hear(0.0)
        with self._episodes_lock:
            ended, self._episodes = self._episodes, []
        for start in range(0, len(ended), _MOST_EPISODES):
            columns = list(zip(*ended[start : start + _MOST_EPISODES], strict=True))
            self._say({"episodes": columns})

    def hear(self, timeout_s: float) -> bool:
        """Returns whether the first learner has said something within `timeout_s`.

        Raises:
            FirstGone: it has closed the pipe.
        """
        try:
            return self._end.receive(timeout_s) is not None
        except PeerLost as error:
            raise FirstGone("the first learner has ended") from error

    def look(self) -> None:
        """Looks whether the first learner is there.

        Raises:
            FirstGone: it is not.
        """
        self.hear(0.0)

    def built(self, timeout_s: float) -> None:
        """Says that this learner is ready, and waits until all are.

        Raises:
            FirstGone: that will not be.
        """
        self._say({"built": True})
        if not self.hear(timeout_s):
            raise FirstGone("the first learner did not get ready")

    def _say(self, message: Mapping[str, Any]) -> None:
        with self._status_lock:
            self._end.status(message)


@dataclass(kw_only=True, slots=True)
class RankSession:
    """What the loops drive here, in place of the first learner's `run.local.Session`."""

    parts: Parts
    learner: Learner
    meeting: Meeting | None
    waits: Waits
    line: Line

    def over(self) -> bool:
        """Whether all have agreed to end."""
        return self.meeting is None or self.meeting.over

    def enough(self) -> bool:
        """Whether it has made its part of the steps."""
        return self.meeting is None or self.meeting.enough()

    def learn(self, timeout_s: float) -> None:
        """Takes one update if all learners have a batch."""
        if self.meeting is not None:
            learn_together(
                self.learner,
                self.meeting,
                timeout_s=timeout_s,
                waits=self.waits,
                stop=False,
                elapsed_s=0.0,  # the first learner has the clock
            )

    def attend(self) -> None:
        """Tells what there is to tell."""
        self.line.tell()


def run_rank(config: RunConfig, line: Line, settings: Mapping[str, Any]) -> None:
    """Learns with the others until all agree to end.

    Args:
        config: The run's settings.
        line: To the first learner.
        settings: As `run.learners` sends them.
    """
    share = Share(settings["rank"], settings["count"])
    own = share_config(config, share)
    with ExitStack() as stack:
        stack.enter_context(own_draws(share.global_seed(config, settings["resume_count"])))
        parts = build(
            own,
            resume_count=settings["resume_count"],
            on_episodes=line.add,
            on_eval_episodes=lambda *_: None,
            on_message=line.note,
            trust_code=settings["trust_code"],
            share=share,
        )
        stack.callback(parts.close)
        torch.set_num_threads(parts.compute.threads)
        if parts.compute.needs_warm_up:
            parts = warm_up(parts, line.note)
        line.built(config.workers.start_timeout_s)
        group = _connected(config, line, settings)
        seed = draws_seed(config, settings["resume_count"])
        spread_state(parts, group, seed=seed)
        share_learning(parts, group)
        learner = Learner(
            parts.algorithm,
            parts.feed,
            parts.weights,
            device=parts.compute.device,
            version=settings["updates"],
            samples=settings["samples"],
            group=group,
        )
        session = RankSession(
            parts=parts,
            learner=learner,
            meeting=Meeting(group, parts, config=config, agent_steps=settings["agent_steps"]),
            waits=Waits(),
            line=line,
        )
        with more_threads(parts, lockstep=own.lockstep, learners=share.size):
            if takes_turns(own):
                in_turns_together(session)
            else:
                train_overlapped(session)
        learner.ensure_finite()
        line.tell()


def _connected(config: RunConfig, line: Line, settings: Mapping[str, Any]) -> Group:
    fd, count = settings["calls_fd"], settings["count"]
    return connect(
        Path(settings["folder"]),
        rank=settings["rank"],
        devices=learner_devices(config),
        # The first one is to find out first who is late: it can say why.
        timeout_s=2.0 * exchange_timeout_s(config),
        calls=calls_of(mmap.mmap(fd, 8 * count)),
        on_wait=line.look,
    )


def main() -> None:
    """Takes the settings from the first learner, and learns until all end."""
    end = WorkerEnd.open()
    # Who ends a whole job, as SLURM does, tells every process: the first learner saves, then ends.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    keep_memory()
    line = Line(end)
    settings = end.settings
    config = from_dict(settings["config"], trust_code=settings["trust_code"])
    with contextlib.suppress(FirstGone):
        try:
            run_rank(config, line, settings)
        except ExchangeFailed:
            # Not this one's fault: were it to die now, it would be taken for the one that was lost.
            line.hear(_HANG_UP_S)
            raise  # the first one has not hung up: it was kept from what it does by something else
        finally:
            gc.freeze()  # else the last search for garbage goes through all of torch for a second


if __name__ == "__main__":
    main()
