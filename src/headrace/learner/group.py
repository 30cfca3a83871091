"""Several learners that act as one: what they exchange, and how nobody waits for ever.

```
before each update    meet      a row of whole numbers from each: has it a batch, what it counted
within it             average   gradients, moments, statistics: replaced by their means
                      largest   of importance weights
at the start          spread    the first learner's state, as bytes
```
All learners call the same things in the same order, each from one thread, so that calls need no
names. Nothing is pickled: tensors and bytes cross, whose shapes both ends know.

The learners are processes of one machine, and their connections stay within it: gloo and NCCL are
told to use the loopback interface, and find each other through a file in a folder that only this
user can read. Connections of torch.distributed are neither encrypted nor authenticated, so learners
on several machines are not offered.

A learner that is gone breaks a connection of gloo, which is noticed at once; whoever waits looks
up several times a second, and gives up at a deadline. Gradients of GPUs go through NCCL, which
waits on the device: there the meeting before each update finds who is gone, and NCCL's own watchdog
ends the process should somebody go between the two. That has not run on several GPUs yet.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from headrace.errors import ConfigError, PeerLost

_LOOK = timedelta(seconds=0.2)  # how often who waits looks up
_CONNECT_S = 60.0
_MARGIN_S = 60.0  # by which gloo's own deadline is later than ours, which knows more


class ExchangeFailed(PeerLost):
    """Another learner is gone or silent, or was lost by somebody else.

    `late` is None where a connection broke; else those who had not come at the deadline, or nobody
    where one had come and then said nothing more.
    """

    def __init__(self, message: str, late: Sequence[int] | None = None) -> None:
        super().__init__(message)
        self.late = late


class Group:
    """The learners of a run, seen from one of them. For one thread."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        *,
        gradients: dist.ProcessGroup | None = None,
        timeout_s: float,
        calls: NDArray[Any],
        on_wait: Callable[[], None] = lambda: None,
    ) -> None:
        """Takes a connected group.

        Args:
            group: Of gloo, for what is exchanged on the host.
            gradients: Of NCCL, for tensors on GPUs; None for `group`.
            timeout_s: Longest that one exchange may take.
            calls: [learners] int64, written and read by all: exchanges that each has come to.
            on_wait: Called several times a second while waiting; what it raises ends the wait.
        """
        self._group, self._gradients = group, gradients or group
        self._blocks = gradients is None  # whether the host waits for gradients
        self._timeout_s, self._on_wait = timeout_s, on_wait
        self._calls = calls
        self.rank, self.count = group.rank(), group.size()
        self._flats: dict[tuple[Any, ...], _Flat] = {}

    def average(self, tensors: Sequence[Tensor]) -> None:
        """See `algorithms.base.Learners`: one exchange for all tensors of one dtype."""
        kinds: dict[Any, list[Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach())
        for alike in kinds.values():
            key = (alike[0].dtype, alike[0].device, *(tensor.shape for tensor in alike))
            flat = self._flats.get(key)
            if flat is None:
                flat = self._flats[key] = _Flat.like(alike)
            torch._foreach_copy_(flat.parts, alike)
            self._sum(flat.whole)
            flat.whole.div_(self.count)
            torch._foreach_copy_(alike, flat.parts)

    def largest(self, value: Tensor) -> Tensor:
        """Returns the largest of all learners' scalars."""
        host = torch.zeros(self.count, dtype=torch.float64)
        host[self.rank] = value.double().cpu()
        self._exchange(host)
        return host.amax().to(value.device, value.dtype)

    def meet(self, row: Sequence[int]) -> list[list[int]]:
        """Waits until all learners are here; returns the rows of all, in their order."""
        rows = torch.zeros(self.count, len(row), dtype=torch.int64)
        rows[self.rank] = torch.tensor(row)
        self._exchange(rows)
        told: list[list[int]] = rows.tolist()
        return told

    def spread(self, data: bytes | None) -> bytes:
        """Returns the first learner's `data` to all; the others give None."""
        size = torch.tensor([0 if data is None else len(data)])
        self._exchange(size)
        whole = torch.zeros(int(size), dtype=torch.uint8)
        if data:
            whole = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self._wait(self._group.broadcast([whole], options))
        return whole.numpy().tobytes()

    def _sum(self, tensor: Tensor) -> None:
        if self._blocks:
            self._exchange(tensor)
        else:
            self._calls[self.rank] += 1
            self._gradients.allreduce([tensor]).wait()  # the stream waits, not the host

    def _exchange(self, tensor: Tensor) -> None:
        """Replaces a tensor by its sum over all learners."""
        self._wait(self._group.allreduce([tensor]))

    def _wait(self, work: dist.Work) -> None:
        self._calls[self.rank] += 1
        until_s = time.monotonic() + self._timeout_s
        while True:
            done = work.is_completed()
            try:
                work.wait(_LOOK)
            except RuntimeError as error:  # of the exchange, or this look took its time
                if done:
                    said = _line(error)
                    raise ExchangeFailed(f"the learners lost each other ({said})") from error
            else:
                return
            self._on_wait()
            if time.monotonic() > until_s:
                late = [int(rank) for rank in (self._calls < self._calls[self.rank]).nonzero()[0]]
                raise ExchangeFailed(
                    f"learners waited {self._timeout_s:.0f} s for each other", late
                )


class _Flat(NamedTuple):
    """One row of numbers, and its parts as tensors of the shapes that were asked for."""

    whole: Tensor
    parts: list[Tensor]

    @classmethod
    def like(cls, tensors: Sequence[Tensor]) -> _Flat:
        whole = torch.empty(
            sum(tensor.numel() for tensor in tensors),
            dtype=tensors[0].dtype,
            device=tensors[0].device,
        )
        rows: Any = torch.split(whole, [tensor.numel() for tensor in tensors])
        return cls(
            whole,
            [row.view(tensor.shape) for row, tensor in zip(rows, tensors, strict=True)],
        )


def connect(
    folder: Path,
    *,
    rank: int,
    devices: Sequence[torch.device],
    timeout_s: float,
    calls: NDArray[Any],
    on_wait: Callable[[], None],
) -> Group:
    """Connects the learners of one machine; all must be about to call this.

    Args:
        folder: Where they find each other, empty at first.
        rank: Which learner this is.
        devices: Of all learners.
        timeout_s: See `Group`.
        calls: See `Group`.
        on_wait: See `Group`.

    Raises:
        ExchangeFailed: another one did not come.
        ConfigError: this PyTorch has no torch.distributed.
    """
    if not dist.is_available():
        raise ConfigError(
            "this build of PyTorch has no torch.distributed: leave out --learner-devices"
        )
    c10d: Any = dist  # what is used here is documented in C++ alone, and has no types
    store = c10d.FileStore(str(folder / "learners"), len(devices))
    limit = timedelta(seconds=timeout_s + _MARGIN_S)
    try:
        with _loopback():
            store.set_timeout(timedelta(seconds=_CONNECT_S))
            group = c10d.ProcessGroupGloo(
                c10d.PrefixStore("host", store), rank, len(devices), limit
            )
            gradients = None
            if uses_nccl(devices):
                options = c10d.ProcessGroupNCCL.Options()
                options._timeout = limit
                gradients = c10d.ProcessGroupNCCL(
                    c10d.PrefixStore("gradients", store), rank, len(devices), options
                )
                # Connects now, while the interface is named.
                gradients.allreduce([torch.zeros(1, device=devices[rank])]).wait()
                torch.cuda.synchronize(devices[rank])
    except RuntimeError as error:
        raise ExchangeFailed(f"the learners did not find each other ({_line(error)})") from error
    return Group(group, gradients=gradients, timeout_s=timeout_s, calls=calls, on_wait=on_wait)


def uses_nccl(devices: Sequence[torch.device]) -> bool:
    """Whether gradients go from GPU to GPU: NCCL takes one learner for each."""
    return len(set(devices)) == len(devices) and all(one.type == "cuda" for one in devices)


@contextlib.contextmanager
def _loopback() -> Iterator[None]:
    """Names the loopback interface to gloo and NCCL, unless the user has named another."""
    names = [name for _, name in socket.if_nameindex()]
    loopback = next((name for name in names if name in ("lo", "lo0")), None)
    variables = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    added = [name for name in variables if loopback and name not in os.environ]
    os.environ.update(dict.fromkeys(added, loopback or ""))
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else "no reason"
