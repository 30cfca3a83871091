"""A role's own end: a process beside training that follows the newest weights (Spreeze).

    learner's thread    shared memory                        role
      attend  <-------- "wants n", as a message ------------- newest
      publish --------> weights and agent_steps, with a sequence
      attend  --------- "n version", in the control pipe ---> pull
      row     <-------- what the role has found, as messages - tell

Weights are published only when a role has asked for them, so training pays for what is looked at,
not for what is learned. Roles are started by `run.roles`, and end when the parent is gone. What a
role raises ends it; the parent says why, and starts it again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import mmap
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headrace import catalog
from headrace.config import from_dict
from headrace.errors import PeerLost
from headrace.networks.modes import frozen
from headrace.pools.processes import WorkerEnd
from headrace.run.build import make_algorithm, make_model
from headrace.run.policy import Policy
from headrace.run.system import keep_memory
from headrace.specs import EnvSpec
from headrace.weights import WeightsCopy, acting_tensors

_CPU = torch.device("cpu")
_TORN_S = 0.01  # until a row of weights that is being written is read again


class Stamped(nn.Module):
    """A network and when its weights were read: they cross together, so they fit together."""

    agent_steps: Tensor

    def __init__(self, model: nn.Module) -> None:
        """Wraps `model`, at agent step 0."""
        super().__init__()
        self.model = model
        self.register_buffer("agent_steps", torch.zeros((), dtype=torch.int64))

    def acting_tensors(self) -> list[Tensor]:
        """What crosses: the network's own choice if it makes one (`weights`), and the stamp."""
        return [*acting_tensors(self.model), self.agent_steps]


class Follower:
    """A policy that follows the learner's. For one thread.

    `policy` acts on the CPU, in float32; `config` is the run's, but for what a role has no use
    for: devices, compilation, threads. `run` is the run directory.
    """

    def __init__(self, end: WorkerEnd) -> None:
        """Builds the policy, without any weights yet."""
        settings = end.settings
        self.run = Path(settings["run"])
        self.config = dataclasses.replace(
            from_dict(settings["config"]),
            device="cpu",
            actor_device="",
            critic_device="",
            precision="float32",
            compile="off",
            compute_threads=1,
            env_threads=1,
        )
        spec: EnvSpec = catalog.environment_family(self.config.env).spec(
            self.config.env, self.config.environment
        )
        model: Any = frozen(make_model(self.config, spec, _CPU))
        algorithm = make_algorithm(self.config, model, spec, torch.float32)  # it never updates
        self.policy = Policy(self.config, algorithm, spec, _CPU)
        self._stamped = Stamped(model)
        fd = settings["weights_fd"]
        self._weights = WeightsCopy(self._stamped, mmap.mmap(fd, os.fstat(fd).st_size))
        self._end = end
        self._heard = b""
        self._asked = 0

    @property
    def agent_steps(self) -> int:
        """Agent steps that had been made when the policy's weights were read."""
        return self.policy.agent_steps

    def newest(self, timeout_s: float) -> int:
        """Asks the learner for its newest weights and loads them into the policy.

        Returns:
            Their version, in updates; that of the weights it has if none came within `timeout_s`,
            and -1 if it has none.

        Raises:
            PeerLost: the run is over, or its process gone.
        """
        until_s = time.monotonic() + timeout_s
        self._asked += 1
        self._end.status({"wants": self._asked})
        announced = self._announced(until_s)
        version = self._weights.pull()
        while announced is not None and version < announced and time.monotonic() < until_s:
            self._end.receive(_TORN_S)  # torn: the other role has just been answered, too
            version = self._weights.pull()
        self.policy.agent_steps = int(self._stamped.agent_steps)
        return version

    def rest(self, seconds: float) -> None:
        """Waits; with 0 seconds it only looks whether the run goes on.

        Raises:
            PeerLost: the run is over, or its process gone.
        """
        until_s = time.monotonic() + seconds
        while self._end.receive(max(0.0, until_s - time.monotonic())) is not None:
            pass  # the answer to a question that was given up

    def tell(self, message: Mapping[str, Any]) -> None:
        """Tells the parent something; see `run.roles` for what it understands."""
        self._end.status(message)

    def _announced(self, until_s: float) -> int | None:
        """Waits for the answer to the last question; returns the version that it names."""
        while True:
            data = self._end.receive(max(0.0, until_s - time.monotonic()))
            if data is None:
                return None
            *lines, self._heard = (self._heard + data).split(b"\n")
            for line in lines:
                question, version = map(int, line.split())
                if question == self._asked:
                    return version


def follow(role: Callable[[Follower], None]) -> None:
    """Makes this process a role, until the run is over: the whole of a role's `main`."""
    end = WorkerEnd.open()
    os.nice(end.settings["nice"])
    keep_memory()
    torch.set_num_threads(1)
    with contextlib.suppress(PeerLost):
        role(Follower(end))
    gc.freeze()  # else Python's last search for garbage goes through all of torch for a second
