"""Nested observations survive the trip through bytes."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace import tree
from headrace.errors import ConfigError

DTYPES = (
    np.bool_, np.uint8, np.int8, np.int16, np.int32, np.int64, np.float16, np.float32, np.float64,
    np.uint16, np.uint32,
)  # fmt: skip
SHAPES = st.lists(st.integers(1, 4), max_size=3).map(tuple)


def box(shape: tuple[int, ...], dtype: type[Any]) -> gym.spaces.Box:
    return gym.spaces.Box(0, 1, shape, dtype)


SIMPLE = st.one_of(
    st.builds(box, SHAPES, st.sampled_from(DTYPES)),
    st.builds(lambda n, start: gym.spaces.Discrete(n, start=start), st.integers(1, 9),
              st.integers(-3, 3)),
    st.builds(lambda nvec, start: gym.spaces.MultiDiscrete(nvec, start=[start] * len(nvec)),
              st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(-3, 3)),
    st.builds(lambda shape: gym.spaces.MultiBinary((*shape, 3)), SHAPES),
)  # fmt: skip
SPACES = st.recursive(
    SIMPLE,
    lambda inner: st.one_of(
        st.dictionaries(st.sampled_from("abcde"), inner, min_size=1, max_size=3).map(
            gym.spaces.Dict
        ),
        st.lists(inner, min_size=1, max_size=3).map(gym.spaces.Tuple),
    ),
    max_leaves=8,
)


def expected(leaf: tree.Leaf, value: Any) -> np.ndarray:
    """What must come out, by another way than the packing's."""
    for key in leaf.path.split("/") if leaf.path else []:
        value = value[int(key)] if isinstance(value, tuple) else value[key]
    array = np.asarray(value)
    if leaf.kind in ("discrete", "multi_discrete"):
        flat = [int(n) - start for n, start in zip(array.flat, leaf.start, strict=True)]
        array = np.array(flat).reshape(leaf.shape)
    return array.astype(leaf.dtype)


@settings(deadline=None, max_examples=150)
@given(space=SPACES, seed=st.integers(0, 2**16), lead=st.sampled_from([(), (1,), (3,), (2, 2)]))
def test_what_is_packed_comes_out_again(
    space: gym.Space[Any], seed: int, lead: tuple[int, ...]
) -> None:
    space.seed(seed)
    leaves = tree.leaves(space)
    nbytes = tree.packed_space(space).shape[0]
    rows = np.full((*lead, nbytes), 255, np.uint8)
    values = {where: space.sample() for where in np.ndindex(*lead)}
    for where, value in values.items():
        tree.pack(leaves, value, rows[where])
    parts = tree.unpack(leaves, rows)
    assert list(parts) == [leaf.path for leaf in leaves]
    for leaf in leaves:
        part = parts[leaf.path]
        assert part.shape == (*lead, *leaf.shape)
        assert part.dtype == leaf.dtype
        assert not part.size or np.shares_memory(part, rows)
        for where, value in values.items():
            np.testing.assert_array_equal(part[where], expected(leaf, value))


def assert_alike(space: Any, found: Any, value: Any) -> None:
    """What is nested again is the value in types, order, dtypes and numbers."""
    if isinstance(space, gym.spaces.Dict):
        assert type(found) is dict
        assert list(found) == list(space.spaces)
        for key, part in space.spaces.items():
            assert_alike(part, found[key], value[key])
    elif isinstance(space, gym.spaces.Tuple):
        assert type(found) is tuple
        for part, one, other in zip(space.spaces, found, value, strict=True):
            assert_alike(part, one, other)
    elif isinstance(space, gym.spaces.Discrete):
        assert type(found) is int
        assert found == value
    else:
        assert (found.dtype, found.shape) == (space.dtype, space.shape)
        rounded = np.float32(value) if space.dtype == np.float64 else value
        np.testing.assert_array_equal(found, rounded)


@settings(deadline=None, max_examples=150)
@given(space=SPACES, seed=st.integers(0, 2**16))
def test_what_is_packed_is_nested_again(space: gym.Space[Any], seed: int) -> None:
    space.seed(seed)
    leaves, value = tree.leaves(space), space.sample()
    row, again = np.zeros((2, *tree.packed_space(space).shape), np.uint8)
    tree.pack(leaves, value, row)
    found = tree.nest(space, leaves, row)
    tree.pack(leaves, found, again)
    np.testing.assert_array_equal(again, row)
    row.fill(255)  # a pool lends its rows: what was nested must not change with them
    assert_alike(space, found, value)
    assert space.contains(found)


