"""Final observations of episodes that met the clock: few, so they lie in a table of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.rows import upload, write_rows


class FinalTable:
    """Frames, values and action masks by place; doubles when it is full."""

    def __init__(self, frame: Tensor, *, choices: int = 0) -> None:
        """Starts with one place for frames like `frame`, on its device.

        Args:
            frame: An example.
            choices: A, flags of an action mask; 0 for none.
        """
        self.frames = torch.zeros_like(frame).unsqueeze(0)  # [places, ...]
        self.value = torch.zeros(1, device=frame.device)  # [places]
        self.mask: Tensor | None = None  # [places, A]
        if choices:
            self.mask = torch.ones(1, choices, dtype=torch.bool, device=frame.device)
        self._free = np.zeros(1, np.int64)  # places that nobody has

    @property
    def nbytes(self) -> int:
        """Bytes of the table."""
        masks = 0 if self.mask is None else self.mask.nbytes
        return self.frames.nbytes + self.value.nbytes + masks + self._free.nbytes

    def add(self, frames: Tensor, value: Tensor, mask: Tensor | None = None) -> NDArray[np.int64]:
        """Keeps frames [f, ...], values [f] and masks [f, A]; returns their places."""
        while len(self._free) < len(frames):
            size = len(self.frames)
            self.frames = torch.cat([self.frames, torch.zeros_like(self.frames)])
            self.value = torch.cat([self.value, torch.zeros_like(self.value)])
            if self.mask is not None:
                self.mask = torch.cat([self.mask, torch.ones_like(self.mask)])
            self._free = np.concatenate([self._free, np.arange(size, 2 * size)])
        place, self._free = self._free[: len(frames)], self._free[len(frames) :].copy()
        at = upload(place, self.frames.device)
        write_rows(self.frames, at, frames)
        write_rows(self.value, at, value)
        if self.mask is not None and mask is not None:
            write_rows(self.mask, at, mask)
        return place

    def release(self, place: NDArray[np.int64]) -> None:
        """Gives places [n] back."""
        self._free = np.concatenate([self._free, place])

    def state_dict(self) -> dict[str, Any]:
        """Returns everything."""
        state = {"frames": self.frames, "value": self.value, "free": self._free}
        return state if self.mask is None else {**state, "mask": self.mask}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave, whatever size it has."""
        device = self.frames.device
        # Copies: the table is written in place, and `state` may be that of another replay.
        self.frames = state["frames"].to(device, copy=True)
        self.value = state["value"].to(device, copy=True)
        if self.mask is not None:  # one from before there were any allows everything
            mask = state.get("mask", self.mask.new_ones(len(self.value), self.mask.shape[1]))
            self.mask = mask.to(device, copy=True)
        self._free = state["free"].copy()
