"""The server's end of what goes between machines: one stream of messages per worker host.

What the messages say is the handler's business. This file knows who may come in, and who must go.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from headrace.errors import ConfigError
from headrace.transport import wire
from headrace.transport.auth import Address, ServerTls, server_access, token_interceptor
from headrace.transport.connections import (
    NO_ROOM,
    OVER,
    End,
    Handler,
    HostConnection,
    Refused,
    check_hello,
)
from headrace.transport.diagnosis import bind_fault
from headrace.transport.grpc_common import (
    LOOP,
    METHOD,
    RETRY_KEY,
    call,
    cut,
    import_grpc,
    server_options,
)
from headrace.transport.health import CHECK, add_health, set_health
from headrace.transport.notices import Notices
from headrace.transport.settings import RemoteConfig

COUNTERS = (
    "hosts",  # connected and welcomed, now
    "refused",  # turned away, or gone before they said hello; not who fails in the TLS handshake
    "garbage",  # closed for what they sent
    "lost",  # hosts that were welcomed and went without a BYE
    "bytes_in",
    "bytes_out",
    "messages_in",
    "messages_out",
)

_START_TIMEOUT_S = 30.0
_WATCH_S = 0.5
_FAREWELL_S = 1.0
"""Seconds in which a peer that is closed can still read what was sent to it."""
_CONNECTION_BROKE = "its connection broke"
_MOST_TOLD = 1024  # machines that wait for room, each of which is told of once
_T = TypeVar("_T")


class _TurnedAway(Exception):
    """A stream that is not welcome."""

    def __init__(self, end: End) -> None:
        super().__init__(end.reason)
        self.end = end._replace(reason=cut(end.reason))


class Listener:
    """Waits for worker hosts, checks who they are, and carries their messages."""

    def __init__(
        self,
        config: RemoteConfig,
        handler: Handler,
        *,
        address: str = "",
        on_message: Callable[[str], None],
    ) -> None:
        """Listens at once.

        Args:
            config: Address, token, certificates, caps.
            handler: Gets the messages.
            address: HOST:PORT, port 0 for any free one; empty for `config.listen`, or if that is
                empty too, 127.0.0.1:0.
            on_message: Gets sentences for the log; called in any thread.

        Raises:
            ConfigError: the address cannot be had, or is open to others without token and TLS, or
                a certificate is no good, or a package is missing.
        """
        self._config, self._handler = config, handler
        wanted, self._token, self._tls = server_access(config, address)
        self._grpc = import_grpc()
        wire.check_compression(config.message_compression)
        self._counters = dict.fromkeys(COUNTERS, 0)
        self._streams: set[HostConnection] = set()
        self._server: Any = None  # of gRPC
        self._health: Any = None
        self._closing: End | None = None
        self._fault: BaseException | None = None  # the handler's first
        self._waiting: set[str] = set()  # machines whose hosts wait for room, and that was said
        self._notices = Notices(on_message, now_s=time.monotonic())
        self._close_lock = threading.Lock()  # guards _open
        self._open = True
        self._loop = LOOP.acquire()
        try:
            self._address = call(self._loop, self._start(wanted), timeout_s=_START_TIMEOUT_S)
        except BaseException:
            LOOP.release()
            raise

    @property
    def address(self) -> str:
        """HOST:PORT really bound."""
        return str(self._address)

    @property
    def counters(self) -> Mapping[str, int]:
        """What `COUNTERS` names: hosts now, and the others since the start."""
        return MappingProxyType(self._counters)

    def check(self) -> None:
        """Raises what a method of the handler raised that it should not; for any thread."""
        if self._fault is not None:
            raise self._fault

    def close(self, reason: str = "the server has ended", *, retry: bool = True) -> None:
        """Tells every peer the reason, waits two seconds at most, and gives the port back.

        Not to be called in the handler's methods. A second call does nothing.

        Args:
            reason: The sentence that reaches every peer.
            retry: Whether the hosts should try to come again: not when the run is over.
        """
        with self._close_lock:
            if not self._open:
                return
            self._open = False
        try:
            call(self._loop, self._stop(End(reason, OVER, retry)), timeout_s=10.0)
        finally:
            self._server = self._health = None
            LOOP.release()

    async def _start(self, wanted: Address) -> Address:
        grpc, config = self._grpc, self._config
        self._server = grpc.aio.server(
            options=server_options(
                max_hosts=config.max_hosts, hello_timeout_s=config.hello_timeout_s
            ),
            maximum_concurrent_rpcs=2 * config.max_hosts + 64,
            interceptors=(token_interceptor(self._token, self._refuse, open_to_all={CHECK}),),
        )
        self._health = add_health(self._server)
        self._server.add_generic_rpc_handlers((self._handlers(),))
        try:
            if self._tls is None:
                port = self._server.add_insecure_port(str(wanted))
            else:
                port = self._server.add_secure_port(str(wanted), self._credentials(self._tls))
        except RuntimeError as error:
            fault = bind_fault(wanted) or "another program took it"
            raise ConfigError(f"cannot listen at {wanted}: {fault}") from error
        await self._server.start()
        await set_health(self._health, serving=True)
        self._watcher = asyncio.ensure_future(self._watch())
        return wanted._replace(port=port)

    async def _stop(self, end: End) -> None:
        self._closing = end
        self._watcher.cancel()
        await set_health(self._health, serving=False)
        for stream in self._streams:
            stream.finish(end)
        deadline_s = time.monotonic() + _FAREWELL_S + 0.2
        while self._streams and time.monotonic() < deadline_s:
            await asyncio.sleep(0.01)
        await self._server.stop(grace=0.2)

    def _handlers(self) -> Any:
        grpc = self._grpc
        service, _, session = METHOD[1:].partition("/")
        method = grpc.stream_stream_rpc_method_handler(self._session)
        return grpc.method_handlers_generic_handler(service, {session: method})

    def _credentials(self, tls: ServerTls) -> Any:
        return self._grpc.ssl_server_credentials(
            [(tls.key, tls.cert)],
            tls.client_ca or None,
            require_client_auth=bool(tls.client_ca),
        )

    async def _session(self, _requests: Any, context: Any) -> None:
        """Serves one stream, whose token was checked."""
        address = _peer_address(context)
        try:
            stream, text = await self._admit(address, context)
        except _TurnedAway as turned:
            self._turned_away(address, turned.end)
            await self._abort(context, turned.end)
            return
        try:
            await self._serve(stream, text, context)
        except asyncio.CancelledError:  # gRPC's way to say so
            stream.finish(End(_CONNECTION_BROKE, counter="lost"))
            raise
        finally:
            end = stream.end or End("a fault in the server", "INTERNAL", counter="lost")
            stream.finish(end)
            self._streams.discard(stream)
            self._counters["hosts"] -= 1
            if end.counter:
                self._counters[end.counter] += 1
            if end.counter == "garbage":  # of the others the handler tells
                self._say(f"closed {stream.name}: {end.reason}")
            self._ask(self._handler.gone, stream, end.reason)
        if end.code != "OK":
            await self._abort(context, end)

    async def _admit(self, address: str, context: Any) -> tuple[HostConnection, Mapping[str, Any]]:
        """Returns a stream that is welcome, and the text of its WELCOME.

        Raises:
            _TurnedAway: it is not welcome.
        """
        self._check_room()
        timeout_s = self._config.hello_timeout_s
        try:
            data = await asyncio.wait_for(context.read(), timeout_s)
        except TimeoutError as error:
            raise _TurnedAway(End(f"it did not say hello within {timeout_s:g} s")) from error
        if data is self._grpc.aio.EOF:
            raise _TurnedAway(End("it went before it said hello"))
        self._count_in(data)
        try:
            name, hello = check_hello(data)
            self._check_room()  # others came meanwhile
            stream = HostConnection(f"{name}, {address}", hello, self._loop)
            text = self._ask(self._handler.welcome, stream)
        except (wire.WireError, ConfigError) as error:  # ConfigError: no lz4 here to read it
            raise _TurnedAway(End(str(error), "INVALID_ARGUMENT", False, "garbage")) from error
        except Refused as error:
            code = OVER if error.over else NO_ROOM
            raise _TurnedAway(End(str(error), code, error.retry)) from error
        self._streams.add(stream)
        self._counters["hosts"] += 1
        return stream, text

    def _check_room(self) -> None:
        if self._closing is not None:
            raise _TurnedAway(self._closing)
        if len(self._streams) >= self._config.max_hosts:
            raise _TurnedAway(End(f"there are {self._config.max_hosts} worker hosts already"))

    async def _serve(self, stream: HostConnection, text: Mapping[str, Any], context: Any) -> None:
        """Reads and writes until one of them, or the handler, or the listener, ends the stream."""
        welcome = wire.encode(wire.Kind.WELCOME, text=text)
        reader = asyncio.ensure_future(self._read(stream, context))
        writer = asyncio.ensure_future(self._write(stream, context, welcome))
        try:
            await stream.ended.wait()
            if not writer.done():
                await asyncio.wait([writer], timeout=_FAREWELL_S)
        finally:
            for task in (reader, writer):
                task.cancel()
            results = await asyncio.gather(reader, writer, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):  # a fault of the handler's: gRPC logs it
                raise result

    async def _read(self, stream: HostConnection, context: Any) -> None:
        end = End("a fault in the server", "INTERNAL", counter="lost")
        try:
            while stream.end is None:
                data = await context.read()
                if data is self._grpc.aio.EOF:
                    end = End(_CONNECTION_BROKE, counter="lost")
                    break
                self._count_in(data)
                message = wire.decode(data)
                if message.kind is wire.Kind.BYE:
                    end = End(str(message.text.get("reason", "it said goodbye")), "OK")
                    break
                self._ask(self._handler.take, stream, message)
        except (wire.WireError, ConfigError) as error:  # ConfigError: no lz4 here to read it
            end = End(str(error), "INVALID_ARGUMENT", False, "garbage")
        except self._grpc.aio.BaseError:
            end = End(_CONNECTION_BROKE, counter="lost")
        except asyncio.CancelledError:
            end = End(_CONNECTION_BROKE, counter="lost")
            raise
        finally:
            stream.finish(end)

    async def _write(self, stream: HostConnection, context: Any, welcome: bytes) -> None:
        async def write(data: bytes) -> None:
            await context.write(data)
            self._counters["messages_out"] += 1
            self._counters["bytes_out"] += len(data)

        try:
            await stream.outbox.run(write, first=welcome)
        except self._grpc.aio.BaseError:
            stream.finish(End(_CONNECTION_BROKE, counter="lost"))

    async def _refuse(self, context: Any, fault: str) -> None:
        """Ends a call that did not show the token."""
        end = End(fault, "UNAUTHENTICATED", False)
        self._turned_away(_peer_address(context), end)
        await self._abort(context, end)

    async def _abort(self, context: Any, end: End) -> None:
        """Ends a stream with the sentence; raises what gRPC wants to see."""
        code = getattr(self._grpc.StatusCode, end.code)
        retry = ((RETRY_KEY, "yes" if end.retry else "no"),)
        await context.abort(code, end.reason, retry)

    async def _watch(self) -> None:
        """Looks for peers that do not read."""
        limit_s = self._config.host_timeout_s
        while True:
            await asyncio.sleep(_WATCH_S)
            now_s = time.monotonic()
            for stream in self._streams:
                since_s = stream.outbox.writing_since_s
                if since_s is not None and now_s - since_s > limit_s:
                    stream.finish(End(f"it read nothing for {limit_s:g} s", counter="lost"))

    def _ask(self, method: Callable[..., _T], *args: Any) -> _T:
        """Calls a method of the handler, and notes what it should not have raised."""
        try:
            return method(*args)
        except (wire.WireError, Refused):
            raise
        except BaseException as error:
            self._fault = self._fault or error
            raise

    def _turned_away(self, address: str, end: End) -> None:
        self._counters[end.counter or "refused"] += 1
        if end.code == NO_ROOM and end.retry:  # it asks every few seconds, perhaps for hours
            machine = address.rpartition(":")[0]
            if machine in self._waiting:
                return
            self._waiting = {*self._waiting, machine} if len(self._waiting) < _MOST_TOLD else set()
        self._say(f"refused {address}: {end.reason}")

    def _say(self, line: str) -> None:
        self._notices.say(line, now_s=time.monotonic())

    def _count_in(self, data: bytes) -> None:
        self._counters["messages_in"] += 1
        self._counters["bytes_in"] += len(data)


def check_listen(config: RemoteConfig) -> None:
    """Checks that one could listen, before anything is started.

    Raises:
        ConfigError: see `Listener`.
    """
    address = server_access(config).address
    import_grpc()
    wire.check_compression(config.message_compression)
    fault = bind_fault(address)
    if fault:
        raise ConfigError(f"cannot listen at {address}: {fault}")


def _peer_address(context: Any) -> str:
    """Returns HOST:PORT of the other end; gRPC says ipv4:HOST:PORT or ipv6:%5BHOST%5D:PORT."""
    _, _, address = str(context.peer()).partition(":")
    return address.replace("%5B", "[").replace("%5D", "]")
