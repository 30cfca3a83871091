"""The worker hosts of a run on a cluster: one for each slot, and each one's environments."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from headrace.errors import PeerLost
from headrace.run.cluster_actor import Heard, Member, Order, Site
from headrace.run.cluster_plan import LEAST_CPUS, Node, Slot, new_slots, shares

MODULE = "headrace.run.host"
"""The program of a worker host."""
SETTLE_S = 10.0
"""Nodes come in flocks: environments are divided anew when none has come or gone for so long."""
HEALTHY_S = 60.0
"""A life of that length makes good for the deaths before it."""
LEAVE_S = 10.0
"""Seconds that a host which was asked to end may take."""
AGAIN_S = 10.0
"""Seconds after which a host that has left in peace starts again, if there still is a run."""
CROWDED_S = 300.0
"""After so long others may have left a node where there was no room."""
LINES_TOLD = 3
"""Lines that a host may print on the user's screen."""

logger = logging.getLogger("headrace")


class _Host(Member):
    def __init__(self, number: int, slot: Slot) -> None:
        super().__init__(f"worker host {number}")
        self.number, self.slot = number, slot
        self.envs = 0  # that it was started with
        self.lines_told = 0
        self.given_up = False


class Hosts:
    """All worker hosts of a run. For the driver's thread."""

    def __init__(
        self,
        site: Site,
        link: Mapping[str, Any],
        *,
        hosts: int,
        host_cpus: int,
        max_deaths: int,
        trust_code: bool,
        on_message: Callable[[str], None],
    ) -> None:
        """Starts none yet.

        Args:
            site: Where they are placed.
            link: What they need besides the address, to connect to the learner (`LinkConfig`).
            hosts: How many; 0 for one on every node.
            host_cpus: Processors of each; 0 for all that are free.
            max_deaths: Deaths in a row at which a host is given up.
            trust_code: Whether they may import what the run names from outside headrace.
            on_message: Told what is worth a line.
        """
        self.deaths = 0
        """Of all hosts, ever."""
        self._site, self._link, self._on_message = site, dict(link), on_message
        self._wanted, self._host_cpus, self._max_deaths = hosts, host_cpus, max_deaths
        self._trust_code = trust_code
        self.members: list[_Host] = []
        """Given up or not."""
        self._address = ""
        self._num_envs = self._block = 0
        self._begun = 0  # hosts that there ever were
        self._crowded: dict[str, tuple[float, float]] = {}  # what to try on a node, since when
        self._changed_s = 0.0  # when a slot came or went

    @property
    def running(self) -> int:
        """Hosts that are on a node."""
        return sum(host.works for host in self.members)

    def serve(self, address: str, *, num_envs: int, block: int) -> None:
        """Says where the learner listens, and what there is to step.

        Args:
            address: HOST:PORT.
            num_envs: Of the run.
            block: Environments that step together.
        """
        if address != self._address:
            for host in self.members:
                host.end()  # what it still holds is a dead learner's
        self._address, self._num_envs, self._block = address, num_envs, block

    def attend(
        self, nodes: Sequence[Node] | None, now_s: float, *, reserved: Mapping[str, float]
    ) -> None:
        """Hears all hosts, starts new ones, and divides anew.

        Args:
            nodes: Those that live, if that was just asked; None otherwise.
            now_s: The time.
            reserved: Processors that the learner has, by the id of its node.

        Raises:
            PeerLost: the last host was given up.
        """
        self.hear(now_s)
        if nodes is not None:
            self._follow(nodes, now_s)
            if self._address:
                self._fill(nodes, now_s, reserved)
        if not self._address:
            return
        usable = {host.number: host for host in self.members if not host.given_up}
        if self.members and not usable:
            raise PeerLost(f"all worker hosts are given up; {self.members[0].times()}")
        settled = now_s - self._changed_s >= SETTLE_S
        cpus = {number: host.slot.cpus for number, host in usable.items()}
        wanted = shares(self._num_envs, self._block, cpus)
        held = sum(host.envs for host in usable.values() if host.placed)
        divided = False
        for number, host in usable.items():
            envs = wanted.get(number, 0)
            if not host.placed:
                # One that comes before its share is free would only be turned away.
                if envs and now_s >= host.restart_s and held + envs <= sum(wanted.values()):
                    self._begin(host, envs, now_s)
                    held += envs
            elif envs != host.envs and settled and host.leaving_s is None:
                divided = True
                host.hang_up(now_s)
        if divided:
            self._on_message(
                f"environments are divided anew among {len(wanted)} worker hosts; some start again"
            )

    def hear(self, now_s: float) -> None:
        """Hands on what the hosts tell, and buries the dead."""
        for host in self.members:
            self._hear(host, now_s)

    def make_room(self, node: str) -> None:
        """Ends the hosts on a node, since the learner needs it."""
        for host in [host for host in self.members if host.slot.node == node]:
            host.end()
            self.members.remove(host)

    def hang_up(self, now_s: float) -> None:
        """Asks all hosts to end."""
        self._address = ""
        for host in self.members:
            host.hang_up(now_s)

    def gone(self) -> bool:
        """Whether no host is left on any node."""
        return not any(host.placed for host in self.members)

    def kill(self) -> None:
        """Ends all hosts, whatever they are at."""
        for host in self.members:
            host.end()

    def _begin(self, host: _Host, envs: int, now_s: float) -> None:
        host.envs = envs
        settings = {
            "link": {**self._link, "connect": self._address},
            "envs": envs,
            "cores": max(1, int(host.slot.cpus)),
            "trust_code": self._trust_code,
        }
        order = Order(f"headrace {host.label}", MODULE, settings, *host.slot)
        host.begin(self._site, order, now_s)

    def _hear(self, host: _Host, now_s: float) -> None:
        for heard in host.hear(now_s):
            if host.machine:
                host.label = f"worker host {host.number} on {host.machine}"
            for message in heard.messages:
                if "note" in message:  # for the log alone: there may be hundreds of hosts
                    logger.info("%s: %s", host.label, message["note"])
            for line in filter(str.strip, heard.printed):
                host.lines_told += 1
                if host.lines_told <= LINES_TOLD:
                    self._on_message(f"{host.label} printed: {line}")
            if heard.death is not None:
                self._died(host, heard, now_s)
        if host.leaving_s is not None and now_s - host.leaving_s > LEAVE_S:
            host.end()

    def _died(self, host: _Host, heard: Heard, now_s: float) -> None:
        if host.leaving_s is not None:
            host.end()
            return
        if heard.code == 0:  # the learner has sent it away: the run is over, or that one has died
            host.restart_s = now_s + AGAIN_S
            return
        self.deaths += 1
        host.died(str(heard.death), now_s, healthy=heard.lasted_s > HEALTHY_S)
        if host.deaths < self._max_deaths:
            self._on_message(f"{host.label} died: {heard.death}; another one takes its place")
            return
        host.end()
        host.given_up = True
        self._changed_s = now_s
        self._on_message(f"{host.times()}; training goes on without it")

    def _follow(self, nodes: Sequence[Node], now_s: float) -> None:
        """Drops the hosts whose nodes are gone, and those that find no room on theirs."""
        alive = {node.id for node in nodes}
        for host in list(self.members):
            if host.slot.node not in alive:
                if host.placed:
                    self.deaths += 1
                    self._on_message(f"{host.label} is lost: its node has left the cluster")
            elif host.lacks_room(now_s):
                # How much of it others have Ray does not say, so half as much is tried.
                self._crowded[host.slot.node] = max(LEAST_CPUS, host.slot.cpus / 2), now_s
            else:
                continue
            host.end()
            self.members.remove(host)
            self._changed_s = now_s

    def _fill(self, nodes: Sequence[Node], now_s: float, reserved: Mapping[str, float]) -> None:
        """Finds room for the hosts that are missing."""
        taken = [host.slot for host in self.members]
        free = {}
        for node in nodes:
            ours = sum(slot.cpus for slot in taken if slot.node == node.id)
            free[node.id] = node.cpus - reserved.get(node.id, 0.0) - ours
            most, since_s = self._crowded.get(node.id, (node.cpus, now_s))
            if now_s - since_s < CROWDED_S:
                free[node.id] = min(most, free[node.id])
        names = {node.id: node.name for node in nodes}
        for slot in new_slots(free, taken, hosts=self._wanted, host_cpus=self._host_cpus):
            host = _Host(self._begun, slot)
            self.members.append(host)
            self._begun += 1
            self._changed_s = now_s
            self._on_message(
                f"{host.label} goes to {names[slot.node]}, with {slot.cpus:g} of its processors"
            )
