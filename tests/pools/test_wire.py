"""The format of messages: everything comes back, and nothing that comes does any harm."""

import dataclasses
import json
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import hypothesis.extra.numpy as arrays_of
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import HeadraceError
from headrace.transport import wire
from headrace.transport.wire import Kind, WireError, decode, encode, example_message

DTYPES = ("bool", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8")
HEADER = struct.Struct("<4sHBBIIQII")  # as documented: a second opinion
ARRAY = struct.Struct("<BB6x8I")


@dataclasses.dataclass
class Parts:
    """A message to be spoilt: what its header says, and what it carries."""

    magic: bytes = b"HDRC"
    version: int = 1
    kind: int = int(Kind.STEP)
    flags: int = 0
    count: int = 1
    block: int = 0
    sequence: int = 0
    text_nbytes: int = 0
    body_nbytes: int = 8
    code: int = 1  # uint8
    dimensions: int = 1
    sizes: tuple[int, ...] = (8,)
    rest: bytes = bytes(8)

    def bytes(self) -> bytes:
        sizes = self.sizes + (0,) * (8 - len(self.sizes))
        table = ARRAY.pack(self.code, self.dimensions, *sizes) * min(self.count, 17)
        header = HEADER.pack(
            self.magic,
            self.version,
            self.kind,
            self.flags,
            self.count,
            self.block,
            self.sequence,
            self.text_nbytes,
            self.body_nbytes,
        )
        return header + table + self.rest


@contextmanager
def peak_nbytes() -> Iterator[Callable[[], int]]:
    """Yields what tells the most memory that Python took since."""
    tracemalloc.start()
    try:
        yield lambda: tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def any_array() -> st.SearchStrategy[np.ndarray]:
    shapes = arrays_of.array_shapes(min_dims=0, max_dims=8, min_side=0, max_side=3)
    return st.sampled_from(DTYPES).flatmap(lambda dtype: arrays_of.arrays(dtype, shapes))


@pytest.mark.parametrize("compression", ["off", "lz4"])
@settings(max_examples=60, deadline=None)
@given(
    arrays=st.lists(any_array(), max_size=4),
    kind=st.sampled_from(Kind),
    block=st.integers(0, 2**32 - 1),
    sequence=st.integers(0, 2**64 - 1),
    text=st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text()),
)
def test_what_is_encoded_comes_back(
    compression: Any, arrays: Any, kind: Kind, block: int, sequence: int, text: dict[str, Any]
) -> None:
    data = encode(
        kind, block=block, sequence=sequence, text=text, arrays=arrays, compression=compression
    )
    message = decode(data)
    assert message[:4] == (kind, block, sequence, text)
    assert len(message.arrays) == len(arrays)
    for back, array in zip(message.arrays, arrays, strict=True):
        assert back.dtype == array.dtype
        assert back.flags.c_contiguous
        assert not back.flags.writeable
        np.testing.assert_array_equal(back, array)


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_may_lie_in_memory_as_they_like(dtype: str) -> None:
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    for view in (array.T, array[:, ::2], array[1], np.asfortranarray(array), array[:, :0]):
        (back,) = decode(encode(Kind.STEP, arrays=(view,))).arrays
        np.testing.assert_array_equal(back, view)
        assert back.shape == view.shape


def test_arrays_are_views_of_the_message() -> None:
    data = encode(Kind.STEP, arrays=(np.zeros(1 << 20, np.uint8), np.ones(3, np.float32)))
    with peak_nbytes() as peak:
        message = decode(data)
        assert peak() < 1 << 14
    assert all(array.base is not None and not array.flags.owndata for array in message.arrays)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(2, ">i4"),
        np.zeros(2, np.complex64),
        np.array(["text"]),
        np.array([object()]),
        np.zeros(2, "M8[s]"),
        np.zeros(2, [("a", "f4")]),
        np.zeros((1,) * 9, np.uint8),
    ],
    ids=lambda array: str(array.dtype),
)
def test_what_cannot_travel_is_refused_at_home(array: np.ndarray) -> None:
    with pytest.raises(ValueError, match="cannot travel"):
        encode(Kind.STEP, arrays=(array,))


