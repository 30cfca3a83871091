"""Networks: from stacked observations to action logits and values.

A network of your own is a function of (spec, config) that gives `assemble` a torso. An algorithm
that needs other heads than those in `HEADS` adds them by `register_heads`.
"""

from headrace.networks.models import HEADS, Heads, NetworkConfig, assemble, register_heads

__all__ = ["HEADS", "Heads", "NetworkConfig", "assemble", "register_heads"]
