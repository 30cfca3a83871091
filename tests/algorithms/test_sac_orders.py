"""How SAC's updates are ordered, grouped, split over devices, compiled and captured."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headrace.algorithms.functional_adam import FunctionalAdam
from headrace.algorithms.optimizers import OptimizerConfig
from headrace.algorithms.sac import Sac, SacConfig
from headrace.algorithms.sac_orders import Simultaneous, to
from headrace.errors import ConfigError
from headrace.networks.actor_critics import ActorCriticsNet
from headrace.networks.models import NetworkConfig, mlp
from headrace.records import Batch
from headrace.specs import EnvSpec

MakeSpec = Callable[..., EnvSpec]
MakeBatch = Callable[..., Batch]
B = 16
CPU = torch.device("cpu")
DROQ = {"critic_dropout": 0.2, "critic_layer_norm": True}


def sac_of(spec: EnvSpec, network: dict[str, Any] | None = None, **settings: Any) -> Sac:
    torch.manual_seed(5)
    sizes = {"heads": "actor_critics", "hidden_sizes": (16, 16), **(network or {})}
    return Sac(mlp(spec, NetworkConfig(**sizes)), SacConfig(**settings), spec=spec)


def batches_of(spec: EnvSpec, random_batch: MakeBatch, count: int, size: int = B) -> list[Batch]:
    batches = [random_batch(spec, (), T=1, B=size, seed=seed) for seed in range(count)]
    return [batch._replace(truncated=torch.zeros_like(batch.truncated)) for batch in batches]


def settled(sac: Sac) -> list[Tensor]:
    """All that an update changes, as it is now."""
    return [tensor.clone() for tensor in sac._tensors()]


def learn(sac: Sac, batches: list[Batch]) -> list[dict[str, float]]:
    updates = [sac.update(batch, progress=0.0) for batch in batches]
    assert all(update.finite for update in updates)
    return [
        {name: value.item() for name, value in update.metrics.items()} for update in updates[-1:]
    ]


@pytest.mark.parametrize("threads", [False, True])
def test_two_devices_learn_what_one_does_simultaneously(
    spec_of: MakeSpec, random_batch: MakeBatch, threads: bool
) -> None:
    """Both on the CPU; bit for bit, whichever side is the faster one."""
    spec = spec_of("continuous")
    settings = {"updates_per_call": 3, "n_steps": 1}
    one = sac_of(spec, DROQ, update_order="simultaneous", **settings)
    two = sac_of(spec, DROQ, **settings)
    two.place(CPU, CPU)
    batches = batches_of(spec, random_batch, 4, size=3 * B)
    of_one = learn(one, batches)
    with ThreadPoolExecutor(2) as pool:
        seen = set()

        def beside(work: Callable[[], Any]) -> Callable[[], Any]:
            def watched() -> Any:
                seen.add(threading.get_ident())
                return work()

            return pool.submit(watched).result

        if threads:
            two.beside = beside
        of_two = learn(two, batches)
    assert bool(seen) == threads
    assert threading.get_ident() not in seen
    assert all(map(torch.equal, settled(one), settled(two)))
    assert of_one == of_two


def test_the_orders_differ_by_what_the_actor_learns_from(
    spec_of: MakeSpec, random_batch: MakeBatch
) -> None:
    """One update: the critics learn alike; the actor by critics of before, or by new ones."""
    spec = spec_of("continuous")
    batch = batches_of(spec, random_batch, 1)[0]
    simultaneous, sequential = (
        sac_of(spec, update_order=order) for order in ("simultaneous", "sequential")
    )
    before = copy.deepcopy(simultaneous)
    learn(simultaneous, [batch])
    learn(sequential, [batch])
    for part in ("critics", "target_params"):
        pairs = [
            one._critics.optimizer.params if part == "critics" else one._critics.target_params
            for one in (simultaneous, sequential)
        ]
        for name, tensor in pairs[0].items():
            torch.testing.assert_close(tensor, pairs[1][name])
    # Written with autograd, from the critics of before and of after.
    transition, draws = before.transition(batch), before.draw(B)
    for sac, critics in ((simultaneous, before), (sequential, sequential)):
        model = copy.deepcopy(before.model)
        parameters = model.actor(transition.observation)
        action = before._policy.placed(parameters, draws.noise)
        log_prob = before._policy.log_prob(parameters, action)
        q = critics.model.critics(transition.observation, action)
        loss = (before.alpha * log_prob - q.amin(dim=0)).mean()
        grads = torch.autograd.grad(loss, list(model.actor.parameters()))
        for grad, first in zip(grads, sac._actor.optimizer.first.values(), strict=True):
            torch.testing.assert_close(0.1 * grad, first, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("order", ["sequential", "simultaneous"])
def test_several_updates_in_one_call_are_several_updates(
    spec_of: MakeSpec, random_batch: MakeBatch, order: str
) -> None:
    spec = spec_of("continuous")
    many = sac_of(spec, update_order=order, updates_per_call=4)
    single = sac_of(spec, update_order=order)
    whole = batches_of(spec, random_batch, 1, size=4 * B)[0]
    assert many.experience.unrolls_per_call == 4 * many.experience.batch_unrolls
    draws = many.draw(4 * B)
    monkeyed = iter(range(4))

    def own_share(_: int) -> Any:
        index = next(monkeyed)
        rows = slice(index * B, (index + 1) * B)
        return draws._replace(next_noise=draws.next_noise[rows], noise=draws.noise[rows])

    many.draw = lambda _: draws  # type: ignore[method-assign]
    single.draw = own_share  # type: ignore[method-assign]
    learn(many, [whole])
    for index in range(4):
        rows = slice(index * B, (index + 1) * B)
        inputs = whole.inputs._replace(observation=whole.inputs.observation[:, rows])
        parts = {
            name: getattr(whole, name)[:, rows]
            for name in ("action", "log_prob", "reward", "terminated", "truncated")
        }
        learn(single, [whole._replace(inputs=inputs, **parts)])
    torch.testing.assert_close(settled(many), settled(single))
    assert many._updates == single._updates == 4


def called_again(work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """Replays by calling, and writes where the captured call wrote, as a graph does."""
    outputs = work()

    def replay() -> None:
        for into, new in zip(outputs, work(), strict=True):
            for tensor, value in zip(sum(into, ()), sum(new, ()), strict=True):
                tensor.copy_(value)

    return replay, outputs


@pytest.mark.parametrize("order", ["sequential", "simultaneous"])
def test_a_captured_call_learns_what_a_plain_one_does(
    spec_of: MakeSpec, random_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    spec = spec_of("continuous")
    batches = batches_of(spec, random_batch, 4, size=2 * B)
    captured, plain = (sac_of(spec, DROQ, update_order=order, updates_per_call=2) for _ in range(2))
    captured.compile(called_again)
    before = settled(captured)
    captured.warm_up(batches[0])
    assert all(map(torch.equal, before, settled(captured))), "the warm-up is taken back"
    first = captured.update(batches[0], progress=0.0).metrics
    kept = {name: value.item() for name, value in first.items()}
    learn(plain, batches[:1])
    assert learn(captured, batches[1:]) == learn(plain, batches[1:])
    assert all(map(torch.equal, settled(captured), settled(plain)))
    assert {name: value.item() for name, value in first.items()} == kept, "whoever keeps metrics"


def test_a_side_that_fails_is_heard(
    spec_of: MakeSpec, random_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The actor's thread waits for the critics': it must not wait for ever."""
    spec = spec_of("continuous")
    sac = sac_of(spec)
    sac.place(CPU, CPU)

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("device lost")

    monkeypatch.setattr(sac._order, "_judge", broken)
    with ThreadPoolExecutor(1) as pool:
        sac.beside = lambda work: pool.submit(work).result
        with pytest.raises(RuntimeError, match="device lost"):
            learn(sac, batches_of(spec, random_batch, 1))


