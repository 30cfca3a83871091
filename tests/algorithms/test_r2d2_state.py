"""What R2D2 keeps, and where its update runs: burn-in, precision, resume, no waiting."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from headrace.algorithms.optimizers import OptimizerConfig
from headrace.algorithms.r2d2 import R2d2, R2d2Config
from headrace.learner.flattening import flatten, unflatten
from headrace.networks.config import NetworkConfig
from headrace.networks.models import mlp, nature
from headrace.records import Batch, Finals, PolicyInput
from headrace.specs import EnvSpec

MakeSpec = Callable[..., EnvSpec]
MakeBatch = Callable[..., Batch]
ADAM = OptimizerConfig(optimizer="adam", learning_rate=0.05, max_gradient_norm=0.0)


def recurrent_of(spec: EnvSpec, **settings: Any) -> R2d2:
    model = mlp(spec, NetworkConfig(heads="duelling", lstm_size=6))
    sizes = {"unroll_steps": 5, "burn_in_steps": 3, "n_steps": 2, "discount": 0.9}
    return R2d2(model, R2d2Config(**{**sizes, **settings}), spec=spec)


def test_burn_in_has_no_gradient_and_starts_from_the_stored_state(
    spec_of: MakeSpec, random_batch: MakeBatch
) -> None:
    spec = spec_of("discrete")
    r2d2 = recurrent_of(spec)
    state = tuple(torch.randn(2, 6, requires_grad=True) for _ in range(2))
    batch = random_batch(spec, state, T=8, B=2)
    inputs = batch.inputs._replace(reset=torch.zeros(9, 2, dtype=torch.bool))
    inputs.observation.requires_grad_()
    batch = batch._replace(
        inputs=inputs,
        terminated=torch.zeros(8, 2, dtype=torch.bool),
        truncated=torch.zeros(8, 2, dtype=torch.bool),
    )
    total = r2d2.loss(batch).total
    total.backward()
    assert inputs.observation.grad is not None
    reached = inputs.observation.grad.flatten(1).abs().sum(dim=1) > 0
    # The last row only bootstraps: it has no gradient either.
    assert reached.tolist() == [False] * 3 + [True] * 5 + [False]
    assert all(part.grad is None for part in state)
    elsewhere = batch._replace(recurrent=tuple(part.detach() + 1 for part in state))
    assert r2d2.loss(elsewhere).total != total
    cleared = inputs.reset.clone()
    cleared[0] = True
    from_reset = inputs._replace(reset=cleared)
    losses = [r2d2.loss(x._replace(inputs=from_reset)).total for x in (batch, elsewhere)]
    assert losses[0] == losses[1]


def test_low_precision_is_the_torsos_alone_and_keeps_every_gradient() -> None:
    spec = EnvSpec(
        name="pixels",
        observation_space=gym.spaces.Box(0, 255, (36, 36), np.uint8),
        action_space=gym.spaces.Discrete(4),
    )
    model = nature(spec, NetworkConfig(heads="duelling", lstm_size=6))
    config = R2d2Config(unroll_steps=3, burn_in_steps=2, n_steps=2)
    exact = R2d2(model, config, spec=spec)
    low = R2d2(copy.deepcopy(model), config, spec=spec, precision=torch.bfloat16)
    never = torch.zeros(5, 2, dtype=torch.bool)
    inputs = PolicyInput(
        observation=torch.randint(256, (6, 2, 1, 36, 36), dtype=torch.uint8),
        reward=torch.randn(6, 2),
        previous_action=torch.randint(4, (6, 2)),
        reset=torch.zeros(6, 2, dtype=torch.bool),
    )
    zeros, action = torch.zeros(5, 2), torch.randint(4, (5, 2))
    batch = Batch(
        inputs=inputs,
        recurrent=(torch.randn(2, 6), torch.randn(2, 6)),
        action=action,
        log_prob=zeros,
        reward=torch.randn(5, 2),
        terminated=never,
        truncated=never,
        bootstrap=zeros,
        version=action,
    )
    totals = []
    for rule in (exact, low):
        total, _, priority_B = rule.loss(batch)
        assert total.dtype == priority_B.dtype == torch.float32
        total.backward()
        totals.append(total.item())
    assert totals[0] != totals[1]
    assert totals[0] == pytest.approx(totals[1], rel=0.05)
    pairs = zip(exact.model.named_parameters(), low.model.parameters(), strict=True)
    for (name, a), b in pairs:
        assert a.grad is not None, name
        assert b.grad is not None, name
        assert (a.grad - b.grad).norm() < 0.1 * a.grad.norm(), name


def test_a_restored_rule_takes_the_update_that_it_would_have_taken(
    spec_of: MakeSpec, random_batch: MakeBatch
) -> None:
    spec = spec_of("discrete")
    straight, resumed = (
        recurrent_of(spec, target_update_interval=4, optimizer=ADAM) for _ in range(2)
    )
    batches = [random_batch(spec, (torch.randn(2, 6),) * 2, T=8, B=2, seed=i) for i in range(5)]
    for batch in batches[:3]:
        straight.update(batch, progress=0.0)
    tensors, skeleton = flatten(straight.state_dict())
    on_disk = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    resumed.model.load_state_dict(straight.model.state_dict())
    resumed.load_state_dict(unflatten(on_disk, skeleton))
    for batch in batches[3:]:
        updates = [rule.update(batch, progress=0.0) for rule in (straight, resumed)]
        assert updates[0].priority is not None
        assert updates[1].priority is not None
        assert torch.equal(updates[0].priority, updates[1].priority)
        assert updates[0].metrics == updates[1].metrics
        for networks in ("model", "target_model"):
            pairs = zip(
                getattr(straight, networks).parameters(),
                getattr(resumed, networks).parameters(),
                strict=True,
            )
            assert all(torch.equal(a, b) for a, b in pairs)


class NeverWaits(TorchDispatchMode):
    """Fails on what makes the host wait for a device."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in self.WAITS, func
        return func(*args, **(kwargs or {}))


