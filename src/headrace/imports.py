"""How a module that the user names is found: as Python finds all, or else in this folder."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from types import ModuleType

from headrace.apart import Apart


def import_named(name: str) -> ModuleType:
    """Imports a module that the user named, or code that is trusted.

    This folder goes onto sys.path only when a named module is found nowhere else, and then last.
    Otherwise `headrace eval .` in a stranger's run would import that run's files.
    """
    top = name.partition(".")[0]
    if top not in sys.modules:
        found = importlib.util.find_spec(top)
        # Without an origin it is a bare folder of that name somewhere, which hides nothing.
        if (found is None or found.origin is None) and os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
    if name in sys.modules or top == __package__:
        return importlib.import_module(name)
    with Apart():
        return importlib.import_module(name)


def has_no(module: ModuleType, attribute: str) -> str:
    """Says that a module lacks what the user named, and which it is: they may mean another."""
    origin = module.__spec__.origin if module.__spec__ else None
    return (
        f"{module.__name__} has no {attribute!r}: it is {origin or 'a bare folder'}, and one in "
        "this folder is looked for last: if you mean that, rename it"
    )
