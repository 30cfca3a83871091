"""What the machine has, and how the process is set up for it, so that a user need not know."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from pathlib import Path

import torch

from headrace import resources
from headrace.errors import ConfigError

# Parameters of glibc's mallopt, from malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def choose_device(name: str) -> torch.device:
    """Returns the device that "auto", "cpu", "cuda" or "cuda:N" stands for.

    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"no device named {name!r}: say auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not supported: say auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"no device {name!r}: PyTorch sees {torch.cuda.device_count()} GPUs; say auto or cpu"
        )
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Returns the torso's dtype; auto is bfloat16 where the hardware multiplies it natively."""
    if name == "auto":
        native = (
            torch.cuda.is_bf16_supported(including_emulation=False)
            if device.type == "cuda"
            else _cpu_has_bfloat16()
        )
        return torch.bfloat16 if native else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def has_compiler() -> bool:
    """Whether there is a C++ compiler, which graphs for a CPU are made with."""
    named = os.environ.get("CXX", "").split()
    return any(shutil.which(name) for name in (*named[:1], "g++", "clang++", "c++"))


def free_memory_nbytes() -> int:
    """Returns what this process may still take of main memory, in bytes."""
    free = resources.available_memory_nbytes()
    limit, used = resources.container_limit_nbytes(), resources.container_used_nbytes()
    return free if limit is None or used is None else min(free, max(0, limit - used))


def is_in_memory(folder: Path) -> bool:
    """Whether files in a folder are in main memory, as far as can be known."""
    try:
        mounts = Path("/proc/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return False
    path = folder.resolve()
    kinds = {Path(line.split()[1]): line.split()[2] for line in mounts}
    mount = next((place for place in (path, *path.parents) if place in kinds), None)
    return mount is not None and kinds[mount] in ("tmpfs", "ramfs")


def keep_memory() -> None:
    """Tells glibc to keep freed memory: tensors of megabytes come and go at every step.

    By default glibc maps each anew, and the page faults cost a fifth of the throughput on few cores
    (docs/log.md). Elsewhere than on glibc this does nothing.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(_M_TOP_PAD, 2**28)


def _cpu_has_bfloat16() -> bool:
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False  # not Linux: float32 is the safe answer
    return "avx512_bf16" in cpuinfo or "amx_bf16" in cpuinfo
