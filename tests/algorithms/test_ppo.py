"""PPO's loss against a slow loop, its passes over a batch, and how it goes on when resumed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from headrace.algorithms.minibatches import shuffled
from headrace.algorithms.optimizers import OptimizerConfig
from headrace.algorithms.ppo import Ppo, PpoConfig
from headrace.errors import ConfigError
from headrace.learner.flattening import flatten, unflatten
from headrace.networks.models import NetworkConfig, PolicyValueNet, mlp
from headrace.records import Batch, PolicyInput
from headrace.specs import EnvSpec

T, B = 6, 4
STATES, ACTIONS = 5, 3
MakeSpec = Callable[..., EnvSpec]
MakeBatch = Callable[..., Batch]


class Output(NamedTuple):
    parameters: Tensor
    value: Tensor


class Table(nn.Module):
    """Logits and value of every state, looked up by the number that the observation is."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.logits = nn.Parameter(torch.randn(STATES, ACTIONS, generator=generator).double())
        self.value = nn.Parameter(torch.randn(STATES, generator=generator).double())

    def forward(
        self, inputs: PolicyInput, recurrent: tuple[Tensor, ...]
    ) -> tuple[Output, tuple[Tensor, ...]]:
        state = inputs.observation[:, :, 0, 0].long()
        return Output(self.logits[state], self.value[state]), recurrent

    def initial_state(self, batch: int) -> tuple[Tensor, ...]:
        return ()


SPEC = EnvSpec(
    name="table",
    observation_space=gym.spaces.Box(0, STATES, (1,), np.float32),
    action_space=gym.spaces.Discrete(ACTIONS),
)


def config_of(**settings: Any) -> PpoConfig:
    return PpoConfig(**{"unroll_steps": T, "batch_unrolls": B, "minibatches": 2, **settings})


def table_batch(*, lag: float = 0.6) -> tuple[Table, Batch]:
    """A batch whose behaviour policy differs, so that ratios lie on both sides of both clips."""
    generator = torch.Generator().manual_seed(1)
    table = Table()
    state_UB = torch.randint(STATES, (T + 1, B), generator=generator)
    action_TB = torch.randint(ACTIONS, (T, B), generator=generator)
    ended = torch.rand(T, B, generator=generator) < 0.25
    is_cut = torch.rand(T, B, generator=generator) < 0.5
    current = table.logits.detach()[state_UB[:-1]].log_softmax(-1)
    log_prob = current.gather(-1, action_TB[..., None])[..., 0]
    noise = torch.randn(T, B, generator=generator).double()
    observation = state_UB.double()[:, :, None, None]
    batch = Batch(
        inputs=PolicyInput(
            observation=observation,
            reward=torch.zeros(T + 1, B),
            previous_action=torch.full((T + 1, B), -1),
            reset=torch.zeros(T + 1, B, dtype=torch.bool),
        ),
        recurrent=(),
        action=action_TB,
        log_prob=log_prob + lag * noise,
        reward=torch.randn(T, B, generator=generator).double(),
        terminated=ended & ~is_cut,
        truncated=ended & is_cut,
        bootstrap=torch.where(ended & is_cut, 0.8, 0.0).double(),
        version=torch.zeros(T, B, dtype=torch.int64),
    )
    return table, batch


