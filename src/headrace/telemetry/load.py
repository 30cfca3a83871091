"""How much of the machine a run uses, as the kernel and the GPU's driver count it.

```
cpu_load           cores that this process and its children kept busy: 1.8 is nearly two
cpu_load_machine   0..1, share of time that the cores this process may use were busy, with anything
gpu_load           0..1, share of time that something ran on the GPU, however little of it
gpu_memory_gib     what PyTorch holds in this process
```
Where the kernel has no /proc, `cpu_load` is that of this process alone and `cpu_load_machine` is
left out; so are the last two where there is no GPU, and `gpu_load` where its driver does not say.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

_LEAST_INTERVAL_S = 0.2  # the kernel counts in hundredths of a second
_IDLE, _IO_WAIT, _GUEST = 3, 4, 8  # columns of a cpu line in /proc/stat
_GIB = 2**30


def process_ticks(stat: str) -> int:
    """Returns clock ticks of a process and of its children that have ended, from its stat file.

    User and system time: utime, stime, cutime and cstime of proc(5).
    """
    fields = stat.rpartition(")")[2].split()  # the name before it may hold spaces and brackets
    return sum(int(field) for field in fields[11:15])


def tree_ticks(proc: Path, pid: int) -> int:
    """Returns the clock ticks of a process and all its descendants, ended ones included."""
    ticks, left = 0, [pid]
    while left:
        process = proc / str(left.pop())
        try:
            ticks += process_ticks((process / "stat").read_text("utf-8", "replace"))
            for thread in (process / "task").iterdir():
                left += map(int, (thread / "children").read_text("ascii").split())
        except OSError:  # it ended just now, and its parent will count it; or there is no such file
            continue
    return ticks


def core_ticks(stat: str, cores: Collection[int]) -> tuple[int, int]:
    """Returns clock ticks (busy, all) of some cores, from the text of /proc/stat.

    Time that the host gave to others is busy: it was not to be had.
    """
    busy = total = 0
    for line in stat.splitlines():
        name, *fields = line.split() or [""]
        number = name.removeprefix("cpu")
        if name.startswith("cpu") and number.isdigit() and int(number) in cores:
            ticks = [int(field) for field in fields[:_GUEST]]  # guests are counted as user time too
            total += sum(ticks)
            busy += sum(ticks) - ticks[_IDLE] - ticks[_IO_WAIT]
    return busy, total


class LoadMeter:
    """Reads counters at intervals and says what was used in between. One thread."""

    def __init__(
        self, devices: Collection[torch.device], now_s: float, *, proc: Path = Path("/proc")
    ) -> None:
        """Starts the first interval.

        Args:
            devices: That the run computes on; processors are measured in any case.
            now_s: Monotonic clock.
            proc: Where the kernel shows its counters.
        """
        self._gpus = sorted({device.index or 0 for device in devices if device.type == "cuda"})
        self._driver = Driver.open(self._gpus)
        self._proc = proc
        self._last_s = now_s
        self._process_s = self._read_process_s()
        self._cores = self._read_cores()
        self._newest: dict[str, float] = {}

    def read(self, now_s: float) -> dict[str, float]:
        """Returns the loads since the last read by name, or again the newest if that was just now.

        Nothing is said before a fifth of a second has passed.
        """
        elapsed_s = now_s - self._last_s
        if elapsed_s < _LEAST_INTERVAL_S:
            return dict(self._newest)
        before_s, self._process_s = self._process_s, self._read_process_s()
        cores, self._cores = self._cores, self._read_cores()
        self._last_s = now_s
        # A process that ends between two looks may be missing for one interval.
        loads = {"cpu_load": max(0.0, self._process_s - before_s) / elapsed_s}
        busy, total = (new - old for new, old in zip(self._cores, cores, strict=True))
        if total > 0:
            loads["cpu_load_machine"] = min(max(busy / total, 0.0), 1.0)
        if self._gpus:
            gpu = self._driver.load()
            if gpu is not None:
                loads["gpu_load"] = gpu
            held = sum(torch.cuda.memory_reserved(gpu) for gpu in self._gpus)
            loads["gpu_memory_gib"] = held / _GIB
        self._newest = loads
        return dict(loads)

    def _read_process_s(self) -> float:
        ticks = tree_ticks(self._proc, os.getpid())
        return ticks / os.sysconf("SC_CLK_TCK") if ticks else time.process_time()

    def _read_cores(self) -> tuple[int, int]:
        try:
            stat = (self._proc / "stat").read_text("ascii")
        except OSError:  # not Linux
            return 0, 0
        return core_ticks(stat, os.sched_getaffinity(0))


class _Utilization(ctypes.Structure):
    """`nvmlUtilization_t`: percent of time in which a kernel ran, and memory was moved."""

    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class Driver:
    """The NVIDIA driver's own counters (NVML), which come with it and need no package."""

    def __init__(self, library: Any, uuids: Sequence[str]) -> None:
        """Finds the GPUs of these UUIDs; `library` is None where there is no driver."""
        self._library = library
        self._handles: list[ctypes.c_void_p] = []
        if library is None or library.nvmlInit_v2() != 0:
            return
        for uuid in uuids:
            handle = ctypes.c_void_p()
            name = f"GPU-{uuid.removeprefix('GPU-')}".encode("ascii")
            if library.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)) == 0:
                self._handles.append(handle)

    @classmethod
    def open(cls, gpus: Sequence[int]) -> Driver:
        """Loads the driver's library, if there are GPUs to ask for, by their PyTorch numbers."""
        if not gpus:
            return cls(None, ())
        try:
            library = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            return cls(None, ())
        # PyTorch may have been shown only some of the GPUs: their numbers are its own.
        return cls(library, [str(torch.cuda.get_device_properties(gpu).uuid) for gpu in gpus])

    def load(self) -> float | None:
        """Returns the mean share of time that the GPUs computed; None where it is not said.

        A slice of a GPU (MIG) has no such counter.
        """
        shares = []
        for handle in self._handles:
            used = _Utilization()
            if self._library.nvmlDeviceGetUtilizationRates(handle, ctypes.byref(used)) != 0:
                return None
            shares.append(used.gpu / 100.0)
        return sum(shares) / len(shares) if shares else None
