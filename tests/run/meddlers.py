"""Environments that change their process; found through the sys.path of the test."""

# ruff: noqa: NPY002 - the global state of numpy is meant
from __future__ import annotations

import logging
import os
import random
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np


def meddle(what: str) -> None:
    """Changes this process."""
    if what == "folder":
        os.makedirs("elsewhere", exist_ok=True)
        os.chdir("elsewhere")
        return
    if what == "numpy":
        np.seterr(all="raise")
        return
    import torch  # noqa: PLC0415  # a worker need not know it

    if what == "dtype":
        torch.set_default_dtype(torch.float64)
    elif what == "device":
        torch.set_default_device("meta")
    elif what == "gradients":
        torch.set_grad_enabled(False)
    elif what == "threads":
        torch.set_num_threads(3)
    elif what == "the rest":
        os.umask(0o777)
        os.environ.update(CUDA_VISIBLE_DEVICES="", TMPDIR="/nowhere")
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        sys.argv[:] = ["theirs"]
        sys.stdout = None  # type: ignore[assignment]
        warnings.simplefilter("error")
        logging.disable(logging.CRITICAL)
        logging.getLogger("headrace").disabled = True
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        torch.multiprocessing.set_start_method("spawn", force=True)


WHATS = ("folder", "numpy", "dtype", "device", "gradients", "threads", "the rest")


class Meddler(gym.Env[Any, Any]):
    """Rewards action 1; shows numbers whose squares are too small for float32."""

    observation_space = gym.spaces.Box(-1e30, 1e30, (2,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, what: str = "", when: str = "make", pids: str = "") -> None:
        self.what, self.when = what, when
        if pids:
            with Path(pids).open("a") as file:
                file.write(f"{os.getpid()}\n")
        self._at("make")

    def _at(self, when: str) -> None:
        if when == self.when:
            for what in filter(None, self.what.split(", ")):
                meddle(what)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.steps = 0
        self._at("reset")
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        self._at("step")
        return np.full(2, 1e-25, np.float32), float(action), self.steps == 9, False, {}

    def close(self) -> None:
        self._at("close")
