"""What environments return, made into arrays, or refused in one sentence.

All rows are looked at together; only when something is wrong is the row looked for.
"""

from __future__ import annotations

import contextlib
import math
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from headrace import tree
from headrace.errors import EnvironmentFault, HeadraceError

Strictness = Literal["strict", "normal", "off"]
Call = Literal["reset", "step"]

_MOST_SHOWN = 120  # characters of a value in a message
_SMALL = 1 << 14  # numbers whose bounds are repeated for each row: that saves half of a comparison


class Range(NamedTuple):
    """Bounds of several rows of a part, in their shape."""

    low: NDArray[Any]
    high: NDArray[Any]
    inside: NDArray[np.bool_]  # [2, N, *shape] what the comparisons say


class Part(NamedTuple):
    """What one part of an observation must be."""

    leaf: tree.Leaf
    declared: np.dtype[Any]
    low: NDArray[Any] | None  # None where every value of the dtype is allowed
    high: NDArray[Any] | None


def parts_of(space: gym.Space[Any]) -> tuple[Part, ...]:
    """Returns what the parts of an observation must be."""
    parts = []
    for leaf in tree.leaves(space):
        inner: Any = space
        for key in leaf.keys:
            inner = inner[key]
        low: Any = None
        high: Any = None
        if leaf.kind == "box":
            low, high = inner.low, inner.high
            if leaf.dtype.kind == "f":  # values are compared as they are stored
                with np.errstate(over="ignore"):
                    low, high = low.astype(leaf.dtype), high.astype(leaf.dtype)
            low, high = (None if _is_free(bound, leaf.dtype) else bound for bound in (low, high))
        elif leaf.kind == "multi_binary":
            low, high = np.int64(0), np.int64(1)
        else:
            low = np.reshape(leaf.start, leaf.shape)
            high = low + np.reshape(leaf.choices, leaf.shape) - 1
        parts.append(Part(leaf, np.dtype(inner.dtype), low, high))
    return tuple(parts)


