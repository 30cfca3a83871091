"""A stranger's run: whatever lies in its folder, nothing outside is read, written or removed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headrace import load
from headrace.cli import main
from headrace.errors import ConfigError
from headrace.learner import checkpoint
from headrace.run import saving
from headrace.run.api import prepare, start
from headrace.run.local import Hooks
from headrace.telemetry.record import RunDirectory
from tests.run.test_kept_runs import copied
from tests.run.test_local import newest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="makes links, fifos and devices")

FILES = ("config.toml", "config.toml.new", "metrics.jsonl", "log.txt", "lock", "wandb-id.txt")
FOLDERS = ("checkpoints", "tensorboard", "videos", "wandb")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return copied("impala-recall", tmp_path)


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder that nobody may touch."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "profile").write_text("theirs\n")
    (folder / ".x.partial.mp4").write_text("theirs\n")
    (folder / ".agent_steps_x").mkdir()
    return folder


def listing(folder: Path) -> dict[str, str]:
    return {
        path.name: path.read_text() if path.is_file() else "a folder" for path in folder.iterdir()
    }


def put(path: Path, kind: str, outside: Path) -> None:
    """Puts something where the run has a file or a folder; what was there goes outside."""
    if path.exists() and kind == "a link":
        path.rename(outside / path.name)
    elif path.exists():
        path.rename(path.with_name(f"{path.name}.moved"))
    if kind == "a link":
        path.symlink_to(outside / path.name)
    elif kind == "an endless link":
        path.symlink_to("/dev/zero")
    elif kind == "a fifo":
        os.mkfifo(path)
    elif kind == "no folder":
        path.touch()
    else:
        path.mkdir()


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Returns the one line that a command leaves on stderr, which ends with exit code 2."""
    with pytest.raises(SystemExit) as ended:
        main(list(argv))
    said = capsys.readouterr().err
    assert (ended.value.code, said.count("\n")) == (2, 1), said
    return said


def more(run: Path) -> list[str]:
    return ["train", "--resume", str(run), "--total-frames", "1600", "--device", "cpu"]


