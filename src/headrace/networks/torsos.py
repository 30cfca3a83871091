"""Torsos: stacked observations [N, K, ...] as the environment gives them, to features [N, F].

Shape suffixes: N = rows, K = stacked frames, C = channels (K times the colours), H and W = pixels.

Images stay as they are until a convolution needs them and are laid out channels last, which the
kernels for bfloat16 want: several times faster than channels first. The 1/255 that maps bytes to
[0, 1] is folded into the first weight where it is used: each integer up to 255 is exact in
bfloat16, its 255th is not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headrace.networks.heads import orthogonal
from headrace.networks.normalizer import Arrange, PixelNormalizer

NATURE_CONVS = ((32, 8, 4), (64, 4, 2), (64, 3, 1))  # channels, kernel, stride
SHALLOW_CONVS = ((16, 8, 4), (32, 4, 2))
DEEP_CHANNELS = (16, 32, 32)
FOOTBALL_CHANNELS = (16, 32, 32, 32)  # SEED RL's network for Google Research Football

Activation = Literal["relu", "tanh"]


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype to convert an input to: autocast's where it is active, else that of the weight."""
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


def merge_channels(observation: Tensor, rows: int = 0) -> Tensor:
    """Makes [N, C, H, W] of stacked frames [N, K, *frame], whose heights are axis `rows`."""
    return observation.movedim((2 + rows, 3 + rows), (-2, -1)).flatten(1, -3)


