"""Weights go over whole or not at all."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from headrace.weights import Weights


class Model(nn.Module):
    """Several tensors, one of them a buffer."""

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size, size) for _ in range(4))
        self.register_buffer("scale", torch.zeros(size))

    def fill(self, number: float) -> None:
        with torch.no_grad():
            for tensor in (*self.parameters(), *self.buffers()):
                tensor.fill_(number)

    def numbers(self) -> set[float]:
        tensors = (*self.parameters(), *self.buffers())
        return {value for tensor in tensors for value in tensor.flatten().float().tolist()}


def test_nothing_was_published_at_first() -> None:
    server = Model()
    server.fill(5.0)
    weights = Weights(server)
    assert weights.pull() == -1
    assert server.numbers() == {5.0}


def test_a_pull_copies_the_newest_version_once() -> None:
    learner, server = Model(), Model()
    weights = Weights(server)
    for version in (3, 4):
        learner.fill(version)
        weights.publish(learner, version)
    learner.fill(99.0)
    assert weights.pull() == 4
    assert server.numbers() == {4.0}
    server.fill(-1.0)
    assert weights.pull() == 4
    assert server.numbers() == {-1.0}, "what is not newer is not copied again"


def test_addresses_stay() -> None:
    learner, server = Model(), Model()
    weights = Weights(server)
    before = [tensor.data_ptr() for tensor in server.parameters()]
    weights.publish(learner, 0)
    weights.pull()
    assert [tensor.data_ptr() for tensor in server.parameters()] == before


def test_weights_are_cast_to_what_the_server_has() -> None:
    learner, server = Model(), Model()
    server.layers[0].to(torch.bfloat16)
    weights = Weights(server)
    learner.fill(1 / 3)
    weights.publish(learner, 0)
    weights.pull()
    low, full = server.layers[0].weight, server.layers[1].weight
    assert (low.dtype, full.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(low, learner.layers[0].weight.to(torch.bfloat16))
    assert torch.equal(full, learner.layers[1].weight)


def test_another_network_is_refused() -> None:
    with pytest.raises(RuntimeError, match="size"):
        Weights(Model(3)).publish(Model(4), 0)


def test_no_thread_ever_sees_two_versions_mixed() -> None:
    learner, server = Model(64), Model(64)
    weights = Weights(server)
    learner.fill(0)
    weights.publish(learner, 0)
    last = 1500

    def publish() -> None:
        for version in range(1, last + 1):
            learner.fill(version)
            weights.publish(learner, version)

    versions = [-1]
    with ThreadPoolExecutor(1) as threads:
        publisher = threads.submit(publish)
        while versions[-1] < last:
            if publisher.done():
                publisher.result()
            versions.append(weights.pull())
            tensors = (*server.parameters(), *server.buffers())
            assert {float(t.detach().mean()) for t in tensors} == {float(versions[-1])}
    assert versions == sorted(versions)
    assert len(set(versions)) > 2
