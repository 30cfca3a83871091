"""One of several learners is lost: the run ends with the cause, and goes on from a checkpoint."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from headrace import RunConfig, train
from headrace.config import from_dict
from headrace.errors import PeerLost
from headrace.learner import checkpoint
from headrace.telemetry.record import RunDirectory

pytestmark = [
    pytest.mark.net,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


def a_config(out: Path, **settings: Any) -> RunConfig:
    base = {
        "env": "catch",
        "out": str(out),
        "device": "cpu",
        "precision": "float32",
        "tensorboard": False,
        "total_frames": 10**9,
        "checkpoint_interval_s": 0.01,
        "learner_devices": "cpu,cpu",
        "network": {"network": "mlp", "hidden_sizes": [16]},
        "server": {"num_envs": 8},
        "learning": {"unroll_steps": 7, "batch_unrolls": 8},
    }
    return from_dict({**base, **settings})


def learner_pids(parent: int) -> list[int]:
    """Process ids of the learners that `parent` has started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            words = (folder / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(state[1]) == parent and b"headrace.run.learner_rank" in words and state[0] != "Z":
            found.append(int(folder.name))
    return found


def at_update(number: int, act: Callable[[int], None]) -> Callable[..., None]:
    """Calls `act` with the other learner's process id once, at an update."""

    def on_update(version: int, _: Mapping[str, Tensor]) -> None:
        if version == number:
            [pid] = learner_pids(os.getpid())
            act(pid)

    return on_update


def check_what_is_left(run: Path) -> None:
    """A whole checkpoint and a free lock, and nobody who goes on."""
    found, warnings = checkpoint.newest_whole(run / "checkpoints")
    assert warnings == []
    assert found is not None
    assert found.meta["counters"]["updates"] >= 1
    assert learner_pids(os.getpid()) == []
    with RunDirectory.open(run).lock():
        pass


def test_a_learner_that_is_killed_ends_the_run_with_its_cause(tmp_path: Path) -> None:
    run = tmp_path / "run"
    sentence = rf"learner 1 on cpu died: killed \(SIGKILL\).*--resume {re.escape(str(run))}`"
    with pytest.raises(PeerLost, match=sentence):
        train(a_config(run), on_update=at_update(4, lambda pid: os.kill(pid, signal.SIGKILL)))
    check_what_is_left(run)


@pytest.mark.slow
def test_a_learner_that_hangs_ends_the_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = a_config(run, workers={"step_timeout_s": 1.0})
    with pytest.raises(
        PeerLost, match=r"learner 1 on cpu kept the others waiting for 2 s \(it answers no"
    ):
        train(config, on_update=at_update(4, lambda pid: os.kill(pid, signal.SIGSTOP)))
    check_what_is_left(run)


FRAGILE = """
    from headrace.envs.catch import CatchFamily
    from headrace.envs.toys import NUMPY, ToyEnv
    from headrace.errors import ConfigError

    class Fragile(ToyEnv):
        def step(self, env_id, action):
            if self.snapshot()["episode"].max() > 20:
                raise RuntimeError("the bridge broke")
            return super().step(env_id, action)

    class Family(CatchFamily):
        def __init__(self, *, at_start):
            self.at_start = at_start

        def spec(self, name, config):
            return super().spec("catch", config)

        def make(self, name, config, *, num_envs, first_env=0, seed, **_):
            kind = Fragile if first_env else ToyEnv
            if first_env and self.at_start:
                raise ConfigError("the bridge was never built")
            spec, rules = self.spec(name, config), self.rules(config, NUMPY)
            return kind(spec, rules, num_envs=num_envs, seed=seed, first_env=first_env)

    LATER, AT_START = Family(at_start=False), Family(at_start=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "sentence"),
    [
        ("LATER", "RuntimeError: the bridge broke"),
        ("AT_START", "the bridge was never built"),
    ],
)
@pytest.mark.parametrize("turns", ["on", "off"])
def test_what_a_learner_raises_is_said_by_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, sentence: str, turns: str
) -> None:
    (tmp_path / "fragile_learner.py").write_text(textwrap.dedent(FRAGILE))
    monkeypatch.syspath_prepend(tmp_path)
    run = tmp_path / "run"
    with pytest.raises(PeerLost, match=f"learner 1 on cpu died: {sentence}"):
        train(a_config(run, env=f"fragile_learner:{family}", turns=turns))
    if family == "LATER":
        check_what_is_left(run)


MAIN = """
import sys
from headrace import train
from headrace.config import from_dict

def on_update(version, _):
    if version == 3:
        print("learning", flush=True)

train(from_dict(eval(sys.argv[1])), on_update=on_update)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_no_learner_outlives_the_first(tmp_path: Path, how: signal.Signals) -> None:
    settings = {
        "env": "catch",
        "out": str(tmp_path / "run"),
        "device": "cpu",
        "tensorboard": False,
        "total_frames": 10**9,
        "learner_devices": "cpu,cpu",
        "server": {"num_envs": 8},
        "learning": {"unroll_steps": 7, "batch_unrolls": 8},
    }
    with subprocess.Popen(
        [sys.executable, "-c", MAIN, repr(settings)], stdout=subprocess.PIPE, text=True
    ) as main:
        assert main.stdout is not None
        assert main.stdout.readline() == "learning\n"
        [pid] = learner_pids(main.pid)
        main.send_signal(how)
        main.wait(60.0)
    until_s = time.monotonic() + 30.0
    while Path(f"/proc/{pid}").exists() and time.monotonic() < until_s:
        time.sleep(0.01)
    assert not Path(f"/proc/{pid}").exists()
    assert main.returncode == (0 if how is signal.SIGTERM else -signal.SIGKILL)
