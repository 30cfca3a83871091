"""A worker host's end of what goes between machines: one stream of messages to the server."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from headrace.errors import ConfigError, PeerLost
from headrace.transport import wire
from headrace.transport.auth import (
    check_exposure,
    client_tls,
    parse_address,
    read_token,
    token_metadata,
)
from headrace.transport.connections import OVER
from headrace.transport.diagnosis import diagnose
from headrace.transport.grpc_common import (
    LOOP,
    METHOD,
    RETRY_KEY,
    Outbox,
    RunOver,
    ServerBusy,
    call,
    channel_options,
    cut,
    import_grpc,
)
from headrace.transport.settings import LinkConfig

_MAX_QUEUED_NBYTES = 2 * wire.MAX_NBYTES
"""Bytes that may wait on this end, in each direction."""
_START_TIMEOUT_S = 30.0
_FAREWELL_S = 1.0
_FULL_S = 0.01
_UNCLEAR_ATTEMPTS = 4
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 15.0
_STOP_S = 0.1
"""Seconds between two questions whether to stop."""


class HostClient:
    """One stream to the server, from its welcome to its end.

    `send` and `close` may be called in any thread, `receive` in one at a time.
    """

    def __init__(self, config: LinkConfig) -> None:
        """Not for callers: `open` makes links."""
        self._server = parse_address(config.connect, flag="--connect")
        self._config = config
        self._token = read_token(config.token_file)
        self._tls = client_tls(config.tls_ca, config.tls_cert, config.tls_key)
        check_exposure(
            self._server,
            token=self._token,
            tls=self._tls is not None,
            insecure=config.insecure,
            tls_flags="--tls-ca",
        )
        self._grpc = import_grpc()
        self._welcome: dict[str, Any] = {}
        self._welcomed = False
        self._said = self._final = False  # whether the server said why it is over, and for good
        self._code = ""  # of the end, as gRPC names it
        self._incoming: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._nbytes_in = 0  # written by gRPC's thread
        self._nbytes_taken = 0  # written by who receives
        self._lost_lock = threading.Lock()  # guards _lost
        self._lost = ""  # why it is over; set before None goes into _incoming
        self._close_lock = threading.Lock()  # guards _open
        self._open = True
        self._loop = LOOP.acquire()
        self._outbox = Outbox(self._loop, max_nbytes=_MAX_QUEUED_NBYTES)

    @classmethod
    def open(
        cls,
        config: LinkConfig,
        hello: Mapping[str, Any],
        *,
        stop: Callable[[], bool] = lambda: False,
    ) -> HostClient:
        """Connects, says hello, and waits for the welcome.

        Args:
            config: Where to, and by what right.
            hello: Text of the HELLO.
            stop: Whether to wait no longer; asked several times a second.

        Raises:
            ConfigError: no second attempt would mend it: wrong token, other version, certificate,
                or the server says that this host can never fit.
            ServerBusy: there is no room now.
            RunOver: the run ends at this moment.
            PeerLost: it may pass: nobody listens yet; or `stop()` was true.
        """
        for left in reversed(range(_UNCLEAR_ATTEMPTS)):
            link = cls(config)
            try:
                link._begin(hello, stop)
                break
            except BaseException as error:
                link.close()
                # gRPC puts an error of its own in place of the server's answer where that comes
                # while the hello is being written.
                unclear = link._code == "INTERNAL" and not link._said
                if not (unclear and left and isinstance(error, PeerLost)):
                    raise
        return link

    @classmethod
    def sessions(
        cls,
        config: LinkConfig,
        hello: Mapping[str, Any],
        *,
        stop: Callable[[], bool],
        on_message: Callable[[str], None],
    ) -> Iterator[HostClient]:
        """Yields a new link each time that the one before has ended, with growing pauses between.

        The caller uses the link until it is lost and asks for the next; the one before is closed
        here. Ends when `stop()` is true, which is asked several times a second, or when the server
        has ended a link and said not to come again (`HostClient.final`), or says that the run is
        over.

        Args:
            config: Where to; `give_up_s` is counted from the last time that the server was there,
                be it only to say that it has no room now.
            hello: Text of every HELLO.
            stop: Whether the worker host should end.
            on_message: Is told why there is no link, when the reason changes.

        Raises:
            ConfigError: what no second attempt mends.
            PeerLost: the server was away for `give_up_s`, with the last reason; or it took what
                this host said for garbage.
        """
        pause_s, reason = _FIRST_PAUSE_S, ""
        give_up_s = time.monotonic() + config.give_up_s
        while not stop():
            try:
                link = cls.open(config, hello, stop=stop)
            except RunOver as over:
                on_message(str(over))
                return
            except PeerLost as error:
                if stop():
                    return
                until = f"for {config.give_up_s:g} s"
                if isinstance(error, ServerBusy):
                    give_up_s, until = time.monotonic() + config.give_up_s, "until there is room"
                elif time.monotonic() >= give_up_s:
                    raise PeerLost(
                        f"no server for {config.give_up_s:g} s; the last attempt: {error}"
                    ) from error
                if str(error) != reason:
                    reason = str(error)
                    on_message(f"{reason}; trying again {until}")
            else:
                reason, began_s = "", time.monotonic()
                try:
                    yield link
                finally:
                    link.close()
                if link.accused:
                    raise PeerLost(
                        f"{link.lost}: this host and the server do not understand each other"
                    )
                if link.final:
                    return
                give_up_s = time.monotonic() + config.give_up_s
                # A server that ends every link at once is no reason to hurry.
                if time.monotonic() - began_s > _LONGEST_PAUSE_S:
                    pause_s = _FIRST_PAUSE_S
            # Jitter: a thousand hosts that lost one server do not come back in the same moment.
            _wait(min(pause_s * random.uniform(0.5, 1.5), _until(give_up_s)), stop)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    @property
    def welcome(self) -> dict[str, Any]:
        """The text of the server's WELCOME."""
        return self._welcome

    @property
    def server(self) -> str:
        """HOST:PORT of the other end."""
        return str(self._server)

    @property
    def lost(self) -> str:
        """Why the link is over; empty while it is not."""
        return self._lost

    @property
    def final(self) -> bool:
        """Whether the server ended this link and said not to come again."""
        return self._final

    @property
    def accused(self) -> bool:
        """Whether the server ended this link because what came through it was garbage."""
        return self._said and self._code == "INVALID_ARGUMENT"

    @property
    def load(self) -> float:
        """How much is queued of what may be, 0 to 1: who sends a lot waits until there is room."""
        return self._outbox.load

    def send(self, message: bytes) -> None:
        """Queues a message and never waits.

        Raises:
            PeerLost: the server is gone, or does not read; says why.
        """
        if self._lost:
            raise PeerLost(self._lost)
        if not self._outbox.put(message):
            self._lose(f"{self.server} does not read: {_MAX_QUEUED_NBYTES >> 20} MiB wait for it")
            raise PeerLost(self._lost)

    def receive(self, timeout_s: float) -> wire.Message | None:
        """Returns the next message, or None after `timeout_s`.

        Raises:
            PeerLost: the server is gone, or sent garbage; says why.
        """
        try:
            data = self._incoming.get(timeout=max(timeout_s, 0.0))
        except queue.Empty:
            return None
        if data is None:
            self._incoming.put(None)  # for the next call
            raise PeerLost(self._lost)
        self._nbytes_taken += len(data)
        try:
            return wire.decode(data)
        except wire.WireError as error:
            self._lose(f"{self.server} sent garbage: {error}")
            raise PeerLost(self._lost) from error

    def close(self, reason: str = "the worker host has ended") -> None:
        """Sends what is queued, tells the server at once, and waits two seconds at most.

        A second call does nothing. After it `send` and `receive` raise PeerLost.

        Args:
            reason: Reaches the server's log.
        """
        with self._close_lock:
            if not self._open:
                return
            self._open = False
        self._outbox.put(wire.encode(wire.Kind.BYE, text={"reason": reason}))
        self._outbox.finish()
        try:
            if LOOP.is_here():
                # Only when a link that nobody closed is collected as garbage in that thread.
                self._loop.create_task(self._end())
            else:
                call(self._loop, self._end(), timeout_s=10.0)
        finally:
            self._lose(f"this end closed the link: {reason}")
            LOOP.release()

    def _begin(self, hello: Mapping[str, Any], stop: Callable[[], bool]) -> None:
        timeout_s = self._config.connect_timeout_s
        deadline_s = time.monotonic() + timeout_s
        data = wire.encode(wire.Kind.HELLO, text=hello)
        call(self._loop, self._start(data), timeout_s=_START_TIMEOUT_S)
        message = None
        try:
            while message is None and (left_s := _until(deadline_s)):
                if stop():
                    raise PeerLost(f"stopped before {self.server} had answered")
                message = self.receive(min(left_s, _STOP_S))
        except PeerLost as error:
            if stop():
                raise
            raise self._explained(error) from error
        if message is None:
            raise self._explained(PeerLost(f"no welcome from {self.server} in {timeout_s:g} s"))
        if message.kind is not wire.Kind.WELCOME:
            raise PeerLost(f"{self.server} answered with {message.kind.name}, not with a welcome")
        self._welcome, self._welcomed = message.text, True

    async def _start(self, hello: bytes) -> None:
        grpc, options = self._grpc, channel_options()
        target = f"dns:///{self._server}"
        if self._tls is None:
            self._channel: Any = grpc.aio.insecure_channel(target, options=options)
        else:
            ca, cert, key = self._tls
            credentials = grpc.ssl_channel_credentials(ca, key or None, cert or None)
            self._channel = grpc.aio.secure_channel(target, credentials, options=options)
        self._call: Any = self._channel.stream_stream(METHOD)(metadata=token_metadata(self._token))
        self._reader = asyncio.ensure_future(self._read())
        self._writer = asyncio.ensure_future(self._write(hello))

    async def _end(self) -> None:
        if not hasattr(self, "_writer"):
            return  # it never started
        if self._welcomed:
            # First what is queued goes out, BYE last; then the server ends the stream.
            await asyncio.wait([self._writer], timeout=_FAREWELL_S)
            await asyncio.wait([self._reader], timeout=_FAREWELL_S)
        self._call.cancel()
        for task in (self._reader, self._writer):
            task.cancel()
        await asyncio.gather(self._reader, self._writer, return_exceptions=True)
        await self._channel.close()
        self._call = self._channel = None

    async def _read(self) -> None:
        try:
            while True:
                data = await self._call.read()
                if data is self._grpc.aio.EOF:
                    break
                self._nbytes_in += len(data)
                self._incoming.put(data)
                while self._nbytes_in - self._nbytes_taken > _MAX_QUEUED_NBYTES:
                    await asyncio.sleep(_FULL_S)  # whoever receives is slow: the server waits
        except self._grpc.aio.AioRpcError:
            pass  # the code below says it
        code, details = await self._call.code(), await self._call.details()
        retry = dict(await self._call.trailing_metadata() or ()).get(RETRY_KEY)
        self._said, self._final = retry is not None, retry == "no"
        self._code = code.name
        if not self._said and self._code != "OK":
            details = f"the connection broke: {details or self._code}"
        self._lose(f"{self.server}: {cut(details or 'the session has ended')}")

    async def _write(self, hello: bytes) -> None:
        # What ends the stream is what the reader hears.
        aio = self._grpc.aio
        with contextlib.suppress(aio.BaseError, aio.AioRpcError, asyncio.InvalidStateError):
            await self._outbox.run(self._call.write, first=hello)
            await self._call.done_writing()

    def _lose(self, reason: str) -> None:
        """Notes why it is over, the first time, and wakes whoever receives."""
        with self._lost_lock:
            if self._lost:
                return
            self._lost = reason
        self._outbox.finish()
        self._incoming.put(None)

    def _explained(self, error: PeerLost) -> ConfigError | PeerLost:
        """Returns why there was no welcome, and by its type whether another attempt may help."""
        if self._final and self._code == OVER:
            return RunOver(str(error))
        if self._final:
            return ConfigError(f"refused by {error}")
        if self._said:
            return ServerBusy(str(error))
        config = self._config
        found = diagnose(self._server, ca=config.tls_ca, cert=config.tls_cert, key=config.tls_key)
        if self._code == "UNIMPLEMENTED":
            return ConfigError(f"at {self.server} there is no server of headrace's")
        if not found.reason:
            return error
        sentence = f"cannot connect to {self.server}: {found.reason}"
        return PeerLost(sentence) if found.retry else ConfigError(sentence)


def _until(moment_s: float) -> float:
    return max(moment_s - time.monotonic(), 0.0)


def _wait(seconds: float, stop: Callable[[], bool]) -> None:
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s and not stop():
        time.sleep(min(_STOP_S, _until(end_s)))
