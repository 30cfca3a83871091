"""The trial of an environment: it costs no more than a child, and faults are one sentence each."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headrace import catalog
from headrace.envs.wrappers import GymnasiumConfig
from headrace.errors import ConfigError
from headrace.run.trial import try_environment

THEIRS = """
import ctypes, os, signal, subprocess, sys, time
from dataclasses import dataclass
import gymnasium as gym
import numpy as np

if os.environ.get("LOUD"):
    print("hello from Python")
    os.write(1, b"x" * 300_000 + b"\\n")
    os.write(2, b"hello from C\\n")

class Env(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, pid_file=None):
        if pid_file:
            child = subprocess.Popen(["sleep", "1000"])
            with open(pid_file, "w") as file:
                file.write(f"{os.getpid()} {child.pid}")

    def reset(self, *, seed=None, options=None):
        return np.zeros(3, np.float32), {}

    def step(self, action):
        print("a step")
        os.write(2, b"a step in C\\n")
        self.trouble()
        return np.zeros(3, np.float32), 0.0, False, False, {}

    def trouble(self):
        pass

class Raises(Env):
    def reset(self, *, seed=None, options=None):
        raise ValueError("no sun")

class Nan(Env):
    def step(self, action):
        return np.zeros(3, np.float32), float("nan"), False, False, {}

class Exits(Env):
    def trouble(self):
        os._exit(3)

class Killed(Env):
    def trouble(self):
        os.kill(os.getpid(), signal.SIGKILL)

class Crashes(Env):
    def trouble(self):
        ctypes.string_at(0)

class Hangs(Env):
    def __init__(self, flag, pid_file=None):
        super().__init__(pid_file)
        self.flag = flag

    def trouble(self):
        open(self.flag, "w").close()
        while True:
            time.sleep(1000.0)

@dataclass(frozen=True, kw_only=True, slots=True)
class OwnConfig:
    sizes: tuple[int, ...] = (3, 4)
    trouble: str = ""

class Family:
    config_type = OwnConfig
    pool = "shm"

    def spec(self, name, config):
        if config.trouble == "prints":
            for number in range(4):
                print("line", number)
            os._exit(5)
        if config.trouble:
            raise LookupError(config.trouble)
        assert config.sizes == (3, 4)

class Native(Family):
    pool = "native"

own, native = Family(), Native()
"""


@pytest.fixture(autouse=True)
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that is found through `sys.path` alone."""
    path = tmp_path / "trial_theirs.py"
    path.write_text(THEIRS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "trial_theirs", raising=False)
    return path


def line_of(text: str) -> int:
    """Returns the number of the line of the module that begins so."""
    lines = [line.strip() for line in THEIRS.splitlines()]
    return next(number for number, line in enumerate(lines, 1) if line.startswith(text))


def refusal(name: str, config: Any = None, **more: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        try_environment(name, config, **{"timeout_s": 100.0} | more)
    return str(caught.value)


def gone(pid: int) -> bool:
    """Waits for it: what a child has started is killed by the kernel a moment after the child."""
    end_s = time.monotonic() + 10.0
    while time.monotonic() < end_s:
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            return True
        if state in "ZX":
            return True
        time.sleep(0.01)
    return False


def hurried(flag: Path) -> Callable[[], float]:
    """Returns a clock that stands still until the file exists, and then is past every deadline."""
    return lambda: 1e9 if flag.exists() else 0.0


@pytest.mark.parametrize("name", ["CartPole-v1", "trial_theirs:Env", "trial_theirs:own"])
def test_a_good_environment_passes(name: str) -> None:
    try_environment(name, None, timeout_s=100.0)


def test_the_settings_reach_the_child() -> None:
    text = refusal("CartPole-v1", GymnasiumConfig(env_kwargs='{"color": 1}'))
    assert "cannot be made" in text
    assert "color" in text


@pytest.mark.parametrize("name", ["trial_theirs:Raises", "trial_theirs:Nan", "CartPoll-v1"])
def test_what_is_refused_is_refused_in_the_words_of_the_family(name: str) -> None:
    family = catalog.environment_family(name)
    with pytest.raises(ConfigError) as caught:
        family.spec(name, family.config_type())
    assert refusal(name) == str(caught.value)


def test_an_error_of_a_users_family_is_named() -> None:
    config = catalog.environment_family("trial_theirs:own").config_type(trouble="no moon")
    assert refusal("trial_theirs:own", config) == (
        "trial_theirs:own cannot be used: LookupError: no moon "
        f"(trial_theirs.py:{line_of('raise LookupError')} in spec)"
    )


def test_an_exit_is_named() -> None:
    assert refusal("trial_theirs:Exits").startswith(
        "trial_theirs:Exits cannot be used: its first steps ended the process with exit code 3"
    )


def test_last_words_are_told() -> None:
    config = catalog.environment_family("trial_theirs:own").config_type(trouble="prints")
    assert refusal("trial_theirs:own", config) == (
        "trial_theirs:own cannot be used: its first steps ended the process with exit code 5; "
        "its last words: line 0 / line 1 / line 2 / line 3"
    )


def test_a_kill_is_named() -> None:
    assert refusal("trial_theirs:Killed").startswith(
        "trial_theirs:Killed cannot be used: its first steps ended the process, killed (SIGKILL): "
        "out of memory"
    )


def test_a_crash_is_named_with_its_place(theirs: Path) -> None:
    text = refusal("trial_theirs:Crashes")
    assert text.startswith(
        "trial_theirs:Crashes cannot be used: its first steps ended the process, killed by SIGSEGV"
    )
    assert f'called from File "{theirs}", line {line_of("ctypes.string_at")} in trouble' in text
    assert "\n" not in text


def test_a_hang_is_named_with_its_place_and_leaves_nothing(theirs: Path, tmp_path: Path) -> None:
    flag, pid_file = tmp_path / "flag", tmp_path / "pids"
    config = GymnasiumConfig(env_kwargs=f'{{"flag": "{flag}", "pid_file": "{pid_file}"}}')
    text = refusal("trial_theirs:Hangs", config, timeout_s=7.5, now_s=hurried(flag))
    assert text.startswith(
        "trial_theirs:Hangs cannot be used: its first steps took over 7.5 s and were given up, at "
        f'File "{theirs}", line '
    )
    assert "in trouble, called from" in text
    assert "--start-timeout-s" in text
    assert all(gone(int(pid)) for pid in pid_file.read_text().split())


def test_a_good_one_leaves_nothing(tmp_path: Path) -> None:
    pid_file = tmp_path / "pids"
    config = GymnasiumConfig(env_kwargs=f'{{"pid_file": "{pid_file}"}}')
    try_environment("trial_theirs:Env", config, timeout_s=100.0)
    assert all(gone(int(pid)) for pid in pid_file.read_text().split())


def test_the_terminal_stays_clean_and_a_flood_stops_nothing(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog.environment_family("trial_theirs:Env")  # what importing prints here is another matter
    monkeypatch.setenv("LOUD", "1")
    try_environment("trial_theirs:Env", None, timeout_s=100.0)
    refusal("trial_theirs:Crashes")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["catch", "trial_theirs:native"])
def test_what_workers_do_not_step_is_not_tried(name: str) -> None:
    # It would be over at once: time has run out before it begins.
    try_environment(name, None, timeout_s=-1.0)


def test_the_child_imports_no_torch() -> None:
    code = "import sys, headrace.run.trial; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
