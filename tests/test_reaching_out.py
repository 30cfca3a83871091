"""What a stranger's run or file asks for: it gets no further than its folder unless it is typed."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from headrace.cli import main
from headrace.config import merged, nested, read_toml, to_dict
from headrace.errors import ConfigError
from headrace.run import api
from headrace.run.api import Prepared, prepare, train
from headrace.run.evaluate import evaluate
from headrace.run.local import TrainResult
from headrace.run.policy import load

ASKED: dict[str, Any] = {
    "wandb": "spy's",
    "remote": {
        "listen": "0.0.0.0:4567",
        "token_file": "to ken",
        "tls_cert": "cert",
        "tls_key": "key",
        "tls_client_ca": "client",
        "insecure": True,
    },
    "cluster": {
        "cluster": "192.0.2.1:6379",
        "host_tls_ca": "ca",
        "host_tls_cert": "host",
        "host_tls_key": "host-key",
    },
    "learning": {"replay": {"replay_folder": "/nowhere"}},
}
HARMLESS: dict[str, Any] = {"remote": {"max_hosts": 3}, "cluster": {"host_cpus": 2}}
LEAVES = [
    (*path, name)
    for path, values in (
        ((), {"wandb": ""}),
        (("remote",), ASKED["remote"]),
        (("cluster",), ASKED["cluster"]),
        (("learning", "replay"), ASKED["learning"]["replay"]),
    )
    for name in values
]


def value_at(path: tuple[str, ...], values: Any) -> Any:
    for part in path:
        values = values[part]
    return values


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A run with a replay."""
    kept = Path(__file__).with_name("kept_runs") / "sac-pointmass"
    return Path(shutil.copytree(kept, tmp_path / "run"))


@pytest.fixture
def run(made: Path) -> Path:
    """One whose settings somebody has changed."""
    asking(made, merged(ASKED, HARMLESS))
    return made


def asking(run: Path, settings: dict[str, Any]) -> None:
    path = run / "config.toml"
    path.write_text(tomli_w.dumps(merged(read_toml(path), settings)))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Prepared]:
    """What the command line would have started: nothing is."""
    found: list[Prepared] = []

    def start(prepared: Prepared, *_: Any, **__: Any) -> TrainResult:
        found.append(prepared)
        return TrainResult(prepared.directory.path, {"env_frames": 0}, finished=False)

    monkeypatch.setattr(api, "start", start)
    monkeypatch.setattr(api, "ensure_wandb", lambda: None)
    monkeypatch.setattr("headrace.run.cluster.ensure_allowed", lambda _: None)
    return found


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(argv))
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


@pytest.mark.parametrize("path", LEAVES, ids=".".join)
def test_a_resumed_run_is_not_obeyed(path: tuple[str, ...], made: Path) -> None:
    asking(made, nested(path, value_at(path, ASKED)))
    before = (made / "config.toml").read_bytes()
    with pytest.raises(ConfigError, match=f"this run asks for --{path[-1].replace('_', '-')}"):
        train(resume=made, changes={"total_frames": 1400})
    with pytest.raises(ConfigError, match="type that again"):
        train(resume=made)
    assert (made / "config.toml").read_bytes() == before


def test_what_was_typed_again_is_had(
    run: Path, started: list[Prepared], capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(capsys, "train", "--resume", str(run))
    assert started == []
    again = message.partition("asks for ")[2].partition(", which reaches out")[0]
    main(["train", "--resume", str(run), *shlex.split(again)])
    config = to_dict(started[0].config)
    for path in LEAVES:
        assert value_at(path, config) == value_at(path, ASKED)
    hint = capsys.readouterr().out.partition("headrace train --resume ")[2].partition("\n")[0]
    assert shlex.split(hint) == [str(run), *shlex.split(again)]
    in_python = eval(message.partition("changes=")[2].rpartition(")")[0])
    assert prepare(resume=run, changes=in_python).config == started[0].config


def test_a_part_of_it_is_not_enough(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(
        capsys, "train", "--resume", str(run), "--listen=0.0.0.0:4567", "--wandb", "x"
    )
    assert "--listen" not in message
    assert "--wandb" not in message
    assert "this run asks for --token-file 'to ken'" in message
    assert "--insecure" in message


def test_one_goes_on_without_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, "train", "--resume", str(run), "--total-frames", "1400")
    without = message.partition("have it, or ")[2].partition(" to go on without")[0]
    main(["train", "--resume", str(run), "--total-frames", "1400", *shlex.split(without)])
    kept = read_toml(run / "config.toml")
    for path in LEAVES:
        assert not value_at(path, kept)
    assert kept["remote"]["max_hosts"] == 3, "which reaches nowhere, and need not be typed"
    main(["train", "--resume", str(run), "--total-frames", "1600"])


def test_a_strangers_words_are_shown_as_they_are(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asking(run, {"wandb": "a\n\x1b[2J; rm"})
    message = refusal(capsys, "train", "--resume", str(run))
    assert "\x1b" not in message
    assert r"a\n\x1b[2J; rm" in message


def test_who_judges_does_not_obey_either(run: Path) -> None:
    # Of an address that is not ours, and of files that are not there, one would hear.
    asking(run, {"remote": {"listen": "192.0.2.1:1", "insecure": False}})
    assert len(evaluate(load(run), episodes=2).returns) == 2
    main(["eval", str(run), "--episodes", "2"])


STRANGER = """
from pathlib import Path
Path(__file__).with_name("imported").touch()
raise RuntimeError("what strangers do")
"""


@pytest.mark.parametrize(
    ("file", "typed"),
    [
        ({"env": "stranger:make"}, ["stranger:make"]),
        ({"env": "stranger:Id-v0"}, ["stranger:Id-v0"]),
        ({"env": "catch", "algorithm": "stranger:Rule"}, ["--algorithm", "stranger:Rule"]),
        ({"env": "catch", "network": {"network": "stranger:net"}}, ["--network=stranger:net"]),
    ],
)
@pytest.mark.parametrize("command", ["train", "tune"])
def test_code_that_a_file_names_is_not_run(
    command: str,
    file: dict[str, Any],
    typed: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "stranger.py").write_text(STRANGER)
    (tmp_path / "mine.toml").write_text(tomli_w.dumps(merged({"device": "cpu"}, file)))
    argv = [command, "--config", "mine.toml"]
    message = refusal(capsys, *argv)
    assert message.startswith("headrace: mine.toml names the ")
    assert "which is code outside headrace: read it, then say --trust-code" in message
    if command == "train":
        refusal(capsys, *argv, "--help")
    assert not (tmp_path / "imported").exists()
    for allowed in ([*argv, "--trust-code"], [command, *typed, *argv[1:]]):
        assert "what strangers do" in refusal(capsys, *allowed)
        (tmp_path / "imported").unlink()
