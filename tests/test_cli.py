"""The command line: a mistake is one sentence and exit code 2."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from headrace import cli
from headrace.cli import main, usage
from headrace.config import from_dict, merged, read_toml
from headrace.errors import ConfigError
from headrace.presets import PRESETS, find
from headrace.run.api import train

SMALL = [
    *("--device", "cpu", "--lockstep", "--no-tensorboard", "--total-frames", "6e2"),
    *("--num-envs", "8", "--unroll-steps", "5", "--batch-unrolls", "4"),
]

RUN = "from headrace.cli import main; main()"

BY_KL = ("--learning-rate-schedule", "kl")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "run"
    small = {
        "env": "catch",
        "out": str(out),
        "device": "cpu",
        "lockstep": True,
        "tensorboard": False,
        "total_frames": 600,
        "server": {"num_envs": 8},
        "learning": {"unroll_steps": 5, "batch_unrolls": 4},
    }
    return train(from_dict(merged(find("catch").values, small))).run


def mistake(capsys: pytest.CaptureFixture[str], *argv: str, quiet: bool = True) -> str:
    """Returns the one line that a mistake leaves on stderr; `quiet`: and nothing before it."""
    with pytest.raises(SystemExit) as ended:
        main(list(argv))
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert not quiet or printed.out == ""
    assert printed.err.startswith("headrace: ")
    assert printed.err.count("\n") == 1
    assert printed.err.endswith("\n")
    return printed.err.removeprefix("headrace: ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian", "catch"], "no command 'trian'; did you mean train?"),
        (["train"], "no environment: name it first"),
        (["train", "katch"], "no environment named 'katch'; did you mean catch?"),
        (["train", "pong"], "no environment named 'pong'; did you mean ALE/Pong-v5?"),
        (["train", "catch", "--preset", "cach"], "no preset named 'cach'; did you mean catch?"),
        (["train", "catch", "--algorithm", "imapla"], "no algorithm named 'imapla'; did you mean"),
        (["train", "catch", "--network", "natur"], "no network named 'natur'; did you mean nature"),
        (["train", "catch", "--network", "nature"], "use network mlp"),
        (
            ["train", "catch", "--num-envs", "4", "--inference-batch", "5"],
            "inference_batch=5 can never fill from num_envs=4",
        ),
        (["train", "catch", "--queue-unrolls", "1"], "queue_unrolls=1 can never hold a batch"),
        (["train", "catch", "--total-frames", "many"], "--total-frames must be a number such as"),
        (["train", "catch", "--total-frames", "inf"], "--total-frames must be a number such as"),
        (["train", "catch", "--total-frames", "0"], "total_frames must be positive, not 0"),
        (["train", "catch", "--total-frames", "-5"], "total_frames must be positive, not -5"),
        (["train", "catch", "--total-minutes", "0"], "total_minutes must be positive and finite"),
        (["train", "catch", "--total-minutes", "-8"], "finite, not -8.0: say --total-minutes 8"),
        (["train", "catch", "--total-minutes", "nan"], "finite, not nan: say --total-minutes 8"),
        (["train", "catch", "--total-minutes", "inf"], "finite, not inf: say --total-minutes 8"),
        (
            ["train", "catch", "--total-minutes", "5", "--lockstep"],
            "leave out --total-minutes, or --lockstep",
        ),
        (["train", "catch", "--discount", "1.5"], "discount and vtrace_lambda must be in"),
        (["train", "catch", "--passes", "5"], "passes must be 1 to 4, not 5: say --passes 4"),
        (["train", "catch", "--passes", "-1"], "passes must be 1 to 4, not -1: say --passes 1"),
        (["train", "catch", "--minibatches", "7"], "batch_unrolls=32: say --minibatches 4"),
        (["train", "catch", "--clip-range", "-1"], "not -1.0: say --clip-range 0"),
        (["train", "catch", "--clip-range", "inf", "--passes", "2"], "not inf: say --clip-range 0"),
        (
            ["train", "catch", "--clip-range-schedule", "linear"],
            "no effect without a clip: say --clip-range 0.2 --passes 2",
        ),
        (["train", "catch", "--target-kl", "0.02"], "say --learning-rate-schedule kl as well, or"),
        (["train", "catch", "--final-entropy-cost", "0.1"], "say --entropy-cost-schedule linear"),
        (
            ["train", "catch", "--final-entropy-cost", "inf", "--entropy-cost-schedule", "linear"],
            "finite and not negative, not inf: say --final-entropy-cost 0",
        ),
        (["train", "catch", "--popart-step", "0.1"], "popart_step is of --normalize-values"),
        (
            ["train", "catch", "--algorithm", "r2d2", "--initial-epsilon", "0.5"],
            "say --epsilon-schedule linear as well",
        ),
        (
            ["train", "catch", "--algorithm", "r2d2", "--final-importance-exponent", "0.5"],
            "say --importance-exponent-schedule linear as well",
        ),
        (
            [
                *[
                    "train",
                    "pointmass",
                    "--algorithm",
                    "sac",
                    "--importance-exponent-schedule",
                    "linear",
                ]
            ],
            "say --importance-exponent-schedule constant, or --priority-exponent 0.6",
        ),
        (["train", "catch", *BY_KL], "one: say --passes 2 as well"),
        (["train", "catch", "--stop-kl", "0.1"], "there is one: say --passes 2 as well"),
        (["train", "catch", "--stop-kl", "-1"], "positive, not -1.0: say --stop-kl 0"),
        (["train", "catch", "--target-kl", "-1"], "not -1.0: say --target-kl 0.01"),
        (["train", "catch", "--target-kl", "nan"], "not nan: say --target-kl 0.01"),
        (
            ["train", "catch", "--passes", "2", "--clip-range", "nan"],
            "not nan: say --clip-range 0",
        ),
        (["train", "catch", "--optimizer-eps", "nan"], "optimizer_eps must be a number, not nan"),
        (
            ["train", "catch", "--vtrace-lambda-form", "advantage"],
            "vtrace_lambda_form has no effect on a vtrace_lambda of 1: say --vtrace-lambda 0.95",
        ),
        (
            ["train", "catch", "--popart-step", "0"],
            "popart_step must be above 0 and at most 1, not 0.0: say --popart-step 0.001",
        ),
        (
            ["train", "catch", "--target-entropy", "1", "--entropy-cost-schedule", "linear"],
            "say --entropy-cost-schedule constant",
        ),
        (
            [
                *[
                    "train",
                    "catch",
                    "--algorithm",
                    "ppo",
                    "--epochs",
                    "1",
                    "--learning-rate-schedule",
                    "kl",
                ]
            ],
            "there is one: say --epochs 2 as well",
        ),
        (
            ["train", "catch", "--algorithm", "r2d2", *BY_KL],
            "say --learning-rate-schedule constant, linear or cosine",
        ),
        (
            ["train", "pointmass", "--algorithm", "sac", *BY_KL],
            "say --learning-rate-schedule constant, linear or cosine",
        ),
        (
            ["train", "catch", "--algorithm", "r2d2", "--normalize-values"],
            "r2d2 does not learn normalised values: say --no-normalize-values",
        ),
        (
            ["train", "pointmass", "--algorithm", "sac", "--normalize-values"],
            "sac does not learn normalised values: say --no-normalize-values",
        ),
        (
            ["train", "catch", "--algorithm", "r2d2", "--epsilon-decay", "0"],
            "initial_epsilon must be in [0, 1], and epsilon_decay in (0, 1]",
        ),
        (["train", "catch", "--device", "tpu9"], "tpu9"),
        (["train", "catch", "--config"], "--config"),
        (["train", "--resume", "nowhere"], "nowhere is not a run"),
        (["eval", "nowhere"], "nowhere is not a run"),
        (["eval", "nowhere", "--epsilon", "2"], "epsilon must be in [0, 1], not 2"),
        (["eval", "nowhere", "--video", "film.gif"], "--video must name an .mp4 file"),
    ],
)
def test_a_mistake_is_one_sentence(
    argv: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in mistake(capsys, *argv)
    # A second try with the mistake mended finds nothing in its way.
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_game_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ale_py")
    assert "nearest: ALE/Breakout-v5" in mistake(capsys, "train", "ALE/Breakot-v5")


def test_an_error_of_several_lines_keeps_them_and_poses_as_nothing_else(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_: list[str]) -> None:
        raise ConfigError("\x1b[31mno\x1b[0m:\nheadrace: \x1b[2Jall is well")

    monkeypatch.setattr("headrace.commands.envs.envs_command", failing)
    with pytest.raises(SystemExit):
        main(["envs"])
    assert capsys.readouterr().err == "headrace: no:\n    headrace: \\x1b[2Jall is well\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("total_frames = ", "is not TOML"),
        ("totl_frames = 5", "no setting named totl_frames; did you mean total_frames"),
        ("[learning]\ndiscont = 1", "no setting named learning.discont; did you mean discount?"),
        ('[learning]\ndiscount = "x"', "learning.discount must be a float, not 'x'"),
        ("env = 5", "env must be a str, not 5"),
        ('algorithm = "imapla"', "no algorithm named 'imapla'"),
    ],
)
def test_a_mistake_in_a_file_is_one_sentence(
    text: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "mine.toml").write_text(text)
    argv = ["train", "--config", str(tmp_path / "mine.toml")]
    if "env" not in text:
        argv.insert(1, "catch")
    assert message in mistake(capsys, *argv)


def test_a_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot read none.toml" in mistake(capsys, "train", "catch", "--config", "none.toml")


def test_a_folder_in_use_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = mistake(capsys, "train", "catch", "--out", str(run), *SMALL)
    assert f"{run} is not empty: go on with `headrace train --resume {run}`" in message


@pytest.mark.parametrize(
    "argv",
    [["--seed", "7"], ["--num-envs", "4"], ["--learning-rate", "1"], ["--truncate-after", "3"]],
)
def test_what_belongs_to_a_run_does_not_change(
    argv: list[str], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = mistake(capsys, "train", "--resume", str(run), *argv)
    assert "belongs to the run and cannot change on --resume" in message


@pytest.mark.parametrize("argv", [["--preset", "catch"], ["--config", "x"], ["--algorithm", "x"]])
def test_a_resumed_run_keeps_its_settings(
    argv: list[str], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = mistake(capsys, "train", "--resume", str(run), *argv)
    assert f"{argv[0]} cannot go with --resume" in message
    assert "catch cannot go with" in mistake(capsys, "train", "catch", "--resume", str(run))


def test_no_episodes_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = mistake(capsys, "eval", str(run), "--episodes", "0", "--device", "cpu")
    assert "episodes must be at least 1" in message


def test_a_run_whose_checkpoints_are_damaged(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "config.toml").write_bytes((run / "config.toml").read_bytes())
    (copy / "checkpoints" / "agent_steps_000000000600").mkdir(parents=True)
    assert "no whole checkpoint" in mistake(capsys, "eval", str(copy))
    message = mistake(capsys, "train", "--resume", str(copy), quiet=False)
    assert "no whole checkpoint to go on from" in message


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "catch", "--no-such-flag", "1"],
        ["train", "catch", "--seed", "one"],
        ["train", "catch", "--precision", "float16"],
        ["train", "catch", "--total-frames"],
        ["eval"],
        ["eval", "x", "--mode", "best"],
        ["eval", "x", "--no-such-flag"],
        ["envs", "extra"],
        ["presets", "extra"],
    ],
)
def test_a_flag_that_cannot_be_read(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err + printed.out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--help"], ["headrace COMMAND", "train ENV", "tune ENV", "eval RUN"]),
        ([], ["headrace COMMAND"]),
        (["train", "--help"], ["--total-frames", "--learning-rate", "--num-envs", "--resume RUN"]),
        (["train", "catch", "-h"], ["--truncate-after", "150000"]),
        (["train", "recall", "--help"], ["--delay-steps", "--lstm-size"]),
        (["eval", "--help"], ["--episodes", "--video", "--trust-code"]),
        (["envs", "--help"], ["headrace envs"]),
        (["presets", "--help"], ["headrace presets"]),
    ],
)
def test_help(argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if argv == ["train", "--help"]:
        pytest.importorskip("ale_py")
    code = None
    try:
        main(argv)
    except SystemExit as ended:
        code = ended.code
    assert not code
    out = capsys.readouterr().out
    for word in words:
        assert word in out


def test_a_run_by_the_clock_ends_with_it_and_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock of a process begins before its imports."""
    run = str(tmp_path / "run")
    flags = [flag for flag in SMALL if flag != "--lockstep"]
    argv = ["headrace", "train", "catch", *flags, "--out", run, "--total-minutes", "5"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(cli, "STARTED_S", time.monotonic() - 300.0)
    main()
    said = capsys.readouterr().out
    assert "0:05:00/0:05:00" in said
    assert f"done; go on with: headrace train --resume {run} --total-minutes MORE" in said
    main(["train", "--resume", run, "--total-minutes", "50"])
    said = capsys.readouterr().out
    assert f"done; go on with: headrace train --resume {run} --total-frames MORE" in said


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert re.fullmatch(r"headrace \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


def test_every_preset_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["presets"])
    out = capsys.readouterr().out
    for name, preset in PRESETS.items():
        assert name in out
        assert preset.source in out
        assert preset.score in out
        assert preset.command in out
    assert "learning.optimizer.learning_rate = 0.0006" in out


def test_environments_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["envs"])
    out = capsys.readouterr().out
    for name in ("catch", "recall", "ALE/"):
        assert name in out


