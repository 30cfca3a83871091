"""Networks by name: torsos under the heads of an actor-critic, of action values, or of critics.

Shape suffixes: U = rows in order, B = unrolls (or environments), N = U times B, F = features, P =
parameters of the policy, E = features of a previous action.

Only the torso may run in low precision: in the learner under autocast, on the server with weights
that `lower_precision` has cast. Normalisation, core and heads always run in float32.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from headrace.errors import ConfigError
from headrace.networks.action_values import ActionValueNet
from headrace.networks.actor_critics import ActorCriticsNet
from headrace.networks.config import NetworkConfig
from headrace.networks.heads import policy_head, value_head
from headrace.networks.normalizer import (
    ObservationNormalizer,
    Observer,
    PixelNormalizer,
    frame_normalizer,
)
from headrace.networks.recurrent import ResetLSTM
from headrace.networks.torsos import (
    DEEP_CHANNELS,
    FOOTBALL_CHANNELS,
    NATURE_CONVS,
    SHALLOW_CONVS,
    ConvTorso,
    DeepTorso,
    MlpTorso,
)
from headrace.ops.distributions import make_distribution
from headrace.pictures import Kinds, Picture, parts_of, plain_picture
from headrace.records import PolicyInput
from headrace.specs import EnvSpec

__all__ = [
    "AnyNet",
    "NetworkConfig",
    "PolicyValue",
    "PolicyValueNet",
    "assemble",
    "convolving",
    "default_network",
    "football",
    "impala_deep",
    "impala_shallow",
    "lower_precision",
    "mlp",
    "nature",
]

_LEAST_PIXELS = {"nature": 36, "impala_shallow": 20, "football": 16, "impala_deep": 8}
"""On each side of a picture, for a network to have something left to say of it."""


class PolicyValue(NamedTuple):
    """What the heads say of each row."""

    parameters: Tensor  # [U, B, P] float32 of the policy: logits, or mean and log deviation
    value: Tensor  # [U, B] float32, in the unit of the rewards


class PolicyValueNet(nn.Module):
    """Policy and value over one torso, or over one each.

    Plain convolutional torsos start orthogonal, scaled by the root of 2, as MLPs with tanh do; the
    residual ones and MLPs with relu keep PyTorch's initialisation.
    """

    def __init__(
        self,
        torso: nn.Module,
        features: int,
        spec: EnvSpec,
        config: NetworkConfig,
        *,
        value_torso: nn.Module | None = None,
    ) -> None:
        """Puts a network together.

        Args:
            torso: Stacked observations [N, K, ...] to features [N, F]; it casts its own input.
            features: F.
            spec: What the heads are built from.
            config: Everything after the torso, and whether its input is normalised.
            value_torso: The value's own, where the config has `separate_value`; a copy if None.

        Raises:
            ConfigError: the config asks for action values.
        """
        super().__init__()
        if not config.has_policy_value:
            raise ConfigError(
                f"a PolicyValueNet cannot have heads {config.heads}: make your network with "
                "headrace.networks.models.assemble, which picks the class by config.heads"
            )
        self.distribution = make_distribution(spec.action_space)
        self.normalizer: ObservationNormalizer | None = frame_normalizer(
            spec, torso, wanted=config.normalize_observations
        )
        self.torso = torso
        self.value_torso: nn.Module | None = None
        if config.separate_value:
            self.value_torso = copy.deepcopy(torso) if value_torso is None else value_torso
        self.core: ResetLSTM | None = None
        if config.lstm_size:
            extra = 1 + self.distribution.encoded_size
            self.core = ResetLSTM(features + extra, config.lstm_size)
        self.policy = policy_head(
            config.lstm_size or features,
            self.distribution,
            initial_log_std=config.initial_log_std,
            state_dependent_std=config.state_dependent_std,
        )
        self.value = value_head(
            config.lstm_size or features,
            popart_step=config.popart_step if config.normalize_values else None,
        )

    def forward(
        self, inputs: PolicyInput, recurrent: tuple[Tensor, ...]
    ) -> tuple[PolicyValue, tuple[Tensor, ...]]:
        """Runs rows [U, B] in order, clearing the recurrent state before rows that reset."""
        shape = inputs.observation.shape[:2]
        rows = inputs.observation.flatten(0, 1)
        if self.normalizer is not None:
            rows = self.normalizer(rows)
        features_UBF = self.torso(rows).float().unflatten(0, shape)
        value_UBF = features_UBF
        if self.value_torso is not None:
            value_UBF = self.value_torso(rows).float().unflatten(0, shape)
        with torch.autocast(rows.device.type, enabled=False):
            if self.core is not None:
                h_BH, c_BH = recurrent
                core_input_UBF = self._core_input(features_UBF, inputs)
                features_UBF, recurrent = self.core(core_input_UBF, inputs.reset, (h_BH, c_BH))
                value_UBF = features_UBF
            parameters_UBP = self.policy(features_UBF)
            value_UB = self.value(value_UBF).squeeze(-1)
        return PolicyValue(parameters_UBP, value_UB), recurrent

    def initial_state(self, batch: int) -> tuple[Tensor, ...]:
        """Zero recurrent state for `batch` environments: h and c, or nothing without an LSTM."""
        if self.core is None:
            return ()
        zeros_BH = torch.zeros(batch, self.core.hidden, device=self.value.weight.device)
        return zeros_BH, zeros_BH.clone()

    def observe(self, frames: Tensor) -> None:
        """Merges single frames [..., *observation] into the statistics that normalise, if any."""
        for part in (self.normalizer, self.torso, self.value_torso):
            if isinstance(part, Observer):
                part.observe(frames)

    def _core_input(self, features_UBF: Tensor, inputs: PolicyInput) -> Tensor:
        """Adds the clipped reward and the previous action, as IMPALA does (figure 3)."""
        action_UBE = self.distribution.encode(inputs.previous_action)
        reward_UB1 = inputs.reward.clamp(-1.0, 1.0).unsqueeze(-1)
        return torch.cat((features_UBF, reward_UB1, action_UBE), dim=-1)


AnyNet = nn.Module
"""What the builders below give, by `NetworkConfig.heads`: a network of `HEADS`."""


class Heads(NamedTuple):
    """One kind of heads."""

    network: type[nn.Module]
    """Class of the networks that have it. What can learn with heads can with all of this class."""
    build: Callable[[Callable[[], nn.Module], int, EnvSpec, NetworkConfig], nn.Module]
    """Makes one of (torso, features, spec, config), as `assemble` is given them."""


def _policy_value(
    torso: Callable[[], nn.Module], features: int, spec: EnvSpec, config: NetworkConfig
) -> PolicyValueNet:
    value_torso = torso() if config.separate_value else None
    return PolicyValueNet(torso(), features, spec, config, value_torso=value_torso)


def _action_values(
    torso: Callable[[], nn.Module], features: int, spec: EnvSpec, config: NetworkConfig
) -> ActionValueNet:
    return ActionValueNet(torso(), features, spec, config)


HEADS = {
    "policy_value": Heads(PolicyValueNet, _policy_value),
    "duelling": Heads(ActionValueNet, _action_values),
    "action_value": Heads(ActionValueNet, _action_values),
    "actor_critics": Heads(ActorCriticsNet, ActorCriticsNet),
}
"""By name; `register_heads` adds to it."""
_OURS = frozenset(HEADS)


def register_heads(name: str, heads: Heads) -> None:
    """Makes `name` one that an algorithm's `heads` may be, for every torso of the catalog.

    The network is called and makes its state as `algorithms.base.Model` says. Registering a name
    again replaces what it stood for.

    Raises:
        ConfigError: the name is one of headrace's own.
    """
    if name in (*_OURS, "auto"):
        raise ConfigError(f"heads {name} are headrace's own: register yours by another name")
    HEADS[name] = heads


def heads_named(name: str) -> Heads:
    """Returns the heads that a config or an algorithm names.

    Raises:
        ConfigError: there are none of that name.
    """
    if name not in HEADS:
        raise ConfigError(
            f"no heads named {name!r}; known: {', '.join(sorted(HEADS))}; "
            "headrace.networks.register_heads adds others"
        )
    return HEADS[name]


def lower_precision(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts the weights of headrace's own torsos, in place, and nothing else.

    Models and torsos of other classes are left, since they may not cast what they are given, and so
    are the parts of a torso that need float32; an `ActorCriticsNet` acts in float32, whatever it
    learned in.
    """
    if isinstance(model, ActorCriticsNet):
        model.set_products(torch.float32)
    if isinstance(model, PolicyValueNet | ActionValueNet):
        torsos: list[Any] = [model.torso, getattr(model, "value_torso", None)]
        for torso in torsos:
            if type(torso).__module__.startswith("headrace."):
                _lower(torso, dtype)


