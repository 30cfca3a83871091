"""The rows of a replay: frames and what the policy made on one device, flags and rewards here."""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.errors import ConfigError
from headrace.experience.replay_finals import FinalTable
from headrace.experience.replay_layout import HOST_FIELDS, Field, ReplayLayout
from headrace.experience.segments import Segment
from headrace.rows import upload, write_rows

NO_FINAL = -1


class ReplayRows:
    """Columns of all rings, by place; knows nothing of sequences."""

    def __init__(self, layout: ReplayLayout, device: torch.device, folder: Path | None) -> None:
        rows = layout.num_rows
        if folder is None:
            self.frames = _zeros(rows + 1, layout.frame_field, device)
        else:
            self.frames = _mapped(rows + 1, layout.frame_field, folder)
        self._device = self.frames.device
        self.columns = {
            name: _zeros(rows, field, self._device) for name, field in layout.device_fields.items()
        }
        self.recurrent = tuple(
            _zeros(layout.num_slots, field, self._device) for field in layout.recurrent_fields
        )
        self.host: dict[str, NDArray[Any]] = {
            name: np.zeros(rows, dtype) for name, dtype in HOST_FIELDS.items()
        }
        self.host["final"][:] = NO_FINAL
        mask = self.columns.get("action_mask")
        self.finals = FinalTable(self.frames[-1], choices=0 if mask is None else mask.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of everything, the final observations of the moment included."""
        tensors = [self.frames, *self.columns.values(), *self.recurrent]
        arrays = self.host.values()
        own = sum(tensor.nbytes for tensor in tensors) + sum(array.nbytes for array in arrays)
        return own + self.finals.nbytes

    def write(self, at: NDArray[np.int64], fresh: NDArray[np.bool_], segment: Segment) -> None:
        """Writes the rows of segments [n] at places [n, c + 1].

        Row 0 is written where a stream is `fresh` [n]; else it is there already, as the last row of
        the segment before, which knew its final observation.
        """
        self._write_rows(at[:, 1:], segment, slice(None), slice(1, None))
        if fresh.any():
            self._write_rows(at[fresh, 0], segment, np.flatnonzero(fresh), 0)
        if len(segment.final_at):
            which, row = segment.final_at.T
            mask = segment.final_mask
            place = self.finals.add(
                moved(segment.final_frames, self._device),
                moved(segment.final_value, self._device),
                None if mask is None else moved(mask, self._device),
            )
            self.host["final"][at[which, row]] = place

    def write_recurrent(
        self, slot: NDArray[np.int64], which: NDArray[np.int64], segment: Segment
    ) -> None:
        """Keeps the state that was fed to row 0 of segments `which`, for the sequences `slot`."""
        at = upload(slot, self._device)
        for part, state in zip(self.recurrent, segment.recurrent, strict=True):
            source = state.index_select(0, upload(which, state.device))
            write_rows(part, at, moved(source, self._device))

    def column(self, name: str, at: NDArray[np.int64], device: torch.device) -> Tensor:
        """Reads a column at places [.., B], on `device`."""
        column = self.columns[name]
        rows = column.index_select(0, upload(at.reshape(-1), self._device))
        return moved(rows.view(*at.shape, *column.shape[1:]), device)

    def states(self, slot: NDArray[np.int64], device: torch.device) -> tuple[Tensor, ...]:
        """Reads the recurrent states at the starts of sequences [B]."""
        at = upload(slot, self._device)
        return tuple(moved(part.index_select(0, at), device) for part in self.recurrent)

    def final_values(self, place: NDArray[np.int32], device: torch.device) -> Tensor:
        """Values of final observations at places [..]; 0 where there is none."""
        at = upload(np.maximum(place, 0).astype(np.int64).reshape(-1), self._device)
        value = moved(self.finals.value.index_select(0, at).view(place.shape), device)
        return torch.where(upload(place != NO_FINAL, device), value, 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Returns everything."""
        return {
            "frames": self.frames,
            "columns": self.columns,
            "recurrent": list(self.recurrent),
            "host": self.host,
            "finals": self.finals.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        own = [self.frames, *self.columns.values(), *self.recurrent]
        saved = [state["frames"], *map(state["columns"].get, self.columns), *state["recurrent"]]
        if [part.shape for part in own] != [getattr(part, "shape", None) for part in saved]:
            raise ConfigError(
                f"the checkpoint's replay has {len(state['frames']) - 1} rows of frames, or other "
                f"columns than this one with {len(self.frames) - 1}: resume with the settings that "
                "wrote it"
            )
        self.frames.copy_(state["frames"])
        for name, column in self.columns.items():
            column.copy_(state["columns"][name])
        for part, stored in zip(self.recurrent, state["recurrent"], strict=True):
            part.copy_(stored)
        for name, values in self.host.items():
            values[:] = state["host"][name]
        self.finals.load_state_dict(state["finals"])

    def _write_rows(
        self,
        at: NDArray[np.int64],
        segment: Segment,
        which: slice | NDArray[np.int64],
        rows: slice | int,
    ) -> None:
        """Writes `rows` of segments `which` at places [n, ..]; what lay there is gone."""
        old = self.host["final"][at]
        self.finals.release(old[old != NO_FINAL].astype(np.int64))
        self.host["final"][at] = NO_FINAL
        for name, values in segment.host.items():
            self.host[name][at] = values[which, rows]
        place = upload(at, self._device)
        some = which if isinstance(which, slice) else torch.from_numpy(which)
        self._write(self.frames, place, segment.frames[some, rows])
        for name, column in self.columns.items():
            self._write(column, place, segment.columns[name][some, rows])

    def _write(self, table: Tensor, place: Tensor, rows: Tensor) -> None:
        """Sets table[place] = rows, both [n, ..], in the table's dtype."""
        if self._device.type == "cpu":
            # Also where `rows` is a view with gaps: reshaping it would be a copy more.
            table.numpy()[place.numpy()] = rows.cpu().numpy()
        else:
            flat = moved(rows.reshape(-1, *table.shape[1:]), self._device).to(table.dtype)
            write_rows(table, place.view(-1), flat)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns `tensor` on `device`, through pinned memory on its way to a GPU."""
    if tensor.device == device:
        return tensor
    return upload(tensor.numpy(), device) if tensor.device.type == "cpu" else tensor.to(device)


def _zeros(rows: int, field: Field, device: torch.device) -> Tensor:
    shape, dtype = field
    if device.type == "cpu":
        return torch.from_numpy(_pages(rows * prod(shape), dtype).reshape(rows, *shape))
    kind = torch.from_numpy(np.empty(0, dtype)).dtype
    return torch.zeros(rows, *shape, dtype=kind, device=device)


def _pages(count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Zeros in memory of their own, which the system has back when they go.

    It asks for large pages, which random rows need. glibc, told to keep what is freed
    (run/system.py), would keep a replay too.
    """
    block = mmap.mmap(-1, max(1, count * dtype.itemsize))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            block.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(block, dtype, count)


def _mapped(rows: int, field: Field, folder: Path) -> Tensor:
    """Zeros in a file that has no name: it is gone with the process, however that ends.

    Raises:
        ConfigError: the file does not fit into `folder`, or may not be made there.
    """
    shape, dtype = field
    nbytes = rows * prod(shape) * dtype.itemsize
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):
                # A disk that fills up later would end the process with a signal.
                os.posix_fallocate(file.fileno(), 0, nbytes)
            else:
                file.truncate(nbytes)
            mapped = np.memmap(file, dtype, "r+", shape=(rows, *shape))
    except OSError as error:
        raise ConfigError(
            f"the replay's frames need {nbytes / 2**30:.2f} GiB in {folder}: {error.strerror}; "
            "lower --replay-capacity or name another --replay-folder"
        ) from error
    return torch.from_numpy(np.asarray(mapped))
