"""The network of R2D2: convolutions or hidden layers, an LSTM, duelling heads."""

from __future__ import annotations

from dataclasses import replace

from headrace.networks.config import NetworkConfig
from headrace.networks.models import AnyNet, default_network, mlp, nature
from headrace.networks.structured import structured
from headrace.specs import EnvSpec

_LSTM_SIZE = 512  # Kapturowski et al. 2019


def r2d2(spec: EnvSpec, config: NetworkConfig) -> AnyNet:
    """The torso that suits the observations, an LSTM of 512 and duelling heads.

    `lstm_size` may say another width, or 0, and `heads` others: an actor-critic can have it too.
    """
    if config.heads == "auto":
        config = replace(config, heads="duelling")
    if config.lstm_size is None:
        config = replace(config, lstm_size=_LSTM_SIZE)
    builders = {"nature": nature, "structured": structured, "mlp": mlp}
    return builders[default_network(spec, config.pictures)](spec, config)
