"""What a pool is measured against: processes that talk to nobody, and Gymnasium's own vectors.

`python -m headrace.bench.lone` is one such process: it makes environments, says so, waits for a
line, steps them with random actions for a while and prints its rate. It does what a user's plain
loop does: step, and reset what has ended.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from typing import Any

import gymnasium as gym
import numpy as np

from headrace import catalog
from headrace.errors import PeerLost

_ACTIONS = 256  # drawn beforehand, so that drawing is not measured


def make_env(env: str, kwargs: dict[str, Any]) -> gym.Env[Any, Any]:
    """Makes one environment from a Gymnasium id or "module:factory"."""
    if ":" in env:
        made: gym.Env[Any, Any] = catalog.import_attribute("environment", env)(**kwargs)
        return made
    return gym.make(env, **kwargs)


def rate_of_processes(
    env: str, kwargs: dict[str, Any], *, num_envs: int, processes: int, seconds: float
) -> float:
    """Returns agent steps per second of all processes together, each measured over `seconds`."""
    sizes = [len(part) for part in np.array_split(np.arange(num_envs), processes)]
    children = [
        subprocess.Popen(
            [sys.executable, "-P", "-m", "headrace.bench.lone"],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in sizes
    ]
    try:
        for child, size in zip(children, sizes, strict=True):
            task = {"env": env, "kwargs": kwargs, "num_envs": size, "seconds": seconds}
            _tell(child, json.dumps(task))
        for child in children:
            _hear(child)
        for child in children:
            _tell(child, "go")
        return math.fsum(float(_hear(child)) for child in children)
    finally:
        for child in children:
            child.kill()
            child.communicate()


def rate_of_async_vector(
    env: str, kwargs: dict[str, Any], *, num_envs: int, seconds: float
) -> tuple[float, np.ndarray[Any, np.dtype[np.float64]]]:
    """Returns agent steps per second of Gymnasium's AsyncVectorEnv, and seconds of each round."""
    envs = gym.vector.AsyncVectorEnv([lambda: make_env(env, kwargs)] * num_envs)
    try:
        envs.action_space.seed(0)
        actions = [envs.action_space.sample() for _ in range(16)]
        envs.reset(seed=0)
        latencies_s: list[float] = []
        for warm in (True, False):
            start_s = before_s = time.perf_counter()
            while before_s - start_s < (seconds * 0.1 if warm else seconds):
                envs.step(actions[len(latencies_s) % len(actions)])
                now_s = time.perf_counter()
                latencies_s.append(now_s - before_s)
                before_s = now_s
            if warm:
                latencies_s.clear()
        return num_envs * len(latencies_s) / (before_s - start_s), np.array(latencies_s)
    finally:
        envs.close()


def _tell(child: subprocess.Popen[str], line: str) -> None:
    assert child.stdin is not None
    child.stdin.write(line + "\n")
    child.stdin.flush()


def _hear(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line:
        raise PeerLost(f"a lone process ended with {child.wait()}; its error is above")
    return line


def main() -> None:
    """Runs one process that talks to nobody."""
    task = json.loads(sys.stdin.readline())
    envs = [make_env(task["env"], task["kwargs"]) for _ in range(task["num_envs"])]
    for index, env in enumerate(envs):
        env.reset(seed=index)
        env.action_space.seed(index)
    actions = [envs[0].action_space.sample() for _ in range(_ACTIONS)]
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    steps, turn, seconds = 0, 0, task["seconds"]
    start_s = time.perf_counter()
    while (now_s := time.perf_counter()) - start_s < seconds:
        for env in envs:
            turn += 1
            _, _, terminated, truncated, _ = env.step(actions[turn % _ACTIONS])
            if terminated or truncated:
                env.reset()
        steps += len(envs)
    sys.stdout.write(f"{steps / (now_s - start_s)}\n")


if __name__ == "__main__":
    main()
