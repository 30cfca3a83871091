"""What both ends of gRPC share: its import, its settings, its thread, and queues of bytes.

gRPC's asynchronous half runs in one thread of the process, whatever the count of streams: a thread
per stream made half as many round trips with 32 streams, and a thousand hosts need a thousand of
them.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from headrace.errors import ConfigError, PeerLost
from headrace.run_files import escaped
from headrace.transport import wire

METHOD = "/headrace.Hosts/Session"
"""The one stream of a worker host."""
RETRY_KEY = "headrace-retry"
"""In the metadata at the end of a stream: "yes" if the host may come again, "no" if it should not.
Missing where gRPC, not headrace, ended the stream."""
MAX_REASON = 1000
"""Characters of the sentence that ends a stream."""

KEEPALIVE_S = 20.0
"""Seconds without a byte from the other end after which it is asked for a sign of life."""
KEEPALIVE_TIMEOUT_S = 20.0
"""Seconds that the sign of life may take before the connection is given up."""

_WINDOW_NBYTES = 8 << 20
"""Bytes on their way in one stream before the reader must have read: 50 ms at 160 MB/s. It grows
with what gRPC measures."""
_READ_NBYTES = 1 << 20
"""Bytes that one read from a socket asks for, and at most four times as many."""
_MAX_METADATA_NBYTES = 16 << 10
_JOIN_S = 10.0
"""Seconds that the thread may take to end: it takes longer only if a handler waits in it."""

Options = list[tuple[str, int]]
_T = TypeVar("_T")


class ServerBusy(PeerLost):
    """The server is there, and has no room for this host now."""


class RunOver(PeerLost):
    """The server is there, and its run is over."""


def import_grpc() -> Any:
    """Returns the module grpc, told to write nothing to the terminal: we say what happens.

    Raises:
        ConfigError: it is not installed.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # read when gRPC starts
    try:
        import grpc  # noqa: PLC0415 - an extra
        import grpc.aio  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(
            "worker hosts on other machines need an extra: pip install 'headrace[cluster]'"
        ) from error
    return grpc


def shared_options() -> Options:
    """Returns the settings of gRPC that both ends have."""
    return [
        ("grpc.max_receive_message_length", wire.MAX_NBYTES),
        ("grpc.max_send_message_length", wire.MAX_NBYTES),
        ("grpc.max_metadata_size", _MAX_METADATA_NBYTES),
        ("grpc.absolute_max_metadata_size", _MAX_METADATA_NBYTES),
        ("grpc.keepalive_time_ms", round(KEEPALIVE_S * 1000)),
        ("grpc.keepalive_timeout_ms", round(KEEPALIVE_TIMEOUT_S * 1000)),
        # Newer versions look at this one instead, which is a minute unless set.
        ("grpc.http2.ping_timeout_ms", round(KEEPALIVE_TIMEOUT_S * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.lookahead_bytes", _WINDOW_NBYTES),
        ("grpc.experimental.tcp_read_chunk_size", _READ_NBYTES),
        ("grpc.experimental.tcp_max_read_chunk_size", 4 * _READ_NBYTES),
    ]


def server_options(*, max_hosts: int, hello_timeout_s: float) -> Options:
    """Returns the settings of gRPC for a listener."""
    hello_ms = max(1, round(hello_timeout_s * 1000))
    return [
        *shared_options(),
        ("grpc.so_reuseport", 0),  # with it two servers share a port and each gets half the hosts
        ("grpc.server_handshake_timeout_ms", hello_ms),
        ("grpc.max_connection_idle_ms", hello_ms),  # idle: without a stream
        ("grpc.max_concurrent_streams", 4),  # of one connection
        ("grpc.max_allowed_incoming_connections", 2 * max_hosts + 64),
        ("grpc.http2.max_ping_strikes", 0),  # the other end's keepalive is no reason to hang up
    ]


def channel_options() -> Options:
    """Returns the settings of gRPC for a link."""
    return [
        *shared_options(),
        ("grpc.use_local_subchannel_pool", 1),  # every link has a connection of its own
        ("grpc.enable_http_proxy", 0),  # a proxy for the web is none for a cluster
        ("grpc.enable_retries", 0),  # `HostClient.sessions` tries again, and says so
    ]


def cut(reason: str) -> str:
    """Returns the sentence, short enough for the metadata of a stream, and on one line."""
    line = escaped(" ".join(reason[: 4 * MAX_REASON].split()))
    return line if len(line) <= MAX_REASON else line[: MAX_REASON - 1] + "…"


class Loop:
    """The thread in which gRPC's asynchronous half runs; one for the process, while it is used."""

    def __init__(self) -> None:
        self._users_lock = threading.Lock()  # guards _users, _loop, _thread
        self._users = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def acquire(self) -> asyncio.AbstractEventLoop:
        """Returns the loop, which runs until `release` was called as often as this."""
        with self._users_lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=_run_loop, args=(self._loop,), name="headrace-grpc", daemon=True
                )
                self._thread.start()
            self._users += 1
            return self._loop

    def is_here(self) -> bool:
        """Returns whether the caller runs in that thread, where nothing may wait for it."""
        return threading.current_thread() is self._thread

    def release(self) -> None:
        """Ends the thread if nobody else uses it."""
        with self._users_lock:
            self._users -= 1
            if self._users or self._loop is None or self._thread is None:
                return
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
            loop.call_soon_threadsafe(loop.stop)
            if threading.current_thread() is not thread:
                thread.join(_JOIN_S)


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left, timeout=1.0))
    finally:
        asyncio.set_event_loop(None)
        loop.close()


