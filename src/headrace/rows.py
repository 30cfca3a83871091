"""Rows of a table on whatever device it lies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def write_rows(table: Tensor, index: Tensor, rows: Tensor) -> None:
    """Sets `table[index] = rows`; where `index` [N] has a number twice, either row may stay.

    On a CPU, PyTorch's index_copy_ copies element by element, which for frames of bytes is 17 times
    slower than numpy, which copies whole rows (docs/log.md).
    """
    if table.device.type == "cpu":
        table.numpy()[index.numpy()] = rows.numpy()
    else:
        table.index_copy_(0, index, rows)


def upload(array: NDArray[Any], device: torch.device) -> Tensor:
    """Returns `array` on `device`: its own memory on a CPU, a copy that none waits for on a GPU."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor


def read_later(tensor: Tensor) -> Callable[[], NDArray[Any]]:
    """Starts copying a tensor to the host; what it returns waits for that copy only."""
    if not tensor.is_cuda:
        return tensor.numpy
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()

    def read() -> NDArray[Any]:
        copied.synchronize()
        array: NDArray[Any] = host.numpy()
        return array

    return read
