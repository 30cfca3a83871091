"""The live page: what an agent does at this moment, for a browser on the same machine.

    player's thread                       threads of the server, one a connection
      show(picture, numbers) -> newest -> GET /       the document, see live_text.py
                                          GET /frame  waits for a picture newer than ?after=
                                          GET /state  the numbers, as JSON

The server listens at 127.0.0.1 alone. Every request must carry the token of the address that the
user was given, so that other users and other programs of the machine see nothing; and its Host
must be this address, so that no web page can reach it under a name of its own (DNS rebinding).

Nobody holds the player up: it leaves a reference and goes on. Pictures are encoded in the threads
of those who ask; a browser that stalls holds one of a few connections until its time is over.
"""

from __future__ import annotations

import contextlib
import hmac
import io
import json
import math
import re
import secrets
import socket
import socketserver
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qs

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from headrace.errors import ConfigError
from headrace.telemetry.live_text import POLICY, page

_HOST = "127.0.0.1"
_MOST_CONNECTIONS = 16
_STALL_S = 10.0  # silence, or one answer that is not read, after which a connection is closed
_FRAME_WAIT_S = 2.0  # longest wait for a newer picture
_JOIN_S = 2.0
_LOOK_S = 0.05  # between two looks whether the page is being closed
_LOSSLESS_PIXELS = 256 * 256  # up to here PNG: small pictures are drawn with sharp edges

_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Shown(NamedTuple):
    """What there is to see at one moment."""

    number: int  # counts from 1
    picture: NDArray[np.uint8]  # [H, W] grey or [H, W, 3] RGB


