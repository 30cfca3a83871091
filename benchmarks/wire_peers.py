r"""More that frames are sent with, for `headrace bench wire`: gRPC with threads, torch's rpc.

    PYTHONPATH=benchmarks headrace bench wire \
        --implementations headrace wire_peers:THREADS wire_peers:RPC wire_peers:RPC_TCP

With rpc the server asks, as its users do: the call takes the actions, its result is the frames. It
finds that the two processes share a machine, and goes through its memory unless it is told not to.
"""

from __future__ import annotations

import importlib
import itertools
import os
import queue
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from headrace.bench.wire_ours import messages
from headrace.bench.wire_peers import METHOD, AnyMethod, wait_for
from headrace.bench.wire_tally import TIMEOUT_S, Tally, Task
from headrace.bench.wire_turn import Ends
from headrace.transport.grpc_common import import_grpc, shared_options

_held: dict[str, Any] = {}  # frames of the host that rpc calls


class StreamServer:
    """A gRPC stream of bytes with a thread for it, and nothing else: no header, no copy."""

    def __init__(self, task: Task) -> None:
        grpc = import_grpc()
        self._task = task
        self._answer = messages(task)[1]
        self._tally: queue.SimpleQueue[Tally] = queue.SimpleQueue()
        self._server = grpc.server(ThreadPoolExecutor(4), options=shared_options())
        handler = grpc.stream_stream_rpc_method_handler(self._session)
        self._server.add_generic_rpc_handlers((AnyMethod(handler),))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def _session(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        tally, keys = self._tally.get(), itertools.cycle(range(self._task.in_flight))
        for _, key in zip(requests, keys, strict=False):
            tally.arrived(key)
            if tally.over:
                return
            tally.answered(key)
            yield self._answer

    def measure(self, tally: Tally) -> None:
        """Waits until the tally has enough."""
        self._tally.put(tally)
        wait_for(tally, self._task)

    def close(self) -> None:
        """Ends the stream."""
        self._server.stop(1.0).wait()


def stream_host(task: Task, address: str) -> None:
    """Sends frames through a bare stream, and again for each answer."""
    grpc = import_grpc()
    frames = messages(task)[0]
    sent: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    for _ in range(task.in_flight):
        sent.put(frames)
    with grpc.insecure_channel(address, options=shared_options()) as channel:
        call = channel.stream_stream(METHOD)(iter(sent.get, b""))
        for _ in call:
            sent.put(frames)
        sent.put(b"")


class RpcServer:
    """torch.distributed.rpc, whose other end holds frames as a tensor."""

    sockets = False

    def __init__(self, task: Task) -> None:
        torch.set_num_threads(1)
        self._task = task
        self._actions = torch.from_numpy(task.actions())
        self._folder = tempfile.TemporaryDirectory()
        self.address = f"{self._folder.name}/store"

    def measure(self, tally: Tally) -> None:
        """Calls the other end until the tally has enough."""
        rpc = _join(self.address, rank=0, sockets=self.sockets)
        task, args = self._task, (self._actions,)
        calls = deque(
            (key, rpc.rpc_async("host", step_rpc, args=args)) for key in range(task.in_flight)
        )
        while not tally.over:
            key, call = calls.popleft()
            call.wait()
            tally.arrived(key)
            tally.answered(key)
            calls.append((key, rpc.rpc_async("host", step_rpc, args=args)))
        for _, call in calls:
            call.wait()
        rpc.shutdown()

    def close(self) -> None:
        """Removes the file at which both ends met."""
        self._folder.cleanup()


def step_rpc(actions: Any) -> Any:
    """Called in the host: returns frames."""
    return _held["frames"]


def rpc_host(task: Task, address: str, *, sockets: bool = False) -> None:
    """Holds frames until the server is done."""
    torch.set_num_threads(1)
    _held["frames"] = torch.from_numpy(task.frames())
    _join(address, rank=1, sockets=sockets).shutdown()


class RpcTcpServer(RpcServer):
    """The same, told to leave shared memory alone, as if on two machines."""

    sockets = True


def rpc_tcp_host(task: Task, address: str) -> None:
    """Its other end."""
    rpc_host(task, address, sockets=True)


def _join(path: str, *, rank: int, sockets: bool) -> Any:
    """Returns the rpc module when both ends are there."""
    os.environ["TP_SOCKET_IFNAME"] = "lo"
    rpc: Any = importlib.import_module("torch.distributed.rpc")
    through_sockets = {"_transports": ["uv"], "_channels": ["basic"]}
    options = rpc.TensorPipeRpcBackendOptions(
        num_worker_threads=4,
        rpc_timeout=TIMEOUT_S,
        init_method=f"file://{path}",
        **(through_sockets if sockets else {}),
    )
    name = ("server", "host")[rank]
    rpc.init_rpc(name, rank=rank, world_size=2, rpc_backend_options=options)
    return rpc


THREADS = Ends("wire_peers:StreamServer", "wire_peers:stream_host", "loopback")
RPC = Ends("wire_peers:RpcServer", "wire_peers:rpc_host", "shared memory")
RPC_TCP = Ends("wire_peers:RpcTcpServer", "wire_peers:rpc_tcp_host", "loopback")
