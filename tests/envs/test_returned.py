"""What environments return is kept as it was returned, whatever they do to it later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from headrace.envs.gymnasium_batch import GymnasiumBatch
from headrace.envs.returned import Sharing, kept
from headrace.envs.wrappers import ActionRepeat

COPIES = 3
ONE = np.zeros(3)
BOX = gym.spaces.Box(-1e6, 1e6, (2,), np.float32)
SPACES: dict[str, gym.Space[Any]] = {
    "array": BOX,
    "float64": gym.spaces.Box(-1e6, 1e6, (2,), np.float64),
    "view": BOX,
    "list": BOX,
    "dict": gym.spaces.Dict({"a": BOX, "b": gym.spaces.Tuple((BOX, gym.spaces.Discrete(4)))}),
}


class Hoarder(gym.Env[Any, Any]):
    """Writes all that it returns into what belongs to its class: the number of copy and step.

    `where` says how its observations are made, `masks` how it says which action is allowed.
    """

    ours: dict[str, Any]
    action_space = gym.spaces.Discrete(3)

    def __init__(self, number: int, where: str, masks: str, ours: dict[str, Any]) -> None:
        self.number, self.where, self.ours = number, where, ours
        self.masks, self.steps = masks, 0
        self.observation_space = SPACES[where]
        if masks == "observation":
            flags = gym.spaces.MultiBinary(3)
            self.observation_space = gym.spaces.Dict({"x": SPACES[where], "action_mask": flags})
        if masks == "method":
            self.action_masks = lambda: self.ours["mask"]

    def shown(self) -> Any:
        self.ours["mask"][:] = np.arange(3) == (self.number + self.steps) % 3
        self.ours["info"]["steps"] = 10 * self.number + self.steps
        self.ours["array"][:] = self.number, self.steps
        self.ours["list"][:] = self.number, self.steps
        self.ours["float64"][:] = self.number, self.steps
        self.ours["dict"].update(a=self.ours["array"], b=[self.ours["array"][::-1], self.number])
        shown = self.ours["array"][:] if self.where == "view" else self.ours[self.where]
        return (
            {"x": shown, "action_mask": self.ours["mask"]} if self.masks == "observation" else shown
        )

    def told(self) -> dict[str, Any]:
        if self.masks == "info":
            self.ours["info"]["action_mask"] = self.ours["mask"]
        return self.ours["info"]

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.steps = 0
        return self.shown(), self.told()

    def step(self, action: Any) -> Any:
        self.steps += 1
        self.ours["reward"][...] = 100 * self.number + self.steps
        self.ours["ends"][...] = self.steps == 3 + self.number
        return self.shown(), self.ours["reward"], self.ours["ends"], False, self.told()


def hoarders(where: str, masks: str = "") -> GymnasiumBatch:
    ours: dict[str, Any] = {
        "array": np.zeros(2, np.float32),
        "float64": np.zeros(2),
        "list": [0, 0],
        "dict": {},
        "mask": np.zeros(3, np.int8),
        "info": {},
        "reward": np.zeros(()),
        "ends": np.zeros((), np.bool_),
    }
    envs = [Hoarder(number, where, masks, ours) for number in range(COPIES)]
    return GymnasiumBatch(envs, name="Hoarder-v0", seed=0)


@pytest.mark.parametrize("masks", ["", "info", "observation", "method"])
@pytest.mark.parametrize("where", SPACES)
def test_copies_that_share_their_arrays_do_not_get_each_others_values(
    where: str, masks: str
) -> None:
    batch = hoarders(where, masks)
    every = np.arange(COPIES, dtype=np.int32)
    first = batch.reset()
    steps = np.zeros(COPIES, int)

    def expect(rows: np.ndarray, steps: np.ndarray) -> None:
        flat = rows.reshape(COPIES, -1)
        if where == "dict" or masks == "observation":
            flat = rows.view(np.float32) if masks != "observation" else rows[:, 8:].view(np.float32)
        np.testing.assert_array_equal(flat[:, 0], every)
        np.testing.assert_array_equal(flat[:, 1], steps)

    expect(first.observation, steps)
    for _ in range(100):  # longer than copies are watched
        step = batch.step(every, np.zeros(COPIES, np.int64))
        steps += 1
        np.testing.assert_array_equal(step.reward, 100 * every + steps)
        ended = steps == 3 + every
        np.testing.assert_array_equal(step.terminated, ended)
        if ended.any():
            assert step.final_observation is not None
            assert step.episode_info is not None
            expect(np.where(ended[:, None], step.final_observation, step.observation), steps)
            told = {row: step.episode_info[row]["steps"] for row in np.flatnonzero(ended)}
            assert told == {row: 10 * row + steps[row] for row in np.flatnonzero(ended)}
        steps[ended] = 0
        expect(step.observation, steps)
        if masks:
            assert step.action_mask is not None
            np.testing.assert_array_equal(np.argmax(step.action_mask, axis=1), (every + steps) % 3)
            assert step.action_mask.sum() == COPIES


def test_copies_that_share_nothing_are_soon_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(gym.Env[Any, Any]):
        observation_space, action_space = BOX, gym.spaces.Discrete(2)

        def __init__(self) -> None:
            self.shown = np.zeros(2, np.float32)

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            return self.shown, {}

        def step(self, action: Any) -> Any:
            return self.shown, 0.0, False, False, {}

    copied: list[Any] = []
    monkeypatch.setattr(
        "headrace.envs.gymnasium_batch.kept", lambda value: (copied.append(value), kept(value))[1]
    )
    batch = GymnasiumBatch([Own(), Own()], name="Own-v0", seed=0)
    batch.reset()
    for _ in range(200):
        batch.step(np.arange(2, dtype=np.int32), np.zeros(2, np.int64))
    assert 2 * 30 < len(copied) < 2 * 100


@pytest.mark.parametrize(
    ("results", "share"),
    [
        (lambda: [np.zeros(3), np.zeros(3)], False),
        (lambda: np.zeros((2, 3)), False),  # rows of one array
        (lambda: [np.zeros((0, 2))] * 2, False),
        (lambda: [(1.0, "a", None, True)] * 2, False),
        (lambda: [({}, [], ())] * 2, False),  # nothing is in them
        (lambda: [np.zeros(3)] * 2, True),
        (lambda: [ONE[:2], ONE[1:]], True),
        (lambda: [ONE[::-1], ONE[::2]], True),
        (lambda: [{"x": (ONE, 1)}, {"x": (ONE, 1)}], True),
        (lambda: [[1, 2]] * 2, True),
        (lambda: [{"x": 1}] * 2, True),
        (lambda: [(ONE, ONE), (ONE.copy(), 1)], False),  # with itself
    ],
)
def test_what_is_shared_is_seen(results: Callable[[], Any], share: bool) -> None:
    sharing = Sharing()
    for _ in range(1000):
        sharing.watch(results())
    assert sharing.possible == share


def test_one_copy_says_nothing_of_several() -> None:
    sharing = Sharing()
    for _ in range(1000):
        sharing.watch([np.zeros(3)])
    assert sharing.possible


def test_tensors_are_arrays_too() -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.zeros(2)
    value = kept({"x": [tensor]})
    tensor += 1
    np.testing.assert_array_equal(value["x"][0], [0, 0])
    sharing = Sharing()
    for _ in range(1000):
        sharing.watch([tensor, tensor[:1]])
    assert sharing.possible


@pytest.mark.parametrize("shape", [(), (1,)])
def test_repeated_rewards_in_one_array_add_up(shape: tuple[int, ...]) -> None:
    class Reusing(gym.Env[Any, Any]):
        observation_space, action_space = BOX, gym.spaces.Discrete(2)
        reward = np.zeros(shape)

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            return np.zeros(2, np.float32), {}

        def step(self, action: Any) -> Any:
            self.reward += 1.0
            return np.zeros(2, np.float32), self.reward, False, False, {}

    env = ActionRepeat(Reusing(), 3)
    env.reset()
    assert np.ravel(env.step(0)[1]).tolist() == [1.0 + 2.0 + 3.0]
    assert np.ravel(env.step(0)[1]).tolist() == [4.0 + 5.0 + 6.0]
