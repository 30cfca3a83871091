"""The supervising logic of a cluster, on one that is made up: no Ray, no process, no clock."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import logging
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from headrace.config import RunConfig, completed, from_dict, to_dict, to_toml
from headrace.errors import ConfigError, PeerLost, TrainingDiverged
from headrace.pools.settings import ClusterConfig
from headrace.run import (
    cluster,
    cluster_actor,
    cluster_hosts,
    cluster_learner,
    cluster_ray,
    experience,
    learner_process,
)
from headrace.run.api import prepare
from headrace.run.cluster import Training, run_on_cluster
from headrace.run.cluster_actor import Heard, Keeper, Member, Order, Site
from headrace.run.cluster_learner import Job, ensure_private
from headrace.run.cluster_plan import (
    Node,
    Slot,
    choose_learner,
    envs_per_message,
    gpus_wanted,
    new_slots,
    shares,
)
from headrace.run.cluster_ray import answers_anybody, connected, ensure_allowed
from headrace.run.local import Hooks
from headrace.run.stop import Stop
from headrace.telemetry.record import RunDirectory
from headrace.transport.settings import RemoteConfig

LOOPBACK = "127.0.0.1"


def node(name: str, cpus: float = 8, *, gpus: float = 0) -> Node:
    return Node(f"id-{name}", name, LOOPBACK, cpus, gpus)


class RayError(Exception):
    pass


class ActorUnavailableError(RayError):
    pass


def call(method: Callable[..., Any]) -> Any:
    return SimpleNamespace(remote=method)


@dataclass
class FakePlaced:
    """An actor. `FakeRay` asks for a restart, which comes when a test says so."""

    order: Order
    lives: int = 0
    restarts: int = 0  # asked for
    heard: list[Heard | RayError] = field(default_factory=list)
    said: list[bytes] = field(default_factory=list)
    hung_up: bool = False
    killed: bool = False

    def __post_init__(self) -> None:
        self.news = call(lambda _: self)  # a reference to what it says next
        self.say = call(self.said.append)
        self.hang_up = call(lambda: setattr(self, "hung_up", True))

    @property
    def machine(self) -> str:
        return self.order.node.removeprefix("id-") if self.lives else ""

    def arrives(self) -> None:
        """Ray has started the actor, or restarted it."""
        self.lives += 1
        self.tells()

    def tells(self, *messages: dict[str, Any]) -> None:
        self.heard.append(Heard(f"life {self.lives}", self.machine, messages))

    def dies(self, cause: str = "killed (SIGKILL)", code: int = -9) -> None:
        """The process does; the actor lives."""
        self.heard.append(Heard(f"life {self.lives}", self.machine, death=cause, code=code))

    def leaves(self) -> None:
        self.dies("left by itself with exit code 0", code=0)


class FakeRay:
    """As much of Ray as a run uses; nothing waits."""

    exceptions = SimpleNamespace(RayError=RayError, ActorUnavailableError=ActorUnavailableError)

    def __init__(self, alive: list[Node]) -> None:
        self.alive = alive
        self.placed: list[FakePlaced] = []
        self.full: set[str] = set()  # ids of nodes where others have the room
        self.options: list[dict[str, Any]] = []
        self.util = SimpleNamespace(
            placement_group=lambda _, bundle_label_selector: bundle_label_selector[0],
            placement_group_table=self.table,
            remove_placement_group=lambda _: None,
            scheduling_strategies=SimpleNamespace(PlacementGroupSchedulingStrategy=dict),
        )

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {
                "Alive": True,
                "NodeID": node.id,
                "NodeManagerHostname": node.name,
                "NodeManagerAddress": node.address,
                "Resources": {"CPU": node.cpus, "GPU": node.gpus},
            }
            for node in self.alive
        ]

    def table(self, group: dict[str, str]) -> dict[str, str]:
        return {"state": "PENDING" if group["ray.io/node-id"] in self.full else "CREATED"}

    def remote(self, kept: type) -> Any:
        assert kept is Keeper
        return SimpleNamespace(options=self.with_options)

    def with_options(self, **options: Any) -> Any:
        self.options.append(options)
        return call(self.place)

    def place(self, order: Order, variables: Any, *, paths: Any, folder: Any) -> FakePlaced:
        self.placed.append(FakePlaced(order))
        return self.placed[-1]

    def wait(self, answers: list[FakePlaced], *, timeout: float) -> tuple[list[Any], list[Any]]:
        assert timeout == 0, "a turn never waits"
        return [placed for placed in answers if placed.heard], []

    def get(self, placed: FakePlaced) -> Heard:
        heard = placed.heard.pop(0)
        if isinstance(heard, RayError):
            raise heard
        return heard

    def kill(self, placed: FakePlaced, *, no_restart: bool = True) -> None:
        placed.killed = placed.killed or no_restart
        placed.restarts += not no_restart

    def living(self) -> list[FakePlaced]:
        return [placed for placed in self.placed if not placed.killed]

    def hosts(self) -> list[FakePlaced]:
        return [p for p in self.living() if p.order.module == cluster_hosts.MODULE]

    def learner(self) -> FakePlaced:
        return [p for p in self.living() if p.order.module == cluster_learner.MODULE][-1]


class Run:
    """A run on a made-up cluster, and its clock."""

    def __init__(self, *nodes: Node, resume: bool = False, **changes: Any) -> None:
        config = completed(RunConfig(env="catch", out="/runs/x", total_frames=1000, **changes))
        self.site = FakeRay(list(nodes))
        self.now_s = 0.0
        self.messages: list[str] = []
        self.rows: list[Any] = []
        self.saved: list[Path] = []
        self.stop = Stop()
        hooks = Hooks(
            on_row=self.rows.append,
            on_update=lambda *_: None,
            on_checkpoint=self.saved.append,
            on_message=self.messages.append,
        )
        job = Job(config, to_dict(config), ".seen", trust_code=True)
        self.training = Training(
            Site(self.site, {}), job, resume=resume, hooks=hooks, now_s=lambda: self.now_s
        )

    def turn(self, seconds: float = 0.0) -> bool:
        """Lets time go by in small steps, then takes a turn."""
        until_s = self.now_s + seconds
        while self.now_s < until_s:
            self.now_s = min(until_s, self.now_s + 1.0)
            over = self.training.turn(self.stop)
        return over if seconds else self.training.turn(self.stop)

    def listening(self, port: int = 5000) -> Run:
        """The learner is on its node, and listens."""
        self.turn()
        learner = self.site.learner()
        learner.arrives()
        learner.tells({"shared": True}, {"address": f"{LOOPBACK}:{port}"})
        learner.tells({"checkpoint": "/runs/x/checkpoints/0"})
        for _ in range(3):
            self.turn()
        return self

    def stepping(self) -> Run:
        """And the hosts are there."""
        self.turn(cluster_actor.FIRST_PAUSE_S + 2)
        for host in self.site.hosts():
            if host.lives <= host.restarts:
                host.arrives()
        self.turn()
        return self

    def said(self, text: str) -> bool:
        return any(text in message for message in self.messages)


# Who goes where.


@pytest.mark.parametrize(
    ("nodes", "gpus", "name", "cpus"),
    [
        ([node("a", 2)], 0, "a", 1),  # alone it leaves half to the environments
        ([node("a", 1)], 0, "a", 0.5),
        ([node("a", 16), node("b", 32)], 0, "b", 4),
        ([node("a", 64), node("gpu", 8, gpus=1)], 1, "gpu", 4),
        ([node("a", 8), node("gpu", 64, gpus=8)], 0, "a", 4),  # GPUs are for who wants them
        ([node("head", 0), node("a", 2)], 0, "a", 1),
    ],
)
def test_the_learner_goes_where_its_devices_are(
    nodes: list[Node], gpus: int, name: str, cpus: float
) -> None:
    found = choose_learner(nodes, gpus)
    assert found is not None
    assert (found[0].name, found[1]) == (name, cpus)


def test_the_learner_goes_home_if_it_can() -> None:
    nodes = [node("a", 8), node("b", 16)]
    at_home = choose_learner(nodes, 0, home="id-a")
    assert at_home is not None
    assert at_home[0].name == "a"
    assert choose_learner([node("head", 0)], 0) is None


@pytest.mark.parametrize(
    ("settings", "most", "wanted"),
    [
        ({}, 0, 0),
        ({}, 8, 1),
        ({"device": "cpu"}, 8, 0),
        ({"device": "cuda:2"}, 8, 3),
        ({"learner_devices": "all"}, 8, 8),
        ({"learner_devices": "cpu,cpu"}, 8, 0),
        ({"learner_devices": "cuda:0,cuda:1", "inference_devices": "cuda:2"}, 8, 3),
        ({"actor_device": "cpu", "critic_device": "cuda"}, 8, 1),
    ],
)
def test_gpus_that_the_settings_name(settings: dict[str, Any], most: int, wanted: int) -> None:
    assert gpus_wanted(completed(RunConfig(env="catch", **settings)), most) == wanted


def test_a_node_that_others_use_is_the_last_choice() -> None:
    nodes = [node("busy", 64), node("a", 8)]
    for crowded, name in ([], "busy"), (["id-busy"], "a"), (["id-a", "id-busy"], "busy"):
        found = choose_learner(nodes, 0, crowded=crowded)
        assert found is not None
        assert found[0].name == name


def test_gpus_that_no_node_has() -> None:
    with pytest.raises(ConfigError, match="wants 2 GPUs on one node"):
        gpus_wanted(completed(RunConfig(env="catch", device="cuda:1")), 1)


def test_a_host_on_every_node_that_has_room() -> None:
    free = {"a": 4.0, "b": 16.0, "head": 0.0, "full": 0.0}
    slots = new_slots(free, [], hosts=0, host_cpus=0)
    assert slots == [Slot("a", 4), Slot("b", 16)]
    assert new_slots(free, slots, hosts=0, host_cpus=0) == []
    assert new_slots(free, [], hosts=0, host_cpus=6) == [Slot("b", 6)]


def test_a_number_of_hosts_goes_where_most_processors_are() -> None:
    free = {"a": 4.0, "b": 8.0}
    assert sorted(new_slots(free, [], hosts=3, host_cpus=0)) == [
        Slot("a", 4),
        Slot("b", 4),
        Slot("b", 4),
    ]
    assert len(new_slots(free, [], hosts=9, host_cpus=4)) == 3  # no room for more
    assert len(new_slots(free, [Slot("gone", 4)], hosts=2, host_cpus=4)) == 1


@pytest.mark.parametrize(
    ("num_envs", "block", "cpus", "expected"),
    [
        (64, 16, {0: 1.0}, {0: 64}),
        (64, 16, {0: 8.0, 1: 8.0}, {0: 32, 1: 32}),
        (64, 8, {0: 24.0, 1: 8.0}, {0: 48, 1: 16}),
        (32, 16, {0: 1.0, 1: 1.0, 2: 1.0}, {0: 16, 1: 16}),  # more hosts than blocks
        (10, 4, {0: 1.0, 1: 1.0, 2: 1.0}, {0: 4, 1: 4, 2: 4}),
        (64, 16, {}, {}),
    ],
)
def test_environments_are_divided_in_whole_blocks(
    num_envs: int, block: int, cpus: dict[int, float], expected: dict[int, int]
) -> None:
    got = shares(num_envs, block, cpus)
    assert got == expected
    if cpus:
        assert sum(got.values()) >= num_envs, "somebody has to take each environment"


def test_each_host_can_have_two_blocks() -> None:
    config = completed(RunConfig(env="catch"))
    assert envs_per_message(config, 4) == 8
    assert envs_per_message(config, 1) == 32
    assert envs_per_message(config, 1000) == 1
    named = completed(RunConfig(env="catch", remote=RemoteConfig(envs_per_message=5)))
    assert envs_per_message(named, 4) == 5


# A run.


def test_first_the_learner_then_the_hosts_at_its_address() -> None:
    run = Run(node("a", 8), node("b", 4))
    run.turn()
    assert [placed.order.module for placed in run.site.placed] == [cluster_learner.MODULE]
    order = run.site.learner().order
    assert order.node == "id-a"
    assert order.settings["config"]["remote"]["listen"] == f"{LOOPBACK}:0"
    assert order.settings["asked"]["remote"]["listen"] == ""
    run.listening().stepping()
    hosts = run.site.hosts()
    assert sorted((h.order.node, h.order.cpus) for h in hosts) == [("id-a", 4), ("id-b", 4)]
    for host in hosts:
        assert host.order.settings["link"]["connect"] == f"{LOOPBACK}:5000"
        assert host.order.settings["envs"] == 32
        assert host.order.settings["cores"] == 4
    assert run.training.counts()["cluster_hosts"] == 2


def test_rows_messages_and_checkpoints_arrive() -> None:
    run = Run(node("a")).listening().stepping()
    learner = run.site.learner()
    learner.tells({"row": {"env_frames": 7}}, {"message": "hello"}, {"checkpoint": "/c/1"})
    run.turn()
    assert run.rows == [{"env_frames": 7}]
    assert "hello" in run.messages
    assert run.saved[-1] == Path("/c/1")
    assert b'"cluster_hosts": 1' in learner.said[-1], "the metrics get the counts"


def test_the_run_ends_when_the_learner_is_done() -> None:
    run = Run(node("a")).listening().stepping()
    run.site.learner().tells({"done": {"metrics": {"x": 1}, "finished": True}})
    assert not run.turn()
    host = run.site.hosts()[0]
    run.site.learner().leaves()
    assert not run.turn()
    assert host.hung_up
    host.leaves()
    assert run.turn()
    assert run.training.failure is None
    assert run.training.learner.done == {"metrics": {"x": 1}, "finished": True}
    assert run.site.living() == []


def test_a_stop_saves_first_and_ends_hosts_after() -> None:
    run = Run(node("a")).listening().stepping()
    run.stop.requested = True
    assert not run.turn()
    assert run.site.learner().hung_up
    host = run.site.hosts()[0]
    assert not host.hung_up, "a learner that takes its last update may still want them"
    run.site.learner().tells({"done": {"metrics": {}, "finished": False}})
    run.site.learner().leaves()
    run.turn()
    run.turn()
    assert host.hung_up
    assert not run.turn(cluster_hosts.LEAVE_S)
    assert run.turn(2), "one that does not leave is killed"
    assert host.killed
    assert run.training.failure is None


def test_a_stop_before_anything_began() -> None:
    run = Run(node("a"))
    run.turn()
    run.stop.requested = True
    assert run.turn()
    assert run.training.failure is None
    assert run.site.living() == []


def test_a_learner_that_does_not_save_is_killed() -> None:
    run = Run(node("a")).listening()
    run.stop.requested = True
    run.turn()
    while not run.turn(1):
        assert run.now_s < 2 * cluster_learner.SAVE_S
    assert isinstance(run.training.failure, PeerLost)
    assert "did not save" in str(run.training.failure)


def test_a_host_that_dies_is_named_counted_and_replaced() -> None:
    run = Run(node("a"), node("b")).listening().stepping()
    first = next(host for host in run.site.hosts() if host.machine == "b")
    first.dies("killed (SIGKILL): out of memory")
    run.turn()
    assert run.said("worker host 1 on b died: killed (SIGKILL): out of memory")
    assert run.training.counts()["cluster_host_deaths"] == 1
    run.stepping()
    assert first.restarts == 1, "Ray's, where it was"
    assert len(run.site.hosts()) == 2
    assert run.training.counts()["cluster_hosts"] == 2


def test_a_host_that_always_dies_starts_ever_later_and_is_given_up() -> None:
    run = Run(node("a"), node("b")).listening().stepping()
    bad = next(host for host in run.site.hosts() if host.machine == "b")
    bad.dies("no module named ale_py")
    starts = [run.now_s]
    for _ in range(60):
        run.turn(1)
        if bad.restarts == bad.lives:
            bad.arrives()
            bad.dies("no module named ale_py")
            starts.append(run.now_s)
    pauses = [later - earlier for earlier, later in itertools.pairwise(starts)]
    assert len(starts) == 5
    assert pauses == sorted(set(pauses)), "each is longer than the one before"
    assert run.said("died 5 times in a row, first: no module named ale_py; training goes on")
    (left,) = run.site.hosts()
    assert left.order.settings["envs"] == 64, "the other one takes its share"


def test_the_run_ends_saved_when_all_hosts_are_given_up() -> None:
    run = Run(node("a")).listening()
    for _ in range(200):
        for host in run.site.hosts():
            if host.lives <= host.restarts:
                host.arrives()
                host.dies("catch is another environment here")
        run.turn(1)
        if run.site.learner().hung_up:
            break
    run.site.learner().tells({"done": {"metrics": {}, "finished": False}})
    run.site.learner().leaves()
    run.turn()
    assert run.turn()
    assert isinstance(run.training.failure, PeerLost)
    assert "died 5 times in a row, first: catch is another" in str(run.training.failure)
    assert run.training.counts()["cluster_host_deaths"] == 5


def test_a_host_that_is_sent_away_did_not_die() -> None:
    run = Run(node("a")).listening().stepping()
    (host,) = run.site.hosts()
    host.leaves()
    run.turn()
    assert run.training.counts()["cluster_host_deaths"] == 0
    assert run.training.counts()["cluster_hosts"] == 0
    run.turn(cluster_hosts.AGAIN_S)
    run.turn(1)
    assert host.restarts == 1


def test_a_node_that_joins_gets_a_host_and_a_share() -> None:
    run = Run(node("a")).listening().stepping()
    old = run.site.hosts()[0]
    assert old.order.settings["envs"] == 64
    run.site.alive.append(node("new", 4))
    run.stepping()
    assert run.said("the cluster has 2 nodes now")
    assert run.site.hosts() == [old], "nodes come in flocks; until they are here, nothing is free"
    assert not old.hung_up
    for _ in range(int(cluster_hosts.SETTLE_S)):
        run.turn(1)
    assert old.hung_up
    old.leaves()
    run.stepping()
    assert {host.machine for host in run.site.hosts()} == {"a", "new"}
    assert [host.order.settings["envs"] for host in run.site.hosts()] == [32, 32]
    assert run.training.counts()["cluster_host_deaths"] == 0


def test_a_node_that_leaves_takes_its_host_and_the_rest_go_on() -> None:
    run = Run(node("a"), node("b")).listening().stepping()
    lost = next(host for host in run.site.hosts() if host.machine == "b")
    del run.site.alive[1]
    run.turn(3)
    assert lost.killed
    assert run.said("is lost: its node has left the cluster")
    assert run.training.counts() == {
        "cluster_nodes": 1,
        "cluster_hosts": 1,
        "cluster_host_deaths": 1,
        "learner_deaths": 0,
    }


def test_a_node_that_ray_gives_up_takes_its_host() -> None:
    run = Run(node("a"), node("b")).listening().stepping()
    lost = next(host for host in run.site.hosts() if host.machine == "b")
    lost.heard.append(RayError("The actor is not schedulable"))
    run.turn()
    assert lost.killed
    assert run.said("worker host 1 on b died: The actor is not schedulable")
    run.stepping()
    assert len(run.site.hosts()) == 2, "the node lives, so it gets another one"


def test_a_worker_that_ray_lost_and_replaced_is_counted() -> None:
    run = Run(node("a"), node("b")).listening().stepping()
    hosts = run.site.hosts()
    hosts[1].arrives()
    run.turn()
    assert run.training.counts()["cluster_host_deaths"] == 1
    assert run.training.counts()["cluster_hosts"] == 2
    assert run.site.hosts() == hosts
    learner = run.site.learner()
    learner.arrives()
    run.turn()
    assert run.training.counts()["learner_deaths"] == 1
    learner.tells({"address": f"{LOOPBACK}:5000"})
    run.turn()
    assert run.site.hosts() == hosts
    assert run.training.failure is None


def test_of_room_that_others_have_taken_half_is_tried() -> None:
    run = Run(node("a"), node("b", 8))
    run.site.full = {"id-b"}
    run.listening()
    run.turn(3)
    waiting = next(host for host in run.site.hosts() if host.order.node == "id-b")
    assert waiting.order.cpus == (4 if run.site.learner().order.node == "id-b" else 8)
    run.turn(cluster_actor.ROOM_S + 4)
    assert waiting.killed
    later = next(host for host in run.site.hosts() if host.order.node == "id-b")
    assert later.order.cpus == waiting.order.cpus / 2


def test_a_node_where_no_host_can_start_is_given_up() -> None:
    run = Run(node("a"), node("b")).listening().stepping()
    run.now_s = 1e6  # as a clock may say
    for _ in range(60):
        for host in run.site.hosts():
            if host.order.node == "id-b" and not host.heard:
                host.heard.append(RayError("creation task … ModuleNotFoundError: headrace"))
        run.turn(1)
    assert run.training.counts()["cluster_host_deaths"] == 5
    assert run.said("5 times in a row, first: creation task … ModuleNotFoundError: headrace")
    assert [host.order.node for host in run.site.hosts()] == ["id-a"]


def test_where_no_host_of_that_size_fits_it_is_tried_again() -> None:
    run = Run(node("a"), node("b", 8), cluster=ClusterConfig(cluster="auto", host_cpus=4))
    run.site.full = {"id-b"}
    run.listening().turn(cluster_actor.ROOM_S + 4)
    assert [host.order.node for host in run.site.hosts()] == ["id-a"]
    run.site.full = set()
    run.turn(cluster_hosts.CROWDED_S + cluster_hosts.SETTLE_S + 2 * cluster_hosts.LEAVE_S)
    assert sorted(host.order.node for host in run.site.hosts()) == ["id-a", "id-b"]


def test_a_learner_that_dies_goes_on_from_its_checkpoint_at_its_address() -> None:
    run = Run(node("a"), node("b")).listening().stepping()
    hosts, first = run.site.hosts(), run.site.learner()
    first.dies("killed (SIGKILL)")
    run.turn()
    assert run.said("the learner died: killed (SIGKILL); it starts again from its newest")
    assert not first.restarts
    run.turn(4)
    assert first.restarts == 1, "Ray's"
    assert run.site.learner() is first
    first.arrives()
    first.tells({"address": f"{LOOPBACK}:5000"})
    run.turn()
    run.turn()
    assert run.site.hosts() == hosts, "they find it by themselves"
    assert run.training.counts()["learner_deaths"] == 1


def test_a_learner_whose_node_is_gone_goes_elsewhere_and_hosts_follow() -> None:
    run = Run(node("a", 16), node("b", 8)).listening().stepping()
    assert run.site.learner().order.node == "id-a"
    del run.site.alive[0]
    run.turn(3)
    run.turn(4)
    learner = run.site.learner()
    assert learner.order.node == "id-b", "the host there has made room"
    learner.arrives()
    learner.tells({"address": f"{LOOPBACK}:6000"})
    run.turn()
    run.stepping()
    (host,) = run.site.hosts()
    assert host.order.settings["link"]["connect"] == f"{LOOPBACK}:6000"
    assert host.order.node == "id-b"


def test_a_learner_whose_room_is_taken_goes_elsewhere_but_not_for_ever() -> None:
    run = Run(node("a", 16), node("b", 8))
    run.turn()
    assert run.site.learner().order.node == "id-a"
    run.site.full = {"id-a", "id-b"}
    run.turn(cluster_actor.ROOM_S + 4)
    assert run.site.learner().order.node == "id-b"
    run.turn(cluster_learner.PLACE_S + 2 * cluster_actor.ROOM_S)
    assert "found no room within" in str(run.training.failure)


def test_a_learner_that_always_dies_ends_the_run() -> None:
    run = Run(node("a")).listening()
    learner = run.site.learner()
    learner.dies("segmentation fault")
    for _ in range(100):
        run.turn(1)
        if run.training.failure is not None:
            break
        if learner.restarts == learner.lives:
            learner.arrives()
            learner.dies("segmentation fault, too")
    assert learner.lives == cluster_learner.MAX_DEATHS
    assert learner.killed
    assert isinstance(run.training.failure, PeerLost)
    assert "first: segmentation fault; last: segmentation fault, too" in str(run.training.failure)


@pytest.mark.parametrize(
    ("kind", "error"),
    [("ConfigError", ConfigError), ("TrainingDiverged", TrainingDiverged), ("PeerLost", PeerLost)],
)
def test_what_training_says_is_final(kind: str, error: type[Exception]) -> None:
    run = Run(node("a")).listening()
    run.site.learner().tells({"failed": "a sentence", "kind": kind})
    run.site.learner().leaves()
    run.turn()
    assert run.turn()
    assert type(run.training.failure) is error
    assert str(run.training.failure) == "a sentence"


def test_the_lock_of_a_dead_learner_is_waited_for() -> None:
    run = Run(node("a")).listening()
    learner = run.site.learner()
    learner.dies("its node was silent")
    run.turn(4)
    assert learner.restarts == 1
    learner.arrives()
    learner.tells({"failed": "it is being trained by another process", "kind": "ConfigError"})
    learner.leaves()
    run.turn(3)
    assert run.training.failure is None
    run.turn(5)
    assert learner.restarts == 2


def test_a_learner_waits_for_a_node_with_gpus_like_the_one_it_had() -> None:
    run = Run(node("gpu", 8, gpus=1), node("b", 16), device="cuda").listening().stepping()
    assert run.site.learner().order.gpus == 1
    gone = run.site.alive.pop(0)
    run.turn(6)
    assert run.training.failure is None
    assert run.said("waits for a node with processors and 1 GPUs")
    run.site.alive.append(gone._replace(id="id-new", name="new"))
    run.turn(6)
    assert run.site.learner().order.node == "id-new"


def test_a_learner_that_is_stopped_before_it_began_did_not_die() -> None:
    run = Run(node("a"))
    run.turn()
    run.site.learner().arrives()
    run.turn()
    run.stop.requested = True
    run.turn()
    run.site.learner().leaves()
    run.turn()
    assert run.turn()
    assert run.training.failure is None


@contextlib.contextmanager
def stopped_at_once() -> Iterator[Stop]:
    stop = Stop()
    stop.requested = True
    yield stop


def test_a_stop_before_anything_began_claims_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(FakeRay([node("a")]), {})
    monkeypatch.setattr(cluster, "connected", lambda *_: contextlib.nullcontext(site))
    monkeypatch.setattr(cluster, "stop_signals", stopped_at_once)
    config = completed(RunConfig(env="catch", cluster=ClusterConfig(cluster="local")))
    run = RunDirectory.create(tmp_path / "run", "")
    hooks = Hooks(*[lambda *_: None] * 4)
    with pytest.raises(KeyboardInterrupt):
        run_on_cluster(config, run, resume=False, hooks=hooks, trust_code=True)


def test_a_learner_waits_for_room() -> None:
    run = Run(node("a", 8))
    run.site.full = {"id-a"}
    run.turn(cluster_actor.ROOM_S + 4)
    assert run.said("waits for a node with processors")
    (waiting,) = run.site.living()
    waiting.arrives()
    run.turn(cluster_learner.PLACE_S)
    assert run.training.failure is None
    assert run.site.learner() is waiting


# What is open to others.


def test_a_learner_on_the_network_needs_tls() -> None:
    ensure_private("127.0.0.1:0", tls=False, insecure=False)
    ensure_private("192.0.2.7:0", tls=True, insecure=False)
    ensure_private("192.0.2.7:0", tls=False, insecure=True)
    with pytest.raises(ConfigError, match="--tls-cert"):
        ensure_private("192.0.2.7:0", tls=False, insecure=False)


def test_tls_files_reach_the_hosts() -> None:
    remote = RemoteConfig(tls_cert="c.pem", tls_key="k.pem")
    run = Run(node("a"), remote=remote).listening().stepping()
    assert run.site.hosts()[0].order.settings["link"]["tls_ca"] == "c.pem"
    cluster = ClusterConfig(cluster="auto", host_tls_ca="ca.pem")
    run = Run(node("a"), remote=remote, cluster=cluster).listening().stepping()
    assert run.site.hosts()[0].order.settings["link"]["tls_ca"] == "ca.pem"


@pytest.mark.parametrize("cluster", ["auto", "192.0.2.7:6379"])
def test_a_ray_without_token_is_refused(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with (
        pytest.raises(ConfigError, match="start every node with RAY_AUTH_MODE=token"),
        connected(cluster, {}),
    ):
        pass


class Unauthenticated(Exception):
    pass


def test_a_ray_that_refuses_us_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> None:
        raise Unauthenticated("no token was found")

    ray = SimpleNamespace(
        is_initialized=lambda: False,
        init=init,
        exceptions=SimpleNamespace(RayError=Unauthenticated),
    )
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setattr(cluster_ray, "_module", lambda: ray)
    with pytest.raises(ConfigError, match="no Ray cluster at --cluster auto: no token was found"):
        cluster_ray.connected("auto", {}).__enter__()


def test_ray_adds_no_folder_of_ours_to_where_its_workers_look() -> None:
    pytest.importorskip("ray")
    paths = cluster_ray.job_config()._py_driver_sys_path
    paths.extend(["x"])
    assert paths == []


def test_ray_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'headrace\[cluster\]'"):
        ensure_allowed("local")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"lockstep": True}, "leave one of them out"),
        ({"pool": "inline"}, "leave out --pool inline"),
        ({"pool": "device"}, "leave out --pool device"),
        ({"learner_devices": "cpu,cpu"}, "leave out --learner-devices"),
        ({"pool": "shm"}, "leave out --pool shm"),
        ({"cluster": ClusterConfig(cluster="auto")}, "RAY_AUTH_MODE=token"),
    ],
)
def test_what_a_cluster_cannot_do_is_said_before_there_is_a_folder(
    settings: dict[str, Any], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    out = tmp_path / "run"
    settings = {"cluster": ClusterConfig(cluster="local"), **settings}
    with pytest.raises(ConfigError, match=sentence):
        prepare(RunConfig(env="catch", out=str(out), **settings))
    assert not out.exists()


def test_the_replay_need_not_fit_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experience, "free_memory_nbytes", lambda: 1)

    def config(place: str, **changes: Any) -> RunConfig:
        settings = {"env": "catch", "algorithm": "r2d2", "out": str(tmp_path / place)}
        return from_dict({**settings, "learning": {"replay": {"replay_place": place}}, **changes})

    with pytest.raises(ConfigError, match="a replay of"):
        prepare(config("cpu"))
    prepare(config("cpu", cluster={"cluster": "local"}))
    prepare(config("cuda", cluster={"cluster": "local"}))


class Answering(grpc.GenericRpcHandler):
    """Ray's head, as far as the probe sees it."""

    def __init__(self, token: str, code: grpc.StatusCode) -> None:
        self.token, self.code = token, code

    def service(self, call: Any) -> Any:
        shown = dict(call.invocation_metadata).get("authorization", "")

        def answer(request: bytes, context: Any) -> bytes:
            if shown != self.token:
                context.abort(self.code, "InvalidAuthToken")
            return b""

        return grpc.unary_unary_rpc_method_handler(answer)


