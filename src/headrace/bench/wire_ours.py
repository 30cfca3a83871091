"""Our pool and our link for `headrace bench wire`: all but environments and a policy."""

from __future__ import annotations

import os

import gymnasium as gym
import numpy as np

from headrace import __version__
from headrace.bench.wire_tally import TIMEOUT_S, Tally, Task
from headrace.errors import DeadlineExceeded, PeerLost
from headrace.pools.grpc import GrpcPool
from headrace.pools.settings import WorkerConfig
from headrace.pools.shm import WorkerEnvs
from headrace.specs import EnvSpec
from headrace.steps import EnvStep
from headrace.transport.grpc_client import HostClient
from headrace.transport.messages import encode_action, encode_step
from headrace.transport.settings import LinkConfig, RemoteConfig
from headrace.transport.wire import VERSION, Kind, encode

NUM_ACTIONS = 4


def spec_of(frame_shape: tuple[int, ...]) -> EnvSpec:
    """Returns what environments with such frames say of themselves."""
    return EnvSpec(
        name="synthetic",
        observation_space=gym.spaces.Box(0, 255, frame_shape, np.uint8),
        action_space=gym.spaces.Discrete(NUM_ACTIONS),
    )


def make_pool(
    frame_shape: tuple[int, ...],
    *,
    num_envs: int,
    batch_size: int,
    envs_per_message: int,
    batch_wait_ms: float = 2.0,
    max_hosts: int = 1024,
) -> GrpcPool:
    """Returns a pool on loopback that waits for hosts which show such frames."""
    recipe = WorkerEnvs(
        env="synthetic", settings={}, spec=spec_of(frame_shape), num_envs=num_envs, seed=0
    )
    return GrpcPool(
        recipe,
        batch_size=batch_size,
        remote=RemoteConfig(envs_per_message=envs_per_message, max_hosts=max_hosts),
        workers=WorkerConfig(batch_wait_ms=batch_wait_ms),
    )


def hello(*, envs: int, name: str) -> dict[str, object]:
    """Returns what a host says first."""
    return {
        "protocol": VERSION,
        "headrace": __version__,
        "name": name,
        "pid": os.getpid(),
        "cut": "steps",
        "envs": envs,
        "cores": 1,
    }


def free_step(frames: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], *, first: bool) -> EnvStep:
    """Returns a step in which nothing ends; `first`: episodes begin with it."""
    envs = len(frames)
    never = np.zeros(envs, np.bool_)
    return EnvStep(
        env_id=np.arange(envs, dtype=np.int32),
        run_id=np.zeros(envs, np.int64),
        observation=frames,
        reward=np.ones(envs, np.float32),
        reset=np.full(envs, first),
        terminated=never,
        truncated=never,
        final_observation=None,
    )


def messages(task: Task) -> tuple[bytes, bytes]:
    """Returns a message of frames, and one of actions."""
    step, _ = encode_step(free_step(task.frames(), first=False), block=0, sequence=1)
    return step, encode_action(task.actions(), block=0, sequence=1)


def host(task: Task, address: str) -> None:
    """Shows frames, and shows them again when their actions have come, until the server ends."""
    frames = task.frames()
    start, further = (free_step(frames, first=first) for first in (True, False))
    link = HostClient.open(
        LinkConfig(connect=address), hello(envs=task.envs * task.in_flight, name="host")
    )
    try:
        link.send(encode(Kind.READY))
        for number, *_ in link.welcome["blocks"]:
            link.send(encode_step(start, block=number, sequence=0)[0])
        while True:
            message = link.receive(TIMEOUT_S)
            if message is None or message.kind is Kind.BYE:
                return
            if message.kind is Kind.ACTION:
                block, sequence = message.block, message.sequence + 1
                link.send(encode_step(further, block=block, sequence=sequence)[0])
    except PeerLost:  # the server has measured enough
        return
    finally:
        link.close()


class Server:
    """The pool, driven as a server drives it, without a policy."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._pool = make_pool(
            task.frame_shape,
            num_envs=task.envs * task.in_flight,
            batch_size=task.envs,
            envs_per_message=task.envs,
        )
        self.address = self._pool.address

    def measure(self, tally: Tally) -> None:
        """Answers until the tally has enough.

        Raises:
            DeadlineExceeded: no frames came.
        """
        pool, actions = self._pool, self._task.actions()
        while not tally.over:
            step = pool.receive(TIMEOUT_S)
            if step is None:
                raise DeadlineExceeded(f"no frames in {TIMEOUT_S:.0f} s")
            key = int(step.env_id[0])
            tally.arrived(key)
            tally.answered(key)
            pool.reply(actions)

    def close(self) -> None:
        """Ends pool and host."""
        self._pool.close()
