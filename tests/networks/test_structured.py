"""Observations of several parts: bytes on the device become what numpy unpacks."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from headrace import tree
from headrace.networks.models import NetworkConfig, default_network, lower_precision
from headrace.networks.normalizer import ObservationNormalizer
from headrace.networks.structured import (
    IMAGE_FEATURES,
    StructuredTorso,
    part_of,
    structured,
    unpacked,
)
from headrace.records import PolicyInput
from headrace.specs import EnvSpec

U, B = 4, 3
SPACE = gym.spaces.Dict(
    {
        "position": gym.spaces.Box(-5, 5, (3,), np.float64),
        "camera": gym.spaces.Box(0, 255, (40, 36, 3), np.uint8),
        "nested": gym.spaces.Tuple(
            (
                gym.spaces.Discrete(4, start=-1),
                gym.spaces.MultiDiscrete([[3, 2], [2, 5]]),
                gym.spaces.MultiBinary((2, 3)),
                gym.spaces.Box(0, 9, (5,), np.uint8),
                gym.spaces.Box(-1, 1, (), np.float32),
                gym.spaces.Box(-9, 9, (2, 2), np.int16),
            )
        ),
    }
)


def make_spec(space: gym.Space[Any] = SPACE, *, stack: int = 2) -> EnvSpec:
    return EnvSpec(
        name="Test-v0",
        observation_space=tree.packed_space(space),
        action_space=gym.spaces.Discrete(3),
        frame_stack=stack,
        structure=space,
    )


def packed(spec: EnvSpec, *leading: int, seed: int = 0) -> torch.Tensor:
    assert spec.structure is not None
    spec.structure.seed(seed)
    leaves = tree.leaves(spec.structure)
    rows = np.zeros((int(np.prod(leading)), *spec.observation_space.shape), np.uint8)
    for row in rows:
        tree.pack(leaves, spec.structure.sample(), row)
    return torch.from_numpy(rows.reshape(*leading, -1))


def inputs_of(observation: torch.Tensor) -> PolicyInput:
    reset = torch.zeros(U, B, dtype=torch.bool)
    reset[2, 1] = True
    return PolicyInput(observation, torch.randn(U, B), torch.full((U, B), -1), reset)


def test_parts_are_what_numpy_unpacks() -> None:
    spec = make_spec()
    leaves = tree.leaves(SPACE)
    rows = packed(spec, 5, 2)
    expected = tree.unpack(leaves, rows.numpy())
    assert len(leaves) == 8
    for leaf in leaves:
        part = unpacked(rows, part_of(leaf))
        np.testing.assert_array_equal(
            part.numpy().reshape(5, 2, *leaf.shape), expected[leaf.path], err_msg=leaf.path
        )
        assert part.data_ptr() == rows.data_ptr() + leaf.offset, "copied"


def by_hand(torso: StructuredTorso, rows: torch.Tensor) -> torch.Tensor:
    """The torso's output from numpy's parts."""
    parts = {
        path: torch.from_numpy(part.copy())
        for path, part in tree.unpack(tree.leaves(SPACE), rows.numpy()).items()
    }
    n = len(rows)
    multi = parts["nested/1"].reshape(n, -1, 4)
    eye = [torch.eye(count)[multi[:, :, i]] for i, count in enumerate((3, 2, 2, 5))]
    image = torso.encoders[0](parts["camera"])  # its own part of the statistics: test_normalizer
    floats = torch.cat((parts["nested/4"][..., None], parts["position"]), dim=-1)
    if torso.normalizer is not None:
        floats = torso.normalizer(floats)
    others = [
        torch.eye(4)[parts["nested/0"]],
        torch.cat(eye, dim=-1),
        parts["nested/2"].flatten(2).float(),
        parts["nested/3"].float() / 9,
        parts["nested/5"].flatten(2).float(),
    ]
    normalizers = torso.integer_normalizers
    numbers = [floats, *(f(x) for f, x in zip(normalizers, others, strict=True))]
    return torso.mlp(torch.cat((image, *(x.flatten(1) for x in numbers)), dim=1))


@pytest.mark.parametrize("normalize", [False, True])
def test_features_are_those_of_the_parts(normalize: bool) -> None:
    spec = make_spec()
    torso = StructuredTorso(spec, (16, 8), normalize=normalize)
    if normalize:
        torso.observe(packed(spec, 40, 1, seed=3)[:, 0])
        assert torso.normalizer is not None
        assert torso.normalizer.total == 40
        kept = [part for part in torso.modules() if isinstance(part, ObservationNormalizer)]
        assert [int(part.total) for part in kept] == [40] * len(kept)
    rows = packed(spec, 6, 2)
    torch.testing.assert_close(torso(rows), by_hand(torso, rows))


def test_statistics_are_of_the_floats_alone() -> None:
    spec = make_spec()
    model = structured(spec, NetworkConfig(normalize_observations=True, separate_value=True))
    rows = packed(spec, 50)
    model.observe(rows)
    expected = tree.unpack(tree.leaves(SPACE), rows.numpy())["position"]
    for torso in (model.torso, model.value_torso):
        assert isinstance(torso, StructuredTorso)
        assert torso.normalizer is not None
        np.testing.assert_allclose(
            torso.normalizer.mean[1:].numpy(), expected.astype(np.float64).mean(axis=0)
        )
    assert model.normalizer is None


@pytest.mark.parametrize("lstm_size", [0, 8])
def test_step_by_step_equals_the_whole_unroll(lstm_size: int) -> None:
    spec = make_spec()
    assert default_network(spec) == "structured"
    model = structured(spec, NetworkConfig(lstm_size=lstm_size))
    inputs, state = inputs_of(packed(spec, U, B, 2)), model.initial_state(B)
    whole, end = model(inputs, state)
    for t in range(U):
        row = PolicyInput(*(None if x is None else x[t : t + 1] for x in inputs))
        step, state = model(row, state)
        torch.testing.assert_close(step.parameters[0], whole.parameters[t], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(step.value[0], whole.value[t], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(state, end)
    (whole.parameters.square().sum() + whole.value.square().sum()).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_only_images_may_run_in_low_precision() -> None:
    spec = make_spec()
    model = structured(spec, NetworkConfig(normalize_observations=True))
    inputs = inputs_of(packed(spec, U, B, 2))
    exact, _ = model(inputs, ())
    lower_precision(model, torch.bfloat16)
    low = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert low == {n for n, _ in model.named_parameters() if n.startswith("torso.encoders.")}
    assert {b.dtype for b in model.buffers()} == {torch.float64}
    torch.testing.assert_close(model(inputs, ())[0].value, exact.value, atol=0.05, rtol=0.05)


def test_the_network_is_one_graph() -> None:
    spec = make_spec()
    model = structured(spec, NetworkConfig(normalize_observations=True))
    inputs = inputs_of(packed(spec, U, B, 2))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(inputs, ())[0], model(inputs, ())[0])


@pytest.mark.parametrize(
    ("shape", "images"),
    [((36, 36), 1), ((20, 30), 1), ((64, 64, 3), 1), ((19, 40), 0), ((7, 7, 3), 0), ((400,), 0)],
)
def test_what_counts_as_an_image(shape: tuple[int, ...], images: int) -> None:
    space = gym.spaces.Dict(
        {"a": gym.spaces.Box(0, 255, shape, np.uint8), "b": gym.spaces.Discrete(2)}
    )
    torso = StructuredTorso(make_spec(space, stack=1), (4,))
    assert len(torso.encoders) == images
    rest = 2 + (0 if images else int(np.prod(shape)))
    assert torso.mlp.layers[0].in_features == images * IMAGE_FEATURES + rest