def by_hand(table: Table, batch: Batch, config: PpoConfig) -> dict[str, float]:
    """Total loss and its parts of all samples at once, one number at a time."""
    states = batch.inputs.observation[:, :, 0, 0].long().numpy()
    values = table.value.detach().numpy()
    logits = table.logits.detach().numpy()
    rows = []
    for b in range(B):
        advantage = 0.0
        for t in reversed(range(T)):
            over = bool(batch.terminated[t, b] or batch.truncated[t, b])
            discount = 0.0 if over else config.discount
            reward = batch.reward[t, b].item() + config.discount * batch.bootstrap[t, b].item()
            value = values[states[t, b]]
            delta = reward + discount * values[states[t + 1, b]] - value
            advantage = delta + discount * config.gae_lambda * advantage
            rows.append((t, b, advantage, advantage + value))
    mean = sum(row[2] for row in rows) / len(rows)
    deviation = math.sqrt(sum((row[2] - mean) ** 2 for row in rows) / len(rows))
    policy = value_loss = entropy = clipped = 0.0
    for t, b, advantage, target in rows:
        log_p = logits[states[t, b]] - np.log(np.exp(logits[states[t, b]]).sum())
        ratio = math.exp(log_p[batch.action[t, b]] - batch.log_prob[t, b].item())
        a = (advantage - mean) / (deviation + 1e-8) if config.normalize_advantage else advantage
        low, high = 1 - config.clip_range, 1 + config.clip_range
        policy -= min(ratio * a, min(max(ratio, low), high) * a)
        clipped += not low <= ratio <= high
        value_loss += 0.5 * (values[states[t, b]] - target) ** 2
        entropy -= float((np.exp(log_p) * log_p).sum())
    n = len(rows)
    total = policy + config.value_cost * value_loss - config.entropy_cost * entropy
    return {
        "loss/total": total / n,
        "loss/policy": policy / n,
        "loss/value": value_loss / n,
        "loss/entropy": entropy / n,
        "clipped_share": clipped / n,
    }


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"normalize_advantage": False},
        {"clip_range": 0.6, "entropy_cost": 0.3, "value_cost": 1.5},
        {"gae_lambda": 0.5, "discount": 0.75},
    ],
)
def test_the_loss_is_a_slow_loop(settings: dict[str, Any]) -> None:
    table, batch = table_batch()
    # Numbers that float32 holds exactly: the discount is one.
    config = config_of(**{"discount": 63 / 64, **settings})
    algorithm = Ppo(table, config, spec=SPEC)
    total, metrics = algorithm.loss(algorithm.samples(batch), clip_range=config.clip_range)
    expected = by_hand(table, batch, config)
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value, abs=1e-6 if "share" in name else 1e-10)
    assert total.item() == pytest.approx(expected["loss/total"], abs=1e-10)
    assert 0.1 < expected["clipped_share"] < 0.9


def test_values_are_clipped_where_that_is_asked() -> None:
    table, batch = table_batch()
    algorithm = Ppo(table, config_of(value_clip_range=0.1), spec=SPEC)
    samples = algorithm.samples(batch)
    still, _ = algorithm.loss(samples, clip_range=0.2)
    with torch.no_grad():
        table.value += 0.3  # all moved further than the clip
    moved, metrics = algorithm.loss(samples, clip_range=0.2)
    value = samples.value + 0.3
    near = (samples.value + 0.1 - samples.target).square()
    expected = 0.5 * torch.maximum((value - samples.target).square(), near).mean()
    torch.testing.assert_close(metrics["loss/value"], expected)
    assert still != moved


@pytest.mark.parametrize("lstm_size", [0, 8])
@pytest.mark.parametrize("kind", ["discrete", "multi", "continuous"])
def test_on_policy_the_first_ratio_is_1(
    spec_of: MakeSpec, random_batch: MakeBatch, kind: str, lstm_size: int
) -> None:
    spec = spec_of(kind, mask=kind == "discrete")
    model = mlp(spec, NetworkConfig(lstm_size=lstm_size, normalize_observations=True))
    algorithm = Ppo(model, config_of(epochs=1, minibatches=1), spec=spec)
    model.observe(torch.randn(50, 5) * 4 + 1)
    batch = random_batch(spec, model.initial_state(B), T=T, B=B)
    steps, state = [], batch.recurrent
    with torch.no_grad():
        for t in range(T):  # as the server acted, one row after the other
            row = PolicyInput(*(None if x is None else x[t : t + 1] for x in batch.inputs))
            output, state = model(row, state)
            mask = None if row.action_mask is None else row.action_mask[0]
            parameters = algorithm._distribution.masked(output.parameters[0], mask)
            steps.append(algorithm._distribution.log_prob(parameters, batch.action[t]))
    update = algorithm.update(batch._replace(log_prob=torch.stack(steps)), progress=0.0)
    assert update.metrics["importance_ratio_mean"].item() == pytest.approx(1.0, abs=1e-5)
    assert update.metrics["kl_divergence"].item() == pytest.approx(0.0, abs=1e-6)
    assert update.metrics["clipped_share"] == 0
    # The statistics learned from this batch only afterwards, each row once.
    assert model.normalizer is not None
    assert model.normalizer.total == 50 + T * B


class Recorder(nn.Module):
    """Passes on to a network what it is given, and keeps it."""

    def __init__(self, model: PolicyValueNet) -> None:
        super().__init__()
        self.model = model
        self.seen: list[tuple[PolicyInput, tuple[Tensor, ...]]] = []

    def forward(self, inputs: PolicyInput, recurrent: tuple[Tensor, ...]) -> Any:
        self.seen.append((inputs, recurrent))
        return self.model(inputs, recurrent)

    def initial_state(self, batch: int) -> tuple[Tensor, ...]:
        return self.model.initial_state(batch)


