"""Many worker hosts in one process, all simulated: what `scale.py` loads a server with.

`python benchmarks/scale_hosts.py TASK` connects over real sockets, one connection for each host,
and says what a host would. Nothing steps: messages are made beforehand, and a step takes as long
as is drawn for it. It talks to its parent in lines: "ready" when every host was welcome once;
"measure" is said to it from there on; after "stop" it prints one JSON object, and ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import sys
import time
from array import array
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np

from headrace.bench.wire_ours import hello
from headrace.steps import EnvStep
from headrace.transport.grpc_common import METHOD, channel_options, import_grpc
from headrace.transport.messages import encode_step
from headrace.transport.wire import Kind, decode, encode

OBSERVATION = gym.spaces.Box(-1.0, 1.0, (4,), np.float32)
"""16 bytes, as those of `headrace.bench.free_env`."""
_CONNECTING = 32  # hosts at a time
_RETRY_S = 0.2
_MAX_LATENCIES = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Task:
    """What one process simulates."""

    address: str
    hosts: int
    first: int
    """Number of the first host."""
    envs_per_host: int
    step_ms: float
    """Median that all environments of a message take to step; 0 for no time at all."""
    step_sigma: float
    """Of the lognormal distribution around it."""
    delay_ms: float
    """Median of the network, one way, beyond what loopback takes."""
    delay_sigma: float
    stragglers: float
    """Share of hosts whose steps take `straggler_factor` as long."""
    straggler_factor: float
    lifetime_s: float
    """Mean time until a host leaves without a word; 0 for never. It comes back."""


@dataclass
class Counted:
    """What all hosts of this process saw since "measure"."""

    steps: int = 0
    messages: int = 0
    welcomes: int = 0
    lost: int = 0  # left, as they were told to
    latency_s: array[float] = field(default_factory=lambda: array("d"))

    def answer(self, latency_s: float, envs: int) -> None:
        """The actions of a message are here."""
        self.steps += envs
        self.messages += 1
        if len(self.latency_s) < _MAX_LATENCIES:
            self.latency_s.append(latency_s)


class Messages:
    """STEP messages of blocks of one size, of which only block and sequence change."""

    def __init__(self, envs: int) -> None:
        self._templates = [bytearray(self._encoded(envs, first, 0, 0)) for first in (True, False)]
        self._block_at, self._block_nbytes = self._changed(envs, block=(1 << 32) - 1)
        self._at, self._nbytes = self._changed(envs, sequence=(1 << 64) - 1)

    def step(self, block: int, sequence: int) -> bytes:
        """Returns the message of one step."""
        data = self._templates[sequence > 0]
        data[self._block_at : self._block_at + self._block_nbytes] = block.to_bytes(
            self._block_nbytes, "little"
        )
        data[self._at : self._at + self._nbytes] = sequence.to_bytes(self._nbytes, "little")
        return bytes(data)

    def _changed(self, envs: int, *, block: int = 0, sequence: int = 0) -> tuple[int, int]:
        """Returns where a number lies in the message, found by looking what it changes."""
        other = self._encoded(envs, True, block, sequence)
        pairs = enumerate(zip(self._templates[0], other, strict=True))
        places = [at for at, (was, now) in pairs if was != now]
        return places[0], len(places)

    @staticmethod
    def _encoded(envs: int, first: bool, block: int, sequence: int) -> bytes:
        never = np.zeros(envs, np.bool_)
        step = EnvStep(
            env_id=np.arange(envs, dtype=np.int32),
            run_id=np.zeros(envs, np.int64),
            observation=np.zeros((envs, *OBSERVATION.shape), np.float32),
            reward=np.ones(envs, np.float32),
            reset=np.full(envs, first),
            terminated=never,
            truncated=never,
            final_observation=None,
        )
        return encode_step(step, block=block, sequence=sequence)[0]


class Host:
    """One worker host that steps nothing."""

    def __init__(self, number: int, task: Task, counted: Counted, messages: dict[int, Messages]):
        self.welcomed = asyncio.Event()
        self._number, self._task, self._counted, self._messages = number, task, counted, messages
        self._random = random.Random(number)
        slow = self._random.random() < task.stragglers
        self._step_ms = task.step_ms * (task.straggler_factor if slow else 1.0)

    async def live(self, connecting: asyncio.Semaphore) -> None:
        """Connects again and again."""
        while True:
            lifetime_s = self._task.lifetime_s
            timeout_s = self._random.expovariate(1 / lifetime_s) if lifetime_s else None
            try:
                await asyncio.wait_for(self._session(connecting), timeout_s)
            except TimeoutError:
                self._counted.lost += 1
            except import_grpc().aio.AioRpcError:  # no room, or the server is about to end
                pass
            await asyncio.sleep(_RETRY_S * (0.5 + self._random.random()))

    async def _session(self, connecting: asyncio.Semaphore) -> None:
        grpc, envs = import_grpc(), self._task.envs_per_host
        async with grpc.aio.insecure_channel(
            self._task.address, options=channel_options()
        ) as channel:
            async with connecting:
                call = channel.stream_stream(METHOD)()
                await call.write(encode(Kind.HELLO, text=hello(envs=envs, name=self._name)))
                data = await call.read()
            if data is grpc.aio.EOF:
                await call.code()
                return
            blocks = {row[0]: row[2] for row in decode(data).text["blocks"]}
            for size in set(blocks.values()):
                if size not in self._messages:
                    self._messages[size] = Messages(size)
            self._counted.welcomes += 1
            self.welcomed.set()
            await call.write(encode(Kind.READY))
            await self._steps(call, blocks)

    @property
    def _name(self) -> str:
        return f"simulated-{self._number}"

    async def _steps(self, call: Any, blocks: dict[int, int]) -> None:
        """Sends steps and takes actions, until the server ends the stream."""
        sent_s: dict[int, float] = {}
        due: asyncio.Queue[tuple[int, int]] = asyncio.Queue()

        async def send(block: int, sequence: int) -> None:
            message = self._messages[blocks[block]].step(block, sequence)
            sent_s[block] = time.perf_counter()
            await call.write(message)

        async def write() -> None:
            while True:
                await send(*await due.get())

        for block in blocks:
            await send(block, 0)
        free = not (self._step_ms or self._task.delay_ms)
        writer = None if free else asyncio.ensure_future(write())
        loop, eof = asyncio.get_running_loop(), import_grpc().aio.EOF
        try:
            while (data := await call.read()) is not eof:
                message = decode(data)
                if message.kind is not Kind.ACTION:
                    continue
                block, sequence = message.block, message.sequence + 1
                self._counted.answer(time.perf_counter() - sent_s[block], blocks[block])
                if free:
                    await send(block, sequence)
                else:
                    loop.call_later(self._delay_s(), due.put_nowait, (block, sequence))
        finally:
            if writer is not None:
                writer.cancel()

    def _delay_s(self) -> float:
        """Draws the time from the actions' arrival until the next step leaves."""
        task, draw = self._task, self._random.lognormvariate
        step = self._step_ms * draw(0.0, task.step_sigma)
        ways = task.delay_ms * (draw(0.0, task.delay_sigma) + draw(0.0, task.delay_sigma))
        return (step + ways) / 1e3


