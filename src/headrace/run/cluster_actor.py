"""A process of ours as Ray's actor: Ray places it and starts it again, the driver counts.

    driver                      Ray       Keeper, an actor on a node     pipes    the process
      RayPlaced --- its room, then it --->  __init__ starts it ---------------->  works
      hear      ------------------------->  news: waits a moment  <---------------  tells, prints
      say, hang_up  --------------------->  ----------------------------------->  ends by itself
      again: the process is dead, so Ray is to restart the actor, and with it the process

A learner inside the actor itself would share its interpreter with Ray's threads, and have neither
signals nor a main thread of its own. The process dies with the actor, and so with its node and its
run (pools/processes.py). Only text goes this way: a row of metrics every few seconds.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import secrets
import select
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from headrace.pools.processes import WorkerProcess

NEWS_S = 0.5
"""Longest that an actor waits for news of its process before it says that there is none."""
ROOM_S = 10.0
"""Who has no room on its node after so long is planned anew: somebody else has taken it."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""Before the first start after a death, and before any; each death in a row doubles it."""


class Order(NamedTuple):
    """A process to be kept on some node."""

    name: str  # for ps and for messages
    module: str
    settings: Mapping[str, Any]
    node: str  # id
    cpus: float
    gpus: float = 0.0


class Heard(NamedTuple):
    """What is new of a process."""

    life: str = ""  # another one with each start of the process
    machine: str = ""  # name of the one where it runs
    messages: Sequence[Mapping[str, Any]] = ()
    printed: Sequence[str] = ()
    death: str | None = None  # why the process is dead; None while it lives
    code: int | None = None  # its exit code, once it is dead and where it is known
    gone: bool = False  # whether Ray has given up the actor: its node, or its constructor, failed


class Keeper:
    """The actor: one process in one life. Ray calls one method at a time."""

    def __init__(
        self, order: Order, variables: Mapping[str, str], *, paths: Sequence[str], folder: str
    ) -> None:
        """Starts the process; Ray does it again after a death, which the process is told.

        Args:
            order: What to start; its settings get `again`, whether there was a life before.
            variables: Of the process's environment: secrets come this way, since Ray logs what it
                is asked to put into the environment of an actor.
            paths: Where else to look for modules: the driver's, as far as they exist here.
            folder: Its working folder, if it exists here: the driver's.
        """
        os.environ.update(variables)
        sys.path.extend(path for path in paths if path not in sys.path and Path(path).exists())
        if Path(folder).is_dir():
            os.chdir(folder)
        context = importlib.import_module("ray").get_runtime_context()
        again = bool(context.was_current_actor_reconstructed)
        settings = {**order.settings, "again": again or order.settings.get("again", False)}
        self._heard = Heard(secrets.token_hex(4), socket.gethostname())
        self._process = WorkerProcess(order.module, settings, name=order.name)

    def news(self, wait_s: float) -> Heard:
        """Waits until the process tells something or is dead, for `wait_s` at most."""
        process = self._process
        death = process.death()
        if death is None:
            poller = select.poll()
            poller.register(process.status_fd, select.POLLIN)
            poller.poll(wait_s * 1000.0)
            death = process.death()
        return self._heard._replace(
            messages=process.messages(),
            printed=process.printed(),
            death=death,
            code=process.exit_code,
        )

    def say(self, data: bytes) -> None:
        """Sends the process something."""
        self._process.send(data)

    def hang_up(self) -> None:
        """Asks the process to end."""
        self._process.hang_up()


class RayPlaced:
    """A `Keeper` as the driver has it. For one thread."""

    def __init__(self, ray: Any, order: Order, variables: Mapping[str, str]) -> None:
        """Asks Ray for room on the order's node, and for a keeper there; never waits."""
        self._ray = ray
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        bundle = {"CPU": order.cpus, **({"GPU": order.gpus} if order.gpus else {})}
        self._group = ray.util.placement_group(
            [bundle], bundle_label_selector=[{"ray.io/node-id": order.node}]
        )
        self._keeper = (
            ray.remote(Keeper)
            .options(
                num_cpus=order.cpus,
                num_gpus=order.gpus,
                max_restarts=-1,  # how often is enough depends on how well it did between
                max_task_retries=0,  # `hear` asks again, so that nothing is told twice
                scheduling_strategy=strategies.PlacementGroupSchedulingStrategy(self._group),
            )
            .remote(
                order,
                variables,
                paths=[str(Path(path or ".").resolve()) for path in sys.path],
                folder=str(Path.cwd()),
            )
        )
        self.answer: Any = self._keeper.news.remote(0.0)
        """What is to come; None if nothing is."""
        self._over = ""  # the life that has ended last

    def has_room(self) -> bool:
        """Whether the placement group is there."""
        table = self._ray.util.placement_group_table(self._group)
        return bool(table["state"] == "CREATED")

    def hear(self) -> Heard | None:
        """Returns what has come since the last call, if anything has; never waits."""
        if self.answer is None or not self._ray.wait([self.answer], timeout=0)[0]:
            return None
        try:
            heard: Heard = self._ray.get(self.answer)
        except self._ray.exceptions.ActorUnavailableError:  # Ray restarts it
            heard = Heard()
        except self._ray.exceptions.RayError as error:
            self.answer = None
            return Heard(death=one_line(error), gone=True)
        if heard.death is None or heard.life == self._over:
            self.answer = self._keeper.news.remote(NEWS_S)
            return None if heard.death else heard  # Ray has not killed it yet
        self.answer, self._over = None, heard.life
        return heard

    def again(self) -> None:
        """Has Ray restart the actor."""
        self._ray.kill(self._keeper, no_restart=False)
        self.answer = self._keeper.news.remote(0.0)

    def say(self, data: bytes) -> None:
        """Sends the process something."""
        self._keeper.say.remote(data)

    def hang_up(self) -> None:
        """Asks the process to end."""
        self._keeper.hang_up.remote()

    def kill(self) -> None:
        """Ends process and actor for good, and the claim to their room; may come twice."""
        self.answer = None
        with contextlib.suppress(self._ray.exceptions.RayError):  # a cluster that is gone
            self._ray.kill(self._keeper)
            self._ray.util.remove_placement_group(self._group)