def test_flags_lie_over_the_file_over_the_preset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.toml").write_text(
        "seed = 5\n[learning]\ndiscount = 0.5\nentropy_cost = 0.25\n[server]\nnum_envs = 99\n"
    )
    out = tmp_path / "run"
    argv = ["train", "catch", "--config", str(tmp_path / "mine.toml"), "--out", str(out)]
    main([*argv, "--discount", "0.75", *SMALL])
    config = from_dict(read_toml(out / "config.toml"))
    assert (config.seed, config.total_frames, config.server.num_envs) == (5, 600, 8)
    assert (config.learning.discount, config.learning.entropy_cost) == (0.75, 0.25)
    preset = PRESETS["catch"].values["learning"]["optimizer"]
    assert config.learning.optimizer.learning_rate == preset["learning_rate"]
    assert f"headrace eval {out} --video" in capsys.readouterr().out
    main(["train", "--resume", str(out), "--total-frames", "1_200"])
    assert "done" in capsys.readouterr().out
    main(["eval", str(out), "--episodes", "4", "--json", "--device", "cpu"])
    summary = json.loads(capsys.readouterr().out)
    assert summary["agent_steps"] >= 1200
    assert (summary["env"], summary["episodes"]) == ("catch", 4)
    main(["eval", str(out), "--episodes", "2", "--video", str(tmp_path / "film.mp4")])
    assert (tmp_path / "film.mp4").stat().st_size > 100
    assert "mean return" in capsys.readouterr().out