def _lower(module: nn.Module, dtype: torch.dtype) -> None:
    if isinstance(module, MlpTorso | ObservationNormalizer):
        return
    if any(isinstance(part, MlpTorso | ObservationNormalizer) for part in module.modules()):
        for child in module.children():
            _lower(child, dtype)
    else:
        module.to(dtype)


def assemble(
    torso: Callable[[], nn.Module], features: int, spec: EnvSpec, config: NetworkConfig
) -> AnyNet:
    """Builds the network that `config.heads` asks for over `torso()`.

    "auto" stands for a policy and a value: which algorithm asks is not known here.

    Args:
        torso: Called for as often as the config needs one.
        features: Length of what it gives per row.
        spec: What the heads are built from.
        config: Everything else.

    Raises:
        ConfigError: there are no such heads, or they do not fit the environment.
    """
    heads = heads_named("policy_value" if config.heads == "auto" else config.heads)
    return heads.build(torso, features, spec, config)


def default_network(spec: EnvSpec, pictures: Kinds = "any") -> str:
    """Returns the catalog name that "auto" stands for."""
    if spec.structure is not None:
        return "structured"
    picture = plain_picture(spec, pictures)
    return "nature" if picture is not None and picture.has(_LEAST_PIXELS["nature"]) else "mlp"