def test_what_is_too_much_is_refused_at_home() -> None:
    with pytest.raises(ValueError, match="17 arrays"):
        encode(Kind.STEP, arrays=(np.zeros(1),) * 17)
    with pytest.raises(ValueError, match="too much"):
        encode(Kind.STEP, text={"x": "y" * wire.MAX_TEXT_NBYTES})
    huge = np.broadcast_to(np.zeros(1, np.uint8), (wire.MAX_NBYTES,))
    with peak_nbytes() as peak:
        with pytest.raises(ValueError, match="too much"):
            encode(Kind.STEP, arrays=(huge, huge))
        assert peak() < 3 * wire.MAX_NBYTES


def test_the_largest_message_that_is_made_can_be_read() -> None:
    most = wire.MAX_NBYTES - wire.MAX_TEXT_NBYTES - HEADER.size - wire.MAX_ARRAYS * ARRAY.size
    text = {"x": "y" * (wire.MAX_TEXT_NBYTES - len(json.dumps({"x": ""}, separators=(",", ":"))))}
    arrays = (np.zeros(most - most % 8 - 15 * 8, np.uint8), *(np.zeros(1),) * 15)
    message = decode(encode(Kind.WEIGHTS, text=text, arrays=arrays))
    assert len(message.arrays) == 16
    assert message.text == text


def test_the_layout_is_as_documented() -> None:
    array = np.arange(3, dtype=np.uint8)
    data = encode(Kind.STEP, block=5, sequence=7, text={"a": 1}, arrays=(array,))
    parts = Parts(
        block=5, sequence=7, text_nbytes=7, body_nbytes=8, sizes=(3,), rest=b'{"a":1}\x00'
    )
    assert data == parts.bytes() + bytes([0, 1, 2, 0, 0, 0, 0, 0])
    assert len(Parts(rest=b"").bytes()) % 8 == 0


def test_the_example_is_a_message() -> None:
    message = decode(example_message())
    assert message.kind is Kind.STEP
    assert len(message.arrays) == 3


def test_another_version_is_named() -> None:
    with pytest.raises(WireError, match=r"version 2 of the protocol, this one 1: install the same"):
        decode(Parts(version=2).bytes())


def test_whatever_is_cut_off_or_added_is_noticed() -> None:
    for compression in ("off", "lz4"):
        frames = np.tile(np.arange(16, dtype=np.uint8), 8)
        data = encode(Kind.STEP, text={"a": 1}, arrays=(frames,), compression=compression)
        for length in range(len(data)):
            with pytest.raises(WireError):
                decode(data[:length])
        with pytest.raises(WireError):
            decode(data + bytes(8))


