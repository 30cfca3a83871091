"""The server's end: who gets in, and that nobody who should not be there harms anybody else."""

import contextlib
import gc
import importlib
import os
import select
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from headrace.errors import ConfigError, PeerLost
from headrace.transport import grpc_common, wire
from headrace.transport.connections import MAX_QUEUED_NBYTES, Refused
from headrace.transport.grpc_client import HostClient
from headrace.transport.grpc_server import COUNTERS, Listener, check_listen
from headrace.transport.settings import LinkConfig, RemoteConfig

pytestmark = pytest.mark.net

HELLO = {"protocol": wire.VERSION, "name": "node7", "envs": 4}
TOKEN = "a-token-of-some-length"

Listen = Callable[..., Listener]


@pytest.fixture
def tools() -> Any:
    return importlib.import_module("tenants")


@pytest.fixture
def book(tools: Any) -> Any:
    return tools.Book()


@pytest.fixture
def listen(book: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Listen]:
    monkeypatch.delenv("HEADRACE_TOKEN", raising=False)
    with importlib.import_module("tenants").listening(book) as listener:
        yield listener


class Raw:
    """A client that says whatever it likes."""

    def __init__(
        self, listener: Listener, *messages: bytes, wait_for: threading.Event | None = None
    ) -> None:
        self._channel = grpc.insecure_channel(
            listener.address, options=[("grpc.use_local_subchannel_pool", 1)]
        )
        self._stop = threading.Event()
        self._messages = messages
        self._wait_for = wait_for
        call = self._channel.stream_stream(grpc_common.METHOD)
        self.call = call(self._say(), timeout=20)

    def _say(self) -> Iterator[bytes]:
        if self._wait_for is not None:
            self._wait_for.wait(20)
        yield from self._messages
        self._stop.wait(20)

    def end(self) -> tuple[str, str]:
        """Returns status and sentence with which the server ended the stream."""
        with pytest.raises(grpc.RpcError):
            for _ in self.call:
                pass
        return self.call.code().name, self.call.details()

    def close(self) -> None:
        self._stop.set()
        self._channel.close()

    def __enter__(self) -> "Raw":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def join(listener: Listener, name: str = "node7", **config: Any) -> HostClient:
    return HostClient.open(LinkConfig(connect=listener.address, **config), HELLO | {"name": name})


def step(sequence: int = 0, block: int = 0) -> bytes:
    arrays = (np.arange(6, dtype=np.uint8).reshape(2, 3),)
    return wire.encode(wire.Kind.STEP, block=block, sequence=sequence, arrays=arrays)


def check_served(link: HostClient, sequence: int = 5) -> None:
    link.send(step(sequence, block=3))
    message = link.receive(20)
    assert message is not None
    assert (message.kind, message.block, message.sequence) == (wire.Kind.ACTION, 3, sequence)
    np.testing.assert_array_equal(message.arrays[0], [[0, 1, 2], [3, 4, 5]])


def test_a_host_is_welcomed_served_and_missed(book: Any, tools: Any, listen: Listen) -> None:
    listener = listen()
    link = join(listener)
    assert link.welcome == {"run": "r1"}
    (peer,) = book.welcomed
    assert peer.hello == HELLO
    assert peer.name.startswith("node7, 127.0.0.1:")
    for sequence in range(20):
        check_served(link, sequence)
    assert listener.counters["hosts"] == 1
    link.close("enough for today")
    tools.wait_until(lambda: book.left)
    assert book.left == [(peer.name, "enough for today")]
    counters = dict(listener.counters)
    assert set(counters) == set(COUNTERS)
    assert {name: counters[name] for name in ("hosts", "refused", "garbage", "lost")} == {
        "hosts": 0,
        "refused": 0,
        "garbage": 0,
        "lost": 0,
    }
    assert counters["messages_in"] == 22  # hello, steps, bye
    assert counters["messages_out"] == 21  # welcome, actions
    assert counters["bytes_in"] > 20 * len(step())
    assert counters["bytes_out"] > 20 * len(step())
    assert book.said == []


def test_messages_sent_while_welcoming_follow_the_welcome(book: Any, listen: Listen) -> None:
    def welcome(peer: Any) -> dict[str, Any]:
        peer.send(wire.encode(wire.Kind.WEIGHTS, sequence=9))
        return {"run": "r2"}

    book.welcome = welcome
    link = join(listen())
    assert link.welcome == {"run": "r2"}
    message = link.receive(20)
    assert message is not None
    assert (message.kind, message.sequence) == (wire.Kind.WEIGHTS, 9)
    link.close()


