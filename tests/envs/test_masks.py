"""Action masks wherever environments put them, and what is refused as no mask."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from headrace.envs.gymnasium_batch import GymnasiumBatch
from headrace.errors import ConfigError, EnvironmentFault
from headrace.steps import EnvStep

ACTIONS = 3


class Masked(gym.Env[Any, Any]):
    """Allows another action after every step; an episode has four."""

    def __init__(self, where: str, mask: Any = None, *, at_end: str = "as ever") -> None:
        self.where, self.given, self.at_end = where, mask, at_end
        self.action_space = gym.spaces.Discrete(ACTIONS)
        box: gym.Space[Any] = gym.spaces.Box(0.0, 9.0, (1,), np.float32)
        if where == "observation":
            flags = gym.spaces.Box(0, 1, (ACTIONS,), np.int8)
            box = gym.spaces.Dict({"place": box, "action_mask": flags})
        self.observation_space = box
        if where == "method":
            self.action_masks = self.mask

    def mask(self) -> Any:
        if self.given is not None:
            return self.given
        if self.steps == 2 and self.at_end == "nothing":
            return np.zeros(ACTIONS, np.int8)
        if self.steps == 2 and self.at_end == "raises":
            raise RuntimeError("the game is over")
        return (np.arange(ACTIONS) == (self.start + self.steps) % ACTIONS).astype(np.int8)

    def shown(self) -> Any:
        place = np.float32([self.steps])
        if self.where == "observation":
            return {"place": place, "action_mask": self.mask()}
        return place

    def info(self, *, reset: bool) -> dict[str, Any]:
        puts = self.where == "info" or (self.where == "step" and not reset)
        puts &= not (self.at_end == "silent" and self.steps == 2)
        return {"action_mask": self.mask()} if puts else {}

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.steps, self.start = 0, int(self.np_random.integers(ACTIONS))
        return self.shown(), self.info(reset=True)

    def step(self, action: Any) -> Any:
        assert action == (self.start + self.steps) % ACTIONS, "forbidden"
        self.steps += 1
        return self.shown(), 0.0, self.steps == 4, False, self.info(reset=False)


def batch_of(where: str, mask: Any = None) -> GymnasiumBatch:
    envs = [gym.wrappers.TimeLimit(Masked(where, mask), 100) for _ in range(3)]
    return GymnasiumBatch(envs, name="masked", seed=1)


@pytest.mark.parametrize("where", ["info", "observation", "method"])
def test_a_mask_is_obeyed_wherever_it_is(where: str) -> None:
    batch = batch_of(where)
    assert batch.spec.has_action_mask
    step = batch.reset()
    ends = 0
    for _ in range(20):
        assert step.action_mask is not None
        assert (step.action_mask.sum(axis=1) == 1).all()
        step = batch.step(step.env_id, step.action_mask.argmax(axis=1))
        ends += int(step.terminated.sum())
    assert ends == 15


def test_a_mask_that_comes_in_step_alone_is_too_late() -> None:
    batch = batch_of("step")
    first = batch.reset()
    allowed = np.array([env.unwrapped.start for env in batch._envs])
    with pytest.raises(EnvironmentFault, match="step has an action_mask in its info, and reset"):
        batch.step(first.env_id, allowed)


@pytest.mark.parametrize("where", ["info", "observation", "method"])
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.array([0.0, -1e9, 0.0], np.float32), "give mask > -1"),
        (np.array([1.0, 0.5, 0.0], np.float32), "must be 1 where an action is allowed, else 0"),
        (np.array([1.0, np.nan, 0.0], np.float32), "must be 1 where an action is allowed"),
        (np.array([1, -1, 0]), "must be 1 where an action is allowed"),
        (np.array([0, 0, 0]), "allows no action"),
        (np.array([False, False, False]), "allows no action"),
        (np.array([1, 1]), "must have 3 flags"),
        ("abc", "must have 3 flags"),
    ],
)
def test_what_is_no_mask_is_refused(where: str, mask: Any, message: str) -> None:
    if where == "observation":  # whose space may say more
        message = "action_mask"
    with pytest.raises(EnvironmentFault, match=message):
        batch_of(where, mask).reset()


@pytest.mark.parametrize("dtype", [np.bool_, np.int8, np.float32, np.uint8])
def test_zeros_and_ones_of_any_kind_are_one(dtype: Any) -> None:
    step = batch_of("info", np.array([1, 0, 1], dtype)).reset()
    assert step.action_mask is not None
    assert step.action_mask.tolist() == [[True, False, True]] * 3


def played(batch: GymnasiumBatch, steps: int) -> Iterator[EnvStep]:
    """Plays what is allowed."""
    step = batch.reset()
    yield step
    for _ in range(steps):
        assert step.action_mask is not None
        step = batch.step(step.env_id, step.action_mask.argmax(axis=1))
        yield step


@pytest.mark.parametrize("where", ["info", "observation", "method"])
def test_the_final_observation_of_a_cut_episode_has_its_own_mask(where: str) -> None:
    envs = [Masked(where) for _ in range(4)]
    cut = [gym.wrappers.TimeLimit(env, 2) for env in envs]
    batch = GymnasiumBatch(cut, name="masked", seed=1)
    others, begun = 0, np.zeros(4, np.int64)
    for step in played(batch, 12):
        before, begun = begun, np.array([env.start for env in envs])
        if not step.truncated.any():
            continue
        assert step.truncated.all()
        assert step.final_action_mask is not None
        assert step.action_mask is not None
        final = (before + 2) % ACTIONS
        assert step.final_action_mask.sum(axis=1).tolist() == [1] * 4
        assert step.final_action_mask.argmax(axis=1).tolist() == final.tolist()
        assert step.action_mask.argmax(axis=1).tolist() == begun.tolist(), "of the next episode"
        others += int((final != begun).sum())
    assert others > 5


@pytest.mark.parametrize(
    ("where", "at_end"),
    [("info", "silent"), ("info", "nothing"), ("observation", "nothing"), ("method", "raises")],
)
def test_a_cut_episode_without_a_mask_at_its_end_allows_everything_and_says_so(
    where: str, at_end: str
) -> None:
    envs = [gym.wrappers.TimeLimit(Masked(where, at_end=at_end), 2)]
    batch = GymnasiumBatch(envs, name="masked", seed=1)
    for step in played(batch, 6):
        if step.truncated.any():
            assert step.final_action_mask is not None
            assert step.final_action_mask.all()
    assert len([notice for notice in batch.notices if "every action counts" in notice]) == 1


def test_nobody_asks_for_a_mask_where_the_episode_is_over() -> None:
    class Over(Masked):
        def mask(self) -> Any:
            assert self.steps < 4, "the game is over"
            return super().mask()

    batch = GymnasiumBatch([Over("method") for _ in range(2)], name="masked", seed=1)
    assert sum(int(step.terminated.sum()) for step in played(batch, 8)) == 4


def test_a_mask_and_repeated_actions_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match="leave out --frame-skip"):
        GymnasiumBatch([Masked("info")], name="masked", seed=1, action_repeat=2)


def test_masks_that_are_no_method_are_refused() -> None:
    class Listed(Masked):
        action_masks = np.ones(ACTIONS, np.bool_)

    with pytest.raises(EnvironmentFault, match="make it a method"):
        GymnasiumBatch([Listed("nowhere")], name="masked", seed=1)
