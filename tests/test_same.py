"""scripts/same: finds one bit, and never calls the same what did not run."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from headrace.commands.settings import first_pass, read_request
from headrace.run.validate import check

SCRIPT = Path(__file__).parents[1] / "scripts" / "same"


def script() -> Any:
    """The script as a module; it has no suffix by which Python would know it."""
    loader = SourceFileLoader("same", str(SCRIPT))
    spec = importlib.util.spec_from_loader("same", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module


same = script()


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "torso.weight": torch.randn(4, 3, generator=generator),
        "head.bias": torch.zeros(2, dtype=torch.float64),
        "total": torch.tensor(7.0),
    }


def a_run(run: Path, tensors: dict[str, Tensor], *, updates: int = 12, seed: int = 1) -> Path:
    for steps, content in (
        (500, {name: tensor + 1 for name, tensor in tensors.items()}),
        (1000, tensors),
    ):
        folder = run / "checkpoints" / f"agent_steps_{steps:012d}"
        folder.mkdir(parents=True)
        save_file(content, folder / "weights.safetensors")
        (folder / "meta.json").write_text(json.dumps({"counters": {"updates": updates}}))
    (run / "config.toml").write_text(f'out = "{run.name}"\nseed = {seed}\n[learning]\nsize = 2\n')
    return run


def flip(tensor: Tensor, bit: int) -> None:
    """Changes one bit, in place."""
    tensor.reshape(-1).view(torch.uint8)[bit // 8] ^= 1 << bit % 8


def test_equal_weights_are_the_same(tmp_path: Path) -> None:
    result = same.compared(a_run(tmp_path / "a", weights()), a_run(tmp_path / "b", weights()))
    assert result == ("same", "12 updates, 3 tensors")


@pytest.mark.parametrize("name", weights())
@pytest.mark.parametrize("bit", [0, 31])
def test_one_bit_is_found(tmp_path: Path, name: str, bit: int) -> None:
    changed = weights()
    flip(changed[name], bit)
    result = same.compared(a_run(tmp_path / "a", weights()), a_run(tmp_path / "b", changed))
    assert result.verdict == "DIFFERS"
    assert name in result.detail
    assert sum(other in result.detail for other in weights()) == 1


def test_a_sign_of_zero_and_a_nan_are_bits_too(tmp_path: Path) -> None:
    changed = weights()
    changed["head.bias"][1] = -0.0
    changed["total"] = torch.tensor(float("nan"))
    found = same.differences(weights(), changed)
    assert found == ["total by up to inf", "head.bias by up to 0"]
    assert same.differences(changed, changed) == []


def test_other_names_shapes_types_and_counts_differ(tmp_path: Path) -> None:
    changed = weights()
    changed["new"] = changed.pop("total")
    changed["torso.weight"] = changed["torso.weight"].T.contiguous()
    changed["head.bias"] = changed["head.bias"].float()
    before, after = a_run(tmp_path / "a", weights()), a_run(tmp_path / "b", changed, updates=13)
    result = same.compared(before, after)
    assert result == (
        "DIFFERS",
        "12 updates: 13 updates instead of 12, head.bias is of another shape or type, new only "
        "after, torso.weight is of another shape or type, total only before",
    )


def test_a_setting_that_was_not_taken_over_is_named(tmp_path: Path) -> None:
    changed = weights()
    flip(changed["total"], 3)
    before, after = a_run(tmp_path / "a", weights()), a_run(tmp_path / "b", changed, seed=2)
    assert same.compared(before, after).detail.endswith("(setting seed)")


def test_runs_without_an_update_or_a_checkpoint_are_no_comparison(tmp_path: Path) -> None:
    idle = [a_run(tmp_path / name, weights(), updates=0) for name in ("a", "b")]
    with pytest.raises(same.RunFailed, match="a: 0 updates"):
        same.compared(*idle)
    with pytest.raises(same.RunFailed, match="none: no checkpoint"):
        same.compared(a_run(tmp_path / "c", weights()), tmp_path / "none")


def test_a_run_that_fails_is_not_the_same(tmp_path: Path) -> None:
    src = tmp_path / "src"
    (src / "headrace").mkdir(parents=True)
    (src / "headrace" / "__init__.py").write_text("raise SystemExit('broken')")
    result = same.compared_run("impala-catch", src, src, tmp_path)
    assert result == ("FAILED", "impala-catch-base: exit code 1: broken")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "same: name the commit to compare with"),
        (["no-such-revision"], "same: no commit named 'no-such-revision'"),
        (["--all"], "same: unrecognized arguments: --all"),
        (["HEAD", "impala-chess"], "same: no run named 'impala-chess'; there are impala-catch, "),
    ],
)
def test_a_mistake_is_one_sentence(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        same.main(argv)
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(message)
    assert printed.err.count("\n") == 1


@pytest.mark.slow
def test_two_runs_of_one_commit_are_the_same() -> None:
    names = ["impala-catch", "r2d2-recall"]
    done = subprocess.run(
        [sys.executable, SCRIPT, "HEAD", *names], capture_output=True, text=True, check=False
    )
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [
        ["same", n] for n in names
    ], done.stdout + done.stderr
    assert done.returncode == 0


@pytest.mark.parametrize("name", list(same.RUNS))
def test_every_run_is_one_that_headrace_takes(name: str) -> None:
    chosen, rest = first_pass([*same.RUNS[name].split(), *same.COMMON])
    check(read_request(chosen, rest, prog="headrace train ENV", description="").config)
