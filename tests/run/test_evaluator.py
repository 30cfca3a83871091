"""The evaluator's loop: which versions it judges, on what, and when it stops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headrace import catalog
from headrace.config import RunConfig, from_dict
from headrace.errors import PeerLost
from headrace.pools import shm
from headrace.run import evaluator
from headrace.run.build import make_algorithm, make_model
from headrace.run.evaluate import evaluate
from headrace.run.evaluator import Patience, judge
from headrace.run.policy import Policy

ENDLESS = """
from headrace.envs.catch import Catch, CatchFamily
from headrace.envs.toys import NUMPY, ToyEnv

class InTheAir(Catch):
    def step(self, state, action):
        return super().step({**state, "ball_row": 0 * state["ball_row"]}, action)

class Endless(ToyEnv):
    closed = 0

    def close(self):
        Endless.closed += 1

class Family(CatchFamily):
    def spec(self, name, config):
        return super().spec("catch", config)

    def make(self, name, config, *, num_envs, batch_size, threads, seed, first_env=0):
        rules = InTheAir(NUMPY, truncate_after=0)
        return Endless(self.spec(name, config), rules, num_envs=num_envs, seed=seed)

FAMILY = Family()
"""


def a_policy(env: str = "catch", **settings: Any) -> Policy:
    config = from_dict({"env": env, "device": "cpu", "precision": "float32", **settings})
    spec = catalog.environment_family(env).spec(env, config.environment)
    cpu = torch.device("cpu")
    model = make_model(config, spec, cpu).requires_grad_(False)
    return Policy(config, make_algorithm(config, model, spec, torch.float32), spec, cpu)


class FakeFollower:
    """Weights of the versions given, one after the other; then the run is over."""

    def __init__(self, policy: Policy, versions: list[int]) -> None:
        self.policy = policy
        self.config: RunConfig = policy.config
        self.told: list[Mapping[str, Any]] = []
        self.rested_s: list[float] = []
        self.agent_steps = 0
        self._versions = versions

    def newest(self, timeout_s: float) -> int:
        if not self._versions:
            raise PeerLost("over")
        version = self._versions.pop(0)
        self.agent_steps = 100 * version
        return version

    def rest(self, seconds: float) -> None:
        if seconds:
            self.rested_s.append(seconds)

    def tell(self, message: Mapping[str, Any]) -> None:
        self.told.append(message)


def run_to_the_end(follower: Any) -> None:
    with pytest.raises(PeerLost):
        judge(follower)


def test_every_version_is_judged_once_by_full_episodes() -> None:
    follower = FakeFollower(a_policy(evaluator={"eval_episodes": 18}), [-1, 0, 0, 4, 4, 9])
    run_to_the_end(follower)
    found = [message["evaluation"] for message in follower.told]
    assert [(each["version"], each["agent_steps"]) for each in found] == [
        (0, 0),
        (4, 400),
        (9, 900),
    ]
    for each in found:
        assert each["lengths"] == [9] * 18, "a game of catch takes 9 steps"
        assert set(each["returns"]) == {-1.0, 1.0}
        assert each["seconds"] > 0
    # The policy is greedy and has not changed: other episodes are what makes the difference.
    assert found[0]["returns"] != found[1]["returns"]
    again = FakeFollower(follower.policy, [4])
    run_to_the_end(again)
    assert again.told[0]["evaluation"]["returns"] == found[1]["returns"]


def test_evaluations_start_an_interval_apart() -> None:
    follower = FakeFollower(a_policy(evaluator={"eval_interval_s": 5000.0}), [1, 2])
    run_to_the_end(follower)
    assert len(follower.rested_s) == 2
    assert all(4000 < seconds < 5000 for seconds in follower.rested_s)


@pytest.fixture
def endless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Any]:
    """Whose episodes never end; the class counts what was closed."""
    (tmp_path / "endless_env.py").write_text(ENDLESS)
    monkeypatch.syspath_prepend(str(tmp_path))
    kind: type[Any] = catalog.resolve("environment", {}, "endless_env:Endless")
    kind.closed = 0
    return kind


def test_an_evaluation_ends_with_the_run_however_long_an_episode_is(endless: type[Any]) -> None:
    class Leaving(FakeFollower):
        looks = 0

        def rest(self, seconds: float) -> None:
            self.looks += 1
            if self.looks == 40:
                raise PeerLost("over")

    follower = Leaving(a_policy("endless_env:FAMILY"), [1])
    run_to_the_end(follower)
    assert follower.looks == 40
    assert follower.told == []
    assert endless.closed == 1, "its environments are let go"


def test_no_process_is_started_for_an_evaluation_in_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a worker process")

    monkeypatch.setattr(shm, "ShmPool", refuse)
    policy = a_policy(pool="shm")
    with pytest.raises(AssertionError, match="worker process"):
        evaluate(policy, episodes=2)
    assert len(evaluate(policy, episodes=2, in_process=True).returns) == 2


def test_an_evaluation_that_drags_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock: Callable[[], float] = iter([599.0, 600.0, 601.0, 5000.0]).__next__
    monkeypatch.setattr(evaluator.time, "monotonic", clock)
    follower: Any = FakeFollower(a_policy(), [])
    patience = Patience(follower, 0.0)
    for told in (0, 1, 1, 1):
        patience.attend()
        assert len(follower.told) == told
    assert "10 minutes" in follower.told[0]["note"]


@pytest.mark.parametrize(("algorithm", "mode"), [("impala", "greedy"), ("r2d2", "epsilon")])
def test_agents_are_judged_as_their_algorithm_wants_it(algorithm: str, mode: str) -> None:
    chosen, epsilon = a_policy(algorithm=algorithm).judged_mode()
    assert chosen == mode
    assert (epsilon > 0) == (mode == "epsilon")


def test_what_attend_raises_ends_an_evaluation() -> None:
    calls = np.zeros(1, int)

    def attend() -> None:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        evaluate(a_policy(), episodes=1, attend=attend)
    assert calls[0] == 3
