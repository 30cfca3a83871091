"""What kernel and GPU driver count, read from files and from a driver that are made up."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.telemetry.load import Driver, LoadMeter, core_ticks, process_ticks, tree_ticks

STAT = """\
cpu  1000 0 0 3000 0 0 0 0 0 0
cpu0 100 20 30 400 50 6 7 8 9 10
cpu1 1 2 3 4 5 6 7 8 0 0
cpu10 1000 0 0 1000 0 0 0 0 0 0
intr 5 6 7
ctxt 99
"""


def stat_line(name: str, times: tuple[int, int, int, int]) -> str:
    return f"12 ({name}) R 1 1 1 0 -1 4194304 99 0 0 0 {' '.join(map(str, times))} 20 0 1 0 77 88\n"


def write_process(
    proc: Path, pid: int, times: tuple[int, int, int, int], children: dict[int, list[int]]
) -> None:
    """Makes the files of one process; `children` by the thread that started them."""
    for thread, started in children.items():
        folder = proc / str(pid) / "task" / str(thread)
        folder.mkdir(parents=True)
        (folder / "children").write_text("".join(f"{child} " for child in started), "ascii")
    (proc / str(pid) / "stat").write_text(stat_line("some process", times), "utf-8")


@pytest.mark.parametrize("name", ["python", "two words", "a) R 1 (b", "é"])
def test_time_of_a_process_whatever_its_name(name: str) -> None:
    assert process_ticks(stat_line(name, (1000, 200, 30, 4))) == 1234


def test_a_tree_has_all_its_descendants_once(tmp_path: Path) -> None:
    write_process(tmp_path, 1, (1, 0, 0, 0), {1: [2], 11: [3]})
    write_process(tmp_path, 2, (10, 0, 0, 0), {2: []})
    write_process(tmp_path, 3, (100, 0, 0, 0), {3: [4]})
    write_process(tmp_path, 4, (0, 1000, 20000, 300000), {4: [99]})  # 99 is gone already
    write_process(tmp_path, 5, (7, 7, 7, 7), {5: []})  # somebody else's
    assert tree_ticks(tmp_path, 1) == 321_111
    assert tree_ticks(tmp_path, 99) == 0


def test_a_kernel_that_does_not_list_children_still_counts_the_process(tmp_path: Path) -> None:
    write_process(tmp_path, 1, (5, 0, 0, 0), {1: [2]})
    (tmp_path / "1" / "task" / "1" / "children").unlink()
    assert tree_ticks(tmp_path, 1) == 5


def test_cores_that_are_busy() -> None:
    # All but idle and waiting for a disk, and guests are within user time.
    assert core_ticks(STAT, {0}) == (171, 621)
    assert core_ticks(STAT, {0, 1}) == (171 + 27, 621 + 36)
    assert core_ticks(STAT, {10}) == (1000, 2000)
    assert core_ticks("", {0}) == core_ticks(STAT, {7}) == (0, 0)


def set_clocks(proc: Path, process_s: float, busy: int, idle: int) -> None:
    own = proc / str(os.getpid())
    (own / "task").mkdir(parents=True, exist_ok=True)
    ticks = round(process_s * os.sysconf("SC_CLK_TCK"))
    (own / "stat").write_text(stat_line("x", (ticks, 0, 0, 0)), "ascii")
    lines = [f"cpu{core} {busy} 0 0 {idle} 0 0 0 0" for core in os.sched_getaffinity(0)]
    (proc / "stat").write_text("\n".join(lines), "ascii")


def test_loads_are_those_of_the_interval(tmp_path: Path) -> None:
    set_clocks(tmp_path, 100.0, 1000, 1000)
    meter = LoadMeter([torch.device("cpu")], 50.0, proc=tmp_path)
    set_clocks(tmp_path, 107.0, 1300, 1100)
    assert meter.read(50.1) == {}  # too short to say anything
    assert meter.read(54.0) == {"cpu_load": 1.75, "cpu_load_machine": 0.75}
    set_clocks(tmp_path, 109.0, 1300, 1200)
    assert meter.read(54.1) == {"cpu_load": 1.75, "cpu_load_machine": 0.75}
    assert meter.read(55.0) == {"cpu_load": 2.0, "cpu_load_machine": 0.0}
    set_clocks(tmp_path, 108.0, 1300, 1200)  # a child has gone, and is not yet counted
    assert meter.read(56.0) == {"cpu_load": 0.0}


def test_without_proc_the_process_itself_is_measured(tmp_path: Path) -> None:
    meter = LoadMeter([], 0.0, proc=tmp_path / "none")
    until_s = time.process_time() + 0.05
    while time.process_time() < until_s:
        pass
    loads = meter.read(1.0)
    assert loads.keys() == {"cpu_load"}
    assert 0.05 <= loads["cpu_load"] < 5.0


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_work_of_a_child_counts_while_it_lives_and_after() -> None:
    burn = "import time, sys\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"
    before = tree_ticks(Path("/proc"), os.getpid())
    own_s = time.process_time()
    with subprocess.Popen(
        [sys.executable, "-c", burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        alive = tree_ticks(Path("/proc"), os.getpid())
        child.communicate(b"\n", timeout=30)
    ended = tree_ticks(Path("/proc"), os.getpid())
    ticks_per_s = os.sysconf("SC_CLK_TCK")
    of_child = 0.25 * ticks_per_s
    own = (time.process_time() - own_s) * ticks_per_s
    assert alive - before >= of_child
    assert ended >= alive
    assert ended - before - own >= of_child


class FakeNvml:
    """Stands for the driver's library; every call returns 0 or an error."""

    def __init__(self, percent: dict[bytes, int], **errors: int) -> None:
        self._percent, self._errors = percent, errors

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return self._errors.get("start", 0)

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:  # noqa: N802
        if uuid not in self._percent:
            return 6
        handle._obj.value = 1 + list(self._percent).index(uuid)
        return 0

    def nvmlDeviceGetUtilizationRates(self, handle: ctypes.c_void_p, used: Any) -> int:  # noqa: N802
        assert handle.value is not None
        used._obj.gpu = list(self._percent.values())[handle.value - 1]
        return self._errors.get("rates", 0)


def test_load_of_gpus_is_asked_of_the_driver() -> None:
    nvml = FakeNvml({b"GPU-a": 40, b"GPU-b": 90})
    assert Driver(nvml, ["b"]).load() == 0.9
    assert Driver(nvml, ["GPU-a", "b"]).load() == pytest.approx(0.65)


@pytest.mark.parametrize(
    "driver",
    [
        Driver(None, ["a"]),
        Driver(FakeNvml({b"GPU-a": 40}, start=9), ["a"]),
        Driver(FakeNvml({b"GPU-a": 40}, rates=3), ["a"]),  # a slice of a GPU
        Driver(FakeNvml({b"GPU-a": 40}), ["c"]),
        Driver.open([]),
    ],
)
def test_a_driver_that_does_not_say_costs_nothing_but_the_number(driver: Driver) -> None:
    assert driver.load() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_says_how_busy_it_is() -> None:
    device = torch.device("cuda", 0)
    meter = LoadMeter([device], 0.0)
    held = torch.zeros(1 << 28, device=device)  # 1 GiB
    loads = meter.read(1.0)
    assert loads["gpu_memory_gib"] >= held.nbytes / 2**30
    assert 0.0 <= loads.get("gpu_load", 0.0) <= 1.0
