"""The learner of a run on a cluster: placed, heard, and started again from its last checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from headrace import errors
from headrace.config import RunConfig, merged, to_dict
from headrace.errors import ConfigError, HeadraceError, PeerLost
from headrace.run.cluster_keeper import Heard
from headrace.run.cluster_member import IN_PEACE, WAIT_S, Member, Order, Site
from headrace.run.cluster_plan import Node, Slot, choose_learner, envs_per_message, gpus_wanted
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
        self.member = Member("the learner")
        self._site, self._job, self._hooks = site, job, hooks
        self._resume = resume
        self._failure: HeadraceError | None = None
        self._checkpoints = 0  # of this life
        self._home: Node | None = None
        self._gpus = 0  # that it had
        self._lacking_s: float | None = None  # since when there is no room
        self._counts: Mapping[str, int] = {}

    @property
    def node(self) -> Node | None:
        """Where it is, or was last."""
        return self._home

    def place(
        self, nodes: Sequence[Node], hosts: Sequence[Slot], *, wanted_hosts: int, now_s: float
    ) -> str | None:
        """Starts it if it is not there and may be.

        Args:
            nodes: Those that live.
            hosts: Room that worker hosts have.
            wanted_hosts: How many of them are to be expected.
            now_s: The time.

        Returns:
            The id of a node where hosts must give way first; None if there is no such.

        Raises:
            ConfigError: no node has the GPUs, or its port would be open to others.
            PeerLost: there was no room for too long.
        """
        if self.member.placed is not None or now_s < self.member.restart_s:
            return None
        most = int(max((node.gpus for node in nodes), default=0))
        if self.deaths:  # the node that had them may come back
            most = max(most, self._gpus)
        gpus = gpus_wanted(self._job.config, most)
        found = choose_learner(nodes, gpus, hosts=hosts, home=self._home.id if self._home else "")
        if found is None:
            self._lack(now_s, gpus)
            return None
        node, cpus = found
        if node.free_cpus < cpus and any(slot.node == node.id for slot in hosts):
            return node.id
        if node.free_cpus < cpus or node.free_gpus < gpus:
            self._lack(now_s, gpus)
            return None
        # At its old address the worker hosts find it again by themselves.
        stays = self._home is not None and self._home.id == node.id
        again = self.address if stays and self.member.deaths == 1 else ""
        remote = self._job.config.remote
        listen = again or remote.listen or f"{_bracketed(node.address)}:0"
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
        self._home, self._gpus, self._checkpoints = node, gpus, 0
        order = Order("headrace learner", MODULE, settings, node.id, cpus, float(gpus))
        self.member.begin(self._site, order, now_s)
        what = f", with {gpus} of its GPUs" if gpus else ""
        self._hooks.on_message(f"the learner goes to {node.name}{what}")
        return None

    def attend(self, now_s: float) -> None:
        """Hears it.

        Raises:
            HeadraceError: what it said before it ended: training failed.
            PeerLost: it died too often.
        """
        heard = self.member.hear(now_s)
        self._judge(now_s)
        if heard is None:
            return
        for message in heard.messages:
            self._take(message)
        for line in heard.printed:
            if line.strip():
                self._hooks.on_message(f"the learner printed: {line}")
        if heard.death is not None and self.done is None:
            self._died(heard, now_s)

    def lost(self, now_s: float) -> None:
        """Its node has left the cluster."""
        self.member.end()
        self._died(Heard(death="its node has left the cluster"), now_s)

    def tell(self, counts: Mapping[str, int]) -> None:
        """Says what belongs into its rows of metrics."""
        if self.member.placed is not None and not self.member.waits and counts != self._counts:
            self._counts = dict(counts)
            self.member.placed.say(json.dumps({"counts": self._counts}).encode() + b"\n")

    def over(self) -> bool:
        """Whether it has ended, and does not start again by itself."""
        return self.member.placed is None and (
            self.done is not None or self.member.leaving_s is not None
        )

    def hang_up(self, now_s: float) -> None:
        """Asks it to save and to end.

        Raises:
            PeerLost: it is dead.
        """
        if self.member.placed is None and self.deaths and self.done is None:
            raise PeerLost(
                f"{self.member.times()}; the run ended before it was back: go on from its last "
                "checkpoint with headrace train --resume"
            )
        self.member.hang_up(now_s)
        if self.member.leaving_s is None:
            self.member.leaving_s = now_s  # it had not begun

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
        if bound.host in _ANYWHERE and self._home is not None:
            return f"{_bracketed(self._home.address)}:{bound.port}"
        return address

    def _judge(self, now_s: float) -> None:
        leaving_s = self.member.leaving_s
        if self.member.placed is not None and leaving_s is not None and now_s - leaving_s > SAVE_S:
            self.member.end()
            raise PeerLost(f"the learner did not save within {SAVE_S:g} s and was killed")
        if self.member.waits and now_s - self.member.asked_s > WAIT_S:
            self.member.end()
            self._home = None
            self._lack(now_s, self._gpus)
        elif self.member.placed is not None and not self.member.waits:
            self._lacking_s = None

    def _died(self, heard: Heard, now_s: float) -> None:
        failure, self._failure = self._failure, None
        first_life = not self.deaths
        # What training says on purpose is final. Only a life after another may meet a lock, or a
        # port, that is about to be free, or a node that does not see the run's folder.
        if failure is not None and (first_life or not isinstance(failure, ConfigError)):
            raise failure
        cause = str(failure or heard.death)
        if self.member.leaving_s is not None:
            if cause.startswith(IN_PEACE):  # it had not begun, and so there is nothing to save
                return
            raise PeerLost(f"the learner died before it had saved: {cause}")
        self.deaths += 1
        # A new run saves before it begins.
        healthy = self._checkpoints > (0 if self._resume else 1)
        self.member.died(cause, now_s, healthy=healthy)
        if self.member.deaths >= MAX_DEATHS:
            raise PeerLost(f"{self.member.times()}; last: {cause}")
        self._resume = self._resume or self._checkpoints > 0
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
