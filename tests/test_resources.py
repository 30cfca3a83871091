"""What a container may take, from control groups that are made up, and what is left of it."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from headrace import resources
from headrace.pools import memory
from headrace.run.system import free_memory_nbytes


def test_a_limit_and_what_is_used_of_it(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    assert resources.container_limit_nbytes(tmp_path) == 1000
    assert resources.container_used_nbytes(tmp_path) == 550  # a cache of files gives way


def test_without_a_limit_or_a_container_there_is_none(tmp_path: Path) -> None:
    assert resources.container_limit_nbytes(tmp_path) is None
    assert resources.container_used_nbytes(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    assert resources.container_limit_nbytes(tmp_path) is None


@pytest.mark.parametrize(
    ("limit", "used", "free", "shared"),
    [(None, None, 900, 900), (1000, 400, 600, 900), (500, 600, 0, 500), (500, None, 900, 500)],
)
def test_a_container_has_no_more_than_its_limit(
    limit: int | None,
    used: int | None,
    free: int,
    shared: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resources, "available_memory_nbytes", lambda: 900)
    monkeypatch.setattr(resources, "container_limit_nbytes", lambda: limit)
    monkeypatch.setattr(resources, "container_used_nbytes", lambda: used)
    assert free_memory_nbytes() == free
    assert memory._free_bytes() == shared


def test_the_machine_itself_is_asked() -> None:
    assert 0 < resources.available_memory_nbytes() <= psutil.virtual_memory().total
    assert resources.usable_cores() >= 1
