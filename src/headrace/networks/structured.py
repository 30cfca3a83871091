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
from headrace.pictures import Kinds, Picture, picture_of
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
    picture: Picture | None  # what is convolved of it

    @property
    def width(self) -> int:
        """V: numbers that `numbers` makes of one frame."""
        return sum(self.choices) if self.choices else self.size


class StructuredTorso(nn.Module):
    """Images through convolutions, everything else as numbers; then hidden layers over both.

    A discrete part becomes one-hot. Pictures and integers of 8 bits are scaled to [0, 1], other
    numbers are taken as they are; or images and numbers are normalised, where it is asked for.
    """

    def __init__(
        self,
        spec: EnvSpec,
        sizes: Sequence[int],
        *,
        activation: Activation = "relu",
        normalize: bool = False,
        layer_norm: bool = False,
        pictures: Kinds = "any",
    ) -> None:
        """Takes a spec with a `structure`, the hidden layers, and what to normalise.

        Args:
            spec: Of the environment.
            sizes: Of the hidden layers.
            activation: Of these.
            normalize: Whether observations are normalised by what was seen.
            layer_norm: Whether hidden layers are.
            pictures: What is convolved.
        """
        super().__init__()
        if spec.structure is None:
            raise ValueError(f"{spec.name} has no structure")
        parts = [part_of(leaf, pictures) for leaf in tree.leaves(spec.structure)]
        rest = [part for part in parts if part.picture is None]
        stack = spec.frame_stack
        self._images = [part for part in parts if part.picture is not None]
        self._floats = [part for part in rest if part.dtype.is_floating_point]
        self._others = [part for part in rest if not part.dtype.is_floating_point]
        self.encoders = nn.ModuleList(
            _encoder(part.picture, stack, normalize=normalize, layer_norm=layer_norm)
            for part in self._images
            if part.picture is not None
        )
        num_floats = sum(part.size for part in self._floats)
        self.normalizer = ObservationNormalizer((num_floats,)) if normalize and num_floats else None
        self.integer_normalizers = nn.ModuleList(
            _number_normalizer(part, pictures) if normalize and not part.choices else nn.Identity()
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


def part_of(leaf: tree.Leaf, pictures: Kinds = "any") -> Part:
    """Returns what the network needs to know of a leaf."""
    is_bytes = leaf.kind == "box" and leaf.dtype == np.uint8
    return Part(
        dtype=torch.from_numpy(np.empty(0, leaf.dtype)).dtype,
        start=leaf.offset // leaf.dtype.itemsize,
        size=math.prod(leaf.shape),
        shape=leaf.shape,
        choices=leaf.choices,
        scale=1.0 / max(1.0, leaf.high) if is_bytes else 1.0,
        picture=image_of(leaf, pictures),
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


def image_of(leaf: tree.Leaf, pictures: Kinds = "any") -> Picture | None:
    """Returns the picture that goes through convolutions; None of smaller ones and of numbers."""
    picture = picture_of(leaf, pictures)
    return picture if picture is not None and picture.has(_MIN_IMAGE) else None


def _encoder(picture: Picture, stack: int, *, normalize: bool, layer_norm: bool) -> ConvTorso:
    shape, rows, high = picture
    return ConvTorso(
        picture.planes(stack),
        NATURE_CONVS if picture.has(_MIN_NATURE) else SHALLOW_CONVS,
        IMAGE_FEATURES,
        normalizer=PixelNormalizer(shape, high=high, rows=rows) if normalize else None,
        layer_norm=layer_norm,
        rows=rows,
        high=high,
    )


def _number_normalizer(part: Part, pictures: Kinds) -> ObservationNormalizer:
    """Returns what normalises a part as `frame_normalizer` does one that is alone."""
    if part.dtype == torch.uint8 and pictures == "any":
        return PixelNormalizer((part.size,), high=1.0)  # `numbers` has scaled them
    return ObservationNormalizer((part.size,))


def structured(spec: EnvSpec, config: NetworkConfig) -> AnyNet:
    """Hidden layers over all parts of an observation, after convolutions over its images."""

    def torso() -> StructuredTorso:
        return StructuredTorso(
            spec,
            config.hidden_sizes,
            activation=config.activation,
            normalize=config.normalize_observations,
            pictures=config.pictures,
            layer_norm=config.layer_norm,
        )

    return assemble(torso, config.hidden_sizes[-1], spec, config)