def an_update(spec: EnvSpec, batch: Batch, device: str) -> tuple[R2d2, Batch]:
    """A rule and a batch with final observations, on a device."""
    model = mlp(spec, NetworkConfig(heads="duelling", lstm_size=6)).to(device)
    config = R2d2Config(
        unroll_steps=5, burn_in_steps=3, n_steps=2, target_update_interval=1, optimizer=ADAM
    )
    where = torch.zeros(2, dtype=torch.int64, device=device)
    finals = Finals(torch.ones(2, 1, 5, device=device), where + 4, where, where == 0)
    moved = {name: x.to(device) for name, x in batch._asdict().items() if isinstance(x, Tensor)}
    inputs = PolicyInput(*(x if x is None else x.to(device) for x in batch.inputs))
    recurrent = tuple(part.to(device) for part in batch.recurrent)
    batch = batch._replace(**moved, inputs=inputs, recurrent=recurrent, finals=finals)
    return R2d2(model, config, spec=spec), batch


def test_an_update_never_waits_for_a_device(spec_of: MakeSpec, random_batch: MakeBatch) -> None:
    spec = spec_of("discrete", mask=True)
    rule, batch = an_update(
        spec, random_batch(spec, (torch.randn(2, 6),) * 2, T=8, B=2), device="cpu"
    )
    with NeverWaits():
        update = rule.update(batch, progress=0.0)
        with pytest.raises(AssertionError):
            bool(update.finite)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_update_never_waits_for_the_gpu(spec_of: MakeSpec, random_batch: MakeBatch) -> None:
    spec = spec_of("discrete", mask=True)
    rule, batch = an_update(
        spec, random_batch(spec, (torch.randn(2, 6),) * 2, T=8, B=2), device="cuda"
    )
    rule.update(batch, progress=0.0)  # the optimiser's state is made
    torch.cuda.set_sync_debug_mode("error")
    try:
        update = rule.update(batch, progress=0.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert update.finite


@pytest.mark.parametrize("where", ["observation", "reward"])
def test_a_nan_anywhere_is_reported(spec_of: MakeSpec, random_batch: MakeBatch, where: str) -> None:
    spec = spec_of("discrete")
    rule, batch = an_update(
        spec, random_batch(spec, (torch.randn(2, 6),) * 2, T=8, B=2), device="cpu"
    )
    assert rule.update(batch, progress=0.0).finite
    (batch.inputs.observation if where == "observation" else batch.reward)[4, 1] = torch.nan
    assert not rule.update(batch, progress=0.0).finite
