"""Where and how the networks run: devices, precision, threads, and what is compiled."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import nn

from headrace.algorithms.base import Algorithm, compile_network
from headrace.config import RunConfig, algorithm_class, takes_turns
from headrace.errors import ConfigError
from headrace.networks.modes import frozen
from headrace.resources import usable_cores
from headrace.run.draws import own_draws
from headrace.run.system import choose_device, choose_precision, has_compiler
from headrace.server.acting import Actor, initial_state
from headrace.server.graphs import cuda_capture
from headrace.specs import EnvSpec

_WORTH_THREADS = 10**9
"""Multiply-adds of one pass over a batch from which more threads pay (docs/log.md)."""
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

_WORTH_MINUTES = 5.0  # a run must have for compiling to pay, which takes half a minute


class Compute(NamedTuple):
    """Where and how the networks run."""

    device: torch.device  # of the learner
    acting: torch.device  # of the server
    precision: torch.dtype
    acting_precision: torch.dtype
    threads: int  # of each compute stage
    compiled: bool
    must_compile: bool = False  # the user has said so; else what cannot be compiled runs as it is

    @property
    def needs_warm_up(self) -> bool:
        """Whether there is something to compile or capture before other threads start."""
        return self.compiled or "cuda" in (self.device.type, self.acting.type)


def choose_compute(config: RunConfig, spec: EnvSpec, *, learners: int = 1) -> Compute:
    """Resolves devices, precision, threads and compilation for one of `learners` of this machine.

    In turns the threads are the most there can be: `fit_threads` looks at the network.

    Raises:
        ConfigError: there is no such device, or the settings are of several (`run.share`).
    """
    if config.learner_devices:
        raise ConfigError("this is about one learner: leave out --learner-devices, or say --device")
    device = choose_device(config.device)
    acting = choose_device(config.inference_devices) if config.inference_devices else device
    threads = config.compute_threads or _most_threads(config, max(1, usable_cores() // learners))
    return Compute(
        device=device,
        acting=acting,
        precision=choose_precision(config.precision, device),
        acting_precision=choose_precision(config.precision, acting),
        threads=threads,
        compiled=config.compile == "on"
        or (config.compile == "auto" and (device.type == "cuda" or _pays_on_cpu(config, spec))),
        must_compile=config.compile == "on",
    )


def _pays_on_cpu(config: RunConfig, spec: EnvSpec) -> bool:
    """Whether the algorithm gains more from graphs in this run than it takes to make them."""
    if config.total_minutes is not None and config.total_minutes < _WORTH_MINUTES:
        return False
    rule = algorithm_class(config.algorithm)
    steps = config.total_frames // spec.action_repeat
    return not config.lockstep and rule.worth_compiling(config.learning, steps) and has_compiler()


def _most_threads(config: RunConfig, cores: int) -> int:
    """Returns the threads of each compute stage for a learner that has so many cores."""
    if config.lockstep:
        return 1
    if takes_turns(config):
        return cores
    # Server and learner overlap with one thread each until there are cores that environments leave
    # idle.
    return max(1, cores // 4)


def fit_threads(
    compute: Compute, config: RunConfig, algorithm: Algorithm, spec: EnvSpec
) -> Compute:
    """Returns `compute` with one thread where a second one would gain nothing.

    In turns, products of a small network are done before a second thread has begun, and wait long
    for it on a busy machine. Settings that name the threads are obeyed.
    """
    if config.compute_threads or compute.threads == 1 or not takes_turns(config):
        return compute
    experience = algorithm.experience
    rows = experience.samples_per_update // experience.passes
    if rows * multiply_adds(algorithm, spec) >= _WORTH_THREADS:
        return compute
    return compute._replace(threads=1)


def multiply_adds(algorithm: Algorithm, spec: EnvSpec) -> int:
    """Returns how many the model does for one row, about; changes nothing and draws nothing.

    Every weight counts once, and those of a convolution once for each place of its output. Where
    these cannot be found, as in a network that takes no single row, a whole frame is taken.
    """
    counted = 0

    def count(module: Any, _: Any, output: Any) -> None:
        nonlocal counted
        counted += module.weight.numel() * (output.numel() // module.out_channels - 1)

    model: Any = algorithm.model
    weights: int = sum(parameter.numel() for parameter in model.parameters())
    if not any(isinstance(module, _CONVOLUTIONS) for module in model.modules()):
        return weights
    device = next(model.parameters()).device
    copied = frozen(copy.deepcopy(model))  # the hooks, and what a forward pass may leave, are its
    for module in copied.modules():
        if isinstance(module, _CONVOLUTIONS):
            module.register_forward_hook(count)
    state = initial_state(spec, copied, 1, device)
    mask = torch.ones(1, spec.action_mask_size, dtype=torch.bool, device=device)
    with own_draws():
        try:
            Actor(algorithm=algorithm, model=copied, mode="greedy").act(
                state,
                state.stack[:, -1],
                torch.zeros(1, device=device),
                torch.ones(1, dtype=torch.bool, device=device),
                mask if spec.has_action_mask else None,
            )
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            return weights * math.prod(spec.observation_space.shape)
    return weights + counted


def place_sides(config: RunConfig, algorithm: Algorithm) -> None:
    """Moves actor and critics apart, if that is wanted."""
    if config.actor_device:
        algorithm.place(choose_device(config.actor_device), choose_device(config.critic_device))


def compile_update(
    algorithm: Algorithm, server_model: Any, device: torch.device, *, graphs: bool = True
) -> None:
    """Has whole updates compiled, or else the networks; the warm-up does it (`run.warmup`).

    Without `graphs` it takes that back, and all is as with --compile off.
    """
    models = (algorithm.model, server_model)
    if graphs and any(each.device.type == "cpu" for one in models for each in one.parameters()):
        _look_at_cpu()
    on_gpu = device.type == "cuda"
    algorithm.compile(cuda_capture(None) if on_gpu and graphs else None, graphs=graphs)
    if on_gpu or not algorithm.compiles_whole:  # whose small network acts as fast without
        compile_network(server_model, graphs=graphs)


def _look_at_cpu() -> None:
    """Has torch find out, once a process, what code this CPU can run.

    It starts `python -c` for that, which would run what lies in this folder under the name of a
    module of Python's.
    """
    # It is an inner part of torch, which may go; and what fails here fails in the warm-up, too.
    with suppress(AttributeError, ImportError, OSError, RuntimeError), _safe_path():
        from torch._inductor import cpu_vec_isa  # noqa: PLC0415  # importing it takes seconds

        cpu_vec_isa.pick_vec_isa()


@contextmanager
def _safe_path() -> Iterator[None]:
    """Every Python that the block starts is as with -P."""
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before
