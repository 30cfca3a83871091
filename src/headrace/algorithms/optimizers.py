"""Optimisers, their settings, and the step that all algorithms share: clip, check, step.

Losses here are means. Published settings that were tuned for a loss summed over N samples are
converted exactly: gradients are N times smaller, so Adam's and RMSProp's eps and the clip are
divided by N; TensorFlow's RMSProp has eps inside the root, where it is divided by N squared, as is
the mean square it starts with.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from headrace.algorithms.base import ALONE, Learners
from headrace.algorithms.closures import WithoutClosure
from headrace.algorithms.muon import Muon
from headrace.errors import ConfigError
from headrace.networks.heads import OutputLayer
from headrace.networks.recurrent import Gates
from headrace.schedules import remaining

_TARGET_KL, _KL_FACTOR = 0.01, 1.5
_LEAST_FACTOR, _LARGEST_FACTOR = 0.01, 10.0  # 1e-5 to 1e-2 for 1e-3, as rsl_rl bounds it


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """How gradients become steps."""

    optimizer: Literal["adam", "muon", "radam", "rmsprop", "rmsprop_tf"] = "adam"
    """Names the optimizer: adam; radam, which holds back while its mean square is uncertain; muon
    for weights of hidden layers and adam for the rest; rmsprop, PyTorch's (eps outside the root);
    or rmsprop_tf, TensorFlow 1's (inside)."""
    learning_rate: float = 6e-4
    """Sets the largest step size; warm-up and schedule multiply it."""
    learning_rate_schedule: Literal["constant", "linear", "cosine", "kl"] = "linear"
    """Moves the step size to zero at the end of the run (linear, cosine), up or down so that the
    policy moves by about target_kl in an update (kl), or leaves it (constant)."""
    target_kl: float | None = None
    """Steers the step size to a divergence of so many nats in an update, under the schedule `kl`;
    None takes 0.01."""
    learning_rate_warmup: float = 0.0
    """Raises the step size from zero in this share of the run, its first part."""
    learning_rate_decay: float = 1.0
    """Lets linear and cosine fall in this share of the run, its last part; before, the step size
    stays."""
    optimizer_eps: float = 1e-5
    """Adds this to the optimizer's denominator; it is for losses that are means."""
    rmsprop_decay: float = 0.99
    """Sets the decay of RMSProp's mean square, per update."""
    momentum: float = 0.0
    """Sets the momentum of RMSProp, per update."""
    initial_mean_square: float = 0.0
    """Says what rmsprop_tf's mean square starts from."""
    muon_momentum: float = 0.95
    """Sets the decay of Muon's mean, per update."""
    adam_beta1: float = 0.9
    """Sets the decay of Adam's mean, per update."""
    adam_beta2: float = 0.999
    """Sets the decay of Adam's mean square, per update."""
    max_gradient_norm: float = 0.5
    """Clips the global norm of the gradient to this; 0 does not."""

    def __post_init__(self) -> None:
        if self.learning_rate < 0 or self.optimizer_eps < 0 or self.max_gradient_norm < 0:
            raise ConfigError(
                "learning_rate, optimizer_eps and max_gradient_norm must not be negative"
            )
        if self.target_kl is not None and not 0 < self.target_kl < math.inf:
            raise ConfigError(
                f"target_kl must be positive and finite, not {self.target_kl}: say --target-kl 0.01"
            )
        if self.target_kl is not None and self.learning_rate_schedule != "kl":
            raise ConfigError(
                "target_kl steers a learning rate that follows the divergence: say "
                f"--learning-rate-schedule kl as well, or --stop-kl {self.target_kl} in its place "
                "to leave out passes"
            )
        if not 0 <= self.muon_momentum < 1:
            raise ConfigError("muon_momentum must be at least 0 and below 1")
        if not 0 <= self.learning_rate_warmup < 1 or not 0 < self.learning_rate_decay <= 1:
            raise ConfigError(
                "learning_rate_warmup and learning_rate_decay are shares of the run: "
                "0 <= warmup < 1 and 0 < decay <= 1"
            )