def convolving(picture: Picture) -> str | None:
    """Returns the catalog name of a network that convolves a picture of this size, if one does."""
    fitting = (name for name, pixels in _LEAST_PIXELS.items() if picture.has(pixels))
    return next(fitting, None)


def nature(spec: EnvSpec, config: NetworkConfig) -> AnyNet:
    """Three convolutions and 512 features (Mnih et al. 2015, "Human-level control")."""
    return _convolutional("nature", NATURE_CONVS, 512, spec, config)


def impala_shallow(spec: EnvSpec, config: NetworkConfig) -> AnyNet:
    """Two convolutions and 256 features (IMPALA, figure 3, left)."""
    return _convolutional("impala_shallow", SHALLOW_CONVS, 256, spec, config)


def impala_deep(spec: EnvSpec, config: NetworkConfig) -> AnyNet:
    """Fifteen convolutions in residual blocks and 256 features (IMPALA, figure 3, right)."""
    return _residual("impala_deep", DEEP_CHANNELS, spec, config)


def football(spec: EnvSpec, config: NetworkConfig) -> AnyNet:
    """SEED RL's for Google Research Football: a fourth residual section, 256 features."""
    return _residual("football", FOOTBALL_CHANNELS, spec, config)


def mlp(spec: EnvSpec, config: NetworkConfig) -> AnyNet:
    """Hidden layers over the flattened observation; uint8 is scaled to [0, 1], or normalised."""
    space = spec.observation_space
    is_scaled = space.dtype == np.uint8 and not config.normalize_observations
    scale = 1.0 / max(1.0, float(space.high.max())) if is_scaled else 1.0
    inputs, sizes = math.prod(spec.stacked_shape), config.hidden_sizes
    return assemble(
        lambda: MlpTorso(
            inputs,
            sizes,
            scale=scale,
            activation=config.activation,
            layer_norm=config.layer_norm,
        ),
        sizes[-1],
        spec,
        config,
    )


def _convolutional(
    name: str,
    convs: Sequence[tuple[int, int, int]],
    features: int,
    spec: EnvSpec,
    config: NetworkConfig,
) -> AnyNet:
    picture = _picture(name, spec, config)

    def torso() -> ConvTorso:
        return ConvTorso(
            picture.planes(spec.frame_stack),
            convs,
            features,
            normalizer=_pixels(picture, config),
            rows=picture.rows,
            high=picture.high,
            layer_norm=config.layer_norm,
        )

    return assemble(torso, features, spec, config)


def _residual(name: str, channels: Sequence[int], spec: EnvSpec, config: NetworkConfig) -> AnyNet:
    picture = _picture(name, spec, config)
    _ensure_no_layer_norm(name, config)

    def torso() -> DeepTorso:
        return DeepTorso(
            picture.planes(spec.frame_stack),
            features=256,
            channels=channels,
            normalizer=_pixels(picture, config),
            rows=picture.rows,
            high=picture.high,
        )

    return assemble(torso, 256, spec, config)


def _ensure_no_layer_norm(network: str, config: NetworkConfig) -> None:
    if config.layer_norm:
        raise ConfigError(
            f"network {network} has residual blocks, which layer_norm is not made for: say "
            "--no-layer-norm, or --network nature"
        )


def _pixels(picture: Picture, config: NetworkConfig) -> PixelNormalizer | None:
    """A normaliser of single frames, if it is wanted: every torso has its own."""
    if not config.normalize_observations:
        return None
    return PixelNormalizer(picture.shape, high=picture.high, rows=picture.rows)


def _picture(network: str, spec: EnvSpec, config: NetworkConfig) -> Picture:
    """Returns how the observation is a picture that the network can convolve.

    Raises:
        ConfigError: it is not; names a network that takes it.
    """
    if spec.structure is not None:
        raise ConfigError(
            f"{spec.name}: network {network} takes one picture, not observations of "
            f"{len(parts_of(spec))} parts: use network structured"
        )
    space, pixels = spec.observation_space, _LEAST_PIXELS[network]
    picture = plain_picture(spec, config.pictures)
    if picture is None:
        known = "uint8 [H, W] or [H, W, colours], as --pictures bytes says"
        if config.pictures == "any":
            known = "uint8, or numbers whose bounds are 0 and 1 or 0 and 255, of 2 to 4 axes"
        bounds = f"[{space.low.min():g}, {space.high.max():g}]" if space.low.size else "nothing"
        raise ConfigError(
            f"{spec.name}: network {network} needs pictures ({known}), not {space.dtype} of shape "
            f"{space.shape} in {bounds}: use network mlp"
        )
    if not picture.has(pixels):
        raise ConfigError(
            f"{spec.name}: network {network} needs pictures of at least {pixels} x {pixels}, not "
            f"{picture.height} x {picture.width}: use network {convolving(picture) or 'mlp'}"
        )
    return picture
