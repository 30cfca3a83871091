"""How much of the machine a run uses, as psutil and the GPU's driver count it.

```
cpu_load           cores that this process and its children kept busy: 1.8 is nearly two
cpu_load_machine   0..1, share of time that the cores this process may use were busy, with anything
gpu_load           0..1, share of time that something ran on the GPU, however little of it
gpu_memory_gib     what PyTorch holds in this process
```
The last two are left out where there is no GPU, and `gpu_load` where its driver does not say.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress
from typing import Any

import psutil
import torch

_LEAST_INTERVAL_S = 0.2  # kernels count in hundredths of a second
_GIB = 2**30


def tree_s() -> float:
    """Returns the processor time of this process and its descendants, ended ones included."""
    used_s = sum(os.times()[:4])  # with children that have ended, which psutil says on Linux only
    for process in psutil.Process().children(recursive=True):
        try:
            used_s += sum(process.cpu_times()[:4])  # user and system: own, and of ended children
        except psutil.Error:  # it ended just now, and its parent will count it
            continue
    return used_s


def cores_s() -> tuple[float, float]:
    """Returns the time (busy, all) of the cores that this process may use.

    Time that the host gave to others is busy: it was not to be had.
    """
    cores = psutil.cpu_times(percpu=True)
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        cores = [cores[core] for core in os.sched_getaffinity(0) if core < len(cores)]
    busy_s = all_s = 0.0
    for core in cores:
        times = core._asdict()
        for guest in ("guest", "guest_nice"):  # counted as user time too
            times.pop(guest, None)
        all_s += sum(times.values())
        busy_s += sum(times.values()) - times["idle"] - times.get("iowait", 0.0)
    return busy_s, all_s


class LoadMeter:
    """Reads counters at intervals and says what was used in between. One thread."""

    def __init__(self, devices: Collection[torch.device], now_s: float) -> None:
        """Starts the first interval.

        Args:
            devices: That the run computes on; processors are measured in any case.
            now_s: Monotonic clock.
        """
        self._gpus = sorted({device.index or 0 for device in devices if device.type == "cuda"})
        # PyTorch may have been shown only some of the GPUs: their numbers are its own.
        self._gpu_load = GpuLoad(
            [str(torch.cuda.get_device_properties(gpu).uuid) for gpu in self._gpus]
        )
        self._last_s = now_s
        self._tree_s = tree_s()
        self._cores_s = cores_s()
        self._newest: dict[str, float] = {}

    def read(self, now_s: float) -> dict[str, float]:
        """Returns the loads since the last read by name, or again the newest if that was just now.

        Nothing is said before a fifth of a second has passed.
        """
        elapsed_s = now_s - self._last_s
        if elapsed_s < _LEAST_INTERVAL_S:
            return dict(self._newest)
        before_s, self._tree_s = self._tree_s, tree_s()
        cores_before_s, self._cores_s = self._cores_s, cores_s()
        self._last_s = now_s
        # A process that ends between two looks may be missing for one interval.
        loads = {"cpu_load": max(0.0, self._tree_s - before_s) / elapsed_s}
        busy_s, all_s = (new - old for new, old in zip(self._cores_s, cores_before_s, strict=True))
        if all_s > 0:
            loads["cpu_load_machine"] = min(max(busy_s / all_s, 0.0), 1.0)
        if self._gpus:
            gpu = self._gpu_load.read()
            if gpu is not None:
                loads["gpu_load"] = gpu
            held = sum(torch.cuda.memory_reserved(gpu) for gpu in self._gpus)
            loads["gpu_memory_gib"] = held / _GIB
        self._newest = loads
        return dict(loads)


class GpuLoad:
    """What the NVIDIA driver counts (NVML), where there is one."""

    def __init__(self, uuids: Collection[str]) -> None:
        """Finds the GPUs of these UUIDs."""
        self._nvml: Any = None
        self._handles: list[Any] = []
        if not uuids:
            return
        try:
            import pynvml  # noqa: PLC0415 - where there are GPUs

            pynvml.nvmlInit()
        except ImportError:  # on other systems
            return
        except pynvml.NVMLError:  # no driver
            return
        self._nvml = pynvml
        for uuid in uuids:
            with suppress(pynvml.NVMLError):  # a slice of a GPU (MIG) has another name
                name = f"GPU-{uuid.removeprefix('GPU-')}"
                self._handles.append(pynvml.nvmlDeviceGetHandleByUUID(name))

    def read(self) -> float | None:
        """Returns the mean share of time that the GPUs computed; None where it is not said.

        A slice of a GPU (MIG) has no such counter.
        """
        if not self._handles:
            return None
        try:
            rates = [self._nvml.nvmlDeviceGetUtilizationRates(gpu) for gpu in self._handles]
        except self._nvml.NVMLError:
            return None
        percent: float = sum(rate.gpu for rate in rates) / len(rates)
        return percent / 100.0
