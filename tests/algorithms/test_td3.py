"""TD3's targets beside loops in numpy, its delayed steps, and how it acts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from headrace.algorithms.optimizers import OptimizerConfig
from headrace.algorithms.td3 import Td3, Td3Config
from headrace.algorithms.transitions import seen_by
from headrace.errors import ConfigError
from headrace.networks.models import NetworkConfig, mlp
from headrace.records import Batch, PolicyInput
from headrace.specs import EnvSpec

B, GAMMA = 32, 0.9
MakeSpec = Callable[..., EnvSpec]
MakeBatch = Callable[..., Batch]


def td3_of(spec: EnvSpec, network: dict[str, Any] | None = None, **settings: Any) -> Td3:
    sizes = {"heads": "actor_critics", "hidden_sizes": (16, 16), **(network or {})}
    learning = {
        "batch_unrolls": B,
        "discount": GAMMA,
        "optimizer": OptimizerConfig(
            learning_rate=3e-3, learning_rate_schedule="constant", max_gradient_norm=0.0
        ),
        **settings,
    }
    return Td3(
        mlp(spec, NetworkConfig(**sizes)), Td3Config(**learning), spec=spec, precision=torch.float32
    )


def apart(algorithm: Td3) -> None:
    """Has networks that learn differ from the targets."""
    with torch.no_grad():
        for param in algorithm.model.parameters():
            param.add_(0.3 * torch.randn_like(param))


def said(layers: list[tuple[np.ndarray, np.ndarray]], x: np.ndarray) -> np.ndarray:
    for index, (weight, bias) in enumerate(layers):
        x = x @ weight + bias
        if index < len(layers) - 1:
            x = np.maximum(x, 0.0)
    return x


def actor_layers(actor: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    layers = [*actor.torso.layers, actor.head.mean]
    pairs = [(layer.weight.T, layer.bias) for layer in layers]
    return [tuple(x.detach().double().numpy() for x in pair) for pair in pairs]  # type: ignore[misc]


def critic_layers(critics: Any, n: int) -> list[tuple[np.ndarray, np.ndarray]]:
    pairs = zip(critics.weights, critics.biases, strict=True)
    return [(w[n].detach().double().numpy(), b[n, 0].detach().double().numpy()) for w, b in pairs]


def test_targets_and_losses_are_those_of_loops(spec_of: MakeSpec, random_batch: MakeBatch) -> None:
    spec = spec_of("continuous")
    algorithm = td3_of(spec, target_noise=0.6, target_noise_clip=0.3, reward_scale=2.0)
    apart(algorithm)
    batch = random_batch(spec, (), T=1, B=B)
    assert batch.terminated.any()
    assert batch.truncated.any()
    transition = seen_by(algorithm.model, batch, algorithm._config)
    generator = torch.Generator()
    generator.set_state(algorithm._generator.get_state())
    noise = torch.empty(B, 2).normal_(generator=generator).double().numpy()
    loss, q_NB, target_B = algorithm.critics_loss(transition, None)
    target, online = algorithm.target_model, algorithm.model
    total = 0.0
    for b in range(B):
        after = batch.inputs.observation[1, b].flatten().double().numpy()
        smoothed = np.tanh(said(actor_layers(target.actor), after))
        smoothed += np.clip(0.6 * noise[b], -0.3, 0.3)
        smoothed = np.clip(smoothed, -1.0, 1.0)
        both = np.concatenate((after, smoothed))
        least = min(said(critic_layers(target.critics, n), both)[0] for n in range(2))
        wanted = 2.0 * float(batch.reward[0, b])
        wanted += 0.0 if batch.terminated[0, b] else GAMMA * least
        counts = not batch.truncated[0, b]  # no final observation is at hand
        if counts:
            assert target_B[b].item() == pytest.approx(wanted, rel=1e-4, abs=1e-4)
        before = batch.inputs.observation[0, b].flatten().double().numpy()
        done = np.concatenate((before, np.tanh(batch.action[0, b].double().numpy())))
        for n in range(2):
            q = said(critic_layers(online.critics, n), done)[0]
            assert q_NB[n, b].item() == pytest.approx(q, rel=1e-4, abs=1e-4)
            total += 0.5 * counts * (q - wanted) ** 2 / B
    assert loss.item() == pytest.approx(total, rel=1e-3)
    values = []
    for b in range(B):
        before = batch.inputs.observation[0, b].flatten().double().numpy()
        own = np.tanh(said(actor_layers(online.actor), before))
        values.append(said(critic_layers(online.critics, 0), np.concatenate((before, own)))[0])
    assert algorithm.actor_loss(transition).item() == pytest.approx(-np.mean(values), rel=1e-4)


def test_actor_and_targets_move_every_other_update(
    spec_of: MakeSpec, random_batch: MakeBatch
) -> None:
    spec = spec_of("continuous")
    algorithm = td3_of(spec, policy_delay=3, target_tau=0.25)
    batch = random_batch(spec, (), T=1, B=B)

    def parameters() -> dict[str, torch.Tensor]:
        sides = {
            "actor": algorithm.model.actor,
            "critics": algorithm.model.critics,
            "target": algorithm.target_model,
        }
        return {
            name: torch.cat([p.detach().flatten().clone() for p in side.parameters()])
            for name, side in sides.items()
        }

    moved = []
    for _ in range(6):
        before = parameters()
        assert algorithm.update(batch, progress=0.0).finite
        after = parameters()
        moved.append({name for name in before if not torch.equal(before[name], after[name])})
    once, all_of_them = {"critics"}, {"actor", "critics", "target"}
    assert moved == [once, once, all_of_them] * 2
    own = torch.cat([p.detach().flatten() for p in algorithm.model.parameters()])
    torch.testing.assert_close(after["target"], torch.lerp(before["target"], own, 0.25))


def test_it_acts_within_bounds_and_only_training_has_noise(spec_of: MakeSpec) -> None:
    spec = spec_of("continuous")  # [-1, 1] and [0, 5]
    algorithm = td3_of(spec, exploration_noise=0.5)
    apart(algorithm)
    count = 4000
    row = PolicyInput(
        observation=torch.ones(1, count, 1, 5),
        reward=torch.zeros(1, count),
        previous_action=torch.zeros(1, count, 2),
        reset=torch.ones(1, count, dtype=torch.bool),
    )
    steps = {
        mode: algorithm.act(algorithm.model, row, (), mode=mode, epsilon=0.25)[0]
        for mode in ("greedy", "sample", "epsilon")
    }
    told = {mode: step.env_action for mode, step in steps.items()}
    low, high = torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 5.0])
    for mode, action in told.items():
        assert action is not None
        assert ((action >= low) & (action <= high)).all(), mode
        assert steps[mode].action.isfinite().all()
    greedy = steps["greedy"].action.tanh()
    assert (greedy == greedy[0]).all()
    noise = steps["sample"].action.tanh() - greedy
    inside = (steps["sample"].action.tanh().abs() < 0.999).all(dim=0)
    assert noise.std(dim=0)[inside].tolist() == pytest.approx([0.5] * int(inside.sum()), rel=0.5)
    other = (steps["epsilon"].action != steps["greedy"].action).any(dim=1).float().mean()
    assert other.item() == pytest.approx(0.25, abs=0.05)


def test_a_resumed_rule_goes_on_alike(spec_of: MakeSpec, random_batch: MakeBatch) -> None:
    spec = spec_of("continuous")
    network = {"normalize_observations": True, "critic_dropout": 0.1}
    straight = td3_of(spec, network)
    batches = [random_batch(spec, (), T=1, B=B, seed=seed) for seed in range(4)]
    for batch in batches[:3]:
        straight.update(batch, progress=0.0)
    resumed = td3_of(spec, network)
    resumed.model.load_state_dict(copy.deepcopy(straight.model.state_dict()))
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    for algorithm in (straight, resumed):
        algorithm.warm_up(batches[0])
        for batch in batches[2:]:
            algorithm.update(batch, progress=0.0)
    for name, expected in straight.model.state_dict().items():
        assert torch.equal(expected, resumed.model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"target_noise": -0.1}, "not negative"),
        ({"exploration_noise": float("nan")}, "finite"),
        ({"policy_delay": 0}, "at least 1"),
        ({"target_tau": 0.0}, "target_tau"),
        ({"network": {"lstm_size": 8}}, "no LSTM"),
        ({"network": {"heads": "policy_value"}}, "td3 needs a headrace"),
    ],
)
def test_what_cannot_be_is_refused(
    spec_of: MakeSpec, settings: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        td3_of(spec_of("continuous"), **settings)


def test_actions_must_be_continuous(spec_of: MakeSpec) -> None:
    model = mlp(spec_of("continuous"), NetworkConfig(heads="actor_critics"))
    with pytest.raises(ConfigError, match="td3 needs continuous actions, not Discrete"):
        Td3(model, Td3Config(), spec=spec_of("discrete"), precision=torch.float32)