class Checks:
    """The checks of one group of environments, and what they have noticed."""

    def __init__(self, name: str, *, first_env: int, strictness: Strictness) -> None:
        self.name = name
        self.notices: list[str] = []
        """What is wrong but can be lived with; each is said once."""
        self._first_env = first_env
        self._strictness = strictness
        self._said: set[str] = set()
        self._ranges: dict[tuple[str, int], Range] = {}  # by part and number of rows

    def fault(self, env: int, text: str) -> EnvironmentFault:
        """Returns the error that names an environment of the group."""
        return EnvironmentFault(f"environment {self._first_env + env} ({self.name}): {text}")

    def raised(self, env: int, call: Call, error: BaseException) -> EnvironmentFault:
        """Returns the error for an exception that an environment's own code raised."""
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}:{last.lineno}"
        line = f": {last.line}" if last.line else ""
        return self.fault(env, f"{call} raised {error_text(error)} ({place}{line})")

    def observations(
        self,
        part: Part,
        values: Sequence[Any],
        envs: Sequence[int],
        call: Call,
        out: NDArray[Any],
    ) -> None:
        """Writes one part of all observations as it is stored.

        Args:
            part: what it must be.
            values: whole observations.
            envs: whose they are.
            call: which method returned them.
            out: [N, *shape] in the dtype of the leaf.

        Raises:
            EnvironmentFault: what cannot be used, or in the strict setting is not as declared.
        """
        if part.leaf.keys:
            values = self._at(part.leaf, values, envs, call)
        self.column(part, values, envs, call, out)

    def column(
        self,
        part: Part,
        values: Any,
        envs: Sequence[int],
        call: Call,
        out: NDArray[Any],
    ) -> None:
        """Does the same for values [N, *shape] of the part alone."""
        leaf = part.leaf
        try:
            array = np.array(values)
        except (ValueError, TypeError, RuntimeError):
            array = np.empty(0, np.object_)
        if array.shape[1:] != leaf.shape or array.dtype.kind not in "fiub":
            raise self._wrong_form(part, values, envs, call)
        if array.dtype != part.declared:
            self._judge_dtype(part, array, values, envs, call)
        if array.dtype == leaf.dtype:
            out[...] = array
        else:
            with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is checked
                np.copyto(out, array, casting="unsafe")
            if leaf.dtype.kind == "f":
                array = out
            elif self._strictness != "off" and not np.array_equal(out, array):
                self._ensure_held(part, array, out, envs, call)
        if self._strictness != "off" and not self._is_good(part, array):
            self._find_bad(part, array, values, envs, call)
        if any(leaf.start):
            out -= np.reshape(leaf.start, leaf.shape)

    def rewards(self, values: Sequence[Any], envs: Sequence[int], out: NDArray[np.float32]) -> None:
        """Writes rewards [N].

        Raises:
            EnvironmentFault: one is not a finite number.
        """
        array = _scalars(values)
        if array is not None:
            with contextlib.suppress(FloatingPointError, RuntimeWarning):  # it is looked at below
                out[...] = array
                if self._strictness == "off" or _all_finite(out):
                    return
        for row, (env, value) in enumerate(zip(envs, values, strict=True)):
            one = _scalar(value)
            with np.errstate(over="ignore"):
                number = np.float32(np.nan if one is None else one)
            if one is None or not (np.isfinite(number) or self._strictness == "off"):
                raise self.fault(
                    env,
                    f"step returned the reward {show(value)}, which is not a finite number: "
                    "return one, such as 1.0, or float(reward)",
                )
            if np.ndim(value):
                text = f"step returned the reward {show(value)} of shape {np.shape(value)}"
                self._notice(env, "shape of rewards", f"{text}, which is not a number")
            out[row] = number

    def flags(self, name: str, values: Sequence[Any], envs: Sequence[int]) -> NDArray[np.bool_]:
        """Returns terminated or truncated as bool [N].

        Raises:
            EnvironmentFault: one is neither a bool, nor 0 or 1.
        """
        array = _scalars(values)
        if array is not None and array.dtype == np.bool_:
            return array
        flags = np.empty(len(values), np.bool_)
        for row, (env, value) in enumerate(zip(envs, values, strict=True)):
            one = _scalar(value)
            text = f"step returned {name} = {show(value)}, which is not a bool"
            if one is None or one not in (0, 1):
                raise self.fault(env, f"{text}: return True or False")
            if one.dtype != np.bool_ or np.ndim(value):
                self._notice(env, f"{name} dtype", text)
            flags[row] = one
        return flags

    def masks(self, masks: Any, choices: Sequence[int], envs: Sequence[int]) -> NDArray[np.bool_]:
        """Returns action masks as bool [N, A], A = the sum of `choices`.

        Raises:
            EnvironmentFault: one is missing, has another size, is no mask of 0 and 1, or allows no
                choice.
        """
        found = np.empty((len(envs), sum(choices)), np.bool_)
        if isinstance(masks, np.ndarray) and _are_masks(masks, choices):
            found[...] = masks
            return found
        for row, (env, given) in enumerate(zip(envs, masks, strict=True)):
            try:
                found[row] = mask_flags(given, choices)
            except ValueError as error:
                raise self.fault(env, str(error)) from error
        return found

    def _at(
        self, leaf: tree.Leaf, values: Sequence[Any], envs: Sequence[int], call: Call
    ) -> list[Any]:
        """Returns what every observation has where the leaf is."""
        found: list[Any] = []
        try:
            if len(leaf.keys) == 1:
                key = leaf.keys[0]
                for value in values:
                    found.append(value[key])  # noqa: PERF401 - its length says who broke it
            else:
                for value in values:
                    found.append(tree.part_of(leaf, value))  # noqa: PERF401
        except (KeyError, IndexError, TypeError) as error:
            row = len(found)
            text = f"{call} returned an observation without {leaf.path!r}: {show(values[row])}"
            raise self.fault(envs[row], text) from error
        return found

    def _wrong_form(
        self, part: Part, values: Sequence[Any], envs: Sequence[int], call: Call
    ) -> EnvironmentFault:
        """Returns the error for the first row that is no array of numbers of the right shape."""
        shape, what = part.leaf.shape, _what(part.leaf)
        for env, value in zip(envs, values, strict=True):
            try:
                array = np.array(value)
            except (ValueError, TypeError):
                array = np.empty(0, np.object_)
            if array.dtype.kind not in "fiub":
                return self.fault(
                    env, f"{call} returned {what} that is not an array of numbers: {show(value)}"
                )
            if array.shape != shape:
                text = f"{call} returned {what} of shape {array.shape}, but its space says {shape}"
                return self.fault(env, f"{text}: {show(value)}")
        return self.fault(envs[0], f"{call} returned {what} that cannot be read")

    def _judge_dtype(
        self,
        part: Part,
        array: NDArray[Any],
        values: Sequence[Any],
        envs: Sequence[int],
        call: Call,
    ) -> None:
        """Says so if the conversion to the declared dtype can lose something."""
        topic = f"dtype of {part.leaf.path}"
        chosen = part.leaf.kind != "box" and array.dtype.kind in "iu"
        if not (chosen or topic in self._said or np.can_cast(array.dtype, part.declared)):
            for env, value in zip(envs, values, strict=True):
                dtype = np.asarray(value).dtype
                if not np.can_cast(dtype, part.declared):
                    text = f"{call} returned {_what(part.leaf)} of {dtype}, but its space says "
                    self._notice(env, topic, f"{text}{part.declared}")
                    break

    def _ensure_held(
        self,
        part: Part,
        array: NDArray[Any],
        stored: NDArray[Any],
        envs: Sequence[int],
        call: Call,
    ) -> None:
        """Refuses a number that the declared integers cannot say; of NaN others will speak."""
        for row, *index in np.argwhere((stored != array) & np.isfinite(array)):
            raise self.fault(
                envs[row],
                f"{call} returned {_what(part.leaf)} of {array.dtype} with "
                f"{array[row][tuple(index)]} at index {tuple(map(int, index))}, which the "
                f"{part.declared} of its space cannot hold: return {part.declared}, or declare a "
                f"Box of {array.dtype} with bounds that hold it",
            )

    def _is_good(self, part: Part, array: NDArray[Any]) -> bool:
        """Whether there is surely nothing to say of an array's values; asked for each step."""
        bounded = part.low is not None or part.high is not None
        if not bounded or (self._said and f"range of {part.leaf.path}" in self._said):
            return array.dtype.kind != "f" or _all_finite(array)
        if array.size > _SMALL:
            return False
        key = part.leaf.path, len(array)
        if key not in self._ranges:
            self._ranges[key] = _range(part, array)
        low, high, inside = self._ranges[key]
        np.greater_equal(array, low, inside[0])
        np.less_equal(array, high, inside[1])
        return bool(np.count_nonzero(inside) == inside.size)

    def _find_bad(
        self,
        part: Part,
        array: NDArray[Any],
        values: Sequence[Any],
        envs: Sequence[int],
        call: Call,
    ) -> None:
        """Looks for NaN, infinity, and numbers out of their range."""
        what = f"{call} returned {_what(part.leaf)}"
        if array.dtype.kind == "f" and not _all_finite(array):
            row, *index = (int(i) for i in np.argwhere(~np.isfinite(array))[0])
            bad = array[row][tuple(index)]
            text = f"{what} with {bad} at index {tuple(index)}: {show(values[row])}"
            raise self.fault(envs[row], text)
        topic = f"range of {part.leaf.path}"
        if topic in self._said:
            return
        for bound, side, compare in (
            (part.low, "below", np.less),
            (part.high, "above", np.greater),
        ):
            if bound is None:
                continue
            outside = compare(array, bound)
            if np.count_nonzero(outside):
                row, *index = (int(i) for i in np.argwhere(outside)[0])
                limit = np.broadcast_to(bound, array.shape[1:])[tuple(index)]
                bad = array[row][tuple(index)]
                text = f"{what} with {bad} at index {tuple(index)}, {side} the {limit} of its space"
                if part.leaf.choices:  # no network has an input for a choice that is not there
                    raise self.fault(envs[row], text)
                self._notice(envs[row], topic, f"{text}: {show(values[row])}")
                return

    def _notice(self, env: int, topic: str, text: str) -> None:
        """Says something once, or refuses it in the strict setting."""
        if self._strictness == "off" or topic in self._said:
            return
        fault = self.fault(env, text)
        if self._strictness == "strict":
            raise fault
        self._said.add(topic)
        self.notices.append(str(fault))


