"""What tests of the transport share: a handler that keeps books, certificates, and how to wait."""

import datetime
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import trustme

from headrace.transport import wire
from headrace.transport.connections import HostConnection, Refused
from headrace.transport.grpc_server import Listener
from headrace.transport.settings import RemoteConfig

HELLO = {"protocol": wire.VERSION, "name": "node7", "envs": 4}


class Book:
    """Welcomes everybody, answers each STEP with an ACTION of the same arrays, notes the rest."""

    def __init__(self) -> None:
        self.welcomed: list[HostConnection] = []
        self.taken: list[tuple[str, wire.Message]] = []
        self.left: list[tuple[str, str]] = []
        self.said: list[str] = []
        self.refusal: Refused | None = None
        self.threads: set[str] = set()

    def welcome(self, peer: HostConnection) -> Mapping[str, Any]:
        if self.refusal is not None:
            raise self.refusal
        self.welcomed.append(peer)
        return {"run": "r1"}

    def take(self, peer: HostConnection, message: wire.Message) -> None:
        self.threads.add(threading.current_thread().name)
        if message.kind is wire.Kind.UNROLL:
            raise wire.WireError("unrolls are not taken here")
        self.taken.append((peer.name, message))
        if message.kind is wire.Kind.STEP:
            peer.send(
                wire.encode(
                    wire.Kind.ACTION,
                    block=message.block,
                    sequence=message.sequence,
                    arrays=message.arrays,
                )
            )

    def gone(self, peer: HostConnection, reason: str) -> None:
        self.left.append((peer.name, reason))

    def says(self, *words: str) -> bool:
        """Whether one line of the log has all the words."""
        return any(all(word in line for word in words) for line in self.said)


@contextmanager
def listening(book: Book) -> Iterator[Callable[..., Listener]]:
    """Lends what starts listeners for the book by fields of `RemoteConfig`, and closes them."""
    with ExitStack() as stack:

        def listener(**config: Any) -> Listener:
            made = Listener(RemoteConfig(**config), book, on_message=book.said.append)
            stack.callback(made.close)
            return made

        yield listener


def wait_until(fact: Callable[[], Any], seconds: float = 20.0) -> Any:
    """Returns what `fact` says as soon as it is true."""
    deadline_s = time.monotonic() + seconds
    while not (value := fact()):
        assert time.monotonic() < deadline_s, "it never became true"
        time.sleep(0.005)
    return value


class Files:
    """Certificates of a CA of its own, as files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._authority = trustme.CA()
        self.ca = self._write("ca.pem", [self._authority.cert_pem])
        self.cert, self.key = self.pair("server", "127.0.0.1", "localhost")

    def pair(
        self, stem: str, *names: str, days: int = 30, begins: datetime.datetime | None = None
    ) -> tuple[str, str]:
        """Returns the files of a certificate and its key; with negative days it has expired."""
        ends = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
        begins = begins or _LONG_AGO
        made = self._authority.issue_cert(*names, not_after=ends, not_before=begins)
        cert = self._write(f"{stem}.pem", made.cert_chain_pems)
        return cert, self._write(f"{stem}.key", [made.private_key_pem])

    def _write(self, name: str, blobs: list[Any]) -> str:
        path = self._folder / name
        path.write_bytes(b"".join(blob.bytes() for blob in blobs))
        return str(path)


_LONG_AGO = datetime.datetime(2001, 1, 1, tzinfo=datetime.UTC)