async def simulate(task: Task) -> dict[str, Any]:
    """Simulates until the parent says stop, or is gone."""
    loop = asyncio.get_running_loop()
    counted, messages, connecting = Counted(), {}, asyncio.Semaphore(_CONNECTING)
    hosts = [Host(task.first + place, task, counted, messages) for place in range(task.hosts)]
    lives = [asyncio.ensure_future(host.live(connecting)) for host in hosts]
    await asyncio.gather(*(host.welcomed.wait() for host in hosts))
    print("ready", flush=True)
    began_s = cpu_s = 0.0
    while (line := await loop.run_in_executor(None, sys.stdin.readline)).strip() == "measure":
        fresh = Counted()
        vars(counted).update(vars(fresh))
        began_s, cpu_s = time.perf_counter(), time.process_time()
    elapsed_s = time.perf_counter() - began_s
    cpu_s = time.process_time() - cpu_s
    for life in lives:
        life.cancel()
    await asyncio.gather(*lives, return_exceptions=True)
    latency_s = np.array(counted.latency_s) if counted.latency_s else np.full(1, np.nan)
    return {
        "stopped": line.strip() == "stop",
        "elapsed_s": elapsed_s,
        "cpu_s": cpu_s,
        "steps": counted.steps,
        "messages": counted.messages,
        "welcomes": counted.welcomes,
        "left": counted.lost,
        "round_trip_us": np.quantile(latency_s * 1e6, np.linspace(0, 1, 201)).tolist(),
    }


def main() -> None:
    """Runs one process of hosts."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.environ["GRPC_VERBOSITY"] = "NONE"
    result = asyncio.run(simulate(Task(**json.loads(sys.argv[1]))))
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