class Translated:
    """Around code that is not ours: whatever it raises becomes an error that says whose it is."""

    def __init__(self, say: Callable[[BaseException], HeadraceError]) -> None:
        self._say = say

    def __enter__(self) -> None:
        return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, HeadraceError):
            return
        # A worker must not end in silence because an environment calls sys.exit.
        if isinstance(error, Exception | SystemExit):
            raise self._say(error) from error


def error_text(error: BaseException) -> str:
    """Returns an exception as text that fits into a sentence."""
    return f"{type(error).__name__}: {_in_one_line(str(error), 4 * _MOST_SHOWN)}"


def show(value: Any) -> str:
    """Returns a value as text that fits into a sentence."""
    if isinstance(value, np.ndarray):
        text = np.array2string(value, separator=", ", threshold=12, edgeitems=3)
    else:
        text = repr(value)
    return _in_one_line(text, _MOST_SHOWN)


def _in_one_line(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[:most]}…"


def _what(leaf: tree.Leaf) -> str:
    return f"an observation part {leaf.path!r}" if leaf.path else "an observation"


def mask_flags(given: Any, choices: Sequence[int]) -> NDArray[np.bool_]:
    """Returns an action mask as bool [A], A = the sum of `choices`.

    Args:
        given: Flags of 0 and 1 of any kind, in one array or in one for each choice.
        choices: How many there are, of each number of an action.

    Raises:
        ValueError: it has another size, other values, or allows nothing of some choice.
    """
    size, mask = sum(choices), given
    try:
        if isinstance(mask, tuple | list) and mask and np.ndim(mask[0]):
            mask = np.concatenate(mask)
        mask = np.asarray(mask)
    except (ValueError, TypeError, RuntimeError):
        mask = np.empty(0, np.object_)
    if mask.size != size or mask.dtype.kind not in "fiub":
        raise ValueError(f"the action_mask must have {size} flags, not {show(given)}")
    if mask.dtype.kind != "b" and not ((mask == 0) | (mask == 1)).all():
        raise ValueError(
            f"the action_mask must be 1 where an action is allowed, else 0, not {show(given)}: of "
            "one that is added to logits, give mask > -1"
        )
    flags: NDArray[np.bool_] = mask.reshape(size).astype(np.bool_)
    starts = [0] if len(choices) == 1 else np.cumsum([0, *choices[:-1]])
    if not np.logical_or.reduceat(flags, starts).all():
        raise ValueError(f"the action_mask allows no action: {show(flags)}")
    return flags