def test_a_peer_may_be_closed_out_of_any_method(book: Any, tools: Any, listen: Listen) -> None:
    listener = listen()
    book.take = lambda peer, message: (peer.send(step(1)), peer.close("no more of this"))
    link = join(listener)
    link.send(step())
    last = link.receive(20)  # what was sent before it was closed still comes
    assert last is not None
    assert last.sequence == 1
    with pytest.raises(PeerLost, match="no more of this"):
        link.receive(20)
    with pytest.raises(PeerLost, match="no more of this"):
        link.send(step())
    assert not link.final
    link.close()
    tools.wait_until(lambda: book.left)
    assert [reason for _, reason in book.left] == ["no more of this"]
    assert listener.counters["lost"] == 0


@pytest.mark.parametrize("retry", [True, False])
def test_a_refusal_says_whether_to_come_again(book: Any, listen: Listen, retry: bool) -> None:
    listener = listen()
    book.refusal = Refused("every block is taken", retry=retry)
    with pytest.raises(PeerLost if retry else ConfigError, match="every block is taken"):
        join(listener)
    assert listener.counters["refused"] == 1
    assert (listener.counters["hosts"], book.left) == (0, [])
    assert book.says("refused 127.0.0.1:", "every block is taken")


def test_there_is_a_cap_on_hosts(book: Any, tools: Any, listen: Listen) -> None:
    listener = listen(max_hosts=2)
    first, second = join(listener), join(listener)
    with pytest.raises(PeerLost, match="2 worker hosts already"):
        join(listener)
    first.close()
    tools.wait_until(lambda: listener.counters["hosts"] == 1)
    third = join(listener)
    check_served(third)
    check_served(second)
    for link in (second, third):
        link.close()


