"""State in a checkpoint: tensors by name, and JSON that remembers what they were part of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headrace.errors import ConfigError

Skeleton = dict[str, Any] | int | float | bool | str | None
"""JSON that remembers the containers of a tree, with names in place of its tensors."""

_KINDS = "biufc"  # of numpy's dtypes
_DTYPE = re.compile(rf"[<>|=]?[{_KINDS}][0-9]{{1,2}}")


def flatten(tree: Any) -> tuple[dict[str, Tensor], Skeleton]:
    """Takes a tree of state apart, such as an optimiser's `state_dict` or a generator's state.

    Args:
        tree: dicts (keys str or int), lists and tuples of tensors, numpy arrays and scalars, int,
            float, bool, str and None.

    Returns:
        Tensors by path, and the JSON skeleton from which `unflatten` restores the tree. Arrays
        become uint8 tensors of their bytes, because not every dtype of numpy is one of torch.

    Raises:
        TypeError: names the place of a value or a key of another type.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _flatten(tree, "", tensors)


def _flatten(tree: Any, path: str, tensors: dict[str, Tensor]) -> Skeleton:
    if isinstance(tree, Tensor):
        return {"tensor": _put(tensors, path, tree.detach())}
    if isinstance(tree, np.ndarray | np.generic):
        return _flatten_array(tree, path, tensors)
    if isinstance(tree, dict):
        if wrong := [key for key in tree if type(key) not in (str, int)]:
            raise TypeError(f"{path or '/'}: a key must be a str or an int, not {wrong[0]!r}")
        items = [[key, _flatten(value, f"{path}/{key}", tensors)] for key, value in tree.items()]
        return {"dict": items}
    if type(tree) in (list, tuple):
        values = [_flatten(value, f"{path}/{index}", tensors) for index, value in enumerate(tree)]
        return {type(tree).__name__: values}
    if tree is None or type(tree) in (int, float, bool, str):
        return tree  # type: ignore[no-any-return]
    raise TypeError(f"{path or '/'}: a checkpoint cannot hold a {type(tree).__name__}")


def _flatten_array(
    array: np.ndarray[Any, Any] | np.generic, path: str, tensors: dict[str, Tensor]
) -> Skeleton:
    if array.dtype.kind not in _KINDS:
        raise TypeError(f"{path or '/'}: a checkpoint cannot hold an array of {array.dtype}")
    raw = torch.frombuffer(bytearray(array.tobytes()), dtype=torch.uint8) if array.size else None
    return {
        "array": _put(tensors, path, torch.empty(0, dtype=torch.uint8) if raw is None else raw),
        "dtype": array.dtype.str,
        "shape": list(array.shape),
        "scalar": isinstance(array, np.generic),
    }


def _put(tensors: dict[str, Tensor], path: str, tensor: Tensor) -> str:
    name = path or "/"
    while name in tensors:  # the keys 0 and "0" have one path
        name += "'"
    tensors[name] = tensor
    return name


def unflatten(tensors: Mapping[str, Tensor], skeleton: Skeleton, *, copy: bool = True) -> Any:
    """Restores the tree that `flatten` took apart; tensors stay where they are.

    Args:
        tensors: By path.
        skeleton: As `flatten` made it. It may be a stranger's.
        copy: Whether arrays get memory of their own; else they lie where their tensors do.

    Raises:
        ConfigError: a tensor that the skeleton names is missing, or the skeleton is none of ours.
    """
    try:
        return _unflatten(dict(tensors), skeleton, copy)
    except KeyError as error:
        raise ConfigError(f"the checkpoint has no tensor, or no key, {error}") from error
    except (RecursionError, TypeError, ValueError) as error:
        raise ConfigError(f"the checkpoint holds a tree that is none of ours: {error}") from error


def _unflatten(left: dict[str, Tensor], skeleton: Any, copy: bool) -> Any:
    """Takes tensors out of `left`: each is there once, so that no copy is asked for often."""
    if not isinstance(skeleton, dict):
        return skeleton
    if "tensor" in skeleton:
        return left.pop(skeleton["tensor"])
    if "array" in skeleton:
        return _unflatten_array(left.pop(skeleton["array"]), skeleton, copy)
    if "dict" in skeleton:
        return {key: _unflatten(left, value, copy) for key, value in skeleton["dict"]}
    if "list" in skeleton:
        return [_unflatten(left, value, copy) for value in skeleton["list"]]
    if "tuple" in skeleton:
        return tuple(_unflatten(left, value, copy) for value in skeleton["tuple"])
    raise ValueError(f"a container of unknown kind: {', '.join(skeleton)[:80]}")


def _unflatten_array(raw: Tensor, skeleton: Mapping[str, Any], copy: bool) -> Any:
    name = str(skeleton["dtype"])
    if not _DTYPE.fullmatch(name):  # numpy evaluates some of the others
        raise ValueError(f"an array of {name[:80]}")
    array = np.frombuffer(raw.numpy(), np.dtype(name)).reshape(skeleton["shape"])
    if copy:
        array = array.copy()  # aligned, and writable
    return array[()] if skeleton["scalar"] else array
