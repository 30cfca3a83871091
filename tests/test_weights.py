"""Weights go over whole or not at all."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from headrace.weights import SharedWeights, Weights, WeightsCopy, shared_nbytes


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


def shared(worker: Model) -> tuple[SharedWeights, WeightsCopy, bytearray]:
    block = bytearray(shared_nbytes(worker))
    return SharedWeights(worker, block), WeightsCopy(worker, block), block


def test_a_worker_has_nothing_until_something_is_published() -> None:
    worker = Model()
    worker.fill(5.0)
    _, copy, _ = shared(worker)
    assert copy.pull() == -1
    assert worker.numbers() == {5.0}


def test_a_worker_copies_the_newest_version_once() -> None:
    learner, worker = Model(), Model()
    weights, copy, _ = shared(worker)
    for version in (3, 4):
        learner.fill(version)
        weights.publish(learner, version)
    learner.fill(99.0)
    assert copy.pull() == 4
    assert worker.numbers() == {4.0}
    worker.fill(-1.0)
    assert copy.pull() == 4
    assert worker.numbers() == {-1.0}, "what is not newer is not copied again"


def test_a_worker_gets_weights_in_its_own_dtypes() -> None:
    learner, worker = Model(), Model()
    worker.layers[0].to(torch.bfloat16)
    worker.register_buffer("count", torch.zeros((), dtype=torch.int64))
    learner.register_buffer("count", torch.tensor(2**40))
    weights, copy, _ = shared(worker)
    learner.layers[0].weight.data.normal_()
    weights.publish(learner, 0)
    copy.pull()
    assert torch.equal(worker.layers[0].weight, learner.layers[0].weight.to(torch.bfloat16))
    assert torch.equal(worker.layers[1].weight, learner.layers[1].weight)
    assert worker.count.item() == 2**40


def test_a_block_that_is_being_written_is_not_believed() -> None:
    learner, worker = Model(), Model()
    weights, copy, block = shared(worker)
    learner.fill(1.0)
    weights.publish(learner, 1)
    assert copy.pull() == 1
    header = np.frombuffer(block, np.uint64)
    header[0] += 1  # as in the middle of `publish`
    worker.fill(-1.0)
    assert copy.pull() == 1
    assert worker.numbers() == {-1.0}
    learner.fill(2.0)
    header[0] -= 1
    weights.publish(learner, 2)
    assert copy.pull() == 2


def test_a_torn_copy_is_found_by_its_sum_whatever_the_sequence_says() -> None:
    learner, worker = Model(), Model()
    weights, copy, block = shared(worker)
    learner.fill(1.0)
    weights.publish(learner, 1)
    half = len(block) // 2
    old = bytes(block[half:])
    copy.pull()
    learner.fill(2.0)
    weights.publish(learner, 2)
    new = bytes(block[half:])
    block[half:] = old  # these stores are seen late
    assert copy.pull() == 1
    assert worker.numbers() == {1.0}
    block[half:] = new
    assert copy.pull() == 2
    assert worker.numbers() == {2.0}


def test_a_worker_with_another_network_is_refused() -> None:
    block = bytearray(shared_nbytes(Model()))
    SharedWeights(Model(), block)
    with pytest.raises(RuntimeError, match="another network"):
        WeightsCopy(Model().to(torch.bfloat16), block)


def test_a_server_beside_the_workers_gets_the_same_weights() -> None:
    learner, worker, server = Model(), Model(), Model()
    block = bytearray(shared_nbytes(worker))
    weights = SharedWeights(worker, block, local=Weights(server))
    learner.fill(7.0)
    weights.publish(learner, 7)
    assert weights.pull() == WeightsCopy(worker, block).pull() == 7
    assert server.numbers() == worker.numbers() == {7.0}
    with pytest.raises(RuntimeError, match="no server"):
        SharedWeights(worker, block).pull()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_worker_gets_weights_that_were_learned_on_a_gpu() -> None:
    learner, worker = Model().to("cuda"), Model()
    weights, copy, _ = shared(worker)
    learner.fill(3.0)
    weights.publish(learner, 3)
    assert copy.pull() == 3
    assert worker.numbers() == {3.0}


HAMMER = """
import mmap, os, sys, torch
from headrace.weights import SharedWeights
fd, size = map(int, sys.argv[1:])
torch.set_num_threads(1)
model = torch.nn.Sequential(*(torch.nn.Linear(size, size) for _ in range(4)))
weights = SharedWeights(model, mmap.mmap(fd, os.fstat(fd).st_size))
version = 0
while True:
    version += 1
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.fill_(version)
    weights.publish(model, version)
"""


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="the test's own block is a memfd")
def test_no_process_ever_sees_two_versions_mixed() -> None:
    size = 128
    worker = nn.Sequential(*(nn.Linear(size, size) for _ in range(4)))
    fd = os.memfd_create("weights")
    os.ftruncate(fd, shared_nbytes(worker))
    block = mmap.mmap(fd, shared_nbytes(worker))
    SharedWeights(worker, block)
    copy = WeightsCopy(worker, block)
    writer = subprocess.Popen(
        [sys.executable, "-c", HAMMER, str(fd), str(size)],
        pass_fds=[fd],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        versions = [-1]
        while len(set(versions)) < 200:
            assert writer.poll() is None
            versions.append(copy.pull())
            if versions[-1] > 0:
                ends = [torch.aminmax(part.detach()) for part in worker.parameters()]
                assert {float(end) for pair in ends for end in pair} == {float(versions[-1])}
        assert versions == sorted(versions)
    finally:
        writer.kill()
        writer.wait()
        os.close(fd)
