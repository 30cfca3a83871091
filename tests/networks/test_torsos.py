import pytest
import torch
import torch.nn.functional as F
from torch import nn

from headrace.networks.torsos import (
    NATURE_CONVS,
    SHALLOW_CONVS,
    ConvTorso,
    DeepTorso,
    ImageConv,
    MlpTorso,
    merge_channels,
    space_to_depth,
)


def frames(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("channels", "height", "width"),
    [(4, 84, 84), (3, 72, 96), (1, 8, 12), (4, 86, 85), (2, 84, 90)],
)
def test_the_stem_is_a_convolution_of_scaled_pixels(channels: int, height: int, width: int) -> None:
    conv = ImageConv(channels, 16, 8, 4).double()
    image = frames(5, channels, height, width)
    expected = F.conv2d(image.double() / 255, conv.weight, conv.bias, stride=4)
    output = conv(image)
    torch.testing.assert_close(output, expected)
    ours, plain = (
        torch.autograd.grad(y.square().sum(), list(conv.parameters())) for y in (output, expected)
    )
    torch.testing.assert_close(ours, plain)


def test_the_stem_keeps_the_ordinary_parameters() -> None:
    torch.manual_seed(3)
    ours = ImageConv(4, 32, 8, 4)
    torch.manual_seed(3)
    plain = nn.Conv2d(4, 32, 8, 4)
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_a_padded_first_convolution_is_not_rearranged() -> None:
    conv = ImageConv(3, 16, 3, padding=1).double()
    image = frames(2, 3, 12, 16)
    expected = F.conv2d(image.double() / 255, conv.weight, conv.bias, padding=1)
    torch.testing.assert_close(conv(image), expected)


def test_space_to_depth_moves_blocks_of_a_view() -> None:
    image = frames(3, 6, 8, 12)[:, 1:5]
    torch.testing.assert_close(space_to_depth(image), F.pixel_unshuffle(image, 4), rtol=0, atol=0)


def test_colours_become_channels_frame_by_frame() -> None:
    observation = frames(2, 4, 8, 12, 3)
    merged = merge_channels(observation)
    assert merged.shape == (2, 12, 8, 12)
    assert torch.equal(merged[1, 5], observation[1, 1, :, :, 2])


def plain_features(torso: ConvTorso, observation: torch.Tensor) -> torch.Tensor:
    """The same parameters through the operations of the paper."""
    x = observation.double() / 255
    for conv in torso.convs:
        assert isinstance(conv, nn.Conv2d)
        x = F.conv2d(x, conv.weight, conv.bias, conv.stride).relu()
    return F.linear(x.movedim(1, -1).flatten(1), torso.hidden.weight, torso.hidden.bias).relu()


@pytest.mark.parametrize(("convs", "features"), [(NATURE_CONVS, 512), (SHALLOW_CONVS, 256)])
def test_convolutional_torsos_compute_what_was_published(
    convs: tuple[tuple[int, int, int], ...], features: int
) -> None:
    torso = ConvTorso((4, 84, 84), convs, features).double()
    observation = frames(3, 4, 84, 84)
    torch.testing.assert_close(torso(observation), plain_features(torso, observation))


def test_the_deep_torso_has_the_published_size() -> None:
    torso = DeepTorso((4, 84, 84))
    convs = [module for module in torso.modules() if isinstance(module, nn.Conv2d)]
    assert len(convs) == 15
    assert torso.hidden.in_features == 3872
    assert torso(frames(2, 4, 84, 84)).shape == (2, 256)
    assert DeepTorso((3, 72, 96))(frames(2, 1, 72, 96, 3)).shape == (2, 256)


@pytest.mark.parametrize(
    "torso",
    [ConvTorso((4, 84, 84), NATURE_CONVS, 512), DeepTorso((4, 84, 84))],
    ids=["nature", "deep"],
)
def test_low_precision_is_close_to_float32(torso: nn.Module) -> None:
    observation = frames(4, 4, 84, 84)
    exact = torso(observation)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        learner = torso(observation)
    server = torso.to(torch.bfloat16)(observation)
    torso.float()
    for low in (learner, server):
        assert low.dtype == torch.bfloat16
        torch.testing.assert_close(low.float(), exact, atol=0.02 * exact.max().item(), rtol=0.02)


def test_vectors_stay_in_float32_and_are_scaled() -> None:
    torso = MlpTorso(6, (8, 8), scale=0.5)
    observation = torch.randn(5, 2, 3, dtype=torch.float64)
    x = 0.5 * observation.flatten(1).float()
    for layer in torso.layers:
        x = layer(x).relu()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(torso(observation), x, rtol=0, atol=0)
