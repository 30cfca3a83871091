"""What code that is not ours changes of a process is put back, and is there again when it runs."""

from __future__ import annotations

import gc
import locale
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from headrace.apart import ASPECTS, Apart, known
from headrace.imports import import_named

CHANGES: dict[str, Callable[[], Any]] = {
    "folder": lambda: os.chdir("elsewhere"),
    "umask": lambda: os.umask(0o007),
    "variables": lambda: os.environ.update(CUDA_VISIBLE_DEVICES="-1"),
    "locale": lambda: locale.setlocale(locale.LC_ALL, "C.UTF-8"),
    "arguments": lambda: setattr(sys, "argv", ["other"]),
    "start method": lambda: torch.multiprocessing.set_start_method("spawn", force=True),
    "numpy errors": lambda: np.seterr(all="raise"),
    "numpy printing": lambda: np.set_printoptions(precision=1),
    "dtype": lambda: torch.set_default_dtype(torch.float64),
    "device": lambda: torch.set_default_device("meta"),
    "gradients": lambda: torch.set_grad_enabled(False),
    "anomalies": lambda: torch.autograd.set_detect_anomaly(True),
    "determinism": lambda: torch.use_deterministic_algorithms(True),
    "precision": lambda: torch.set_float32_matmul_precision("medium"),
    "threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "signals": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    "streams": lambda: setattr(sys, "stdout", None),
    "warnings": lambda: warnings.simplefilter("ignore"),
    "logging": lambda: logging.disable(logging.CRITICAL),
    "loggers": lambda: setattr(logging.getLogger("headrace"), "disabled", True),
    "cores": lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}),
    "garbage": gc.disable,
}


@pytest.fixture(autouse=True)
def _as_before(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of its own; and whatever a failing test leaves goes."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with Apart():
        yield


def differs(name: str, before: Any) -> bool:
    return bool(ASPECTS[name].read() != before)


def test_every_aspect_is_tried() -> None:
    assert CHANGES.keys() == ASPECTS.keys()


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_put_back_and_holds_again(name: str) -> None:
    read = ASPECTS[name].read
    before = read()
    if name == "cores" and len(before) == 1:
        pytest.skip("there is but one")
    apart = Apart()
    with apart:
        CHANGES[name]()
        changed = read()
        assert changed != before
    assert read() == before
    for block in (apart, apart.light):
        with block:
            assert read() == (changed if ASPECTS[name].again else before)
        assert read() == before


@pytest.mark.parametrize("name", ["dtype", "gradients", "threads", "device"])
def test_what_breaks_training_is_looked_at_in_every_step(name: str) -> None:
    before = ASPECTS[name].read()
    apart = Apart()
    with apart.light:
        CHANGES[name]()
    assert ASPECTS[name].read() == before
    with apart.light:
        assert differs(name, before) == ASPECTS[name].again


def test_a_change_is_forgotten_where_it_is_to_be() -> None:
    apart = Apart(keeps=False)
    for block in (apart, apart.light):
        with block:
            assert torch.is_grad_enabled()
            torch.set_grad_enabled(False)
        assert torch.is_grad_enabled()


def test_a_change_that_is_taken_back_is_forgotten() -> None:
    apart = Apart()
    with apart:
        torch.set_default_dtype(torch.float64)
    with apart.light:
        torch.set_default_dtype(torch.float32)
    with apart.light:
        assert torch.get_default_dtype() == torch.float32


def test_a_failure_is_put_back_too() -> None:
    def fails() -> None:
        with Apart():
            torch.set_grad_enabled(False)
            raise ValueError("lost a wheel")

    with pytest.raises(ValueError, match="lost"):
        fails()
    assert torch.is_grad_enabled()


def test_others_are_left_alone() -> None:
    """Two that are apart do not see each other, and what we change ourselves stays."""
    one, two = Apart(), Apart()
    with one:
        torch.set_default_dtype(torch.float64)
    with two:
        assert torch.get_default_dtype() == torch.float32
    torch.set_grad_enabled(False)
    with one.light:
        assert torch.get_default_dtype() == torch.float64
        assert not torch.is_grad_enabled()
    assert not torch.is_grad_enabled()


def test_what_code_may_need_later_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    with Apart():
        os.environ["MUJOCO_GL"] = "egl"
        sys.path.append("assets")
    assert os.environ["MUJOCO_GL"] == "egl"
    assert "assets" in sys.path


def test_our_code_finds_torch_as_it_is_imported() -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_grad_enabled(False)
    np.seterr(all="raise")
    with known():
        assert torch.zeros(1).dtype == torch.float32
        assert torch.zeros(1).device.type == "cpu"
        assert torch.is_grad_enabled()
        assert np.geterr()["over"] == "warn"
    assert torch.zeros(1).dtype == torch.float64
    assert torch.zeros(1).device.type == "meta"
    assert not torch.is_grad_enabled()
    assert np.geterr()["over"] == "raise"


def test_a_module_changes_nothing_when_it_is_imported(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "changes_on_import.py").write_text(
        "import os, torch\nos.chdir('elsewhere')\ntorch.set_default_dtype(torch.float64)\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    import_named("changes_on_import")
    assert os.getcwd() == str(tmp_path)
    assert torch.get_default_dtype() == torch.float32
