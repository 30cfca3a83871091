"""What lies in a run's folder, which may be a stranger's: files and folders of its own, no links.

The folder itself may be reached through a link, since the user has named it. A link inside it would
lead to files that are not the run's, and a device or a fifo has no end: neither is ever opened.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
from pathlib import Path

from headrace.errors import ConfigError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a fifo",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)  # Windows has none


def ensure_file(path: Path) -> None:
    """Looks whether there is a regular file of this name, or nothing.

    Raises:
        ConfigError: it is a link, or something else.
    """
    found = _look(path)
    if found is not None and not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "no file")
        raise ConfigError(f"{path} is {kind}, where a run has a file of its own: delete it")


def ensure_folder(path: Path) -> None:
    """Looks whether there is a folder of this name, or nothing.

    Raises:
        ConfigError: it is a link, or something else.
    """
    elsewhere = "; to have a run on another disk make its whole folder a link, or give --out there"
    found = _look(path, elsewhere)
    if found is not None and not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"{path} is no folder, where a run has one of its own: delete it")


def opener(path: str, flags: int) -> int:
    """For `open`: opens nothing but a regular file.

    Raises:
        ConfigError: it is a link, or something else.
    """
    ensure_file(Path(path))
    return os.open(path, flags | _NO_FOLLOW, 0o666)


def read(path: Path, most_nbytes: int) -> bytes:
    """Reads a whole file.

    Raises:
        ConfigError: it is no regular file, or has more than `most_nbytes`.
        OSError: it is missing, or cannot be read.
    """
    with open(path, "rb", opener=opener) as file:
        data = file.read(most_nbytes + 1)
    if len(data) > most_nbytes:
        raise ConfigError(f"{path} has over {most_nbytes} bytes, more than a run writes there")
    return data


def remove(path: Path) -> None:
    """Removes a link itself, not what it leads to; a file; or a folder with all that is in it.

    What cannot be removed stays: a stranger's folder may be closed, or without end.
    """
    with contextlib.suppress(OSError, RecursionError):
        found = os.lstat(path)
        if stat.S_ISDIR(found.st_mode) and not _is_link(found):
            shutil.rmtree(path)
        else:
            path.unlink()


def escaped(text: str) -> str:
    """Returns a text as one line that moves no cursor: what cannot be printed is an escape.

    Colours go, and a tab is spaces.
    """
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode("ascii")
        for each in _COLOUR.sub("", text).expandtabs()
    )


def escaped_lines(text: str) -> str:
    """Returns a text whose lines are `escaped`, all but the first indented: none poses as ours."""
    return "\n    ".join(map(escaped, text.rstrip("\n").split("\n")))


def _look(path: Path, more: str = "") -> os.stat_result | None:
    """Returns what lies at the path itself, None for nothing; `more` is said of a link."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    if _is_link(found):
        raise ConfigError(
            f"{path} is a link, and a run has its files in its own folder: delete it, or copy "
            f"there what it leads to{more}"
        )
    return found


def _is_link(found: os.stat_result) -> bool:
    # Windows has a second kind, for folders, which os.lstat calls a folder.
    junction = getattr(stat, "IO_REPARSE_TAG_MOUNT_POINT", None)
    return stat.S_ISLNK(found.st_mode) or getattr(found, "st_reparse_tag", -1) == junction
