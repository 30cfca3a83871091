from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

from headrace.errors import ConfigError
from headrace.networks import assemble, models
from headrace.networks.models import NetworkConfig, PolicyValueNet
from headrace.records import PolicyInput
from headrace.specs import EnvSpec

U, B, A = 5, 3, 6
Builder = Callable[[EnvSpec, NetworkConfig], PolicyValueNet]


DISCRETE = gym.spaces.Discrete(A)
MULTI = gym.spaces.MultiDiscrete([3, 2, 4])
CONTINUOUS = gym.spaces.Box(np.float32([-1, 0]), np.float32([1, 5]))


def make_spec(
    *shape: int,
    dtype: type[Any] = np.uint8,
    high: float = 255,
    stack: int = 4,
    actions: Any = DISCRETE,
) -> EnvSpec:
    return EnvSpec(
        name="Test-v0",
        observation_space=gym.spaces.Box(0, high, shape, dtype),
        action_space=actions,
        frame_stack=stack,
    )


def previous_actions(spec: EnvSpec, reset: torch.Tensor) -> torch.Tensor:
    space, generator = spec.action_space, torch.Generator().manual_seed(2)
    if isinstance(space, gym.spaces.Box):
        action = torch.randn(U, B, *spec.action_shape, generator=generator)
        return action * ~reset[..., None]
    columns = [torch.randint(n, (U, B), generator=generator) for n in spec.action_choices]
    columns = [column.masked_fill(reset, -1) for column in columns]
    return columns[0] if isinstance(space, gym.spaces.Discrete) else torch.stack(columns, dim=-1)


def make_inputs(spec: EnvSpec) -> PolicyInput:
    generator = torch.Generator().manual_seed(1)
    shape = (U, B, *spec.stacked_shape)
    observation = torch.randint(0, 2, shape, dtype=torch.uint8, generator=generator)
    dtype = spec.observation_space.dtype
    observation = observation * 255 if dtype == np.uint8 else observation.to(DTYPES[dtype.name])
    reset = torch.zeros(U, B, dtype=torch.bool)
    reset[0, 0] = reset[2, 1] = True
    previous_action = previous_actions(spec, reset)
    reward = torch.randn(U, B, generator=generator) * ~reset
    return PolicyInput(observation, reward, previous_action, reset)


