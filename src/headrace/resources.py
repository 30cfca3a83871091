"""Cores and main memory that this process may use; the one place that asks for them."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")  # version 2; a container sees itself at the root


def usable_cores() -> int:
    """Returns the number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory_nbytes() -> int:
    """Returns what the whole machine can still give, in bytes, without swapping."""
    import psutil  # noqa: PLC0415 - tens of milliseconds of a start-up

    return int(psutil.virtual_memory().available)


def container_limit_nbytes(group: Path = _CGROUP) -> int | None:
    """Returns the memory that the container may take in all, which psutil does not know.

    Args:
        group: Folder of its control group.

    Returns:
        Bytes; None where there is no limit, or no container.
    """
    try:
        return int((group / "memory.max").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # "max" is no number
        return None


def container_used_nbytes(group: Path = _CGROUP) -> int | None:
    """Returns what the container has taken, in bytes, but for a cache of files, which gives way.

    Args:
        group: Folder of its control group.

    Returns:
        Bytes; None where that is not known.
    """
    try:
        used = int((group / "memory.current").read_text(encoding="utf-8"))
        lines = (group / "memory.stat").read_text(encoding="utf-8").splitlines()
        return used - int(dict(line.split() for line in lines).get("inactive_file", 0))
    except (OSError, ValueError):
        return None