PLACE = gym.spaces.Dict(
    {"a": gym.spaces.Tuple((box((2,), np.float32),)), "b": gym.spaces.Discrete(3, start=2)}
)


@pytest.mark.parametrize(
    ("space", "value", "complaint"),
    [
        (PLACE, {"b": 2}, "part 'a/0' of the observation is missing"),
        (PLACE, {"a": (), "b": 2}, "part 'a/0' of the observation is missing"),
        (PLACE, [1, 2], "part 'a/0' of the observation is missing"),
        (PLACE, {"a": ([1.0],), "b": 2}, r"part 'a/0' .* of shape \(2,\), not \(1,\)"),
        (PLACE, {"a": ([1.0, 2.0],), "b": 1}, "part 'b' of the observation is 1, which is no"),
        (PLACE, {"a": ([1.0, 2.0],), "b": 5}, "part 'b' of the observation is 5, which is no"),
        (gym.spaces.Discrete(3), 3, "the observation is 3, which is no choice"),
    ],
)
def test_what_is_not_of_the_space_is_not_packed(
    space: gym.Space[Any], value: Any, complaint: str
) -> None:
    leaves = tree.leaves(space)
    with pytest.raises(ValueError, match=complaint):
        tree.pack(leaves, value, np.zeros(tree.row_nbytes(leaves), np.uint8))


@settings(deadline=None)
@given(space=SPACES)
def test_leaves_lie_apart_at_multiples_of_8(space: gym.Space[Any]) -> None:
    leaves = tree.leaves(space)
    end = 0
    for leaf in leaves:
        assert leaf.offset % 8 == 0
        assert leaf.offset >= end
        end = leaf.offset + leaf.nbytes
    nbytes = tree.packed_space(space).shape[0]
    assert end <= nbytes < end + 8
    assert nbytes % 8 == 0
    assert len({leaf.path for leaf in leaves}) == len(leaves)


def test_leaves_by_hand() -> None:
    space = gym.spaces.Dict(
        {
            "position": gym.spaces.Box(-2.0, 3.0, (3,), np.float64),
            "camera": gym.spaces.Dict({"left": gym.spaces.Box(0, 255, (2, 5), np.uint8)}),
            "choice": gym.spaces.Tuple((gym.spaces.Discrete(4, start=-1),)),
        }
    )
    leaves = {leaf.path: leaf for leaf in tree.leaves(space)}
    assert list(leaves) == [
        {"position": "position", "camera": "camera/left", "choice": "choice/0"}[key]
        for key in space.spaces
    ]
    position, camera, choice = (leaves[p] for p in ("position", "camera/left", "choice/0"))
    assert (position.dtype, position.low, position.high) == (np.float32, -2.0, 3.0)
    assert (camera.kind, camera.shape, camera.nbytes, camera.high) == ("box", (2, 5), 10, 255.0)
    assert (choice.kind, choice.choices, choice.start) == ("discrete", (4,), (-1,))
    row = np.zeros(tree.packed_space(space).shape, np.uint8)
    value = {"position": [1, 2, 3], "camera": {"left": np.eye(2, 5)}, "choice": (-1,)}
    tree.pack(tree.leaves(space), value, row)
    assert tree.unpack(tree.leaves(space), row)["choice/0"] == 0


@pytest.mark.parametrize(
    ("space", "plain"),
    [
        (box((2,), np.float32), True),
        (box((2,), np.float64), True),
        (box((), np.uint8), True),
        (box((2,), np.bool_), True),
        (box((2,), np.uint16), False),
        (gym.spaces.Discrete(3), False),
        (gym.spaces.MultiBinary(3), False),
        (gym.spaces.Dict({"a": box((2,), np.float32)}), False),
    ],
)
def test_only_boxes_that_torch_can_hold_are_plain(space: gym.Space[Any], plain: bool) -> None:
    assert tree.is_plain(space) == plain


@pytest.mark.parametrize(
    ("space", "complaint"),
    [
        (gym.spaces.Text(5), "Text are not supported"),
        (
            gym.spaces.Dict({"a": gym.spaces.Sequence(box((), np.float32))}),
            r"Sequence \(part 'a'\)",
        ),
        (
            gym.spaces.Dict(
                {"a/b": gym.spaces.Discrete(2), "a": gym.spaces.Dict(b=gym.spaces.Discrete(2))}
            ),
            "both named 'a/b'",
        ),
        (gym.spaces.Tuple(()), "empty"),
    ],
)
def test_what_has_no_bytes_is_refused(space: gym.Space[Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        tree.leaves(space)
