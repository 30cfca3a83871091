"""Every way in which an environment can break its promise gives one sentence that names it."""

import re
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from headrace.envs.checks import Strictness
from headrace.envs.gymnasium_batch import GymnasiumBatch
from headrace.envs.wrappers import ActionRepeat
from headrace.errors import EnvironmentFault

GOOD = np.array([0.25, 0.5, 0.75], np.float32)


class Flaky(gym.Env[Any, Any]):
    """Does what it should, but for what it is told to do."""

    observation_space: gym.Space[Any] = gym.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, **does: Any) -> None:
        self.does = does

    def _do(self, what: str, usual: Any) -> Any:
        value = self.does.get(what, usual)
        return value() if callable(value) else value

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return self._do("reset", (self._do("first", GOOD), {}))

    def step(self, action: Any) -> Any:
        names = {"observation": GOOD, "reward": 0.0, "terminated": False, "truncated": False}
        values = [self._do(name, usual) for name, usual in names.items()]
        return self._do("step", (*values, self._do("info", {})))


def make(strictness: Strictness = "normal", **does: Any) -> GymnasiumBatch:
    """Four environments, of which the third, number 12 of the run, is flaky."""
    envs = [Flaky(), Flaky(), Flaky(**does), Flaky()]
    return GymnasiumBatch(envs, name="Flaky-v0", seed=0, first_env=10, strictness=strictness)


def step(batch: GymnasiumBatch) -> Any:
    return batch.step(np.arange(4, dtype=np.int32), np.zeros(4, np.int64))


def raises(error: BaseException) -> Callable[[], Any]:
    def act() -> Any:
        raise error

    return act


def array(*numbers: float, dtype: Any = np.float32) -> np.ndarray:
    return np.array(numbers, dtype)


