"""Environments on worker hosts, on other machines or this one, behind one stream each.

    server                              gRPC's threads              worker host
    receive  <-- block is in the line   take: checks, copies   <--- STEP    block, n
    reads the rows                      them into the rows          steps the other blocks
    reply    --------------------------------------------------->   ACTION  block, n

Environments are cut into blocks, which hosts get as they come: `run/host.py` is the other end. A
block strictly alternates between STEP and ACTION, so its rows belong to the host from `reply` until
its next step is there, and else to the server; a host has as many steps on their way as blocks.

The blocks of a host that is gone are out of the line at once, and wait for the next host, which
starts them anew, with run ids of a new generation. The server may still hold rows of the old one:
then what the new one shows is kept until the reply. Whoever answers in full batches waits for all
blocks that have begun and whose host lives, and for no others.
"""

from __future__ import annotations

import dataclasses
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.errors import PeerLost
from headrace.pools.assignment import Assignment, EnvGroup, Host
from headrace.pools.batcher import Batcher
from headrace.pools.checks import check_batch
from headrace.pools.settings import WorkerConfig
from headrace.pools.shm import WorkerEnvs
from headrace.pools.shm_layout import (
    Table,
    layout,
    lend,
    write_host_step,
)
from headrace.run_files import escaped_lines
from headrace.specs import check_action
from headrace.steps import RUN_IDS, EnvStep
from headrace.transport.connections import HostConnection, Refused
from headrace.transport.grpc_server import Listener
from headrace.transport.messages import (
    decode_step,
    describe,
    encode_action,
)
from headrace.transport.settings import RemoteConfig
from headrace.transport.wire import Kind, Message, WireError, encode

LOOK_S = 0.25
"""Seconds between two looks at hosts that say nothing."""
_NOTES_TOLD = 20  # of one host, on the user's screen
_MAX_NOTE = 500  # characters


