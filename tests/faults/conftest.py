from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def worker_envs_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers get the sys.path of their parent."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "pools"))


@pytest.fixture
def make_proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Lends TCP proxies to HOST:PORT, which make the network bad: see `proxy.py`."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    made = []

    def proxy(target: str) -> Any:
        made.append(import_module("proxy").Proxy(target))
        return made[-1]

    yield proxy
    for each in made:
        each.close()