@dataclass(slots=True)
class Member:
    """Counts the lives of one process, and says when the next may begin."""

    label: str  # for messages
    placed: RayPlaced | None = None
    node: str = ""  # id
    asked_s: float = 0.0  # when its room was asked for
    machine: str = ""  # name; empty until it has begun there
    since_s: float = 0.0  # when this life began
    restart_s: float = -math.inf
    leaving_s: float | None = None  # since when it has been asked to end
    deaths: int = 0  # in a row
    first_cause: str = ""
    life: str = ""
    rests: bool = False  # dead, and not to be restarted yet

    def begin(self, placed: RayPlaced, order: Order, now_s: float) -> None:
        """Has it placed, where it was not."""
        self.placed, self.node, self.asked_s = placed, order.node, now_s
        self.machine = self.life = ""
        self.leaving_s, self.rests = None, False

    @property
    def waits(self) -> bool:
        """Whether it was asked for, and has not begun anywhere yet."""
        return self.placed is not None and not self.machine

    @property
    def works(self) -> bool:
        """Whether it has been heard of in this life, and is not known to be dead."""
        return self.placed is not None and bool(self.life) and not self.rests

    def hear(self, now_s: float) -> list[Heard]:
        """Has it restarted if that is due; returns its news.

        A life that ended without a word, which Ray has found out, is a death of its own.
        """
        if self.placed is None:
            return []
        if self.rests and now_s >= self.restart_s and self.leaving_s is None:
            self.rests, self.life = False, ""
            self.placed.again()
        heard = self.placed.hear()
        if heard is None:
            return []
        news = [heard]
        if heard.life and heard.life != self.life:
            if self.life:
                news.insert(0, Heard(self.life, death="Ray lost its worker, and started another"))
            self.life, self.machine, self.since_s = heard.life, heard.machine, now_s
            if self.leaving_s is not None:
                self.placed.hang_up()  # the life before has not heard it
        if heard.gone:
            self.end()
        elif heard.death is not None:
            self.rests = True  # until `restart_s`, which who hears this sets
        return news

    def hang_up(self, now_s: float) -> None:
        """Asks it to end, once; one that has no process ends at once."""
        if not self.works:
            self.end()
        elif self.placed is not None and self.leaving_s is None:
            self.placed.hang_up()
            self.leaving_s = now_s

    def end(self) -> None:
        """Ends it for good, whatever it is at."""
        if self.placed is not None:
            self.placed.kill()
            self.placed = None

    def died(self, cause: str, now_s: float, *, healthy: bool) -> None:
        """Counts a death; each one in a row doubles the pause before the next life.

        Args:
            cause: Why.
            now_s: When.
            healthy: Whether its life was good, so that earlier deaths do not count any more.
        """
        self.deaths = 1 if healthy else self.deaths + 1
        if self.deaths == 1:
            self.first_cause = cause
        pause_s = min(FIRST_PAUSE_S * 2.0 ** (self.deaths - 1), LONGEST_PAUSE_S)
        self.restart_s = now_s + pause_s

    def times(self) -> str:
        """Says how often it died in a row, and why first."""
        count = "" if self.deaths == 1 else f" {self.deaths} times in a row, first"
        return f"{self.label} died{count}: {self.first_cause}"


def one_line(error: BaseException) -> str:
    """Returns what to show of one of Ray's many-lined errors."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return f"{type(cause).__name__}: {cause}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " … ".join(dict.fromkeys([*lines[:1], *lines[-1:]]))[:300] or type(error).__name__
