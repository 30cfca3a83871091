"""The learner's side of `--inference worker --listen`: hosts that act on machines of their own.

    learner                            network                      host (run/acting_host.py)
    weights.publish ─ if asked for ──▶ WEIGHTS, in chunks ────────▶ act with the newest whole set
    queue.reading ─ slots free again ▶ SLOTS: credits ────────────▶ act while there are some
    unrolls.gather ◀─ slot ◀ checked ◀ UNROLL, one at a time ◀───── unrolls.append
    check ◀──────────────────────────◀ REPORT, a few times a second

To the run this is what `acting_workers.ActingWorkers` is on one machine. A host has a stretch of
the run's environments for as long as its stream lives; then another host, or the same one, starts
them anew, and their run ids are new.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from headrace import catalog
from headrace.algorithms.base import ExperienceSpec
from headrace.config import RunConfig, to_dict
from headrace.errors import ConfigError, PeerLost
from headrace.experience.packing import UnrollFormat
from headrace.experience.remote import CreditSlots, free_stretch
from headrace.pools.assignment import ENVS_PER_CORE
from headrace.pools.grpc import reachable
from headrace.run.acting_workers import Turnarounds, make_table
from headrace.run.host_reports import HostReport
from headrace.run.pools import pool_name
from headrace.run.remote_weights import OfferedWeights
from headrace.run_files import escaped_lines
from headrace.server.server import OnEpisodes
from headrace.specs import EnvSpec
from headrace.telemetry.metrics import Waits
from headrace.transport import wire
from headrace.transport.connections import HostConnection, Refused
from headrace.transport.grpc_server import Listener
from headrace.transport.messages import describe
from headrace.transport.settings import RemoteConfig
from headrace.transport.wire import Kind, Message, WireError
from headrace.weights import Weights, fingerprint

_LOOK_S = 1.0  # most that one look adds to a silence: a learner that was busy heard nobody
_MOST_RUN_ID = (1 << 62) - 1
_TO_HOSTS = (
    *("env", "algorithm", "seed", "pool", "env_threads", "workers"),
    *("server", "network", "environment", "learning"),
)
"""Settings that hosts need to act as this machine would."""


@dataclass(eq=False, slots=True)
class _Host:
    """A host's session."""

    peer: HostConnection
    number: int  # of the session
    first_env: int
    num_envs: int
    ready: bool = False
    report: HostReport = field(default_factory=HostReport)  # the newest
    heard: int = 0  # messages
    heard_before: int = 0  # at the last look
    silent_s: float = 0.0

    @property
    def span(self) -> str:
        """Says which environments it has."""
        return f"{self.first_env}..{self.first_env + self.num_envs - 1}"


