"""SAC's update beside one written from the paper in float64, its fixed points, and how it acts."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal, TanhTransform, TransformedDistribution

from headrace.algorithms.base import ReplayConfig
from headrace.algorithms.optimizers import OptimizerConfig
from headrace.algorithms.sac import Sac, SacConfig
from headrace.errors import ConfigError
from headrace.learner.flattening import flatten, unflatten
from headrace.networks.actor_critics import ActorCriticsNet
from headrace.networks.models import NetworkConfig, mlp
from headrace.records import Batch, Finals, PolicyInput
from headrace.specs import EnvSpec

MakeSpec = Callable[..., EnvSpec]
MakeBatch = Callable[..., Batch]
B, D = 16, 2
LEARNING_RATE, EPS = 3e-3, 1e-8


def adam(**settings: Any) -> OptimizerConfig:
    return OptimizerConfig(
        **{
            "optimizer": "adam",
            "learning_rate": LEARNING_RATE,
            "learning_rate_schedule": "constant",
            "optimizer_eps": EPS,
            "max_gradient_norm": 0.0,
            **settings,
        }
    )


def sac_of(spec: EnvSpec, network: dict[str, Any] | None = None, **settings: Any) -> Sac:
    sizes = {"heads": "actor_critics", "hidden_sizes": (16, 16), **(network or {})}
    model = mlp(spec, NetworkConfig(**sizes))
    return Sac(model, SacConfig(**{"optimizer": adam(), **settings}), spec=spec)


def never_cut(batch: Batch) -> Batch:
    return batch._replace(truncated=torch.zeros_like(batch.truncated))


# The update from the paper: loops over critics, torch.distributions, Adam written out.


class Written:
    """Algorithm 1 of arXiv:1812.05905 in float64, of the weights of a `Sac`."""

    def __init__(self, sac: Sac, *, discount: float, tau: float, target_entropy: float) -> None:
        self.discount, self.tau, self.target_entropy = discount, tau, target_entropy
        self.actor = self.doubles(sac.model.actor)
        self.critics = self.doubles(sac.model.critics)
        self.target = self.doubles(sac.target_critics)
        self.log_alpha = {"log_alpha": sac._actor.log_alpha.detach().double().clone()}
        self.moments: dict[int, tuple[Tensor, Tensor]] = {}
        self.steps = 0

    @staticmethod
    def doubles(module: Any) -> dict[str, Tensor]:
        return {name: x.detach().double().clone() for name, x in module.named_parameters()}

    @staticmethod
    def policy(actor: dict[str, Tensor], observation: Tensor) -> TransformedDistribution:
        x = observation
        for layer in (0, 1):
            weight, bias = (actor[f"torso.layers.{layer}.{name}"] for name in ("weight", "bias"))
            x = F.linear(x, weight, bias).relu()
        mean = F.linear(x, actor["head.mean.weight"], actor["head.mean.bias"])
        log_std = F.linear(x, actor["head.spread.weight"], actor["head.spread.bias"])
        normal = Normal(mean, log_std.clamp(-10, 2).exp())
        return TransformedDistribution(normal, [TanhTransform()])

    @staticmethod
    def q(critics: dict[str, Tensor], observation: Tensor, squashed: Tensor) -> list[Tensor]:
        values = []
        for n in range(len(critics["weights.0"])):
            x = torch.cat((observation, squashed), dim=1)
            for layer in range(3):
                x = x @ critics[f"weights.{layer}"][n] + critics[f"biases.{layer}"][n]
                x = x.relu() if layer < 2 else x
            values.append(x[:, 0])
        return values

    def draw(
        self, actor: dict[str, Tensor], observation: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        policy = self.policy(actor, observation)
        squashed = (policy.base_dist.mean + policy.base_dist.stddev * noise).tanh()
        return squashed, policy.log_prob(squashed).sum(dim=1)

    def adam(self, params: dict[str, Tensor], loss: Tensor, leaves: dict[str, Tensor]) -> None:
        grads = torch.autograd.grad(loss, list(leaves.values()))
        for param, grad in zip(params.values(), grads, strict=True):
            first, second = self.moments.get(id(param), (torch.zeros_like(param),) * 2)
            first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
            self.moments[id(param)] = first, second
            m, v = first / (1 - 0.9**self.steps), second / (1 - 0.999**self.steps)
            param.sub_(LEARNING_RATE * m / (v.sqrt() + EPS))

    @staticmethod
    def leaves(params: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: x.clone().requires_grad_() for name, x in params.items()}

    def update(self, batch: Batch, noises: tuple[Tensor, Tensor]) -> dict[str, float]:
        self.steps += 1
        alpha = self.log_alpha["log_alpha"].exp().clone()
        now, behind = batch.inputs.observation[:, :, 0].double()
        next_squashed, next_log_prob = self.draw(self.actor, behind, noises[0].double())
        next_q = torch.stack(self.q(self.target, behind, next_squashed)).min(dim=0).values
        goes_on = (~batch.terminated[0]).double()
        y = batch.reward[0].double() + self.discount * goes_on * (next_q - alpha * next_log_prob)
        leaves = self.leaves(self.critics)
        q = self.q(leaves, now, batch.action[0].double().tanh())
        critic_loss = torch.stack([0.5 * ((x - y) ** 2).mean() for x in q]).sum()
        self.adam(self.critics, critic_loss, leaves)
        leaves = self.leaves(self.actor)
        squashed, log_prob = self.draw(leaves, now, noises[1].double())
        least = torch.stack(self.q(self.critics, now, squashed)).min(dim=0).values
        actor_loss = (alpha * log_prob - least).mean()
        self.adam(self.actor, actor_loss, leaves)
        leaves = self.leaves(self.log_alpha)
        entropy_gap = (-log_prob.detach() - self.target_entropy).mean()
        self.adam(self.log_alpha, leaves["log_alpha"].exp() * entropy_gap, leaves)
        for name, param in self.target.items():
            param.mul_(1 - self.tau).add_(self.tau * self.critics[name])
        return {
            "loss/critic": critic_loss.item(),
            "loss/actor": actor_loss.item(),
            "loss/entropy": -log_prob.mean().item(),
            "temperature": alpha.item(),
        }


@pytest.mark.parametrize("target_entropy", [None, 0.7])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_updates_are_those_of_the_paper(
    spec_of: MakeSpec, random_batch: MakeBatch, count: int, target_entropy: float | None
) -> None:
    spec = spec_of("continuous")
    settings = {"discount": 0.9, "target_tau": 0.1, "initial_temperature": 0.5}
    sac = sac_of(spec, {"num_critics": count}, target_entropy=target_entropy, **settings)
    wanted = -D if target_entropy is None else target_entropy
    written = Written(sac, discount=0.9, tau=0.1, target_entropy=wanted)
    for seed in range(4):
        batch = never_cut(random_batch(spec, (), T=1, B=B, seed=seed))
        state = sac._generator.get_state()
        draws = sac.draw(B)
        sac._generator.set_state(state)
        metrics = sac.update(batch, progress=0.0).metrics
        for name, value in written.update(batch, (draws.next_noise, draws.noise)).items():
            assert metrics[name].item() == pytest.approx(value, rel=1e-4, abs=1e-5), name
    pairs = [
        (sac.model.actor, written.actor),
        (sac.model.critics, written.critics),
        (sac.target_critics, written.target),
    ]
    for module, params in pairs:
        for name, param in module.named_parameters():
            # Adam turns the sign of the least gradient into a step: a few may differ.
            off = (param.detach() - params[name].float()).abs() > 1e-4
            assert off.float().mean() < 0.01, name
    assert sac._actor.log_alpha.item() == pytest.approx(
        written.log_alpha["log_alpha"].item(), abs=1e-5
    )


def settled(sac: Sac) -> list[Tensor]:
    """All that an update changes, as it is now."""
    return [tensor.clone() for tensor in sac._tensors()]


NETWORKS: list[dict[str, Any]] = [{}, {"critic_dropout": 0.2, "critic_layer_norm": True}]


@pytest.mark.parametrize("order", ["sequential", "simultaneous"])
@pytest.mark.parametrize("network", NETWORKS)
def test_an_update_is_one_graph(
    spec_of: MakeSpec,
    random_batch: MakeBatch,
    monkeypatch: pytest.MonkeyPatch,
    network: dict[str, Any],
    order: str,
) -> None:
    """Fullgraph: whatever a graph could not hold raises. Inductor itself is in tests/run."""
    compiled = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compiled)
    spec = spec_of("continuous")
    pair = [sac_of(spec, network, update_order=order) for _ in range(2)]
    pair[1].model.load_state_dict(pair[0].model.state_dict())
    pair[1].target_critics.load_state_dict(pair[0].target_critics.state_dict())
    pair[1].compile()
    for seed in range(3):
        batch = never_cut(random_batch(spec, (), T=1, B=B, seed=seed))
        for sac in pair:
            sac.update(batch, progress=0.0)
    torch.testing.assert_close(settled(pair[0]), settled(pair[1]))


RING, START, GAMMA = 4, 4, 0.5


@pytest.mark.parametrize("temperature", [0.0, 0.6])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("end", ["truncated", "terminated"])
def test_values_are_those_of_a_life_that_the_clock_cuts(
    steps: int, end: str, temperature: float
) -> None:
    """Four states in a ring pay 1 for ever; after the last an episode ends, and the next begins
    with a fall: a target that looked beyond the end would show it."""
    spec = EnvSpec(
        name="ring",
        observation_space=gym.spaces.Box(0, 1, (RING + 1,), np.float32),
        action_space=gym.spaces.Box(-1, 1, (1,), np.float32),
    )
    sac = sac_of(
        spec,
        {"hidden_sizes": (64,)},
        discount=GAMMA,
        n_steps=steps,
        temperature=temperature,
        target_tau=0.2,
        optimizer=adam(learning_rate=1e-2, learning_rate_schedule="linear"),
    )
    hot = torch.eye(RING + 1)
    life = torch.tensor([START, *range(RING)] * 4)
    first = torch.arange(RING + 1).repeat(20)  # where each sequence starts in it
    at = first + torch.arange(steps + 1)[:, None]
    state = life[at]
    ended = state[:-1] == RING - 1
    step, column = ended.nonzero().unbind(1)
    count = len(step)
    finals = Finals(
        observation=hot[torch.zeros(count, dtype=torch.int64)][:, None],
        step=step,
        column=column,
        valid=torch.ones(count, dtype=torch.bool),
    )
    never = torch.zeros_like(ended)
    zeros = torch.zeros(state.shape)
    generator = torch.Generator().manual_seed(0)
    inputs = PolicyInput(hot[state][:, :, None], zeros, zeros[..., None], zeros.bool())
    updates = 400
    for update in range(updates):
        row = PolicyInput(*(None if x is None else x.flatten(0, 1)[None] for x in inputs))
        acted, _ = sac.act(sac.model, row, (), mode="sample", generator=generator)
        action = acted.action.view(*state.shape, 1)[:-1].detach()
        if not temperature:  # nothing keeps such a policy from trying but one action
            action = torch.empty_like(action).uniform_(-2, 2, generator=generator)
        batch = Batch(
            inputs=inputs,
            recurrent=(),
            action=action,
            log_prob=acted.log_prob.view(state.shape)[:-1].detach(),
            reward=torch.where(state[:-1] == START, -9.0, 1.0),
            terminated=ended if end == "terminated" else never,
            truncated=ended if end == "truncated" else never,
            bootstrap=zeros[:-1],
            version=torch.zeros_like(ended, dtype=torch.int64),
            finals=finals if end == "truncated" else None,
        )
        assert sac.update(batch, progress=update / updates).finite
    # Nothing depends on actions, so entropy is all that the policy can raise: that of the uniform.
    bonus = GAMMA * temperature * math.log(2.0)
    truth = [0.0] * (RING + 1)
    if end == "truncated":
        truth[:RING] = [(1 + bonus) / (1 - GAMMA)] * RING
    else:
        truth[RING - 1] = 1.0
        for s in reversed(range(RING - 1)):
            truth[s] = 1.0 + bonus + GAMMA * truth[s + 1]
    truth[START] = -9.0 + bonus + GAMMA * truth[0]
    action = torch.zeros(RING + 1, 1)
    with torch.no_grad():
        q_NB = sac.model.q(hot[:, None], action)
    torch.testing.assert_close(q_NB, torch.tensor([truth] * 2), atol=0.1, rtol=0.0)


def test_unknown_ends_teach_the_critics_nothing(spec_of: MakeSpec, random_batch: MakeBatch) -> None:
    spec = spec_of("continuous")
    sac = sac_of(spec)
    batch = random_batch(spec, (), T=1, B=B)
    cut = batch.truncated
    assert cut.any()
    spoilt = batch._replace(reward=torch.where(cut, 1e6, batch.reward))
    losses = []
    for one in (batch, spoilt):
        update = copy.deepcopy(sac).update(one, progress=0.0)
        losses.append(update.metrics["loss/critic"].item())
        assert update.metrics["truncated_skipped"] == cut.sum()
    assert losses[0] == losses[1]


def test_weights_of_samples_count_and_priorities_come_back_if_wanted(
    spec_of: MakeSpec, random_batch: MakeBatch
) -> None:
    spec = spec_of("continuous")
    batch = never_cut(random_batch(spec, (), T=1, B=B))
    assert sac_of(spec).update(batch, progress=0.0).priority is None
    sac = sac_of(spec, replay=ReplayConfig(priority_exponent=0.6))
    whole = copy.deepcopy(sac).update(batch, progress=0.0)
    half = copy.deepcopy(sac).update(batch._replace(weight=torch.full((B,), 0.5)), progress=0.0)
    assert half.metrics["loss/critic"].item() == pytest.approx(
        whole.metrics["loss/critic"].item() / 2
    )
    assert whole.priority is not None
    assert whole.priority.shape == (B,)
    assert whole.priority.mean().item() == pytest.approx(
        whole.metrics["loss/td_error_mean"].item(), rel=1e-4
    )


def test_targets_follow_slowly_and_have_no_gradient(
    spec_of: MakeSpec, random_batch: MakeBatch
) -> None:
    spec = spec_of("continuous")
    sac = sac_of(spec, target_tau=0.25)
    before = copy.deepcopy(sac.target_critics)
    assert all(map(torch.equal, before.parameters(), sac.model.critics.parameters()))
    sac.update(never_cut(random_batch(spec, (), T=1, B=B)), progress=0.0)
    parts = (before, sac.model.critics, sac.target_critics)
    for old, online, target in zip(*(part.parameters() for part in parts), strict=True):
        assert not torch.equal(old, online)
        torch.testing.assert_close(target, 0.75 * old + 0.25 * online)
        assert target.grad is None
        assert not target.requires_grad


@pytest.mark.parametrize("target_entropy", [-1.0, 0.5])
def test_entropy_comes_to_its_target(target_entropy: float) -> None:
    """A bandit that pays for one action: entropy costs reward, so the temperature sets it."""
    spec = EnvSpec(
        name="bandit",
        observation_space=gym.spaces.Box(-1, 1, (1,), np.float32),
        action_space=gym.spaces.Box(-1, 1, (1,), np.float32),
    )
    sac = sac_of(
        spec,
        {"hidden_sizes": (32,)},
        target_entropy=target_entropy,
        initial_temperature=0.05,
        optimizer=adam(learning_rate=1e-2),
    )
    zeros = torch.zeros(1, 64)
    ended = ~zeros.bool()
    inputs = PolicyInput(torch.zeros(2, 64, 1, 1), torch.zeros(2, 64), torch.zeros(2, 64, 1), ended)
    generator = torch.Generator().manual_seed(0)
    entropies = []
    for _ in range(600):
        action = torch.empty(1, 64, 1).uniform_(-2, 2, generator=generator)
        batch = Batch(
            inputs=inputs,
            recurrent=(),
            action=action,
            log_prob=zeros,
            reward=-(action[..., 0].tanh() - 0.3).square(),
            terminated=ended,
            truncated=~ended,
            bootstrap=zeros,
            version=zeros.long(),
        )
        metrics = sac.update(batch, progress=0.0).metrics
        entropies.append(metrics["loss/entropy"].item())
    assert sum(entropies[-100:]) / 100 == pytest.approx(target_entropy, abs=0.15)
    step, _ = sac.act(sac.model, PolicyInput(*(x[:1] for x in inputs[:4])), (), mode="greedy")
    assert step.env_action is not None
    assert step.env_action.mean().item() == pytest.approx(0.3, abs=0.1)


def test_a_fixed_temperature_stays(spec_of: MakeSpec, random_batch: MakeBatch) -> None:
    spec = spec_of("continuous")
    sac = sac_of(spec, temperature=0.2)
    for seed in range(3):
        batch = never_cut(random_batch(spec, (), T=1, B=B, seed=seed))
        metrics = sac.update(batch, progress=0.0).metrics
        assert metrics["temperature"].item() == pytest.approx(0.2)
    assert sac.alpha.item() == pytest.approx(0.2)


def test_it_acts_by_its_policy(spec_of: MakeSpec) -> None:
    spec = spec_of("continuous")
    sac = sac_of(spec, {"initial_log_std": 1.5})
    many = 500
    zeros = torch.zeros(1, many)
    inputs = PolicyInput(torch.randn(1, many, 1, 5), zeros, torch.zeros(1, many, D), zeros.bool())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        step, state = sac.act(sac.model, inputs, (), mode="sample", generator=generator)
        parameters = sac.model(inputs, ())[0].parameters[0]
        greedy, _ = sac.act(sac.model, inputs, (), mode="greedy")
    assert state == ()
    assert step.env_action is not None
    low, high = torch.tensor(spec.action_space.low), torch.tensor(spec.action_space.high)
    assert (step.env_action >= low).all()
    assert (step.env_action <= high).all()
    assert (step.env_action.std(dim=0) > 0.2 * (high - low)).all()
    torch.testing.assert_close(step.env_action, low + (step.action.tanh() + 1) / 2 * (high - low))
    torch.testing.assert_close(step.log_prob, sac._policy.log_prob(parameters, step.action))
    assert torch.equal(step.value, zeros[0])
    assert torch.equal(greedy.action, parameters[:, :D])


def test_sequences_are_transitions(spec_of: MakeSpec) -> None:
    sac = sac_of(spec_of("continuous"), n_steps=3, batch_unrolls=8)
    experience, replay = sac.experience, sac.experience.replay
    assert replay is not None
    assert (replay.sequence_steps, replay.stride_steps, replay.learned_steps) == (3, 1, 1)
    assert experience.samples_per_update == 8
    assert (replay.settings.priority_exponent, replay.settings.replay_capacity) == (0.0, 1_000_000)


def resumed(spec: EnvSpec, network: dict[str, Any], batches: list[Batch]) -> tuple[Sac, Sac]:
    straight, other = sac_of(spec, network, n_steps=2), sac_of(spec, network, n_steps=2)
    for batch in batches[:-1]:
        straight.update(batch, progress=0.0)
    other.model.load_state_dict(copy.deepcopy(straight.model.state_dict()))
    tensors, tree = flatten(copy.deepcopy(straight.state_dict()))
    other.load_state_dict(unflatten(tensors, tree))
    for sac in (straight, other):
        sac.update(batches[-1], progress=0.0)
    return straight, other


def test_a_resumed_run_goes_on_bit_for_bit(spec_of: MakeSpec, random_batch: MakeBatch) -> None:
    spec = spec_of("continuous")
    network = {"critic_dropout": 0.3, "critic_layer_norm": True, "normalize_observations": True}
    batches = [random_batch(spec, (), T=2, B=B, seed=seed) for seed in range(4)]
    pair = resumed(spec, network, batches)
    for of in (lambda sac: sac.model, lambda sac: sac.target_critics):
        states = [of(sac).state_dict() for sac in pair]
        for name, expected in states[0].items():
            assert torch.equal(expected, states[1][name]), name
    assert torch.equal(pair[0].alpha, pair[1].alpha)
    assert pair[0].alpha != 1.0
    normalizer = pair[0].model.normalizer
    assert normalizer is not None
    assert normalizer.total == 4 * B, "each learned row once"


def test_warm_up_changes_nothing(spec_of: MakeSpec, random_batch: MakeBatch) -> None:
    spec = spec_of("continuous")
    sac = sac_of(spec, {"critic_dropout": 0.3})
    model, state = copy.deepcopy(sac.model.state_dict()), copy.deepcopy(sac.state_dict())
    sac.warm_up(random_batch(spec, (), T=1, B=B))
    assert all(torch.equal(x, sac.model.state_dict()[name]) for name, x in model.items())
    assert torch.equal(state["generator"], sac.state_dict()["generator"])
    assert all(p.grad is None for p in sac.model.parameters())


def test_mistakes_are_named(spec_of: MakeSpec) -> None:
    network = NetworkConfig(heads="actor_critics")
    model = mlp(spec_of("continuous"), network)
    assert isinstance(model, ActorCriticsNet)
    for kind in ("discrete", "multi"):
        with pytest.raises(ConfigError, match=r"sac needs continuous actions, .*r2d2, impala"):
            Sac(model, SacConfig(), spec=spec_of(kind))
    with pytest.raises(ConfigError, match="not a PolicyValueNet"):
        Sac(mlp(spec_of("continuous"), NetworkConfig()), SacConfig(), spec=spec_of("continuous"))
    mistakes: list[dict[str, Any]] = [
        {"n_steps": 0},
        {"batch_unrolls": 0},
        {"target_tau": 0.0},
        {"target_tau": 1.1},
        {"discount": 1.1},
        {"discount": math.nan},
        {"initial_temperature": 0.0},
        {"temperature": -0.1},
        {"temperature": math.inf},
        {"temperature": 0.1, "target_entropy": -1.0},
    ]
    for settings in mistakes:
        with pytest.raises(ConfigError):
            SacConfig(**settings)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_neither_acting_nor_learning_waits_for_the_device(
    spec_of: MakeSpec, random_batch: MakeBatch
) -> None:
    spec = spec_of("continuous")
    network = {"critic_dropout": 0.1, "normalize_observations": True}
    sizes = NetworkConfig(heads="actor_critics", **network)  # type: ignore[arg-type]
    sac = Sac(mlp(spec, sizes).cuda(), SacConfig(n_steps=2), spec=spec)
    host = random_batch(spec, (), T=2, B=B)
    step, column = host.truncated.nonzero().unbind(1)
    valid = torch.ones(len(step), dtype=torch.bool)
    finals = Finals(torch.randn(len(step), 1, 5), step, column, valid)
    rest = {
        name: value.cuda()
        for name in Batch._fields[2:]
        if isinstance(value := getattr(host, name), Tensor)
    }
    inputs = PolicyInput(*(None if x is None else x.cuda() for x in host.inputs))
    on_gpu = Finals(*(x.cuda() for x in finals))
    batch = Batch(inputs=inputs, recurrent=(), finals=on_gpu, **rest)
    row = PolicyInput(*(None if x is None else x[:1] for x in inputs))
    for mode in ("default", "error"):  # the first time, libraries and constants are set up
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for action_mode in ("sample", "greedy", "epsilon"):
                sac.act(sac.model, row, (), mode=action_mode, epsilon=0.5)
            assert sac.update(batch, progress=0.0) is not None
        finally:
            torch.cuda.set_sync_debug_mode("default")