class Stage:
    """The newest picture and numbers, between one who shows and many who look."""

    def __init__(self) -> None:
        self._changed = threading.Condition()  # guards all that follows
        self._shown: Shown | None = None
        self._numbers: Mapping[str, float | None] = {}
        self._encoded: tuple[int, str, bytes] | None = None
        self._asked_s = -float("inf")
        self._closed = False

    def show(self, picture: NDArray[np.uint8], numbers: Mapping[str, float | None]) -> None:
        """Replaces what is to be seen; neither argument may change afterwards."""
        with self._changed:
            number = self._shown.number + 1 if self._shown else 1
            self._shown, self._numbers = Shown(number, picture), numbers
            self._changed.notify_all()

    def close(self) -> None:
        """Lets nobody wait any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def asked_s(self) -> float:
        """Returns when a picture was last asked for, by the monotonic clock."""
        with self._changed:
            return self._asked_s

    def numbers(self) -> Mapping[str, float | None]:
        """Returns the newest numbers."""
        with self._changed:
            return self._numbers

    def newer(self, after: int, timeout_s: float) -> tuple[int, str, bytes] | None:
        """Returns number, media type and bytes of the newest picture, once it is not `after`.

        None after `timeout_s`.
        """
        with self._changed:
            self._asked_s = time.monotonic()
            self._changed.wait_for(
                lambda: self._closed or (self._shown and self._shown.number != after), timeout_s
            )
            self._asked_s = time.monotonic()
            shown, encoded = self._shown, self._encoded
        if shown is None or shown.number == after:
            return None
        if encoded is None or encoded[0] != shown.number:
            encoded = (shown.number, *_encode(shown.picture))
            with self._changed:
                self._encoded = encoded
        return encoded


class LivePage:
    """A server of one page, in threads of its own. As a context manager it closes at the end."""

    def __init__(self, title: str, port: int = 0) -> None:
        """Starts to listen.

        Args:
            title: Shown above the picture.
            port: 0 for any that is free.

        Raises:
            ConfigError: the port is taken, or not this user's to take.
        """
        self._stage = Stage()
        token = secrets.token_urlsafe(16)
        try:
            self._server = _Server(port, page(title), token, self._stage)
        except OSError as error:
            raise ConfigError(
                f"port {port} of {_HOST} cannot be opened ({error.strerror}): choose another with "
                "--watch-port, or 0 for any that is free"
            ) from error
        self.port = self._server.server_port
        self.address = f"http://{_HOST}:{self.port}/?token={token}"
        """What the user opens. Whoever has it may look."""
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_LOOK_S,), name="live page", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def show(self, picture: NDArray[np.uint8], numbers: Mapping[str, float | None]) -> None:
        """Replaces what is to be seen; never waits for anybody.

        Args:
            picture: [H, W] grey or [H, W, 3] RGB. It may not change afterwards.
            numbers: Each with its name, as they are shown below; None for one not known yet.
        """
        known = {
            name: value if value is not None and math.isfinite(value) else None  # JSON has no NaN
            for name, value in numbers.items()
        }
        self._stage.show(picture, known)

    def watched(self, within_s: float) -> bool:
        """Whether a browser has asked for a picture in the last `within_s` seconds."""
        return time.monotonic() - self._stage.asked_s() < within_s

    def close(self) -> None:
        """Frees the port, hangs up on everybody and ends the threads; a second call is harmless."""
        self._stage.close()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._server.hang_up()


class _Server(ThreadingHTTPServer):
    """Listens at 127.0.0.1, and knows its connections: their number is bounded."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = _MOST_CONNECTIONS

    def __init__(self, port: int, document: bytes, token: str, stage: Stage) -> None:
        self.document = document
        self.token = token.encode()
        self.stage = stage
        self._connections_lock = threading.Lock()  # guards _connections
        self._connections: dict[socket.socket, threading.Thread] = {}
        super().__init__((_HOST, port), _Handler)
        self.hosts = {f"{name}:{self.server_port}" for name in (_HOST, "localhost")}

    def server_bind(self) -> None:
        """Binds; HTTPServer would ask the name service who 127.0.0.1 is, which may take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = _HOST, self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Starts a thread for a connection, or hangs up where there are too many."""
        thread = threading.Thread(
            target=self.process_request_thread,
            args=(request, client_address),
            name="live page connection",
            daemon=True,
        )
        with self._connections_lock:
            full = len(self._connections) >= _MOST_CONNECTIONS
            if not full:
                self._connections[request] = thread
        if full:
            self.shutdown_request(request)
        else:
            thread.start()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answers one connection until it ends."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._connections_lock:
                self._connections.pop(request, None)

    def hang_up(self) -> None:
        """Ends all connections, and waits for their threads."""
        with self._connections_lock:
            connections = dict(self._connections)
        for connection in connections:
            with contextlib.suppress(OSError):  # it has just ended by itself
                connection.shutdown(socket.SHUT_RDWR)
        until_s = time.monotonic() + _JOIN_S
        for thread in connections.values():
            thread.join(max(0.0, until_s - time.monotonic()))


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version = "headrace"
    sys_version = ""
    timeout = _STALL_S
    disable_nagle_algorithm = True  # else an answer may wait for the acknowledgement of its headers
    server: _Server

    def handle(self) -> None:
        """Answers requests until the other end has had enough."""
        with contextlib.suppress(OSError):  # it left, stalled, or the page was closed
            super().handle()

    def parse_request(self) -> bool:
        """Reads a request, and answers at once if it may not be made."""
        if not super().parse_request():
            return False
        refusal = self._refusal()
        if refusal:
            self.send_error(refusal)
        return not refusal

    def _refusal(self) -> int:
        """Returns the status of a request that is refused; 0 for one that is not."""
        if self.request_version not in ("HTTP/1.0", "HTTP/1.1"):
            return 505
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or hosts[0].lower() not in self.server.hosts:
            return 403
        if self.command != "GET":
            return 405
        tokens = self._query().get("token", [])
        if len(tokens) != 1 or not hmac.compare_digest(tokens[0].encode(), self.server.token):
            return 403
        if "Content-Length" in self.headers or "Transfer-Encoding" in self.headers:
            return 400  # what follows would be read as another request
        return 0

    def do_GET(self) -> None:
        """Answers a request that may be made."""
        path = self.path.partition("?")[0]
        if path == "/":
            self._answer("text/html; charset=utf-8", self.server.document)
        elif path == "/state":
            self._answer("application/json", json.dumps(self.server.stage.numbers()).encode())
        elif path == "/frame":
            after = self._query().get("after", ["0"])[0]
            newest = self.server.stage.newer(
                int(after) if re.fullmatch(r"[0-9]{1,15}", after) else 0, _FRAME_WAIT_S
            )
            if newest is None:
                self.send_response(204)
                self.end_headers()
            else:
                number, media_type, data = newest
                self._answer(media_type, data, {"X-Frame": str(number)})
        else:
            self.send_error(404)

    def _answer(self, media_type: str, data: bytes, more: Mapping[str, str] | None = None) -> None:
        self.send_response(200)
        for name, value in (more or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _query(self) -> dict[str, list[str]]:
        return parse_qs(self.path.partition("?")[2])

    def end_headers(self) -> None:
        """Adds the headers that every answer has."""
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuses, in one line that repeats nothing of the request, and hangs up."""
        name = self.responses.get(code, ("Refused", ""))[0]
        data = f"{code} {name}\n".encode()
        self.send_response(code)
        if code == 405:
            self.send_header("Allow", "GET")
        self.send_header("Connection", "close")
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: addresses have the token in them."""


def _encode(picture: NDArray[np.uint8]) -> tuple[str, bytes]:
    """Returns media type and bytes."""
    height, width = picture.shape[:2]
    image, out = Image.fromarray(np.ascontiguousarray(picture)), io.BytesIO()
    if height * width <= _LOSSLESS_PIXELS:
        image.save(out, "png", compress_level=1)
        return "image/png", out.getvalue()
    image.save(out, "jpeg", quality=85)
    return "image/jpeg", out.getvalue()