@pytest.mark.net
@pytest.mark.parametrize(
    ("token", "code", "is_open"),
    [
        ("", grpc.StatusCode.OK, True),
        ("Bearer x", grpc.StatusCode.UNAUTHENTICATED, False),
        ("Bearer x", grpc.StatusCode.UNIMPLEMENTED, True),
    ],
)
def test_a_ray_that_answers_anybody_is_found_out(
    token: str, code: grpc.StatusCode, is_open: bool
) -> None:
    with ThreadPoolExecutor(1) as threads:
        server = grpc.server(threads, handlers=[Answering(token, code)])
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        assert answers_anybody(f"127.0.0.1:{port}") is is_open
        server.stop(None).wait(10)


def test_the_examples_are_what_they_say() -> None:
    root = Path(__file__).parents[2]
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    docker = (root / "examples/cluster/Dockerfile").read_text()
    named = docker.split("ARG EXTRAS=")[1].splitlines()[0].split(",")
    assert named
    assert set(named) <= set(extras)
    script = root / "examples/cluster/slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    yaml = pytest.importorskip("yaml")
    parts = list(yaml.safe_load_all((root / "examples/cluster/kuberay.yaml").read_text()))
    cluster, volume, policy = parts
    assert cluster["spec"]["authOptions"] == {"mode": "token"}
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        claims = [v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"]]
        assert claims == [volume["metadata"]["name"]]
    assert policy["spec"]["podSelector"]["matchLabels"] == {
        "ray.io/cluster": cluster["metadata"]["name"]
    }


def test_a_folder_apart_from_the_learners_keeps_metrics_and_settings(tmp_path: Path) -> None:
    config = completed(RunConfig(env="catch", total_frames=77, tensorboard=False))
    run = RunDirectory.create(tmp_path / "run", "total_frames = 5")
    rows: list[Any] = []
    with cluster._Copy(run, config) as copy:
        write = copy.wrap(rows.append)
        write({"env_frames": 1})
        assert not run.metrics_path.exists()
        copy.wanted = lambda: True
        write({"env_frames": 2})
    assert rows == [{"env_frames": 1}, {"env_frames": 2}]
    assert '"env_frames": 2' in run.metrics_path.read_text()
    assert tomllib.loads(run.config_path.read_text())["total_frames"] == 77


def test_a_cluster_that_is_no_address() -> None:
    with pytest.raises(ConfigError, match="auto, local or HOST:PORT"):
        ClusterConfig(cluster="remote")


# The learner's own end.


def test_the_run_folder_is_the_drivers_or_a_new_one(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "config.toml").write_text("old")
    (shared / ".seen-1").touch()
    open_run = partial(learner_process.open_run, mark=".seen-1", again=False)
    run, is_shared = open_run(shared, "text", resume=False)
    assert is_shared
    run.rewrite_config("listen = 'somewhere'")
    assert run.config_path.read_text() == "text", "what was found for this life is not kept"

    away = tmp_path / "away"
    run, is_shared = open_run(away, "text", resume=False)
    assert not is_shared
    assert (away / "config.toml").read_text() == "text"
    with pytest.raises(ConfigError, match="not empty"):
        open_run(away, "text", resume=False)
    with pytest.raises(ConfigError, match="not empty"):
        open_run(away, "another run", resume=False, again=True)
    run, is_shared = open_run(away, "text", resume=False, again=True)
    assert run.path == away, "a life that ended before its first checkpoint has made it"
    assert not is_shared
    with pytest.raises(ConfigError, match="file system that all nodes share"):
        open_run(tmp_path / "none", "text", resume=True)


def test_settings_survive_the_way_to_the_learner() -> None:
    config = completed(RunConfig(env="catch", cluster=ClusterConfig(cluster="auto")))
    assert to_toml(from_dict(to_dict(config))) == to_toml(config)
    assert dataclasses.asdict(from_dict(to_dict(config))) == dataclasses.asdict(config)


CHILD = """
import os
from headrace.errors import PeerLost
from headrace.pools.processes import WorkerEnd
end = WorkerEnd.open()
print("a line")
end.status({"cwd": os.getcwd(), "secret": os.environ["A_SECRET"], **end.settings})
try:
    while True:
        end.status({"said": end.receive().decode()})
except PeerLost:
    end.status({"done": 1})
"""


def test_a_keeper_hears_the_last_words_of_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kept_child.py").write_text(CHILD)
    monkeypatch.chdir(Path.cwd())  # put back what the keeper changes
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("A_SECRET", "")
    context = SimpleNamespace(was_current_actor_reconstructed=True)
    ray = SimpleNamespace(get_runtime_context=lambda: context)
    monkeypatch.setitem(sys.modules, "ray", ray)
    keeper = Keeper(
        Order("kept", "kept_child", {}, "a", 1.0),
        {"A_SECRET": "x"},
        paths=[str(tmp_path)],
        folder=str(tmp_path),
    )
    messages: list[Any] = []
    printed: list[str] = []
    codes: list[int | None] = []

    def listen() -> str | None:
        heard = keeper.news(20.0)
        messages.extend(heard.messages)
        printed.extend(heard.printed)
        codes.append(heard.code)
        return heard.death

    while not messages:
        assert listen() is None
    assert messages == [{"cwd": str(tmp_path), "secret": "x", "again": True}]
    keeper.say(b"hello")
    while len(messages) < 2:
        assert listen() is None
    keeper.hang_up()
    death = None
    while death is None:
        death = listen()
    assert messages[1:] == [{"said": "hello"}, {"done": 1}]
    assert "a line" in printed
    assert codes[0] is None
    assert codes[-1] == 0


def test_notes_of_hosts_are_for_the_log(caplog: pytest.LogCaptureFixture) -> None:
    run = Run(node("a")).listening().stepping()
    run.site.hosts()[0].tells({"note": "12 agent steps/s"})
    with caplog.at_level(logging.INFO, logger="headrace"):
        run.turn()
    assert "worker host 0 on a: 12 agent steps/s" in caplog.text
    assert not run.said("12 agent steps/s")


def test_a_life_after_another_listens_where_that_did(tmp_path: Path) -> None:
    kept = tmp_path / ".seen-1.address"

    def listens(listen: str) -> str:
        config = completed(RunConfig(env="catch", remote=RemoteConfig(listen=listen)))
        return learner_process.at_its_address(config, kept).remote.listen

    assert listens("127.0.0.1:0") == "127.0.0.1:0", "it had come to no port"
    kept.write_text("127.0.0.1:5000")
    assert listens("127.0.0.1:0") == "127.0.0.1:5000"
    assert listens("127.0.0.1:0") == "127.0.0.1:0", "once: somebody may have taken it"
    for fixed in ("127.0.0.1:4711", "127.0.0.2:0"):
        kept.write_text("127.0.0.1:5000")
        assert listens(fixed) == fixed
    kept.write_text("[::1]:5000")
    assert listens("[::1]:0") == "[::1]:5000"


def test_what_an_actor_answers_while_ray_restarts_it() -> None:
    ray = FakeRay([])
    member = Member("it")
    member.begin(Site(ray, {}), Order("x", "y", {}, "id-a", 1.0), 0.0)
    assert ray.options[0]["max_restarts"] == -1
    (placed,) = ray.placed
    placed.arrives()
    placed.dies("killed")
    placed.dies("killed")
    assert [heard.death for heard in member.hear(0.0)] == [None]
    assert [heard.death for heard in member.hear(1.0)] == ["killed"]
    assert not member.works
    member.died("killed", 1.0, healthy=False)
    assert member.hear(1.5) == [], "it rests"
    assert not placed.restarts
    assert member.hear(2.5) == [], "not killed yet, and not dead twice"
    assert placed.restarts == 1
    placed.heard.append(ActorUnavailableError("soon"))
    assert member.hear(2.5) == []
    placed.arrives()
    (heard,) = member.hear(3.0)
    assert heard.life == "life 2"
    assert member.works
    placed.heard.append(RayError("The actor is not schedulable.\n\tclass_name: Keeper\n"))
    (heard,) = member.hear(4.0)
    assert heard.death == "The actor is not schedulable. … class_name: Keeper"
    assert placed.killed
    assert not member.placed
