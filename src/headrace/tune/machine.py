"""What a tuned file says of the machine that it was tuned on."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import NamedTuple

import torch

from headrace import __version__
from headrace.resources import usable_cores
from headrace.run.system import choose_precision


class Machine(NamedTuple):
    """Processor, GPU and versions."""

    cores: int  # that this process may use
    cpu: str
    gpu: str | None  # the one that runs would use
    bfloat16: bool  # multiplied natively where networks run

    @classmethod
    def look(cls, device: torch.device) -> Machine:
        """Describes this machine, for runs on `device`."""
        on_gpu = device.type == "cuda"
        return cls(
            cores=usable_cores(),
            cpu=_cpu_name(),
            gpu=torch.cuda.get_device_name(device) if on_gpu else None,
            bfloat16=choose_precision("auto", device) is torch.bfloat16,
        )

    def __str__(self) -> str:
        cores = f"{self.cores} core{'s' if self.cores > 1 else ''}"
        return f"{cores} of {self.cpu}, {self.gpu or 'no GPU'}"


def versions() -> str:
    """Returns versions in a few words."""
    return f"headrace {__version__}, torch {torch.__version__}, Python {platform.python_version()}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
