"""Several learners: what they exchange, with real connections, and that it is as with one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from headrace.algorithms.base import Learners
from headrace.algorithms.impala import Impala, ImpalaConfig
from headrace.algorithms.optimizers import OptimizerConfig
from headrace.algorithms.ppo import Ppo, PpoConfig
from headrace.algorithms.r2d2 import R2d2, R2d2Config
from headrace.algorithms.sac import Sac, SacConfig
from headrace.errors import PeerLost
from headrace.learner.flattening import flatten
from headrace.learner.group import ExchangeFailed, Group, connect, uses_nccl
from headrace.learner.loop import Learner
from headrace.networks.models import NetworkConfig, mlp
from headrace.networks.normalizer import PixelNormalizer
from headrace.records import Batch, PolicyInput, Update
from headrace.run.meeting import share_learning
from headrace.specs import EnvSpec

CPU = torch.device("cpu")
T, B = 5, 6  # of all learners together
FEATURES = 4


def in_threads(count: int, function: Callable[[int], Any]) -> list[Any]:
    """Calls `function` with each rank at the same time; returns what they return."""
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(function, range(count)))


@pytest.fixture
def groups() -> Callable[..., list[Group]]:
    def make(count: int, *, timeout_s: float = 20.0, **settings: Any) -> list[Group]:
        store, calls = dist.HashStore(), np.zeros(count, np.int64)
        backend: Any = dist.ProcessGroupGloo

        def one(rank: int) -> Group:
            group = backend(store, rank, count, timedelta(seconds=20.0))
            return Group(group, timeout_s=timeout_s, calls=calls, **settings)

        return in_threads(count, one)

    return make


@pytest.mark.net
def test_an_average_is_that_of_all_with_the_same_bits(groups: Callable[..., list[Group]]) -> None:
    every = groups(3)

    def tensors_of(rank: int, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(100 * seed + rank)
        image = torch.randn(4, 3, 5, 5, generator=generator)
        return [
            image.to(memory_format=torch.channels_last),
            torch.randn((), generator=generator, dtype=torch.float64),
            torch.randn(7, generator=generator),
        ]

    def averaged(rank: int) -> list[list[Tensor]]:
        given = [tensors_of(rank, seed) for seed in range(2)]
        for tensors in given:
            every[rank].average(tensors)
        return given

    results = in_threads(3, averaged)
    for seed in range(2):
        own = [tensors_of(rank, seed) for rank in range(3)]
        for place in range(3):
            mean = torch.stack([tensors[place] for tensors in own]).mean(dim=0)
            for rank in range(3):
                torch.testing.assert_close(results[rank][seed][place], mean)
                assert torch.equal(results[rank][seed][place], results[0][seed][place])
    assert results[2][0][0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.net
def test_rows_bytes_and_the_largest_reach_all(groups: Callable[..., list[Group]]) -> None:
    every = groups(2)

    def exchanged(rank: int) -> Any:
        group = every[rank]
        rows = group.meet([rank, 10**12 + rank])
        data = [group.spread(data if rank == 0 else None) for data in (b"\0weights\xff", b"")]
        return rows, data, group.largest(torch.tensor(0.5 - rank)).item()

    for rows, data, largest in in_threads(2, exchanged):
        assert rows == [[0, 10**12], [1, 10**12 + 1]]
        assert data == [b"\0weights\xff", b""]
        assert largest == 0.5


@pytest.mark.net
def test_who_is_late_is_named_at_the_deadline(groups: Callable[..., list[Group]]) -> None:
    every = groups(2, timeout_s=0.3)
    with pytest.raises(ExchangeFailed, match="waited 0 s for each other") as caught:
        every[1].meet([1])
    assert caught.value.late == [0]
    every[0].meet([1])  # so that nobody's thread is left waiting


@pytest.mark.net
def test_a_wait_ends_by_what_a_look_finds(groups: Callable[..., list[Group]]) -> None:
    gone = threading.Event()

    def look() -> None:
        if gone.is_set():
            raise PeerLost("learner 1 died")

    every = groups(2, on_wait=look)
    gone.set()
    with pytest.raises(PeerLost, match="learner 1 died"):
        every[0].meet([1])
    every[1].meet([1])


@pytest.mark.net
def test_learners_find_each_other_on_loopback_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    calls = np.zeros(2, np.int64)

    def one(rank: int) -> Any:
        group = connect(
            tmp_path,
            rank=rank,
            devices=[CPU, CPU],
            timeout_s=20.0,
            calls=calls,
            on_wait=lambda: None,
        )
        return group.meet([rank])

    before = listening()
    assert in_threads(2, one) == [[[0], [1]]] * 2
    assert all(address.startswith("0100007F") for address in listening() - before)


def listening() -> set[str]:
    """Addresses at which this machine listens, as the kernel writes them."""
    lines = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    return {line[1] for line in lines if line[3] == "0A" and line[1].split(":")[0] != "0" * 32}


def test_gradients_of_gpus_go_through_nccl_where_each_has_its_own() -> None:
    gpus = [torch.device("cuda", index) for index in range(2)]
    assert uses_nccl(gpus)
    assert not uses_nccl([gpus[0], gpus[0]])
    assert not uses_nccl([CPU])


# Algorithms: two learners with half a batch each, and one with all of it.


class Halves:
    """`Learners` of two threads, without connections."""

    count = 2

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2, timeout=20.0)
        self._given: dict[int, list[Tensor]] = {}

    def of(self, rank: int) -> Learners:
        halves = self

        class Half:
            count = 2

            def average(self, tensors: Sequence[Tensor]) -> None:
                halves._given[rank] = [tensor.detach().clone() for tensor in tensors]
                halves._barrier.wait()
                means = [(a + b) / 2 for a, b in zip(*halves._given.values(), strict=True)]
                halves._barrier.wait()
                for tensor, mean in zip(tensors, means, strict=True):
                    tensor.detach().copy_(mean)

        return Half()


def half(batch: Batch, rank: int) -> Batch:
    """Columns of one learner."""
    own = slice(rank * B // 2, (rank + 1) * B // 2)

    def cut(part: Any) -> Any:
        if isinstance(part, PolicyInput):
            return PolicyInput(*(None if field is None else field[:, own] for field in part))
        if isinstance(part, tuple):
            return tuple(state[own] for state in part)
        return None if part is None else part[:, own] if part.dim() > 1 else part[own]

    return Batch(*(cut(field) for field in batch))


def a_spec(*, continuous: bool) -> EnvSpec:
    box = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
    return EnvSpec(
        name="numbers",
        observation_space=gym.spaces.Box(-np.inf, np.inf, (FEATURES,), np.float32),
        action_space=box if continuous else gym.spaces.Discrete(3),
    )


def a_batch(seed: int, *, steps: int = T, continuous: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    ended = torch.rand(steps, B, generator=generator) < 0.2
    choice = torch.randint(3, (steps + 1, B), generator=generator)
    action = normal(steps + 1, B, 2) if continuous else choice
    # The learners see very different numbers: a mean over one alone would show.
    scale = torch.linspace(0.5, 4.0, B)
    return Batch(
        inputs=PolicyInput(
            observation=scale.view(1, B, 1, 1) * normal(steps + 1, B, 1, FEATURES) + 1.0,
            reward=normal(steps + 1, B),
            previous_action=action,
            reset=torch.cat((torch.zeros(1, B, dtype=torch.bool), ended)),
        ),
        recurrent=(),
        action=action[1:],
        log_prob=-1.0 - torch.rand(steps, B, generator=generator),
        reward=scale * normal(steps, B),
        terminated=ended,
        truncated=torch.zeros_like(ended),
        bootstrap=torch.zeros(steps, B),
        version=torch.zeros(steps, B, dtype=torch.int64),
        weight=torch.rand(B, generator=generator),
    )


ADAM = OptimizerConfig(optimizer="adam", learning_rate=1e-2, max_gradient_norm=0.5)
BY_KL = OptimizerConfig(
    learning_rate=1e-2, learning_rate_schedule="kl", target_kl=1e-3, max_gradient_norm=0.5
)
NORMALIZED = {"reward_transform": "normalize", "optimizer": ADAM}


def impala(batch_unrolls: int) -> Impala:
    config = ImpalaConfig(
        unroll_steps=T,
        batch_unrolls=batch_unrolls,
        target_entropy=0.9,
        entropy_cost=0.1,
        **NORMALIZED,
    )
    return Impala(network("policy_value"), config, spec=a_spec(continuous=False))


def ppo(batch_unrolls: int) -> Ppo:
    config = PpoConfig(
        unroll_steps=T, batch_unrolls=batch_unrolls, minibatches=1, epochs=2, **NORMALIZED
    )
    return Ppo(network("policy_value"), config, spec=a_spec(continuous=False))


def impala_of_values(batch_unrolls: int) -> Impala:
    """Values in units of their spread, and passes that look at what all have moved."""
    config = ImpalaConfig(
        unroll_steps=T,
        batch_unrolls=batch_unrolls,
        passes=3,
        clip_range=0.2,
        stop_kl=0.02,
        optimizer=BY_KL,
    )
    model = network("policy_value", normalize_values=True)
    return Impala(model, config, spec=a_spec(continuous=False))


def ppo_of_values(batch_unrolls: int) -> Ppo:
    config = PpoConfig(
        unroll_steps=T, batch_unrolls=batch_unrolls, minibatches=1, epochs=2, optimizer=BY_KL
    )
    return Ppo(
        network("policy_value", normalize_values=True), config, spec=a_spec(continuous=False)
    )


def r2d2(batch_unrolls: int) -> R2d2:
    config = R2d2Config(
        unroll_steps=3,
        burn_in_steps=0,
        n_steps=2,
        batch_unrolls=batch_unrolls,
        optimizer=ADAM,
        target_update_interval=2,
    )
    return R2d2(network("duelling"), config, spec=a_spec(continuous=False))


def sac(batch_unrolls: int) -> Sac:
    config = SacConfig(batch_unrolls=batch_unrolls, optimizer=ADAM)
    spec = a_spec(continuous=True)
    return Sac(network("actor_critics", spec), config, spec=spec)  # type: ignore[arg-type]


def network(heads: Any, spec: EnvSpec | None = None, **settings: Any) -> torch.nn.Module:
    torch.manual_seed(3)
    config = NetworkConfig(heads=heads, hidden_sizes=(8,), normalize_observations=True, **settings)
    return mlp(spec or a_spec(continuous=False), config)


def noise_of(sac: Sac, seed: int, rank: int | None) -> None:
    """Has a learner draw its own share of what one learner would draw."""
    generator = torch.Generator().manual_seed(seed)
    normal = [torch.randn(B, 2, generator=generator) for _ in range(2)]
    own = slice(None) if rank is None else slice(rank * B // 2, (rank + 1) * B // 2)
    drawn = sac.draw(1)
    sac.draw = lambda _: drawn._replace(  # type: ignore[method-assign]
        next_noise=normal[0][own], noise=normal[1][own]
    )


@pytest.mark.parametrize("make", [impala, ppo, impala_of_values, ppo_of_values, r2d2, sac])
def test_two_learners_with_half_a_batch_are_one_with_all(make: Callable[[int], Any]) -> None:
    steps = 1 if make is sac else T
    batches = [a_batch(seed, steps=steps, continuous=make is sac) for seed in range(3)]

    def learned(algorithm: Any, rank: int | None) -> Any:
        for seed, batch in enumerate(batches):
            if make is sac:
                noise_of(algorithm, seed, rank)
            own = batch if rank is None else half(batch, rank)
            algorithm.update(own, progress=0.1 * seed)
        state = {**algorithm.state_dict(), "model": dict(algorithm.model.state_dict())}
        state.pop("generator", None)
        return flatten(state)[0]

    alone = learned(make(B), None)
    halves, pair = Halves(), [make(B // 2) for _ in range(2)]
    for rank, algorithm in enumerate(pair):
        share_learning(Shared(algorithm), halves.of(rank))  # type: ignore[arg-type]
    both = in_threads(2, lambda rank: learned(pair[rank], rank))
    assert any(name.endswith("variance") for name in alone), "nothing was normalised"
    for name, expected in alone.items():
        if "rewards/return" in name:  # each learner's own columns
            continue
        torch.testing.assert_close(both[0][name], expected, rtol=2e-4, atol=2e-6, msg=name)
        assert torch.equal(both[0][name], both[1][name]), name


def test_statistics_of_images_are_those_of_all_learners() -> None:
    frames = torch.randint(0, 256, (60, 5, 6), generator=torch.Generator().manual_seed(1)).byte()
    alone, halves = PixelNormalizer((5, 6)), Halves()
    pair = [PixelNormalizer((5, 6)) for _ in range(2)]
    for rank, normalizer in enumerate(pair):
        normalizer.learners = halves.of(rank)
    for start in (0, 20):
        part = frames[start : start + 20]
        alone.observe(part)
        in_threads(2, lambda rank, part=part: pair[rank].observe(part[rank * 10 :][:10]))
    for name, expected in alone.state_dict().items():
        torch.testing.assert_close(pair[0].state_dict()[name], expected, msg=name)
        assert torch.equal(pair[0].state_dict()[name], pair[1].state_dict()[name]), name


class Shared:
    """What `share_learning` needs of a run's parts."""

    feed = None

    def __init__(self, algorithm: Any) -> None:
        self.algorithm = algorithm


