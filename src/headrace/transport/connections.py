"""A worker host, seen from the listener: its name, what it said, and the stream to it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from headrace import __version__
from headrace.errors import HeadraceError
from headrace.run_files import escaped
from headrace.transport import wire
from headrace.transport.grpc_common import Outbox, cut

MAX_QUEUED_NBYTES = 2 * wire.MAX_NBYTES
"""Bytes that may wait for one peer before it is closed because it does not read."""


class Refused(HeadraceError):
    """A host is turned away; the sentence reaches it."""

    def __init__(self, reason: str, *, retry: bool = False, over: bool = False) -> None:
        """Args are the sentence, and what the host should make of it.

        Args:
            reason: What the host is told.
            retry: There is no room now (the host tries again), or it can never fit (it ends).
            over: It is nobody's fault: there is nothing left to do (the host ends well).
        """
        super().__init__(reason)
        self.retry, self.over = retry, over


class Handler(Protocol):
    """What is served.

    Called in the one thread of all peers, so one call at a time; none may wait for anything,
    because the others wait meanwhile. What a method raises that it should not ends the peer's
    stream, and reaches whoever calls `Listener.check`.
    """

    def welcome(self, peer: HostConnection) -> Mapping[str, Any]:
        """Returns the text of the WELCOME. Token, version and HELLO were checked before.

        What is sent to the peer from here on follows the WELCOME.

        Raises:
            Refused: the peer is turned away with that sentence; `gone` is not called.
        """

    def take(self, peer: HostConnection, message: wire.Message) -> None:
        """Takes a further message; a BYE is not passed on, its reason reaches `gone`.

        Nothing comes from a peer that was closed.

        Raises:
            WireError: the message is garbage; the peer is closed and counted.
        """

    def gone(self, peer: HostConnection, reason: str) -> None:
        """Called once for every peer that was welcomed, when it is gone or the listener closes."""


NO_ROOM = "FAILED_PRECONDITION"
"""Status of a stream whose host does not fit in, now or ever."""
OVER = "UNAVAILABLE"
"""Status of a stream that ends, and is not to be opened again, by no fault of the host's."""


class End(NamedTuple):
    """How a stream ended."""

    reason: str
    code: str = "UNAVAILABLE"  # name of a gRPC status; OK: by the host's own wish
    retry: bool = True  # whether the host may come again
    counter: str = ""  # of the listener: what it counts as


class HostConnection:
    """A worker host that is connected; one stream. Any thread may call, and none ever waits."""

    def __init__(self, name: str, hello: dict[str, Any], loop: asyncio.AbstractEventLoop) -> None:
        self.name = name
        """What it calls itself, and its address: "node7, 10.0.0.3:4711"."""
        self.hello = hello
        """The text of its HELLO."""
        self.outbox = Outbox(loop, max_nbytes=MAX_QUEUED_NBYTES)
        self.ended = asyncio.Event()
        self.end: End | None = None
        self._loop = loop
        self._end_lock = threading.Lock()  # guards end

    def send(self, message: bytes) -> None:
        """Queues a message; a host that does not read is closed."""
        if not self.outbox.put(message):
            nbytes = MAX_QUEUED_NBYTES >> 20
            self.finish(End(f"it does not read: {nbytes} MiB wait for it", counter="lost"))

    def close(self, reason: str, *, retry: bool = True) -> None:
        """Ends the stream with that sentence, after what was sent before.

        Also out of the handler's methods. `gone` is called a little later.

        Args:
            reason: Reaches the host, and the handler's `gone`.
            retry: Whether the host should try to come again.
        """
        self.finish(End(reason, retry=retry))

    def finish(self, end: End) -> None:
        """Ends the stream, the first time."""
        with self._end_lock:
            if self.end is not None:
                return
            self.end = end._replace(reason=cut(end.reason))  # part of it may be the host's
        self.outbox.finish()
        # The loop outlives every stream that somebody waits for.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.ended.set)


def check_hello(data: bytes) -> tuple[str, dict[str, Any]]:
    """Returns what a host calls itself, and all that it says.

    Raises:
        WireError: it is no HELLO.
        Refused: it is one of another version.
    """
    message = wire.decode(data)
    if message.kind is not wire.Kind.HELLO:
        raise wire.WireError(f"the first message is a {message.kind.name}, not a HELLO")
    name = message.text.get("name")
    if not isinstance(name, str) or not name:
        raise wire.WireError("a HELLO without a name")
    protocol = message.text.get("protocol")
    if protocol != wire.VERSION:
        raise Refused(
            f"it speaks protocol {str(protocol)[:20]}, this server (headrace {__version__}) "
            f"{wire.VERSION}: install the same headrace on both"
        )
    return escaped(name[:64]), message.text  # into logs it goes
