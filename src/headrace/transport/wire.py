"""The format of every message between machines: raw arrays behind a fixed, versioned header.

    header     magic, version, kind, flags, arrays, block, sequence, text nbytes, body nbytes
    table      per array: dtype, dimensions, 8 sizes
    text       a JSON object, or nothing
    body       the arrays, one behind the other, each from a multiple of 8 bytes; or that in lz4

Numbers are little-endian. Everything is checked against the length of what came, and against
`MAX_NBYTES`, before memory is taken; arrays are views of the message. Nothing is unpickled.
"""

from __future__ import annotations

import functools
import json
import math
import struct
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headrace.errors import ConfigError, TransportError

VERSION = 1
"""Of the format; both ends must speak the same."""
MAX_NBYTES = 64 << 20
"""Bytes of a message, and of its arrays when they are decompressed."""
MAX_TEXT_NBYTES = 1 << 20
MAX_ARRAYS = 16
MAX_DIMENSIONS = 8

Compression = Literal["off", "lz4"]

_MAGIC = b"HDRC"
_HEADER = struct.Struct("<4sHBBIIQII")
_ARRAY = struct.Struct("<BB6x8I")
_ALIGNMENT = 8
_LZ4 = 1  # flag
_DTYPES = tuple(
    np.dtype(name).newbyteorder("<")
    for name in ("?", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8")
)
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}
_PADDING = bytes(_ALIGNMENT)


class WireError(TransportError):
    """What came is no message, or not one that belongs here."""


class Kind(IntEnum):
    """What a message says."""

    HELLO = 1
    WELCOME = 2
    READY = 3
    STEP = 4
    ACTION = 5
    UNROLL = 6
    SLOTS = 7
    WEIGHTS = 8
    REPORT = 9
    BYE = 10


_KINDS = {int(kind): kind for kind in Kind}


class Message(NamedTuple):
    """One message. What block and sequence count is said by its kind."""

    kind: Kind
    block: int  # 0 .. 2**32 - 1
    sequence: int  # 0 .. 2**64 - 1
    text: dict[str, Any]  # empty if there is none
    arrays: tuple[NDArray[Any], ...]  # read-only views, C order


def encode(
    kind: Kind,
    *,
    block: int = 0,
    sequence: int = 0,
    text: Mapping[str, Any] | None = None,
    arrays: Sequence[NDArray[Any]] = (),
    compression: Compression = "off",
) -> bytes:
    """Returns the bytes of a message.

    Args:
        kind: What it says.
        block: Of environments, or what else the kind counts.
        sequence: Of the message.
        text: What JSON can say; None or empty for nothing.
        arrays: Of the dtypes that numpy has for truth values, integers and floats. Copied once.
        compression: Of the arrays, all together.

    Raises:
        ValueError: it is too large, or has arrays that cannot travel.
    """
    said = json.dumps(dict(text), separators=(",", ":")).encode() if text else b""
    if len(arrays) > MAX_ARRAYS or len(said) > MAX_TEXT_NBYTES:
        raise ValueError(f"{len(arrays)} arrays and {len(said)} bytes of text are too much")
    table: list[bytes] = []
    body: list[Any] = []
    nbytes = 0
    for array in arrays:
        code = _CODES.get(array.dtype)
        if code is None or array.ndim > MAX_DIMENSIONS:
            raise ValueError(f"an array of {array.dtype} {array.shape} cannot travel")
        sizes = array.shape + (0,) * (MAX_DIMENSIONS - array.ndim)
        table.append(_ARRAY.pack(code, array.ndim, *sizes))
        padding = -array.nbytes % _ALIGNMENT
        body += [np.ascontiguousarray(array), _PADDING[:padding]]
        nbytes += array.nbytes + padding
    if nbytes > MAX_NBYTES - MAX_TEXT_NBYTES - _HEADER.size - MAX_ARRAYS * _ARRAY.size:
        raise ValueError(f"{nbytes} bytes are too much for one message of {MAX_NBYTES}")
    flags = 0
    if compression == "lz4" and nbytes:
        body, flags = [_lz4().compress(b"".join(body), store_size=False)], _LZ4
    header = _HEADER.pack(
        _MAGIC, VERSION, kind, flags, len(arrays), block, sequence, len(said), nbytes
    )
    return b"".join([header, *table, said, _PADDING[: -len(said) % _ALIGNMENT], *body])


