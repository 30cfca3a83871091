from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from headrace.errors import ConfigError
from headrace.networks import models
from headrace.networks.models import NetworkConfig, PolicyValueNet
from headrace.records import PolicyInput
from headrace.specs import EnvSpec

U, B, A = 5, 3, 6
Builder = Callable[[EnvSpec, NetworkConfig], PolicyValueNet]


def make_spec(
    *shape: int, dtype: type[Any] = np.uint8, high: float = 255, stack: int = 4
) -> EnvSpec:
    return EnvSpec(
        name="Test-v0",
        observation_space=gym.spaces.Box(0, high, shape, dtype),
        action_space=gym.spaces.Discrete(A),
        frame_stack=stack,
    )


def make_inputs(spec: EnvSpec) -> PolicyInput:
    generator = torch.Generator().manual_seed(1)
    shape = (U, B, *spec.stacked_shape)
    observation = torch.randint(0, 2, shape, dtype=torch.uint8, generator=generator)
    if spec.observation_space.dtype == np.uint8:
        observation = observation * 255
    else:
        observation = observation.float()
    reset = torch.zeros(U, B, dtype=torch.bool)
    reset[0, 0] = reset[2, 1] = True
    previous_action = torch.randint(0, A, (U, B), generator=generator).masked_fill(reset, -1)
    reward = torch.randn(U, B, generator=generator) * ~reset
    return PolicyInput(observation, reward, previous_action, reset)


CASES = [
    pytest.param(models.nature, make_spec(84, 84), id="nature"),
    pytest.param(models.nature, make_spec(72, 96, 3, stack=1), id="nature-colours"),
    pytest.param(models.impala_shallow, make_spec(84, 84), id="shallow"),
    pytest.param(models.impala_deep, make_spec(42, 42, 3, stack=2), id="deep"),
    pytest.param(models.mlp, make_spec(8, dtype=np.float32, stack=1), id="mlp-vector"),
    pytest.param(models.mlp, make_spec(10, 5, high=1, stack=2), id="mlp-board"),
]


@pytest.mark.parametrize("lstm_size", [0, 16])
@pytest.mark.parametrize(("builder", "spec"), CASES)
def test_step_by_step_equals_the_whole_unroll(
    builder: Builder, spec: EnvSpec, lstm_size: int
) -> None:
    model = builder(spec, NetworkConfig(lstm_size=lstm_size))
    inputs = make_inputs(spec)
    state = model.initial_state(B)
    assert [x.shape for x in state] == [(B, lstm_size)] * (2 if lstm_size else 0)
    whole, end = model(inputs, state)
    assert whole.parameters.shape == (U, B, A)
    assert whole.value.shape == (U, B)
    for t in range(U):
        row = PolicyInput(*(None if x is None else x[t : t + 1] for x in inputs))
        step, state = model(row, state)
        torch.testing.assert_close(step.parameters[0], whole.parameters[t], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(step.value[0], whole.value[t], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(state, end)
    (whole.parameters.square().sum() + whole.value.square().sum()).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("lstm_size", [0, 16])
@pytest.mark.parametrize(("builder", "spec"), CASES)
def test_low_precision_stays_in_the_torso(builder: Builder, spec: EnvSpec, lstm_size: int) -> None:
    model = builder(spec, NetworkConfig(lstm_size=lstm_size))
    inputs, state = make_inputs(spec), model.initial_state(B)
    exact, _ = model(inputs, state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        learner, _ = model(inputs, state)
    models.lower_precision(model, torch.bfloat16)
    server, end = model(inputs, state)
    outside = {p.dtype for n, p in model.named_parameters() if not n.startswith("torso.")}
    assert outside == {x.dtype for x in (*end, *learner, *server)} == {torch.float32}
    low = torch.float32 if builder is models.mlp else torch.bfloat16
    assert {p.dtype for p in model.torso.parameters()} == {low}
    for outputs in (learner, server):
        torch.testing.assert_close(outputs.parameters, exact.parameters, atol=1e-3, rtol=0.05)
        torch.testing.assert_close(outputs.value, exact.value, atol=0.02, rtol=0.05)


def test_the_core_sees_clipped_reward_and_previous_action() -> None:
    model = models.mlp(make_spec(3, dtype=np.float32, stack=1), NetworkConfig(lstm_size=4))
    seen: list[torch.Tensor] = []
    assert model.core is not None
    model.core.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    inputs = make_inputs(make_spec(3, dtype=np.float32, stack=1))
    inputs.reward[1, 0], inputs.reward[1, 1] = 7.0, -7.0
    model(inputs, model.initial_state(B))
    extra = seen[0][..., 64:]
    torch.testing.assert_close(extra[..., 0], inputs.reward.clamp(-1, 1))
    assert (extra[..., 1:][inputs.reset] == 0).all()
    acted = ~inputs.reset
    assert torch.equal(extra[..., 1:][acted].argmax(-1), inputs.previous_action[acted])
    assert (extra[..., 1:][acted].sum(-1) == 1).all()


def test_the_policy_starts_close_to_uniform() -> None:
    spec = make_spec(84, 84)
    outputs, _ = models.nature(spec, NetworkConfig())(make_inputs(spec), ())
    torch.testing.assert_close(
        outputs.parameters.softmax(-1), torch.full((U, B, A), 1 / A), atol=0.01, rtol=0
    )


def test_small_integers_are_not_scaled_as_pixels_are() -> None:
    board = models.mlp(make_spec(10, 5, high=1), NetworkConfig()).torso
    pixels = models.mlp(make_spec(10, 5), NetworkConfig()).torso
    vector = models.mlp(make_spec(10, dtype=np.float32), NetworkConfig()).torso
    assert [t.scale for t in (board, pixels, vector)] == [1.0, 1 / 255, 1.0]


@pytest.mark.parametrize("builder", [models.nature, models.impala_shallow, models.impala_deep])
@pytest.mark.parametrize(
    "spec", [make_spec(8, dtype=np.float32), make_spec(10, 5), make_spec(84, 84, dtype=np.float32)]
)
def test_what_is_no_image_is_refused_with_the_fix(builder: Builder, spec: EnvSpec) -> None:
    with pytest.raises(ConfigError, match=r"Test-v0: .*use network mlp"):
        builder(spec, NetworkConfig())


def test_a_negative_lstm_is_refused() -> None:
    with pytest.raises(ConfigError, match="lstm_size"):
        NetworkConfig(lstm_size=-1)


@pytest.mark.parametrize("lstm_size", [0, 8])
def test_the_whole_network_is_one_graph(lstm_size: int) -> None:
    """What can be traced whole has no step that depends on data or waits for the device."""
    spec = make_spec(84, 84)
    model = models.nature(spec, NetworkConfig(lstm_size=lstm_size))
    inputs, state = make_inputs(spec), model.initial_state(B)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(compiled(inputs, state), model(inputs, state))