class GrpcPool:
    """Worker hosts as a pool, and what their listener serves.

    `receive`, `reply` and `close` are for one thread; `welcome`, `take` and `gone` are called in
    the listener's.
    """

    def __init__(
        self,
        recipe: WorkerEnvs,
        *,
        batch_size: int,
        remote: RemoteConfig,
        workers: WorkerConfig,
        on_message: Callable[[str], None] = lambda _: None,
        full_batches: bool = False,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """Listens; environments step when hosts have come.

        Args:
            recipe: the environments.
            batch_size: most rows of a batch.
            remote: where to listen, who may come, and how long to wait for whom.
            workers: how long a batch waits for more rows, and how the hosts look after their own
                worker processes.
            on_message: told what is worth a line, such as a host that came; in any thread.
            full_batches: give all environments that have a host, or none.
            now_s: the clock.

        Raises:
            ConfigError: the sizes do not fit, the address cannot be had, or a package is missing.
        """
        num_envs = recipe.num_envs
        unit = recipe.spec.envs_together
        check_batch(batch_size, num_envs, full=full_batches, unit=unit)
        self.spec = recipe.spec
        self.num_envs = num_envs
        self.max_batch = batch_size
        self.rows_received = 0
        """Rows that `receive` has given."""
        self._recipe, self._remote, self._workers = recipe, remote, workers
        self._on_message, self._now_s, self._full_batches = on_message, now_s, full_batches
        self._changed = threading.Condition()  # guards all that follows, but for the table's rows
        self._assignment = Assignment.of(
            num_envs,
            batch_size=batch_size,
            envs_per_message=remote.envs_per_message,
            max_envs_per_host=remote.max_envs_per_host,
            unit=unit,
        )
        self._line = Batcher(
            [block.size for block in self._assignment.blocks],
            max_envs=batch_size,
            # A full batch is due when nobody is missing, so not by age.
            max_wait_s=0.0 if full_batches else workers.batch_wait_ms / 1000.0,
            now_s=now_s,
        )
        self._in_use: list[tuple[EnvGroup, int, Host | None]] = []  # block, its number and its host
        self._lent: slice | NDArray[np.int32] = slice(0, 0)  # rows of these,
        self._lent_count = 0  # and how many
        self._looked_s: float | None = None
        self._alone_since_s = now_s()
        self._last_loss = ""
        self._deaths = 0  # but those that the listener counts
        plan = layout(recipe.spec, num_envs)
        self._table: Table | None = Table(bytearray(plan.nbytes), plan)
        self._stretches: dict[tuple[int, int], EnvStep] = {}  # views of rows, made once
        self._listener = Listener(remote, self, on_message=on_message)
        self._say_waiting()

    @property
    def address(self) -> str:
        """HOST:PORT at which hosts connect."""
        return self._listener.address

    @property
    def deaths(self) -> int:
        """Hosts that were lost, or failed, and worker processes of theirs that died."""
        return self._deaths + self._listener.counters["lost"]

    @property
    def counters(self) -> dict[str, int]:
        """Those of the listener, and how many environments have a host."""
        with self._changed:
            granted = self._assignment.envs_granted()
        return {**self._listener.counters, "envs": granted}

    def receive(self, timeout_s: float) -> EnvStep | None:
        """Returns the rows of a batch that is due; None after `timeout_s`.

        Raises:
            PeerLost: the pool was closed, or there was no host for too long.
            RuntimeError: the last batch was not replied to.
        """
        until_s = self._now_s() + timeout_s
        while True:
            table = self._open_table()
            self._listener.check()
            if self._in_use:
                raise RuntimeError("receive came twice: reply to the last batch first")
            self._look()
            with self._changed:
                self._take_batch()
                left_s = until_s - self._now_s()
                if self._in_use or left_s <= 0.0:
                    break
                due_in_s = None if self._full_batches else self._line.due_in_s()
                wait_s = min(left_s, LOOK_S)
                self._changed.wait(wait_s if due_in_s is None else min(wait_s, due_in_s))
        return self._lend(table) if self._in_use else None

    def reply(self, action: NDArray[Any]) -> None:
        """Sends the actions to the hosts; returns at once.

        Raises:
            PeerLost: the pool was closed.
            RuntimeError: nothing was received since the last reply.
            ValueError: wrong count or dtype, or an action outside the space; nothing was sent.
        """
        table = self._open_table()
        if not self._in_use:
            raise RuntimeError("reply came twice: receive a batch first")
        check_action(action, self._lent_count, self.spec.action_space)
        table.all.action[self._lent] = action
        answers = []
        with self._changed:
            now_s = self._now_s()
            for block, number, host in self._in_use:
                own = table.all.action[block.first : block.end]
                block.in_use = False
                if host is not None and block.host is host:
                    self._assignment.asked(block, host, now_s)
                    answers.append((host.peer, own, number, block.expected - 1))
                elif block.kept is not None:  # of the host that came after the one that is gone
                    self._write(table, block, block.kept)
                    block.kept = None
                    self._line.add([number])
            self._in_use = []
        for peer, own, number, sequence in answers:
            peer.send(encode_action(own, block=number, sequence=sequence))

    def close(self) -> None:
        """Tells the hosts that the run is over and closes the port; a second call does nothing."""
        with self._changed:
            if self._table is None:
                return
            self._table = None
            self._stretches.clear()
            peers = list(self._assignment.hosts)
            self._changed.notify_all()
        goodbye = encode(Kind.BYE, text={"reason": "the run is over"})
        for peer in peers:
            peer.send(goodbye)
        self._listener.close("the run is over", retry=False)

    def welcome(self, peer: HostConnection) -> Mapping[str, Any]:
        """Grants a host its blocks; see `transport.connections.Handler`."""
        with self._changed:
            if self._table is None:
                raise Refused("the run is over", over=True)
            host = self._assignment.grant(peer, self._now_s())
            granted = [
                [number, self._recipe.first_env + block.first, block.size, block.generation]
                for number, block in enumerate(self._assignment.blocks)
                if number in host.blocks
            ]
            total = self._assignment.envs_granted()
            span = self._assignment.span(host, first_env=self._recipe.first_env)
        missing = f"; {self.num_envs - total} have no host yet" if total < self.num_envs else ""
        self._on_message(f"worker host {peer.name} steps environments {span}{missing}")
        return {
            "cut": "steps",
            "env": self._recipe.env,
            "settings": dict(self._recipe.settings),
            "spec": describe(self.spec),
            "seed": self._recipe.seed,
            "blocks": granted,
            "compression": self._remote.message_compression,
            "workers": dataclasses.asdict(self._workers),
        }

    def take(self, peer: HostConnection, message: Message) -> None:
        """Takes what a host says; see `transport.connections.Handler`."""
        with self._changed:
            host = self._assignment.hosts.get(peer)
        if host is None:  # given up, and its stream has not ended yet
            return
        if message.kind is Kind.STEP:
            self._take_step(host, message)
        elif message.kind is Kind.REPORT:
            self._take_report(host, message)
        elif message.kind is not Kind.READY:
            raise WireError(f"a worker host has no {message.kind.name} to send")

    def gone(self, peer: HostConnection, reason: str) -> None:
        """Frees the blocks of a host; see `transport.connections.Handler`."""
        with self._changed:
            host = self._assignment.release(peer)
            if host is None or self._table is None:
                return
            self._line.drop(host.blocks)
            self._last_loss = f"{peer.name}: {reason}"
            alone = not self._assignment.hosts
            if alone:
                self._alone_since_s = self._now_s()
            span = self._assignment.span(host, first_env=self._recipe.first_env)
            self._changed.notify_all()
        self._on_message(
            f"worker host {peer.name} is gone: {reason}; environments {span} wait for another, and "
            "start anew there"
        )
        if alone:
            self._say_waiting()

    def _take_step(self, host: Host, message: Message) -> None:
        number = message.block
        with self._changed:
            block = self._assignment.due(host, number, message.sequence)
            if block.host is not host:
                return
        step = decode_step(message, self.spec, block.size)
        if message.sequence == 0 and not (step.reset.all() and not step.ended.any()):
            raise WireError(f"block {number} does not begin with a reset")
        with self._changed:
            table = self._table
            if block.host is not host or table is None:
                return
            self._assignment.returned(block, host, self._now_s())
            if block.in_use:
                block.kept = step
                return
            block.writing = True  # nobody else touches these rows now, and nobody is granted them
        self._write(table, block, step)
        with self._changed:
            block.writing = False
            if block.host is host:
                self._line.add([number])
                self._changed.notify_all()

    def _take_report(self, host: Host, message: Message) -> None:
        deaths, note = message.text.get("deaths", host.deaths), message.text.get("note", "")
        failed = message.text.get("failed") is True  # it says why in its last message
        if type(deaths) is not int or deaths < host.deaths or not isinstance(note, str):
            raise WireError("a report that makes no sense")
        with self._changed:
            self._deaths += deaths - host.deaths + failed
            host.deaths = deaths
            host.notes += bool(note)
        if note and host.notes <= _NOTES_TOLD:
            last = " (no more of this host is shown)" if host.notes == _NOTES_TOLD else ""
            self._on_message(
                f"worker host {host.peer.name}: {escaped_lines(note[:_MAX_NOTE])}{last}"
            )

    def _write(self, table: Table, block: EnvGroup, step: Any) -> None:
        write_host_step(
            table.rows(block.first, block.end), step, run_offset=block.generation * RUN_IDS
        )

    def _take_batch(self) -> None:
        """Takes a batch out of the line, if one is due."""
        if self._full_batches and not self._assignment.whole():
            return
        blocks = self._assignment.blocks
        numbers = sorted(self._line.take())
        self._in_use = [(blocks[number], number, blocks[number].host) for number in numbers]
        for block, _, _ in self._in_use:
            block.in_use = True

    def _lend(self, table: Table) -> EnvStep:
        spans = [(block.first, block.end) for block, _, _ in self._in_use]
        self._lent, step = lend(table.all, spans, self._stretches, self.spec)
        self._lent_count = len(step.env_id)
        self.rows_received += self._lent_count
        return step

    def _look(self) -> None:
        """Gives up hosts that are silent.

        Raises:
            PeerLost: there was no host for too long.
        """
        now_s = self._now_s()
        if self._looked_s is not None and now_s - self._looked_s < LOOK_S:
            return
        remote = self._remote
        with self._changed:
            if self._looked_s is None or now_s - self._looked_s > 4 * LOOK_S:
                # The server had something else to do, or was stopped: that is nobody's silence.
                gap_s = now_s - (self._alone_since_s if self._looked_s is None else self._looked_s)
                for host in self._assignment.hosts.values():
                    host.heard_s = min(now_s, host.heard_s + gap_s)
                self._alone_since_s += gap_s
            self._looked_s = now_s
            silent = self._assignment.silent(
                now_s,
                host_timeout_s=remote.host_timeout_s,
                start_timeout_s=self._workers.start_timeout_s,
            )
            alone = not self._assignment.hosts and self._table is not None
            self._deaths += len(silent)
        for host in silent:
            what = "was not ready" if host.starting else "gave no step"
            reason = f"it {what} for {now_s - host.heard_s:.0f} s"
            host.peer.close(reason)
            self.gone(host.peer, reason)
        if alone and now_s - self._alone_since_s > remote.no_host_timeout_s:
            cause = f"; the last one was {self._last_loss}" if self._last_loss else ""
            raise PeerLost(
                f"no worker host came to {self.address} for {remote.no_host_timeout_s:g} s{cause}"
            )

    def _say_waiting(self) -> None:
        self._on_message(
            f"waiting for worker hosts on {self.address}: headrace worker --connect "
            f"{reachable(self.address)}"
        )

    def _open_table(self) -> Table:
        if self._table is None:
            raise PeerLost("the pool is closed")
        return self._table


def reachable(address: str) -> str:
    """Returns what others connect to for an address that may stand for all of this machine's."""
    host, _, port = address.rpartition(":")
    anywhere = host.strip("[]") in ("", "0.0.0.0", "::")
    return f"{socket.gethostname()}:{port}" if anywhere else address
