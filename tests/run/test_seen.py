"""Runs on pictures and integers of every kind: what is said of them, refused, and kept."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import headrace
from headrace.cli import main
from headrace.networks.torsos import ConvTorso, MlpTorso

ENVIRONMENTS = '''
import gymnasium as gym
import numpy as np

Box = gym.spaces.Box


class Shows(gym.Env):
    """Random observations of a space, perhaps made into something else."""

    action_space = gym.spaces.Discrete(2)

    def __init__(self, space, then=None):
        self.observation_space, self.then = space, then

    def _show(self):
        self.observation_space.seed(int(self.np_random.integers(1 << 30)))
        shown = self.observation_space.sample()
        return shown if self.then is None else self.then(shown)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._show(), {}

    def step(self, action):
        self.steps += 1
        return self._show(), 0.0, self.steps == 5, False, {}


def first():
    return Shows(Box(0, 255, (3, 40, 36), np.uint8))


def stacked():
    return gym.wrappers.FrameStackObservation(Shows(Box(0, 255, (40, 36, 3), np.uint8)), 4)


def floats():
    return Shows(Box(0, 1, (36, 40, 3), np.float32))


def small():
    return Shows(Box(0, 255, (24, 24, 3), np.uint8))


def tiny():
    return Shows(Box(0, 255, (5, 5, 3), np.uint8))


def unbounded():
    return Shows(Box(-2, 2, (3, 40, 36), np.float32))


def depth():
    return Shows(Box(0, 65535, (36, 40), np.uint16))


def parts():
    camera = Box(0, 255, (3, 40, 36), np.uint8)
    return Shows(gym.spaces.Dict(camera=camera, x=Box(-1, 1, (2,), np.float32)))


def scaled():
    return Shows(Box(0, 255, (40, 36), np.uint8), lambda shown: shown / 255)
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"seen_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(ENVIRONMENTS, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def trained(env: str, out: Path, **network: Any) -> tuple[headrace.Policy, str]:
    """Trains for a moment; returns the policy, and what was logged."""
    config = headrace.make_config(
        env,
        total_frames=160,
        num_envs=4,
        unroll_steps=5,
        batch_unrolls=4,
        device="cpu",
        lockstep=True,
        tensorboard=False,
        out=str(out),
        network=network,
    )
    headrace.train(config)
    return headrace.load(out, trust_code=True), (out / "log.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("first", "observation (3, 40, 36) uint8, channels first → impala_shallow, "),
        ("stacked", "observation (4, 40, 36, 3) uint8, channels last, a stack of 4 → impala_sh"),
        ("floats", "observation (36, 40, 3) float32, channels last → impala_shallow, "),
        ("depth", "observation (36, 40) uint16 → structured"),
        ("parts", "observation of 2 parts, picture camera (3, 40, 36) channels first → structured"),
    ],
)
def test_pictures_get_convolutions_and_settings_for_images(
    name: str, line: str, module: str, tmp_path: Path
) -> None:
    policy, said = trained(f"{module}:{name}", tmp_path / "run")
    assert line in said
    assert "settings: images" in said
    assert "row of numbers" not in said
    model: Any = policy._algorithm.model
    assert sum(isinstance(part, ConvTorso) for part in model.modules()) == 1
    observation, _ = policy.make_env(1).reset()
    policy.act(observation, policy.initial_state(1))


def test_a_picture_that_goes_through_an_mlp_is_said_and_the_fix_works(
    module: str, tmp_path: Path
) -> None:
    policy, said = trained(f"{module}:small", tmp_path / "run")
    model: Any = policy._algorithm.model
    assert isinstance(model.torso, MlpTorso)
    assert "(24, 24, 3) is given to the network as a row of numbers" in said
    other = said.split("to convolve it, say --network ")[1].split()[0]
    policy, said = trained(f"{module}:small", tmp_path / "other", network=other)
    model = policy._algorithm.model
    assert isinstance(model.torso, ConvTorso)
    assert "row of numbers" not in said
    _, said = trained(f"{module}:unbounded", tmp_path / "unbounded")
    assert "(3, 40, 36) is given to the network as a row of numbers: if it is a picture" in said
    _, said = trained(f"{module}:tiny", tmp_path / "tiny")
    assert "row of numbers" not in said, "nothing could convolve it"


def test_floats_under_bytes_are_refused_before_anything_starts(
    module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{':'.join(path for path in sys.path if path)}")
    with pytest.raises(SystemExit) as end:
        main(["train", f"{module}:scaled", "--out", str(tmp_path / "run"), "--device", "cpu"])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "reset returned an observation of float64 with 0." in said
    assert "which the uint8 of its space cannot hold: return uint8, or declare a Box of" in said


def test_a_policy_refuses_numbers_that_its_observations_cannot_hold(
    module: str, tmp_path: Path
) -> None:
    policy, _ = trained(f"{module}:first", tmp_path / "first")
    shown = np.full((3, 40, 36), 128.0)
    state = policy.initial_state(1)
    policy.act(shown, state)
    for wrong in (shown / 255, shown * 2, -shown):
        with pytest.raises(ValueError, match="is of uint8, which cannot hold"):
            policy.act(wrong, state)
    policy, _ = trained(f"{module}:parts", tmp_path / "parts")
    state = policy.initial_state(1)
    policy.act({"camera": shown, "x": [0.5, 0.5]}, state)
    with pytest.raises(ValueError, match=r"part 'camera' .* is of uint8, which cannot hold 0\.5"):
        policy.act({"camera": shown / 256, "x": [0.5, 0.5]}, state)


def test_a_run_from_before_sees_as_it_did(module: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    policy, said = trained(f"{module}:parts", run, pictures="bytes")
    assert "observation of 2 parts → structured" in said
    path = run / "config.toml"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith("pictures = ")]
    assert len(kept) == len(lines) - 1
    path.write_text("".join(kept), encoding="utf-8")
    again = headrace.load(run, trust_code=True)
    assert again.config == policy.config
    result = headrace.train(resume=run, changes={"total_frames": 240}, trust_code=True)
    assert result.metrics["env_frames"] >= 240