class ActingHosts:
    """Everything that steps and acts, seen from the learner; the `Handler` of a listener.

    `queue`, `unrolls` and `weights` are the learner's ends. What is not said to be otherwise is for
    the learner's thread.
    """

    def __init__(
        self,
        config: RunConfig,
        spec: EnvSpec,
        model: Any,
        *,
        experience: ExperienceSpec,
        capacity: int,
        resume_count: int,
        local: Weights | None = None,
    ) -> None:
        """Allocates the slots; `start` listens.

        Args:
            config: The run's settings.
            spec: Of the environments.
            model: As hosts have it: on the CPU, in their precision.
            experience: How unrolls are cut and kept.
            capacity: Full unrolls that may wait for the learner.
            resume_count: Sessions of the run before this one.
            local: Weights of an evaluation's server in this process.

        Raises:
            ConfigError: an unroll is too large for a message.
        """
        self._config, self._spec = config, spec
        self._resume_count = resume_count
        num_envs = config.server.num_envs
        self._hosts_lock = threading.Lock()  # guards what follows
        self._hosts: dict[HostConnection, _Host] = {}
        self._peers: dict[int, HostConnection] = {}  # by number of the session
        self._owner = np.full(num_envs, -1)  # session that has each environment
        self._said_run = np.full((num_envs, 2), -1)  # session and run id, as its host counts
        self._run_id = np.full(num_envs, -1)  # as the learner counts
        self._numbers = itertools.count()
        self._gone = HostReport()  # of all sessions that have ended, together
        self._is_open = True
        self._failed = 0  # hosts that ended by an error of their own, or were given up
        self._last_loss = ""
        self._reports: SimpleQueue[tuple[_Host, HostReport]] = SimpleQueue()
        self.weights = OfferedWeights(model, send=self._send, local=local)
        self.queue = CreditSlots(
            num_envs, capacity=capacity, grant=self._grant, at_rest=self.weights.attend
        )
        self.unrolls = make_table(
            spec,
            model,
            self.queue,
            num_envs=0,
            experience=experience,
            num_slots=self.queue.num_slots,
            allocate=lambda _, shape, dtype: np.zeros(shape, dtype),
        )
        self._format = UnrollFormat(self.unrolls)
        most = wire.MAX_NBYTES - wire.MAX_TEXT_NBYTES - (1 << 16)
        if self._format.nbytes > most:
            raise ConfigError(
                f"an unroll of {self._format.nbytes >> 20} MiB is too large for a message of "
                f"{most >> 20}: lower --unroll-steps, or say --inference server"
            )
        self._welcome = self._make_welcome(model)
        self.turnaround_s = Turnarounds()
        self._on_episodes: OnEpisodes = lambda *_: None
        self._on_message: Callable[[str], None] = lambda _: None
        self._listener: Listener | None = None
        self._looked_s = time.monotonic()
        self._alone_s = 0.0

    def start(self, on_episodes: OnEpisodes, on_message: Callable[[str], None]) -> None:
        """Listens; hosts that have come wait for the first weights.

        Args:
            on_episodes: Told of episodes that ended, by number of the environment.
            on_message: Told what is worth a line, such as a host that came; in any thread.

        Raises:
            ConfigError: the address cannot be had, or is not safe.
        """
        self._on_episodes, self._on_message = on_episodes, on_message
        self._looked_s = time.monotonic()
        self._listener = Listener(self._config.remote, self, on_message=on_message)
        self._say_waiting()

    @property
    def address(self) -> str:
        """HOST:PORT at which hosts connect; empty before `start`."""
        return "" if self._listener is None else self._listener.address

    @property
    def counters(self) -> dict[str, int]:
        """Those of the listener, and how many environments have a host."""
        listener = {} if self._listener is None else self._listener.counters
        return {**listener, "envs": int((self._owner >= 0).sum())}

    @property
    def agent_steps(self) -> int:
        """Steps that all hosts have reported, those that are gone included."""
        return self._total().agent_steps

    @property
    def dropped_unrolls(self) -> int:
        """Unrolls that were never finished, since a host was lost or an environment began anew."""
        return self._total().dropped

    @property
    def deaths(self) -> int:
        """Hosts that were lost or failed, and worker processes that died at hosts."""
        return self._failed + self.counters.get("lost", 0) + self._total().deaths

    def unfinished(self) -> int:
        """Number of unrolls under construction: what a run that stops here loses."""
        return self._total().unfinished

    def check(self, waits: Waits) -> None:
        """Looks after the hosts: to be called a few times a second.

        Args:
            waits: Gets the hosts' own, as means over all of them.

        Raises:
            PeerLost: there was no host for too long.
        """
        if self._listener is not None:
            self._listener.check()
        self.weights.attend()
        while not self._reports.empty():
            self._tell(*self._reports.get(), waits)
        now_s = time.monotonic()
        passed_s, self._looked_s = min(now_s - self._looked_s, _LOOK_S), now_s
        remote, workers = self._config.remote, self._config.workers
        with self._hosts_lock:
            hosts = list(self._hosts.values())
        for host in hosts:
            heard = host.heard
            host.silent_s = host.silent_s + passed_s if heard == host.heard_before else 0.0
            host.heard_before = heard
            start_s = max(workers.start_timeout_s, remote.host_timeout_s)
            if host.silent_s > (remote.host_timeout_s if host.ready else start_s):
                what = "gave no sign" if host.ready else "was not ready"
                host.peer.close(f"it {what} for {host.silent_s:.0f} s")
                host.silent_s = -math.inf  # `gone` comes a little later
                with self._hosts_lock:
                    self._failed += 1
        self._alone_s = 0.0 if hosts else self._alone_s + passed_s
        if self._alone_s > remote.no_host_timeout_s:
            cause = f"; the last one was {self._last_loss}" if self._last_loss else ""
            raise PeerLost(
                f"no worker host came to {self.address} for {remote.no_host_timeout_s:g} s{cause}"
            )

    def close(self) -> None:
        """Tells the hosts that the run is over and closes the port; a second call does nothing."""
        with self._hosts_lock:
            was_open, self._is_open = self._is_open, False
            peers = list(self._hosts)
        if was_open and self._listener is not None:
            goodbye = wire.encode(Kind.BYE, text={"reason": "the run is over"})
            for peer in peers:
                peer.send(goodbye)
            self._listener.close("the run is over", retry=False)

    def welcome(self, peer: HostConnection) -> Mapping[str, Any]:
        """Grants a host its environments; see `transport.connections.Handler`."""
        envs, cores = peer.hello.get("envs", 0), peer.hello.get("cores", 1)
        if type(envs) is not int or type(cores) is not int or envs < 0 or cores < 1:
            raise Refused(f"{envs!r} environments on {cores!r} cores make no sense")
        most = min(envs or ENVS_PER_CORE * cores, self._config.remote.max_envs_per_host)
        most = max(1, most // self._spec.envs_together) * self._spec.envs_together
        with self._hosts_lock:
            if not self._is_open:
                raise Refused("the run is over", over=True)
            first, count = free_stretch(self._owner < 0, most)
            if not count:
                raise Refused("all environments have a host; wait until one is free", retry=True)
            host = _Host(peer, next(self._numbers), first, count)
            self._hosts[peer], self._peers[host.number] = host, peer
            self._owner[first : first + count] = host.number
            missing = int((self._owner < 0).sum())
        batch = self._spec.whole_vectors(-(-count // self._groups(cores)))
        self.queue.join(host.number, num_envs=count, max_batch=batch)
        left = f"; {missing} have no host yet" if missing else ""
        self._on_message(f"worker host {peer.name} acts in environments {host.span}{left}")
        return {
            **self._welcome,
            "share": [first, count, batch],
            "generation": host.number,
        }

    def take(self, peer: HostConnection, message: Message) -> None:
        """Takes what a host says; see `transport.connections.Handler`."""
        with self._hosts_lock:
            host = self._hosts.get(peer)
        if host is None:  # given up, and its stream has not ended yet
            return
        host.heard += 1
        if message.kind is Kind.UNROLL:
            self._take_unroll(host, message)
        elif message.kind is Kind.WEIGHTS:
            version, chunk = message.sequence - 1, message.block
            if self.weights.ask(host.number, version=version, chunk=chunk):
                self.queue.wake()
        elif message.kind is Kind.REPORT and message.text.get("failed") is True:
            with self._hosts_lock:
                self._failed += 1  # it says why as it goes
        elif message.kind is Kind.REPORT:
            report = HostReport.of(message.text, num_envs=host.num_envs, before=host.report)
            host.report = report
            self._reports.put((host, report))
        elif message.kind is Kind.READY:
            host.ready = True
        else:
            raise WireError(f"a worker host has no {message.kind.name} to send")

    def gone(self, peer: HostConnection, reason: str) -> None:
        """Frees the environments of a host; see `transport.connections.Handler`."""
        with self._hosts_lock:
            host = self._hosts.pop(peer, None)
            if host is None:
                return
            del self._peers[host.number]
            self._owner[self._owner == host.number] = -1
            self._gone = self._gone.plus(host.report.ended())
            self._last_loss = f"{peer.name}: {reason}"
            alone, is_open = not self._hosts, self._is_open
        self.weights.forget(host.number)
        self.queue.leave(host.number)
        if not is_open:
            return
        self._on_message(
            f"worker host {peer.name} is gone: {reason}; environments {host.span} wait for "
            "another, and start anew there"
        )
        if alone:
            self._say_waiting()

    def _take_unroll(self, host: _Host, message: Message) -> None:
        env_id, run_id = message.block, message.sequence
        if not 0 <= env_id - host.first_env < host.num_envs or run_id > _MOST_RUN_ID:
            raise WireError(f"an unroll of environment {env_id}, which it was not granted")
        try:
            self._format.check(message.arrays, newest=self.weights.newest_version)
        except ValueError as error:
            raise WireError(f"an unroll that is none of this run: {error}") from error
        slot = self.queue.arrive(host.number)
        if slot is None:
            raise WireError("an unroll for which it had no credit")
        # Nobody else writes these rows: one call at a time per host, and the environment is its.
        if tuple(self._said_run[env_id]) != (host.number, run_id):
            self._said_run[env_id] = host.number, run_id
            self._run_id[env_id] += 1
        self._format.unpack(slot, message.arrays, env_id=env_id, run_id=int(self._run_id[env_id]))
        self.queue.put([slot])

    def _tell(self, host: _Host, report: HostReport, waits: Waits) -> None:
        """Hands on what a report says beside counts."""
        for name, seconds in report.waits.items():
            waits.add(name, seconds / max(1, len(self._hosts)))
        if report.turnaround_s is not None:
            self.turnaround_s.add(host.first_env, *report.turnaround_s)
        if report.episodes:
            env, returns, lengths, infos = zip(*report.episodes, strict=True)
            ids = np.array(env, np.int32) + host.first_env
            self._on_episodes(ids, np.array(returns), np.array(lengths), list(infos))
        if report.note:
            self._on_message(f"worker host {host.peer.name}: {escaped_lines(report.note)}")

    def _total(self) -> HostReport:
        with self._hosts_lock:
            total = self._gone
            for host in self._hosts.values():
                total = total.plus(host.report)
        return total

    def _groups(self, cores: int) -> int:
        """Batches in which a host's environments are answered: some step meanwhile, if they can."""
        kind = pool_name(
            _for_hosts(self._config), catalog.environment_family(self._config.env).pool
        )
        return 2 if kind == "native" or (kind == "shm" and cores > 1) else 1

    def _make_welcome(self, model: Any) -> dict[str, Any]:
        sent = to_dict(_for_hosts(self._config))
        dtypes = {parameter.dtype for parameter in model.parameters()}
        precision = "bfloat16" if torch.bfloat16 in dtypes else "float32"
        return {
            "cut": "unrolls",
            "config": {name: sent[name] for name in _TO_HOSTS if name in sent}
            | {"inference": "worker", "precision": precision},
            "spec": describe(self._spec),
            "unroll": self._format.describe(),
            "weights": fingerprint(model),
            "resume_count": self._resume_count,
            "compression": self._config.remote.message_compression,
        }

    def _send(self, number: int, message: bytes) -> None:
        with self._hosts_lock:
            peer = self._peers.get(number)
        if peer is not None:
            peer.send(message)

    def _grant(self, number: int, count: int) -> None:
        self._send(number, wire.encode(Kind.SLOTS, sequence=count))

    def _say_waiting(self) -> None:
        self._on_message(
            f"waiting for worker hosts on {self.address}: headrace worker --connect "
            f"{reachable(self.address)}"
        )


def _for_hosts(config: RunConfig) -> RunConfig:
    """Hosts choose by themselves what steps environments there."""
    return dataclasses.replace(config, pool="auto", remote=RemoteConfig())
