"""Torso for observations of several parts, which arrive as one row of bytes (`tree`).

Bytes become tensors where the network runs: a view of the row, no copy on the host.

Shape suffixes: N = rows, K = stacked frames, V = numbers of one frame that are no image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from headrace import tree
from headrace.networks.models import NetworkConfig, PolicyValueNet, policy_value_net
from headrace.networks.normalizer import ObservationNormalizer
from headrace.networks.torsos import NATURE_CONVS, SHALLOW_CONVS, Activation, ConvTorso, MlpTorso
from headrace.ops.distributions import one_hot
from headrace.specs import EnvSpec

IMAGE_FEATURES = 256
_MIN_IMAGE, _MIN_NATURE = 20, 36  # pixels that the small and the large convolutions need


class StructuredTorso(nn.Module):
    """Images through convolutions, everything else as numbers; then hidden layers over both.

    A discrete part becomes one-hot. Integers of 8 bits are scaled to [0, 1], other numbers are
    taken as they are, or normalised where they are floats and it is asked for.
    """

    def __init__(
        self,
        spec: EnvSpec,
        sizes: Sequence[int],
        *,
        activation: Activation = "relu",
        normalize: bool = False,
    ) -> None:
        """Takes a spec with a `structure`, the hidden layers, and whether floats are normalised."""
        super().__init__()
        if spec.structure is None:
            raise ValueError(f"{spec.name} has no structure")
        leaves = tree.leaves(spec.structure)
        self._images = [leaf for leaf in leaves if is_image(leaf)]
        self._floats = [leaf for leaf in leaves if _is_float(leaf)]
        self._others = [leaf for leaf in leaves if not is_image(leaf) and not _is_float(leaf)]
        stack = spec.frame_stack
        self.encoders = nn.ModuleList(_encoder(leaf, stack) for leaf in self._images)
        num_floats = sum(_count(leaf) for leaf in self._floats)
        self.normalizer = ObservationNormalizer((num_floats,)) if normalize and num_floats else None
        numbers = num_floats + sum(_width(leaf) for leaf in self._others)
        inputs = IMAGE_FEATURES * len(self._images) + stack * numbers
        self.mlp = MlpTorso(inputs, sizes, activation=activation)

    def forward(self, observation: Tensor) -> Tensor:
        """Encodes uint8 [N, K, nbytes]."""
        rows = observation.contiguous()  # a view as wider numbers needs whole rows
        parts = [
            encoder(unpacked(rows, leaf).view(*rows.shape[:2], *leaf.shape)).float()
            for leaf, encoder in zip(self._images, self.encoders, strict=True)
        ]
        if self._floats:
            floats_NKV = self._float_features(rows)
            if self.normalizer is not None:
                floats_NKV = self.normalizer(floats_NKV)
            parts.append(floats_NKV.flatten(1))
        parts += [_numbers(unpacked(rows, leaf), leaf).flatten(1) for leaf in self._others]
        return self.mlp(torch.cat(parts, dim=1))  # type: ignore[no-any-return]

    def observe(self, frames: Tensor) -> None:
        """Merges uint8 [..., nbytes] into the statistics of the floats, where they are kept."""
        if self.normalizer is not None:
            rows = frames.reshape(-1, 1, frames.shape[-1]).contiguous()
            self.normalizer.observe(self._float_features(rows))

    def _float_features(self, rows: Tensor) -> Tensor:
        return torch.cat([unpacked(rows, leaf) for leaf in self._floats], dim=2).float()


def unpacked(rows: Tensor, leaf: tree.Leaf) -> Tensor:
    """Returns one flattened part [N, K, count] of contiguous rows uint8 [N, K, nbytes], a view."""
    dtype = torch.from_numpy(np.empty(0, leaf.dtype)).dtype
    start = leaf.offset // leaf.dtype.itemsize
    return rows.view(dtype)[..., start : start + _count(leaf)]


def is_image(leaf: tree.Leaf) -> bool:
    """Whether a part goes through convolutions: bytes in [H, W] or [H, W, colours]."""
    is_bytes: bool = leaf.kind == "box" and leaf.dtype == np.uint8
    return is_bytes and len(leaf.shape) in (2, 3) and min(leaf.shape[:2]) >= _MIN_IMAGE


def _is_float(leaf: tree.Leaf) -> bool:
    return leaf.kind == "box" and leaf.dtype.kind == "f"


def _encoder(leaf: tree.Leaf, stack: int) -> ConvTorso:
    height, width, *colours = leaf.shape
    convs = NATURE_CONVS if min(height, width) >= _MIN_NATURE else SHALLOW_CONVS
    return ConvTorso((stack * (colours or [1])[0], height, width), convs, IMAGE_FEATURES)


def _count(leaf: tree.Leaf) -> int:
    return int(np.prod(leaf.shape, dtype=np.int64))


def _width(leaf: tree.Leaf) -> int:
    """Numbers that `_numbers` makes of one frame of a part."""
    return sum(leaf.choices) if leaf.choices else _count(leaf)


def _numbers(part_NKV: Tensor, leaf: tree.Leaf) -> Tensor:
    """Makes float32 [N, K, V] of an unpacked part."""
    if leaf.choices:
        columns = zip(part_NKV.unbind(-1), leaf.choices, strict=True)
        return torch.cat([one_hot(index, count) for index, count in columns], dim=-1)
    scale = 1.0 / max(1.0, leaf.high) if leaf.kind == "box" and leaf.dtype == np.uint8 else 1.0
    return part_NKV.float() * scale


def structured(spec: EnvSpec, config: NetworkConfig) -> PolicyValueNet:
    """Hidden layers over all parts of an observation, after convolutions over its images."""

    def torso() -> StructuredTorso:
        return StructuredTorso(
            spec,
            config.hidden_sizes,
            activation=config.activation,
            normalize=config.normalize_observations,
        )

    return policy_value_net(torso, config.hidden_sizes[-1], spec, config)
