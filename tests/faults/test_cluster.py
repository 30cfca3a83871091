"""Training on Ray, with real processes: what dies is named and mended, and nothing is left over.

One machine plays all nodes (Ray's own test cluster, `ray_nodes.py`), on loopback, with a token.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("ray")
pytestmark = [pytest.mark.net, pytest.mark.slow]

DEADLINE_S = 240.0
LEARNER, HOST = "headrace.run.learner_process", "headrace.run.host"


class Driver:
    """`headrace train` in a process of its own, and what it says."""

    def __init__(
        self, out: Path, *flags: str, env: dict[str, str], frames: int = 1_000_000_000
    ) -> None:
        code = "import sys; from headrace.cli import main; sys.exit(main())"
        settings = ("--out", str(out), "--log-interval-s", "0.5", "--checkpoint-interval-s", "1")
        settings += ("--total-frames", str(frames))
        self.out = out
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "train", "catch", *settings, *flags],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **env},
            start_new_session=True,
        )

    def log(self) -> str:
        path = self.out / "log.txt"
        return path.read_text() if path.exists() else ""

    def rows(self) -> list[dict[str, Any]]:
        path = self.out / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def until(self, happened: Callable[[], Any], what: str) -> Any:
        """Waits for it, for as long as the run goes on."""
        until_s = time.monotonic() + DEADLINE_S
        while time.monotonic() < until_s:
            got = happened()
            if got:
                return got
            assert self.process.poll() is None, f"ended before {what}:\n{self.end()[1]}"
            time.sleep(0.1)
        raise AssertionError(f"no {what} within {DEADLINE_S:g} s:\n{self.log()}")

    def learns(self) -> dict[str, Any]:
        """Waits until the run has moved on by several rows; returns the newest."""
        seen = len(self.rows())
        frames = self.rows()[-1]["env_frames"] if seen else 0

        def moved() -> Any:
            new = self.rows()[seen + 1 :]
            return new[-1] if new and new[-1]["env_frames"] > frames else None

        return dict(self.until(moved, "progress"))

    def end(self, signum: int = 0) -> tuple[int, str]:
        if signum:
            self.process.send_signal(signum)
        printed, _ = self.process.communicate(timeout=DEADLINE_S)
        return self.process.returncode, printed


class Nodes:
    """The nodes of a cluster."""

    def __init__(self, cpus: int, env: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("ray_nodes.py")), str(cpus)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **env},
        )
        self.address = self._answer()

    def add(self, cpus: int) -> int:
        return int(self._ask(f"add {cpus}"))

    def remove(self, number: int) -> None:
        assert self._ask(f"remove {number}") == "ok"

    def _ask(self, line: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        answer = self.process.stdout.readline().strip()
        assert answer, "the cluster has failed"
        return answer

    def close(self) -> None:
        try:
            self.process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()


def ours(mark: str, module: str = "") -> list[psutil.Process]:
    """Returns the living processes of a test, which it has marked, that run a module."""
    found = []
    for process in psutil.process_iter():
        try:
            line, variables = process.cmdline(), process.environ()
        except psutil.Error:
            continue
        if variables.get("TEST_MARK") == mark and (not module or module in line):
            found.append(process)
    return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def env(tmp_path: Path) -> Iterator[dict[str, str]]:
    mark = secrets.token_hex(4)
    folder = Path("/tmp") / f"hr-{mark}"  # paths of sockets must be short
    folder.mkdir()
    yield {
        "TEST_MARK": mark,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback alone
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    until_s = time.monotonic() + 60
    while ours(mark) and time.monotonic() < until_s:
        time.sleep(0.2)
    left = [" ".join(process.cmdline())[:200] for process in ours(mark)]
    for process in ours(mark):
        process.kill()
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    assert left == [], "processes were left over"


@pytest.fixture
def nodes(env: dict[str, str]) -> Iterator[Nodes]:
    made = Nodes(2, env)
    yield made
    made.close()


def test_local_from_start_to_end(tmp_path: Path, env: dict[str, str]) -> None:
    own = {"TEST_MARK": env["TEST_MARK"], "TMPDIR": env["RAY_TMPDIR"]}
    driver = Driver(tmp_path / "run", "--cluster", "local", env=own, frames=20_000)
    driver.until(lambda: ours(env["TEST_MARK"], HOST), "host")
    for process in ours(env["TEST_MARK"]):  # Ray's too
        for connection in process.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN:
                address = connection.laddr.ip.removeprefix("::ffff:")
                assert address == "127.0.0.1", process.cmdline()
    code, printed = driver.end()
    assert code == 0, printed
    assert "done; go on with" in printed
    assert driver.rows()[-1]["env_frames"] >= 20000
    assert driver.rows()[-1]["cluster_hosts"] == 1
    assert 'listen = ""' in (driver.out / "config.toml").read_text()
    assert [path.name for path in driver.out.glob(".seen*")] == []
    assert list(Path(env["RAY_TMPDIR"]).glob("headrace-*")) == []


def test_killed_processes_start_again_and_a_stop_saves(
    tmp_path: Path, env: dict[str, str], nodes: Nodes
) -> None:
    driver = Driver(tmp_path / "run", "--cluster", nodes.address, env=env)
    driver.learns()
    (host,) = ours(env["TEST_MARK"], HOST)
    host.kill()
    driver.until(lambda: "died: killed (SIGKILL)" in driver.log(), "obituary")
    driver.until(
        lambda: any(other.pid != host.pid for other in ours(env["TEST_MARK"], HOST)), "new host"
    )
    row = driver.learns()
    assert row["cluster_host_deaths"] == 1
    assert row["learner_deaths"] == 0

    (learner,) = ours(env["TEST_MARK"], LEARNER)
    saved = row["env_frames"]
    learner.kill()
    driver.until(lambda: "the learner died: killed (SIGKILL)" in driver.log(), "obituary")
    row = driver.until(
        lambda: next((r for r in driver.rows() if r.get("learner_deaths") == 1), None), "row"
    )
    assert row["env_frames"] > saved / 2, "it went on from a checkpoint, not from nothing"
    row = driver.learns()
    assert row["cluster_host_deaths"] == 1, "the host has found the learner by itself"

    for module in (HOST, LEARNER):  # with Ray's worker, which then can tell nothing
        (process,) = ours(env["TEST_MARK"], module)
        parent = process.parent()
        assert parent is not None
        parent.kill()
        driver.until(lambda gone=process: not gone.is_running(), "death with its worker")
    driver.until(
        lambda: any(
            (r.get("learner_deaths"), r.get("cluster_host_deaths")) == (2, 2) for r in driver.rows()
        ),
        "both counted",
    )
    driver.learns()
    code, printed = driver.end(signal.SIGINT)
    assert code == 0, printed
    assert "stopped and saved" in printed
    last = driver.rows()[-1]["agent_steps"]
    assert (driver.out / "checkpoints" / f"agent_steps_{last:012d}").is_dir()
    token = env["RAY_AUTH_TOKEN"]
    for path in (p for p in driver.out.rglob("*") if p.is_file()):
        assert token.encode() not in path.read_bytes(), path


def test_nodes_come_and_go(tmp_path: Path, env: dict[str, str], nodes: Nodes) -> None:
    driver = Driver(tmp_path / "run", "--cluster", nodes.address, env=env)
    driver.learns()
    added = nodes.add(1)  # fewer processors than the learner's, which stays where it is
    driver.until(lambda: len(ours(env["TEST_MARK"], HOST)) == 2, "second host")
    driver.until(lambda: "divided anew among 2 worker hosts" in driver.log(), "new shares")
    driver.until(
        lambda: driver.learns()["cluster_hosts"] == 2 and "steps 32 environments" in driver.log(),
        "both at work",
    )
    nodes.remove(added)
    driver.until(lambda: len(ours(env["TEST_MARK"], HOST)) == 1, "death of its host")

    def counted() -> Any:
        row = driver.learns()
        return row if row["cluster_nodes"] == 1 and row["cluster_hosts"] == 1 else None

    row = driver.until(counted, "progress with the other host alone")
    assert row["cluster_host_deaths"] >= 1
    assert row["learner_deaths"] == 0
    assert driver.end(signal.SIGINT)[0] == 0


def test_a_learner_survives_its_node(tmp_path: Path, env: dict[str, str], nodes: Nodes) -> None:
    added = nodes.add(4)  # more than the first one's, so the learner goes there
    driver = Driver(tmp_path / "run", "--cluster", nodes.address, env=env)
    driver.until(lambda: ours(env["TEST_MARK"], HOST), "host on the other node")
    before = driver.learns()["env_frames"]
    nodes.remove(added)
    driver.until(lambda: "the learner died: " in driver.log(), "obituary")

    def went_on() -> Any:
        row = driver.learns()
        return row if row.get("learner_deaths") == 1 and row["cluster_hosts"] == 1 else None

    row = driver.until(went_on, "a learner on the node that is left")
    assert row["env_frames"] > before / 2, "it went on from a checkpoint, not from nothing"
    assert driver.end(signal.SIGINT)[0] == 0


def test_a_ray_that_asks_for_no_token_is_refused(tmp_path: Path, env: dict[str, str]) -> None:
    code, printed = Driver(
        tmp_path / "run", "--cluster", "192.0.2.1:6379", env={**env, "RAY_AUTH_MODE": "disabled"}
    ).end()
    assert code == 2
    assert "RAY_AUTH_MODE=token" in printed


def free_port() -> int:
    """Returns a port between 20000 and 40000 that nobody has."""
    while True:
        port = 20000 + secrets.randbelow(20000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do shift; done
exec "$@"
"""
HEADRACE = """#!/bin/sh
exec {python} -c 'import sys; from headrace.cli import main; sys.exit(main())' "$@"
"""


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the script needs openssl")
def test_the_slurm_script_trains_saves_and_goes_on(tmp_path: Path, env: dict[str, str]) -> None:
    script = Path(__file__).parents[2] / "examples" / "cluster" / "slurm.sh"
    for name, text in {"srun": SRUN, "headrace": HEADRACE.format(python=sys.executable)}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    variables = {
        **os.environ,
        "TEST_MARK": env["TEST_MARK"],
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURMD_NODENAME": "localhost",
        "SLURM_JOB_ID": str(free_port() - 20000),  # from which the script makes it again
    }
    run = tmp_path / "run"

    def begin(frames: int) -> subprocess.Popen[bytes]:
        command = [script, "catch", run, "--total-frames", str(frames), "--log-interval-s", "0.5"]
        with (tmp_path / "printed.txt").open("ab") as printed:
            return subprocess.Popen(command, env=variables, cwd=tmp_path, stdout=printed)

    job = begin(1_000_000_000)
    until_s = time.monotonic() + DEADLINE_S
    while " steps 64 environments" not in (tmp_path / "printed.txt").read_text():
        assert job.poll() is None
        assert time.monotonic() < until_s, (tmp_path / "printed.txt").read_text()
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)  # as SLURM does when the time is nearly up
    assert job.wait(DEADLINE_S) == 0
    assert "stopped and saved" in (tmp_path / "printed.txt").read_text()
    assert list(tmp_path.glob(".headrace-*")) == [], "its secrets have gone with it"
    assert begin(1).wait(DEADLINE_S) == 0
    assert "done; go on with" in (tmp_path / "printed.txt").read_text()


def test_a_driver_that_is_killed_leaves_nothing(tmp_path: Path, env: dict[str, str]) -> None:
    own = {"TEST_MARK": env["TEST_MARK"], "TMPDIR": env["RAY_TMPDIR"]}
    driver = Driver(tmp_path / "run", "--cluster", "local", env=own)
    driver.until(lambda: ours(env["TEST_MARK"], HOST), "host")
    driver.end(signal.SIGKILL)
    # The fixture waits until all its processes are gone.
