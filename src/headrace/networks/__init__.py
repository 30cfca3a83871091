"""Networks: from stacked observations to action logits and values.

A network of your own is a function of (spec, config) that gives `assemble` a torso.
"""

from headrace.networks.models import NetworkConfig, assemble

__all__ = ["NetworkConfig", "assemble"]
