"""Weights of version n go from the learner to worker hosts, whole or not at all.

    host     asks with the version it has ──▶ learner
    learner  has a newer one, or once it has: reads its weights, and cuts them into chunks
    host     takes a chunk, asks for the next ──▶ … after the last acts with them, and asks anew

So the learner reads its weights only when somebody wants them, once for all who do; and a host has
never more than one chunk under way, however slow it is: what was published meanwhile is skipped.
Tensors travel as the bytes that they are, in the hosts' precision.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch
from torch import nn

from headrace.errors import PeerLost
from headrace.transport import wire
from headrace.transport.wire import Kind, Message, WireError
from headrace.weights import FlatWeights, Weights, acting_tensors, checksum

CHUNK_NBYTES = 8 << 20
_BUSY_SHARE = 0.1  # of a learner's time that may go into reading weights for others
_MOST_TORN = 3


def encode_weights(flat: FlatWeights) -> list[bytes]:
    """Returns the messages with the weights in `flat`."""
    version, row = int(flat.version[0]), flat.row
    starts = range(0, len(row), CHUNK_NBYTES)
    about = {"chunks": len(starts), "sum": checksum(row)}
    return [
        wire.encode(
            Kind.WEIGHTS,
            block=place,
            sequence=version,
            text=about,
            arrays=[row[start : start + CHUNK_NBYTES]],
        )
        for place, start in enumerate(starts)
    ]


class OfferedWeights:
    """The learner's end. Its thread publishes; any thread asks."""

    def __init__(
        self,
        model: nn.Module,
        *,
        send: Callable[[int, bytes], None],
        local: Weights | None = None,
        now_s: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Offers nothing yet.

        Args:
            model: Like the hosts': shapes and dtypes.
            send: Hands a message to a host, by its number, without waiting.
            local: Weights of a server in this process (evaluation), published along with these.
            now_s: The clock.
        """
        self._flat = FlatWeights(model)
        self._send, self._local, self._now_s = send, local, now_s
        self._newest: tuple[nn.Module, int] | None = None
        self._not_before_s = -float("inf")
        self._encoded: list[bytes] = []
        self._encoded_version = -1
        self._asked_lock = threading.Lock()  # guards _asked, _sets and _newest_version
        self._asked: dict[int, int] = {}  # hosts that want newer weights, with what they have
        self._sets: dict[int, list[bytes]] = {}  # what hosts are in the middle of
        self._newest_version = -1
        self.reads = 0
        """How often the learner's weights were read."""

    @property
    def newest_version(self) -> int:
        """Of the weights published last; -1 for none."""
        return self._newest_version

    def publish(self, learner_model: nn.Module, version: int) -> None:
        """Notes that there are newer weights, and hands them out if somebody waits.

        They are the learner's own until its next update: a host that asks until then is answered by
        `attend`. Reading them, for which a GPU is waited for, takes a tenth of the learner's time
        at most.
        """
        if self._local is not None:
            self._local.publish(learner_model, version)
        self._newest = learner_model, version
        with self._asked_lock:
            self._newest_version = version
        if self._now_s() >= self._not_before_s:
            self.attend()

    def attend(self) -> None:
        """Answers all who want what is newest. For the learner's thread, between two updates."""
        if self._newest is None:
            return
        model, version = self._newest
        with self._asked_lock:
            waiting = [host for host, has in self._asked.items() if has < version]
        if not waiting:
            return
        before_s = self._now_s()
        if self._encoded_version != version:
            with torch.no_grad():
                torch._foreach_copy_(self._flat.tensors, acting_tensors(model))
            self._flat.version[0] = version
            self._encoded, self._encoded_version = encode_weights(self._flat), version
            self.reads += 1
        for host in waiting:
            with self._asked_lock:
                if self._asked.pop(host, None) is None:
                    continue  # gone meanwhile
                self._sets[host] = self._encoded
            self._send(host, self._encoded[0])
        spent_s = self._now_s() - before_s
        self._not_before_s = before_s + spent_s / _BUSY_SHARE

    def ask(self, host: int, *, version: int, chunk: int) -> bool:
        """Takes a host's wish; returns whether it waits for the learner's thread.

        Args:
            host: Its number.
            version: Of the weights it has; -1 for none.
            chunk: That it wants next of the set that it is in the middle of; 0 for a newer set.

        Raises:
            WireError: there is no such chunk.
        """
        with self._asked_lock:
            if not chunk:
                self._sets.pop(host, None)
                self._asked[host] = version
                return version < self._newest_version
            chunks = self._sets.get(host, [])
            if chunk >= len(chunks):
                raise WireError(f"chunk {chunk} of weights was asked for, out of {len(chunks)}")
            message = chunks[chunk]
        self._send(host, message)
        return False

    def forget(self, host: int) -> None:
        """Strikes a host off that is gone."""
        with self._asked_lock:
            self._asked.pop(host, None)
            self._sets.pop(host, None)

    def pull(self) -> int:
        """For the server in this process: see `Weights.pull`."""
        if self._local is None:
            raise RuntimeError("no server in this process was announced")
        return self._local.pull()


class FollowedWeights:
    """A host's end: a model that follows the learner's. For one thread."""

    def __init__(
        self, model: nn.Module, *, send: Callable[[bytes], None], listen: Callable[[float], None]
    ) -> None:
        """Follows with `model`, at version -1; asks at once.

        Args:
            model: That acts.
            send: Hands a message to the learner.
            listen: Takes what has come, for so many seconds; chunks of weights go to `take`.
        """
        self._flat = FlatWeights(model)
        self._target = acting_tensors(model)
        self._send, self._listen = send, listen
        self._version = -1
        self._next = 0  # chunk
        self._coming = -1  # version that the chunks so far are of
        self._torn = 0
        self._ask()

    def pull(self) -> int:
        """Takes what has come; returns the version that the model has."""
        self._listen(0.0)
        return self._version

    def take(self, message: Message) -> None:
        """Takes a chunk; after the last one the model has the set.

        A set that is not whole is thrown away and asked for again.

        Raises:
            PeerLost: that has happened several times in a row.
        """
        if not self._fits(message):
            self._torn += 1
            if self._torn == _MOST_TORN:
                raise PeerLost(f"the learner's weights came torn {_MOST_TORN} times in a row")
            self._next = 0
            self._ask()
            return
        start = self._next * CHUNK_NBYTES
        (chunk,) = message.arrays
        self._flat.row[start : start + len(chunk)] = chunk
        self._coming = message.sequence
        self._next += 1
        if self._next < message.text["chunks"]:
            self._ask()
            return
        self._next = 0
        if checksum(self._flat.row) != message.text["sum"]:
            self.take(message._replace(arrays=()))  # as any other that does not fit
            return
        with torch.no_grad():
            torch._foreach_copy_(self._target, self._flat.tensors)
        self._version, self._torn = message.sequence, 0
        self._ask()

    def _fits(self, message: Message) -> bool:
        """Whether a message is the chunk that was asked for."""
        start = self._next * CHUNK_NBYTES
        row = self._flat.row[start : start + CHUNK_NBYTES]
        chunks = -(-len(self._flat.row) // CHUNK_NBYTES)
        return (
            message.block == self._next
            and (not self._next or message.sequence == self._coming)
            and message.text.get("chunks") == chunks
            and isinstance(message.text.get("sum"), int)
            and [(array.dtype, array.shape) for array in message.arrays] == [(row.dtype, row.shape)]
        )

    def _ask(self) -> None:
        self._send(wire.encode(Kind.WEIGHTS, block=self._next, sequence=self._version + 1))
