"""What `import headrace` offers: the same to a program as to a type checker."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import headrace

STUB = Path(__file__).parents[1] / "src" / "headrace" / "__init__.pyi"


def stubbed() -> tuple[list[str], dict[str, str]]:
    """Returns `__all__` of the stub, and the module that it takes each imported name from."""
    offered, modules = [], {}
    for node in ast.parse(STUB.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            modules |= {alias.name: str(node.module) for alias in node.names}
        elif isinstance(node, ast.Assign):
            offered = ast.literal_eval(node.value)
    return offered, modules


def test_type_checkers_see_the_public_names() -> None:
    offered, modules = stubbed()
    assert sorted(offered) == sorted(headrace.__all__)
    assert {"__version__", *modules} == set(headrace.__all__)
    for name, module in modules.items():
        imported = getattr(headrace, name)
        assert imported.__module__ == module, "the stub names another place"
        assert imported.__name__ == name
    assert STUB.with_name("py.typed").is_file()


def test_the_names_are_listed_and_others_are_none() -> None:
    assert set(headrace.__all__) <= set(dir(headrace))
    with pytest.raises(AttributeError, match="module 'headrace' has no attribute 'trian'"):
        headrace.trian  # noqa: B018
    with pytest.raises(ImportError, match="trian"):
        from headrace import trian  # noqa: F401, PLC0415
