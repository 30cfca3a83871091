"""Networks of action values: states of every row, duelling streams, what the LSTM is shown."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from headrace import tree
from headrace.errors import ConfigError
from headrace.networks import models
from headrace.networks.action_values import ActionValueNet
from headrace.networks.heads import DuellingHead
from headrace.networks.models import NetworkConfig, PolicyValueNet, lower_precision
from headrace.networks.r2d2 import r2d2
from headrace.networks.structured import StructuredTorso, structured
from headrace.networks.torsos import ConvTorso, MlpTorso
from headrace.records import PolicyInput
from headrace.specs import EnvSpec

U, B, A, H = 5, 3, 6, 16
Builder = Callable[[EnvSpec, NetworkConfig], nn.Module]


def make_spec(space: gym.spaces.Space[Any], *, stack: int = 1, actions: Any = None) -> EnvSpec:
    nested = isinstance(space, gym.spaces.Dict)
    return EnvSpec(
        name="Test-v0",
        observation_space=tree.packed_space(space) if nested else space,
        action_space=gym.spaces.Discrete(A) if actions is None else actions,
        frame_stack=stack,
        structure=space if nested else None,
    )


CAMERA = gym.spaces.Box(0, 255, (40, 36, 3), np.uint8)
POSITION = gym.spaces.Box(-5, 5, (3,), np.float32)
IMAGES = make_spec(gym.spaces.Box(0, 255, (84, 84), np.uint8), stack=4)
VECTORS = make_spec(gym.spaces.Box(-9, 9, (8,), np.float32))
NESTED = make_spec(gym.spaces.Dict({"camera": CAMERA, "position": POSITION}), stack=2)
SPECS = pytest.mark.parametrize(
    "spec", [IMAGES, VECTORS, NESTED], ids=["images", "vectors", "nested"]
)
BUILDERS = pytest.mark.parametrize(
    ("builder", "spec"),
    [
        pytest.param(models.nature, IMAGES, id="nature"),
        pytest.param(models.impala_shallow, IMAGES, id="impala_shallow"),
        pytest.param(models.impala_deep, IMAGES, id="impala_deep"),
        pytest.param(models.football, IMAGES, id="football"),
        pytest.param(models.mlp, VECTORS, id="mlp"),
        pytest.param(structured, NESTED, id="structured"),
    ],
)


def make_inputs(spec: EnvSpec) -> PolicyInput:
    generator = torch.Generator().manual_seed(1)
    reset = torch.zeros(U, B, dtype=torch.bool)
    reset[0, 0] = reset[2, 1] = reset[4, 1] = True
    action = torch.randint(0, A, (U, B), generator=generator).masked_fill(reset, -1)
    reward = 3 * torch.randn(U, B, generator=generator) * ~reset
    return PolicyInput(observations(spec, generator), reward, action, reset)


def observations(spec: EnvSpec, generator: torch.Generator) -> Tensor:
    shape = (U, B, *spec.stacked_shape)
    if spec.structure is not None:
        spec.structure.seed(0)
        leaves = tree.leaves(spec.structure)
        rows = np.zeros((U * B * spec.frame_stack, shape[-1]), np.uint8)
        for row in rows:
            tree.pack(leaves, spec.structure.sample(), row)
        return torch.from_numpy(rows).view(shape)
    if spec.observation_space.dtype == np.uint8:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return torch.randn(shape, generator=generator)


def rows_of(inputs: PolicyInput, start: int, stop: int) -> PolicyInput:
    return PolicyInput(*(None if x is None else x[start:stop] for x in inputs))


def random_state(model: ActionValueNet) -> tuple[Tensor, ...]:
    return tuple(torch.randn(x.shape) for x in model.initial_state(B))


def make_r2d2(spec: EnvSpec, **settings: Any) -> ActionValueNet:
    model = r2d2(spec, NetworkConfig(lstm_size=H, **settings))
    assert isinstance(model, ActionValueNet)
    return model


@SPECS
def test_step_by_step_equals_the_whole_unroll(spec: EnvSpec) -> None:
    model, inputs = make_r2d2(spec), make_inputs(spec)
    state = random_state(model)
    whole, end = model(inputs, state)
    assert whole.value.shape == (U, B, A)
    assert [x.shape for x in whole.states] == [(U, B, H)] * 2
    for t in range(U):
        step, state = model(rows_of(inputs, t, t + 1), state)
        torch.testing.assert_close(step.value[0], whole.value[t], atol=1e-5, rtol=1e-4)
        for after, of_step, of_whole in zip(state, step.states, whole.states, strict=True):
            torch.testing.assert_close(of_step[0], after)
            torch.testing.assert_close(of_whole[t], after, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(state, end)


def test_states_are_where_a_shorter_unroll_ends() -> None:
    model, inputs = make_r2d2(VECTORS), make_inputs(VECTORS)
    state = random_state(model)
    whole, _ = model(inputs, state)
    for t in range(U):
        _, end = model(rows_of(inputs, 0, t + 1), state)
        torch.testing.assert_close(tuple(x[t] for x in whole.states), end)
    h_UBH, c_UBH = whole.states
    assert not torch.allclose(h_UBH, c_UBH)


def test_a_reset_forgets_all_that_was() -> None:
    model, inputs = make_r2d2(VECTORS), make_inputs(VECTORS)
    whole, _ = model(inputs, random_state(model))
    fresh, _ = model(rows_of(inputs, 2, U), model.initial_state(B))
    torch.testing.assert_close(whole.value[2:, 1], fresh.value[:, 1])
    assert not torch.allclose(whole.value[2:, 2], fresh.value[:, 2])


def test_the_core_sees_raw_reward_and_previous_action() -> None:
    model, inputs = make_r2d2(VECTORS), make_inputs(VECTORS)
    seen: list[Tensor] = []
    assert model.core is not None
    model.core.input.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    inputs.reward[1, 0] = 5.0
    first, _ = model(inputs, model.initial_state(B))
    inputs.reward[1, 0] = 1.0
    second, _ = model(inputs, model.initial_state(B))
    differs = (first.value != second.value).any(-1)
    assert differs[1:, 0].all()
    assert differs.sum() == U - 1
    extra = seen[1][..., -A - 1 :]
    assert torch.equal(extra[..., 0], inputs.reward)
    one_hot = torch.cat((torch.eye(A), torch.zeros(1, A)))[inputs.previous_action]
    assert torch.equal(extra[..., 1:], one_hot)


@pytest.mark.parametrize("heads", ["duelling", "action_value"])
def test_without_a_core_only_the_observation_counts(heads: Any) -> None:
    model, inputs = models.mlp(VECTORS, NetworkConfig(heads=heads)), make_inputs(VECTORS)
    values, state = model(inputs, model.initial_state(B))
    assert values.states == state == ()
    other = inputs._replace(
        reward=inputs.reward + 1, previous_action=inputs.previous_action.fill_(0)
    )
    assert torch.equal(model(other, ())[0].value, values.value)


def test_duelling_streams_add_up_with_advantages_of_mean_zero() -> None:
    model, inputs = make_r2d2(VECTORS), make_inputs(VECTORS)
    head = model.head
    assert isinstance(head, DuellingHead)
    torch.nn.init.normal_(head.advantage[-1].weight)  # far from where it starts: near 0
    values, _ = model(inputs, model.initial_state(B))
    h_UBH = values.states[0]
    value_UB1, advantage_UBA = head.value(h_UBH), head.advantage(h_UBH)
    assert value_UB1.shape == (U, B, 1)
    torch.testing.assert_close(
        (values.value - value_UB1).mean(-1), torch.zeros(U, B), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        values.value - values.value.mean(-1, keepdim=True),
        advantage_UBA - advantage_UBA.mean(-1, keepdim=True),
        atol=1e-5,
        rtol=1e-4,
    )


def test_r2d2_is_the_published_network() -> None:
    model = r2d2(IMAGES, NetworkConfig())
    assert isinstance(model, ActionValueNet)
    assert model.core is not None
    assert (model.core.input.in_features, model.core.hidden) == (512 + 1 + A, 512)
    shapes = {name: tuple(p.shape) for name, p in model.head.named_parameters()}
    assert shapes == {
        "value.0.weight": (512, 512),
        "value.0.bias": (512,),
        "value.2.weight": (1, 512),
        "value.2.bias": (1,),
        "advantage.0.weight": (512, 512),
        "advantage.0.bias": (512,),
        "advantage.2.weight": (A, 512),
    }


@SPECS
def test_r2d2_takes_the_torso_that_suits_the_observations(spec: EnvSpec) -> None:
    model = make_r2d2(spec)
    torso = ConvTorso if spec is IMAGES else MlpTorso if spec is VECTORS else StructuredTorso
    assert isinstance(model.torso, torso)
    assert isinstance(model.head, DuellingHead)
    assert isinstance(make_r2d2(spec, heads="action_value").head, nn.Linear)


@BUILDERS
@pytest.mark.parametrize("heads", ["duelling", "action_value"])
@pytest.mark.parametrize("lstm_size", [0, H])
def test_gradients_reach_every_parameter(
    builder: Builder, spec: EnvSpec, heads: Any, lstm_size: int
) -> None:
    model = builder(spec, NetworkConfig(heads=heads, lstm_size=lstm_size))
    inputs = make_inputs(spec)
    values, _ = model(inputs, model.initial_state(B))
    (values.value - 1).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@BUILDERS
def test_every_builder_makes_the_heads_it_is_told(builder: Builder, spec: EnvSpec) -> None:
    inputs = make_inputs(spec)
    for lstm_size in (0, H):
        for heads in ("auto", "policy_value"):
            model = builder(spec, NetworkConfig(heads=heads, lstm_size=lstm_size))
            assert isinstance(model, PolicyValueNet)
        for heads, head in (("duelling", DuellingHead), ("action_value", nn.Linear)):
            model = builder(spec, NetworkConfig(heads=heads, lstm_size=lstm_size))
            assert isinstance(model, ActionValueNet)
            assert isinstance(model.head, head)
            values, _ = model(inputs, model.initial_state(B))
            assert values.value.shape == (U, B, A)
            assert values.value.abs().max() < 0.5, "does not start near 0"
            assert values.value.std() > 0


def test_streams_are_as_wide_as_what_they_see_up_to_512() -> None:
    for size, hidden in ((24, 24), (600, 512)):
        config = NetworkConfig(heads="duelling", lstm_size=size)
        assert models.mlp(VECTORS, config).head.value[0].out_features == hidden
    config = NetworkConfig(heads="duelling", hidden_sizes=(7, 9))
    assert models.mlp(VECTORS, config).head.advantage[0].out_features == 9


@pytest.mark.parametrize(
    "actions", [gym.spaces.MultiDiscrete([3, 2]), gym.spaces.Box(-1, 1, (2,), np.float32)]
)
def test_other_actions_than_one_choice_are_refused(actions: Any) -> None:
    spec = make_spec(VECTORS.observation_space, actions=actions)
    with pytest.raises(ConfigError, match=r"Test-v0: .*one discrete action, not (Multi|Box)"):
        models.mlp(spec, NetworkConfig(heads="duelling"))
    with pytest.raises(ConfigError, match="one discrete action"):
        r2d2(spec, NetworkConfig())


def test_settings_that_do_not_go_together_are_refused() -> None:
    for heads in ("duelling", "action_value"):
        with pytest.raises(ConfigError, match="separate_value"):
            NetworkConfig(heads=heads, separate_value=True)
        with pytest.raises(ConfigError, match=f"heads {heads}.*assemble"):
            PolicyValueNet(MlpTorso(8), 64, VECTORS, NetworkConfig(heads=heads))
    with pytest.raises(ConfigError, match="separate_value"):
        r2d2(VECTORS, NetworkConfig(separate_value=True))


@SPECS
def test_low_precision_stays_in_the_torso(spec: EnvSpec) -> None:
    model, inputs = make_r2d2(spec), make_inputs(spec)
    state = model.initial_state(B)
    exact, _ = model(inputs, state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        learner, _ = model(inputs, state)
    copied = copy.deepcopy(model)
    lower_precision(copied, torch.bfloat16)
    server, end = copied(inputs, state)
    low = {n for n, p in copied.named_parameters() if p.dtype == torch.bfloat16}
    names = [n for n, _ in model.named_parameters()]
    convolutions = "torso.encoders." if spec is NESTED else "torso."
    assert low == {n for n in names if n.startswith(convolutions) and spec is not VECTORS}
    for outputs in (learner, server):
        assert {x.dtype for x in (*end, *outputs.states, outputs.value)} == {torch.float32}
        torch.testing.assert_close(outputs.value, exact.value, atol=0.02, rtol=0.05)


def test_floats_are_normalised_where_asked() -> None:
    model = make_r2d2(VECTORS, normalize_observations=True)
    inputs = make_inputs(VECTORS)
    before, _ = model(inputs, model.initial_state(B))
    model.observe(100 + 7 * torch.randn(50, 8))
    after, _ = model(inputs, model.initial_state(B))
    assert model.normalizer is not None
    assert model.normalizer.total == 50
    assert not torch.allclose(before.value, after.value)
    assert make_r2d2(IMAGES, normalize_observations=True).normalizer is None
    inside = make_r2d2(NESTED, normalize_observations=True)
    inside.observe(observations(NESTED, torch.Generator())[:, :, 0])
    assert isinstance(inside.torso, StructuredTorso)
    assert inside.torso.normalizer is not None
    assert inside.torso.normalizer.total == U * B


def test_the_whole_network_is_one_graph() -> None:
    model, inputs = make_r2d2(IMAGES), make_inputs(IMAGES)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    state = random_state(model)
    torch.testing.assert_close(compiled(inputs, state), model(inputs, state))
