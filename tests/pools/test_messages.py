"""Steps and actions on the wire: what goes out comes in, and nothing else does."""

import contextlib
import json
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.pools.shm_layout import Table, layout, read_step, write_host_step
from headrace.specs import EnvSpec
from headrace.steps import INFO_NBYTES, EnvStep
from headrace.transport import wire
from headrace.transport.messages import (
    RUN_IDS,
    decode_action,
    decode_step,
    describe,
    encode_action,
    encode_step,
    spec_difference,
)
from headrace.transport.wire import Kind, Message, WireError

E = 5


def spec_of(**changes: Any) -> EnvSpec:
    fields: dict[str, Any] = {
        "name": "test",
        "observation_space": gym.spaces.Box(0, 255, (2, 3), np.uint8),
        "action_space": gym.spaces.Discrete(4),
    }
    return EnvSpec(**(fields | changes))


def step_of(spec: EnvSpec, env_id: list[int], *, seed: int = 0) -> EnvStep:
    """Environment 0 ends, 1 meets the clock, 2 loses a life, 3 is fresh, and 4 goes on."""
    rng = np.random.default_rng(seed)
    shape = (E, *spec.observation_space.shape)
    frames, finals = rng.integers(0, 256, (2, *shape)).astype(spec.observation_space.dtype)
    mask = rng.integers(0, 2, (E, spec.action_mask_size)) > 0 if spec.has_action_mask else None
    final_mask = None if mask is None else ~mask
    order = np.array(env_id, np.int32)
    step = EnvStep(
        env_id=np.arange(E, dtype=np.int32),
        run_id=np.arange(E, dtype=np.int64) * 7,
        observation=frames,
        reward=rng.normal(size=E).astype(np.float32),
        reset=np.array([True, True, False, True, False]),
        terminated=np.array([True, False, True, False, False]),
        truncated=np.array([False, True, False, False, False]),
        final_observation=finals,
        action_mask=mask,
        final_action_mask=final_mask,
    )
    rows = EnvStep(*(None if part is None else part[order] for part in step[:-1]))
    infos = {env_id.index(0): {"score": 1.5}, env_id.index(1): {"steps": 20, "x": -1.0}}
    return rows._replace(episode_info=infos)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("env_id", [[0, 1, 2, 3, 4], [3, 0, 4, 2, 1]])
@pytest.mark.parametrize("compression", ["off", "lz4"])
def test_a_step_arrives_in_the_order_of_environments(
    mask: bool, env_id: list[int], compression: wire.Compression
) -> None:
    if compression == "lz4":
        pytest.importorskip("lz4")
    spec = spec_of(has_action_mask=mask)
    step = step_of(spec, env_id)
    data, left_out = encode_step(step, block=3, sequence=9, compression=compression)
    assert left_out == 0
    message = wire.decode(data)
    assert (message.kind, message.block, message.sequence) == (Kind.STEP, 3, 9)
    plan = layout(spec, E)
    table = Table(bytearray(plan.nbytes), plan)
    table.all.final_observation[:] = 77
    write_host_step(table.all, decode_step(message, spec, E), run_offset=2 * RUN_IDS)
    ids = np.arange(E, dtype=np.int32)
    got, sent = read_step(table.all, slice(0, E), ids), step_of(spec, list(range(E)))
    for name in ("observation", "reward", "reset", "terminated", "truncated", "action_mask"):
        np.testing.assert_array_equal(getattr(got, name), getattr(sent, name), err_msg=name)
    np.testing.assert_array_equal(got.run_id, sent.run_id + 2 * RUN_IDS)
    assert got.final_observation is not None
    assert sent.final_observation is not None
    np.testing.assert_array_equal(got.final_observation[:2], sent.final_observation[:2])
    assert (got.final_observation[2:] == 77).all()  # those of the others did not travel
    if mask:
        assert got.final_action_mask is not None
        assert sent.final_action_mask is not None
        np.testing.assert_array_equal(got.final_action_mask[:2], sent.final_action_mask[:2])
    assert got.episode_info == sent.episode_info


def test_frames_are_not_copied_before_they_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    step = step_of(spec_of(), list(range(E)))
    given: list[Any] = []

    def encode(*_: Any, arrays: list[Any], **__: Any) -> bytes:
        given.extend(arrays)
        return b""

    monkeypatch.setattr("headrace.transport.messages.encode", encode)
    encode_step(step, block=0, sequence=0)
    assert np.shares_memory(given[0], step.observation)