@pytest.mark.parametrize("lstm_size", [0, 8])
def test_every_pass_takes_every_sample_once(
    spec_of: MakeSpec, random_batch: MakeBatch, lstm_size: int
) -> None:
    spec = spec_of("discrete")
    model = Recorder(mlp(spec, NetworkConfig(lstm_size=lstm_size)))
    algorithm = Ppo(model, config_of(epochs=3), spec=spec)
    recurrent = tuple(torch.randn(B, lstm_size) for _ in range(2 if lstm_size else 0))
    batch = random_batch(spec, recurrent, T=T, B=B)
    assert algorithm.experience.passes == 3
    algorithm.update(batch, progress=0.0)
    values, *steps = model.seen
    assert values[0] is batch.inputs
    assert len(steps) == 3 * 2
    orders = []
    for epoch in range(3):
        taken = [inputs.observation for inputs, _ in steps[2 * epoch : 2 * epoch + 2]]
        assert taken[0].shape == taken[1].shape
        observation = torch.cat(taken, dim=1)
        if lstm_size:  # whole unrolls, with the state that was fed to their first row
            assert observation.shape[:2] == (T, B)
            assert taken[0].shape[1] == B // 2
            order = (observation[0, :, None] == batch.inputs.observation[0]).all((2, 3)).nonzero()
            expected = batch.inputs.observation[:-1, order[:, 1]]
            assert torch.equal(observation, expected)
            fed = torch.cat([state[0] for _, state in steps[2 * epoch : 2 * epoch + 2]])
            assert torch.equal(fed, recurrent[0][order[:, 1]])
        else:  # single rows, without the last, which only bootstraps
            rows = batch.inputs.observation[:-1].flatten(0, 1)
            assert observation.shape[0] == 1
            order = (observation[0, :, None] == rows).all((2, 3)).nonzero()
        index = order[:, 1].tolist()
        assert sorted(index) == list(range(B if lstm_size else T * B))
        orders.append(tuple(index))
    assert len(set(orders)) > 1


