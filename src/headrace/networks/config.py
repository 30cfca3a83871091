"""Settings of the networks in the catalog."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.errors import ConfigError
from headrace.networks.torsos import Activation
from headrace.pictures import Kinds

_POPART_STEP = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkConfig:
    """Which network to build."""

    network: str = "auto"
    """Names the network: one of the catalog, or "my_module:function". auto takes the algorithm's
    own (r2d2), or else nature for images, structured for observations of several parts, mlp for the
    rest."""
    heads: str = "auto"
    """Says what the network tells of a row: a policy and a value (policy_value); Q of every action,
    from duelling streams (duelling) or one layer (action_value); a policy, and Q of a row and an
    action (actor_critics); or heads of your own (register_heads). auto takes what the algorithm
    needs."""
    lstm_size: int | None = None
    """Sets the width of the LSTM after the torso, in units; 0 takes no LSTM. None takes the
    network's own, which is 512 for r2d2 and none for the others."""
    pictures: Kinds = "any"
    """Says which observations are convolved: any picture, wherever its channels lie (any), or only
    uint8 [H, W] and [H, W, colours], divided by 255 (bytes), as in runs that were begun before
    there was this setting."""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """Sets the widths of the hidden layers of mlp, structured and critics, in units."""
    activation: Activation = "relu"
    """Sets the activation of the hidden layers of mlp, structured and critics."""
    layer_norm: bool = False
    """Normalises what each hidden layer of mlp, nature, impala_shallow, r2d2 and structured says of
    a row, before its activation."""
    separate_value: bool = False
    """Gives the value a torso of its own."""
    normalize_observations: bool = False
    """Normalises observations by what was seen so far: every number by its own mean and deviation,
    images by those of every pixel of a single frame. Choices, which are one-hot, stay so."""
    normalize_values: bool = False
    """Learns values in units of their own spread (PopArt), whatever the scale of rewards."""
    popart_step: float = _POPART_STEP
    """Moves the moments of normalize_values by this share of the way to those of one batch, in (0,
    1]. The first batches move them further: as a mean of all so far, in which the start counts as
    one."""
    initial_log_std: float = 0.0
    """Sets the log standard deviation of continuous actions at the start, before the squash."""
    state_dependent_std: bool = False
    """Lets the deviation of continuous actions depend on the observation; with actor_critics it
    always does."""
    num_critics: int = 2
    """Learns so many networks of Q, the least of which counts (actor_critics)."""
    critic_dropout: float = 0.0
    """Drops this share of the critics' hidden units in an update (actor_critics; DroQ)."""
    critic_layer_norm: bool = False
    """Normalises the critics' hidden layers (actor_critics; DroQ)."""

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
