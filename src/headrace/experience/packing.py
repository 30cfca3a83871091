"""An unroll on its way between machines: the columns of one slot as few arrays as they go into.

Columns of one dtype are put one behind the other; both ends have the same table, so nothing needs
to be said of where each begins. Frames go once, never as stacks. Final observations, which have
room for every row but are rare, go only for the rows that were truncated.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.experience.unrolls import UnrollTable

_OF_FINALS = ("finals", "final_masks")


class UnrollFormat:
    """What an unroll of one table looks like on a wire."""

    def __init__(self, table: UnrollTable) -> None:
        """Reads the columns of `table`, which lies in main memory."""
        self._table = table
        columns = table.views(0)
        # Examples: final observations, and their action masks where there are any.
        self._finals = {name: columns.pop(name) for name in _OF_FINALS if name in columns}
        self._groups: dict[np.dtype[Any], dict[str, int]] = {}  # size of each column, by dtype
        for name, column in columns.items():
            self._groups.setdefault(column.dtype, {})[name] = column.size

    @property
    def nbytes(self) -> int:
        """The most bytes that the arrays of one unroll have."""
        nbytes = sum(dtype.itemsize * sum(group.values()) for dtype, group in self._groups.items())
        return nbytes + sum(column[1:].nbytes for column in self._finals.values())

    def describe(self) -> list[list[Any]]:
        """Returns dtypes and sizes, for JSON: equal where two tables have the same columns."""
        groups = [[dtype.str, *group.items()] for dtype, group in self._groups.items()]
        finals = [[name, *column.shape] for name, column in self._finals.items()]
        described: list[list[Any]] = json.loads(json.dumps([*groups, *finals]))
        return described

    def pack(self, slot: int) -> list[NDArray[Any]]:
        """Returns the arrays of an unroll that is full; some are views of its slot."""
        columns = self._table.views(slot)
        arrays = []
        for group in self._groups.values():
            flat = [columns[name].reshape(-1) for name in group]
            arrays.append(flat[0] if len(flat) == 1 else np.concatenate(flat))
        arrays += [columns[name][_finals_at(columns["truncated"])] for name in self._finals]
        return arrays

    def check(self, arrays: Sequence[NDArray[Any]], *, newest: int) -> None:
        """Checks an unroll before it has a slot.

        Args:
            arrays: As they came; truth values are 0 or 1.
            newest: Version of the newest weights that there are.

        Raises:
            ValueError: it is none of this table, or no learner could take it.
        """
        if len(arrays) != len(self._groups) + len(self._finals):
            raise ValueError(f"{len(arrays)} arrays")
        for (dtype, group), array in zip(self._groups.items(), arrays, strict=False):
            wanted = (sum(group.values()),)
            if array.dtype != dtype or array.shape != wanted:
                raise ValueError(f"{array.dtype} {array.shape} in place of {dtype} {wanted}")
        columns = self._cut(arrays)
        count = len(_finals_at(columns["truncated"]))
        for column, final in zip(self._finals.values(), arrays[len(self._groups) :], strict=True):
            dtype, wanted = column.dtype, (count, *column.shape[1:])
            if final.dtype != dtype or final.shape != wanted:
                raise ValueError(f"{final.dtype} {final.shape} in place of {dtype} {wanted}")
        if not all(np.isfinite(array).all() for array in arrays if array.dtype.kind == "f"):
            raise ValueError("numbers that are not finite")
        version = columns["version"]
        if version.min() < 0 or version.max() > newest:
            raise ValueError(f"weights of versions {version.min()}..{version.max()} of {newest}")
        self._check_actions(columns)

    def unpack(
        self, slot: int, arrays: Sequence[NDArray[Any]], *, env_id: int, run_id: int
    ) -> None:
        """Writes arrays that `check` has let pass into a slot."""
        columns = self._cut(arrays)
        finals = dict(zip(self._finals, arrays[len(self._groups) :], strict=True))
        for name, column in self._table.views(slot).items():
            if name in finals:
                column[_finals_at(columns["truncated"])] = finals[name]
            else:
                np.copyto(column.reshape(-1), columns[name])
        of_slot = self._table.of_slot
        of_slot["env_id"][slot], of_slot["run_id"][slot] = env_id, run_id

    def _cut(self, arrays: Sequence[NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Returns the columns, each in one row."""
        columns = {}
        for group, array in zip(self._groups.values(), arrays, strict=False):
            at = 0
            for name, size in group.items():
                columns[name] = array[at : at + size]
                at += size
        return columns

    def _check_actions(self, columns: dict[str, NDArray[Any]]) -> None:
        choices = self._table.action_choices
        # At the start of an episode there is no previous action: -1.
        for name, least in (("action", 0), ("previous_action", -1)) if choices else ():
            action = columns[name].reshape(self._table.rows, len(choices))
            if action.min() < least or (action >= np.array(choices)).any():
                raise ValueError(f"a choice of {name} that there is not")


def _finals_at(truncated: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Rows whose final observation is asked for; that of row 0 went with the unroll before."""
    at = np.flatnonzero(truncated)
    return at[at > 0]
