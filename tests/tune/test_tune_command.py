"""`headrace tune` and `train --autotune`, from the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from headrace.cli import main
from headrace.config import from_dict, read_toml
from headrace.errors import ConfigError
from headrace.tune import file, tuner
from headrace.tune.types import Choice, Outcome

SMALL = ("--device", "cpu", "--num-envs", "8", "--unroll-steps", "5", "--batch-unrolls", "4")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[Choice]:
    """A machine that costs no time, and is twice as fast where it compiles."""
    asked: list[Choice] = []

    class Quick:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def __call__(self, choice: Choice, *, seconds: float, deadline_s: float) -> Outcome:
            asked.append(choice)
            steps = 2000.0 if choice["compile"] == "on" else 1000.0
            figures = {
                "agent_steps_per_s": steps,
                "updates_per_s": steps / 20,
                "samples_per_s": steps,
                "samples_per_agent_step": 1.0,
                "bottleneck": "learner",
            }
            return Outcome(steps, None, figures)

    monkeypatch.setattr(tuner, "Trials", Quick)
    ceiling = {"model": "core-time", "environment": 9e4, "inference": 9e4, "learner": 4e3}
    monkeypatch.setattr(tuner, "run_child", lambda *_, **__: ceiling)
    return asked


def mistake(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(argv))
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["tune"], "no environment: name it first"),
        (["tune", "katch"], "no environment named 'katch'; did you mean catch?"),
        (["tune", "catch", "--budget-s", "20"], "which take seconds to start: give at least 30 s"),
        (
            ["tune", "catch", "--budget-s", "35", "--seconds-per-trial", "4"],
            "a budget of 35 s is no time for trials of 4 s: give at least 40 s, or lower",
        ),
        (["tune", "catch", "--budget-s", "-5"], "a budget of -5 s is no time"),
        (["tune", "catch", "--budget-s", "nan"], "a budget of nan s is no time"),
        (["tune", "catch", "--budget-s", "inf"], "a budget of inf s is no time"),
        (["tune", "catch", "--budget-minutes", "0.1"], "a budget of 6 s is no time"),
        (["tune", "catch", "--seconds-per-trial", "0"], "--seconds-per-trial must be positive"),
        (["tune", "catch", "--seconds-per-trial", "inf"], "--seconds-per-trial must be positive"),
        (
            ["tune", "CartPole-v1", "--algorithm", "ppo", "--tune-batch"],
            "ppo learns from whole turns, whose batch is not tuned: leave out --tune-batch",
        ),
        (["tune", "catch", "--tune-batch", "--batch-unrolls", "8"], "leave one out"),
        (
            ["tune", "catch", "--budget-s", "300", "--budget-minutes", "5"],
            "give --budget-s or --budget-minutes, not both",
        ),
        (["tune", "catch", "--resume", "run"], "--resume is for train"),
        (["tune", "catch", "--lockstep"], "leave out --lockstep"),
        (["tune", "catch", "--listen", "127.0.0.1:0"], "leave out --listen and --pool grpc"),
        (["train", "catch", "--autotune", "--cluster", "local"], "grpc, and --cluster"),
        (["tune", "catch", "--pool", "grpc"], "leave out --listen and --pool grpc"),
        (["train", "catch", "--autotune", "--pool", "grpc"], "leave out --listen and --pool grpc"),
        (["tune", "catch", "--out", "nowhere/x.toml"], "cannot write nowhere/x.toml"),
        (["tune", "catch", "--queue-unrolls", "1"], "queue_unrolls=1 can never hold a batch"),
        (["train", "catch", "--autotune", "--lockstep"], "leave one out"),
        (["train", "--autotune", "--resume", "run"], "--autotune cannot go with --resume"),
        (["train", "catch", "--autotune-budget-s", "60"], "is for --autotune"),
        (["train", "catch", "--autotune", "--autotune-budget-s", "0"], "a budget of 0 s is no"),
        (["train", "catch", "--autotune", "--autotune-budget-s", "nan"], "a budget of nan s is no"),
        (["train", "catch", "--autotune", "--autotune-budget-s", "x"], "invalid float value: 'x'"),
    ],
)
def test_a_mistake_is_one_sentence(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    said = mistake(capsys, *argv)
    assert said.startswith("headrace: ")
    assert said.count("\n") == 1
    assert message in said
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_is_not_touched(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, quick: list[Choice]
) -> None:
    path = tmp_path / "tuned-catch-impala.toml"
    path.write_text("seed = 5\n")
    said = mistake(capsys, "tune", "catch", *SMALL)
    assert "tuned-catch-impala.toml is there already" in said
    assert "--force" in said
    assert quick == []  # it was said before any trial
    assert path.read_text() == "seed = 5\n"
    main(["tune", "catch", *SMALL, "--force"])
    assert "compile" in read_toml(path)


def test_a_file_that_names_code_is_trained_with_when_trusted(
    capsys: pytest.CaptureFixture[str], quick: list[Choice]
) -> None:
    own = ["--network", "headrace.networks.models:mlp"]  # as one that is not in the catalog
    main(["tune", "catch", *SMALL, *own, "--out", "mine.toml"])
    said = capsys.readouterr().out.partition("train with it: headrace ")[2].partition("\n")[0]
    assert said == "train --config mine.toml --trust-code"
    assert "read it, then say --trust-code" in mistake(capsys, *said.split()[:-1])


def test_the_winner_is_written_and_printed(
    capsys: pytest.CaptureFixture[str], quick: list[Choice]
) -> None:
    main(["tune", "catch", *SMALL, "--out", "mine.toml"])
    printed = capsys.readouterr()
    assert "compile=on: 2.00 times the defaults" in printed.out
    assert "what limits now: the learner" in printed.out
    assert "train with it: headrace train --config mine.toml" in printed.out
    assert "search: compile=on: 2,000 agent steps/s, 100 updates/s, limited by learner" in (
        printed.err
    )
    values = read_toml(Path("mine.toml"))
    config = from_dict(values)
    assert values["compile"] == config.compile == "on"
    assert config.server.num_envs == 8
    # What was given stays.
    assert all("num_envs" not in choice and "batch_unrolls" not in choice for choice in quick)


def test_what_will_be_tried_is_said_first(
    capsys: pytest.CaptureFixture[str], quick: list[Choice]
) -> None:
    main(["tune", "catch", *SMALL, "--budget-s", "60", "--json"])
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith("tuning catch with impala on ")
    assert (
        "for up to 60 s, in trials that measure 2 s each; first the defaults, then other" in first
    )
    assert all(name in first for name in quick[0])


def test_what_cannot_be_written_in_the_end_is_shown_all_the_same(
    capsys: pytest.CaptureFixture[str], quick: list[Choice], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise ConfigError("cannot write x.toml: No space left on device")

    monkeypatch.setattr(file, "write", full)
    for more in ((), ("--json",)):
        with pytest.raises(SystemExit) as ended:
            main(["tune", "catch", *SMALL, *more])
        assert ended.value.code == 2
        printed = capsys.readouterr()
        assert printed.err.endswith("headrace: cannot write x.toml: No space left on device\n")
        if more:
            result = json.loads(printed.out)
            assert (result["settings"], result["file"]) == ({"compile": "on"}, None)
        else:
            assert "compile=on: 2.00 times the defaults" in printed.out
            assert "train with it" not in printed.out
    assert quick


def test_autotune_refuses_a_used_folder_before_it_begins(
    capsys: pytest.CaptureFixture[str], quick: list[Choice]
) -> None:
    Path("run").mkdir()
    Path("run/config.toml").write_text("")
    said = mistake(capsys, "train", "catch", *SMALL, "--autotune", "--out", "run")
    assert "run is not empty" in said
    assert quick == []


def test_json_is_one_object(capsys: pytest.CaptureFixture[str], quick: list[Choice]) -> None:
    main(["tune", "catch", *SMALL, "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["settings"] == {"compile": "on"}
    assert result["file"] == "tuned-catch-impala.toml"
    assert len(result["trials"]) == len(quick)
    assert result["gain"] == pytest.approx(2.0)


def test_help_names_both_kinds_of_settings(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        main(["tune", "--help"])
    assert not ended.value.code
    out = capsys.readouterr().out
    assert "--budget-s" in out
    assert max(map(len, out.splitlines())) <= 80
    assert "--help-all" in out


@pytest.mark.slow  # CI runs the command itself
def test_smoke(capsys: pytest.CaptureFixture[str]) -> None:
    """The real thing: trials in processes, the stages alone, a file."""
    main(["tune", "--smoke", "--json", "--device", "cpu"])
    result = json.loads(capsys.readouterr().out)
    assert (result["env"], result["algorithm"]) == ("catch", "impala")
    assert 3 <= len(result["trials"]) <= 5
    assert result["default"]["agent_steps_per_s"] > 0
    config = from_dict(read_toml(Path("tuned-catch-impala.toml")))
    assert config.env == "catch"
    if not result["beaten"]:
        assert result["settings"] == {}


def test_autotune_trains_with_the_winner(
    capsys: pytest.CaptureFixture[str], quick: list[Choice], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Compiling would take longer than the run.
    monkeypatch.setattr(
        tuner.SearchSpace, "settings", lambda *_: {"server": {"inference_batch": 2}}
    )
    monkeypatch.setattr(tuner.SearchSpace, "key", lambda _, choice: str(choice["compile"]))
    more = ("--autotune", "--autotune-budget-s", "90", "--total-frames", "500")
    main(["train", "catch", *SMALL, *more, "--out", "run", "--no-tensorboard"])
    assert quick
    config = from_dict(read_toml(Path("run/config.toml")))
    assert config.server.inference_batch == 2
    assert config.total_frames == 500
    log = Path("run/log.txt").read_text()
    assert "inference_batch=2: 2.00 times the defaults" in log
    assert "search: inference_batch=2: 2,000 agent steps/s" in log
    assert "2.00 times the defaults" in capsys.readouterr().out


def stop_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C, in the midst of a trial."""
    measure: Any = tuner.Trials
    call = measure.__call__
    left = count

    def stopped(self: Any, choice: Choice, **arguments: float) -> Outcome:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        outcome: Outcome = call(self, choice, **arguments)
        return outcome

    monkeypatch.setattr(measure, "__call__", stopped)


