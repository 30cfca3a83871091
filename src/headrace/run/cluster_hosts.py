"""The worker hosts of a run on a cluster: one for each slot, and each one's environments."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headrace.errors import PeerLost
from headrace.run.cluster_actor import ROOM_S, Heard, Member, Order
from headrace.run.cluster_plan import LEAST_CPUS, Node, Slot, new_slots, shares
from headrace.run.cluster_ray import RayCluster

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
LINES_TOLD = 3
"""Lines that a host may print on the user's screen."""

logger = logging.getLogger("headrace")


@dataclass(slots=True)
class _Host:
    number: int
    slot: Slot
    member: Member
    envs: int = 0  # that it was started with
    lines_told: int = 0
    given_up: bool = False


class Hosts:
    """All worker hosts of a run. For the driver's thread."""

    def __init__(
        self,
        site: RayCluster,
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
        self._hosts: list[_Host] = []
        self._address = ""
        self._num_envs = self._block = 0
        self._begun = 0  # hosts that there ever were
        self._most: dict[str, float] = {}  # processors that others leave us, by node
        self._changed_s = 0.0  # when a slot came or went

    @property
    def running(self) -> int:
        """Hosts that are on a node."""
        return sum(host.member.works for host in self._hosts)

    def serve(self, address: str, *, num_envs: int, block: int) -> None:
        """Says where the learner listens, and what there is to step.

        Args:
            address: HOST:PORT.
            num_envs: Of the run.
            block: Environments that step together.
        """
        if address != self._address:
            for host in self._hosts:
                host.member.end()  # what it still holds is a dead learner's
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
        usable = {host.number: host for host in self._hosts if not host.given_up}
        if self._hosts and not usable:
            raise PeerLost(f"all worker hosts are given up; {self._hosts[0].member.times()}")
        settled = now_s - self._changed_s >= SETTLE_S
        cpus = {number: host.slot.cpus for number, host in usable.items()}
        wanted = shares(self._num_envs, self._block, cpus)
        held = sum(host.envs for host in usable.values() if host.member.placed is not None)
        divided = False
        for number, host in usable.items():
            envs = wanted.get(number, 0)
            member = host.member
            if member.placed is None:
                # One that comes before its share is free would only be turned away.
                if envs and now_s >= member.restart_s and held + envs <= sum(wanted.values()):
                    self._begin(host, envs, now_s)
                    held += envs
            elif envs != host.envs and settled and member.leaving_s is None:
                divided = True
                member.hang_up(now_s)
        if divided:
            self._on_message(
                f"environments are divided anew among {len(wanted)} worker hosts; some start again"
            )

    def hear(self, now_s: float) -> None:
        """Hands on what the hosts tell, and buries the dead."""
        for host in self._hosts:
            self._hear(host, now_s)

    def make_room(self, node: str) -> None:
        """Ends the hosts on a node, since the learner needs it."""
        for host in [host for host in self._hosts if host.slot.node == node]:
            host.member.end()
            self._hosts.remove(host)

    def hang_up(self, now_s: float) -> None:
        """Asks all hosts to end."""
        self._address = ""
        for host in self._hosts:
            host.member.hang_up(now_s)

    def gone(self) -> bool:
        """Whether no host is left on any node."""
        return all(host.member.placed is None for host in self._hosts)

    def kill(self) -> None:
        """Ends all hosts, whatever they are at."""
        for host in self._hosts:
            host.member.end()

    def _begin(self, host: _Host, envs: int, now_s: float) -> None:
        host.envs = envs
        settings = {
            "link": {**self._link, "connect": self._address},
            "envs": envs,
            "cores": max(1, int(host.slot.cpus)),
            "trust_code": self._trust_code,
        }
        order = Order(f"headrace {host.member.label}", MODULE, settings, *host.slot)
        host.member.begin(self._site.place(order), order, now_s)

    def _hear(self, host: _Host, now_s: float) -> None:
        member = host.member
        since_s = member.since_s
        for heard in member.hear(now_s):
            if member.machine:
                member.label = f"worker host {host.number} on {member.machine}"
            for message in heard.messages:
                if "note" in message:  # for the log alone: there may be hundreds of hosts
                    logger.info("%s: %s", member.label, message["note"])
            for line in filter(str.strip, heard.printed):
                host.lines_told += 1
                if host.lines_told <= LINES_TOLD:
                    self._on_message(f"{member.label} printed: {line}")
            if heard.death is not None:
                self._died(host, heard, now_s, healthy=now_s - since_s > HEALTHY_S)
        if member.leaving_s is not None and now_s - member.leaving_s > LEAVE_S:
            member.end()

    def _died(self, host: _Host, heard: Heard, now_s: float, *, healthy: bool) -> None:
        member = host.member
        if member.leaving_s is not None:
            member.end()
            return
        if heard.code == 0:  # the learner has sent it away: the run is over, or that one has died
            member.restart_s = now_s + AGAIN_S
            return
        self.deaths += 1
        member.died(str(heard.death), now_s, healthy=healthy)
        if member.deaths < self._max_deaths:
            self._on_message(f"{member.label} died: {heard.death}; another one takes its place")
            return
        member.end()
        host.given_up = True
        self._changed_s = now_s
        self._on_message(f"{member.times()}; training goes on without it")

    def _follow(self, nodes: Sequence[Node], now_s: float) -> None:
        """Drops the hosts whose nodes are gone, and those that find no room on theirs."""
        alive = {node.id for node in nodes}
        for host in list(self._hosts):
            member = host.member
            if host.slot.node not in alive:
                if member.placed is not None:
                    self.deaths += 1
                    self._on_message(f"{member.label} is lost: its node has left the cluster")
            elif (
                member.placed is not None
                and member.waits
                and now_s - member.asked_s > ROOM_S
                and not member.placed.has_room()
            ):  # others have it; how much of it Ray does not say, so half as much is tried
                self._most[host.slot.node] = max(LEAST_CPUS, host.slot.cpus / 2)
            else:
                continue
            member.end()
            self._hosts.remove(host)
            self._changed_s = now_s

    def _fill(self, nodes: Sequence[Node], now_s: float, reserved: Mapping[str, float]) -> None:
        """Finds room for the hosts that are missing."""
        taken = [host.slot for host in self._hosts]
        free = {}
        for node in nodes:
            ours = sum(slot.cpus for slot in taken if slot.node == node.id)
            most = self._most.get(node.id, node.cpus)
            free[node.id] = min(most, node.cpus - reserved.get(node.id, 0.0)) - ours
        names = {node.id: node.name for node in nodes}
        for slot in new_slots(free, taken, hosts=self._wanted, host_cpus=self._host_cpus):
            label = f"worker host {self._begun}"
            self._hosts.append(_Host(self._begun, slot, Member(label)))
            self._begun += 1
            self._changed_s = now_s
            self._on_message(
                f"{label} goes to {names[slot.node]}, with {slot.cpus:g} of its processors"
            )