def test_the_cap_holds_for_who_says_hello_late(
    listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = listen(max_hosts=1)
    admit, inside = listener._admit, threading.Event()

    async def noted(address: str, context: Any) -> Any:
        inside.set()
        return await admit(address, context)

    monkeypatch.setattr(listener, "_admit", noted)
    go_on = threading.Event()
    with Raw(listener, wire.encode(wire.Kind.HELLO, text=HELLO), wait_for=go_on) as late:
        assert inside.wait(20)  # it is in, and silent
        link = join(listener)
        go_on.set()
        assert "1 worker hosts already" in late.end()[1]
        check_served(link)
    link.close()


@pytest.mark.parametrize(
    ("first", "code", "words", "counter"),
    [
        (b"GET / HTTP/1.0\r\n\r\n", "INVALID_ARGUMENT", "no message", "garbage"),
        (bytes(100), "INVALID_ARGUMENT", "no message of headrace's", "garbage"),
        (step(), "INVALID_ARGUMENT", "not a HELLO", "garbage"),
        (wire.encode(wire.Kind.HELLO, text={"protocol": 1}), "INVALID_ARGUMENT", "name", "garbage"),
        (
            wire.encode(wire.Kind.HELLO, text=HELLO | {"protocol": 99}),
            "FAILED_PRECONDITION",
            "protocol 99",
            "refused",
        ),
    ],
)
def test_who_begins_with_something_else_is_closed_and_counted(
    book: Any, listen: Listen, first: bytes, code: str, words: str, counter: str
) -> None:
    listener = listen()
    good = join(listener)
    with Raw(listener, first) as raw:
        ended, details = raw.end()
    assert ended == code
    assert words in details
    assert listener.counters[counter] == 1
    assert book.says("refused 127.0.0.1:", words)
    check_served(good)
    good.close()
    assert len(book.welcomed) == 1


@pytest.mark.parametrize(
    ("later", "words"),
    [
        (step()[:-1], "announced"),
        (b"", "no message"),
        (wire.encode(wire.Kind.UNROLL), "unrolls are not taken"),
    ],
    ids=["cut short", "empty", "the handler's verdict"],
)
def test_garbage_later_ends_that_stream_alone(
    book: Any, tools: Any, listen: Listen, later: bytes, words: str
) -> None:
    listener = listen()
    good = join(listener, "good")
    bad = join(listener, "bad\x1b[2J")
    bad.send(later)
    with pytest.raises(PeerLost, match=words):
        bad.receive(20)
    bad.close()
    tools.wait_until(lambda: book.left)
    assert len(book.left) == 1
    assert book.left[0][0].startswith(r"bad\x1b[2J, 127.0.0.1:")  # nothing that moves a cursor
    assert listener.counters["garbage"] == 1
    assert book.says(r"closed bad\x1b[2J", words)
    check_served(good)
    good.close()


@pytest.mark.parametrize("method", ["welcome", "take", "gone"])
def test_a_fault_of_the_tenant_reaches_who_asks(
    book: Any, tools: Any, listen: Listen, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    listener = listen()
    good = join(listener, "good")
    listener.check()

    def fail(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(book, method, fail)
    with contextlib.suppress(PeerLost):
        bad = join(listener, "bad")
        bad.send(step())
        bad.close()

    def raised() -> bool:
        try:
            listener.check()
        except ZeroDivisionError:
            return True
        return False

    tools.wait_until(raised)
    monkeypatch.undo()
    check_served(good)
    good.close()


def test_what_peers_say_moves_no_cursor_and_fills_no_log(
    book: Any, tools: Any, listen: Listen
) -> None:
    listener = listen()
    link = join(listener)
    link.close("bye\x1b[2J" + 5000 * "!")
    book.welcome = lambda peer: (_ for _ in ()).throw(Refused("no\x1b[2J" + 10_000_000 * "!"))
    with pytest.raises(ConfigError, match=r"no\\x1b\[2J!") as refused:
        join(listener)
    tools.wait_until(lambda: book.left)
    assert book.left[0][1].startswith(r"bye\x1b[2J!")
    assert book.says(r"no\x1b[2J")
    sentences = [book.left[0][1], *book.said, str(refused.value)]
    assert max(map(len, sentences)) < 1100


def test_compression_that_is_not_installed_is_named_and_no_fault(
    book: Any, listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lz4")
    listener = listen()
    link = join(listener)
    message = wire.encode(wire.Kind.STEP, arrays=(np.zeros(9),), compression="lz4")
    monkeypatch.setitem(sys.modules, "lz4", None)
    link.send(message)
    with pytest.raises(PeerLost, match="needs an extra on every machine: pip install"):
        link.receive(20)
    link.close()
    with Raw(listener, message) as raw:
        assert "needs an extra" in raw.end()[1]
    listener.check()
    assert listener.counters["garbage"] == 2
    with pytest.raises(ConfigError, match="needs an extra on every machine"):
        listen(message_compression="lz4")


def test_what_cannot_be_listened_with_is_known_before_anything_starts(listen: Listen) -> None:
    taken = listen().address
    with pytest.raises(ConfigError, match=f"cannot listen at {taken}: another program listens"):
        check_listen(RemoteConfig(listen=taken))
    with pytest.raises(ConfigError, match="needs a token"):
        check_listen(RemoteConfig(listen="0.0.0.0:0"))
    check_listen(RemoteConfig())


def test_a_message_that_is_too_large_is_not_taken(
    book: Any, listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "MAX_NBYTES", 1 << 16)
    listener = listen()
    monkeypatch.undo()
    link = join(listener)
    link.send(bytes(1 << 17))
    with pytest.raises(PeerLost):
        link.receive(20)
    link.close()
    assert book.taken == []
    check_served(second := join(listener))
    second.close()


def test_who_never_says_hello_is_closed(book: Any, listen: Listen) -> None:
    listener = listen(hello_timeout_s=0.2)
    with Raw(listener) as raw:
        code, details = raw.end()
    assert (code, "within 0.2 s" in details) == ("UNAVAILABLE", True)
    assert listener.counters["refused"] == 1
    assert book.says("refused 127.0.0.1:", "did not say hello")


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


@pytest.mark.parametrize("first", [b"", PREFACE], ids=["silent", "polite"])
def test_a_connection_without_a_stream_is_closed(listen: Listen, first: bytes) -> None:
    host, _, port = listen(hello_timeout_s=0.3).address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=20) as idle:
        idle.sendall(first)
        while read(idle):  # what gRPC says to everybody, and then the end
            pass


def test_there_is_a_cap_on_connections(listen: Listen) -> None:
    """66 for one host; what comes beyond is closed before it says a word."""
    listener = listen(max_hosts=1, hello_timeout_s=120.0)
    host, _, port = listener.address.rpartition(":")
    with contextlib.ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.create_connection((host, int(port)), timeout=20))
            for _ in range(80)
        ]
        ended = set()
        while len(ended) < 14:
            ready, _, _ = select.select([each for each in sockets if each not in ended], [], [], 20)
            assert ready
            ended |= {each for each in ready if not read(each)}
        assert len(ended) == 14


def read(source: socket.socket) -> bytes:
    """Returns what has come; nothing at the end."""
    try:
        return source.recv(1 << 12)
    except ConnectionResetError:
        return b""


def test_who_never_reads_is_closed(book: Any, tools: Any, listen: Listen) -> None:
    listener = listen()
    good = join(listener, "good")
    with Raw(listener, wire.encode(wire.Kind.HELLO, text=HELLO | {"name": "deaf"})):
        deaf = tools.wait_until(lambda: [each for each in book.welcomed if "deaf" in each.name])[0]
        message = bytes(8 << 20)  # one object, however often it is queued
        for _ in range(MAX_QUEUED_NBYTES // len(message) + 4):
            deaf.send(message)
        tools.wait_until(lambda: book.left)
        assert book.left == [(deaf.name, "it does not read: 128 MiB wait for it")]
        assert listener.counters["lost"] == 1
        check_served(good)
    good.close()


def test_who_reads_nothing_for_too_long_is_closed(book: Any, tools: Any, listen: Listen) -> None:
    listen_to = listen(host_timeout_s=0.3)
    with Raw(listen_to, wire.encode(wire.Kind.HELLO, text=HELLO)):
        peer = tools.wait_until(lambda: book.welcomed)[0]
        peer.send(bytes(60 << 20))  # more than fits into windows and sockets
        tools.wait_until(lambda: book.left)
        assert book.left == [(peer.name, "it read nothing for 0.3 s")]


def test_two_cannot_listen_on_one_port(book: Any, listen: Listen) -> None:
    first = listen()
    with pytest.raises(ConfigError, match="another program listens there") as raised:
        listen(listen=first.address)
    assert first.address in str(raised.value)
    assert "\n" not in str(raised.value)
    check_served(link := join(first))
    link.close()


def test_an_address_of_another_machine_is_refused(
    listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_TOKEN", TOKEN)
    with pytest.raises(ConfigError, match="no such address"):
        listen(listen="192.0.2.1:0", insecure=True)  # reserved for documentation


def test_without_grpc_the_fix_is_named(listen: Listen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "grpc", None)
    for attempt in (listen, lambda: HostClient.open(LinkConfig(connect="127.0.0.1:1"), HELLO)):
        with pytest.raises(ConfigError, match="pip install 'headrace\\[cluster\\]'"):
            attempt()


def test_close_tells_every_peer_and_gives_the_port_back(book: Any, listen: Listen) -> None:
    listener = listen()
    links = [join(listener, f"n{number}") for number in range(5)]
    listener.close("the run is over", retry=False)
    listener.close()
    for link in links:
        with pytest.raises(PeerLost, match="the run is over"):
            link.receive(20)
        assert link.final
        link.close()
    assert sorted(reason for _, reason in book.left) == ["the run is over"] * 5
    assert listener.counters["hosts"] == 0
    again = listen(listen=listener.address)
    check_served(link := join(again))
    link.close()


def test_a_fault_of_the_tenant_ends_that_stream_and_is_not_hidden(
    book: Any, tools: Any, listen: Listen, caplog: pytest.LogCaptureFixture
) -> None:
    listener = listen()
    good, bad = join(listener, "good"), join(listener, "bad")
    take = book.take

    def stumble(peer: Any, message: wire.Message) -> None:
        if "bad" in peer.name:
            raise KeyError("a bug")
        take(peer, message)

    book.take = stumble
    bad.send(step())
    with pytest.raises(PeerLost):
        bad.receive(20)
    tools.wait_until(lambda: book.left)
    assert [reason for _, reason in book.left] == ["a fault in the server"]
    assert "a bug" in caplog.text
    check_served(good)
    for link in (good, bad):
        link.close()


def test_the_health_service_answers_on_the_same_port(
    listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_to_all = listen()
    monkeypatch.setenv("HEADRACE_TOKEN", TOKEN)
    guarded = listen()
    request = health_pb2.HealthCheckRequest(service="headrace.Hosts")
    for listener in (open_to_all, guarded):
        with grpc.insecure_channel(listener.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = stub.Check(request, timeout=20)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            watch = stub.Watch(request, timeout=20)
            if listener is guarded:
                with pytest.raises(grpc.RpcError, match="UNAUTHENTICATED"):
                    next(watch)
                with pytest.raises(grpc.RpcError, match="UNAUTHENTICATED"):
                    stub.List(health_pb2.HealthListRequest(), timeout=20)
                assert listener.counters["refused"] == 2
            else:
                assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
                listener.close()
                with pytest.raises(grpc.RpcError):
                    list(watch)


def test_fifty_hosts_at_once(book: Any, tools: Any, listen: Listen) -> None:
    listener = listen()
    links: list[HostClient] = []

    def come(number: int) -> None:
        link = join(listener, f"n{number}")
        for sequence in range(5):
            check_served(link, sequence)
        links.append(link)

    threads = [threading.Thread(target=come, args=(number,)) for number in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(links) == listener.counters["hosts"] == 50
    assert len({name for name, _ in book.taken}) == 50
    assert len(book.threads) == 1  # not one per host
    for link in links:
        link.close()
    tools.wait_until(lambda: len(book.left) == 50)
    assert listener.counters["lost"] == 0


@pytest.mark.parametrize("by_force", [False, True])
def test_nothing_is_left_behind(listen: Listen, by_force: bool) -> None:
    def visit() -> None:
        listener = listen()
        links = [join(listener) for _ in range(3)]
        check_served(links[0])
        if by_force:
            listener.close()
        for link in links:
            link.close()
        listener.close()

    visit()  # what gRPC keeps for good is there now
    gc.collect()
    fds, threads = set(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(3):
        visit()
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) <= fds
    assert threading.active_count() <= threads
    assert "headrace-grpc" not in {thread.name for thread in threading.enumerate()}