@pytest.mark.parametrize(("count", "written"), [(3, False), (20, True)])
@pytest.mark.usefixtures("quick")
def test_ctrl_c_writes_what_is_worth_it(
    count: int,
    written: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stop_after(count, monkeypatch)
    with pytest.raises(SystemExit) as ended:
        main(["tune", "catch", *SMALL])
    assert ended.value.code == 130
    assert "then stopped" in capsys.readouterr().out
    assert Path("tuned-catch-impala.toml").exists() is written


@pytest.mark.usefixtures("quick")
def test_ctrl_c_in_autotune_trains_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stop_after(5, monkeypatch)
    with pytest.raises(SystemExit) as ended:
        main(["train", "catch", *SMALL, "--autotune"])
    assert ended.value.code == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_real_ctrl_c_ends_the_child_too() -> None:
    code = "from headrace.cli import main; import sys; main(sys.argv[1:])"
    argv = ("tune", "catch", *SMALL, "--seconds-per-trial", "0.3")
    parent = subprocess.Popen(
        [sys.executable, "-c", code, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    assert parent.stderr is not None
    assert parent.stderr.readline().startswith("tuning catch ")
    line = parent.stderr.readline()  # the first trial has ended, and another one will begin
    assert line.startswith("search: the defaults: "), line
    children: list[psutil.Process] = []
    until_s = time.monotonic() + 60.0
    while not children and time.monotonic() < until_s:
        children = psutil.Process(parent.pid).children(recursive=True)
    os.kill(parent.pid, signal.SIGINT)
    out, err = parent.communicate(timeout=60)
    assert parent.returncode == 130
    assert "headrace: stopped" in err
    assert "then stopped" in out
    assert not Path("tuned-catch-impala.toml").exists()
    assert children
    assert psutil.wait_procs(children, timeout=10)[1] == []
