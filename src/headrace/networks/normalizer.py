"""Normalisation of observations by what was seen so far, as part of the model.

Moments are buffers, so that they go wherever weights go: to the server, to workers, into
checkpoints, to `headrace.load`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from headrace.algorithms.base import ALONE, Learners
from headrace.errors import ConfigError
from headrace.ops.normalization import Moments, merged, no_moments, normalized
from headrace.specs import EnvSpec

_PIXEL_LIMIT = 5.0
_PIXEL_EPSILON = 1e-5
_CACHED_ROWS = 8
"""Images whose floats a core's cache holds: four stacked frames take 0.9 MB."""

Arrange = Callable[[Tensor, int], Tensor]
"""Lays constants [2, colours, H, W] of a frame out for an image of so many channels."""


class _Kept(NamedTuple):
    """Constants, and what they were made of."""

    mean: Tensor
    of: tuple[Any, ...]
    constants: Tensor


@runtime_checkable
class Observer(Protocol):
    """A part of a network, or a network, that keeps statistics of what it was shown."""

    def observe(self, frames: Tensor) -> None:
        """Merges single frames [..., *observation] as the environment gave them."""


class ObservationNormalizer(nn.Module):
    """Subtracts the mean and divides by the deviation of every feature of one frame.

    Before anything was observed it is the identity.
    """

    total: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        """Takes the shape of one frame."""
        super().__init__()
        self.learners: Learners = ALONE  # whose frames are observed together; see `Algorithm`
        for name, value in no_moments(shape)._asdict().items():
            self.register_buffer(name, value)

    def forward(self, frames: Tensor) -> Tensor:
        """Normalises frames [..., *shape]: statistics are the same for all frames of a stack."""
        return torch.where(self.total > 0, normalized(frames, self._moments()), frames.float())

    @torch.no_grad()
    def observe(self, frames: Tensor) -> None:
        """Merges frames [..., *shape] into the statistics, in place."""
        rows = frames.reshape(-1, *self.mean.shape)
        new = merged(self._moments(), rows, self.learners)
        for buffer, value in zip(self._moments(), new, strict=True):
            buffer.copy_(value)

    def _moments(self) -> Moments:
        return Moments(self.total, self.mean, self.variance)


class PixelNormalizer(ObservationNormalizer):
    """The same for images, and frames of bytes: every pixel has a mean and a deviation.

    What never changes vanishes, and the few pixels that matter stand out. Clipped to +-5, with
    1e-5 added to the variance of pixels scaled to [0, 1], as rl_games does (Makoviichuk and
    Makoviychuk, "rl-games", its RunningMeanStd). Before anything was observed it scales to [0, 1].
    """

    def __init__(self, shape: tuple[int, ...], *, high: float = 255.0, rows: int = 0) -> None:
        """Takes the shape of one frame, the largest number, and the axis of an image's height."""
        super().__init__(shape)
        self.high, self.rows = high, rows
        self.variance.fill_(high**2)
        self._kept: _Kept | None = None

    def forward(self, frames: Tensor) -> Tensor:
        """Normalises [N, ..., *shape] to float32."""
        return self.normalized(frames, self.constants(), torch.float32)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what is kept: it belongs to these very tensors, not to a copy's."""
        return {**self.__dict__, "_kept": None}

    def constants(self) -> Tensor:
        """Returns scale and shift [2, *shape] float32 of a pixel p: p * scale + shift."""
        scale = (self.variance + _PIXEL_EPSILON * self.high**2).rsqrt()
        return torch.stack((scale, -self.mean * scale)).float()

    def arranged(self, arrange: Arrange, channels: int) -> Tensor:
        """Returns `constants` as `arrange` makes them fit an image of `channels`.

        On a CPU they are kept until the statistics change: a small batch would take a fifth of its
        time to make them again. Captured and compiled code makes them itself.
        """
        if self.mean.is_cuda or torch.compiler.is_compiling():
            return arrange(self._planes(), channels)
        of = (self.mean._version, self.variance._version, arrange, channels)
        kept = self._kept
        if kept is None or kept.mean is not self.mean or kept.of != of:
            kept = self._kept = _Kept(self.mean, of, arrange(self._planes(), channels))
        return kept.constants

    def _planes(self) -> Tensor:
        """Returns `constants` of an image as [2, colours, H, W]."""
        constants = self.constants().movedim((1 + self.rows, 2 + self.rows), (-2, -1))
        return constants.reshape(2, -1, *constants.shape[-2:])

    @staticmethod
    def normalized(pixels: Tensor, constants: Tensor, dtype: torch.dtype) -> Tensor:
        """Normalises pixels [N, ..., *shape] by constants [2, *shape], in float32."""
        scale, shift = constants
        out = torch.empty_like(pixels, dtype=dtype)
        in_pieces = pixels.device.type == "cpu" and not torch.compiler.is_compiling()
        rows = _CACHED_ROWS if in_pieces else max(1, len(pixels))
        for start in range(0, len(pixels), rows):
            some = slice(start, start + rows)
            x = torch.addcmul(shift, pixels[some].float(), scale)
            out[some] = x.clamp_(-_PIXEL_LIMIT, _PIXEL_LIMIT)
        return out


def frame_normalizer(
    spec: EnvSpec, torso: nn.Module, *, wanted: bool
) -> ObservationNormalizer | None:
    """Returns what normalises frames before they reach `torso`, where that is wanted.

    A torso that observes normalises for itself.

    Raises:
        ConfigError: observations are bytes of several parts, which nothing but a torso can tell
            apart.
    """
    if not wanted or isinstance(torso, Observer):
        return None
    if spec.structure is not None:
        raise ConfigError(
            f"{spec.name}: observations of several parts are normalised by the network structured, "
            f"not before a {type(torso).__name__}: say --no-normalize-observations, or give "
            "that module a method observe(frames)"
        )
    space = spec.observation_space
    if space.dtype == np.uint8:
        return PixelNormalizer(space.shape, high=max(1.0, float(space.high.max())))
    return ObservationNormalizer(space.shape)
