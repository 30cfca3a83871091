"""What a bad network does to a worker host and its server: named, bounded, and never spoilt."""

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace.errors import PeerLost
from headrace.transport import grpc_client as client_module
from headrace.transport import grpc_common, wire
from headrace.transport.grpc_client import HostClient
from headrace.transport.grpc_server import Listener
from headrace.transport.settings import LinkConfig

pytestmark = pytest.mark.net

HELLO = {"protocol": wire.VERSION, "name": "node7"}
NBYTES = 1 << 20  # of an observation: many segments, and more than one read

Listen = Callable[..., Listener]


@pytest.fixture
def book() -> Any:
    return importlib.import_module("tenants").Book()


@pytest.fixture
def wait_until() -> Any:
    return importlib.import_module("tenants").wait_until


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEADRACE_TOKEN", raising=False)
    monkeypatch.setattr(client_module, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(client_module, "_LONGEST_PAUSE_S", 0.1)


@pytest.fixture
def listen(book: Any) -> Iterator[Listen]:
    with importlib.import_module("tenants").listening(book) as listener:
        yield listener


def step(sequence: int, nbytes: int = NBYTES) -> bytes:
    """Returns a message whose bytes all tell its number."""
    arrays = (np.full(nbytes, sequence % 251, np.uint8),)
    return wire.encode(wire.Kind.STEP, sequence=sequence, arrays=arrays)


def check_answer(link: HostClient, sequence: int) -> None:
    message = link.receive(30)
    assert message is not None
    assert message.sequence == sequence
    assert (message.arrays[0] == sequence % 251).all()


def test_fifty_ms_hide_behind_messages_in_flight(
    listen: Listen, make_proxy: Any, book: Any
) -> None:
    proxy = make_proxy(listen().address)
    proxy.delay(0.05)
    began_s = time.monotonic()
    link = HostClient.open(LinkConfig(connect=proxy.address), HELLO)
    for sequence in range(20):
        link.send(step(sequence))
    for sequence in range(20):
        check_answer(link, sequence)
    assert time.monotonic() - began_s > 0.1  # it was late indeed
    link.close()
    assert [message.sequence for _, message in book.taken] == list(range(20))


def test_a_stall_shorter_than_the_keepalive_does_no_harm(
    listen: Listen, make_proxy: Any, wait_until: Any, book: Any
) -> None:
    listener = listen()
    proxy = make_proxy(listener.address)
    link = HostClient.open(LinkConfig(connect=proxy.address), HELLO)
    proxy.stall()
    for sequence in range(3):
        link.send(step(sequence))
    assert link.receive(0.2) is None
    proxy.heal()
    for sequence in range(3):
        check_answer(link, sequence)
    link.close("enough")
    wait_until(lambda: book.left)
    assert book.left[0][1] == "enough"
    assert (proxy.connections, listener.counters["lost"]) == (1, 0)


@pytest.fixture
def short_keepalive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_common, "KEEPALIVE_S", 0.3)
    monkeypatch.setattr(grpc_common, "KEEPALIVE_TIMEOUT_S", 0.3)


@pytest.mark.slow
@pytest.mark.usefixtures("short_keepalive")
def test_quiet_hosts_are_not_taken_for_dead(listen: Listen, make_proxy: Any) -> None:
    """Many keepalives without a message: neither end may hang up for too many pings."""
    listener = listen()
    link = HostClient.open(LinkConfig(connect=listener.address), HELLO)
    assert link.receive(6.0) is None
    link.send(step(1))
    check_answer(link, 1)
    link.close()
    assert listener.counters["lost"] == 0