LOOP = Loop()


def call(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, _T], *, timeout_s: float) -> _T:
    """Runs a coroutine in the loop's thread and returns its result.

    Raises:
        TimeoutError: it took longer; it was cancelled.
    """
    future: Future[_T] = asyncio.run_coroutine_threadsafe(work, loop)
    try:
        return future.result(timeout_s)
    finally:
        future.cancel()


class Outbox:
    """Messages on their way out: any thread puts them in, the loop's thread writes them."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, *, max_nbytes: int, max_messages: int = 4096
    ) -> None:
        self.writing_since_s: float | None = None  # when the write under way began; None: idle
        self._loop = loop
        self._max_nbytes, self._max_messages = max_nbytes, max_messages
        self._lock = threading.Lock()  # guards _queue, _queued, _asleep, _closed
        self._queue: deque[bytes] = deque()
        self._queued = 0  # bytes in _queue
        self._asleep = False
        self._closed = False
        self._filled = asyncio.Event()
        self._loop_thread = 0

    @property
    def load(self) -> float:
        """How full it is, by bytes or by messages: 0 for empty, 1 for full."""
        with self._lock:
            return max(self._queued / self._max_nbytes, len(self._queue) / self._max_messages)

    def put(self, message: bytes) -> bool:
        """Queues a message; False if too much is queued already. After `finish` it is dropped."""
        with self._lock:
            if self._closed:
                return True
            if self._queue and (
                self._queued + len(message) > self._max_nbytes
                or len(self._queue) >= self._max_messages
            ):
                return False
            self._queue.append(message)
            self._queued += len(message)
            wake, self._asleep = self._asleep, False
        if wake:
            self._wake()
        return True

    def finish(self) -> None:
        """Lets `run` return when all that was put in is written."""
        with self._lock:
            self._closed = True
            wake, self._asleep = self._asleep, False
        if wake:
            self._wake()

    async def run(self, write: Callable[[bytes], Awaitable[None]], *, first: bytes = b"") -> None:
        """Writes messages until `finish`; `first` goes before all that was put in."""
        self._loop_thread = threading.get_ident()
        if first:
            await self._write(write, first)
        while True:
            with self._lock:
                message = self._queue.popleft() if self._queue else None
                if message is not None:
                    self._queued -= len(message)
                elif self._closed:
                    return
                else:
                    self._filled.clear()
                    self._asleep = True
            if message is None:
                await self._filled.wait()
            else:
                await self._write(write, message)

    async def _write(self, write: Callable[[bytes], Awaitable[None]], message: bytes) -> None:
        self.writing_since_s = time.monotonic()
        await write(message)
        self.writing_since_s = None

    def _wake(self) -> None:
        if threading.get_ident() == self._loop_thread:
            self._filled.set()
        # The loop is closed only when its last stream is, and then nobody waits for this.
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._filled.set)
