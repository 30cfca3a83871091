"""Gymnasium environments as a batch: conversions, same-step resets, seeds, masks and infos."""

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from headrace import tree
from headrace.envs.gymnasium_batch import GymnasiumBatch
from headrace.errors import ConfigError, EnvironmentFault

BOX = gym.spaces.Box(-1e9, 1e9, (3,), np.float32)


class Scripted(gym.Env[Any, Any]):
    """Shows [random number of the episode, steps, last action]; ends after `length` steps."""

    def __init__(
        self,
        *,
        length: int = 4,
        truncates: bool = False,
        actions: gym.Space[Any] | None = None,
        observations: gym.Space[Any] = BOX,
        mask: Any = None,
        info: Mapping[str, Any] | None = None,
    ) -> None:
        self.observation_space = observations
        self.action_space = gym.spaces.Discrete(3) if actions is None else actions
        self.length, self.truncates, self.mask = length, truncates, mask
        self.info = dict(info or {})
        self.taken: list[Any] = []

    def _info(self) -> dict[str, Any]:
        return self.info if self.mask is None else self.info | {"action_mask": self.mask}

    def _show(self) -> Any:
        if self.observation_space is not BOX:
            return self.observation_space.sample()
        last = self.taken[-1] if self.steps else -1
        return np.array([self.number, self.steps, np.ravel(last)[0]], np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.steps, self.number = 0, self.np_random.integers(1_000_000)
        return self._show(), self._info()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        self.taken.append(action)
        ended = self.steps == self.length
        reward = float(self.steps)
        return self._show(), reward, ended and not self.truncates, ended, self._info()


def make(
    num_envs: int = 3, *, seed: int = 0, first_env: int = 0, **settings: Any
) -> GymnasiumBatch:
    envs = [Scripted(**settings) for _ in range(num_envs)]
    return GymnasiumBatch(envs, name="Scripted-v0", seed=seed, first_env=first_env)


def ids(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int32)


def actions(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def test_an_end_shows_both_episodes_in_one_step() -> None:
    batch = make(2, length=2)
    first = batch.reset()
    assert first.reset.all()
    assert not first.reward.any()
    batch.step(ids(0, 1), actions(0, 1))
    step = batch.step(ids(0, 1), actions(2, 1))
    assert step.terminated.all()
    assert not step.truncated.any()  # it said both
    assert step.reset.all()
    np.testing.assert_array_equal(step.reward, [2, 2])
    assert step.final_observation is not None
    np.testing.assert_array_equal(step.final_observation[:, 0], first.observation[:, 0])
    np.testing.assert_array_equal(step.final_observation[:, 1:], [[2, 2], [2, 1]])
    np.testing.assert_array_equal(step.observation[:, 1:], [[0, -1], [0, -1]])
    assert (step.observation[:, 0] != first.observation[:, 0]).all()


def test_the_clock_is_not_an_end_of_the_task() -> None:
    batch = make(1, length=1, truncates=True)
    batch.reset()
    step = batch.step(ids(0), actions(0))
    assert step.truncated.all()
    assert not step.terminated.any()
    assert step.reset.all()


def test_only_the_named_copies_step_and_in_their_order() -> None:
    batch = make(4, length=3)
    first = batch.reset()
    step = batch.step(ids(3, 1), actions(2, 0))
    np.testing.assert_array_equal(step.env_id, [3, 1])
    np.testing.assert_array_equal(step.observation[:, 0], first.observation[[3, 1], 0])
    np.testing.assert_array_equal(step.observation[:, 1:], [[1, 2], [1, 0]])
    step = batch.step(ids(0, 3), actions(1, 1))
    np.testing.assert_array_equal(step.observation[:, 1], [1, 2])
    step = batch.step(ids(0, 3), actions(1, 1))
    np.testing.assert_array_equal(step.reset, [False, True])
    assert step.final_observation is not None
    np.testing.assert_array_equal(step.final_observation[1], [first.observation[3, 0], 3, 1])
    np.testing.assert_array_equal(step.observation[0, 1:], [2, 1])


def play(batch: GymnasiumBatch, rounds: int = 9) -> np.ndarray:
    looks = [batch.reset().observation]
    every = np.arange(batch.num_envs, dtype=np.int32)
    looks += [batch.step(every, np.ones(len(every), np.int64)).observation for _ in range(rounds)]
    return np.stack(looks, axis=1)


def test_a_copy_does_not_know_how_many_others_there_are() -> None:
    together = play(make(8, seed=7))
    np.testing.assert_array_equal(play(make(8, seed=7)), together)
    np.testing.assert_array_equal(play(make(1, seed=7, first_env=5)), together[5:6])
    np.testing.assert_array_equal(play(make(3, seed=7, first_env=2)), together[2:5])
    assert (play(make(8, seed=8)) != together).any()
    assert len(set(together[:, 0, 0])) == 8


def test_episodes_go_on_with_the_environments_own_random_numbers() -> None:
    looks = play(make(1, length=2), rounds=8)
    assert len(set(looks[0, :, 0])) == 5


def test_a_second_reset_starts_other_episodes() -> None:
    batch = make(2)
    one, two = batch.reset(), batch.reset()
    assert (one.observation[:, 0] != two.observation[:, 0]).all()
    np.testing.assert_array_equal(two.observation[:, 1], 0)


def test_results_are_copies() -> None:
    class Reusing(Scripted):
        def _show(self) -> Any:
            self.frame = getattr(self, "frame", np.zeros(3, np.float32))
            self.frame[:] = self.steps
            return self.frame

    batch = GymnasiumBatch([Reusing(length=2)], name="Reusing-v0", seed=0)
    first = batch.reset()
    one = batch.step(ids(0), actions(0))
    two = batch.step(ids(0), actions(0))
    assert two.final_observation is not None
    shown = [first.observation, one.observation, two.final_observation, two.observation]
    assert [array[0, 0] for array in shown] == [0, 1, 2, 0]


ACTIONS = {
    "discrete": (gym.spaces.Discrete(3), [2], 2),
    "discrete from 5": (gym.spaces.Discrete(3, start=5), [2], 7),
    "multi_discrete": (gym.spaces.MultiDiscrete([3, 4]), [[2, 3]], [2, 3]),
    "multi_discrete from": (gym.spaces.MultiDiscrete([3, 4], start=[1, 2]), [[2, 3]], [3, 5]),
    "multi_discrete 2 x 2": (
        gym.spaces.MultiDiscrete([[2, 3], [4, 5]]), [[1, 2, 3, 4]], [[1, 2], [3, 4]],
    ),
    "multi_binary": (gym.spaces.MultiBinary(3), [[1, 0, 1]], [1, 0, 1]),
    "multi_binary 2 x 2": (gym.spaces.MultiBinary([2, 2]), [[1, 0, 0, 1]], [[1, 0], [0, 1]]),
    "box": (gym.spaces.Box(-2, 2, (2,), np.float32), [[0.5, -2.0]], [0.5, -2.0]),
    "box 2 x 1": (gym.spaces.Box(-2, 2, (2, 1), np.float32), [[0.5, -2.0]], [[0.5], [-2.0]]),
    "box of one number": (gym.spaces.Box(-2, 2, (), np.float32), [[0.5]], 0.5),
    "box of float64": (gym.spaces.Box(-0.1, 0.1, (1,), np.float64), [[0.1]], [0.1]),
    "box of integers": (gym.spaces.Box(0, 255, (2,), np.uint8), [[254.6, 0.4]], [255, 0]),
}  # fmt: skip


@pytest.mark.parametrize("kind", ACTIONS)
def test_actions_arrive_as_the_environment_has_them(kind: str) -> None:
    space, sent, expected = ACTIONS[kind]
    env = Scripted(actions=space)
    batch = GymnasiumBatch([env], name="Scripted-v0", seed=0)
    batch.reset()
    spec = batch.spec
    action = np.array(sent, spec.action_dtype)
    assert action.shape == (1, *spec.action_shape)
    batch.step(ids(0), action)
    np.testing.assert_array_equal(env.taken[0], expected)
    assert space.contains(np.asarray(env.taken[0]))
    assert np.asarray(env.taken[0]).dtype == space.dtype
    action[:] = 0  # the caller's buffer is the caller's
    np.testing.assert_array_equal(env.taken[0], expected)


def test_bounds_that_float32_cannot_say_are_kept() -> None:
    space = gym.spaces.Box(-0.1, 0.1, (1,), np.float64)  # float32(0.1) is greater
    env = Scripted(actions=space)
    batch = GymnasiumBatch([env], name="Scripted-v0", seed=0)
    batch.reset()
    assert isinstance(batch.spec.action_space, gym.spaces.Box)
    batch.step(ids(0), batch.spec.action_space.high[None])
    assert space.contains(env.taken[0])


OBSERVATIONS = {
    "float64": gym.spaces.Box(-np.inf, np.inf, (2, 3), np.float64),
    "image": gym.spaces.Box(0, 255, (7, 5, 3), np.uint8),
    "int16": gym.spaces.Box(-5, 5, (4,), np.int16),
    "bool": gym.spaces.Box(0, 1, (4,), np.bool_),
    "uint16": gym.spaces.Box(0, 60_000, (4,), np.uint16),
    "discrete": gym.spaces.Discrete(5, start=-2),
    "multi_discrete": gym.spaces.MultiDiscrete([3, 9]),
    "multi_binary": gym.spaces.MultiBinary(4),
    "dict": gym.spaces.Dict(
        {
            "a": gym.spaces.Box(-1, 1, (3,), np.float64),
            "b": gym.spaces.Tuple((gym.spaces.Discrete(3), gym.spaces.MultiBinary(2))),
        }
    ),
    "tuple": gym.spaces.Tuple((gym.spaces.Discrete(32), gym.spaces.Box(0, 255, (8,), np.uint8))),
}


@pytest.mark.parametrize("kind", OBSERVATIONS)
def test_observations_arrive_as_the_spec_says(kind: str) -> None:
    space = OBSERVATIONS[kind]
    envs = [Scripted(observations=space, length=2) for _ in range(3)]
    shown: list[Any] = []
    for env in envs:
        env._show = lambda: (shown.append(space.sample()), shown[-1])[1]  # type: ignore[method-assign]
    batch = GymnasiumBatch(envs, name="Scripted-v0", seed=0, strictness="strict")
    steps = [batch.reset()]
    every = np.arange(3, dtype=np.int32)
    steps += [batch.step(every, np.zeros(3, np.int64)) for _ in range(4)]
    arrived = []
    for step in steps:
        assert step.observation.dtype == batch.spec.observation_space.dtype
        assert all(batch.spec.observation_space.contains(row) for row in step.observation)
        arrived += [] if step.final_observation is None else [*step.final_observation]
        arrived += [*step.observation]
    assert len(arrived) == len(shown) == 21
    assert not batch.notices
    if tree.is_plain(space):
        assert batch.spec.structure is None
        expected = [np.asarray(value, batch.spec.observation_space.dtype) for value in shown]
    else:
        assert batch.spec.structure == space
        leaves = tree.leaves(space)
        expected = [np.zeros(tree.row_nbytes(leaves), np.uint8) for _ in shown]
        for value, row in zip(shown, expected, strict=True):
            tree.pack(leaves, value, row)
    np.testing.assert_array_equal(arrived, expected)


def test_text_is_left_out_and_said() -> None:
    space = gym.spaces.Dict(
        {"mission": gym.spaces.Text(9), "in": gym.spaces.Dict({"x": BOX, "t": gym.spaces.Text(2)})}
    )
    batch = make(1, observations=space)
    assert batch.spec.structure == gym.spaces.Dict({"in": gym.spaces.Dict({"x": BOX})})
    batch.reset()
    assert batch.spec.observation_space.shape == (16,)
    told = " ".join(batch.notices)
    assert "'mission'" in told
    assert "'in/t'" in told


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"actions": gym.spaces.Tuple((gym.spaces.Discrete(2),))}, "Scripted-v0: actions of Tuple"),
        ({"actions": gym.spaces.Box(-np.inf, np.inf, (2,))}, "finite"),
        ({"observations": gym.spaces.Sequence(BOX)}, "Scripted-v0: observations of Sequence"),
    ],
)
def test_kinds_that_are_not_supported_are_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make(1, **settings)


