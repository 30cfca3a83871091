"""What the start of a run says of its observations."""

from __future__ import annotations

from collections.abc import Iterator

import gymnasium as gym

from headrace.networks.config import NetworkConfig
from headrace.networks.models import convolving, default_network
from headrace.networks.structured import image_of
from headrace.pictures import looks_like_one, parts_of, picture_of, plain_picture
from headrace.specs import EnvSpec

_DECLARE = (
    "is given to the network as a row of numbers: if it is a picture, declare it as uint8, or with "
    "0 and 1 (floats) or 0 and 255 as its bounds, in at most 4 axes, and it is convolved"
)


def seen_as(spec: EnvSpec, config: NetworkConfig) -> str:
    """Says what an observation is, and where the channels of its pictures lie."""
    kinds, parts = config.pictures, parts_of(spec)
    space = spec.observation_space if spec.structure is None else spec.structure
    if isinstance(space, gym.spaces.Box):
        picture = picture_of(parts[0], kinds)
        layout = picture.layout if picture is not None else ""
        return f"{space.shape} {space.dtype}" + (f", {layout}" if layout else "")
    seen = f"of {len(parts)} part{'s' if len(parts) > 1 else ''}"
    for part in parts:
        if picture := image_of(part, kinds):
            layout = f" {picture.layout}" if picture.layout else ""
            seen += f", picture {part.path} {part.shape}{layout}"
    return seen


def flattened(spec: EnvSpec, config: NetworkConfig, name: str) -> Iterator[str]:
    """Yields a line if the network `name` takes as numbers what another would see as a picture."""
    kinds, shape = config.pictures, spec.observation_space.shape
    if spec.structure is not None:
        for part in parts_of(spec) if name == "structured" else ():
            if image_of(part, kinds) is None and part.kind == "box" and looks_like_one(part.shape):
                yield f"{part.path} {part.shape} {_DECLARE}"
        return
    if name != "mlp" and not (name == "r2d2" and default_network(spec, kinds) == "mlp"):
        return
    picture = plain_picture(spec, kinds)
    other = convolving(picture) if picture is not None else None
    if other is not None:
        core = " --lstm-size 512" if name == "r2d2" and config.lstm_size is None else ""
        yield (
            f"the picture {shape} is given to the network as a row of numbers: to convolve it, say "
            f"--network {other}{core}"
        )
    elif picture is None and kinds == "any" and len(shape) > 2 and looks_like_one(shape):
        yield f"{shape} {_DECLARE}"
