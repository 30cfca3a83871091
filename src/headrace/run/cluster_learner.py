"""The learner of a run on a cluster: where it goes, what it tells, and how often it has died."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from headrace import errors
from headrace.config import RunConfig, merged, to_dict
from headrace.errors import ConfigError, HeadraceError, PeerLost
from headrace.run.cluster_actor import Heard, Member, Order, Site
from headrace.run.cluster_plan import Node, choose_learner, envs_per_message, gpus_wanted
from headrace.run.local import Hooks
from headrace.run.report import Row
from headrace.transport.auth import is_loopback, parse_address

MODULE = "headrace.run.learner_process"
"""The learner's program."""
MAX_DEATHS = 4
"""Deaths in a row, none of them after a new checkpoint, at which the run ends."""
PLACE_S = 600.0
"""Seconds that the learner waits for a node with room."""
SAVE_S = 600.0
"""Seconds that a learner which was asked to end may take to save."""

_ANYWHERE = ("0.0.0.0", "::")


class Job(NamedTuple):
    """What does not change from one life of the learner to the next."""

    config: RunConfig  # with an absolute `out`
    asked: Mapping[str, Any]  # what belongs into config.toml
    mark: str  # name of a file in the driver's run folder
    trust_code: bool


class LearnerSeat:
    """The learner, in all its lives. For the driver's thread."""

    def __init__(self, site: Site, job: Job, *, resume: bool, hooks: Hooks) -> None:
        """Places nothing yet.

        Args:
            site: Where it is placed.
            job: The run.
            resume: Whether the run goes on from a checkpoint.
            hooks: Told of rows, checkpoints and messages.
        """
        self.address = ""
        """HOST:PORT where it listens; empty until it does."""
        self.block = 0
        """Environments that step together."""
        self.deaths = 0
        """Ever."""
        self.shared = True
        """Whether its run folder is the driver's."""
        self.done: Mapping[str, Any] | None = None
        """Its metrics, and whether the run is complete; None until it has ended well."""
        self.node: Node | None = None
        """Where it is, or was last."""
        self.cpus = 0.0
        """Processors of it that are reserved for the learner."""
        self.member = Member("the learner")
        self._site, self._job, self._hooks = site, job, hooks
        self._resume = resume
        self._failure: HeadraceError | None = None
        self._checkpoints = 0  # of this life
        self._gpus = 0  # that it had
        self._crowded: set[str] = set()  # ids of nodes where others have the room
        self._lacking_s: float | None = None  # since when there is no room
        self._counts: Mapping[str, int] = {}

    def place(self, nodes: Sequence[Node], *, wanted_hosts: int, now_s: float) -> bool:
        """Has Ray make room for it, if it has none and may; returns whether hosts must give way.

        Args:
            nodes: Those that live.
            wanted_hosts: How many worker hosts are to be expected.
            now_s: The time.

        Raises:
            ConfigError: no node has the GPUs, or its port would be open to others.
            PeerLost: there was no room for too long.
        """
        member, home = self.member, self.node
        if member.placed:
            if not member.lacks_room(now_s):
                return False
            self._crowded.add(member.node)
        elif now_s < member.restart_s:
            return False
        most = int(max((node.gpus for node in nodes), default=0))
        if self.deaths:  # the node that had them may come back
            most = max(most, self._gpus)
        gpus = gpus_wanted(self._job.config, most)
        found = choose_learner(nodes, gpus, home=home.id if home else "", crowded=self._crowded)
        if found is None or (member.placed and found[0].id == member.node):
            self._lack(now_s, gpus)
            return False
        member.end()
        self._begin(*found, gpus=gpus, wanted_hosts=wanted_hosts, now_s=now_s)
        return True

    def _begin(
        self, node: Node, cpus: float, *, gpus: int, wanted_hosts: int, now_s: float
    ) -> None:
        remote = self._job.config.remote
        listen = remote.listen or f"{_bracketed(node.address)}:0"
        ensure_private(listen, tls=bool(remote.tls_cert), insecure=remote.insecure)
        self.block = envs_per_message(self._job.config, wanted_hosts)
        changes = {"listen": listen, "token_file": "", "envs_per_message": self.block}
        settings = {
            "config": merged(to_dict(self._job.config), {"remote": changes}),
            "asked": self._job.asked,
            "mark": self._job.mark,
            "resume": self._resume,
            "again": self.deaths > 0,
            "trust_code": self._job.trust_code,
        }
        self.node, self.cpus, self._gpus = node, cpus, gpus
        order = Order("headrace learner", MODULE, settings, node.id, cpus, float(gpus))
        self.member.begin(self._site, order, now_s)
        what = f", with {gpus} of its GPUs" if gpus else ""
        self._hooks.on_message(f"the learner goes to {node.name}{what}")

    def attend(self, now_s: float) -> None:
        """Hears it.

        Raises:
            HeadraceError: what it said before it ended: training failed.
            PeerLost: it died too often, or did not save when it should have.
        """
        member = self.member
        leaving_s = now_s if member.leaving_s is None else member.leaving_s
        if member.placed and now_s - leaving_s > SAVE_S:
            member.end()
            raise PeerLost(f"the learner did not save within {SAVE_S:g} s and was killed")
        life = member.life
        for heard in member.hear(now_s):
            for message in heard.messages:
                self._take(message)
            for line in filter(str.strip, heard.printed):
                self._hooks.on_message(f"the learner printed: {line}")
            if heard.death is not None:
                self._died(heard, now_s)
        if member.life != life:
            self._counts, self._lacking_s = {}, None

    def lost(self, now_s: float) -> None:
        """Its node has left the cluster."""
        self.member.end()
        self._died(Heard(death="its node has left the cluster"), now_s)

    def tell(self, counts: Mapping[str, int]) -> None:
        """Says what belongs into its rows of metrics."""
        if self.member.works and counts != self._counts:
            self._counts = dict(counts)
            self.member.say(json.dumps({"counts": self._counts}).encode() + b"\n")

    def hang_up(self, now_s: float) -> None:
        """Asks it to save and to end.

        Raises:
            PeerLost: it is dead.
        """
        if self.deaths and self.done is None and not self.member.works:
            raise PeerLost(
                f"{self.member.times()}; the run ended before it was back: go on from its last "
                "checkpoint with headrace train --resume"
            )
        self.member.hang_up(now_s)

    def _take(self, message: Mapping[str, Any]) -> None:
        row: Row | None = message.get("row")
        if row is not None:
            self._hooks.on_row(row)
        elif "message" in message:
            self._hooks.on_message(message["message"])
        elif "checkpoint" in message:
            self._checkpoints += 1
            self._hooks.on_checkpoint(Path(message["checkpoint"]))
        elif "address" in message:
            self.address = self._reachable(message["address"])
        elif "shared" in message:
            self.shared = message["shared"]
        elif "done" in message:
            self.done = message["done"]
        elif "failed" in message:
            kind = getattr(errors, message["kind"], HeadraceError)
            self._failure = kind(message["failed"])

    def _reachable(self, address: str) -> str:
        """Returns what hosts connect to, where the learner may listen at all of its addresses."""
        bound = parse_address(address, flag="--listen")
        if bound.host in _ANYWHERE and self.node is not None:
            return f"{_bracketed(self.node.address)}:{bound.port}"
        return address

    def _died(self, heard: Heard, now_s: float) -> None:
        """Counts a death, unless that is how the run should end.

        Raises:
            HeadraceError: what training says is final.
            PeerLost: it died too often, or before it had saved.
        """
        failure, self._failure = self._failure, None
        leaving = self.member.leaving_s is not None
        if self.done is not None or (leaving and heard.code == 0 and failure is None):
            self.member.end()  # or it had not begun, and there is nothing to save
            return
        # What training says on purpose is final. Only a life after another may meet a lock, or a
        # port, that is about to be free, or a node that does not see the run's folder.
        if failure is not None and not (self.deaths and isinstance(failure, ConfigError)):
            self.member.end()
            raise failure
        cause = str(failure or heard.death)
        if leaving:
            self.member.end()
            raise PeerLost(f"the learner died before it had saved: {cause}")
        self.deaths += 1
        # A new run saves before it begins.
        healthy = self._checkpoints > (0 if self._resume else 1)
        self.member.died(cause, now_s, healthy=healthy)
        if self.member.deaths >= MAX_DEATHS:
            self.member.end()
            raise PeerLost(f"{self.member.times()}; last: {cause}")
        self._resume = self._resume or self._checkpoints > 0
        self._checkpoints = 0
        self._hooks.on_message(
            f"the learner died: {cause}; it starts again "
            f"{'from its newest checkpoint' if self._resume else 'anew'}"
        )

    def _lack(self, now_s: float, gpus: int) -> None:
        if self._lacking_s is None:
            self._lacking_s = now_s
            what = f" and {gpus} GPUs" if gpus else ""
            self._hooks.on_message(
                f"the learner waits for a node with processors{what} that nobody has reserved"
            )
        elif now_s - self._lacking_s > PLACE_S:
            raise PeerLost(f"the learner found no room within {PLACE_S:g} s")


def ensure_private(listen: str, *, tls: bool, insecure: bool) -> None:
    """Sees to it that nobody can read along.

    Raises:
        ConfigError: the learner would listen on the network without TLS.
    """
    if not (tls or insecure or is_loopback(parse_address(listen, flag="--listen").host)):
        raise ConfigError(
            f"worker hosts reach the learner through the network ({listen}): give --tls-cert and "
            "--tls-key, files that every node has, or type --insecure where nobody else is on it"
        )


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