class RMSpropTF(WithoutClosure):
    """RMSProp of TensorFlow 1: eps inside the root, and a mean square that starts where it is told.

    Source: `RMSPropOptimizer` of TensorFlow 1, which the IMPALA paper's code uses.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: float | Tensor,
        alpha: float,
        eps: float,
        momentum: float,
        initial_mean_square: float,
    ) -> None:
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "momentum": momentum,
            "initial_mean_square": initial_mean_square,
        }
        super().__init__(params, defaults)

    def _step(self) -> None:
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if params:
                self._step_group(group, params)

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        grads = [param.grad for param in params if param.grad is not None]
        for param in params:
            state = self.state[param]
            if not state:
                state["mean_square"] = torch.full_like(param, group["initial_mean_square"])
                state["velocity"] = torch.zeros_like(param) if group["momentum"] else None
        mean_square = [self.state[param]["mean_square"] for param in params]
        torch._foreach_mul_(mean_square, group["alpha"])
        torch._foreach_addcmul_(mean_square, grads, grads, 1 - group["alpha"])
        root = torch._foreach_add(mean_square, group["eps"])
        torch._foreach_sqrt_(root)
        steps: tuple[Tensor, ...] | list[Tensor] = torch._foreach_div(grads, root)
        torch._foreach_mul_(steps, group["lr"])
        if group["momentum"]:
            velocity = [self.state[param]["velocity"] for param in params]
            torch._foreach_mul_(velocity, group["momentum"])
            torch._foreach_add_(velocity, steps)
            steps = velocity
        torch._foreach_sub_(params, steps)


def hidden_weights(model: nn.Module) -> list[Tensor]:
    """Returns the weights of linear layers and convolutions, each once.

    Not those of an `OutputLayer`, or of gates, which are several matrices in one; nor weights that
    are made of other parameters, as by `spectral_norm`.
    """
    layers = (
        module
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
        and not isinstance(module, OutputLayer | Gates)
    )
    found = (layer._parameters.get("weight") for layer in layers)
    return list({id(weight): weight for weight in found if weight is not None}.values())


def make_optimizer(
    params: Iterable[Tensor], config: OptimizerConfig, *, hidden: Sequence[Tensor] = ()
) -> Optimizer:
    """Returns the optimiser that `config` names; muon steps those of `params` that are `hidden`.

    Raises:
        ConfigError: there is nothing for muon to step.
    """
    if config.optimizer == "muon":
        params, ids = list(params), {id(weight) for weight in hidden}
        stepped = [param for param in params if id(param) in ids]
        if not stepped:
            raise ConfigError(
                "this network has no linear layer or convolution before its heads that muon could "
                "step: say --optimizer adam"
            )
        return Muon(
            stepped,
            [param for param in params if id(param) not in ids],
            lr=config.learning_rate,
            momentum=config.muon_momentum,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.optimizer_eps,
        )
    if config.optimizer == "adam":
        return torch.optim.Adam(
            params,
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.optimizer_eps,
            fused=True,
        )
    if config.optimizer == "radam":
        return torch.optim.RAdam(
            params,
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.optimizer_eps,
            foreach=True,
        )
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(
            params,
            lr=config.learning_rate,
            alpha=config.rmsprop_decay,
            eps=config.optimizer_eps,
            momentum=config.momentum,
            foreach=True,
        )
    return RMSpropTF(
        params,
        lr=config.learning_rate,
        alpha=config.rmsprop_decay,
        eps=config.optimizer_eps,
        momentum=config.momentum,
        initial_mean_square=config.initial_mean_square,
    )


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Restores an optimiser's state in the memory layout of its parameters.

    Checkpoints hold plain row-major tensors, and fused kernels walk parameter and moments side by
    side in memory: beside a channels_last weight, a row-major moment would meet the wrong numbers.

    State that does not fit, as that of another version may not, leaves the optimiser without any.
    """
    if not _fits(optimizer, state):
        optimizer.state.clear()
        return
    # Options that the version of the checkpoint did not have yet are as they are today.
    own = [{**group, "params": ()} for group in optimizer.param_groups]
    groups = [{**new, **old} for new, old in zip(own, state["param_groups"], strict=True)]
    optimizer.load_state_dict({**state, "param_groups": groups})
    for param, moments in optimizer.state.items():
        for name, value in moments.items():
            if isinstance(value, Tensor) and value.shape == param.shape:
                moments[name] = torch.empty_like(param).copy_(value)


def _fits(optimizer: Optimizer, state: dict[str, Any]) -> bool:
    """Whether saved state is of these parameters, with all moments that a step will look for."""
    saved, own = state["param_groups"], optimizer.param_groups
    if [len(group["params"]) for group in saved] != [len(group["params"]) for group in own]:
        return False
    keys = [key for group in saved for key in group["params"]]
    hidden = optimizer.param_groups[0]["params"] if isinstance(optimizer, Muon) else []
    names = [{"momentum"}] * len(hidden) + [_moment_names(optimizer)] * (len(keys) - len(hidden))
    for key, param, wanted in zip(keys, _params_of(optimizer), names, strict=True):
        moments = state["state"].get(key)
        if moments is None:  # no gradient has reached it yet
            continue
        shapes = {value.shape for value in moments.values() if isinstance(value, Tensor)}
        if not wanted <= moments.keys() or not shapes <= {param.shape, torch.Size()}:
            return False
    return True