def test_masks_are_those_of_what_is_shown() -> None:
    class Masked(Scripted):
        def _info(self) -> dict[str, Any]:
            return {"action_mask": np.arange(3) == self.steps}

    batch = GymnasiumBatch([Masked(length=3) for _ in range(2)], name="Masked-v0", seed=0)
    assert batch.spec.has_action_mask
    assert batch.spec.action_mask_size == 3
    masks = [batch.reset().action_mask]
    masks += [batch.step(ids(1, 0), actions(0, 0)).action_mask for _ in range(3)]
    np.testing.assert_array_equal(np.argmax(masks, axis=2), [[0, 0], [1, 1], [2, 2], [0, 0]])
    assert all(mask is not None and mask.dtype == np.bool_ for mask in masks)


@pytest.mark.parametrize(
    "mask",
    [
        np.array([1, 0, 0, 1, 1], np.int8),
        (np.array([1, 0]), np.array([0, 1, 1])),
        [1, 0, 0, 1, 1],
    ],
)
def test_masks_of_several_choices(mask: Any) -> None:
    batch = make(2, actions=gym.spaces.MultiDiscrete([2, 3]), mask=mask)
    np.testing.assert_array_equal(batch.reset().action_mask, [[True, False, False, True, True]] * 2)


def test_masks_of_continuous_actions_mean_nothing() -> None:
    batch = make(1, actions=gym.spaces.Box(-1, 1, (2,)), mask=[1, 1])
    assert not batch.spec.has_action_mask
    assert batch.reset().action_mask is None