@pytest.mark.parametrize("kind", ["a link", "an endless link", "a fifo", "a folder"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_of_the_run_that_is_none_is_refused_before_training(
    run: Path, outside: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    put(run / name, kind, outside)
    before = listing(outside)
    said = refusal(capsys, *more(run))
    assert f"{run / name} is {kind.replace('an endless', 'a')}" in said
    assert "delete it" in said
    assert listing(outside) == before


@pytest.mark.parametrize("kind", ["a link", "an endless link", "a fifo", "no folder"])
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_the_run_that_is_none_is_refused_before_training(
    run: Path, outside: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (run / name).exists():
        (run / name).mkdir()
    put(run / name, kind, outside)
    before = listing(outside)
    said = refusal(capsys, *more(run))
    assert f"{run / name} is " in said
    assert "delete it" in said
    assert listing(outside) == before


@pytest.mark.parametrize("kind", ["a link", "an endless link", "a fifo", "a folder"])
@pytest.mark.parametrize("name", ["config.toml", "checkpoints"])
def test_an_agent_is_read_from_the_folder_itself(
    run: Path, outside: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    put(run / name, kind, outside)
    said = refusal(capsys, "eval", str(run), "--episodes", "1", "--device", "cpu")
    there_is_none = (name, kind) == ("checkpoints", "a folder")
    assert ("no whole checkpoint" if there_is_none else f"{run / name} is ") in said


def test_a_run_that_is_itself_reached_through_a_link_goes_on(run: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run)
    steps = newest(run).meta["agent_steps"]
    assert load(tmp_path / "link", device="cpu").agent_steps == steps
    main(more(tmp_path / "link"))
    assert newest(run).meta["agent_steps"] > steps


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a = " + "[" * 20_000, "nested too deeply"),
        ("env." + "a." * 3000 + "a = 1", "nested too deeply"),
        ("seed = " + "9" * 5000, "is not TOML"),
        ("# " + "long " * 20_000, "over 65536 bytes"),
        ('env = "\x1b[2J"', "is not TOML"),
    ],
    ids=["deep list", "deep table", "huge number", "long", "escape"],
)
def test_a_config_without_end_is_refused(
    run: Path, text: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "config.toml").write_text(text)
    for argv in (more(run), ["eval", str(run)]):
        said = refusal(capsys, *argv)
        assert complaint in said
        assert said[:-1].isprintable()
        assert len(said) < 500


def test_a_config_that_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.toml may have"):
        RunDirectory.create(tmp_path / "run", "# " + "long " * 20_000)


def second(run: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Adds a newer checkpoint, whose meta.json `change` has changed, and which is sound else."""
    saved = newest(run)
    meta = {k: v for k, v in saved.meta.items() if k not in ("schema", "files", "meta_sha256")}
    steps = meta.pop("agent_steps") + 1
    change(meta)
    return checkpoint.save(
        run / "checkpoints", agent_steps=steps, tensors=saved.tensors, meta=meta, keep=0
    )


def without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda meta: meta.pop(name)


def with_(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda meta: meta.update(values)


def counter(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda meta: meta["counters"].update({name: value})


DAMAGES: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "no counters": ("agent_steps", without("counters")),
    "counters as a list": ("agent_steps", with_(counters=[1])),
    "a counter less": ("no samples", lambda meta: meta["counters"].pop("samples")),
    "a counter of text": ("updates", counter("updates", "7")),
    "a counter that is true": ("episodes", counter("episodes", True)),
    "a counter below 0": ("samples", counter("samples", -1)),
    "a huge counter": ("agent_steps", counter("agent_steps", 10**30)),
    "no time": ("elapsed_s", counter("elapsed_s", float("nan"))),
    "no return": ("return_max", lambda meta: meta["counters"].pop("return_max")),
    "a return of text": ("return_max", counter("return_max", "1")),
    "no sessions": ("resume_count", without("resume_count")),
    "sessions of text": ("resume_count", with_(resume_count="1")),
    "no unfinished unrolls": ("unfinished_unrolls", without("unfinished_unrolls")),
    "many unfinished unrolls": ("unfinished_unrolls", with_(unfinished_unrolls="\n" * 9)),
    "no training": ("training", without("training")),
    "training as a list": ("training", with_(training={"list": []})),
    "training as a number": ("training", with_(training=3)),
    "training of a missing tensor": (
        "training.*no such",
        with_(training={"dict": [["optimizer", {"tensor": "no such"}]]}),
    ),
    "a key that is none": ("training", with_(training={"dict": [[[], 1]]})),
    "a system that is none": ("system", with_(system={"dict": 3})),
    "a replay without tensors": ("replay", with_(replay={"dict": [["rows", {"tensor": "a"}]]})),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_checkpoint_that_lacks_what_a_run_needs_is_passed_over(run: Path, name: str) -> None:
    whole = newest(run).path
    complaint, change = DAMAGES[name]
    path = second(run, change)
    said: list[str] = []
    assert saving.find(RunDirectory(run), said.append).path == whole
    assert len(said) == 1
    assert said[0].startswith(f"skipped the damaged checkpoint {path.name}: ")
    with pytest.raises(AssertionError, match=complaint):
        assert said == []


def test_a_counter_more_is_no_damage_and_no_episode_is_no_return(run: Path) -> None:
    path = second(run, lambda meta: meta["counters"].update(later=1, return_max=None))
    found = saving.find(RunDirectory(run), lambda _: None)
    assert found.path == path
    before = saving.Before.read(found)
    assert before.return_max != before.return_max
    assert before.resume_count == found.meta["resume_count"] + 1


def test_a_passed_over_checkpoint_is_said_by_eval_and_resume(
    run: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = newest(run)
    path = second(run, without("counters"))
    (path / "weights.safetensors").unlink()
    (path / "weights.safetensors").symlink_to("/dev/zero")
    with caplog.at_level("WARNING", "headrace"):
        assert load(run, device="cpu").agent_steps == whole.meta["agent_steps"]
    assert [path.name in record.message for record in caplog.records] == [True]
    main(more(run))
    assert capsys.readouterr().out.count(f"skipped the damaged checkpoint {path.name}") == 1
    assert (run / "log.txt").read_text().count(f"skipped the damaged checkpoint {path.name}") == 1


@pytest.mark.parametrize(
    "raised", [ArithmeticError, AttributeError, IndexError, RuntimeError, TypeError, ValueError]
)
def test_whatever_a_state_of_something_else_raises_names_the_checkpoint(
    run: Path, raised: type[Exception]
) -> None:
    saved = newest(run)
    with (
        pytest.raises(ConfigError, match=f"{saved.path} does not fit its run"),
        saving._naming(saved),
    ):
        raise raised


@pytest.mark.parametrize("items", [[["seats", 5]], []])
def test_a_state_of_something_else_names_the_checkpoint(run: Path, items: list[Any]) -> None:
    path = second(run, with_(system={"dict": items}))
    nothing = Hooks(lambda _: None, lambda *_: None, lambda _: None, on_message=lambda _: None)
    prepared = prepare(resume=run, changes={"total_frames": 1600})
    with pytest.raises(ConfigError, match=f"{path} does not fit its run.*move that folder away"):
        start(prepared, nothing)


def test_a_link_among_hidden_leftovers_does_not_stop_a_save(run: Path, outside: Path) -> None:
    before = listing(outside)
    (run / "checkpoints" / ".agent_steps_x").symlink_to(outside)
    main(more(run))
    assert newest(run).meta["counters"]["updates"] > 0
    assert not os.path.lexists(run / "checkpoints" / ".agent_steps_x")
    assert listing(outside) == before


def test_names_of_a_stranger_put_no_line_anywhere(
    run: Path, outside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = newest(run)
    path = second(run, lambda _: None)
    read = checkpoint.json.loads((path / "meta.json").read_text())
    read["files"]["x\nrm -r ~\n\x1b[2J.safetensors"] = {"sha256": "0" * 64, "nbytes": 0}
    del read["meta_sha256"]
    (path / "meta.json").write_bytes(checkpoint._encode_meta(read))
    main(more(run))
    lines = [*capsys.readouterr().out.splitlines(), *(run / "log.txt").read_text().splitlines()]
    assert sum("rm -r" in line and path.name in line for line in lines) == 2
    assert not any(line.startswith("rm") or not line.isprintable() for line in lines)
    assert newest(run).meta["agent_steps"] > whole.meta["agent_steps"]
