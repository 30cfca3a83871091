"""The logic of captured acting, with a capture that calls the function again in place of CUDA's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from headrace.config import from_dict
from headrace.learner.batches import align
from headrace.run.build import build, make_algorithm, make_model
from headrace.server.acting import Actor, initial_state
from headrace.server.graphs import GraphedActor, Outputs, cuda_capture
from headrace.specs import EnvSpec
from headrace.telemetry.metrics import Waits


def _tensors(outputs: Outputs) -> list[Tensor]:
    step, state = outputs
    done = [field for field in step if field is not None]
    return [*done, state.stack, *state.recurrent, state.previous_action]


def called_again(batch: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
    """Replays by calling, and writes where the captured call wrote, as a graph does."""
    outputs = batch()

    def replay() -> None:
        for into, new in zip(_tensors(outputs), _tensors(batch()), strict=True):
            into.copy_(new)

    return replay, outputs


def make_actor(device: str) -> tuple[Actor, EnvSpec]:
    config = from_dict({"env": "recall", "network": {"network": "mlp", "lstm_size": 8}})
    from headrace.envs.recall import RECALL  # noqa: PLC0415

    spec = RECALL.spec("recall", config.environment)
    model = make_model(config, spec, torch.device(device))
    algorithm = make_algorithm(config, model, spec, torch.float32)
    return Actor(algorithm=algorithm, model=model, mode="greedy"), spec


def play(actor: Actor, act: Callable[..., Outputs], spec: EnvSpec, device: str) -> list[Tensor]:
    """Three batches, each from the state that the last one left; returns all that came out."""
    generator = torch.Generator().manual_seed(3)
    state = initial_state(spec, actor.model, 4, torch.device(device))
    seen = []
    for _ in range(3):
        frames = torch.rand(4, *spec.observation_space.shape, generator=generator).to(device)
        reward = torch.rand(4, generator=generator).to(device)
        reset = (torch.rand(4, generator=generator) < 0.5).to(device)
        outputs = act(state, frames, reward, reset)
        # A graph's outputs hold until its next call only.
        seen += [tensor.clone() for tensor in _tensors(outputs)]
        state = type(state)(
            outputs[1].stack.clone(),
            tuple(part.clone() for part in outputs[1].recurrent),
            outputs[1].previous_action.clone(),
        )
    return seen


def test_a_captured_actor_does_what_the_actor_does() -> None:
    actor, spec = make_actor("cpu")
    example = initial_state(spec, actor.model, 1, torch.device("cpu"))
    captured = GraphedActor(actor, example, sizes=(2, 4), capture=called_again)
    expected = play(actor, actor.act, spec, "cpu")
    for want, have in zip(expected, play(actor, captured.act, spec, "cpu"), strict=True):
        assert torch.equal(want, have)


def test_a_captured_actor_takes_an_epsilon_for_each_environment() -> None:
    config = from_dict({"env": "recall", "algorithm": "r2d2", "network": {"lstm_size": 8}})
    from headrace.envs.recall import RECALL  # noqa: PLC0415

    spec = RECALL.spec("recall", config.environment)
    model = make_model(config, spec, torch.device("cpu"))
    algorithm = make_algorithm(config, model, spec, torch.float32)
    epsilon = torch.tensor([0.0, 1.0, 0.0, 1.0])
    seen = []
    for captured in (False, True):
        generator = torch.Generator().manual_seed(5)
        actor = Actor(algorithm=algorithm, model=model, generator=generator)
        act: Callable[..., Outputs] = actor.act
        if captured:
            example = initial_state(spec, model, 1, torch.device("cpu"))
            act = GraphedActor(actor, example, sizes=(4,), capture=called_again, explores=True).act
            generator.manual_seed(5)
        state = initial_state(spec, model, 4, torch.device("cpu"))
        frames = torch.rand(4, *spec.observation_space.shape, generator=generator)
        began = torch.zeros(4, dtype=torch.bool)
        actions = [
            act(state, frames, torch.zeros(4), began, None, epsilon)[0].action.clone()
            for _ in range(40)
        ]
        seen.append(torch.stack(actions))
    assert torch.equal(seen[0], seen[1])
    spread = seen[0].float().std(dim=0)
    assert torch.equal(spread > 0, epsilon > 0)


def test_a_size_that_was_not_captured_is_refused() -> None:
    actor, spec = make_actor("cpu")
    example = initial_state(spec, actor.model, 1, torch.device("cpu"))
    captured = GraphedActor(actor, example, sizes=(2,), capture=called_again)
    state = initial_state(spec, actor.model, 3, torch.device("cpu"))
    with pytest.raises(KeyError):
        captured.act(state, state.stack[:, -1], torch.zeros(3), torch.zeros(3, dtype=torch.bool))


def final_values(captured: bool) -> Tensor:
    """Serves catch, truncated every three steps, and returns the stored values of final frames."""
    config = from_dict(
        {
            "env": "catch",
            "lockstep": True,
            "server": {"num_envs": 4},
            "environment": {"truncate_after": 3},
            "learning": {"unroll_steps": 8, "batch_unrolls": 4},
        }
    )
    nobody = {"on_episodes": lambda *_: None, "on_eval_episodes": lambda *_: None}
    parts = build(config, resume_count=0, **nobody)
    seat, device = parts.training, torch.device("cpu")
    model: Any = parts.server_model
    actor = Actor(algorithm=parts.algorithm, model=model, mode="greedy")
    seat.actor = actor
    if captured:
        example = initial_state(parts.spec, model, 1, device)
        seat.actor = GraphedActor(actor, example, sizes=seat.sizes, capture=called_again)
    while len(parts.queue) < 4:
        seat.serve(lambda: 0, 1.0, Waits())
    with parts.queue.reading(4, timeout_s=0.0) as slots:
        batch = align(parts.unrolls.gather(slots))
    return batch.bootstrap[batch.truncated]


def test_values_of_final_observations_outlive_the_next_call() -> None:
    expected = final_values(captured=False)
    assert len(expected) > 4
    assert expected.std() > 0
    assert torch.equal(final_values(captured=True), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs_do_what_the_actor_does() -> None:
    actor, spec = make_actor("cuda")
    example = initial_state(spec, actor.model, 1, torch.device("cuda"))
    captured = GraphedActor(actor, example, sizes=(4,), capture=cuda_capture(None))
    expected = play(actor, actor.act, spec, "cuda")
    for want, have in zip(expected, play(actor, captured.act, spec, "cuda"), strict=True):
        torch.testing.assert_close(want, have)