def _are_masks(masks: NDArray[Any], choices: Sequence[int]) -> bool:
    """Whether there is nothing to say of masks [N, A]."""
    if masks.ndim != 2 or masks.shape[1] != sum(choices) or masks.dtype.kind not in "iub":
        return False
    starts = np.cumsum([0, *choices[:-1]])
    is_binary = masks.dtype.kind == "b" or ((masks == 0) | (masks == 1)).all()
    return bool(is_binary and np.logical_or.reduceat(masks, starts, axis=1).all())


def _scalars(values: Sequence[Any]) -> NDArray[Any] | None:
    """Returns numbers or bools as an array [N]; None if there is anything else among them."""
    try:
        array = np.array(values)
    except (ValueError, TypeError, RuntimeError):
        return None
    return array if array.ndim == 1 and array.dtype.kind in "fiub" else None


def _scalar(value: Any) -> NDArray[Any] | None:
    """Returns one number or bool as an array [], also of an array that has one; None else."""
    if isinstance(value, list | tuple):
        return None
    try:
        array = np.array(value)
    except (ValueError, TypeError, RuntimeError):  # such as a tensor with a gradient
        return None
    return array.reshape(()) if array.size == 1 and array.dtype.kind in "fiub" else None


def _all_finite(array: NDArray[Any]) -> bool:
    """Whether there is no NaN and no infinity; the square of the norm is the quickest way to ask.

    It may be infinite where they are only large, so then they are looked at one by one.
    """
    flat = array.reshape(-1)
    return math.isfinite(flat.dot(flat)) or bool(np.isfinite(flat).all())


def _range(part: Part, array: NDArray[Any]) -> Range:
    """Returns the bounds for each number of an array; what is not finite is outside."""
    least: Any = -np.inf
    greatest: Any = np.inf
    if array.dtype.kind == "f":
        greatest = np.finfo(array.dtype).max
        least = -greatest
    low = least if part.low is None else np.maximum(part.low, least)
    high = greatest if part.high is None else np.minimum(part.high, greatest)
    low, high = (np.broadcast_to(bound, array.shape).copy() for bound in (low, high))
    return Range(low, high, np.empty((2, *array.shape), np.bool_))


def _is_free(bound: NDArray[Any], dtype: np.dtype[Any]) -> bool:
    """Whether a bound forbids nothing that the dtype can say."""
    if dtype.kind == "f":
        return bool(np.isinf(bound).all())
    if dtype.kind == "b":
        return True
    limits = np.iinfo(dtype)
    return bool((bound == limits.min).all() or (bound == limits.max).all())