def space_to_depth(image_NCHW: Tensor) -> Tensor:
    """Moves blocks of 4 x 4 pixels into channels: uint8 [N, 16 C, H/4, W/4], channels last.

    Channels are ordered by (channel, row in block, column in block).
    """
    N, C, H, W = image_NCHW.shape
    # Four neighbours travel as one int32, and whole rows move before a plain transpose: on a CPU 13
    # times faster than a permutation of bytes, 2.5 times faster than one copy of permuted words.
    words = image_NCHW.contiguous().view(torch.int32).view(N, C, H // 4, 4, W // 4)
    rows = words.transpose(1, 2).reshape(N * (H // 4), 4 * C, W // 4)
    blocks = rows.transpose(1, 2).contiguous().view(torch.uint8)
    return blocks.view(N, H // 4, W // 4, 16 * C).permute(0, 3, 1, 2)


def blocks_of(image_NCHW: Tensor) -> Tensor:
    """`space_to_depth` of any dtype, for what is small."""
    N, C, H, W = image_NCHW.shape
    blocks = image_NCHW.reshape(N, C, H // 4, 4, W // 4, 4).permute(0, 2, 4, 1, 3, 5)
    return blocks.reshape(N, H // 4, W // 4, 16 * C).permute(0, 3, 1, 2)


def channels_last(image_NCHW: Tensor) -> Tensor:
    """Lays an image out channels last."""
    return image_NCHW.contiguous(memory_format=torch.channels_last)


def stacked_constants(constants: Tensor, channels: int) -> Tensor:
    """Repeats constants [2, colours, H, W] for every frame of a stack: [2, C, H, W].

    Colours of one frame lie together, as `merge_channels` lays them.
    """
    return constants.repeat(1, channels // constants.shape[1], 1, 1)


def _in_blocks(constants: Tensor, channels: int) -> Tensor:
    return blocks_of(stacked_constants(constants, channels))


def _in_channels_last(constants: Tensor, channels: int) -> Tensor:
    return channels_last(stacked_constants(constants, channels))


def _floats(
    image: Tensor,
    dtype: torch.dtype,
    normalizer: PixelNormalizer | None,
    channels: int,
    arrange: Arrange,
) -> Tensor:
    """Converts pixels that `arrange` laid out; `channels` are the image's own."""
    if normalizer is None:
        return image.to(dtype)
    return normalizer.normalized(image, normalizer.arranged(arrange, channels), dtype)


class ImageConv(nn.Conv2d):
    """`nn.Conv2d` of images scaled to [0, 1]; parameters and initialisation are its own.

    A kernel of 8 with stride 4 equals a kernel of 2 with stride 1 after `space_to_depth`, which has
    16 times the channels and so fills the matrix units; of bytes that is done.
    """

    high = 255.0
    """The number in an image that stands for 1."""

    def forward(self, input: Tensor, normalizer: PixelNormalizer | None = None) -> Tensor:
        """Convolves [N, C, H, W] of any dtype, scaled to [0, 1] or normalised."""
        dtype = compute_dtype(self.weight)
        weight = self.weight * (1.0 / self.high) if normalizer is None else self.weight
        in_blocks = input.shape[2] % 4 == 0 and input.shape[3] % 4 == 0
        if self._is_blocky and in_blocks and input.dtype == torch.uint8:
            # Rearranging this tiny tensor at each use keeps the parameter an ordinary one.
            weight = weight.reshape(*weight.shape[:2], 2, 4, 2, 4).permute(0, 1, 3, 5, 2, 4)
            image = _floats(space_to_depth(input), dtype, normalizer, input.shape[1], _in_blocks)
            return F.conv2d(image, weight.flatten(1, 3), self.bias)
        image = _floats(channels_last(input), dtype, normalizer, input.shape[1], _in_channels_last)
        return F.conv2d(image, weight, self.bias, self.stride, self.padding)

    @property
    def _is_blocky(self) -> bool:
        """Whether this is the kernel of 8 with stride 4 that `space_to_depth` speeds up."""
        return (self.kernel_size, self.stride, self.padding) == ((8, 8), (4, 4), (0, 0))


def _set_high(stem: nn.Module, high: float) -> None:
    assert isinstance(stem, ImageConv)
    stem.high = high


class ConvTorso(nn.Module):
    """Convolutions without padding, then one hidden layer: the "nature" and the shallow network."""

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        convs: Sequence[tuple[int, int, int]],
        features: int,
        *,
        normalizer: PixelNormalizer | None = None,
        layer_norm: bool = False,
        rows: int = 0,
        high: float = 255.0,
    ) -> None:
        """Makes the layers.

        Args:
            image_shape: [C, H, W] of all frames of a stack together.
            convs: Channels, kernel and stride of each convolution.
            features: What the hidden layer gives.
            normalizer: Of single frames; None to scale them to [0, 1].
            layer_norm: Whether channels and pixels are normalised together after every layer, with
                a gain per channel.
            rows: The axis of a frame that is its height; that of the width follows.
            high: The number that becomes 1.
        """
        super().__init__()
        self.normalizer, self.rows = normalizer, rows
        self.norms = nn.ModuleList()
        in_channels, height, width = image_shape
        self.convs = nn.ModuleList()
        for index, (channels, kernel, stride) in enumerate(convs):
            conv = nn.Conv2d if index else ImageConv
            self.convs.append(conv(in_channels, channels, kernel, stride))
            in_channels = channels
            height, width = ((size - kernel) // stride + 1 for size in (height, width))
        self.hidden = nn.Linear(in_channels * height * width, features)
        # Games change few pixels: at PyTorch's smaller start, the features of any two frames are
        # all but equal, and value and policy learn little from them (docs/log.md).
        if layer_norm:
            self.norms.extend(nn.GroupNorm(1, channels) for channels, _, _ in convs)
            self.norms.append(nn.LayerNorm(features))
        for layer in (*self.convs, self.hidden):
            orthogonal(layer, scale=math.sqrt(2.0))
        _set_high(self.convs[0], high)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, observation: Tensor) -> Tensor:
        """Encodes stacked frames [N, K, *frame], such as uint8 [N, K, H, W, colours]."""
        first, *others = self.convs
        x = self._normal(first(merge_channels(observation, self.rows), self.normalizer), 0).relu_()
        for index, conv in enumerate(others):
            x = self._normal(conv(x), index + 1).relu_()
        return self._normal(self.hidden(flatten_channels_last(x)), len(self.convs)).relu_()

    def _normal(self, x: Tensor, layer: int) -> Tensor:
        return self.norms[layer](x) if len(self.norms) else x

    def observe(self, frames: Tensor) -> None:
        """Merges single frames [..., *frame] into the statistics, if any."""
        if self.normalizer is not None:
            self.normalizer.observe(frames)


class ResidualBlock(nn.Module):
    """Two convolutions around a skip, activated before each."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Keeps the shape [N, C, H, W]."""
        return x + self.second(self.first(x.relu()).relu_())  # type: ignore[no-any-return]


class DeepTorso(nn.Module):
    """Residual sections that halve the image: 15 convolutions in IMPALA (figure 3, right)."""

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        features: int = 256,
        *,
        channels: Sequence[int] = DEEP_CHANNELS,
        normalizer: PixelNormalizer | None = None,
        rows: int = 0,
        high: float = 255.0,
    ) -> None:
        """Takes the channels of every section; the rest is as in `ConvTorso`."""
        super().__init__()
        self.normalizer, self.rows = normalizer, rows
        in_channels, height, width = image_shape
        self.convs = nn.ModuleList()
        self.blocks = nn.ModuleList()
        for index, width_out in enumerate(channels):
            conv = nn.Conv2d if index else ImageConv
            self.convs.append(conv(in_channels, width_out, 3, padding=1))
            self.blocks.append(nn.Sequential(ResidualBlock(width_out), ResidualBlock(width_out)))
            in_channels = width_out
            height, width = (height + 1) // 2, (width + 1) // 2
        self.hidden = nn.Linear(in_channels * height * width, features)
        _set_high(self.convs[0], high)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, observation: Tensor) -> Tensor:
        """Encodes stacked frames [N, K, *frame], such as uint8 [N, K, H, W, colours]."""
        x = self.convs[0](merge_channels(observation, self.rows), self.normalizer)
        for index, blocks in enumerate(self.blocks):
            x = self.convs[index](x) if index else x
            x = blocks(F.max_pool2d(x, 3, stride=2, padding=1))
        return self.hidden(flatten_channels_last(x.relu())).relu_()  # type: ignore[no-any-return]

    def observe(self, frames: Tensor) -> None:
        """As `ConvTorso.observe`."""
        if self.normalizer is not None:
            self.normalizer.observe(frames)


class MlpTorso(nn.Module):
    """Hidden layers over the flattened observation, in float32 unless `products` says otherwise.

    Positions and velocities carry more than the 8 bits of bfloat16, so the first layer never runs
    in it, and autocast changes nothing here: narrow layers gain nothing, and wide ones are a
    decision of whoever trains them. With tanh they start as published for continuous control:
    orthogonal, scaled by the root of 2 (Huang et al. 2022, "The 37 implementation details of
    proximal policy optimization").
    """

    def __init__(
        self,
        inputs: int,
        sizes: Sequence[int] = (64, 64),
        *,
        scale: float = 1.0,
        activation: Activation = "relu",
        layer_norm: bool = False,
    ) -> None:
        """Takes the length of one stacked observation, hidden sizes and a factor for the input."""
        super().__init__()
        self.scale = scale
        self.activation = activation
        self.products = torch.float32
        """Of the matrix products between hidden layers; sums and all else are float32."""
        layers = [nn.Linear(a, b) for a, b in pairwise((inputs, *sizes))]
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList(nn.LayerNorm(size) for size in sizes if layer_norm)
        if activation == "tanh":
            for layer in layers:
                orthogonal(layer, scale=math.sqrt(2.0))

    def forward(self, observation: Tensor) -> Tensor:
        """Encodes [N, K, ...] of any dtype."""
        x = observation.flatten(1).float() * self.scale
        with torch.autocast(observation.device.type, enabled=False):
            for index, layer in enumerate(self.layers):
                if index and self.products != torch.float32 and isinstance(layer, nn.Linear):
                    x = low_product(x, layer.weight.t(), self.products) + layer.bias
                else:
                    x = layer(x)
                if len(self.norms):
                    x = self.norms[index](x)
                x = x.tanh_() if self.activation == "tanh" else x.relu_()
        return x


def low_product(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns x @ weight, batched or not, of factors rounded to `dtype`; float32."""
    return torch.matmul(x.to(dtype), weight.to(dtype)).float()


def flatten_channels_last(x_NCHW: Tensor) -> Tensor:
    """Flattens to [N, H W C]: a view of what lies channels last, where [N, C H W] would copy."""
    return x_NCHW.permute(0, 2, 3, 1).flatten(1)
