"""What the documentation tells a reader to type is tried: Python runs, commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = {"train", "worker", "plan", "eval", "envs", "presets", "bench", "tune"}
PYTHON = {"python", "python no-run"}
SHELL = {"console", "bash"}
BLOCK_TIMEOUT_S = 300


class Block(NamedTuple):
    """One fenced block of a Markdown file."""

    place: str  # file:line of the opening fence
    info: str
    text: str


def blocks_of(path: Path) -> list[Block]:
    """Returns the fenced blocks of one file; a fence that is never closed is an error."""
    blocks = []
    opened: tuple[int, str, str] | None = None
    lines: list[str] = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        fence = re.match(r"\s*(`{3,})\s*(.*?)\s*$", line)
        if opened is None and fence is not None:
            opened, lines = (number, fence[1], fence[2]), []
        elif opened is not None and fence is not None and fence[1] == opened[1] and not fence[2]:
            blocks.append(Block(f"{path.name}:{opened[0]}", opened[2], "\n".join(lines) + "\n"))
            opened = None
        elif opened is not None:
            lines.append(line)
    assert opened is None, f"{path.name}:{opened[0]}: the block is never closed"
    return blocks


def readme() -> Path:
    """Returns the README, without which these tests would check nothing."""
    path = ROOT / "README.md"
    assert path.is_file(), "README.md is missing"
    return path


def documents() -> list[Path]:
    """Returns every file that is checked."""
    return [
        readme(),
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted((ROOT / "examples").glob("*.md")),
    ]


def syntax_faults(blocks: list[Block]) -> list[str]:
    """Returns why each Python block that is no Python is none."""
    found = []
    for block in blocks:
        if block.info.split(" ")[0] == "python" and block.info not in PYTHON:
            found.append(f"{block.place}: info string {block.info!r}; known: {sorted(PYTHON)}")
        if block.info in PYTHON:
            try:
                compile(block.text, block.place, "exec")
            except SyntaxError as error:
                found.append(f"{block.place}: {error}")
    return found


def command_faults(blocks: list[Block]) -> list[str]:
    """Returns every headrace command of the shell blocks that does not exist."""
    found = []
    for block in blocks:
        for line in block.text.splitlines() if block.info in SHELL else ():
            words = line.removeprefix("$ ").split()
            if words[:1] == ["headrace"] and (len(words) < 2 or words[1] not in COMMANDS):
                found.append(f"{block.place}: no such command: {line}")
    return found


def run_fault(block: Block, folder: Path) -> str | None:
    """Runs one block in `folder`; returns what went wrong."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", block.text],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=BLOCK_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"{block.place}: still running after {BLOCK_TIMEOUT_S} s"
    return f"{block.place}: exit {done.returncode}\n{done.stderr}" if done.returncode else None


def test_python_blocks_compile() -> None:
    assert [fault for path in documents() for fault in syntax_faults(blocks_of(path))] == []


def test_commands_exist() -> None:
    assert [fault for path in documents() for fault in command_faults(blocks_of(path))] == []


def test_readme_python_blocks_run(tmp_path: Path) -> None:
    found = []
    for number, block in enumerate(blocks_of(readme())):
        if block.info == "python":
            folder = tmp_path / str(number)
            folder.mkdir()
            found.append(run_fault(block, folder))
    assert found, "README.md has no Python block that runs"
    assert [fault for fault in found if fault is not None] == []


def test_the_checks_can_fail(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nraise SystemExit(3)\n```\n"
        "```python no-run\ndef broken(:\n```\n"
        "```python norun\n```\n"
        "```console\n$ headrace trian ALE/Pong-v5\nheadrace train X\n```\n"
    )
    blocks = blocks_of(page)
    assert [block.place for block in blocks] == ["page.md:1", "page.md:4", "page.md:7", "page.md:9"]
    assert [fault.split(": ")[0] for fault in syntax_faults(blocks)] == ["page.md:4", "page.md:7"]
    assert command_faults(blocks) == ["page.md:9: no such command: $ headrace trian ALE/Pong-v5"]
    assert str(run_fault(blocks[0], tmp_path)).startswith("page.md:1: exit 3")
    page.write_text("```python\n")
    with pytest.raises(AssertionError, match="never closed"):
        blocks_of(page)