def test_a_missing_extra_names_the_command_that_installs_it() -> None:
    code = """
        import sys
        sys.modules["ale_py"] = None
        from headrace.cli import main
        try:
            main(["train", "ALE/Pong-v5"])
        except SystemExit as ended:
            assert ended.code == 2, ended.code
        main(["envs"])
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == "headrace: Atari needs ale-py: pip install 'headrace[atari]'\n"
    assert "catch" in ended.stdout
    assert "pip install 'headrace[atari]'" in ended.stdout


def test_the_list_of_commands_fits_a_terminal() -> None:
    assert max(map(len, usage().splitlines())) <= 80


@pytest.mark.parametrize(
    "argv",
    [["presets"], ["envs"], ["--help"], ["train", "catch", "--help-all"], ["eval", "--help"]],
    ids=" ".join,
)
def test_output_that_nobody_reads_is_no_mistake(argv: list[str]) -> None:
    """As in `headrace presets | head -1`, whose end of the pipe is closed here before it begins."""
    reads, writes = os.pipe()
    os.close(reads)
    try:
        ended = subprocess.run(
            [sys.executable, "-c", RUN, *argv],
            stdout=writes,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        os.close(writes)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_output_that_cannot_be_written_is_one_sentence() -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", RUN, "presets"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
        )
    assert ended.returncode == 1
    assert ended.stderr == "headrace: [Errno 28] No space left on device\n"


def test_a_pipe_that_breaks_elsewhere_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_: list[str]) -> None:
        raise BrokenPipeError(32, "a worker is gone")

    monkeypatch.setattr("headrace.commands.envs.envs_command", failing)
    with pytest.raises(SystemExit) as ended:
        main(["envs"])
    assert ended.value.code == 1
    assert "a worker is gone" in capsys.readouterr().err
