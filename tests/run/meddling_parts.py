"""A network and an algorithm that change their process; found through the sys.path of the test."""

from __future__ import annotations

from typing import Any

import torch

from headrace.algorithms.impala import Impala
from headrace.networks.config import NetworkConfig
from headrace.networks.models import AnyNet, mlp
from headrace.specs import EnvSpec
from tests.run.meddlers import WHATS, meddle


def network(spec: EnvSpec, config: NetworkConfig) -> AnyNet:
    """A network whose builder changes all that there is."""
    for what in WHATS:
        meddle(what)
    with torch.device("cpu"):
        return mlp(spec, config).float()


class Rule(Impala):
    """An algorithm whose updates leave gradients off."""

    def update(self, *arguments: Any, **keywords: Any) -> Any:
        """As IMPALA does."""
        update = super().update(*arguments, **keywords)
        meddle("gradients")
        meddle("dtype")
        return update
