"""A process of ours as Ray's actor: Ray places it and starts it again, the driver counts.

    driver                      Ray       Keeper, an actor on a node     pipes    the process
      Member.begin -- its room, then it -->  __init__ starts it ---------------->  works
      hear  ----------------------------->  news: waits a moment  <-------------  tells, prints
      say, hang_up  --------------------->  ----------------------------------->  ends by itself

Where the process is dead, Ray restarts the actor, and with it the process, after a pause that the
driver says; where the actor is dead, Ray restarts it at once.

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


class Site(NamedTuple):
    """The Ray that a run is on."""

    ray: Any  # the module, or what a test makes of it
    variables: Mapping[str, str]  # for the environment of each process that is placed


class Heard(NamedTuple):
    """What is new of a process."""

    life: str = ""  # another one with each start of the process
    machine: str = ""  # name of the one where it runs
    messages: Sequence[Mapping[str, Any]] = ()
    printed: Sequence[str] = ()
    death: str | None = None  # why the process is dead; None while it lives
    code: int | None = None  # its exit code, once it is dead and where it is known
    lasted_s: float = 0.0  # how long the life was that has ended


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


class Member:
    """One process in all its lives, as the driver has it: hears and counts. For one thread.

    Nothing but `end` waits.
    """

    def __init__(self, label: str) -> None:
        """Places nothing yet; `label` is for messages."""
        self.label = label
        self.node = ""
        """Id of its node."""
        self.machine = ""
        """Name of that; empty until it has begun there."""
        self.life = ""
        """Of which it has been heard last; empty where a new one is to come."""
        self.asked_s = 0.0
        """When its room was asked for."""
        self.restart_s = -math.inf
        """When the next life may begin."""
        self.leaving_s: float | None = None
        """Since when it has been asked to end."""
        self.deaths = 0
        """In a row."""
        self.answer: Any = None
        """What is to come; None if nothing is."""
        self._ray: Any = None
        self._actor: Any = None
        self._group: Any = None
        self._since_s = 0.0  # when this life began
        self._rests = False  # dead, and not to be restarted yet
        self._over = ""  # the life that has ended last
        self._first_cause = ""

    def begin(self, site: Site, order: Order, now_s: float) -> None:
        """Asks Ray for room on the order's node, and for a keeper there."""
        ray = self._ray = site.ray
        bundle = {"CPU": order.cpus, **({"GPU": order.gpus} if order.gpus else {})}
        self._group = ray.util.placement_group(
            [bundle], bundle_label_selector=[{"ray.io/node-id": order.node}]
        )
        strategies = ray.util.scheduling_strategies
        keeper = ray.remote(Keeper).options(
            num_cpus=order.cpus,
            num_gpus=order.gpus,
            max_restarts=-1,  # how often is enough depends on how well it did between
            max_task_retries=0,  # `hear` asks again, so that nothing is told twice
            scheduling_strategy=strategies.PlacementGroupSchedulingStrategy(self._group),
        )
        paths = [str(Path(path or ".").resolve()) for path in sys.path]
        self._actor = keeper.remote(order, site.variables, paths=paths, folder=str(Path.cwd()))
        self.answer = self._actor.news.remote(0.0)
        self.node, self.asked_s = order.node, now_s
        self.machine = self.life = ""
        self.leaving_s, self._rests = None, False

    @property
    def placed(self) -> bool:
        """Whether it has an actor, or will have."""
        return self._actor is not None

    @property
    def works(self) -> bool:
        """Whether it has been heard of in this life, and is not known to be dead."""
        return self.placed and bool(self.life) and not self._rests

    @property
    def waits(self) -> bool:
        """Whether it was asked for, and has not begun anywhere yet."""
        return self.placed and not self.machine

    def lacks_room(self, now_s: float) -> bool:
        """Whether others have the room on its node, as far as can be said by now."""
        if not self.waits or now_s - self.asked_s <= ROOM_S:
            return False
        table = self._ray.util.placement_group_table(self._group)
        return bool(table["state"] != "CREATED")

    def hear(self, now_s: float) -> list[Heard]:
        """Has Ray restart it if that is due; returns its news.

        A life that ended without a word, which Ray has found out, is a death of its own.
        """
        if self.placed and self._rests and self.leaving_s is None and now_s >= self.restart_s:
            self._rests, self.life = False, ""
            self._ray.kill(self._actor, no_restart=False)
            self.answer = self._actor.news.remote(0.0)
        if self.answer is None or not self._ray.wait([self.answer], timeout=0)[0]:
            return []
        try:
            heard: Heard = self._ray.get(self.answer)
        except self._ray.exceptions.ActorUnavailableError:  # Ray restarts it
            self.answer = self._actor.news.remote(NEWS_S)
            return []
        except self._ray.exceptions.RayError as error:  # its constructor failed, or its node
            self.end()
            lasted_s = now_s - self._since_s if self.life else 0.0
            return [Heard(death=one_line(error), lasted_s=lasted_s)]
        self.answer = self._actor.news.remote(NEWS_S)
        if heard.life == self._over:  # Ray has not killed it yet
            return []
        news = []
        if heard.life != self.life:
            if self.life:
                why = "Ray lost its worker, and started another"
                news.append(Heard(self.life, death=why, lasted_s=now_s - self._since_s))
            self.life, self.machine, self._since_s = heard.life, heard.machine, now_s
            if self.leaving_s is not None:
                self._actor.hang_up.remote()  # the life before has not heard it
        if heard.death is not None:
            self.answer = None
            self._rests, self._over = True, heard.life
            heard = heard._replace(lasted_s=now_s - self._since_s)
        return [*news, heard]

    def say(self, data: bytes) -> None:
        """Sends the process something, if it lives."""
        if self.works:
            self._actor.say.remote(data)

    def hang_up(self, now_s: float) -> None:
        """Asks it to end, once; one that has no process ends at once."""
        if not self.works:
            self.end()
        elif self.leaving_s is None:
            self._actor.hang_up.remote()
            self.leaving_s = now_s

    def end(self) -> None:
        """Ends process and actor for good, and the claim to their room; may come twice."""
        self.answer, actor, self._actor = None, self._actor, None
        if actor is None:
            return
        with contextlib.suppress(self._ray.exceptions.RayError):  # a cluster that is gone
            self._ray.kill(actor)
            self._ray.util.remove_placement_group(self._group)

    def died(self, cause: str, now_s: float, *, healthy: bool) -> None:
        """Counts a death; each one in a row doubles the pause before the next life.

        Args:
            cause: Why.
            now_s: When.
            healthy: Whether its life was good, so that earlier deaths do not count any more.
        """
        self.deaths = 1 if healthy else self.deaths + 1
        if self.deaths == 1:
            self._first_cause = cause
        pause_s = min(FIRST_PAUSE_S * 2.0 ** (self.deaths - 1), LONGEST_PAUSE_S)
        self.restart_s = now_s + pause_s

    def times(self) -> str:
        """Says how often it died in a row, and why first."""
        count = "" if self.deaths == 1 else f" {self.deaths} times in a row, first"
        return f"{self.label} died{count}: {self._first_cause}"


def one_line(error: BaseException) -> str:
    """Returns what to show of one of Ray's many-lined errors."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return f"{type(cause).__name__}: {cause}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " … ".join(dict.fromkeys([*lines[:1], *lines[-1:]]))[:300] or type(error).__name__
