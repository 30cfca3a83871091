"""Training on one machine, in one process.

```
main thread      learner: reads unrolls, updates, publishes weights; reports; saves
server thread    server: acts for all environments, writes unrolls
C++ threads, or  step environments: a native pool, or
  processes      one of worker processes (run/worker.py)
processes        evaluator and viewer, where asked for (run/roles.py)
```

With `--inference worker` there is no server thread, but for evaluation: the worker processes act
too (run/acting_workers.py), and the main thread looks after them.

In turns, and in lockstep, the main thread does the server's part too, and, in
lockstep, nothing depends on timing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from headrace.config import RunConfig, takes_turns, to_dict, to_toml
from headrace.errors import DeadlineExceeded
from headrace.learner.loop import Learner
from headrace.pools.base import Pool
from headrace.records import Update
from headrace.run import saving
from headrace.run.acting_workers import ActingWorkers
from headrace.run.beside import more_threads
from headrace.run.build import Parts, build
from headrace.run.draws import own_draws
from headrace.run.learners import OtherLearners, other_learners
from headrace.run.meeting import Meeting, in_turns_together, learn_together
from headrace.run.report import Reporter, Row
from headrace.run.resume import say_where_it_stands
from headrace.run.roles import Roles
from headrace.run.share import Share, learner_devices, share_config
from headrace.run.stop import Stop, stop_signals
from headrace.run.system import keep_memory
from headrace.run.validate import say_if_short
from headrace.run.warmup import own_stream, warm_up
from headrace.server.device_seat import AnySeat
from headrace.server.server import run_server
from headrace.telemetry.metrics import EpisodeStats, Waits
from headrace.telemetry.record import MetricsWriter, RunDirectory, last_row
from headrace.telemetry.wandb_log import WandbLog

_POLL_S = 0.2  # how often a waiting learner looks after the server and the clock
_SILENCE_S = 120.0  # longest that a native pool may take for one batch
_JOIN_S = 10.0


class TrainResult(NamedTuple):
    """What a call of `train` leaves."""

    run: Path  # the run directory
    metrics: Row  # the last row of metrics.jsonl
    finished: bool  # False if it was stopped before its end


class Hooks(NamedTuple):
    """Functions of the caller, called in the main thread."""

    on_row: Callable[[Row], None]  # at every report
    on_update: Callable[[int, Mapping[str, Tensor]], None]  # updates so far, metrics on the device
    on_checkpoint: Callable[[Path], None]  # after every checkpoint
    on_message: Callable[[str], None]  # things worth a line: a resume, a damaged checkpoint
    on_listen: Callable[[str], None] = lambda _: None  # HOST:PORT, where worker hosts may come


def run_training(
    config: RunConfig,
    run: RunDirectory,
    *,
    resume: bool,
    hooks: Hooks,
    trust_code: bool,
    clock_s: Callable[[], float],
) -> TrainResult:
    """Trains until total_frames, total_minutes or a signal; saves at intervals and at the end.

    `clock_s` says how many seconds this session of the run has taken, its start included.

    Raises:
        ConfigError: something does not fit, or another process trains this run.
        TrainingDiverged: a loss was not finite; the newest checkpoint is from before.
        DeadlineExceeded: environments stopped giving steps.
    """
    keep_memory()
    with ExitStack() as stack:
        stack.enter_context(run.lock())
        stop = stack.enter_context(stop_signals())
        checkpoint = saving.find(run, hooks.on_message) if resume else None
        before = saving.Before.read(checkpoint)
        if checkpoint is not None and say_where_it_stands(
            config, checkpoint, before, hooks.on_message
        ):
            return TrainResult(run.path, last_row(run.metrics_path), finished=True)
        messages: SimpleQueue[str] = SimpleQueue()  # from other threads to this one
        stack.callback(tell, messages, hooks.on_message)
        episodes = EpisodeStats(before.episodes, before.return_max, on_message=messages.put)
        eval_episodes, waits = EpisodeStats(), Waits()
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        share = Share(0, len(learner_devices(config)))
        own = share_config(config, share)  # first of all: it refuses what cannot be
        stack.enter_context(own_draws(share.global_seed(config, before.resume_count)))
        others = stack.enter_context(
            other_learners(
                config, run.path, before, trust_code=trust_code, told=messages.put, add=episodes.add
            )
        )
        parts = build(
            own,
            resume_count=before.resume_count,
            on_episodes=lambda _, *ended: episodes.add(*ended),
            on_eval_episodes=lambda _, *ended: eval_episodes.add(*ended),
            on_message=messages.put,
            trust_code=trust_code,
            share=share,
        )
        stack.callback(parts.close)
        _say_addresses(parts, hooks)
        torch.set_num_threads(parts.compute.threads)
        if parts.compute.needs_warm_up:
            hooks.on_message("compiling and capturing; the first run takes a minute or more")
            parts = warm_up(parts, hooks.on_message)
        if checkpoint is not None:  # after the warm-up, which draws random numbers
            if not saving.restore(parts, checkpoint, hooks.on_message, alone=others is None):
                say_if_short(config, parts, hooks.on_message, agent_steps=before.agent_steps)
            run.rewrite_config(to_toml(config))
            checkpoint = None  # its files are mapped, and would keep their place on the disk
        # Before the learners meet, since W&B may take its time.
        wandb = _start_wandb(config, run, stack, messages) if config.wandb else None
        group = None if others is None else others.connect(parts)
        if isinstance(parts.source, ActingWorkers):  # before they have weights, and begin
            most = -(-config.total_frames // parts.spec.action_repeat)
            parts.source.pause_at(most - before.agent_steps)
        learner = Learner(
            parts.algorithm,
            parts.feed,
            parts.weights,
            device=parts.compute.device,
            version=before.updates,
            samples=before.samples,
            group=group,
        )
        reporter = Reporter(
            parts,
            learner,
            waits,
            episodes,
            eval_episodes,
            interval_s=config.log_interval_s,
            agent_steps=before.agent_steps,
            elapsed_s=lambda: before.elapsed_s + clock_s(),
        )
        meeting = None
        if group is not None:
            meeting = Meeting(group, parts, config=config, agent_steps=before.agent_steps)
            reporter.others = meeting.read_others
        writer = stack.enter_context(
            MetricsWriter(
                run,
                config.tensorboard,
                reporter.env_frames if resume else None,
                start=before.resume_count,
                wandb=wandb,
            )
        )
        roles = stack.enter_context(
            closing(Roles(config, run.path, parts.algorithm.model, on_message=messages.put))
        )
        session = Session(
            config=config,
            run=run,
            parts=parts,
            learner=learner,
            reporter=reporter,
            roles=roles,
            writer=writer,
            waits=waits,
            stop=stop,
            hooks=hooks,
            before=before,
            messages=messages,
            others=others,
            meeting=meeting,
        )
        if not resume:
            session.save()  # so that there is something to go back to, however early the end
        with more_threads(parts, lockstep=config.lockstep, learners=share.size):
            session.drive()
        roles.close()  # before the last row, which has what they had yet to tell
        session.save()
        session.report()
        return TrainResult(run.path, session.last_row, finished=not stop.requested)


def _start_wandb(
    config: RunConfig, run: RunDirectory, stack: ExitStack, messages: SimpleQueue[str]
) -> WandbLog:
    """Starts the W&B run; it ends as failed unless something else has closed it before `stack`."""
    wandb = WandbLog(run.path, config.wandb, to_dict(config), on_message=messages.put)
    stack.callback(wandb.close, failed=True)
    return wandb


def _say_addresses(parts: Parts, hooks: Hooks) -> None:
    """Tells where worker hosts may come, if they may."""
    sources = [parts.source, *(seat.pool for seat in parts.seats)]
    for address in filter(None, (getattr(source, "address", "") for source in sources)):
        hooks.on_listen(address)


class Drivable(Protocol):
    """What the loops below need: a `Session`, or a benchmark's window."""

    parts: Parts
    waits: Waits

    def over(self) -> bool:
        """Whether to end."""

    def enough(self) -> bool:
        """Whether no more steps are wanted; asked by the server's thread, before each batch."""

    def learn(self, timeout_s: float) -> None:
        """Takes one update if a batch is there within `timeout_s`."""

    def attend(self) -> None:
        """Does what comes up besides; called between updates and between batches."""