def test_a_call_is_recorded_only_where_its_batches_come_to(
    spec_of: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was recorded on one device would do nothing for networks on another."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    elsewhere = torch.device("meta")
    here, there = (sac_of(spec_of("continuous")) for _ in range(2))
    here.place(CPU, CPU)
    there.place(elsewhere, elsewhere)
    for sac in (here, there):
        sac.compile(called_again)
    assert isinstance(here._order, Simultaneous)
    assert here._order._recorded is not None
    assert isinstance(there._order, Simultaneous)
    assert there._order._recorded is None


def test_a_processor_waits_for_what_it_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy from a GPU that nobody waited for is read before it has come."""
    calls: list[dict[str, Any]] = []

    def recorded(tensor: Tensor, device: torch.device, **options: Any) -> Tensor:
        calls.append({"device": device.type, **options})
        return tensor

    monkeypatch.setattr(Tensor, "to", recorded)
    to((torch.zeros(1), ()), CPU)
    to(torch.zeros(1), torch.device("cuda", 1))
    assert calls == [
        {"device": "cpu", "non_blocking": False},
        {"device": "cuda", "non_blocking": True},
    ]


@pytest.mark.parametrize("order", ["sequential", "simultaneous"])
def test_weights_that_are_frozen_or_not_used_stay(
    spec_of: MakeSpec, random_batch: MakeBatch, order: str
) -> None:
    """A user's own torso may have both."""
    spec = spec_of("continuous")
    sac = sac_of(spec, update_order=order)
    model = sac.model
    assert isinstance(model, ActorCriticsNet)
    for part in (model.actor, model.critics):
        part.unused = nn.Parameter(torch.ones(3))
    model.actor.torso.layers[0].weight.requires_grad_(False)  # type: ignore[union-attr, index]
    model.critics.biases[0].requires_grad_(False)
    sac = Sac(model, sac._config, spec=spec)
    before = copy.deepcopy(model.state_dict())
    target = copy.deepcopy(sac.target_critics.state_dict())
    learn(sac, batches_of(spec, random_batch, 2))
    stay = {name for name, tensor in model.state_dict().items() if tensor.equal(before[name])}
    assert stay == {
        *("actor.unused", "critics.unused"),
        *("actor.torso.layers.0.weight", "critics.biases.0"),
    }
    followed = sac.target_critics.state_dict()
    assert {name for name in target if followed[name].equal(target[name])} == {"unused", "biases.0"}


def test_a_warm_up_that_fails_leaves_no_trace(
    spec_of: MakeSpec, random_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be compiled is then done without."""
    spec = spec_of("continuous")
    sac, other = (sac_of(spec, DROQ, update_order="simultaneous") for _ in range(2))
    before, batches = settled(sac), batches_of(spec, random_batch, 2)

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "compile", lambda function, **_: function)
        sac.compile()
        patched.setattr(sac._order, "_learn_actor", broken)  # the critics have learned by then
        with pytest.raises(RuntimeError, match="no compiler"):
            sac.warm_up(batches[0])
    assert all(map(torch.equal, before, settled(sac)))
    sac.compile(graphs=False)
    assert learn(sac, batches) == learn(other, batches)


def test_a_run_goes_on_on_another_kind_of_device(
    spec_of: MakeSpec, random_batch: MakeBatch
) -> None:
    """`device` is free on resume, and a GPU's draws have a state of 16 bytes."""
    spec = spec_of("continuous")
    before, after = sac_of(spec), sac_of(spec)
    batches = batches_of(spec, random_batch, 2)
    learn(before, batches)
    of_gpu = {"generator": torch.zeros(16, dtype=torch.uint8)}
    after.load_state_dict({**before.state_dict(), **of_gpu})
    assert after._updates == 2
    learn(after, batches)


def test_mistakes_are_named(spec_of: MakeSpec) -> None:
    sac = sac_of(spec_of("continuous"), update_order="sequential")
    with pytest.raises(ConfigError, match="leave it out"):
        sac.place(CPU, CPU)
    with pytest.raises(ConfigError, match="updates_per_call"):
        SacConfig(updates_per_call=0)
    with pytest.raises(ConfigError, match="adam, not rmsprop"):
        SacConfig(optimizer=OptimizerConfig(optimizer="rmsprop"))


@pytest.mark.parametrize("max_norm", [0.0, 0.5])
def test_its_adam_is_pytorchs(max_norm: float) -> None:
    config = OptimizerConfig(
        optimizer="adam",
        learning_rate=1e-2,
        optimizer_eps=1e-8,
        max_gradient_norm=max_norm,
    )
    generator = torch.Generator().manual_seed(1)
    start = {name: torch.randn(5, generator=generator) for name in ("a", "b")}
    theirs = [tensor.clone().requires_grad_() for tensor in start.values()]
    ours = FunctionalAdam(start, config)
    optimizer = torch.optim.Adam(theirs, lr=1e-2, eps=1e-8)
    for number in range(1, 8):
        grads = {name: torch.randn(5, generator=generator) for name in start}
        for param, grad in zip(theirs, grads.values(), strict=True):
            param.grad = grad.clone()
        norm = torch.nn.utils.get_total_norm(list(grads.values()))
        if max_norm:
            torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        optimizer.step()
        said = ours.step(list(grads.values()), torch.tensor(ours.scales(number, 1e-2)))
        torch.testing.assert_close(said, norm)
    for param, tensor in zip(theirs, start.values(), strict=True):
        torch.testing.assert_close(param.detach(), tensor)


def test_moments_of_what_has_stopped_do_not_become_denormal() -> None:
    params = {"a": torch.ones(3)}
    config = OptimizerConfig(optimizer="adam", adam_beta2=0.5)
    adam = FunctionalAdam(params, config)
    adam.step([torch.ones(3)], torch.tensor(adam.scales(1, 0.1)))
    for number in range(2, 1500):
        adam.step([torch.zeros(3)], torch.tensor(adam.scales(number, 0.1)))
    for moment in (*adam.first.values(), *adam.second.values()):
        assert (moment >= torch.finfo(torch.float32).tiny).all()
    still = params["a"].clone()
    adam.step([torch.zeros(3)], torch.tensor(adam.scales(1500, 0.1)))
    assert torch.equal(still, params["a"])


def test_low_products_change_little(spec_of: MakeSpec, random_batch: MakeBatch) -> None:
    """Only products between wide hidden layers: gradients keep their direction."""
    spec = spec_of("continuous")
    batch = batches_of(spec, random_batch, 1)[0]
    directions = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(5)
        model = mlp(spec, NetworkConfig(heads="actor_critics", hidden_sizes=(128, 128)))
        sac = Sac(model, SacConfig(), spec=spec, precision=dtype)
        learn(sac, [batch])
        first = [*sac._critics.optimizer.first.values(), *sac._actor.optimizer.first.values()]
        directions.append(torch.cat([moment.flatten() for moment in first]))
    assert not torch.equal(*directions)
    cosine = torch.nn.functional.cosine_similarity(*directions, dim=0)
    assert cosine > 0.999
    narrow = mlp(spec, NetworkConfig(heads="actor_critics", hidden_sizes=(64, 64)))
    narrow.set_products(torch.bfloat16)  # type: ignore[operator]
    assert narrow.critics.products == torch.float32  # type: ignore[union-attr]