DTYPES = {"float32": torch.float32, "bool": torch.bool, "int64": torch.int64}
CASES = [
    pytest.param(models.nature, make_spec(84, 84), id="nature"),
    pytest.param(models.nature, make_spec(72, 96, 3, stack=1), id="nature-colours"),
    pytest.param(models.impala_shallow, make_spec(84, 84), id="shallow"),
    pytest.param(models.impala_deep, make_spec(42, 42, 3, stack=2), id="deep"),
    pytest.param(models.football, make_spec(72, 96, 4), id="football"),
    pytest.param(models.nature, make_spec(96, 96, 3, stack=1, actions=CONTINUOUS), id="racing"),
    pytest.param(models.impala_deep, make_spec(65, 47, 3, stack=1), id="deep-odd"),
    pytest.param(models.nature, make_spec(65, 47, 3, stack=1), id="nature-odd"),
    pytest.param(models.mlp, make_spec(8, dtype=np.float32, stack=1), id="mlp-vector"),
    pytest.param(
        models.mlp, make_spec(8, dtype=np.float32, actions=CONTINUOUS), id="mlp-continuous"
    ),
    pytest.param(models.mlp, make_spec(8, dtype=np.bool_, high=1, actions=MULTI), id="mlp-multi"),
    pytest.param(models.mlp, make_spec(3, 2, dtype=np.int64, stack=1), id="mlp-integers"),
    pytest.param(models.mlp, make_spec(7, 7, 3, stack=1), id="mlp-grid"),
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
    assert whole.parameters.shape == (U, B, model.distribution.num_parameters)
    assert whole.value.shape == (U, B)
    for t in range(U):
        row = PolicyInput(*(None if x is None else x[t : t + 1] for x in inputs))
        step, state = model(row, state)
        torch.testing.assert_close(step.parameters[0], whole.parameters[t], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(step.value[0], whole.value[t], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(state, end)
    # Off by one: where log deviations start at 0, the gradient of their square is 0.
    ((whole.parameters + 1).square().sum() + whole.value.square().sum()).backward()
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
        torch.testing.assert_close(outputs.parameters, exact.parameters, atol=2e-3, rtol=0.05)
        torch.testing.assert_close(outputs.value, exact.value, atol=0.02, rtol=0.05)


def test_a_torso_of_the_users_acts_in_float32_as_it_may_not_cast_its_input() -> None:
    class Torso(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.first(x.flatten(1).float()))  # type: ignore[no-any-return]

    spec = make_spec(8, dtype=np.float32, high=1, stack=1)
    model: Any = assemble(Torso, 8, spec, NetworkConfig(separate_value=True)).eval()
    before, _ = model(make_inputs(spec), ())
    models.lower_precision(model, torch.bfloat16)
    after, _ = model(make_inputs(spec), ())
    assert torch.equal(after.value, before.value)
    assert torch.equal(after.parameters, before.parameters)


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
    "spec",
    [make_spec(8, dtype=np.float32), make_spec(10, 5), make_spec(84, 84, dtype=np.float32, high=9)],
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


VECTOR = make_spec(5, dtype=np.float32, stack=2)


def test_the_value_may_have_its_own_torso() -> None:
    model = models.mlp(VECTOR, NetworkConfig(separate_value=True))
    outputs, _ = model(make_inputs(VECTOR), ())
    outputs.value.sum().backward()
    assert all(p.grad is None for p in model.torso.parameters())
    assert model.value_torso is not None
    assert all(p.grad is not None and p.grad.any() for p in model.value_torso.parameters())
    weights = [torso.layers[0].weight for torso in (model.torso, model.value_torso)]
    assert not torch.equal(*weights)
    with pytest.raises(ConfigError, match="lstm_size 0"):
        NetworkConfig(separate_value=True, lstm_size=8)


def test_hidden_layers_are_as_wide_and_as_many_as_asked() -> None:
    model = models.mlp(VECTOR, NetworkConfig(hidden_sizes=(7, 9, 3), activation="tanh"))
    assert [tuple(layer.weight.shape) for layer in model.torso.layers] == [(7, 10), (9, 7), (3, 9)]
    assert model.policy.in_features == 3
    # Orthogonal, scaled by the root of 2: rows of a wide matrix, columns of a tall one.
    for layer in model.torso.layers:
        w = layer.weight if layer.in_features >= layer.out_features else layer.weight.t()
        torch.testing.assert_close(w @ w.t(), 2 * torch.eye(len(w)), atol=1e-5, rtol=0)
    features = model.torso(torch.randn(4, 2, 5))
    assert (features < 0).any()
    for wrong in ((), (0,), (64, -1)):
        with pytest.raises(ConfigError, match="hidden_sizes"):
            NetworkConfig(hidden_sizes=wrong)


@pytest.mark.parametrize("state_dependent", [False, True])
def test_the_deviation_starts_where_it_is_told(state_dependent: bool) -> None:
    spec = make_spec(5, dtype=np.float32, stack=1, actions=CONTINUOUS)
    config = NetworkConfig(initial_log_std=-0.7, state_dependent_std=state_dependent)
    outputs, _ = models.mlp(spec, config)(make_inputs(spec), ())
    mean, log_std = outputs.parameters.chunk(2, dim=-1)
    torch.testing.assert_close(log_std, torch.full_like(log_std, -0.7), atol=0.02, rtol=0)
    assert mean.abs().max() < 0.05
    varies = bool((log_std != log_std[0, 0]).any())
    assert varies == state_dependent


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        (make_spec(84, 84), "nature"),
        (make_spec(64, 64, 3), "nature"),
        (make_spec(35, 84), "mlp"),
        (make_spec(84, 84, dtype=np.float32), "nature"),
        (make_spec(84, 84, dtype=np.float32, high=9), "mlp"),
        (make_spec(7, 7, 3), "mlp"),
        (make_spec(8, dtype=np.float32), "mlp"),
    ],
)
def test_auto_takes_convolutions_for_images(spec: EnvSpec, name: str) -> None:
    assert models.default_network(spec) == name


def test_football_is_the_published_network() -> None:
    model = models.football(make_spec(72, 96, 4), NetworkConfig())
    convs = [m for m in model.torso.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convs) == 4 * 5
    assert [conv.in_channels for conv in model.torso.convs] == [16, 16, 32, 32]
    assert [conv.out_channels for conv in model.torso.convs] == [16, 32, 32, 32]
    assert model.torso.hidden.out_features == 256
