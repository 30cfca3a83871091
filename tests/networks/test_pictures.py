"""Pictures of every layout and dtype: each network sees the same in them."""

from __future__ import annotations

import re
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

from headrace import catalog, tree
from headrace.errors import ConfigError
from headrace.networks import models
from headrace.networks.models import NetworkConfig
from headrace.networks.structured import structured
from headrace.records import PolicyInput
from headrace.specs import EnvSpec

CONVOLUTIONAL = ("nature", "impala_shallow", "impala_deep", "football")
HEIGHT, WIDTH, COLOURS, STACK = 40, 48, 3, 2


def make_spec(space: gym.Space[Any], *, stack: int = 1) -> EnvSpec:
    plain = isinstance(space, gym.spaces.Box)
    return EnvSpec(
        name="Test-v0",
        observation_space=space if plain else tree.packed_space(space),
        action_space=gym.spaces.Discrete(3),
        frame_stack=stack,
        structure=None if plain else space,
    )


def box(*shape: int, dtype: Any = np.uint8, low: float = 0, high: float = 255) -> gym.spaces.Box:
    return gym.spaces.Box(low, high, shape, dtype)


def built(name: str, spec: EnvSpec, **settings: Any) -> nn.Module:
    torch.manual_seed(5)
    builder: Any = catalog.resolve("network", catalog.NETWORKS, name)
    return builder(spec, NetworkConfig(network=name, **settings))  # type: ignore[no-any-return]


def said(model: nn.Module, frames: torch.Tensor) -> torch.Tensor:
    """What a network says of observations [B, K, *frame]."""
    rows = frames[None]
    shape = rows.shape[:2]
    inputs = PolicyInput(
        rows, torch.zeros(shape), torch.zeros(shape).long(), torch.zeros(shape).bool()
    )
    with torch.no_grad():
        outputs, _ = model(inputs, model.initial_state(shape[1]))  # type: ignore[operator]
    return outputs.parameters[0]  # type: ignore[no-any-return]


