"""Learning rules from outside: classes that derive from `headrace.Algorithm`, module:Class."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import headrace
from headrace import Algorithm, ConfigError, evaluate, load, train
from headrace.config import algorithm_class, from_dict
from headrace.run.validate import check

RULES = '''
from dataclasses import dataclass
from typing import NamedTuple
import torch
from torch import nn
import headrace
from headrace.algorithms.base import ExperienceSpec
from headrace.networks import Heads, register_heads
from headrace.records import PolicyStep, Update

class Said(NamedTuple):
    cost: torch.Tensor

class CostNet(nn.Module):
    """Heads that headrace does not know: what each action costs."""

    def __init__(self, torso, features, spec, config):
        super().__init__()
        self.torso, self.head = torso(), nn.Linear(features, spec.num_actions)

    def initial_state(self, batch):
        return ()

    def forward(self, inputs, recurrent):
        shape = inputs.observation.shape[:2]
        rows = self.torso(inputs.observation.flatten(0, 1))
        return Said(self.head(rows).unflatten(0, shape)), recurrent

register_heads("costs", Heads(CostNet, CostNet))

class Least(headrace.Algorithm):
    """Defines what must be, and nothing more."""

    heads = "costs"

    def __init__(self, model, config, *, spec, precision):
        super().__init__(model, ExperienceSpec(unroll_steps=4, batch_unrolls=2))
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def act(self, model, inputs, recurrent, *, mode, generator=None, epsilon=0.0):
        said, recurrent = model(inputs, recurrent)
        cost, action = said.cost[0].min(dim=-1)
        return PolicyStep(action, torch.zeros_like(cost), -cost), recurrent

    def update(self, batch, *, progress):
        said, _ = self.model(batch.inputs, batch.recurrent)
        cost = said.cost[:-1].gather(-1, batch.action.unsqueeze(-1)).squeeze(-1)
        loss = (cost + batch.reward).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return Update({"loss/total": loss.detach()}, torch.isfinite(loss.detach()))

    def state_dict(self):
        return {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state["optimizer"])

class Strange(Least):
    heads = "feet"

class Foreign:
    config_type = None

class Half(headrace.Algorithm):
    def act(self, *arguments, **more):
        raise NotImplementedError
'''


@pytest.fixture
def rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_rules.py").write_text(RULES)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "own_rules"


def a_config(out: Path, algorithm: str, **settings: Any) -> Any:
    values = {
        "env": "catch",
        "algorithm": algorithm,
        "out": str(out),
        "device": "cpu",
        "precision": "float32",
        "lockstep": True,
        "tensorboard": False,
        "total_frames": 400,
        "server": {"num_envs": 2},
        "network": {"hidden_sizes": [8], "network": "mlp"},
    }
    return from_dict({**values, **settings})


def test_what_an_own_rule_must_define_is_enough(rules: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = train(a_config(run, f"{rules}:Least"))
    assert result.finished
    assert result.metrics["updates"] > 40
    assert train(resume=run, trust_code=True, changes={"total_frames": 500}).finished
    policy = load(run, trust_code=True, device="cpu")
    assert evaluate(policy, episodes=3).returns.shape == (3,)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("Foreign", "is no headrace.Algorithm: let it be a class"),
        ("register_heads", "is no headrace.Algorithm"),
        ("Half", "does not define load_state_dict, state_dict, update"),
        ("Nothing", "cannot import the algorithm"),
    ],
)
def test_what_is_no_algorithm_is_refused_in_a_sentence(
    rules: str, name: str, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        algorithm_class(f"{rules}:{name}")


def test_the_command_ends_with_2(rules: str, tmp_path: Path) -> None:
    ended = subprocess.run(
        [
            *(sys.executable, "-c", "from headrace.cli import main; main()", "train", "catch"),
            *("--algorithm", f"{rules}:Foreign", "--out", "run"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 2
    assert "is no headrace.Algorithm" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_heads_are_looked_up_by_name(rules: str, tmp_path: Path) -> None:
    for settings, complaint in (
        ({"algorithm": f"{rules}:Strange"}, "no heads named 'feet'; known: action_value"),
        ({"algorithm": f"{rules}:Least", "network": {"heads": "duelling"}}, "needs heads costs"),
        ({"algorithm": "impala", "network": {"heads": "costs"}}, "leave out --heads"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            check(a_config(tmp_path / "run", **settings))
    networks: Any = headrace.networks  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="headrace's own"):
        networks.register_heads("duelling", networks.HEADS["duelling"])


def test_defaults_ask_for_nothing(rules: str, tmp_path: Path) -> None:
    rule: Callable[..., Algorithm] = algorithm_class(f"{rules}:Least")
    algorithm = rule(torch.nn.Linear(1, 1), None, spec=None, precision=torch.float32)
    assert not any((rule.on_policy, rule.averages_gradients, rule.compiles_whole))  # type: ignore[attr-defined]
    assert algorithm.exploration(3) is None
    epsilon = torch.tensor([0.5])
    assert algorithm.annealed(algorithm.model, epsilon) is epsilon
    with pytest.raises(ConfigError, match="Least has no two sides"):
        algorithm.place(torch.device("cpu"), torch.device("cpu"))
