"""Environments that draw from global random states: the same whoever else draws, and wherever."""

# ruff: noqa: NPY002 - the global state of numpy is meant
from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from headrace.envs.gymnasium import GYMNASIUM
from headrace.envs.gymnasium_batch import GymnasiumBatch
from headrace.envs.wrappers import GymnasiumConfig
from headrace.pools.settings import WorkerConfig
from headrace.pools.shm import ShmPool, WorkerEnvs
from headrace.run.worker import own_draws_of

COPIES = 6
NAME = f"{__name__}:Gambler"
DRAWS: dict[str, Callable[[Any], float]] = {
    "random": lambda _: random.random(),
    "random, sometimes": lambda env: random.random() if env.steps % 3 == 0 else 0.5,
    "gauss": lambda _: random.gauss(0.0, 1.0),
    "numpy": lambda _: np.random.random(),
    "numpy normal": lambda _: np.random.randn(),
    "torch": lambda _: float(torch.rand(())),
    "a space": lambda env: float(env.observation_space.sample()[0]),
    "seeds itself": lambda env: (random.seed(env.steps), random.random())[1] + np.random.random(),
}


class Gambler(gym.Env[Any, Any]):
    """Shows a draw of when it was made, then one of each reset and step."""

    observation_space = gym.spaces.Box(-9.0, 9.0, (2,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, what: str) -> None:
        self.draw, self.steps = DRAWS[what], 0
        self.made = 0.0 if what == "a space" else self.draw(self)  # there is none before

    def shown(self) -> Any:
        return np.array([self.made, self.draw(self)], np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.steps = 0
        return self.shown(), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        return self.shown(), 0.0, self.steps == 4, False, {}


def make(what: str, *, first_env: int = 0, num_envs: int = COPIES, seed: int = 1) -> GymnasiumBatch:
    config = GymnasiumConfig(env_kwargs=f'{{"what": "{what}"}}')
    sizes = {"num_envs": num_envs, "batch_size": num_envs, "first_env": first_env}
    return GYMNASIUM.make(NAME, config, **sizes, threads=1, seed=3, draws_seed=seed)


def play(batch: GymnasiumBatch, others: Callable[[], Any] = lambda: None) -> np.ndarray:
    """Returns what copies show, [copies, rows, 2]."""
    shown = [batch.reset().observation]
    every = np.arange(batch.num_envs, dtype=np.int32)
    for _ in range(10):
        others()
        shown.append(batch.step(every, np.zeros(len(every), np.int64)).observation)
    batch.close()
    return np.stack(shown, axis=1)


def draw_of_all() -> list[Any]:
    return [random.random(), np.random.random(), torch.rand(()), random.gauss(0.0, 1.0)]


@pytest.mark.parametrize("what", DRAWS)
def test_two_runs_are_equal_whoever_else_draws(what: str) -> None:
    looks = play(make(what))
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    np.testing.assert_array_equal(play(make(what), draw_of_all), looks)
    if what != "seeds itself":
        assert (play(make(what, seed=2)) != looks).any()
        assert len(set(looks[:, -1, 1])) == COPIES or what == "random, sometimes"


@pytest.mark.parametrize("what", DRAWS)
@pytest.mark.parametrize("cuts", [(2, 6), (1, 3, 6)])
def test_copies_are_the_same_in_other_company(what: str, cuts: tuple[int, ...]) -> None:
    looks = play(make(what))
    first = 0
    for end in cuts:
        part = play(make(what, first_env=first, num_envs=end - first))
        np.testing.assert_array_equal(part, looks[first:end])
        first = end


@pytest.mark.parametrize("what", DRAWS)
def test_nobody_else_notices(what: str) -> None:
    def after(play_too: bool) -> list[Any]:
        random.seed(5)
        np.random.seed(5)
        torch.manual_seed(5)
        drawn = draw_of_all()
        if play_too:
            play(make(what), lambda: drawn.extend(draw_of_all()))
        else:
            for _ in range(10):
                drawn.extend(draw_of_all())
        return [float(number) for number in (*drawn, *draw_of_all())]

    assert after(True) == after(False)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_copies_are_the_same_in_worker_processes(
    workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, "."])  # where workers find this module
    what = "random, sometimes"
    settings = GymnasiumConfig(env_kwargs=f'{{"what": "{what}"}}')
    batch = make(what, seed=seed_of(7))
    recipe = WorkerEnvs(
        env=NAME,
        settings={name: getattr(settings, name) for name in settings.__dataclass_fields__},
        spec=batch.spec,
        num_envs=COPIES,
        seed=7,
        draws_apart=True,
    )
    pool = ShmPool(
        recipe,
        batch_size=COPIES,
        workers=WorkerConfig(num_workers=workers),
        full_batches=True,
    )
    try:
        shown = []
        for _ in range(11):
            step = pool.receive(60.0)
            assert step is not None
            assert step.env_id.tolist() == list(range(COPIES))
            shown.append(step.observation.copy())
            pool.reply(np.zeros(COPIES, np.int64))
    finally:
        pool.close()
    np.testing.assert_array_equal(np.stack(shown, axis=1), play(batch))


def seed_of(seed: int) -> int:
    """The seed of the draws in a pool of that seed."""
    return own_draws_of(seed)["draws_seed"]


def test_a_normal_number_that_python_holds_back_is_given_once() -> None:
    for looks in play(make("gauss")):
        drawn = looks[:, 1].tolist()
        assert len(set(drawn)) == len(drawn)
