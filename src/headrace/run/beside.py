"""More threads for the learner, where there is something to do at the same time on a CPU.

What the target network says of a batch needs nothing of the network that learns, and the next batch
can be copied out of a replay while one is learned from. Two threads within every operation gain
nothing there, since most operations are small (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from headrace.algorithms.base import in_turn
from headrace.learner.feeds import ReplayFeed
from headrace.resources import usable_cores
from headrace.run.build import Parts


@contextmanager
def more_threads(parts: Parts, *, lockstep: bool = False, learners: int = 1) -> Iterator[None]:
    """Lends algorithm and feed a thread each for the block, if that serves.

    In lockstep batches are not drawn ahead: they would not know the newest priorities, and with one
    core they would. Where the machine's cores are of several `learners`, an algorithm of two sides
    gets no thread: both share gradients, which must come in one order.
    """
    algorithm, feed, compute = parts.algorithm, parts.feed, parts.compute
    # What is compiled by networks would compile anew in each thread that calls it.
    by_networks = compute.compiled and not algorithm.compiles_whole
    serves = compute.device.type == "cpu" and not by_networks and usable_cores() > learners
    if not serves:
        yield
        return
    with ThreadPoolExecutor(
        2,
        thread_name_prefix="learner-beside",
        initializer=torch.set_num_threads,
        initargs=(compute.threads,),
    ) as threads:

        def beside(work: Callable[[], Any]) -> Callable[[], Any]:
            return threads.submit(work).result

        if learners == 1 or not algorithm.has_two_sides:
            algorithm.beside = beside
        if isinstance(feed, ReplayFeed) and not lockstep:
            feed.beside = beside
        try:
            yield
        finally:
            algorithm.beside = in_turn
            if isinstance(feed, ReplayFeed):
                feed.beside = None
