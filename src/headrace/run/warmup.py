"""Compiling and capturing, in the main thread and before any other thread starts.

None of this has run on a GPU yet; its logic is tested on a CPU (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from headrace.run.build import Parts
from headrace.server.acting import Actor, initial_state
from headrace.server.graphs import GraphedActor, cuda_capture


def warm_up(parts: Parts) -> None:
    """Runs every shape once; on a GPU, captures acting as CUDA graphs."""
    device = parts.compute.device
    parts.algorithm.warm_up(parts.feed.example())
    server_model: Any = parts.server_model
    example = initial_state(parts.spec, server_model, 1, device)
    for seat in parts.seats:
        actor = seat.actor
        if device.type == "cuda" and isinstance(actor, Actor):
            capture = cuda_capture(actor.generator)
            seat.actor = GraphedActor(
                actor,
                example,
                sizes=seat.sizes,
                capture=capture,
                action_mask_size=parts.spec.action_mask_size,
                explores=seat.explores,
            )
        for size in seat.sizes:
            state = initial_state(parts.spec, server_model, size, device)
            reward = torch.zeros(size, device=device)
            reset = torch.ones(size, dtype=torch.bool, device=device)
            mask = None
            if parts.spec.has_action_mask:
                mask = torch.ones(size, parts.spec.action_mask_size, dtype=torch.bool).to(device)
            epsilon = torch.zeros(size, device=device) if seat.explores else None
            seat.actor.act(state, state.stack[:, -1], reward, reset, mask, epsilon)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Gives this thread a stream of its own on a GPU, so that server and learner overlap there."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_device(device)
    with torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]
        yield
