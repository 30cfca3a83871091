"""The tuned settings as a file that `headrace train --config` takes."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import tomli_w

from headrace.errors import ConfigError
from headrace.tune.machine import versions
from headrace.tune.report import sentences
from headrace.tune.tuner import Tuned


def default_name(env: str, algorithm: str) -> str:
    """Returns tuned-ENV-ALGORITHM.toml, without what a file's name should not have."""
    words = (env.removeprefix("ALE/"), algorithm)
    plain = ("".join(c if c.isalnum() or c in "-_." else "-" for c in word) for word in words)
    return f"tuned-{'-'.join(plain)}.toml"


def ensure_free(path: Path, *, force: bool) -> None:
    """Looks whether a file can be written, before minutes are spent on what goes into it.

    Raises:
        ConfigError: there is one of that name, or no folder to write it in.
    """
    if path.exists() and not force and not path.is_dir():
        raise ConfigError(
            f"{path} is there already: name another file with --out, or say --force to replace it"
        )
    folder = path.parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"cannot write {path}: name a file in a folder of yours with --out")


def text_of(values: Mapping[str, Any], tuned: Tuned, *, command: str, now: datetime) -> str:
    """Returns the file's text: how it came about, then the settings.

    Args:
        values: Settings, nested as in config.toml.
        tuned: The result that they are of.
        command: As the user typed it.
        now: When.
    """
    said = [
        f"{now:%Y-%m-%d %H:%M}: {command}",
        versions(),
        *sentences(tuned),
    ]
    return "".join(f"{line}\n" for line in _comments(said)) + "\n" + tomli_w.dumps(values)


def write(path: Path, text: str, *, force: bool) -> None:
    """Writes the file, whole or not at all.

    Raises:
        ConfigError: it has come to be there since, or cannot be written.
    """
    ensure_free(path, force=force)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.new")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _comments(lines: Iterable[str]) -> list[str]:
    return [f"# {part}" for line in lines for part in line.splitlines()]