def frames(count: int, *, seed: int = 0) -> torch.Tensor:
    """Pictures in colour [count, H, W, 3] uint8, each pixel with a mean of its own."""
    rng = np.random.default_rng(seed)
    mean = np.random.default_rng(9).uniform(0, 255, (HEIGHT, WIDTH, COLOURS))
    noise = rng.normal(0, 30, (count, HEIGHT, WIDTH, COLOURS))
    return torch.from_numpy((mean + noise).round().clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_where_the_colours_lie_changes_nothing(name: str, normalize: bool) -> None:
    stacks = frames(8).unflatten(0, (4, STACK))
    layouts = {  # the same pictures, as four environments show them
        "last": (box(HEIGHT, WIDTH, COLOURS), STACK, stacks),
        "first": (box(COLOURS, HEIGHT, WIDTH), STACK, stacks.movedim(-1, 2)),
        "stacked, last": (box(STACK, HEIGHT, WIDTH, COLOURS), 1, stacks[:, None]),
        "stacked, first": (
            box(STACK, COLOURS, HEIGHT, WIDTH), 1, stacks.movedim(-1, 2)[:, None],
        ),
    }  # fmt: skip
    seen = {}
    for layout, (space, stack, shown) in layouts.items():
        model: Any = built(name, make_spec(space, stack=stack), normalize_observations=normalize)
        if normalize:  # a stack has moments of its own frames: here both frames have all of them
            many = frames(60, seed=1)
            if stack == 1:
                many = many[:, None].expand(-1, STACK, -1, -1, -1)
            model.observe(many.movedim(-1, -3) if "first" in layout else many)
        seen[layout] = said(model, shown)
    for layout, values in seen.items():
        torch.testing.assert_close(values, seen["last"], msg=layout)
    assert seen["last"].std() > 0


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", [*CONVOLUTIONAL, "mlp"])
def test_bytes_are_in_the_unit_of_their_own_bound(name: str, normalize: bool) -> None:
    """Eight shades of grey, as 0 to 7 and as 0 to 252 of 252."""
    shown = torch.randint(0, 8, (6, 1, 40, 40), dtype=torch.uint8)
    values = []
    for times in (1, 36):
        spec = make_spec(box(40, 40, high=7 * times))
        model: Any = built(name, spec, normalize_observations=normalize)
        if normalize:
            model.observe(torch.randint(0, 8, (50, 40, 40), generator=seeded()).byte() * times)
        values.append(said(model, shown * times))
    torch.testing.assert_close(*values)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", CONVOLUTIONAL)
@pytest.mark.parametrize(
    ("dtype", "high"),
    [(np.float32, 1), (np.float32, 255), (np.int64, 255), (np.float16, 1), (np.int32, 65535)],
)
def test_a_picture_of_other_numbers_is_seen_as_bytes_are(
    name: str, normalize: bool, dtype: Any, high: int
) -> None:
    shown = frames(4)[:, None]
    values = []
    for space in (box(HEIGHT, WIDTH, COLOURS), box(HEIGHT, WIDTH, COLOURS, dtype=dtype, high=high)):
        factor = float(space.high.max()) / 255
        kind = torch.from_numpy(np.empty(0, space.dtype)).dtype
        model: Any = built(name, make_spec(space), normalize_observations=normalize)
        if normalize:
            model.observe((frames(30, seed=1).double() * factor).to(kind))
        values.append(said(model, (shown.double() * factor).to(kind)))
    coarse = 3e-2 if dtype == np.float16 else 1e-4
    torch.testing.assert_close(*values, atol=coarse * float(values[0].abs().max()), rtol=1e-3)


@pytest.mark.parametrize("normalize", [False, True])
def test_pictures_in_parts_are_seen_as_pictures_alone(normalize: bool) -> None:
    shown = frames(4).numpy()
    values = []
    for first in (False, True):
        shape = (COLOURS, HEIGHT, WIDTH) if first else (HEIGHT, WIDTH, COLOURS)
        space = gym.spaces.Dict(
            camera=box(*shape),
            depth=box(HEIGHT, WIDTH, dtype=np.uint16, high=65535),
            board=box(24, 24, high=5),
            x=box(2, dtype=np.float32, low=-1, high=1),
        )
        spec, leaves = make_spec(space), tree.leaves(space)
        rows = np.zeros((len(shown), 1, *spec.observation_space.shape), np.uint8)
        for row, picture in zip(rows[:, 0], shown, strict=True):
            part = {
                "camera": np.moveaxis(picture, -1, 0) if first else picture,
                "depth": picture[:, :, 0].astype(np.uint16) * 257,
                "board": picture[:24, :24, 1] // 50,
                "x": np.zeros(2, np.float32),
            }
            tree.pack(leaves, part, row)
        model: Any = built("structured", spec, normalize_observations=normalize)
        assert [e.convs[0].high for e in model.torso.encoders] == [255.0, 65535.0, 5.0]
        if normalize:
            model.observe(torch.from_numpy(rows[:, 0]))
        values.append(said(model, torch.from_numpy(rows)))
    torch.testing.assert_close(*values)


NUMBERS = {
    "bytes": box(6, high=9),
    "more bytes": box(2, 3),
    "int64": box(6, dtype=np.int64, low=-50, high=50),
    "int16": box(3, 2, dtype=np.int16, low=0, high=9),
    "flags": box(6, dtype=np.bool_, high=1),
    "floats": box(6, dtype=np.float32, low=-9, high=9),
}


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_in_parts_are_seen_as_numbers_alone(kind: str, normalize: bool) -> None:
    space = NUMBERS[kind]
    space.seed(4)
    shown = [space.sample() for _ in range(40)]
    if normalize:  # a number that all but never changes is where two rules would differ
        for value in shown[1:]:
            value.flat[0] = shown[0].flat[0]
    nested = gym.spaces.Dict(a=space)
    rows = np.zeros((len(shown), tree.row_nbytes(tree.leaves(nested))), np.uint8)
    for row, value in zip(rows, shown, strict=True):
        tree.pack(tree.leaves(nested), {"a": value}, row)
    seen = []
    for name, one, given in (
        ("mlp", space, torch.from_numpy(np.stack(shown))),
        ("structured", nested, torch.from_numpy(rows)),
    ):
        model: Any = built(name, make_spec(one), normalize_observations=normalize)
        if normalize:
            model.observe(given)
        inputs: list[torch.Tensor] = []
        layers = model.torso.layers if name == "mlp" else model.torso.mlp.layers
        layers[0].register_forward_pre_hook(lambda _, args, kept=inputs: kept.append(args[0]))
        said(model, given[:, None])
        seen.append(inputs[0])
    torch.testing.assert_close(*seen, atol=1e-4, rtol=1e-4)
    if normalize:
        assert (seen[0][:, 1:].std(dim=0) - 1).abs().max() < 0.1
    else:
        assert seen[0].abs().max() <= (1 if space.dtype == np.uint8 else 50)


NO_PICTURES = {
    "vector": box(8, dtype=np.float32),
    "unbounded": box(84, 84, 3, dtype=np.float32, low=-np.inf, high=np.inf),
    "integers": box(40, 40, dtype=np.int16, high=9),
    "below 36": box(3, 35, 84),
    "below 20": box(19, 84, 3),
    "below 16": box(4, 15, 15),
    "below 8": box(7, 7, 3),
    "parts": gym.spaces.Dict(a=box(64, 64, 3), b=box(2, dtype=np.float32, low=-1, high=1)),
}


@pytest.mark.parametrize("kind", NO_PICTURES)
@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_the_network_that_a_refusal_names_takes_what_was_refused(kind: str, name: str) -> None:
    spec = make_spec(NO_PICTURES[kind])
    least = {"nature": 36, "impala_shallow": 20, "football": 16, "impala_deep": 8}[name]
    if kind.startswith("below") and least < int(kind.removeprefix("below ")):
        assert built(name, spec)
        return
    with pytest.raises(ConfigError) as caught:
        built(name, spec)
    other = re.search(r": use network (\w+)$", str(caught.value))
    assert other is not None, caught.value
    assert built(other[1], spec)
    assert (other[1] in CONVOLUTIONAL) == (kind in ("below 36", "below 20", "below 16"))


def test_what_was_begun_before_sees_as_it_did() -> None:
    spec = make_spec(box(3, 64, 64, high=7))
    assert models.default_network(spec, "bytes") == "mlp"
    with pytest.raises(ConfigError, match="not 3 x 64: use network mlp"):
        built("nature", spec, pictures="bytes")
    space = gym.spaces.Dict(a=box(3, 64, 64), b=box(40, 40, high=7))
    torso: Any = structured(make_spec(space), NetworkConfig(pictures="bytes")).torso  # type: ignore[union-attr]
    assert [e.convs[0].high for e in torso.encoders] == [255.0]
    assert torso.mlp.layers[0].in_features == 256 + 3 * 64 * 64


def test_a_compiled_network_sees_the_same() -> None:
    model: Any = built("nature", make_spec(box(COLOURS, HEIGHT, WIDTH, high=200), stack=STACK),
                       normalize_observations=True)  # fmt: skip
    model.observe(frames(20).movedim(-1, 1))
    shown = frames(8, seed=2).unflatten(0, (4, STACK)).movedim(-1, 2)
    compiled: Any = torch.compile(model.torso, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(shown), model.torso(shown))
