"""A process that is placed on a cluster: what both kinds of them share, and what places them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from headrace.run.cluster_keeper import Heard
from headrace.run.cluster_plan import Node

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""Before the first start after a death, and before any; each death in a row doubles it."""
SILENCE_S = 60.0
"""Seconds without a sign of life from a keeper, which gives one every half a second, after which
its node counts as lost. Ray notices most losses sooner."""

WAIT_S = 120.0
"""Who has not begun after so long is planned anew: somebody else has taken the room. Long, since
Ray may need a minute to start its own part."""
IN_PEACE = "left by itself with exit code 0"
"""How `pools.processes` calls it."""


class Order(NamedTuple):
    """A process to be kept on some node."""

    name: str  # for ps and for messages
    module: str
    settings: Mapping[str, Any]
    node: str  # id
    cpus: float
    gpus: float = 0.0


class Placed(Protocol):
    """A process on its way to a node, or there."""

    @property
    def machine(self) -> str:
        """Name of the machine where it runs; empty while it waits for room."""

    def hear(self) -> Heard | None:
        """Returns what has come since the last call; None without a sign of life. Never waits."""

    def say(self, data: bytes) -> None:
        """Sends the process something."""

    def hang_up(self) -> None:
        """Asks the process to end."""

    def kill(self) -> None:
        """Ends the process, and the claim to its room; may come twice."""


class Site(Protocol):
    """A cluster: `cluster_ray.RayCluster`, or what a test makes of it."""

    def nodes(self) -> list[Node]:
        """Returns the nodes that live."""

    def place(self, order: Order) -> Placed:
        """Begins to place a process; never waits."""

    def wait(self, timeout_s: float) -> None:
        """Waits until a process has news, or `timeout_s` is over."""


@dataclass(slots=True)
class Member:
    """One process in all its lives."""

    label: str  # for messages
    placed: Placed | None = None
    node: str = ""  # id
    asked_s: float = 0.0  # when its place was asked for
    heard_s: float = 0.0  # its last sign of life
    restart_s: float = -math.inf
    leaving_s: float | None = None  # since when it has been asked to end
    deaths: int = 0  # in a row
    first_cause: str = ""

    def begin(self, site: Site, order: Order, now_s: float) -> None:
        """Has it placed."""
        self.placed = site.place(order)
        self.node = order.node
        self.asked_s = self.heard_s = now_s
        self.leaving_s = None

    @property
    def waits(self) -> bool:
        """Whether it was asked for, and there was no room yet."""
        return self.placed is not None and not self.placed.machine

    def hear(self, now_s: float) -> Heard | None:
        """Returns its news; one that is dead, or silent for too long, is cleared away."""
        if self.placed is None:
            return None
        heard = self.placed.hear()
        if heard is not None:
            self.heard_s = now_s
        elif self.placed.machine and now_s - self.heard_s > SILENCE_S:
            heard = Heard(death=f"its node {self.placed.machine} was silent for {SILENCE_S:g} s")
        if heard is not None and heard.death is not None:
            self.end()
        return heard

    def hang_up(self, now_s: float) -> None:
        """Asks it to end, once; one that still waits for room ends at once."""
        if self.waits:
            self.end()
        elif self.placed is not None and self.leaving_s is None:
            self.placed.hang_up()
            self.leaving_s = now_s

    def end(self) -> None:
        """Ends it, whatever it is at."""
        if self.placed is not None:
            self.placed.kill()
            self.placed = None

    def died(self, cause: str, now_s: float, *, healthy: bool) -> None:
        """Counts a death, and says when the next life may begin.

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

    def excuse(self, gap_s: float) -> None:
        """Who should have listened was away for so long: that is nobody's silence."""
        self.asked_s += gap_s
        self.heard_s += gap_s
        if self.leaving_s is not None:
            self.leaving_s += gap_s