def test_a_step_has_single_frames_whatever_the_policy_stacks() -> None:
    data, _ = encode_step(step_of(spec_of(frame_stack=4), list(range(E))), block=0, sequence=0)
    assert wire.decode(data).arrays[0].shape == (E, 2, 3)


def message_of(change: Callable[[list[Any], dict[str, Any]], None]) -> Message:
    data, _ = encode_step(step_of(spec_of(), list(range(E))), block=0, sequence=0)
    message = wire.decode(data)
    arrays, text = [array.copy() for array in message.arrays], json.loads(json.dumps(message.text))
    change(arrays, text)
    return message._replace(arrays=tuple(arrays), text=text)


def _set(place: int, value: Callable[[Any], Any]) -> Callable[[list[Any], dict[str, Any]], None]:
    def change(arrays: list[Any], _: dict[str, Any]) -> None:
        arrays[place] = value(arrays[place])

    return change


def _flag(which: int, row: int) -> Callable[[list[Any], dict[str, Any]], None]:
    def change(arrays: list[Any], _: dict[str, Any]) -> None:
        arrays[2][which, row] = not arrays[2][which, row]

    return change


def _info(key: str, value: Any) -> Callable[[list[Any], dict[str, Any]], None]:
    return lambda _, text: text["infos"].update({key: value})


FRAME, REWARD, FLAGS, RUN_ID, FINAL = range(5)
SPOILT: dict[str, Callable[[list[Any], dict[str, Any]], None]] = {
    "a row too few": _set(FRAME, lambda frame: frame[1:]),
    "a stack": _set(FRAME, lambda frame: frame[:, None]),
    "other dtype": _set(FRAME, lambda frame: frame.astype(np.int8)),
    "rewards of 64 bits": _set(REWARD, lambda reward: reward.astype(np.float64)),
    "flags as bytes": _set(FLAGS, lambda flags: flags.astype(np.uint8)),
    "two flags": _set(FLAGS, lambda flags: flags[:2]),
    "run ids of 32 bits": _set(RUN_ID, lambda run_id: run_id.astype(np.int32)),
    "run id below 0": _set(RUN_ID, lambda run_id: run_id - 1),
    "run id of another generation": _set(RUN_ID, lambda run_id: run_id + RUN_IDS),
    "a final observation too many": _set(FINAL, lambda final: np.repeat(final, 2, axis=0)),
    "no arrays": lambda arrays, _: arrays.clear(),
    "an array too many": lambda arrays, _: arrays.append(arrays[0]),
    "final observation missing": lambda arrays, _: arrays.pop(),
    "truncated without reset": _flag(0, 1),
    "terminated and truncated": _flag(1, 1),
    "info of one that goes on": _info("4", {"x": 1}),
    "info of nobody": _info("17", {"x": 1}),
    "info of text": _info("0", {"x": "y"}),
    "info of true": _info("0", {"x": True}),
    "nested info": _info("0", {"x": {"y": 1}}),
    "a list": _info("0", [1]),
    "a number that is no float": _info("0", {"x": 10**400}),
    "too long an info": _info("0", {"x" * INFO_NBYTES: 1}),
    "infos as list": lambda _, text: text.update(infos=[]),
    "another word": lambda _, text: text.update(more=1),
}


@pytest.mark.parametrize("change", SPOILT.values(), ids=SPOILT)
def test_what_no_environment_can_have_shown_is_refused(
    change: Callable[[list[Any], dict[str, Any]], None],
) -> None:
    decode_step(message_of(lambda *_: None), spec_of(), E)
    with pytest.raises(WireError):
        decode_step(message_of(change), spec_of(), E)


def test_only_vectors_hold_rows_back() -> None:
    def hold(rows: slice) -> Callable[[list[Any], dict[str, Any]], None]:
        def change(arrays: list[Any], text: dict[str, Any]) -> None:
            arrays[FLAGS][:] = False
            arrays[FLAGS][1:, rows] = True
            del arrays[FINAL:]
            text.clear()

        return change

    some, vector = message_of(hold(slice(2))), spec_of(vector_envs=0)
    assert not decode_step(some, vector, E).ended.any()
    with pytest.raises(WireError, match="hold none back"):
        decode_step(some, spec_of(), E)
    with pytest.raises(WireError, match="hold none back"):
        decode_step(message_of(hold(slice(None))), vector, E)


def test_final_observations_of_nobody_are_refused() -> None:
    def change(arrays: list[Any], text: dict[str, Any]) -> None:
        arrays[FLAGS][:] = False
        text.clear()

    with pytest.raises(WireError, match="did not end"):
        decode_step(message_of(change), spec_of(), E)


