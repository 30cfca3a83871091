"""Settings of the networks in the catalog."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.errors import ConfigError
from headrace.networks.torsos import Activation

_POPART_STEP = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkConfig:
    """Which network to build."""

    network: str = "auto"
    """Name in the catalog, or "my_module:function"; auto: the algorithm's own (r2d2), or else
    nature for images, structured for observations of several parts, mlp for the rest."""
    heads: str = "auto"
    """What the network says of a row: policy_value, a policy and a value; duelling, Q of every
    action from two streams; action_value, the same from one layer; actor_critics, a policy, and Q
    of a row and an action; or a name of your own (register_heads). auto: what the algorithm
    needs."""
    lstm_size: int | None = None
    """Width of the LSTM after the torso; 0 for none; None for the network's own, which is 512 for
    r2d2 and none for the others."""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers of mlp, structured and critics."""
    activation: Activation = "relu"
    """Of those layers."""
    layer_norm: bool = False
    """Whether mlp, nature, impala_shallow, r2d2 and structured normalise what each hidden layer
    says of a row, before its activation."""
    separate_value: bool = False
    """Whether the value has a torso of its own."""
    normalize_observations: bool = False
    """Whether observations are normalised by what was seen so far: every number by its own mean and
    deviation, images by those of every pixel of a single frame."""
    normalize_values: bool = False
    """Whether values are learned in units of their own spread (PopArt), whatever the scale of
    rewards."""
    popart_step: float = _POPART_STEP
    """How far the moments of normalize_values move towards those of one batch, in (0, 1]. The first
    batches move them further: as a mean of all so far, in which the start counts as one."""
    initial_log_std: float = 0.0
    """Continuous actions: log standard deviation at the start, before the squash."""
    state_dependent_std: bool = False
    """Continuous actions: whether the deviation depends on the observation; with actor_critics it
    always does."""
    num_critics: int = 2
    """actor_critics: networks of Q, the least of which counts."""
    critic_dropout: float = 0.0
    """actor_critics: share of the critics' hidden units that an update drops (DroQ)."""
    critic_layer_norm: bool = False
    """actor_critics: whether the critics' hidden layers are normalised (DroQ)."""

    def __post_init__(self) -> None:
        if self.lstm_size is not None and self.lstm_size < 0:
            raise ConfigError(f"lstm_size must be 0 (no LSTM) or more, not {self.lstm_size}")
        if not self.hidden_sizes or min(self.hidden_sizes) < 1:
            raise ConfigError(f"hidden_sizes must be one or more widths, not {self.hidden_sizes}")
        if self.layer_norm and min(self.hidden_sizes) == 1:
            raise ConfigError(
                "layer_norm makes a constant of a layer of one unit, and hidden_sizes are "
                f"{self.hidden_sizes}: say --no-layer-norm"
            )
        if self.separate_value and self.lstm_size:
            raise ConfigError(
                "separate_value goes with lstm_size 0: policy and value share the LSTM"
            )
        if self.separate_value and not self.has_policy_value:
            raise ConfigError(
                f"separate_value goes with a policy and a value, not with heads {self.heads}: "
                "say --no-separate-value"
            )
        if not 0 < self.popart_step <= 1:
            raise ConfigError(
                f"popart_step must be above 0 and at most 1, not {self.popart_step}: say "
                "--popart-step 0.001"
            )
        if self.popart_step != _POPART_STEP and not self.normalize_values:
            raise ConfigError("popart_step is of --normalize-values: say that as well")
        if self.num_critics < 1 or not 0 <= self.critic_dropout < 1:
            raise ConfigError("num_critics must be at least 1, and critic_dropout in [0, 1)")

    @property
    def has_policy_value(self) -> bool:
        """Whether the heads say a policy and its value, as far as is known here."""
        return self.heads in ("auto", "policy_value")
