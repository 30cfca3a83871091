"""What may be opened in a run's folder, and how a line is written."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from headrace import run_files
from headrace.errors import ConfigError

posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has none of these")


def a_fifo(path: Path) -> None:
    os.mkfifo(path)  # which Windows lacks


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        os.chdir(path.parent)  # an address has a hundred letters at most
        listening.bind(path.name)


STRANGE: dict[str, Callable[[Path], None]] = {
    "a link": lambda path: path.symlink_to(path.with_name("elsewhere")),
    "a link to nothing": lambda path: path.symlink_to(path.with_name("nowhere")),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a fifo": a_fifo,
    "a socket": a_socket,
    "a folder": Path.mkdir,
}


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tmp_path.joinpath("elsewhere").write_text("theirs")
    return tmp_path / "file"


@posix
@pytest.mark.parametrize("mode", ["rb", "r+b", "ab", "a+b", "wb", "xb"])
@pytest.mark.parametrize("name", STRANGE)
def test_nothing_but_a_regular_file_is_opened(path: Path, name: str, mode: str) -> None:
    STRANGE[name](path)
    kind = "a link" if "link" in name else name
    with (
        pytest.raises(ConfigError, match=f"{path} is {kind}.*delete it"),
        open(path, mode, opener=run_files.opener),
    ):
        pass
    assert not path.with_name("nowhere").exists()
    assert path.with_name("elsewhere").read_text() == "theirs"


@pytest.mark.parametrize(
    ("mode", "after"),
    [("r+b", b"newer"), ("ab", b"ournew"), ("a+b", b"ournew"), ("wb", b"new")],
)
def test_a_regular_file_is_written_as_ever(path: Path, mode: str, after: bytes) -> None:
    path.write_bytes(b"ourer" if mode == "r+b" else b"our")
    with open(path, mode, opener=run_files.opener) as file:
        file.write(b"new")
    assert path.read_bytes() == after


def test_a_missing_file_is_made_or_missed_as_ever(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        run_files.read(path, 9)
    with open(path, "xb", opener=run_files.opener) as file:
        file.write(b"new")
    assert run_files.read(path, 3) == b"new"
    with pytest.raises(FileExistsError), open(path, "xb", opener=run_files.opener):
        pass


def test_no_more_is_read_than_was_said(path: Path) -> None:
    path.write_bytes(b"1234")
    assert run_files.read(path, 4) == b"1234"
    with pytest.raises(ConfigError, match="over 3 bytes"):
        run_files.read(path, 3)


@posix
@pytest.mark.parametrize("name", [name for name in STRANGE if name != "a folder"])
def test_a_folder_is_one_of_its_own(path: Path, name: str) -> None:
    run_files.ensure_folder(path)
    STRANGE[name](path)
    with pytest.raises(ConfigError, match=f"{path} is .*delete it"):
        run_files.ensure_folder(path)
    path.unlink()
    path.symlink_to(path.parent)
    with pytest.raises(
        ConfigError, match=r"is a link.*make its whole folder a link, or give --out"
    ):
        run_files.ensure_folder(path)
    path.unlink()
    path.mkdir()
    run_files.ensure_folder(path)


@posix
@pytest.mark.parametrize("name", STRANGE)
def test_what_is_removed_is_the_thing_itself(path: Path, name: str) -> None:
    STRANGE[name](path)
    run_files.remove(path)
    assert not os.path.lexists(path)
    assert path.with_name("elsewhere").read_text() == "theirs"


@posix
def test_a_removed_link_to_a_folder_leaves_what_is_there(path: Path) -> None:
    theirs = path.with_name("theirs")
    theirs.mkdir()
    (theirs / "kept").touch()
    path.symlink_to(theirs)
    run_files.remove(path)
    assert (theirs / "kept").exists()
    path.mkdir()
    (path / "in it").symlink_to(theirs)
    run_files.remove(path)
    assert not path.exists()
    assert (theirs / "kept").exists()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("plain · Ünïcode 5 %", "plain · Ünïcode 5 %"),
        ("one\ntwo\r\n", r"one\ntwo\r\n"),
        ("\x1b[2J\x07\x00", r"\x1b[2J\x07\x00"),
        ("\u202egnp.exe \u2028 \x85", r"\u202egnp.exe \u2028 \x85"),
        ("name of a file: \udcff", r"name of a file: \udcff"),
        ("\x1b[33mWARN: \tit is old\x1b[0m", "WARN:   it is old"),
        ("\x1b[1;31mred\x1b[m and \x1b[31", r"red and \x1b[31"),
    ],
)
def test_a_line_stays_one_and_moves_no_cursor(text: str, line: str) -> None:
    assert run_files.escaped(text) == line


def test_lines_stay_lines_and_pose_as_none_of_ours() -> None:
    assert run_files.escaped_lines("one") == "one"
    said = "one:\n  two\x1b[2J\n\nheadrace: \u2028\r\n"
    assert run_files.escaped_lines(said) == (
        "one:\n      two\\x1b[2J\n    \n    headrace: \\u2028\\r"
    )


@pytest.mark.parametrize("error", [PermissionError, RecursionError])
def test_what_cannot_be_removed_stays(
    path: Path, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(_: Path) -> None:
        raise error

    run_files.remove(path)  # there is nothing
    path.mkdir()
    monkeypatch.setattr(shutil, "rmtree", refusing)
    run_files.remove(path)
    assert path.exists()