ALWAYS: dict[str, tuple[str, Any, str]] = {
    "nan": ("observation", array(0.1, 0.2, np.nan), "with nan at index (2,): [0.1, 0.2, nan]"),
    "inf": ("observation", array(0.1, -np.inf, 0.2), "with -inf at index (1,): [ 0.1, -inf, 0.2]"),
    "too large": ("observation", array(0, 1e300, 0, dtype=np.float64), "with inf at index (1,)"),
    "short": (
        "observation", array(0.5), "of shape (1,), but its space says (3,): [0.5]",
    ),
    "none": ("observation", None, "that is not an array of numbers: None"),
    "text": ("observation", "hello", "that is not an array of numbers: 'hello'"),
    "ragged": ("observation", [1, [2, 3], 4], "that is not an array of numbers: [1, [2, 3], 4]"),
    "reward text": ("reward", "1.0", "step returned the reward '1.0', which is not a"),
    "reward none": ("reward", None, "step returned the reward None, which is not a finite number"),
    "reward array": ("reward", array(1, 2), "step returned the reward [1., 2.], which is not a"),
    "reward list": ("reward", [1.0, 2.0], "step returned the reward [1.0, 2.0], which is not a"),
    "reward complex": ("reward", 1j, "step returned the reward 1j, which is not a finite number"),
    "reward object": ("reward", object, "step returned the reward <object object"),
    "reward huge": ("reward", 1e300, "step returned the reward 1e+300, which is not a finite"),
    "reward nan": ("reward", float("nan"), "step returned the reward nan, which is not a finite"),
    "flag": ("terminated", "no", "step returned terminated = 'no', which is not a bool"),
    "flag array": ("truncated", array(1, 2), "step returned truncated = [1., 2.], which is not"),
    "flag none": ("terminated", None, "step returned terminated = None, which is not a bool: ret"),
    "flag half": ("truncated", 0.5, "step returned truncated = 0.5, which is not a bool: return"),
    "flag nan": ("terminated", float("nan"), "step returned terminated = nan, which is not a bool"),
    "flag two": ("terminated", np.int64(2), "terminated = np.int64(2), which is not a bool"),
    "old step": ("step", (GOOD, 0.0, False, {}), "step must return (observation, reward, terminat"),
    "no step": ("step", None, "truncated, info), not None"),
    "raises": ("step", raises(ValueError("lost a wheel")), "step raised ValueError: lost a wheel"),
    "raises lines": ("step", raises(ValueError("a\n  b")), "step raised ValueError: a b (test_"),
    "exits": ("step", raises(SystemExit(3)), "step raised SystemExit: 3 (test_gymnasium_"),
    "index": ("observation", raises(IndexError("7")), "step raised IndexError: 7 (test_gymnasium"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ALWAYS)
@pytest.mark.parametrize("strictness", ["strict", "normal"])
def test_what_cannot_be_used_is_an_error(kind: str, strictness: Strictness) -> None:
    what, value, sentence = ALWAYS[kind]
    if (kind, strictness) == ("too large", "strict"):
        sentence = "of float64, but its space says float32"  # comes first
    batch = make(strictness, **{what: value})
    batch.reset()
    with pytest.raises(EnvironmentFault) as caught:
        step(batch)
    message = str(caught.value)
    assert message.startswith("environment 12 (Flaky-v0): ")
    assert sentence in message
    assert "\n" not in message


RESETS: dict[str, tuple[str, Any, str]] = {
    "old reset": ("reset", GOOD, "reset must return (observation, info), not [0.25, 0.5 , 0.75]"),
    "info": ("reset", (GOOD, None), "reset must return (observation, info), not (array("),
    "raises": ("first", raises(OSError("no level")), "reset raised OSError: no level (test_gymnas"),
    "nan": ("first", array(np.nan, 0, 0), "reset returned an observation with nan at index (0,)"),
    "shape": ("first", GOOD[:2], "reset returned an observation of shape (2,), but its space says"),
}


@pytest.mark.parametrize("kind", RESETS)
def test_a_reset_is_looked_at_too(kind: str) -> None:
    what, value, sentence = RESETS[kind]
    with pytest.raises(EnvironmentFault) as caught:
        make(**{what: value}).reset()
    assert str(caught.value).startswith(f"environment 12 (Flaky-v0): {sentence}")


@pytest.mark.parametrize("kind", RESETS)
def test_so_is_a_reset_in_the_middle(kind: str) -> None:
    what, value, sentence = RESETS[kind]
    batch = make(terminated=True)
    batch.reset()
    step(batch)
    batch._envs[2].does[what] = value
    with pytest.raises(EnvironmentFault) as caught:
        step(batch)
    assert str(caught.value).startswith(f"environment 12 (Flaky-v0): {sentence}")


def test_the_error_keeps_the_line_that_raised_and_the_cause() -> None:
    batch = make(step=raises(ValueError("lost a wheel")))
    batch.reset()
    with pytest.raises(EnvironmentFault, match=r"\.py:\d+: raise error\)") as caught:
        step(batch)
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_last_info_that_is_none_is_named() -> None:
    batch = make(terminated=True, info=lambda: None)
    batch.reset()
    with pytest.raises(EnvironmentFault, match=r"12 .*returned the info None, which is not a dict"):
        step(batch)


BEARABLE: dict[str, tuple[str, Any, str, list[float]]] = {
    "range": (
        "observation", array(0.5, -3, 0), "with -3.0 at index (1,), below the -1.0 of its space",
        [0.5, -3, 0],
    ),
    "above": (
        "observation", array(0.5, 0, 1.5), "with 1.5 at index (2,), above the 1.0 of its space",
        [0.5, 0, 1.5],
    ),
    "dtype": (
        "observation", array(0.5, 0.5, 0, dtype=np.float64),
        "an observation of float64, but its space says float32", [0.5, 0.5, 0],
    ),
    "flag": ("truncated", 1, "truncated = 1, which is not a bool", [0.25, 0.5, 0.75]),
    "flag array": (
        "truncated", np.array([True]), "truncated = [ True], which is not a bool",
        [0.25, 0.5, 0.75],
    ),
    "reward array": (
        "reward", array(2.5), "the reward [2.5] of shape (1,), which is not a number",
        [0.25, 0.5, 0.75],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BEARABLE)
def test_what_can_be_lived_with_is_said_once_or_refused(kind: str) -> None:
    what, value, sentence, shown = BEARABLE[kind]
    batch = make(**{what: value})
    batch.reset()
    for _ in range(3):
        seen = step(batch)
    assert len(batch.notices) == 1
    assert sentence in batch.notices[0]
    assert batch.notices[0].startswith("environment 12 (Flaky-v0): ")
    np.testing.assert_array_equal(
        (seen.final_observation if seen.reset[2] else seen.observation)[2], shown
    )
    assert bool(seen.truncated[2]) == (what == "truncated")
    assert seen.reward.tolist() == [0.0, 0.0, 2.5 if what == "reward" else 0.0, 0.0]

    strict = make("strict", **{what: value})
    strict.reset()
    with pytest.raises(EnvironmentFault) as caught:
        step(strict)
    assert sentence in str(caught.value)

    off = make("off", **{what: value})
    off.reset()
    step(off)
    assert not off.notices


@pytest.mark.parametrize(
    "value", [2, True, np.bool_(True), np.float16(2), np.int8(2), np.array(2.0)]
)
def test_rewards_of_every_kind_of_number_are_right(value: Any) -> None:
    batch = make("strict", reward=value)
    batch.reset()
    assert step(batch).reward.tolist() == [0.0, 0.0, float(value), 0.0]
    assert not batch.notices


@pytest.mark.parametrize("value", [np.bool_(True), np.array(True)])
def test_flags_of_numpy_are_right(value: Any) -> None:
    batch = make("strict", terminated=value)
    batch.reset()
    assert step(batch).terminated.tolist() == [False, False, True, False]


@pytest.mark.parametrize("value", ["1.0", None, [1.0]])
def test_what_is_no_number_is_not_added_up(value: Any) -> None:
    env = ActionRepeat(Flaky(reward=value), 4)
    batch = GymnasiumBatch([env], name="Flaky-v0", seed=0)
    batch.reset()
    with pytest.raises(
        EnvironmentFault, match=rf"the reward {re.escape(repr(value))}, which is not"
    ):
        batch.step(np.zeros(1, np.int32), np.zeros(1, np.int64))


@pytest.mark.parametrize("kind", ["short", "none", "reward text", "old step", "raises"])
def test_off_still_refuses_what_has_no_place(kind: str) -> None:
    what, value, sentence = ALWAYS[kind]
    batch = make("off", **{what: value})
    batch.reset()
    with pytest.raises(EnvironmentFault) as caught:
        step(batch)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("kind", ["nan", "inf", "reward nan"])
def test_off_lets_wrong_numbers_pass(kind: str) -> None:
    what, value, _ = ALWAYS[kind]
    batch = make("off", **{what: value})
    batch.reset()
    step(batch)


BYTES = gym.spaces.Box(0, 255, (2,), np.uint8)
UNHELD: dict[str, tuple[Any, Any, str]] = {
    "scaled": (BYTES, array(0, 0.5), "of float32 with 0.5 at index (1,), which the uint8 of its"),
    "negative": (BYTES, array(-1, 0, dtype=np.int64), "with -1 at index (0,), which the uint8"),
    "above": (BYTES, array(7, 300, dtype=np.int64), "with 300 at index (1,), which the uint8 of"),
    "half": (gym.spaces.Box(-9, 9, (2,), np.int64), array(1, 2.5), "with 2.5 at index (1,)"),
    "two flags": (gym.spaces.Box(0, 1, (2,), np.bool_), array(1, 2), "which the bool of its"),
    "nan": (BYTES, array(1, np.nan), "an observation with nan at index (1,)"),
    "choice": (gym.spaces.MultiDiscrete([3, 3]), array(1, 0.5), "with 0.5 at index (1,)"),
}


@pytest.mark.parametrize("kind", UNHELD)
def test_a_number_that_the_declared_integers_cannot_hold_is_refused(kind: str) -> None:
    space, value, sentence = UNHELD[kind]
    good = np.zeros(2, space.dtype)
    envs = [Flaky(first=good, observation=shown) for shown in (good, value)]
    for env in envs:
        env.observation_space = space
    batch = GymnasiumBatch(envs, name="Flaky-v0", seed=0)
    batch.reset()
    with pytest.raises(EnvironmentFault) as caught:
        batch.step(np.arange(2, dtype=np.int32), np.zeros(2, np.int64))
    assert str(caught.value).startswith("environment 1 (Flaky-v0): step returned ")
    assert sentence in str(caught.value)


def test_whole_floats_under_integers_are_taken() -> None:
    env = Flaky(first=array(1, 0), observation=array(255, 3))
    env.observation_space = BYTES
    batch = GymnasiumBatch([env], name="Flaky-v0", seed=0)
    assert batch.reset().observation.tolist() == [[1, 0]]
    step = batch.step(np.zeros(1, np.int32), np.zeros(1, np.int64))
    assert step.observation.dtype == np.uint8
    assert step.observation.tolist() == [[255, 3]]


def test_bounds_of_a_dtype_that_travels_in_a_wider_one_are_bounds() -> None:
    env = Flaky(first=array(1, 0, dtype=np.uint16), observation=array(70_000, 3, dtype=np.int64))
    env.observation_space = gym.spaces.Box(0, 65535, (2,), np.uint16)
    batch = GymnasiumBatch([env], name="Flaky-v0", seed=0)
    batch.reset()
    batch.step(np.zeros(1, np.int32), np.zeros(1, np.int64))
    assert any("with 70000 at index (0,), above the 65535" in text for text in batch.notices)


def test_one_copy_being_right_does_not_hide_another() -> None:
    """All four are wrong in the same way: the first is named."""
    envs = [Flaky(observation=GOOD[:2]) for _ in range(4)]
    batch = GymnasiumBatch(envs, name="Flaky-v0", seed=0)
    batch.reset()
    with pytest.raises(EnvironmentFault, match="environment 0 "):
        step(batch)


class Nested(Flaky):
    observation_space = gym.spaces.Dict(
        {
            "a": gym.spaces.Box(-1, 1, (2,)),
            "b": gym.spaces.Tuple((gym.spaces.Discrete(3, start=1),)),
        }
    )


NESTED: dict[str, tuple[Any, str]] = {
    "nan": ({"a": array(0, np.nan), "b": (1,)}, "an observation part 'a' with nan at index (1,)"),
    "missing": ({"b": (1,)}, "an observation without 'a': {'b': (1,)}"),
    "missing place": ({"a": GOOD[:2], "b": ()}, "an observation without 'b/0'"),
    "not nested": (GOOD, "an observation without 'a': [0.25, 0.5 , 0.75]"),
    "shape": ({"a": GOOD, "b": (1,)}, "an observation part 'a' of shape (3,), but its space says"),
    "choice": ({"a": GOOD[:2], "b": (4,)}, "part 'b/0' with 4 at index (), above the 3 of its"),
    "choice below": ({"a": GOOD[:2], "b": (0,)}, "part 'b/0' with 0 at index (), below the 1 of"),
}


@pytest.mark.parametrize("kind", NESTED)
def test_parts_are_named(kind: str) -> None:
    value, sentence = NESTED[kind]
    good = {"a": GOOD[:2], "b": (3,)}
    envs = [Nested(first=good, observation=shown) for shown in (good, value)]
    batch = GymnasiumBatch(envs, name="Nested-v0", seed=0)
    batch.reset()
    with pytest.raises(EnvironmentFault) as caught:
        batch.step(np.arange(2, dtype=np.int32), np.zeros(2, np.int64))
    message = str(caught.value)
    assert message.startswith("environment 1 (Nested-v0): step returned ")
    assert sentence in message


def test_huge_values_are_cut_short_in_the_message() -> None:
    class Image(Flaky):
        observation_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)

    good = np.zeros((64, 64, 3), np.uint8)
    envs = [Image(first=good, observation=np.zeros((64, 64), np.uint8))]
    batch = GymnasiumBatch(envs, name="Image-v0", seed=0)
    batch.reset()
    with pytest.raises(EnvironmentFault) as caught:
        batch.step(np.zeros(1, np.int32), np.zeros(1, np.int64))
    assert len(str(caught.value)) < 300