@dataclass(kw_only=True, slots=True)
class Session:
    """One call of `train`: what its loops share."""

    config: RunConfig
    run: RunDirectory
    parts: Parts
    learner: Learner
    reporter: Reporter
    roles: Roles
    writer: MetricsWriter
    waits: Waits
    stop: Stop
    hooks: Hooks
    before: saving.Before
    messages: SimpleQueue[str]
    others: OtherLearners | None = None
    meeting: Meeting | None = None
    last_row: Row = field(default_factory=dict)
    _newest: Update | None = None
    _saved_s: float = field(default_factory=time.monotonic)

    def progress(self) -> float:
        """Share of the run that is done."""
        reporter = self.reporter
        return self.config.length.progress(reporter.env_frames, reporter.elapsed_s)

    def schedule_progress(self) -> float:
        """Share of its schedules."""
        reporter = self.reporter
        return self.config.horizon.progress(reporter.env_frames, reporter.elapsed_s)

    def over(self) -> bool:
        """Whether the run is complete, or was asked to end."""
        if self.meeting is not None:  # then all end together
            return self.meeting.over
        return self.stop.requested or self.progress() >= 1.0

    def enough(self) -> bool:
        """Whether no more steps are wanted, although the learner may be in its last update."""
        return self.over() if self.meeting is None else self.meeting.enough()

    def drive(self) -> None:
        """Trains until it is over."""
        if not takes_turns(self.config):
            train_overlapped(self)
        elif self.meeting is None:
            train_in_turns(self)
        else:
            in_turns_together(self)
        if self.others is not None:
            self.others.finish()
        no_update = self.learner.version == self.before.updates
        if no_update and self.config.total_minutes is not None and not self.stop.requested:
            self.hooks.on_message("no update was made in time: give the run more --total-minutes")

    def learn(self, timeout_s: float) -> None:
        """Takes one update if a batch is there within `timeout_s`."""
        learner, waits, wanted = self.learner, self.waits, self.stop.requested
        if self.meeting is None or self.others is None:
            progress = self.schedule_progress()
            update = learner.learn(progress=progress, timeout_s=timeout_s, waits=waits)
        else:
            with self.others.blamed():
                update = learn_together(
                    learner,
                    self.meeting,
                    timeout_s=timeout_s,
                    waits=waits,
                    stop=wanted,
                    elapsed_s=self.reporter.elapsed_s,
                )
        if update is not None:
            self._newest = update
            self.hooks.on_update(self.learner.version, update.metrics)

    def attend(self) -> None:
        """Tells, reports and saves what is due."""
        if self.others is not None:
            self.others.attend()
        tell(self.messages, self.hooks.on_message)
        if self.roles.due():
            self.roles.attend(self.learner.version, self.reporter.agent_steps)
        if self.reporter.due():
            with self._goes_on("this row of metrics is lost"):
                self.report()
        if time.monotonic() - self._saved_s >= self.config.checkpoint_interval_s:
            self._saved_s = time.monotonic()
            with self._goes_on("older checkpoints stand"):
                self.save()

    @contextmanager
    def _goes_on(self, consequence: str) -> Iterator[None]:
        """A full disk must not end a run of hours: it is said, and training goes on."""
        try:
            yield
        except OSError as error:
            self.hooks.on_message(
                f"could not write ({error.strerror}); training goes on, {consequence}"
            )

    def report(self) -> None:
        """Writes a row of everything that was counted since the last one."""
        self.last_row = self.reporter.row(self._newest) | self.roles.row(self.learner.version)
        self.hooks.on_row(self.last_row)
        histograms = {"policy_lag_histogram": self.reporter.lag_histogram}
        self.writer.write(int(self.last_row["env_frames"]), self.last_row, histograms)

    def save(self) -> None:
        """Writes a checkpoint."""
        self.learner.ensure_finite()
        path = saving.save(
            self.config, self.run, self.parts, self.learner, self.reporter, self.before
        )
        self.hooks.on_checkpoint(path)