LIES = {
    "no magic": Parts(magic=b"HTTP"),
    "kind 0": Parts(kind=0),
    "kind 11": Parts(kind=11),
    "unknown flag": Parts(flags=2),
    "17 arrays": Parts(count=17, body_nbytes=17 * 8, rest=bytes(17 * 8)),
    "4 G arrays": Parts(count=2**32 - 1),
    "dtype 12": Parts(code=12),
    "dtype 255": Parts(code=255),
    "9 dimensions": Parts(dimensions=9),
    "a size of no dimension": Parts(dimensions=0, sizes=(8,)),
    "a larger array than the body": Parts(sizes=(16,)),
    "a smaller array than the body": Parts(body_nbytes=16, rest=bytes(16)),
    "a huge array": Parts(sizes=(2**32 - 1,)),
    "a product beyond 64 bits": Parts(dimensions=8, sizes=(2**32 - 1,) * 8),
    "a product that is 8 modulo 2**64": Parts(dimensions=3, sizes=(2**32 - 1, 2**32 - 1, 8)),
    "a body that is not there": Parts(sizes=(1 << 20,), body_nbytes=1 << 20),
    "a body beyond the limit": Parts(sizes=(2**31,), body_nbytes=2**31, flags=1),
    "text that is not there": Parts(text_nbytes=4096),
    "text beyond the limit": Parts(text_nbytes=2**32 - 1),
    "text that is no JSON": Parts(text_nbytes=8, rest=b"notjson!" + bytes(8)),
    "text that is a list": Parts(text_nbytes=2, rest=b"[]" + bytes(6 + 8)),
    "text that is no UTF-8": Parts(text_nbytes=4, rest=b'"\xff\xfe"' + bytes(4 + 8)),
    "neither true nor false": Parts(code=0, rest=bytes([0, 1, 2, 3, 4, 5, 6, 7])),
    "lz4 that is none": Parts(flags=1, rest=b"\xff" * 8),
    "lz4 of nothing": Parts(flags=1, rest=b""),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_seen_before_memory_is_taken(lie: str) -> None:
    data = LIES[lie].bytes()
    with peak_nbytes() as peak:
        with pytest.raises(WireError):
            decode(data)
        assert peak() < 1 << 20


def test_text_as_deep_as_the_stack_is_refused() -> None:
    depth = wire.MAX_TEXT_NBYTES // 2
    text = b'{"a":' + b"[" * depth
    with pytest.raises(WireError, match="no JSON"):
        decode(Parts(count=0, text_nbytes=len(text), body_nbytes=0, rest=text + bytes(8)).bytes())


def test_empty_arrays_of_absurd_shapes_do_no_harm() -> None:
    parts = Parts(dimensions=3, sizes=(0, 2**32 - 1, 2**32 - 1), body_nbytes=0, rest=b"")
    try:
        (array,) = decode(parts.bytes()).arrays
    except WireError:
        return
    assert array.size == 0


@pytest.mark.parametrize("announced", [8, 1 << 12, wire.MAX_NBYTES])
def test_a_bomb_takes_what_it_announced_at_most(announced: int) -> None:
    """What it holds is four times the limit; what it says is less, or as much as may be."""
    block = pytest.importorskip("lz4.block")
    bomb = block.compress(bytes(4 * wire.MAX_NBYTES), store_size=False)
    data = Parts(flags=1, sizes=(announced,), body_nbytes=announced, rest=bomb).bytes()
    with peak_nbytes() as peak:
        with pytest.raises(WireError):
            decode(data)
        # lz4 works in a buffer of its own; the data itself is copied nowhere.
        assert peak() < announced + len(data) + (1 << 20)


@pytest.mark.parametrize("compression", ["off", "lz4"])
def test_a_hundred_thousand_spoilt_messages(compression: Any) -> None:
    """Bytes changed, most of them in the header and the table, and some cut short or longer."""
    rng = np.random.default_rng(0)
    base = np.frombuffer(example_message(), np.uint8)
    if compression == "lz4":
        whole = decode(base.tobytes())
        base = np.frombuffer(
            encode(whole.kind, text=whole.text, arrays=whole.arrays, compression="lz4"), np.uint8
        )
    count, changes = 50_000, 3
    spoilt = np.tile(base, (count, 1))
    # Half of all changes fall on the first 48 bytes, and half of those are small numbers.
    where = np.where(
        rng.random((count, changes)) < 0.5,
        rng.integers(4, 48, (count, changes)),
        rng.integers(0, len(base), (count, changes)),
    )
    value = rng.integers(0, 256, (count, changes))
    value = np.where(rng.random((count, changes)) < 0.5, value % 4, value)
    spoilt[np.arange(count)[:, None], where] = value
    lengths = np.where(rng.random(count) < 0.9, len(base), rng.integers(0, len(base), count))
    refused = 0
    for row, length in zip(spoilt, lengths.tolist(), strict=True):
        try:
            message = decode(row[:length].tobytes())
        except HeadraceError:
            refused += 1
        else:
            assert sum(array.nbytes for array in message.arrays) <= wire.MAX_NBYTES
    assert 0.5 * count < refused < count  # and some are still messages
