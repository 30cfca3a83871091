"""What lies in the current folder is not run; a module that the user named is found there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

from headrace import catalog
from headrace.envs.gymnasium import GYMNASIUM
from headrace.envs.wrappers import GymnasiumConfig
from headrace.errors import ConfigError
from headrace.imports import import_named

SOURCE = Path(__file__).parents[1] / "src"
# As pip installs it: the folder of its script comes first on the path, and not this one.
HEADRACE = "import sys\nfrom headrace.cli import main\nsys.exit(main())\n"
OPTIONAL = ("ale_py", "cv2", "envpool", "lz4", "moviepy", "ray", "shtab", "sitecustomize", "wandb")
DECOY = 'open(f"{__file__}.ran", "w").close()'
OWN = """
import gymnasium as gym

def factory():
    import my_late_neighbour
    return gym.make("CartPole-v1")
"""
SLOW = pytest.mark.slow
SMALL = [
    *("--device", "cpu", "--no-tensorboard", "--num-envs", "4", "--num-workers", "2"),
    *("--total-frames", "400"),
]


def headrace(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    launcher = folder.with_name("bin") / "headrace"
    launcher.parent.mkdir(exist_ok=True)
    launcher.write_text(HEADRACE)
    ended = subprocess.run(
        [sys.executable, str(launcher), *argv],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert not list(folder.glob("*.ran"))
    return ended


def lay_decoys(folder: Path) -> None:
    """Lays files named like all that Python has."""
    for name in sys.stdlib_module_names:
        if util.find_spec(name):  # others are for other systems
            (folder / f"{name}.py").write_text(DECOY)


def lay_traps(folder: Path) -> None:
    """Lays files named like what Python, or this machine, lacks."""
    for name in (*OPTIONAL, *sys.stdlib_module_names):
        (folder / f"{name}.py").write_text(DECOY)
    # As a package that wants Gymnasium, and torch, to import it.
    (folder / "plugin_of_a_stranger.py").write_text(DECOY)
    about = folder / "plugin_of_a_stranger-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin-of-a-stranger\nVersion: 1")
    groups = ("gymnasium.envs", "torch.backends")
    entries = "".join(f"[{group}]\nx = plugin_of_a_stranger\n" for group in groups)
    (about / "entry_points.txt").write_text(entries)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in worker processes."""
    folder = tmp_path_factory.mktemp("made")
    ended = headrace(folder, "train", "catch", "--out", "run", "--pool", "shm", *SMALL)
    assert ended.returncode == 0, ended.stderr
    return folder / "run"


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """The run of a stranger, who has laid files into it."""
    shutil.copytree(made, tmp_path / "run")
    lay_traps(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """The user's own folder, with an environment, and files with unlucky names."""
    lay_decoys(tmp_path)
    (tmp_path / "my_module.py").write_text(OWN)
    (tmp_path / "my_late_neighbour.py").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    "argv",
    [
        ["eval", ".", "--episodes", "2"],
        ["envs"],
        *(
            pytest.param(["train", "--resume", ".", "--total-frames", "800", *flags], marks=SLOW)
            for flags in (
                ["--evaluator", "--compile", "on"],
                ["--learner-devices", "cpu,cpu"],
            )
        ),
    ],
)
def test_files_in_a_run_are_not_run(run: Path, argv: list[str]) -> None:
    ended = headrace(run, *argv)
    assert ended.returncode == 0, ended.stderr


@SLOW
def test_workers_that_act_do_not_run_them_either(tmp_path: Path) -> None:
    lay_traps(tmp_path)
    ended = headrace(tmp_path, "train", "catch", "--out", "run", "--inference", "worker", *SMALL)
    assert ended.returncode == 0, ended.stderr


@SLOW
def test_a_module_that_the_user_names_is_found_here(own: Path) -> None:
    ended = headrace(own, "train", "my_module:factory", "--out", "run", *SMALL)  # with a trial
    assert ended.returncode == 0, ended.stderr
    ended = headrace(own, "eval", "run", "--episodes", "2", "--trust-code")
    assert ended.returncode == 0, ended.stderr


@SLOW
@pytest.mark.parametrize("argv", [["bench", "pools"], ["bench", "wire"], ["tune", "catch"]])
def test_nor_do_the_children_of_other_commands(tmp_path: Path, argv: list[str]) -> None:
    lay_traps(tmp_path)
    ended = headrace(tmp_path, *argv, "--smoke")
    assert ended.returncode == 0, ended.stderr


@SLOW
def test_nor_does_ray(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    lay_traps(tmp_path)
    ended = headrace(tmp_path, "train", "catch", "--out", "run", "--cluster", "local", *SMALL)
    assert ended.returncode == 0, ended.stderr


def test_only_what_nowhere_else_is_found_is_looked_for_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    (there / "a_bare_folder").mkdir(parents=True)
    here.mkdir()
    for name in ("a_module_of_theirs", "cProfile", "wave"):
        (here / f"{name}.py").write_text("HERE = True")
    (there / "a_module_of_theirs.py").write_text("")
    (here / "a_bare_folder.py").write_text("HERE = True")
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", [str(there), *sys.path])
    monkeypatch.delitem(sys.modules, "wave", raising=False)
    before = list(sys.path)
    for name in ("a_module_of_theirs", "wave", "cProfile", "os.path"):
        assert not hasattr(import_named(name), "HERE")
    assert sys.path == before
    assert import_named("a_bare_folder").HERE
    assert sys.path == [*before, str(here)]
    for name in ("a_module_of_theirs", "a_bare_folder"):
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("has_path", [True, False])
def test_who_names_what_another_module_lacks_learns_which_that_is(
    has_path: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    (here / "their_module.py").write_text("def factory(): pass")
    (there / "their_module.py").write_text("")
    (there / "their_folder").mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", [str(there), *sys.path])
    name = "their_module" if has_path else "their_folder"
    found = str(there / "their_module.py") if has_path else "a bare folder"
    for look in (
        lambda: catalog.import_attribute("network", f"{name}:factory"),
        lambda: GYMNASIUM.spec(f"{name}:factory", GymnasiumConfig()),
    ):
        with pytest.raises(ConfigError, match=f"{found}.*looked for last: .*rename it"):
            look()
    monkeypatch.delitem(sys.modules, name)


@SLOW
def test_children_of_benchmarks_find_headrace_where_it_was_found(tmp_path: Path) -> None:
    """A Python without headrace, where that is not all the same one."""
    start = f"import sys; sys.path[:0] = {[str(SOURCE), *filter(None, sys.path)]}"
    code = f"{start}; from headrace.cli import main; main(sys.argv[1:])"
    for name in ("pools", "wire"):
        ended = subprocess.run(
            [sys._base_executable, "-c", code, "bench", name, "--smoke"],
            cwd=tmp_path,
            env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
