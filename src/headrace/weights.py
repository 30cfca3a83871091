"""Stop 10: weights of version n go from the learner to whoever acts, whole or not at all.

In one process (`Weights`) the learner copies into one staging set under a lock. Between two batches
the server copies staging into its own fixed tensors, so their addresses never change and captured
graphs stay valid. Staging has the server's dtypes: the cast to bfloat16 happens once, on
publication.

Between processes (`SharedWeights`, `WeightsCopy`) there is no lock, since a worker that is stopped
while it holds one would stop the learner:

    block    | sequence, sum, layout | version | tensor 0 | tensor 1 | ...  each from a cache line
    learner  sequence odd; version and tensors; their sum; sequence even
    worker   copies to memory of its own, and believes the copy if the sequence was even, has not
             moved, and the copy has the sum; else it tries again, or acts with what it has

The sequence alone is exact where a core's stores, and its loads, are seen in their order (x86).
Where they are not (ARM) there is no fence that Python can ask for, and the sum finds the torn copy:
it does not depend on any order. It costs less than the copy does.
"""

from __future__ import annotations

import itertools
import threading
import zlib
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


class WeightsEnd(Protocol):
    """The learner's end, and that of a server in the same process."""

    def publish(self, learner_model: nn.Module, version: int) -> None:
        """See `Weights.publish`."""

    def pull(self) -> int:
        """See `Weights.pull`."""


class Weights:
    """One staging set and its version. `publish` is the learner's, `pull` the server's."""

    def __init__(self, server_model: nn.Module) -> None:
        """Allocates staging like `server_model`, at version -1: nothing published."""
        self._staging_lock = threading.Lock()  # guards _staging, _version and _published
        self._target = acting_tensors(server_model)
        self._staging = [tensor.detach().clone() for tensor in self._target]
        self._version = -1
        self._pulled_version = -1
        on_gpu = any(tensor.is_cuda for tensor in self._target)
        self._published = _event() if on_gpu else None
        self._pulled = _event() if on_gpu else None

    def publish(self, learner_model: nn.Module, version: int) -> None:
        """Copies the learner's weights into staging; on a GPU after the last `pull`, there."""
        with self._staging_lock:
            if self._pulled is not None:
                self._pulled.wait()
            with torch.no_grad():
                torch._foreach_copy_(self._staging, acting_tensors(learner_model))
            if self._published is not None:
                self._published.record()
            self._version = version

    def pull(self) -> int:
        """Copies staging into the server's model if newer; returns the version it has."""
        if self._version != self._pulled_version:  # a stale read costs one batch, nothing else
            with self._staging_lock:
                if self._published is not None:
                    self._published.wait()
                with torch.no_grad():
                    torch._foreach_copy_(self._target, self._staging)
                if self._pulled is not None:
                    self._pulled.record()
                self._pulled_version = self._version
        return self._pulled_version


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def acting_tensors(model: nn.Module) -> list[Tensor]:
    """What acting needs of a network: all, unless it says itself."""
    own = getattr(model, "acting_tensors", None)
    return [*model.parameters(), *model.buffers()] if own is None else own()


_ALIGNMENT = 64  # bytes: a cache line, and a multiple of every dtype's size
_SEQUENCE, _SUM, _LAYOUT = range(3)
_TRIES = 3


def shared_nbytes(model: nn.Module) -> int:
    """Bytes of the block that `SharedWeights` needs for models like this one."""
    return _ALIGNMENT + _offsets(model)[-1]


class SharedWeights:
    """The learner's end of a block of weights. For one thread."""

    def __init__(self, model: nn.Module, block: Any, *, local: Weights | None = None) -> None:
        """Takes the block over; nothing is published.

        Args:
            model: Like the workers': shapes and dtypes.
            block: Writable buffer of `shared_nbytes(model)` zeroed bytes.
            local: Weights of a server in this process (evaluation), published along with these.
        """
        self._flat = FlatWeights(model)
        self._header, self._shared = _parts(block)
        self._header[_LAYOUT] = fingerprint(model)
        self._local = local

    def publish(self, learner_model: nn.Module, version: int) -> None:
        """Copies the learner's weights into the block; on a GPU this waits for the update."""
        if self._local is not None:
            self._local.publish(learner_model, version)
        flat = self._flat
        with torch.no_grad():
            torch._foreach_copy_(flat.tensors, acting_tensors(learner_model))
        flat.version[0] = version
        self._header[_SEQUENCE] += 1
        np.copyto(self._shared, flat.row)
        self._header[_SUM] = checksum(flat.row)
        self._header[_SEQUENCE] += 1

    def pull(self) -> int:
        """For the server in this process: see `Weights.pull`."""
        if self._local is None:
            raise RuntimeError("no server in this process was announced")
        return self._local.pull()


class WeightsCopy:
    """A worker's end: a model that follows the block."""

    def __init__(self, model: nn.Module, block: Any) -> None:
        """Follows `block` with `model`, at version -1: nothing pulled.

        Raises:
            RuntimeError: the block holds another network.
        """
        self._flat = FlatWeights(model)
        self._target = acting_tensors(model)
        self._header, self._shared = _parts(block)
        if int(self._header[_LAYOUT]) != fingerprint(model):
            raise RuntimeError("the shared weights are of another network, or of other dtypes")
        self._seen = 0  # sequence of the copy that the model has
        self._version = -1

    def pull(self) -> int:
        """Copies the block into the model if newer; returns the version the model has.

        A copy that was torn is thrown away; after a few the model keeps what it has until the next
        call, which costs a batch, nothing else.
        """
        for _ in range(_TRIES):
            sequence = int(self._header[_SEQUENCE])
            if sequence == self._seen:
                break
            np.copyto(self._flat.row, self._shared)
            if (
                sequence % 2 == 0
                and sequence == int(self._header[_SEQUENCE])
                and checksum(self._flat.row) == int(self._header[_SUM])
            ):
                with torch.no_grad():
                    torch._foreach_copy_(self._target, self._flat.tensors)
                self._version = int(self._flat.version[0])
                self._seen = sequence
                break
        return self._version


class FlatWeights:
    """Version and tensors of a model in one row of bytes, in memory of this process."""

    def __init__(self, model: nn.Module) -> None:
        *offsets, nbytes = _offsets(model)
        self.row = np.zeros(nbytes, np.uint8)
        self.version = self.row[:8].view(np.int64)
        whole = torch.from_numpy(self.row)
        self.tensors = [
            whole[start : start + like.nbytes].view(like.dtype).view(like.shape)
            for start, like in zip(offsets, acting_tensors(model), strict=True)
        ]


def _offsets(model: nn.Module) -> list[int]:
    """Where each tensor begins in the row, the version before them; last, where the row ends."""
    sizes = [_ALIGNMENT, *(tensor.nbytes for tensor in acting_tensors(model))]
    return list(itertools.accumulate(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes))


def fingerprint(model: nn.Module) -> int:
    """Of the shapes and dtypes; equal in processes that built the same network."""
    shapes = [(tuple(tensor.shape), str(tensor.dtype)) for tensor in acting_tensors(model)]
    return zlib.crc32(repr(shapes).encode())


def _parts(block: Any) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
    row = np.frombuffer(block, np.uint8)
    return row[:_ALIGNMENT].view(np.uint64), row[_ALIGNMENT:]


def checksum(row: NDArray[np.uint8]) -> int:
    """Returns the sum of a row's bytes, eight at a time, modulo 2**64."""
    return int(row.view(np.uint64).sum())
