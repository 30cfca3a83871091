"""How a module that the user names is found: as Python finds all, or else in this folder."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from types import ModuleType


def import_named(name: str) -> ModuleType:
    """Imports a module that the user named, or code that is trusted.

    Before there is one that only this folder has, nothing is looked for here: who types `headrace
    eval .` in the folder of a stranger's run would run what lies there under the name of a module
    that Python has, or lacks. From then on this folder comes last of all, for what that module
    imports.
    """
    top = name.partition(".")[0]
    if top not in sys.modules:
        found = importlib.util.find_spec(top)
        # Without an origin it is a bare folder of that name somewhere, which hides nothing.
        if (found is None or found.origin is None) and os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
    return importlib.import_module(name)
