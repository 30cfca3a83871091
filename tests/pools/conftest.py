from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def worker_envs_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers get the sys.path of their parent."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
