"""A TCP proxy that makes a network bad: late, silent, cut in two, cut short."""

import contextlib
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator

_CHUNK = 1 << 16


class Proxy:
    """Passes bytes from a port of its own to a target, unless told to do worse.

    All of it may be changed while connections are open.
    """

    def __init__(self, target: str) -> None:
        """Listens on loopback at once.

        Args:
            target: HOST:PORT to which each connection is passed on.
        """
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._server = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Condition()  # guards all below
        self._delay_s = 0.0
        self._partitioned = False
        self._cut_after: int | None = None
        self._open = True
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self.connections = 0
        self._start(self._accept)

    @property
    def address(self) -> str:
        """HOST:PORT to connect to."""
        return f"127.0.0.1:{self._server.getsockname()[1]}"

    def delay(self, seconds: float) -> None:
        """Bytes arrive so much later, in each direction."""
        with self._lock:
            self._delay_s = seconds

    def partition(self) -> None:
        """Nothing passes any more, and nobody is told: connections stay open, new ones hang."""
        with self._lock:
            self._partitioned = True

    stall = partition

    def heal(self) -> None:
        """Everything passes again, also what was held back."""
        with self._lock:
            self._partitioned = False
            self._lock.notify_all()

    def truncate(self, nbytes: int) -> None:
        """After so many more bytes towards the target, every connection is cut in the middle."""
        with self._lock:
            self._cut_after = nbytes

    def mend(self) -> bool:
        """Waits for a truncation, after which all passes again. Returns whether there was one."""
        with self._lock:
            return self._lock.wait_for(lambda: self._cut_after is None, 20)

    def cut(self) -> None:
        """Resets every connection now; new ones pass."""
        with self._lock:
            self._cut_after = None
            self._lock.notify_all()
            sockets, self._sockets = self._sockets, set()
        for each in sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends all of it."""
        with self._lock:
            self._open = False
            self._lock.notify_all()
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.cut()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()

    def _start(self, work, *args) -> None:  # type: ignore[no-untyped-def]
        thread = threading.Thread(target=work, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(self._target, timeout=10)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            for each in (near, far):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self.connections += 1
                self._sockets |= {near, far}
            ends = _Ends(near, far)
            self._start(self._pass, near, far, True, ends)
            self._start(self._pass, far, near, False, ends)

    def _pass(self, source: socket.socket, sink: socket.socket, up: bool, ends: "_Ends") -> None:
        """Reads in one thread and writes in another, so that a delay does not cost throughput."""
        late: deque[tuple[float, bytes]] = deque()
        writer = threading.Thread(target=self._write, args=(late, sink, up), daemon=True)
        writer.start()
        data = b"?"
        while data:
            try:
                data = source.recv(_CHUNK)
            except OSError:
                data = b""
            with self._lock:
                late.append((time.monotonic() + self._delay_s, data))
                self._lock.notify_all()
        writer.join()
        ends.done()

    def _write(self, late: deque[tuple[float, bytes]], sink: socket.socket, up: bool) -> None:
        data = b"?"
        with contextlib.suppress(OSError):
            while data:
                with self._lock:
                    self._lock.wait_for(lambda: late or not self._open)
                    if not late:
                        break
                    due_s, data = late.popleft()
                    self._lock.wait_for(lambda: not self._open, max(due_s - time.monotonic(), 0))
                    self._lock.wait_for(lambda: not (self._partitioned and self._open))
                    data, last = self._shortened(data) if up else (data, False)
                sink.sendall(data)
                if last:
                    self.cut()
                    return
            sink.shutdown(socket.SHUT_WR)

    def _shortened(self, data: bytes) -> tuple[bytes, bool]:
        if self._cut_after is None:
            return data, False
        data = data[: self._cut_after]
        self._cut_after -= len(data)
        return data, self._cut_after == 0


class _Ends:
    """The two sockets of a connection, closed when both directions are done."""

    def __init__(self, *sockets: socket.socket) -> None:
        self._sockets = sockets
        self._lock = threading.Lock()  # guards _left
        self._left = 2

    def done(self) -> None:
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            for each in self._sockets:
                each.close()


@contextlib.contextmanager
def proxy(target: str) -> Iterator[Proxy]:
    """Lends a proxy."""
    made = Proxy(target)
    try:
        yield made
    finally:
        made.close()
