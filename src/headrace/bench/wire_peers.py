"""What others would send frames with: bare gRPC streams, and Ray actors.

Each keeps as many messages in flight as asked, and the server reads nothing of what has come. With
Ray the server asks, as its users do: the call takes the actions, its result is the frames. It finds
that the two processes share a machine, and goes through its memory, not through a socket.
`benchmarks/wire_peers.py` has more.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import queue
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from headrace.bench.wire_ours import messages
from headrace.bench.wire_tally import TIMEOUT_S, Tally, Task
from headrace.errors import ConfigError, DeadlineExceeded
from headrace.run.cluster_ray import job_config
from headrace.transport.grpc_common import import_grpc, shared_options

METHOD = "/bench/session"
"""Of bare streams."""
_RAY_STORE_NBYTES = 256 << 20


class AsyncStreamServer:
    """A stream of bytes in gRPC's asynchronous half, as our transport uses, and nothing else."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._grpc = import_grpc()
        self._answer = messages(task)[1]
        self._loop = asyncio.new_event_loop()
        self._thread = ThreadPoolExecutor(1)
        self._tally: queue.SimpleQueue[Tally] = queue.SimpleQueue()
        self._thread.submit(self._loop.run_forever)
        self.address = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(TIMEOUT_S)

    async def _start(self) -> str:
        self._server = self._grpc.aio.server(options=shared_options())
        handler = self._grpc.stream_stream_rpc_method_handler(self._session)
        self._server.add_generic_rpc_handlers((AnyMethod(handler),))
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return f"127.0.0.1:{port}"

    async def _session(self, _: Any, context: Any) -> None:
        tally = await self._loop.run_in_executor(None, self._tally.get)
        for key in itertools.cycle(range(self._task.in_flight)):
            if await context.read() is self._grpc.aio.EOF:
                return
            tally.arrived(key)
            if tally.over:
                return
            tally.answered(key)
            await context.write(self._answer)

    def measure(self, tally: Tally) -> None:
        """Waits until the tally has enough."""
        self._tally.put(tally)
        wait_for(tally, self._task)

    def close(self) -> None:
        """Ends stream and thread."""
        asyncio.run_coroutine_threadsafe(self._server.stop(1.0), self._loop).result(TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.shutdown()
        self._loop.close()


class AnyMethod:
    """One method, whatever its name."""

    def __init__(self, handler: Any) -> None:
        self._handler = handler

    def service(self, _: Any) -> Any:
        """Gives the same handler to every call."""
        return self._handler


def async_stream_host(task: Task, address: str) -> None:
    """Sends frames through a bare stream in gRPC's asynchronous half."""
    asyncio.run(_async_stream_host(task, address))


async def _async_stream_host(task: Task, address: str) -> None:
    grpc = import_grpc()
    frames = messages(task)[0]
    async with grpc.aio.insecure_channel(address, options=shared_options()) as channel:
        call = channel.stream_stream(METHOD)()
        for _ in range(task.in_flight):
            await call.write(frames)
        while await call.read() is not grpc.aio.EOF:
            await call.write(frames)


def wait_for(tally: Tally, task: Task) -> None:
    """Waits until a tally has enough.

    Raises:
        DeadlineExceeded: it never had.
    """
    if not tally.finished.wait(2 * task.seconds + TIMEOUT_S):
        raise DeadlineExceeded(f"{task.implementation} did not come to an end")


class _Holder:
    """Ray's actor."""

    def __init__(self, frames: np.ndarray[Any, Any]) -> None:
        self._frames = np.array(frames)

    def step(self, actions: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return self._frames


class RayServer:
    """A Ray actor that holds frames; its results come through Ray's object store."""

    address = ""

    def __init__(self, task: Task) -> None:
        self._task = task
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            import ray  # noqa: PLC0415 - an extra
        except ImportError as error:
            raise ConfigError("Ray is an extra: pip install 'headrace[cluster]'") from error
        self._ray = ray
        ray.init(
            address="local",
            job_config=job_config(),
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=_RAY_STORE_NBYTES,
        )
        actor: Any = ray.remote(num_cpus=1)(_Holder)
        self._actor = actor.remote(task.frames())

    def measure(self, tally: Tally) -> None:
        """Calls the actor until the tally has enough."""
        ray, actions = self._ray, self._task.actions()
        step: Any = self._actor.step
        calls = deque((key, step.remote(actions)) for key in range(self._task.in_flight))
        while not tally.over:
            key, call = calls.popleft()
            ray.get(call, timeout=TIMEOUT_S)
            tally.arrived(key)
            tally.answered(key)
            calls.append((key, step.remote(actions)))

    def close(self) -> None:
        """Ends Ray."""
        self._ray.shutdown()
