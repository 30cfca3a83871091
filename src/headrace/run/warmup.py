"""Compiling and capturing, in the main thread and before any other thread starts.

None of this has run on a GPU yet; its logic is tested on a CPU (docs/performance.md).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from headrace.errors import ConfigError
from headrace.run.build import Parts
from headrace.run.compute import compile_update
from headrace.run.draws import own_draws
from headrace.server.acting import Actor, initial_state
from headrace.server.device_seat import DeviceSeat
from headrace.server.graphs import GraphedActor, cuda_capture

logger = logging.getLogger("headrace")


def warm_up(parts: Parts, on_message: Callable[[str], None] = logger.warning) -> Parts:
    """Runs every shape once; on a GPU, captures acting as CUDA graphs.

    Args:
        parts: Of a run that has not begun.
        on_message: Told if they run without being compiled, since that fails here.

    Returns:
        The parts, whose `compute` says whether they are compiled.

    Raises:
        ConfigError: they cannot be compiled, and the user wants them so.
    """
    compute = parts.compute
    if not compute.compiled:
        _run_all(parts)
        return parts
    # Importing it takes a second, which runs that compile nothing do not have to pay.
    from torch._dynamo.exc import TorchDynamoException  # noqa: PLC0415

    try:
        _run_all(parts)
    except TorchDynamoException as error:
        why = f"the networks cannot be compiled here ({_reason(str(error))})"
        if compute.must_compile:
            raise ConfigError(f"{why}: mend that, or train without by --compile off") from error
        on_message(f"{why}, so they run as they are, which is slower")
    else:
        return parts
    compile_update(parts.algorithm, parts.server_model, compute.device, graphs=False)
    parts = parts._replace(compute=compute._replace(compiled=False))
    _run_all(parts)
    return parts


def _reason(text: str) -> str:
    """Returns the line that says most of what a compiler has said."""
    lines = [line.strip() for line in text.splitlines()]
    told = [line for line in lines if line and not line.startswith("backend=")]
    errors = [line for line in told if "error: " in line and not line.startswith("Command")]
    return " ".join((errors or told or ["no reason given"])[0].rstrip(".:").split())


@contextmanager
def _forgotten(parts: Parts) -> Iterator[None]:
    """Takes back what passes leave: statistics of networks, and the global random states."""
    networks = (parts.algorithm.model, parts.server_model)
    buffers = [buffer for network in networks for buffer in network.buffers()]
    kept = [buffer.clone() for buffer in buffers]
    with own_draws():
        try:
            yield
        finally:
            for buffer, before in zip(buffers, kept, strict=True):
                buffer.copy_(before)


def _run_all(parts: Parts) -> None:
    with _forgotten(parts):
        _run_shapes(parts)


def _run_shapes(parts: Parts) -> None:
    device = parts.compute.acting
    parts.algorithm.warm_up(parts.feed.example())
    server_model: Any = parts.server_model
    example = initial_state(parts.spec, server_model, 1, device)
    for seat in parts.seats:
        actor = seat.actor
        if isinstance(seat, DeviceSeat):
            capture = None
            if device.type == "cuda" and isinstance(actor, Actor):
                capture = cuda_capture(actor.generator)
            seat.pool.compile(parts.compute.compiled)
            seat.warm_up(capture)
            continue
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
    for used in {device, parts.compute.device}:
        if used.type == "cuda":
            torch.cuda.synchronize(used)


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Gives this thread a stream of its own on a GPU, so that server and learner overlap there."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_device(device)
    with torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]
        yield
