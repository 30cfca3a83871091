"""Rows of a table on whatever device it lies."""

from __future__ import annotations

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
