"""A worker process: what reaches it, what comes back, and what is said of its death."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace.pools.processes import WorkerProcess

CHILD = """
import os, sys, time
from headrace.errors import HeadraceError, PeerLost
from headrace.pools.processes import WorkerEnd

def theirs():
    raise ValueError("no sun")

end = WorkerEnd.open()
end.status({"settings": end.settings, "torch": "torch" in sys.modules, "path": sys.path[0],
            "threads": os.environ["OMP_NUM_THREADS"]})
while True:
    try:
        order = end.receive().decode()
    except PeerLost:
        end.status({"left": True})
        break
    if order == "raise":
        raise ValueError("no moon")
    if order == "ours":
        raise HeadraceError("a sentence of ours")
    if order == "from":
        try:
            theirs()
        except ValueError as error:
            raise HeadraceError("a sentence of ours") from error
    if order == "exit":
        sys.exit(5)
    if order == "hang":
        time.sleep(1000.0)
    if order == "print":
        sys.stdout.write("one\\ntwo\\nthr")
    if order == "program":
        end.status({"pid": __import__("subprocess").Popen(["sleep", "1000"]).pid})
    if order == "wait":
        end.status({"nothing": end.receive(0.0) is None})
    end.status({"did": order[:10], "bytes": len(order)})
"""


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], WorkerProcess]]:
    (tmp_path / "some_child.py").write_text(CHILD)
    monkeypatch.syspath_prepend(str(tmp_path))
    started = []

    def make() -> WorkerProcess:
        started.append(WorkerProcess("some_child", {"x": [1, "é"]}, name="some child"))
        return started[-1]

    yield make
    for worker in started:
        worker.close()


Start = Callable[[], WorkerProcess]


def until(what: Callable[[], Any]) -> Any:
    """Waits for something that another process does."""
    for _ in range(3000):
        got = what()
        if got:
            return got
        time.sleep(0.01)
    raise AssertionError("it never came")


def message(worker: WorkerProcess, key: str) -> Any:
    return until(lambda: [m for m in worker.messages() if key in m])[0][key]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def test_it_starts_small_with_settings_and_the_path_of_its_parent(
    start: Start, tmp_path: Path
) -> None:
    worker = start()
    first = until(worker.messages)[0]
    assert first == {
        "settings": {"x": [1, "é"]},
        "torch": False,
        "path": str(tmp_path),
        "threads": "1",
    }
    worker.send(b"hello")
    assert message(worker, "did") == "hello"
    assert worker.death() is None


def test_the_worker_module_of_the_pool_imports_no_torch() -> None:
    code = "import sys, headrace.run.worker; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("order", "cause"),
    [
        (b"raise", "ValueError: no moon (some_child.py:19 in <module>)"),
        (b"ours", "a sentence of ours"),
        (b"from", "a sentence of ours (some_child.py:7 in theirs)"),
        (b"exit", "left by itself with exit code 5"),
    ],
)
def test_a_death_has_a_cause(start: Start, order: bytes, cause: str) -> None:
    worker = start()
    worker.send(order)
    assert until(worker.death) == cause
    worker.send(b"anybody there?")


def test_what_was_told_before_a_death_is_not_lost(start: Start) -> None:
    worker = start()
    message(worker, "settings")
    worker.send(b"last words")
    worker.hang_up()
    assert until(worker.death).startswith("left by itself with exit code 0")
    assert worker.messages() == [{"did": "last words", "bytes": 10}, {"left": True}]
    assert worker.messages() == []
    closed = start()
    message(closed, "settings")
    closed.close(60.0)
    assert closed.messages() == [{"left": True}]


def test_a_kill_from_outside_is_named_and_comes_with_last_words(start: Start) -> None:
    worker = start()
    worker.send(b"print")
    message(worker, "did")
    assert worker.printed() == ["one", "two"]
    assert worker.printed() == []
    os.kill(worker.pid, signal.SIGKILL)
    cause = "killed (SIGKILL): out of memory, or somebody killed it; its last words: one / two"
    assert until(worker.death) in {cause, cause + " / thr"}


def test_a_hang_can_be_asked_where(start: Start) -> None:
    worker = start()
    message(worker, "settings")
    worker.send(b"hang")
    where = until(lambda: "line 30" in (stack := worker.stack()) and stack)
    assert "some_child.py" in where
    worker.kill("it hung")
    assert until(worker.death) == "it hung"


def test_what_its_environments_started_dies_with_it(start: Start) -> None:
    worker = start()
    worker.send(b"program")
    pid = message(worker, "pid")
    assert not gone(pid)
    os.kill(worker.pid, signal.SIGKILL)
    until(worker.death)
    until(lambda: gone(pid))


def test_it_leaves_when_the_parent_hangs_up(start: Start) -> None:
    worker = start()
    message(worker, "settings")
    worker.hang_up()
    assert message(worker, "left")
    assert until(worker.death) == "left by itself with exit code 0"


def test_a_worker_that_does_not_leave_is_killed(start: Start) -> None:
    worker = start()
    message(worker, "settings")
    worker.send(b"hang")
    worker.close(timeout_s=0.1)
    assert gone(worker.pid)
    worker.close()


def test_more_than_a_pipe_holds_arrives_in_pieces(start: Start) -> None:
    worker = start()
    worker.send(b"x" * 300_000)
    total = 0
    while total < 300_000:
        total += sum(m.get("bytes", 0) for m in worker.messages())
    assert total == 300_000


def test_a_receive_can_give_up(start: Start) -> None:
    worker = start()
    worker.send(b"wait")
    assert message(worker, "nothing")


PARENT = """
import json, sys, threading, time
from headrace.pools.processes import WorkerProcess

def start():
    worker = WorkerProcess("some_child", {}, name="x")
    workers.append(worker)
    worker.send(b"program")

workers = []
thread = threading.Thread(target=start)
thread.start()
thread.join()  # the worker must live on: it belongs to the process, not to the thread
pids = [workers[0].pid]
while len(pids) < 2:
    pids += [m["pid"] for m in workers[0].messages() if "pid" in m]
time.sleep(0.2)
assert workers[0].death() is None
workers[0].send(b"hang")
sys.stdout.write(json.dumps(pids) + "\\n")
sys.stdout.flush()
time.sleep(1000.0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_outlives_a_parent_that_was_killed(start: Start, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as main:
        assert main.stdout is not None
        pids = json.loads(main.stdout.readline())
        assert not any(gone(pid) for pid in pids)
        main.kill()
    for pid in pids:
        until(lambda pid=pid: gone(pid))
