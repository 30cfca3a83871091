"""Final observations of episodes that met the clock: few, so they lie in a table of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.rows import upload, write_rows


class FinalTable:
    """Frames and values by place; doubles when it is full."""

    def __init__(self, frame: Tensor) -> None:
        """Starts with one place for frames like `frame`, on its device."""
        self.frames = torch.zeros_like(frame).unsqueeze(0)  # [places, ...]
        self.value = torch.zeros(1, device=frame.device)  # [places]
        self._free = np.zeros(1, np.int64)  # places that nobody has

    @property
    def nbytes(self) -> int:
        """Bytes of the table."""
        return self.frames.nbytes + self.value.nbytes + self._free.nbytes

    def add(self, frames: Tensor, value: Tensor) -> NDArray[np.int64]:
        """Keeps frames [f, ...] and values [f]; returns their places."""
        while len(self._free) < len(frames):
            size = len(self.frames)
            self.frames = torch.cat([self.frames, torch.zeros_like(self.frames)])
            self.value = torch.cat([self.value, torch.zeros_like(self.value)])
            self._free = np.concatenate([self._free, np.arange(size, 2 * size)])
        place, self._free = self._free[: len(frames)], self._free[len(frames) :].copy()
        at = upload(place, self.frames.device)
        write_rows(self.frames, at, frames)
        write_rows(self.value, at, value)
        return place

    def release(self, place: NDArray[np.int64]) -> None:
        """Gives places [n] back."""
        self._free = np.concatenate([self._free, place])

    def state_dict(self) -> dict[str, Any]:
        """Returns everything."""
        return {"frames": self.frames, "value": self.value, "free": self._free}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave, whatever size it has."""
        device = self.frames.device
        # Copies: the table is written in place, and `state` may be that of another replay.
        self.frames = state["frames"].to(device, copy=True)
        self.value = state["value"].to(device, copy=True)
        self._free = state["free"].copy()