def tell(messages: SimpleQueue[str], on_message: Callable[[str], None]) -> None:
    """Hands on what other threads had to say."""
    while not messages.empty():
        on_message(messages.get())


def train_in_turns(session: Drivable) -> None:
    """In turns: all updates that there is experience for, then one batch of every pool."""
    parts = session.parts
    while not session.over():
        session.attend()
        if parts.feed.ready():
            session.learn(timeout_s=0.0)
            continue
        for seat in parts.seats:
            seat.serve(parts.weights.pull, _POLL_S, session.waits)


def train_overlapped(session: Drivable) -> None:
    """The learner here, the server in its own thread, until the run is over or one fails."""
    parts, ended = session.parts, threading.Event()
    failed: Future[None] = Future()

    def serve() -> None:
        torch.set_num_threads(parts.compute.threads)
        try:
            with own_stream(parts.compute.acting):
                run_server(
                    parts.seats,
                    parts.weights,
                    parts.queue,
                    ended,
                    waits=session.waits,
                    enough=session.enough,
                )
        except BaseException as error:  # noqa: BLE001 - handed to the main thread, which raises it
            failed.set_exception(error)

    server = threading.Thread(target=serve, name="server", daemon=True)
    if parts.seats:
        server.start()
    try:
        while not session.over():
            session.learn(timeout_s=_POLL_S)
            session.attend()
            if failed.done():
                failed.result()
            for seat in parts.seats:
                check_alive(seat.pool)
            if not isinstance(parts.source, AnySeat):
                parts.source.check(session.waits)
    finally:
        ended.set()
        if parts.seats:
            server.join(_JOIN_S)
    if failed.done():  # between the last look and the end
        failed.result()


def check_alive(pool: Pool) -> None:
    """Raises if a native pool was silent for too long: its `receive` cannot time out itself.

    Raises:
        DeadlineExceeded: names the pool.
    """
    since_s = getattr(pool, "waiting_since", None)
    if since_s is not None and time.monotonic() - since_s > _SILENCE_S:
        raise DeadlineExceeded(
            f"{pool.spec.name}: no environment gave a step for {_SILENCE_S:.0f} s; the run ends, "
            "go on from its last checkpoint with `headrace train --resume`"
        )
