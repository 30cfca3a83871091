"""What kernel and GPU driver count, from processes, cores and a driver that are made up."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from headrace.telemetry import load
from headrace.telemetry.load import GpuLoad, LoadMeter, cores_s, tree_s

LinuxCore = namedtuple(
    "LinuxCore", "user nice system idle iowait irq softirq steal guest guest_nice"
)
MacCore = namedtuple("MacCore", "user nice system idle")


class FakeProcess:
    """Stands for psutil.Process; one without times has ended already."""

    def __init__(self, *times: float, children: tuple[FakeProcess, ...] = ()) -> None:
        self._times, self._children = times, children

    def cpu_times(self) -> tuple[float, ...]:
        if not self._times:
            raise psutil.NoSuchProcess(1)
        return self._times

    def children(self, recursive: bool) -> tuple[FakeProcess, ...]:
        assert recursive
        return self._children


def test_a_tree_has_itself_its_descendants_and_those_that_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The fifth number, where there is one, is time spent waiting for a disk.
    children = (FakeProcess(10, 20, 0, 0, 99), FakeProcess(), FakeProcess(0, 0, 100, 200, 99))
    monkeypatch.setattr(psutil, "Process", lambda: FakeProcess(children=children))
    monkeypatch.setattr(os, "times", lambda: (1.0, 2.0, 3.0, 4.0, 1e9))
    assert tree_s() == 340


def test_cores_that_are_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    times = [
        LinuxCore(100, 20, 30, 400, 50, 6, 7, 8, 9, 10),
        LinuxCore(1, 2, 3, 4, 5, 6, 7, 8, 0, 0),
    ]
    monkeypatch.setattr(psutil, "cpu_times", lambda percpu: times)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    # All but idle and waiting for a disk, and guests are within user time.
    assert cores_s() == (171, 621)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert cores_s() == (171 + 27, 621 + 36)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {7})  # the others are switched off
    assert cores_s() == (0, 0)


def test_where_no_process_is_bound_to_cores_all_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "cpu_times", lambda percpu: [MacCore(1, 2, 3, 4)] * 2)
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cores_s() == (12, 20)


def test_loads_are_those_of_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    def set_clocks(process_s: float, busy_s: float, idle_s: float) -> None:
        monkeypatch.setattr(load, "tree_s", lambda: process_s)
        monkeypatch.setattr(load, "cores_s", lambda: (busy_s, busy_s + idle_s))

    set_clocks(100.0, 1000, 1000)
    meter = LoadMeter([torch.device("cpu")], 50.0)
    set_clocks(107.0, 1300, 1100)
    assert meter.read(50.1) == {}  # too short to say anything
    assert meter.read(54.0) == {"cpu_load": 1.75, "cpu_load_machine": 0.75}
    set_clocks(109.0, 1300, 1200)
    assert meter.read(54.1) == {"cpu_load": 1.75, "cpu_load_machine": 0.75}
    assert meter.read(55.0) == {"cpu_load": 2.0, "cpu_load_machine": 0.0}
    set_clocks(108.0, 1300, 1200)  # a child has gone, and is not yet counted
    assert meter.read(56.0) == {"cpu_load": 0.0}


def test_this_machine_says_what_it_does() -> None:
    meter = LoadMeter([], 0.0)
    until_s = time.process_time() + 0.1
    while time.process_time() < until_s:
        pass
    loads = meter.read(1.0)
    assert loads.keys() == {"cpu_load", "cpu_load_machine"}
    assert 0.05 <= loads["cpu_load"] < 5.0
    assert 0.0 < loads["cpu_load_machine"] <= 1.0


def test_work_of_a_child_counts_while_it_lives_and_after() -> None:
    burn = "import time, sys\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"
    before_s, own_s = tree_s(), time.process_time()
    with subprocess.Popen(
        [sys.executable, "-c", burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        alive_s = tree_s()
        child.communicate(b"\n", timeout=30)
    ended_s = tree_s()
    own_s = time.process_time() - own_s
    assert alive_s - before_s >= 0.25
    assert ended_s >= alive_s
    assert ended_s - before_s - own_s >= 0.25


class FakeNvml:
    """Stands for the module of the driver's counters; fails where it is told to."""

    class NVMLError(Exception):
        pass

    def __init__(self, percent: dict[str, int], fails: str = "") -> None:
        self._percent, self._fails = percent, fails

    def _maybe_fail(self, what: str) -> None:
        if what == self._fails:
            raise self.NVMLError(what)

    def nvmlInit(self) -> None:  # noqa: N802
        self._maybe_fail("init")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:  # noqa: N802
        if uuid not in self._percent:
            raise self.NVMLError("not found")
        return self._percent[uuid]

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:  # noqa: N802
        self._maybe_fail("rates")
        return SimpleNamespace(gpu=handle, memory=0)


def test_load_of_gpus_is_asked_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml({"GPU-a": 40, "GPU-b": 90}))
    assert GpuLoad(["b"]).read() == 0.9
    assert GpuLoad(["GPU-a", "b"]).read() == pytest.approx(0.65)
    assert GpuLoad(["a slice", "a"]).read() == 0.4


@pytest.mark.parametrize(
    ("module", "uuids"),
    [
        (None, ["a"]),  # what `import` takes for not installed
        (FakeNvml({"GPU-a": 40}, fails="init"), ["a"]),  # no driver
        (FakeNvml({"GPU-a": 40}, fails="rates"), ["a"]),  # a slice of a GPU
        (FakeNvml({"GPU-a": 40}), ["c"]),
        (FakeNvml({"GPU-a": 40}), []),
    ],
)
def test_a_driver_that_does_not_say_costs_nothing_but_the_number(
    monkeypatch: pytest.MonkeyPatch, module: FakeNvml | None, uuids: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert GpuLoad(uuids).read() is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a driver")
@pytest.mark.skipif(sys.platform == "darwin", reason="has no such package")
def test_the_real_module_says_nothing_without_a_driver(capfd: pytest.CaptureFixture[str]) -> None:
    assert GpuLoad(["a"]).read() is None
    assert capfd.readouterr() == ("", "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_says_how_busy_it_is() -> None:
    device = torch.device("cuda", 0)
    meter = LoadMeter([device], 0.0)
    held = torch.zeros(1 << 28, device=device)  # 1 GiB
    loads = meter.read(1.0)
    assert loads["gpu_memory_gib"] >= held.nbytes / 2**30
    assert 0.0 <= loads.get("gpu_load", 0.0) <= 1.0
