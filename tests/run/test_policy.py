"""Trained agents: loading, playing, and whose code is imported."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from headrace import ConfigError, evaluate, load, train
from headrace.cli import main
from headrace.config import from_dict, merged
from headrace.learner import checkpoint
from headrace.presets import find
from headrace.run.film import film

# A module that leaves a mark as soon as it is imported.
STRANGER = """
    from pathlib import Path

    from headrace.algorithms.impala import Impala
    from headrace.envs.catch import CatchFamily
    from headrace.networks.models import mlp

    Path(__file__).with_name("imported").write_text("")

    class Family(CatchFamily):
        def spec(self, name, config):
            return super().spec("catch", config)

        def make(self, name, config, **settings):
            return super().make("catch", config, **settings)

    FAMILY = Family()
"""


def small(out: Path, env: str = "catch", **settings: object) -> Path:
    base = {
        "env": env,
        "out": str(out),
        "device": "cpu",
        "lockstep": True,
        "tensorboard": False,
        "total_frames": 600,
        "server": {"num_envs": 8},
        "learning": {"unroll_steps": 5, "batch_unrolls": 4},
    }
    preset = find(env).values if env in ("catch", "recall") else {}
    config = from_dict(merged(merged(preset, base), settings))
    return train(config).run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return small(tmp_path / "run")


def test_a_loaded_policy_has_the_weights_of_the_newest_checkpoint(run: Path) -> None:
    policy = load(run)
    saved, _ = checkpoint.newest_whole(run / "checkpoints")
    assert saved is not None
    assert policy.agent_steps == saved.meta["agent_steps"] >= 600
    model = policy.actor("greedy", 0.0).model
    assert isinstance(model, torch.nn.Module)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, saved.tensors["weights"][name])


def test_a_damaged_checkpoint_is_passed_over(run: Path) -> None:
    first = load(run).agent_steps
    train(resume=run, changes={"total_frames": 1200})
    second = load(run).agent_steps
    assert second > first
    (run / "checkpoints" / f"agent_steps_{second:012d}" / "weights.safetensors").write_bytes(b"x")
    assert load(run).agent_steps == first


def test_evaluation_plays_what_it_was_asked_for(run: Path) -> None:
    policy = load(run)
    result = evaluate(policy, episodes=37, seed=4)
    assert result.returns.shape == result.lengths.shape == (37,)
    assert set(result.returns.tolist()) <= {-1.0, 1.0}
    assert (result.lengths == 9).all()
    assert result.human_normalised is None
    again = evaluate(policy, episodes=37, seed=4)
    np.testing.assert_array_equal(result.returns, again.returns)
    summary = json.loads(json.dumps(result.summary()))
    assert summary["mean_return"] == pytest.approx(result.returns.mean())
    assert summary["episodes"] == 37


@pytest.mark.parametrize("mode", ["greedy", "sample", "epsilon"])
def test_every_mode_plays(run: Path, mode: str) -> None:
    result = evaluate(load(run), episodes=3, mode=mode, epsilon=0.5)  # type: ignore[arg-type]
    assert len(result.returns) == 3


def test_no_episodes_are_refused(run: Path) -> None:
    with pytest.raises(ConfigError, match="episodes must be at least 1"):
        evaluate(load(run), episodes=0)


def test_whole_episodes_are_judged_though_training_cuts_them(tmp_path: Path) -> None:
    run = small(tmp_path / "cut", environment={"truncate_after": 3})
    assert (evaluate(load(run), episodes=5).lengths == 9).all()


def test_a_film_is_made(run: Path, tmp_path: Path) -> None:
    assert film(load(run), tmp_path / "catch.mp4") in (-1.0, 1.0)
    assert (tmp_path / "catch.mp4").stat().st_size > 100


def test_a_recurrent_policy_is_loaded_and_played(tmp_path: Path) -> None:
    run = small(tmp_path / "recall", "recall", network={"lstm_size": 8})
    policy = load(run)
    assert len(policy.initial_state(3).recurrent) == 2
    assert len(evaluate(policy, episodes=4).returns) == 4


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none is not a run: it has no config\.toml"):
        load(tmp_path / "none")


def test_a_run_without_a_checkpoint_is_refused(run: Path) -> None:
    for path in (run / "checkpoints").glob("*/meta.json"):
        path.write_text("{")
    with pytest.raises(ConfigError, match=r"no whole checkpoint.*skipped the damaged"):
        load(run)
    with pytest.raises(ConfigError, match="no whole checkpoint to go on from"):
        train(resume=run, changes={"total_frames": 9000})


def test_weights_of_another_network_are_refused(run: Path) -> None:
    config = run / "config.toml"
    text = config.read_text().replace("lstm_size = 0", "lstm_size = 8")
    config.write_text(text)
    with pytest.raises(ConfigError, match="holds another network: core"):
        load(run)


NAMED = {
    "env": {"env": "stranger_of_{part}:FAMILY"},
    "network": {"network": {"network": "stranger_of_{part}:mlp"}},
    "algorithm": {"algorithm": "stranger_of_{part}:Impala"},
}


@pytest.fixture(params=["env", "network", "algorithm"])
def strange_run(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A run that somebody made elsewhere, whose config names a module that lies on the path."""
    part = request.param
    module = f"stranger_of_{part}"
    sys.modules.pop(module, None)  # of the test before
    (tmp_path / f"{module}.py").write_text(textwrap.dedent(STRANGER))
    monkeypatch.syspath_prepend(tmp_path)
    named = json.loads(json.dumps(NAMED[part]).replace("{part}", part))
    env = named.pop("env", "catch")
    run = small(tmp_path / "run", env, **named)
    assert (tmp_path / "imported").exists()
    (tmp_path / "imported").unlink()
    sys.modules.pop(module)
    return run


def loading(run: Path) -> None:
    load(run)


def resuming(run: Path) -> None:
    train(resume=run, changes={"total_frames": 5000}, trust_code=False)


@pytest.mark.parametrize("use", [loading, resuming])
def test_code_of_a_strangers_run_is_not_imported(
    strange_run: Path, use: Callable[[Path], None]
) -> None:
    with pytest.raises(ConfigError, match="is code outside headrace: read it, then say"):
        use(strange_run)
    assert not strange_run.with_name("imported").exists()


def test_code_of_a_strangers_run_is_imported_when_trusted(strange_run: Path) -> None:
    policy = load(strange_run, trust_code=True)
    assert strange_run.with_name("imported").exists()
    assert len(evaluate(policy, episodes=2).returns) == 2


@pytest.mark.parametrize("command", [["eval"], ["train", "--total-frames", "5000", "--resume"]])
def test_the_command_line_does_not_trust_either(
    strange_run: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, str(strange_run)])
    assert ended.value.code == 2
    assert "--trust-code" in capsys.readouterr().err
    assert not strange_run.with_name("imported").exists()


def test_the_command_line_trusts_when_told(strange_run: Path) -> None:
    main(["eval", str(strange_run), "--episodes", "2", "--trust-code"])
    assert strange_run.with_name("imported").exists()
