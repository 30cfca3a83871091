"""Who came to the door and did not get in: said in few lines, and counted.

gRPC answers a failed TLS handshake itself and tells nobody. It asks for the server's certificate
once per connection, though: a connection for which it asked and that never opens a stream was one.
"""

from __future__ import annotations

import math
import socket
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from pathlib import Path

_BURST = 10
_INTERVAL_S = 5.0
_LOOK_S = 0.05
_MAX_KNOWN = 1 << 16  # connections


class Notices:
    """Lets ten lines through at once and then one every five seconds; says how many it kept."""

    def __init__(self, on_message: Callable[[str], None], *, now_s: float) -> None:
        self._on_message = on_message
        self._allowed = float(_BURST)
        self._since_s = now_s
        self._kept = 0

    def say(self, line: str, *, now_s: float) -> None:
        """Passes the line on, or counts it."""
        self._allowed = min(_BURST, self._allowed + (now_s - self._since_s) / _INTERVAL_S)
        self._since_s = now_s
        if self._allowed < 1:
            self._kept += 1
            return
        self._allowed -= 1
        more, self._kept = self._kept, 0
        self._on_message(f"{line} ({more} more such lines were left out)" if more else line)


class Doorstep:
    """Connections that began a TLS handshake, until they open a stream or are given up."""

    def __init__(self, *, patience_s: float) -> None:
        """Args are how long a connection may take.

        Args:
            patience_s: From the first byte to the first stream.
        """
        self._patience_s = patience_s
        self._lock = threading.Lock()  # guards all below
        self._looked_s = -math.inf
        self._knocks: deque[float] = deque()  # when; those that are not due yet
        self._owed = 0  # due, and without a stream
        self._early = 0  # streams of connections that are not due yet
        self._waiting: dict[str, float] = {}  # addresses without a stream, since when
        self._known: OrderedDict[str, None] = OrderedDict()  # addresses with a stream

    def knocked(self, look: Callable[[], set[str]], *, now_s: float) -> None:
        """A handshake begins.

        Args:
            look: Returns all addresses that are connected, as far as one can tell. Not called for
                each of many that come at once, since it takes milliseconds where there are many.
            now_s: Of a clock that only goes forward.
        """
        with self._lock:
            self._knocks.append(now_s)
            if now_s - self._looked_s < _LOOK_S:
                return
            self._looked_s = now_s
            for address in look() - self._known.keys():
                self._waiting.setdefault(address, now_s)

    def arrived(self, address: str) -> None:
        """A stream was opened from there."""
        with self._lock:
            if address in self._known:
                return
            self._known[address] = None
            if len(self._known) > _MAX_KNOWN:
                self._known.popitem(last=False)
            self._waiting.pop(address, None)
            self._early += 1

    def overdue(self, *, now_s: float) -> tuple[int, list[str]]:
        """Returns how many connections are given up now, and their addresses where known."""
        with self._lock:
            due = now_s - self._patience_s
            while self._knocks and self._knocks[0] <= due:
                self._knocks.popleft()
                self._owed += 1
            met = min(self._owed, self._early)
            self._early -= met
            count, self._owed = self._owed - met, 0
            old = sorted(each for each, since_s in self._waiting.items() if since_s <= due)
            for address in old:
                del self._waiting[address]
            return count, old[:count]


def connected(port: int) -> set[str]:
    """Returns the addresses connected to a port of this machine; none where it cannot be told.

    Linux has a table of them: local and remote address in hexadecimal, state 1 for established.
    """
    found = set()
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            _, local, remote, state = line.split()[:4]
            if state == "01" and int(local.rpartition(":")[2], 16) == port:
                found.add(_address(remote))
    return found


def _address(text: str) -> str:
    """Returns HOST:PORT of an entry: words of four bytes in the machine's order, colon, port."""
    digits, _, port = text.partition(":")
    words = [
        int(digits[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(digits), 8)
    ]
    packed = b"".join(words)
    if len(packed) == 16 and packed.startswith(bytes(10) + b"\xff\xff"):
        packed = packed[12:]  # IPv4 that came in through IPv6
    if len(packed) == 4:
        return f"{socket.inet_ntop(socket.AF_INET, packed)}:{int(port, 16)}"
    return f"[{socket.inet_ntop(socket.AF_INET6, packed)}]:{int(port, 16)}"
