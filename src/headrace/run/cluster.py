"""Training on a Ray cluster: the driver, which is the user's `headrace train`.

```
this process   says who goes where, hears, counts; shows rows and keeps the log
  Ray            |  places and restarts (a few lines of text a second, never step data)
a node         Keeper --> learner and server (run/learner_process.py)
                                 ^  gRPC: steps and actions, or unrolls and weights
every node     Keeper --> worker host (run/host.py)
```

What ends a run on one machine ends it here too. What kills a process or a machine does not: Ray
restarts the actor of a process that has died, and a learner goes on from its newest checkpoint.
Only what was on a node that is lost is planned anew, since the nodes that are left may be others.
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from headrace.config import RunConfig, to_dict, to_toml
from headrace.errors import ConfigError, HeadraceError
from headrace.run.cluster_actor import Site
from headrace.run.cluster_hosts import Hosts
from headrace.run.cluster_learner import Job, LearnerSeat
from headrace.run.cluster_ray import connected, ensure_allowed, living_nodes
from headrace.run.local import Hooks, TrainResult
from headrace.run.report import Row
from headrace.run.stop import Stop, stop_signals
from headrace.telemetry.record import MetricsWriter, RunDirectory

NODES_S = 2.0
"""Seconds between two looks at who belongs to the cluster."""

_LOOK_S = 0.25


def check_cluster(config: RunConfig) -> None:
    """Finds what can be wrong before there is a run folder.

    Raises:
        ConfigError: a cluster cannot do what the settings say, or may not be used.
    """
    if config.lockstep:
        raise ConfigError(
            "--lockstep has one order of everything, and a cluster has none: leave one of them out"
        )
    if config.learner_devices:
        raise ConfigError(
            "on a cluster one learner has all worker hosts: leave out --learner-devices, or "
            "--cluster (several learners listen themselves, see --listen)"
        )
    if config.pool not in ("auto", "grpc"):
        raise ConfigError(
            f"a cluster's hosts step the environments: leave out --pool {config.pool}"
        )
    ensure_allowed(config.cluster.cluster)


def run_on_cluster(
    config: RunConfig, run: RunDirectory, *, resume: bool, hooks: Hooks, trust_code: bool
) -> TrainResult:
    """Trains on the cluster that `config.cluster` names, until its end or a signal.

    `on_update` is not called: what it gets lies on the learner's device.

    Raises:
        KeyboardInterrupt: a signal came before there was anything to save.
        ConfigError: something does not fit, or the cluster is open to others.
        TrainingDiverged: a loss was not finite; the newest checkpoint is from before.
        PeerLost: the learner, or all worker hosts, died too often.
    """
    path = run.path.resolve()
    mark = f".seen-{secrets.token_hex(8)}"
    # Made for this run; compared by the learner, known to its hosts, and kept nowhere.
    variables = {"HEADRACE_TOKEN": secrets.token_hex(32)}
    job = Job(
        config=dataclasses.replace(config, out=str(path)),
        asked=to_dict(config),
        mark=mark,
        trust_code=trust_code,
    )
    with ExitStack() as stack:
        site = stack.enter_context(connected(config.cluster.cluster, variables))
        stop = stack.enter_context(stop_signals())
        (path / mark).touch()
        for name in (mark, f"{mark}.address"):
            stack.callback((path / name).unlink, missing_ok=True)
        copy = stack.enter_context(_Copy(run, config))
        training = Training(
            site, job, resume=resume, hooks=hooks._replace(on_row=copy.wrap(hooks.on_row))
        )
        copy.wanted = lambda: not training.learner.shared
        stack.callback(training.kill)
        while not training.turn(stop):
            training.wait(_LOOK_S)
        if training.failure is not None:
            raise training.failure
        if copy.writer is not None:
            hooks.on_message(
                f"{path} is on the disk of {training.machine}, where the checkpoints are; here are "
                "its metrics and its log"
            )
        done = training.learner.done
        if done is None:  # stopped before it began, so nothing is saved
            raise KeyboardInterrupt
        return TrainResult(run.path, done["metrics"], finished=done["finished"])


class Training:
    """A run on a cluster, turn by turn. For the driver's thread."""

    def __init__(
        self,
        site: Site,
        job: Job,
        *,
        resume: bool,
        hooks: Hooks,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts nothing yet; `now_s` is the clock."""
        config = job.config
        self.failure: HeadraceError | None = None
        """Why the run ends, if not well."""
        self.learner = LearnerSeat(site, job, resume=resume, hooks=hooks)
        self.hosts = Hosts(
            site,
            host_link(config),
            hosts=config.cluster.cluster_hosts,
            host_cpus=config.cluster.host_cpus,
            max_deaths=config.workers.max_worker_deaths,
            trust_code=job.trust_code,
            on_message=hooks.on_message,
        )
        self._site, self._config, self._now_s = site, config, now_s
        self._hooks = hooks
        self._looked_s = float("-inf")
        self._nodes = 0
        self._ending = False

    @property
    def machine(self) -> str:
        """Name of the learner's machine."""
        return self.learner.node.name if self.learner.node is not None else ""

    def turn(self, stop: Stop) -> bool:
        """Does what is due, and never waits; returns whether the run is over."""
        now_s = self._now_s()
        try:
            self.learner.attend(now_s)
            if self._ending or self.learner.done is not None or stop.requested:
                return self._end(now_s)
            self._work(now_s)
        except HeadraceError as error:
            return self._fail(error, now_s)
        return False

    def wait(self, timeout_s: float) -> None:
        """Waits until a process has news, or `timeout_s` is over."""
        members = [self.learner.member, *self.hosts.members]
        answers = [member.answer for member in members if member.answer is not None]
        if answers:
            self._site.ray.wait(answers, num_returns=1, timeout=timeout_s, fetch_local=False)
        else:
            time.sleep(timeout_s)

    def kill(self) -> None:
        """Ends all processes, whatever they are at."""
        self.hosts.kill()
        self.learner.member.end()

    def _work(self, now_s: float) -> None:
        nodes, member = None, self.learner.member
        if now_s - self._looked_s >= NODES_S:
            self._looked_s = now_s
            nodes = living_nodes(self._site.ray)
            if len(nodes) != self._nodes and self._nodes:
                self._hooks.on_message(f"the cluster has {len(nodes)} nodes now")
            self._nodes = len(nodes)
            if member.placed and member.node not in {node.id for node in nodes}:
                self.learner.lost(now_s)
            hosts = self._config.cluster.cluster_hosts or len(nodes)
            if self.learner.place(nodes, wanted_hosts=hosts, now_s=now_s):
                self.hosts.make_room(member.node)
            if not member.placed or member.waits:
                nodes = None  # first its room, then theirs
        if self.learner.address:
            self.hosts.serve(
                self.learner.address,
                num_envs=self._config.server.num_envs,
                block=self.learner.block,
            )
        self.hosts.attend(nodes, now_s, reserved={member.node: self.learner.cpus})
        self.learner.tell(self.counts())

    def counts(self) -> dict[str, int]:
        """What belongs into the metrics."""
        return {
            "cluster_nodes": self._nodes,
            "cluster_hosts": self.hosts.running,
            "cluster_host_deaths": self.hosts.deaths,
            "learner_deaths": self.learner.deaths,
        }

    def _end(self, now_s: float) -> bool:
        """The learner saves and ends, then the hosts; returns whether all are gone."""
        self._ending = True
        if self.learner.done is None and self.learner.member.leaving_s is None:
            self.learner.hang_up(now_s)
        if self.learner.member.placed:
            self.hosts.hear(now_s)
            return False
        self.hosts.hang_up(now_s)
        self.hosts.hear(now_s)
        return self.hosts.gone()

    def _fail(self, error: HeadraceError, now_s: float) -> bool:
        """Keeps the first failure; what can still be saved is."""
        self.failure = self.failure or error
        if self._ending or not self.learner.member.placed:
            return True
        self._ending = True
        self._hooks.on_message(f"{error}; the run is saved and ends")
        return False


class _Copy:
    """The driver's own metrics, where the learner's are on another machine's disk."""

    def __init__(self, run: RunDirectory, config: RunConfig) -> None:
        self.wanted: Callable[[], bool] = lambda: False
        self.writer: MetricsWriter | None = None
        self._run, self._config = run, config

    def __enter__(self) -> _Copy:
        return self

    def __exit__(self, *error: object) -> None:
        if self.writer is not None:
            self.writer.close(failed=error[0] is not None)

    def wrap(self, on_row: Callable[[Row], None]) -> Callable[[Row], None]:
        """Returns what writes a row, if that is wanted, and hands it on."""

        def write(row: Row) -> None:
            if self.writer is None and self.wanted():
                self.writer = MetricsWriter(self._run, self._config.tensorboard)
                self._run.rewrite_config(to_toml(self._config))  # a resume may have changed it
            if self.writer is not None:
                self.writer.write(int(row["env_frames"]), row)
            on_row(row)

        return write


def host_link(config: RunConfig) -> Mapping[str, Any]:
    """Returns how a worker host connects to the learner, but for the address (`LinkConfig`)."""
    remote, cluster = config.remote, config.cluster
    return {
        "insecure": remote.insecure,
        "tls_ca": cluster.host_tls_ca or remote.tls_cert,
        "tls_cert": cluster.host_tls_cert,
        "tls_key": cluster.host_tls_key,
    }
