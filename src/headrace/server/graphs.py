"""Stop 5 on a GPU: acting for a batch as one CUDA graph per batch size.

A graph is captured once, in the main thread before other threads start, and replayed for every
batch: some hundred kernels are launched as one. Addresses are fixed, so inputs are copied into the
graph's own tensors, and weights arrive in place (`weights.Weights.pull`). How to capture is an
argument: on a CPU the tests hand in one that calls the function again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headrace.algorithms.base import Capture
from headrace.records import PolicyState, PolicyStep
from headrace.server.acting import Actor
from headrace.server.state_table import copy_state, repeated

_WARM_UPS = 3  # lets libraries choose their kernels and allocate before anything is recorded

Outputs = tuple[PolicyStep, PolicyState]


class _Recorded(NamedTuple):
    state: PolicyState
    observation: Tensor
    reward: Tensor
    reset: Tensor
    action_mask: Tensor | None
    epsilon: Tensor | None
    replay: Callable[[], None]
    outputs: Outputs


class GraphedActor:
    """An `Actor` whose batches have one of a few sizes. Outputs hold until the next call."""

    def __init__(
        self,
        actor: Actor,
        example: PolicyState,
        *,
        sizes: Sequence[int],
        capture: Capture,
        action_mask_size: int = 0,
        explores: bool = False,
    ) -> None:
        """Captures a graph for every size, the largest first, so that all share its memory.

        `explores` says whether `act` will be given an epsilon for each environment.
        """
        self._recorded: dict[int, _Recorded] = {}
        for size in sorted(sizes, reverse=True):
            self._recorded[size] = _record(
                actor, example, size, capture, action_mask_size, explores=explores
            )

    def act(
        self,
        state: PolicyState,
        observation: Tensor,
        reward: Tensor,
        reset: Tensor,
        action_mask: Tensor | None = None,
        epsilon: Tensor | None = None,
    ) -> Outputs:
        """Does what `Actor.act` does."""
        graph = self._recorded[len(reward)]
        copy_state(graph.state, state)
        graph.observation.copy_(observation)
        graph.reward.copy_(reward)
        graph.reset.copy_(reset)
        if graph.action_mask is not None and action_mask is not None:
            graph.action_mask.copy_(action_mask)
        elif graph.action_mask is not None:
            graph.action_mask.fill_(True)  # what stands there is of another step
        if graph.epsilon is not None and epsilon is not None:
            graph.epsilon.copy_(epsilon)
        graph.replay()
        return graph.outputs


def cuda_capture(generator: torch.Generator | None) -> Capture:
    """Returns a `Capture` by CUDA graphs in one private memory pool.

    Other threads may use the GPU meanwhile: only this thread's calls can spoil a capture.
    """
    pool = torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def capture(batch: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                batch()
        graph = torch.cuda.CUDAGraph()
        if generator is not None:
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            outputs = batch()
        torch.cuda.current_stream().wait_stream(stream)
        return graph.replay, outputs

    return capture


def _record(
    actor: Actor,
    example: PolicyState,
    size: int,
    capture: Capture,
    action_mask_size: int,
    *,
    explores: bool,
) -> _Recorded:
    state = repeated(example, size)
    observation = state.stack[:, -1].clone()
    reward = torch.zeros(size, device=observation.device)
    reset = torch.zeros(size, dtype=torch.bool, device=observation.device)
    mask = (
        torch.ones_like(reset.unsqueeze(1).expand(-1, action_mask_size))
        if action_mask_size
        else None
    )
    epsilon = torch.zeros_like(reward) if explores else None
    replay, outputs = capture(lambda: actor.act(state, observation, reward, reset, mask, epsilon))
    return _Recorded(state, observation, reward, reset, mask, epsilon, replay, outputs)
