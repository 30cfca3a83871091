"""What environments returned, kept as it was when they returned it.

An environment may write into the same arrays at every step, and so may all copies of a class into
one: what the first of them returned is then what the last one shows. To copy all that comes costs
as much as a quarter of all else that is done for a step, so it is done while nobody knows, and
where it is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 64  # in which copies are watched
_DEPTH = 8  # of what is nested
_bounds: Any = getattr(np.lib, "array_utils", np)  # numpy 2, or before


class Sharing:
    """Whether copies of an environment share what they return."""

    def __init__(self) -> None:
        self.possible = True
        """Whether what a copy returns must be kept before another one runs."""
        self._rounds = _ROUNDS

    def watch(self, results: Sequence[Any]) -> None:
        """Looks at what several copies returned in one round, as they returned it.

        Once they have shared memory they always may; if they did not in many rounds they never do.
        """
        if self._rounds == 0 or len(results) < 2:
            return
        self._rounds -= 1
        if _overlap(results):
            self._rounds = 0
        else:
            self.possible = self._rounds > 0


def kept(value: Any, depth: int = _DEPTH) -> Any:
    """Returns a result of `reset` or `step` that nobody can change any more.

    Arrays are copied, in dicts, lists and tuples too; what else there may be is left as it is.
    """
    array = _array(value)
    if array is not None:
        return array.copy()
    if depth and isinstance(value, Mapping):
        return {key: kept(part, depth - 1) for key, part in value.items()}
    if depth and isinstance(value, tuple | list):
        parts = [kept(part, depth - 1) for part in value]
        return parts if isinstance(value, list) else tuple(parts)
    return value


def _array(value: Any) -> NDArray[Any] | None:
    """Returns an array, or what gives its memory as one, such as a tensor; else None."""
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, np.generic) or not hasattr(value, "__array__"):
        return None
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError):  # on a GPU, or with a gradient
        return None


def _overlap(results: Sequence[Any]) -> bool:
    """Whether two results have something in common that can be written to."""
    spans: list[tuple[int, int, int]] = []
    rows: dict[int, int] = {}
    for row, result in enumerate(results):
        for part in _parts(result, _DEPTH):
            array = _array(part)
            if array is None:
                if rows.setdefault(id(part), row) != row:
                    return True
            elif array.size:
                spans.append((*_bounds.byte_bounds(array), row))
    spans.sort()
    end, whose = 0, -1
    for low, high, row in spans:
        if low < end and row != whose:
            return True
        if high > end:
            end, whose = high, row
    return False


def _parts(value: Any, depth: int) -> Iterator[Any]:
    """Yields arrays, and the dicts and lists that something is in."""
    if _array(value) is not None:
        yield value
    elif depth and isinstance(value, Mapping | list | tuple) and value:
        if not isinstance(value, tuple):
            yield value
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _parts(part, depth - 1)
