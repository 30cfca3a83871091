"""What the start of a run says of its observations."""

from __future__ import annotations

from collections.abc import Iterator

import gymnasium as gym

from headrace.networks.config import NetworkConfig
from headrace.networks.models import convolving, default_network
from headrace.networks.structured import image_of
from headrace.pictures import parts_of, picture_of, plain_picture
from headrace.specs import EnvSpec


def seen_as(spec: EnvSpec, config: NetworkConfig) -> str:
    """Says what an observation is, and where the channels of its pictures lie."""
    kinds, parts = config.pictures, parts_of(spec)
    space = spec.observation_space if spec.structure is None else spec.structure
    if isinstance(space, gym.spaces.Box):
        picture = picture_of(parts[0], kinds)
        layout = picture.layout if picture is not None else ""
        return f"{space.shape} {space.dtype}" + (f", {layout}" if layout else "")
    seen = f"of {len(parts)} parts"
    for part in parts:
        if picture := image_of(part, kinds):
            layout = f" {picture.layout}" if picture.layout else ""
            seen += f", picture {part.path} {part.shape}{layout}"
    return seen


def flattened(spec: EnvSpec, config: NetworkConfig, name: str) -> Iterator[str]:
    """Yields a line if the network `name` takes as numbers what another would see as a picture."""
    kinds = config.pictures
    picture = plain_picture(spec, kinds)
    is_flat = name == "mlp" or (name == "r2d2" and default_network(spec, kinds) == "mlp")
    other = convolving(picture) if picture is not None and is_flat else None
    if other is not None:
        core = " --lstm-size 512" if name == "r2d2" and config.lstm_size is None else ""
        yield (
            f"the picture {spec.observation_space.shape} is given to the network as a row of "
            f"numbers: to convolve it, say --network {other}{core}"
        )