@settings(max_examples=200, deadline=None)
@given(
    arrays=st.lists(st.sampled_from([np.zeros((E, 2, 3), np.uint8), np.zeros(E, np.float32)])),
    text=st.dictionaries(
        st.sampled_from(["infos", "x"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=3),
            lambda inner: (
                st.lists(inner, max_size=2)
                | st.dictionaries(st.sampled_from("012x"), inner, max_size=3)
            ),
            max_leaves=6,
        ),
    ),
)
def test_whatever_comes_is_a_step_or_a_wire_error(arrays: list[Any], text: dict[str, Any]) -> None:
    whole = message_of(lambda *_: None)
    for message in (whole._replace(text=text), whole._replace(arrays=tuple(arrays))):
        with contextlib.suppress(WireError):
            decode_step(message, spec_of(), E)


def test_infos_that_cannot_travel_are_counted() -> None:
    step = step_of(spec_of(), list(range(E)))
    infos: Any = {0: {"x" * 2000: 1.0}, 1: {"fine": 2.0}}
    data, left_out = encode_step(step._replace(episode_info=infos), block=0, sequence=0)
    assert left_out == 1
    assert decode_step(wire.decode(data), spec_of(), E).infos == {1: {"fine": 2.0}}


def test_a_clock_without_its_final_observation_does_not_leave() -> None:
    step = step_of(spec_of(), list(range(E)))._replace(final_observation=None)
    with pytest.raises(ValueError, match="final observation"):
        encode_step(step, block=0, sequence=0)


ACTIONS: dict[str, tuple[Any, Any, Any]] = {
    "discrete": (gym.spaces.Discrete(4), np.array([0, 3, 1]), np.array([0, 4, 1])),
    "multi": (
        gym.spaces.MultiDiscrete([3, 5]),
        np.array([[0, 0], [2, 4], [1, 1]]),
        np.array([[0, 0], [3, 0], [1, 1]]),
    ),
    "box": (
        gym.spaces.Box(-2.0, 2.0, (1,), np.float32),
        np.array([[0.0], [2.0], [-2.0]], np.float32),
        np.array([[0.0], [np.nan], [0.0]], np.float32),
    ),
}


@pytest.mark.parametrize(("space", "good", "bad"), ACTIONS.values(), ids=ACTIONS)
def test_only_actions_that_environments_take_arrive(space: Any, good: Any, bad: Any) -> None:
    spec = spec_of(action_space=space)
    message = wire.decode(encode_action(good, block=2, sequence=4))
    assert (message.kind, message.block, message.sequence) == (Kind.ACTION, 2, 4)
    np.testing.assert_array_equal(decode_action(message, spec, 3), good)
    for spoilt in (bad, good[:2], good[:, None], good.astype(np.float64)):
        with pytest.raises(WireError):
            decode_action(wire.decode(encode_action(spoilt, block=2, sequence=4)), spec, 3)
    with pytest.raises(WireError):
        decode_action(message._replace(arrays=()), spec, 3)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"observation_space": gym.spaces.Box(0, 255, (2, 4), np.uint8)}, "observation"),
        ({"observation_space": gym.spaces.Box(0, 255, (2, 3), np.int16)}, "observation"),
        ({"observation_space": gym.spaces.Box(0, 254, (2, 3), np.uint8)}, "observation"),
        ({"action_space": gym.spaces.Discrete(5)}, "action"),
        ({"action_space": gym.spaces.Box(-1.0, 1.0, (2,), np.float32)}, "action"),
        ({"frame_stack": 4}, "frame_stack"),
        ({"action_repeat": 4}, "action_repeat"),
        ({"has_action_mask": True}, "action mask"),
        ({"structure": gym.spaces.Dict({"a": gym.spaces.Discrete(2)})}, "observation structure"),
        ({"name": "other"}, "environment"),
    ],
)
def test_a_difference_between_specs_is_named(changes: dict[str, Any], named: str) -> None:
    ours, theirs = describe(spec_of()), json.loads(json.dumps(describe(spec_of(**changes))))
    said = spec_difference(ours, theirs)
    assert said.startswith(f"{named} is ")
    assert ";" not in said


def test_equal_specs_do_not_differ() -> None:
    structure = gym.spaces.Dict(
        {"a": gym.spaces.Tuple([gym.spaces.MultiBinary(3), gym.spaces.MultiDiscrete([2, 2])])}
    )
    spec = spec_of(structure=structure)
    assert spec_difference(describe(spec), json.loads(json.dumps(describe(spec)))) == ""
