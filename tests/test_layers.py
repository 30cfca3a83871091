"""Imports go down, and maths stays maths: the layer list of the design, as data."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "headrace"

# From the top. A part may import itself and any part of a later row. `algorithms.base` is a part of
# its own, and low: it is where systems code and learning rules meet.
LAYERS = (
    ("cli",),
    ("commands",),
    ("tune",),
    ("bench",),
    ("run",),
    ("presets",),
    ("config",),
    ("catalog",),
    ("server", "learner"),
    ("algorithms", "pools", "experience", "weights"),
    ("networks", "envs", "telemetry"),
    ("ops", "transport"),
    ("algorithms.base",),
    ("pictures",),
    ("records", "specs"),
    ("steps",),
    ("tree", "rows", "length", "schedules", "imports", "run_files", "resources"),
    ("errors", "apart"),
)
RANK = {part: rank for rank, row in enumerate(LAYERS) for part in row}

MATHS = {"ops", "networks", "algorithms"}
MATHS_MAY_USE = MATHS | {"algorithms.base", "records", "specs", "tree", "rows", "errors"}
MATHS_MAY_USE |= {"pictures", "schedules"}

LAZY = ("ale_py", "cryptography", "grpc", "lz4", "ray", "tensorboard", "imageio")
LAZY += ("torch", "numpy", "gymnasium", "tyro", "rich")


def part_of(module: str) -> str | None:
    """Returns the part that `module` belongs to; None for the package, which is above all."""
    names = module.split(".")[1:]
    if names[:2] == ["algorithms", "base"]:
        return "algorithms.base"
    return names[0] if names else None


def imports_of(tree: ast.Module) -> Iterator[str]:
    """Yields the full name of all that is imported absolutely, wherever the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            # `from headrace.algorithms import base` names a module too.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def form_faults(module: str, tree: ast.Module) -> Iterator[str]:
    """Yields every import that is relative, imports a star, or hides from the run."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield f"{module}: relative import, line {node.lineno}"
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            yield f"{module}: star import, line {node.lineno}"
        if "TYPE_CHECKING" in {getattr(node, field, None) for field in ("id", "attr", "name")}:
            yield f"{module}: TYPE_CHECKING; the type belongs one layer lower"


def layer_faults(module: str, tree: ast.Module) -> Iterator[str]:
    """Yields every import of our own that does not go down, or that maths may not have."""
    part = part_of(module)
    if part is None:
        return
    if part not in RANK:
        yield f"{module}: {part} is in no layer; add it to LAYERS"
        return
    for name in imports_of(tree):
        imported = part_of(name)
        # The version, and when the process began, are values that any part may read.
        if name.split(".")[0] != "headrace" or imported in {part, "__version__", "STARTED_S"}:
            continue
        if imported is None or imported not in RANK:
            yield f"{module}: imports {name}, which is in no layer"
        elif RANK[part] >= RANK[imported]:
            yield f"{module}: {part} imports {imported}, which is not below it"
        elif part in MATHS and imported not in MATHS_MAY_USE:
            yield f"{module}: maths imports {imported}"


def faults(module: str, source: str) -> list[str]:
    """Returns every breach of the import rules in one module, as sentences."""
    tree = ast.parse(source)
    return [*form_faults(module, tree), *layer_faults(module, tree)]


def modules() -> list[tuple[str, Path]]:
    """Returns the name and the file of every module of headrace."""
    named = []
    for path in sorted(SOURCE.rglob("*.py")):
        names = path.relative_to(SOURCE.parent).with_suffix("").parts
        named.append((".".join(names[:-1] if names[-1] == "__init__" else names), path))
    return named


def test_imports_go_down() -> None:
    named = modules()
    assert len(named) > 10, "the source was not found"
    assert [fault for name, path in named for fault in faults(name, path.read_text())] == []


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("headrace.ops.vtrace", "from headrace.algorithms.impala import Impala", "not below it"),
        ("headrace.ops.vtrace", "def f():\n    import headrace.networks.torsos", "not below it"),
        ("headrace.networks.models", "from headrace import run", "not below it"),
        ("headrace.pools.shm", "from headrace.experience import fifo", "not below it"),
        ("headrace.catalog", "from headrace.config import RunConfig", "not below it"),
        ("headrace.config", "from headrace.cli import main", "not below it"),
        ("headrace.transport.messages", "from headrace.pools import shm_layout", "not below it"),
        ("headrace.algorithms.base", "from headrace.algorithms import impala", "not below it"),
        (
            "headrace.algorithms.impala",
            "from headrace.envs.base import Family",
            "maths imports envs",
        ),
        ("headrace.networks.models", "import headrace.envs", "not below it"),
        ("headrace.cli", "import headrace", "in no layer"),
        ("headrace.run.local", "from headrace.utils import helper", "in no layer"),
        ("headrace.utils", "import torch", "add it to LAYERS"),
        ("headrace.cli", "from headrace.config import *", "star import"),
        ("headrace.run.local", "from .worker import run_worker", "relative import"),
        ("headrace.run.local", "from typing import TYPE_CHECKING", "one layer lower"),
        ("headrace.run.local", "import typing\nif typing.TYPE_CHECKING: pass", "one layer lower"),
    ],
)
def test_the_checker_can_fail(module: str, source: str, complaint: str) -> None:
    found = faults(module, source)
    assert found, "nothing was found"
    assert any(complaint in fault for fault in found), found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("headrace.algorithms.impala", "from headrace.algorithms.base import Algorithm"),
        ("headrace.algorithms.impala", "from headrace.ops import vtrace"),
        ("headrace.experience.unrolls", "from headrace.algorithms.base import ExperienceSpec"),
        (
            "headrace.pools.shm",
            "from headrace.envs.base import BatchEnv\nfrom headrace.pools import base",
        ),
        ("headrace.networks.models", "import torch\nfrom headrace.ops.losses import entropy"),
        ("headrace.learner.checkpoint", "from headrace import __version__"),
        ("headrace", "from headrace.cli import main"),
    ],
)
def test_the_checker_lets_good_imports_pass(module: str, source: str) -> None:
    assert faults(module, source) == []


ASKED = re.compile(r"\b(?:get|has)attr\(\s*(?:\w+\.)*_?(?:algorithm|rule)\s*,")
"""Looks for an attribute that a learning rule may have: all that one may say stands in its base."""


def test_nothing_looks_for_attributes_of_a_learning_rule() -> None:
    for line in ('getattr(rule, "x", None)', 'hasattr(self._algorithm, "x")'):
        assert ASKED.search(line)
    asking = [name for name, path in modules() if ASKED.search(path.read_text())]
    assert asking == []


@pytest.mark.parametrize(
    "code",
    [
        "import headrace",
        "from headrace import cli; cli.main(['--help'])",
        "from headrace import cli; cli.main(['--version'])",
        "from headrace import cli; cli.main(['trian'])",
    ],
)
def test_what_answers_at_once_loads_nothing_big(code: str) -> None:
    code = f"""
import sys
try:
    {code}
except SystemExit as ended:
    assert ended.code == 2, ended.code
print("loaded:", *[name for name in {LAZY!r} if name in sys.modules])
"""
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert loaded.stdout.splitlines()[-1] == "loaded:"