@pytest.mark.usefixtures("short_keepalive")
def test_a_partition_is_noticed_by_both_and_heals(
    listen: Listen, make_proxy: Any, wait_until: Any, book: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = listen()
    proxy = make_proxy(listener.address)
    config = LinkConfig(connect=proxy.address, connect_timeout_s=0.5, give_up_s=60.0)
    monkeypatch.setattr("headrace.transport.diagnosis._TIMEOUT_S", 0.2)
    said: list[str] = []

    def heal(line: str) -> None:
        said.append(line)
        proxy.heal()

    links = HostClient.sessions(config, HELLO, stop=lambda: False, on_message=heal)
    first = next(links)
    first.send(step(0))
    check_answer(first, 0)
    proxy.partition()
    first.send(step(1))  # never arrives, or is never answered
    with pytest.raises(PeerLost, match="the connection broke"):
        first.receive(30)
    wait_until(lambda: book.left)  # the server has noticed too
    assert book.left[0][1] == "its connection broke"
    assert listener.counters["lost"] == 1
    assert book.said == []  # the handler tells
    second = next(links)
    for sequence in range(2, 5):
        second.send(step(sequence))
    for sequence in range(2, 5):
        check_answer(second, sequence)
    links.close()
    assert len(said) == 1
    assert "no welcome from" in said[0]
    by_second = [m.sequence for name, m in book.taken if name == book.welcomed[-1].name]
    assert by_second == [2, 3, 4]  # nothing of the session before


@pytest.mark.parametrize("where", ["in a message", "in the header of a frame"])
def test_a_connection_cut_in_a_message_delivers_none_of_it(
    listen: Listen, make_proxy: Any, wait_until: Any, book: Any, where: str
) -> None:
    listener = listen()
    proxy = make_proxy(listener.address)
    link = HostClient.open(LinkConfig(connect=proxy.address), HELLO)
    link.send(step(0))
    check_answer(link, 0)
    proxy.truncate(NBYTES // 2 if where == "in a message" else 5)
    link.send(step(1))
    with pytest.raises(PeerLost, match="the connection broke"):
        link.receive(30)
    link.close()
    wait_until(lambda: book.left)
    assert [message.sequence for _, message in book.taken] == [0]
    assert (listener.counters["lost"], listener.counters["garbage"]) == (1, 0)
    again = HostClient.open(LinkConfig(connect=proxy.address), HELLO) if proxy.mend() else None
    assert again is not None
    again.send(step(2))
    check_answer(again, 2)
    again.close()


def test_connections_that_are_reset_come_again(listen: Listen, make_proxy: Any) -> None:
    proxy = make_proxy(listen().address)
    config = LinkConfig(connect=proxy.address, give_up_s=60.0)
    links = HostClient.sessions(config, HELLO, stop=lambda: False, on_message=lambda line: None)
    for sequence in range(5):
        link = next(links)
        link.send(step(sequence))
        check_answer(link, sequence)
        proxy.cut()
        with pytest.raises(PeerLost):
            link.receive(30)
    assert proxy.connections == 5
    links.close()


CHILD = """
import sys
from headrace.transport.grpc_client import HostClient
from headrace.transport.settings import LinkConfig
link = HostClient.open(LinkConfig(connect=sys.argv[1]), {"protocol": 1, "name": "child"})
print("in", flush=True)
link.receive(60)
"""


def test_a_host_that_is_killed_is_missed_at_once(
    listen: Listen, wait_until: Any, book: Any
) -> None:
    listener = listen()
    other = HostClient.open(LinkConfig(connect=listener.address), HELLO)
    source = Path(grpc_common.__file__).parents[2]
    command = [sys.executable, "-c", CHILD, listener.address]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(source)}
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"in\n"
        os.kill(child.pid, signal.SIGKILL)
    wait_until(lambda: book.left)
    ((name, reason),) = book.left
    assert name.startswith("child, 127.0.0.1:")
    assert reason == "its connection broke"
    assert (listener.counters["hosts"], listener.counters["lost"]) == (1, 1)
    other.send(step(3))
    check_answer(other, 3)
    other.close()


SERVER = """
import sys
from headrace.transport.grpc_server import Listener
from headrace.transport.settings import RemoteConfig
assert "grpc" not in sys.modules  # before it is needed
class Handler:
    def welcome(self, peer): return {}
    def take(self, peer, message): pass
    def gone(self, peer, reason): pass
listener = Listener(RemoteConfig(), Handler(), on_message=print)
print(listener.address, flush=True)
sys.stdin.read()
listener.close("a clean end")
"""


@pytest.mark.parametrize("killed", [True, False])
def test_a_server_that_ends_or_is_killed_is_missed_at_once(killed: bool) -> None:
    source = Path(grpc_common.__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(source)},
        text=True,
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        assert server.stderr is not None
        link = HostClient.open(LinkConfig(connect=server.stdout.readline().strip()), HELLO)
        if killed:
            os.kill(server.pid, signal.SIGKILL)
        else:
            server.stdin.close()
        with pytest.raises(PeerLost, match="connection broke" if killed else "a clean end"):
            link.receive(30)
        link.close()
        assert server.wait(30) == (-signal.SIGKILL if killed else 0)
        assert server.stderr.read() == ""  # gRPC keeps quiet
