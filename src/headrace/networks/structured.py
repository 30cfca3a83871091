"""Torso for observations of several parts, which arrive as one row of bytes (`tree`).

Bytes become tensors where the network runs: a view of the row, no copy on the host.

Shape suffixes: N = rows, K = stacked frames, D = numbers of one part, V = what is made of
them: one-hots are longer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from headrace import tree
from headrace.networks.config import NetworkConfig
from headrace.networks.models import AnyNet, assemble
from headrace.networks.normalizer import ObservationNormalizer, PixelNormalizer
from headrace.networks.torsos import NATURE_CONVS, SHALLOW_CONVS, Activation, ConvTorso, MlpTorso
from headrace.ops.distributions import one_hot
from headrace.specs import EnvSpec

IMAGE_FEATURES = 256
_MIN_IMAGE, _MIN_NATURE = 20, 36  # pixels that the small and the large convolutions need


class Part(NamedTuple):
    """Where a leaf lies, and what is made of it, in terms that a compiler can trace."""

    dtype: torch.dtype
    start: int  # numbers of that dtype from the start of the row
    size: int  # numbers of one frame
    shape: tuple[int, ...]
    choices: tuple[int, ...]  # of each number that becomes one-hot, else empty
    scale: float

    @property
    def width(self) -> int:
        """V: numbers that `numbers` makes of one frame."""
        return sum(self.choices) if self.choices else self.size


class StructuredTorso(nn.Module):
    """Images through convolutions, everything else as numbers; then hidden layers over both.

    A discrete part becomes one-hot. Integers of 8 bits are scaled to [0, 1], other numbers are
    taken as they are; or images and numbers are normalised, where it is asked for.
    """

    def __init__(
        self,
        spec: EnvSpec,
        sizes: Sequence[int],
        *,
        activation: Activation = "relu",
        normalize: bool = False,
        layer_norm: bool = False,
    ) -> None:
        """Takes a spec with a `structure`, the hidden layers, and what to normalise.

        Args:
            spec: Of the environment.
            sizes: Of the hidden layers.
            activation: Of these.
            normalize: Whether observations are normalised by what was seen.
            layer_norm: Whether hidden layers are.
        """
        super().__init__()
        if spec.structure is None:
            raise ValueError(f"{spec.name} has no structure")
        leaves = tree.leaves(spec.structure)
        stack = spec.frame_stack
        self._images = [part_of(leaf) for leaf in leaves if is_image(leaf)]
        self._floats = [part_of(leaf) for leaf in leaves if is_float(leaf)]
        self._others = [
            part_of(leaf) for leaf in leaves if not is_image(leaf) and not is_float(leaf)
        ]
        self.encoders = nn.ModuleList(
            _encoder(part, stack, normalize=normalize, layer_norm=layer_norm)
            for part in self._images
        )
        num_floats = sum(part.size for part in self._floats)
        self.normalizer = ObservationNormalizer((num_floats,)) if normalize and num_floats else None
        self.integer_normalizers = nn.ModuleList(
            ObservationNormalizer((part.size,)) if normalize and not part.choices else nn.Identity()
            for part in self._others
        )
        numbers_V = num_floats + sum(part.width for part in self._others)
        inputs = IMAGE_FEATURES * len(self._images) + stack * numbers_V
        self.mlp = MlpTorso(inputs, sizes, activation=activation, layer_norm=layer_norm)

    def forward(self, observation: Tensor) -> Tensor:
        """Encodes uint8 [N, K, nbytes]."""
        rows = observation.contiguous()  # a view as wider numbers needs whole rows
        features = [
            encoder(unpacked(rows, part).view(*rows.shape[:2], *part.shape)).float()
            for part, encoder in zip(self._images, self.encoders, strict=True)
        ]
        if self._floats:
            floats_NKV = self._float_features(rows)
            if self.normalizer is not None:
                floats_NKV = self.normalizer(floats_NKV)
            features.append(floats_NKV.flatten(1))
        features += [
            normalizer(numbers(unpacked(rows, part), part)).flatten(1)
            for part, normalizer in zip(self._others, self.integer_normalizers, strict=True)
        ]
        return self.mlp(torch.cat(features, dim=1))  # type: ignore[no-any-return]

    def observe(self, frames: Tensor) -> None:
        """Merges uint8 [..., nbytes] into the statistics, where they are kept."""
        rows = frames.reshape(-1, 1, frames.shape[-1]).contiguous()
        if self.normalizer is not None:
            self.normalizer.observe(self._float_features(rows))
        for part, encoder in zip(self._images, self.encoders, strict=True):
            if isinstance(encoder, ConvTorso):
                encoder.observe(unpacked(rows, part).view(-1, *part.shape))
        for part, normalizer in zip(self._others, self.integer_normalizers, strict=True):
            if isinstance(normalizer, ObservationNormalizer):
                normalizer.observe(numbers(unpacked(rows, part), part))

    def _float_features(self, rows: Tensor) -> Tensor:
        return torch.cat([unpacked(rows, part).float() for part in self._floats], dim=2)


def part_of(leaf: tree.Leaf) -> Part:
    """Returns what the network needs to know of a leaf."""
    is_bytes = leaf.kind == "box" and leaf.dtype == np.uint8
    return Part(
        dtype=torch.from_numpy(np.empty(0, leaf.dtype)).dtype,
        start=leaf.offset // leaf.dtype.itemsize,
        size=math.prod(leaf.shape),
        shape=leaf.shape,
        choices=leaf.choices,
        scale=1.0 / max(1.0, leaf.high) if is_bytes else 1.0,
    )


def unpacked(rows: Tensor, part: Part) -> Tensor:
    """Returns one flattened part [N, K, D] of contiguous rows uint8 [N, K, nbytes], a view."""
    return rows.view(part.dtype)[..., part.start : part.start + part.size]


def numbers(part_NKD: Tensor, part: Part) -> Tensor:
    """Makes float32 [N, K, V] of an unpacked part."""
    if part.choices:
        columns = zip(part_NKD.unbind(-1), part.choices, strict=True)
        return torch.cat([one_hot(index, count) for index, count in columns], dim=-1)
    return part_NKD.float() * part.scale


def is_image(leaf: tree.Leaf) -> bool:
    """Whether a part goes through convolutions: bytes in [H, W] or [H, W, colours]."""
    is_bytes: bool = leaf.kind == "box" and leaf.dtype == np.uint8
    return is_bytes and len(leaf.shape) in (2, 3) and min(leaf.shape[:2]) >= _MIN_IMAGE


def is_float(leaf: tree.Leaf) -> bool:
    """Whether a part may be normalised."""
    return leaf.kind == "box" and leaf.dtype.kind == "f"


def _encoder(part: Part, stack: int, *, normalize: bool, layer_norm: bool) -> ConvTorso:
    height, width, *colours = part.shape
    convs = NATURE_CONVS if min(height, width) >= _MIN_NATURE else SHALLOW_CONVS
    return ConvTorso(
        (stack * math.prod(colours), height, width),
        convs,
        IMAGE_FEATURES,
        normalizer=PixelNormalizer(part.shape) if normalize else None,
        layer_norm=layer_norm,
    )


def structured(spec: EnvSpec, config: NetworkConfig) -> AnyNet:
    """Hidden layers over all parts of an observation, after convolutions over its images."""

    def torso() -> StructuredTorso:
        return StructuredTorso(
            spec,
            config.hidden_sizes,
            activation=config.activation,
            normalize=config.normalize_observations,
            layer_norm=config.layer_norm,
        )

    return assemble(torso, config.hidden_sizes[-1], spec, config)
