"""Stacks of single frames, rebuilt in one copy, on the device that learns.

A stack is K rows of a table of single frames; a frame from before the episode began is the table's
last one, all zeros. Where frames lie with the learner, the stacks are copied straight from the
ring. From a CPU to a GPU, single frames cross in pinned memory, and are stacked over there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.experience.stacks import stack_index
from headrace.rows import upload


class Stacks(NamedTuple):
    """Stacks, and what they were made from: stack [t, b] is `table[source[t, b]]`."""

    observation: Tensor  # [U, B, K, ...]
    table: Tensor  # [rows, ...] single frames, on the same device
    source: NDArray[np.int64]  # [U, B, K]


class FrameReader:
    """Reads stacks from a table of single frames [rows, ...], the last of which is zeros.

    On a CPU, stacks lie in one of two buffers in turn, and so are good until the read after next:
    memory that is new to the process costs three times as much as the copy into it.
    """

    def __init__(self, frames: Tensor, depth: int) -> None:
        self._frames, self._depth = frames, depth
        self._words = _as_words(frames) if frames.device.type == "cpu" else frames
        self._buffers: list[Tensor] = []

    def read(
        self, row: NDArray[np.int64], reset: NDArray[np.bool_], device: torch.device
    ) -> Stacks:
        """Reads the stacks [U, B] of rows [K - 1 + U, B] of the table, `reset` as they are."""
        if self._frames.device != device:
            return self._read_staged(row, reset, device)
        zero_row = len(self._frames) - 1
        index = stack_index(row, reset, depth=self._depth, zero_row=zero_row)
        if device.type == "cpu":
            out = self._next_buffer(index.size)
            # By words and with `out`, as fast as a plain copy, on all of PyTorch's threads.
            at = torch.from_numpy(index.reshape(-1))
            torch.index_select(self._words, 0, at, out=_as_words(out))
        else:
            out = self._frames.index_select(0, upload(index.reshape(-1), device))
        return Stacks(out.view(*index.shape, *out.shape[1:]), self._frames, index)

    def _read_staged(
        self, row: NDArray[np.int64], reset: NDArray[np.bool_], device: torch.device
    ) -> Stacks:
        """Moves single frames to `device` and stacks them there."""
        table = self._moved(row.reshape(-1), device)
        place = np.arange(row.size).reshape(row.shape)
        index = stack_index(place, reset, depth=self._depth, zero_row=row.size)
        if self._depth == 1:
            out = table[:-1]
        else:
            out = table.index_select(0, upload(index.reshape(-1), device))
        return Stacks(out.view(*index.shape, *out.shape[1:]), table, index)

    def _moved(self, row: NDArray[np.int64], device: torch.device) -> Tensor:
        """Rows [n] and the frame of zeros, on `device`."""
        at = np.append(row, len(self._frames) - 1)
        if self._frames.device.type != "cpu":
            return self._frames.index_select(0, upload(at, self._frames.device)).to(device)
        # PyTorch keeps pinned memory for the next call, once the copy out of it is done.
        out = torch.empty(
            len(at),
            *self._frames.shape[1:],
            dtype=self._frames.dtype,
            pin_memory=device.type == "cuda",
        )
        torch.index_select(self._words, 0, torch.from_numpy(at), out=_as_words(out))
        return out.to(device, non_blocking=True)

    def _next_buffer(self, rows: int) -> Tensor:
        if not self._buffers or len(self._buffers[0]) != rows:
            shape = (rows, *self._frames.shape[1:])
            self._buffers = [torch.empty(shape, dtype=self._frames.dtype) for _ in range(2)]
        self._buffers.reverse()
        return self._buffers[0]


def _as_words(frames: Tensor) -> Tensor:
    """The same memory as [rows, words] of the widest integers that fit into one frame."""
    raw: NDArray[Any] = frames.numpy().reshape(len(frames), -1).view(np.uint8)
    width = next(size for size in (8, 4, 2, 1) if raw.shape[1] % size == 0)
    return torch.from_numpy(raw.view(f"i{width}"))