@pytest.mark.parametrize(
    ("mask", "complaint"),
    [
        ([1, 1], "must have 3 flags"),
        ([0, 0, 0], "allows no action"),
        ("yes", "must have 3 flags, not 'yes'"),
    ],
)
def test_bad_masks_are_refused(mask: Any, complaint: str) -> None:
    with pytest.raises(EnvironmentFault, match=rf"environment 0 \(Scripted-v0\): .*{complaint}"):
        make(2, mask=mask).reset()


def test_numbers_of_the_last_info_are_kept() -> None:
    info = {
        "success": True,
        "level": 3,
        "distance": np.float32(0.5),
        "flag": np.bool_(False),
        "TimeLimit.truncated": True,
        "name": "x",
        "array": np.zeros(1),
        "unknown": float("nan"),
        "episode": {"r": 1.0},
    }
    batch = make(3, length=2, info=info)
    batch.reset()
    assert batch.step(ids(0), actions(0)).episode_info is None
    step = batch.step(ids(2, 0), actions(0, 0))
    numbers = {"success": 1.0, "level": 3.0, "distance": 0.5, "flag": 0.0}
    assert step.episode_info == {1: numbers}
    assert make(1, length=1).step(ids(0), actions(0)).episode_info is None


def test_whose_code_runs_is_known_while_it_runs() -> None:
    seen: list[int | None] = []

    class Telling(Scripted):
        def _info(self) -> dict[str, Any]:
            seen.append(batches[0].current_env if batches else None)
            return {}

    batches: list[GymnasiumBatch] = []
    envs = [Telling(length=2) for _ in range(3)]
    batches.append(GymnasiumBatch(envs, name="Telling-v0", seed=0, first_env=10))
    batches[0].reset()
    assert seen == [None, 11, 12]  # the first is reset while the batch is made
    seen.clear()
    batches[0].step(ids(2, 0), actions(0, 0))
    assert seen == [12, 10]
    batches[0].step(ids(0, 2), actions(0, 0))
    assert seen[2:] == [10, 12, 10, 12]
    assert batches[0].current_env is None


