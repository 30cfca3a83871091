"""The worker host's end: it knows why it is over, comes again when that helps, and gives up."""

import gc
import importlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from headrace.errors import ConfigError, PeerLost
from headrace.transport import grpc_client as client_module
from headrace.transport import wire
from headrace.transport.connections import Refused
from headrace.transport.grpc_client import HostClient
from headrace.transport.grpc_server import Listener
from headrace.transport.settings import LinkConfig

pytestmark = pytest.mark.net

HELLO = {"protocol": wire.VERSION, "name": "node7"}

Listen = Callable[..., Listener]


@pytest.fixture
def book() -> Any:
    return importlib.import_module("tenants").Book()


@pytest.fixture
def wait_until() -> Any:
    return importlib.import_module("tenants").wait_until


@pytest.fixture(autouse=True)
def no_token_and_short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEADRACE_TOKEN", raising=False)
    monkeypatch.setattr(client_module, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(client_module, "_LONGEST_PAUSE_S", 0.05)


@pytest.fixture
def listen(book: Any) -> Iterator[Listen]:
    with importlib.import_module("tenants").listening(book) as listener:
        yield listener


def step(sequence: int) -> bytes:
    arrays = (np.arange(4, dtype=np.float32),)
    return wire.encode(wire.Kind.STEP, sequence=sequence, arrays=arrays)


def answer(link: HostClient) -> int:
    """Returns the number of the next message."""
    message = link.receive(20)
    assert message is not None
    return message.sequence


@pytest.mark.parametrize("name", ["connect_timeout_s", "give_up_s"])
def test_times_must_be_positive(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        LinkConfig(connect="127.0.0.1:1", **{name: 0.0})


def test_nothing_is_lost_or_reordered_with_many_in_flight(listen: Listen) -> None:
    link = HostClient.open(LinkConfig(connect=listen().address), HELLO)
    for sequence in range(500):
        link.send(step(sequence))
    assert [answer(link) for _ in range(500)] == list(range(500))
    assert link.receive(0.0) is None
    link.close()


def test_any_thread_may_send(listen: Listen) -> None:
    link = HostClient.open(LinkConfig(connect=listen().address), HELLO)

    def send(first: int) -> None:
        for sequence in range(first, first + 100):
            link.send(step(sequence))

    threads = [threading.Thread(target=send, args=(1000 * number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    came = [answer(link) for _ in range(500)]
    for thread in threads:
        thread.join()
    assert sorted(came) == [1000 * number + each for number in range(5) for each in range(100)]
    for number in range(5):  # in the order of the thread that sent them
        own = [sequence for sequence in came if sequence // 1000 == number]
        assert own == sorted(own)
    link.close()


def test_close_sends_what_is_queued_and_says_why(
    listen: Listen, book: Any, wait_until: Any
) -> None:
    link = HostClient.open(LinkConfig(connect=listen().address), HELLO)
    for sequence in range(100):
        link.send(step(sequence))
    link.close("the spec differs: observation")
    link.close()
    wait_until(lambda: book.left)
    assert [message.sequence for _, message in book.taken] == list(range(100))
    assert [reason for _, reason in book.left] == ["the spec differs: observation"]
    with pytest.raises(PeerLost, match=r"this end closed|has ended"):
        link.send(step(0))
    assert [answer(link) for _ in range(100)] == list(range(100))  # what had come already
    with pytest.raises(PeerLost):
        link.receive(20)


def test_a_server_that_sends_garbage_is_left(listen: Listen, book: Any) -> None:
    book.take = lambda peer, message: peer.send(b"garbage")
    link = HostClient.open(LinkConfig(connect=listen().address), HELLO)
    link.send(step(0))
    with pytest.raises(PeerLost, match="sent garbage: 7 bytes are no message"):
        link.receive(20)
    with pytest.raises(PeerLost, match="sent garbage"):
        link.send(step(0))
    link.close()


def test_who_queues_more_than_the_server_reads_is_told(
    listen: Listen, book: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_MAX_QUEUED_NBYTES", 64 << 20)
    go_on = threading.Event()
    book.take = lambda peer, message: go_on.wait(20)  # a handler must not, but a machine may stop
    link = HostClient.open(LinkConfig(connect=listen().address), HELLO)
    message = wire.encode(wire.Kind.STEP, arrays=(np.zeros(8 << 20, np.uint8),))

    def send_all() -> None:
        for _ in range(30):
            link.send(message)

    try:
        with pytest.raises(PeerLost, match="does not read: 64 MiB wait for it"):
            send_all()
    finally:
        go_on.set()
        link.close()


def test_no_welcome_in_time_may_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        config = LinkConfig(connect=f"127.0.0.1:{mute.getsockname()[1]}", connect_timeout_s=0.2)
        monkeypatch.setattr("headrace.transport.diagnosis._TIMEOUT_S", 0.2)
        with pytest.raises(PeerLost, match=r"no welcome from 127\.0\.0\.1:.* in 0\.2 s"):
            HostClient.open(config, HELLO)


def test_who_is_stopped_does_not_wait_for_a_welcome() -> None:
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 2

    with socket.create_server(("127.0.0.1", 0)) as mute:
        config = LinkConfig(connect=f"127.0.0.1:{mute.getsockname()[1]}", connect_timeout_s=3600.0)
        assert (
            list(HostClient.sessions(config, HELLO, stop=stop, on_message=lambda line: None)) == []
        )


def test_a_server_of_something_else_is_named() -> None:
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415

    import grpc  # noqa: PLC0415

    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.raises(ConfigError, match="no server of headrace's"):
            HostClient.open(LinkConfig(connect=f"127.0.0.1:{port}"), HELLO)
    finally:
        server.stop(None).wait(10)


def test_an_answer_that_grpc_hides_is_asked_for_again(
    listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener, begin, hidden = listen(), HostClient._begin, []

    def begin_badly(link: HostClient, *arguments: Any) -> None:
        if not hidden:
            hidden.append(1)
            link._code = "INTERNAL"
            raise PeerLost("Internal error from Core")
        begin(link, *arguments)

    monkeypatch.setattr(HostClient, "_begin", begin_badly)
    link = HostClient.open(LinkConfig(connect=listener.address), HELLO)
    assert hidden
    link.close()


# -- sessions


def test_sessions_come_again_after_every_end(listen: Listen, book: Any) -> None:
    listener = listen()
    said: list[str] = []
    config = LinkConfig(connect=listener.address, give_up_s=20.0)
    rounds = 0
    links = HostClient.sessions(
        config, HELLO, stop=lambda: len(book.welcomed) == 4, on_message=said.append
    )
    for link in links:
        link.send(step(rounds))
        assert answer(link) == rounds
        rounds += 1
        if rounds == 2:  # the server goes, and another one comes
            address = listener.address
            listener.close("restarting")
            with pytest.raises(PeerLost, match="restarting"):
                link.receive(20)
            listener = listen(listen=address)
    assert rounds == len(book.welcomed) == 4
    assert book.threads  # it was served


def test_sessions_wait_for_a_server_and_say_why_once(listen: Listen) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    said: list[str] = []
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        if asked == 20:
            listen(listen=address)
        return False

    config = LinkConfig(connect=address, give_up_s=30.0)
    for link in HostClient.sessions(config, HELLO, stop=stop, on_message=said.append):
        assert link.welcome == {"run": "r1"}
        break
    assert len(said) == 1
    assert "nobody listens there" in said[0]
    assert "trying again for 30 s" in said[0]


def test_sessions_give_up_with_the_last_reason(book: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        config = LinkConfig(connect=f"127.0.0.1:{free.getsockname()[1]}", give_up_s=0.2)
    with pytest.raises(PeerLost, match=r"no server for 0.2 s; .*nobody listens there"):
        next(HostClient.sessions(config, HELLO, stop=lambda: False, on_message=book.said.append))


def test_who_waits_for_room_does_not_give_up(listen: Listen, book: Any) -> None:
    listener = listen()
    book.refusal = Refused("every block is taken", retry=True)
    said: list[str] = []

    def stop() -> bool:
        if listener.counters["refused"] == 5:
            book.refusal = None
        return False

    config = LinkConfig(connect=listener.address, give_up_s=1e-9)
    link = next(HostClient.sessions(config, HELLO, stop=stop, on_message=said.append))
    assert link.welcome == {"run": "r1"}
    assert said == [f"{listener.address}: every block is taken; trying again until there is room"]
    assert sum("every block is taken" in line for line in book.said) == 1  # of five
    link.close()


def test_who_comes_when_the_run_is_over_ends_well(listen: Listen, book: Any) -> None:
    listener = listen()
    book.refusal = Refused("the run is over", over=True)
    said: list[str] = []
    config = LinkConfig(connect=listener.address)
    assert (
        list(HostClient.sessions(config, HELLO, stop=lambda: False, on_message=said.append)) == []
    )
    assert said == [f"{listener.address}: the run is over"]


def test_sessions_end_at_once_where_nothing_helps(listen: Listen, book: Any) -> None:
    book.refusal = Refused("this run needs Atari", retry=False)
    with pytest.raises(ConfigError, match="this run needs Atari"):
        next(
            HostClient.sessions(
                LinkConfig(connect=listen().address),
                HELLO,
                stop=lambda: False,
                on_message=book.said.append,
            )
        )


def test_sessions_end_when_the_run_is_over_or_the_host_should_stop(
    listen: Listen, book: Any
) -> None:
    listener = listen()
    config = LinkConfig(connect=listener.address)
    links = HostClient.sessions(config, HELLO, stop=lambda: False, on_message=book.said.append)
    link = next(links)
    listener.close("training is over", retry=False)
    with pytest.raises(PeerLost, match="training is over"):
        link.receive(20)
    assert list(links) == []
    assert (
        list(HostClient.sessions(config, HELLO, stop=lambda: True, on_message=book.said.append))
        == []
    )


def test_sessions_do_not_end_well_for_who_speaks_garbage(listen: Listen, book: Any) -> None:
    config = LinkConfig(connect=listen().address)
    links = HostClient.sessions(config, HELLO, stop=lambda: False, on_message=book.said.append)
    link = next(links)
    link.send(wire.encode(wire.Kind.UNROLL))
    with pytest.raises(PeerLost, match="unrolls are not taken"):
        link.receive(20)
    with pytest.raises(PeerLost, match="do not understand each other"):
        next(links)


def test_pauses_grow_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_FIRST_PAUSE_S", 1.0)
    monkeypatch.setattr(client_module, "_LONGEST_PAUSE_S", 8.0)
    pauses: list[float] = []
    monkeypatch.setattr(client_module, "_wait", lambda seconds, stop: pauses.append(seconds))
    with socket.create_server(("127.0.0.1", 0)) as free:
        config = LinkConfig(connect=f"127.0.0.1:{free.getsockname()[1]}", give_up_s=1000.0)
    assert not list(
        HostClient.sessions(
            config, HELLO, stop=lambda: len(pauses) == 6, on_message=lambda line: None
        )
    )
    shares = np.array(pauses) / (1, 2, 4, 8, 8, 8)
    assert ((shares >= 0.5) & (shares <= 1.5)).all()
    assert len(set(shares.round(6))) > 1


def test_a_link_that_never_was_leaves_nothing_behind() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        config = LinkConfig(connect=f"127.0.0.1:{free.getsockname()[1]}")

    def attempt() -> None:
        with pytest.raises(PeerLost, match="nobody listens"):
            HostClient.open(config, HELLO)

    attempt()
    gc.collect()
    fds, threads = set(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(5):
        attempt()
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) <= fds
    assert threading.active_count() <= threads