def _moment_names(optimizer: Optimizer) -> set[str]:
    """Names of what a step keeps for a parameter: it makes them, so a twin takes one."""
    param = torch.zeros(1, requires_grad=True)
    param.grad = torch.zeros(1)
    twin: Any = torch.optim.Adam if isinstance(optimizer, Muon) else type(optimizer)
    twin = twin([param], **optimizer.defaults)
    twin.step()
    return set(twin.state[param])


def learning_rate_at(config: OptimizerConfig, progress: float) -> float:
    """Returns the step size when the share `progress` in [0, 1] of the run is done."""
    rate = config.learning_rate
    if progress < config.learning_rate_warmup:
        rate *= max(0.0, progress) / config.learning_rate_warmup
    if config.learning_rate_schedule == "kl":
        return rate
    return rate * remaining(
        config.learning_rate_schedule, progress, decay=config.learning_rate_decay
    )


def check_no_kl(config: OptimizerConfig, algorithm: str) -> None:
    """Raises ConfigError where an algorithm that learns from a replay should steer by divergence.

    Its batches are of many policies, and its updates go over each once.
    """
    if config.learning_rate_schedule == "kl":
        raise ConfigError(
            f"learning_rate_schedule=kl is for several passes over a batch, not for the replay of "
            f"{algorithm}: say --learning-rate-schedule constant, linear or cosine"
        )


class StepSize:
    """The step size of updates that go over a batch several times.

    Under the schedule `kl` it is divided by 1.5 after an update that moved the policy by more than
    twice the target, and multiplied by 1.5 after one that moved it by less than half. That is the
    rule of rl_games and rsl_rl, which look at every minibatch; here it is once an update, at what
    the last pass has seen: with few minibatches the update goes further than that.
    """

    def __init__(self, config: OptimizerConfig) -> None:
        """Starts at `learning_rate`."""
        self._config = config
        self._factor = 1.0

    def at(self, progress: float) -> float:
        """Returns the step size when the share `progress` in [0, 1] of the run is done."""
        return self._factor * learning_rate_at(self._config, progress)

    @property
    def follows_kl(self) -> bool:
        """Whether `observe` is to be told."""
        return self._config.learning_rate_schedule == "kl"

    def observe(self, kl: Tensor, *, progress: float = 1.0) -> None:
        """Takes the divergence [] from the policy before an update that its last pass has seen.

        Small steps of a warm-up are no reason for larger ones.
        """
        moved, target = float(kl), self._config.target_kl or _TARGET_KL
        if moved > 2.0 * target:
            self._factor = max(self._factor / _KL_FACTOR, _LEAST_FACTOR)
        elif moved < 0.5 * target and progress >= self._config.learning_rate_warmup:
            self._factor = min(self._factor * _KL_FACTOR, _LARGEST_FACTOR)

    def state_dict(self) -> dict[str, Any]:
        """Returns how far the step size has been moved."""
        return {"factor": self._factor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        self._factor = state.get("factor", 1.0)


def clipped_step(
    optimizer: Optimizer,
    loss: Tensor,
    *,
    learning_rate: float,
    max_norm: float,
    learners: Learners = ALONE,
) -> Tensor:
    """Differentiates, clips the global norm (0: not), steps; returns the norm before.

    Gradients are averaged over `learners` before the clip, as one batch would have them.
    """
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    learners.average([param.grad for param in _params_of(optimizer) if param.grad is not None])
    return _clipped_step(optimizer, learning_rate=learning_rate, max_norm=max_norm)


def step_with(
    optimizer: Optimizer, grads: Sequence[Tensor], *, learning_rate: float, max_norm: float
) -> Tensor:
    """As `clipped_step`, with gradients that are known, one for each parameter in order."""
    for param, grad in zip(_params_of(optimizer), grads, strict=True):
        param.grad = grad
    return _clipped_step(optimizer, learning_rate=learning_rate, max_norm=max_norm)


def _params_of(optimizer: Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _clipped_step(optimizer: Optimizer, *, learning_rate: float, max_norm: float) -> Tensor:
    grads = [param.grad for param in _params_of(optimizer) if param.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads, foreach=True)
    if max_norm > 0:
        torch._foreach_mul_(grads, torch.clamp(max_norm / (norm + 1e-12), max=1.0))
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    return norm