@pytest.mark.parametrize("kind", ["discrete", "multi", "continuous"])
@pytest.mark.parametrize("lstm_size", [0, 8])
def test_a_resumed_run_is_bit_equal(
    spec_of: MakeSpec, random_batch: MakeBatch, kind: str, lstm_size: int
) -> None:
    spec = spec_of(kind)
    network = NetworkConfig(lstm_size=lstm_size, normalize_observations=True)
    config = config_of(reward_transform="normalize")
    straight = Ppo(mlp(spec, network), config, spec=spec)
    state = tuple(torch.randn(B, lstm_size) for _ in range(2 if lstm_size else 0))
    batches = [random_batch(spec, state, T=T, B=B, seed=seed) for seed in range(3)]
    for batch in batches[:2]:
        straight.update(batch, progress=0.1)
    weights = copy.deepcopy(straight.model.state_dict())
    tensors, skeleton = flatten(straight.state_dict())
    on_disk = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    resumed = Ppo(mlp(spec, network), config, spec=spec)
    resumed.model.load_state_dict(weights)
    resumed.load_state_dict(unflatten(on_disk, skeleton))
    metrics = [rule.update(batches[2], progress=0.2).metrics for rule in (straight, resumed)]
    assert {n: x.item() for n, x in metrics[0].items()} == {
        n: x.item() for n, x in metrics[1].items()
    }
    for (name, expected), have in zip(
        straight.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(expected, have), name


def test_the_shuffles_are_saved() -> None:
    table, batch = table_batch()
    algorithm = Ppo(table, config_of(), spec=SPEC)
    algorithm.update(batch, progress=0.0)
    twin = Ppo(Table(), config_of(), spec=SPEC)
    fresh = shuffled(twin._generator, 32, 1)
    twin.load_state_dict(copy.deepcopy(algorithm.state_dict()))
    expected = shuffled(algorithm._generator, 32, 1)
    assert torch.equal(shuffled(twin._generator, 32, 1)[0], expected[0])
    assert not torch.equal(fresh[0], expected[0])


def test_schedules_follow_the_progress() -> None:
    optimizer = OptimizerConfig(optimizer="adam", learning_rate=0.1)
    table, batch = table_batch(lag=0.0)
    config = config_of(
        optimizer=optimizer, clip_range=0.4, clip_range_schedule="linear", epochs=1, minibatches=1
    )
    algorithm = Ppo(table, config, spec=SPEC)
    shifted = batch._replace(log_prob=batch.log_prob - math.log(1.3))  # all ratios are 1.3
    for progress, share in ((0.0, 0.0), (0.5, 1.0)):
        before = copy.deepcopy(table.state_dict())
        metrics = algorithm.update(shifted, progress=progress).metrics
        table.load_state_dict(before)
        assert metrics["learning_rate"].item() == pytest.approx(0.1 * (1 - progress))
        assert metrics["clipped_share"].item() == pytest.approx(share)


def test_warming_up_learns_nothing(spec_of: MakeSpec, random_batch: MakeBatch) -> None:
    spec = spec_of("continuous")
    model = mlp(spec, NetworkConfig(normalize_observations=True))
    algorithm = Ppo(model, config_of(reward_transform="normalize"), spec=spec)
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(algorithm.state_dict())
    batch = random_batch(spec, (), T=T, B=B)
    algorithm.warm_up(batch)
    assert all(p.grad is None for p in model.parameters())
    after = flatten(algorithm.state_dict())[0]
    for name, tensor in flatten(state)[0].items():
        assert torch.equal(tensor, after[name]), name
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    algorithm.update(batch, progress=0.0)
    assert not torch.equal(model.value.weight, before["value.weight"])


@pytest.mark.parametrize("lstm_size", [0, 8])
def test_a_compiled_network_meets_few_shapes(
    spec_of: MakeSpec, random_batch: MakeBatch, lstm_size: int
) -> None:
    spec = spec_of("multi")
    model = mlp(spec, NetworkConfig(lstm_size=lstm_size))
    graphs = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    model.compile(backend=count, fullgraph=True, dynamic=False)
    algorithm = Ppo(model, config_of(), spec=spec)
    state = tuple(torch.zeros(B, lstm_size) for _ in range(2 if lstm_size else 0))
    algorithm.warm_up(random_batch(spec, state, T=T, B=B))
    warm = len(graphs)
    for seed in range(2):
        algorithm.update(random_batch(spec, state, T=T, B=B, seed=seed), progress=0.0)
    assert warm == len(graphs) == 2
    torch.compiler.reset()


@pytest.mark.parametrize("where", ["reward", "bootstrap", "log_prob"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_reported(where: str, value: float) -> None:
    table, batch = table_batch()
    assert Ppo(table, config_of(), spec=SPEC).update(batch, progress=0.0).finite
    # A behaviour log-probability of inf would be a ratio of 0, which harms nothing.
    getattr(batch, where)[2, 1] = -value if where == "log_prob" else value
    assert not Ppo(Table(), config_of(), spec=SPEC).update(batch, progress=0.0).finite


def test_it_learns_a_bandit() -> None:
    optimizer = OptimizerConfig(
        optimizer="adam", learning_rate=0.05, learning_rate_schedule="constant"
    )
    table, batch = table_batch()
    algorithm = Ppo(table, config_of(optimizer=optimizer, entropy_cost=0.0), spec=SPEC)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        with torch.no_grad():
            step = [
                algorithm.act(
                    table,
                    PolicyInput(*(None if x is None else x[t : t + 1] for x in batch.inputs)),
                    (),
                    mode="sample",
                    generator=generator,
                )[0]
                for t in range(T)
            ]
        action = torch.stack([s.action for s in step])
        update = algorithm.update(
            batch._replace(
                action=action,
                log_prob=torch.stack([s.log_prob for s in step]),
                reward=(action == 1).double(),
                terminated=torch.ones(T, B, dtype=torch.bool),
                truncated=torch.zeros(T, B, dtype=torch.bool),
                bootstrap=torch.zeros(T, B).double(),
            ),
            progress=0.0,
        )
        assert update.finite
    seen = batch.inputs.observation[:-1, :, 0, 0].long().unique()
    assert (table.logits.softmax(-1)[seen, 1] > 0.9).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"discount": 1.1},
        {"gae_lambda": -0.1},
        {"epochs": 0},
        {"minibatches": 0},
        {"clip_range": 0.0},
        {"value_clip_range": -1.0},
        {"entropy_cost": -0.1},
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        PpoConfig(**settings)


def test_minibatches_must_be_equal_shares(spec_of: MakeSpec) -> None:
    spec = spec_of("discrete")
    with pytest.raises(ConfigError, match="unroll_steps x batch_unrolls=24"):
        Ppo(mlp(spec, NetworkConfig()), config_of(minibatches=5), spec=spec)
    with pytest.raises(ConfigError, match="batch_unrolls=4"):
        Ppo(mlp(spec, NetworkConfig(lstm_size=4)), config_of(minibatches=3), spec=spec)
    Ppo(mlp(spec, NetworkConfig()), config_of(minibatches=3), spec=spec)