def decode(data: bytes) -> Message:
    """Returns the message in `data`; its arrays are views of it.

    Raises:
        WireError: it is no message of this version, or is larger than it says or may be.
    """
    if len(data) < _HEADER.size:
        raise WireError(f"{len(data)} bytes are no message: its header alone has {_HEADER.size}")
    if len(data) > MAX_NBYTES:
        raise WireError(f"{len(data)} bytes are too much for one message of {MAX_NBYTES}")
    magic, version, number, flags, count, block, sequence, text_nbytes, nbytes = _HEADER.unpack(
        data[: _HEADER.size]
    )
    if magic != _MAGIC:
        raise WireError("what came is no message of headrace's")
    if version != VERSION:
        raise WireError(
            f"the other end speaks version {version} of the protocol, this one {VERSION}: install "
            "the same headrace on both"
        )
    kind = _KINDS.get(number)
    if kind is None or flags & ~_LZ4 or count > MAX_ARRAYS:
        raise WireError(f"a message of kind {number} with flags {flags} and {count} arrays")
    if text_nbytes > MAX_TEXT_NBYTES or nbytes > MAX_NBYTES:
        raise WireError(f"{text_nbytes} bytes of text and {nbytes} of arrays are too much")
    text_at = _HEADER.size + count * _ARRAY.size
    body_at = text_at + text_nbytes + -text_nbytes % _ALIGNMENT
    if body_at > len(data):
        raise WireError(f"a message of {len(data)} bytes was cut short")
    shapes, wanted = _shapes(bytes(data[_HEADER.size : text_at]))
    if wanted != nbytes:
        raise WireError(f"arrays of {wanted} bytes in a body of {nbytes}")
    text = _text(bytes(data[text_at : text_at + text_nbytes])) if text_nbytes else {}
    if flags & _LZ4:
        body, offset = _decompressed(memoryview(data)[body_at:], nbytes), 0
    elif len(data) - body_at != nbytes:
        raise WireError(f"a body of {len(data) - body_at} bytes where {nbytes} were announced")
    else:
        body, offset = data, body_at
    arrays = []
    for dtype, shape in shapes:
        array = _array(body, offset, dtype, shape)
        arrays.append(array)
        offset += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    return Message(kind, block, sequence, text, tuple(arrays))


def check_compression(compression: Compression) -> None:
    """Checks that messages can be compressed so on this machine.

    Raises:
        ConfigError: a package is missing.
    """
    if compression == "lz4":
        _lz4()


def example_message() -> bytes:
    """Returns a message as worker hosts send them: for tests, and to feed a fuzzer."""
    frames = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    arrays = (frames, np.array([0.5, -1.0], np.float32), np.array([True, False]))
    return encode(Kind.STEP, block=7, sequence=3, text={"infos": {"1": {"x": 2.0}}}, arrays=arrays)


@functools.lru_cache(maxsize=256)
def _shapes(table: bytes) -> tuple[tuple[tuple[np.dtype[Any], tuple[int, ...]], ...], int]:
    """Returns dtypes and shapes of the arrays, and the bytes of the body that has them."""
    shapes, nbytes = [], 0
    for code, dimensions, *sizes in _ARRAY.iter_unpack(table):
        if code >= len(_DTYPES) or dimensions > MAX_DIMENSIONS or any(sizes[dimensions:]):
            raise WireError(f"an array of dtype {code} with {dimensions} dimensions")
        dtype, shape = _DTYPES[code], tuple(sizes[:dimensions])
        shapes.append((dtype, shape))
        nbytes += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    return tuple(shapes), nbytes


def _array(body: bytes, offset: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.ndarray(shape, dtype, body, offset)
    except ValueError as error:  # no elements, and yet sizes that overflow
        raise WireError(f"an array of {dtype} {shape}: {error}") from error
    if dtype == np.bool_ and array.size and array.view(np.uint8).max() > 1:
        raise WireError("truth values that are neither true nor false")
    return array


def _text(data: bytes) -> dict[str, Any]:
    try:
        text = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise WireError(f"the text of a message is no JSON: {error}") from error
    if not isinstance(text, dict):
        raise WireError(f"the text of a message is a {type(text).__name__}, not an object")
    return text


def _decompressed(data: memoryview, nbytes: int) -> bytes:
    """Takes exactly `nbytes`, which were checked, whatever the data claims."""
    lz4 = _lz4()
    try:
        body: bytes = lz4.decompress(data, uncompressed_size=nbytes)
    except (lz4.LZ4BlockError, ValueError, MemoryError, OverflowError) as error:
        raise WireError(f"the body of a message is no lz4: {error}") from error
    if len(body) != nbytes:
        raise WireError(f"a body of {len(body)} bytes where {nbytes} were announced")
    return body


def _lz4() -> Any:
    try:
        from lz4 import block  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ConfigError(
            "this run's messages are compressed (--message-compression lz4), which needs an extra "
            "on every machine: pip install 'headrace[cluster]'"
        ) from error
    return block