class Bounded(gym.Env[Any, Any]):
    """Has actions of any size."""

    observation_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, size: float, *, grows: bool = False) -> None:
        self.action_space = gym.spaces.Box(-size, size, (1,), np.float32)
        self.grows = grows

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        if self.grows:
            self.action_space = gym.spaces.Box(-9.0, 9.0, (1,), np.float32)
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        return (
            np.zeros(1, np.float32),
            0.0,
            False,
            False,
            {"huge": 10**400, "lasts": np.timedelta64(1, "s")},
        )


@pytest.mark.parametrize(
    ("envs", "whose"),
    [
        ([Bounded(1.0), Bounded(1.0), Bounded(2.0)], "environment 2"),
        ([Bounded(1.0, grows=True)], "environment 0"),
    ],
)
def test_all_copies_have_the_spaces_that_the_first_was_made_with(
    envs: list[Bounded], whose: str
) -> None:
    with pytest.raises(EnvironmentFault, match=f"{whose}.*all copies must have the same"):
        GymnasiumBatch(envs, name="bounded", seed=1)


def test_numbers_of_an_info_that_are_none_of_float64_are_left_out() -> None:
    batch = GymnasiumBatch([gym.wrappers.TimeLimit(Bounded(1.0), 1)], name="bounded", seed=1)
    first = batch.reset()
    assert batch.step(first.env_id, np.zeros((1, 1), np.float32)).episode_info is None
