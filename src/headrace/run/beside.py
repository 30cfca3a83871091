"""A second thread for the learner, where an algorithm can use one and a core is idle.

What the target network says of a batch needs nothing of the network that learns. On a CPU it is
computed at the same time, each network on one thread: two threads within every operation gain
nothing there, since most operations are small (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from headrace.algorithms.base import in_turn
from headrace.run.build import Parts
from headrace.run.system import usable_cores


@contextmanager
def second_thread(parts: Parts) -> Iterator[None]:
    """Lends the algorithm a thread for the block, if that serves."""
    algorithm, compute = parts.algorithm, parts.compute
    serves = compute.device.type == "cpu" and not compute.compiled and usable_cores() > 1
    if not serves or not hasattr(algorithm, "beside"):
        yield
        return
    with ThreadPoolExecutor(
        1,
        thread_name_prefix="learner-beside",
        initializer=torch.set_num_threads,
        initargs=(compute.threads,),
    ) as threads:
        algorithm.beside = lambda work: threads.submit(work).result
        try:
            yield
        finally:
            algorithm.beside = in_turn