def test_an_average_that_is_left_out_would_show() -> None:
    batch = a_batch(0)
    alone, first = impala(B), impala(B // 2)
    alone.update(batch, progress=0.0)
    first.update(half(batch, 0), progress=0.0)
    pairs = zip(alone.model.parameters(), first.model.parameters(), strict=True)
    assert any(not torch.allclose(one, other, rtol=1e-2) for one, other in pairs)


@pytest.mark.net
def test_importance_weights_are_over_the_largest_of_all(
    groups: Callable[..., list[Group]],
) -> None:
    every = groups(2)
    weights = [torch.tensor([2.0, 8.0]), torch.tensor([4.0, 1.0])]
    seen: dict[int, Tensor | None] = {}

    class Rule:
        def __init__(self, rank: int) -> None:
            self.rank, self.model = rank, torch.nn.Linear(1, 1)
            self.experience = impala(2).experience

        def update(self, batch: Batch, *, progress: float) -> Update:
            seen[self.rank] = batch.weight
            return Update({}, torch.tensor(True))

    class Feed:
        def __init__(self, rank: int) -> None:
            self.rank = rank

        def next(self, **_: Any) -> Batch:
            return a_batch(0)._replace(weight=weights[self.rank])

        def learned(self, _: Update) -> None:
            pass

    class Nowhere:
        def publish(self, *_: Any) -> None:
            pass

    def learn(rank: int) -> int:
        rule: Any = Rule(rank)
        feed: Any = Feed(rank)
        end: Any = Nowhere()
        learner = Learner(rule, feed, end, device=CPU, group=every[rank])
        assert learner.hold(timeout_s=0.0, waits=None)  # type: ignore[arg-type]
        assert learner.ready()
        learner.learn(progress=0.0, timeout_s=0.0, waits=None)  # type: ignore[arg-type]
        return learner.samples

    assert in_threads(2, learn) == [2 * 2 * T] * 2
    assert seen[0] is not None
    assert seen[0].tolist() == [0.25, 1.0]
    assert seen[1] is not None
    assert seen[1].tolist() == [0.5, 0.125]
