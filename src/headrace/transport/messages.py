"""What worker hosts and the server say about environments: specs, steps and actions.

    STEP     block, sequence   observation, reward, flags, run ids, [masks],
                              [final observations, [their masks]]
                               text: {"infos": {row: {name: number}}}, where episodes ended
    ACTION   block, sequence   action

A step has a row for each environment of a block, in the order of their numbers: single frames,
never stacks. Final observations are those of the rows whose episode ended, and of no others.
Whatever is not exactly as spec and block demand is a `WireError`, before anything is written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from headrace.errors import ConfigError
from headrace.specs import EnvSpec, check_action
from headrace.steps import INFO_NBYTES, RUN_IDS, EnvStep, EpisodeInfo
from headrace.transport.wire import Compression, Kind, Message, WireError, encode

_FLOAT32, _BOOL, _INT64 = np.dtype(np.float32), np.dtype(np.bool_), np.dtype(np.int64)
_MAX_DIFFERENCE = 500  # characters
_MAX_INT = 1 << 63  # longer ones are no float


def describe(spec: EnvSpec) -> dict[str, Any]:
    """Returns a spec as JSON can say it: the same text on every machine where it is the same."""
    mask: int | str = spec.action_mask_size
    if mask:  # a host of before there were masks of final observations sends none
        mask = f"{mask}, also of final observations"
    return {
        "environment": spec.name,
        "observation": _space(spec.observation_space),
        "observation structure": None if spec.structure is None else _space(spec.structure),
        "action": _space(spec.action_space),
        "action mask": mask,
        "action_repeat": spec.action_repeat,
        "frame_stack": spec.frame_stack,
    }


def spec_difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Returns one sentence that names what differs between two described specs; "" if nothing does.

    Args:
        ours: Of this end.
        theirs: Of the other end, as it came.
    """
    parts = [
        f"{name} is {_short(ours.get(name))} here and {_short(theirs.get(name))} at the other end"
        for name in {**ours, **theirs}
        if ours.get(name) != theirs.get(name)
    ]
    return "; ".join(parts)[:_MAX_DIFFERENCE]


def ensure_same_spec(spec: EnvSpec, parents: Mapping[str, Any] | None) -> None:
    """Refuses an environment that is another one in a worker than in its parent.

    Args:
        spec: In the worker.
        parents: What `describe` said in the parent; None to believe it.

    Raises:
        ConfigError: names what differs.
    """
    if parents is None:
        return
    if difference := spec_difference(describe(spec), parents):
        difference = difference.replace(" at the other end", " in its parent")
        raise ConfigError(
            f"{spec.name} has another spec in a worker ('here') than in its parent: {difference}"
        )


def encode_step(
    step: EnvStep, *, block: int, sequence: int, compression: Compression = "off"
) -> tuple[bytes, int]:
    """Returns the message of a step, and how many infos were too long and were left out.

    Args:
        step: A row of each environment of the block, in any order.
        block: Its number.
        sequence: Steps of this session before it.
        compression: Of the arrays.

    Raises:
        ValueError: an episode met the clock, and its final observation is missing.
    """
    ids = step.env_id
    order: slice | NDArray[np.intp] = slice(None)
    infos = step.episode_info or {}
    if (ids[1:] < ids[:-1]).any():
        order = np.argsort(ids)
        place = {int(row): new for new, row in enumerate(order)}
        infos = {place[row]: scalars for row, scalars in infos.items()}
    flags = np.stack((step.reset[order], step.terminated[order], step.truncated[order]))
    arrays = [step.observation[order], step.reward[order], flags, step.run_id[order]]
    if step.action_mask is not None:
        arrays.append(step.action_mask[order])
    ended = flags[0] & (flags[1] | flags[2])
    if ended.any():
        if step.final_observation is not None:
            rows = np.flatnonzero(ended)
            rows = rows if isinstance(order, slice) else order[rows]
            arrays.append(step.final_observation[rows])
            if step.action_mask is not None:
                masks = step.final_action_mask
                arrays.append(np.ones_like(arrays[4][rows]) if masks is None else masks[rows])
        elif flags[2].any():
            raise ValueError("a step was truncated and has no final observation")
    kept = {str(row): dict(scalars) for row, scalars in infos.items() if _fits(scalars)}
    data = encode(
        Kind.STEP,
        block=block,
        sequence=sequence,
        text={"infos": kept} if kept else None,
        arrays=arrays,
        compression=compression,
    )
    return data, len(infos) - len(kept)


class HostStep(NamedTuple):
    """A step of a block as it came, checked. The arrays are views of the message."""

    observation: NDArray[Any]  # [E, ...] a single frame of each environment
    reward: NDArray[np.float32]  # [E]
    reset: NDArray[np.bool_]  # [E]
    terminated: NDArray[np.bool_]  # [E]
    truncated: NDArray[np.bool_]  # [E]
    run_id: NDArray[np.int64]  # [E] 0 .. RUN_IDS - 1
    action_mask: NDArray[np.bool_] | None  # [E, A]
    final_observation: NDArray[Any] | None  # [K, ...] of the rows that ended, in their order
    infos: EpisodeInfo  # of the rows that ended
    final_action_mask: NDArray[np.bool_] | None = None  # [K, A] of the same rows

    @property
    def ended(self) -> NDArray[np.bool_]:
        """[E] where an episode ended."""
        return self.reset & (self.terminated | self.truncated)


def decode_step(message: Message, spec: EnvSpec, rows: int) -> HostStep:
    """Returns what a STEP says.

    Args:
        message: The message.
        spec: Of the environments.
        rows: Environments of the block.

    Raises:
        WireError: it is not exactly what environments of that spec can have shown.
    """
    space = spec.observation_space
    wanted: list[tuple[Any, tuple[int, ...]]] = [
        (space.dtype, (rows, *space.shape)),
        (_FLOAT32, (rows,)),
        (_BOOL, (3, rows)),
        (_INT64, (rows,)),
    ]
    if spec.action_mask_size:
        wanted.append((_BOOL, (rows, spec.action_mask_size)))
    arrays = message.arrays
    _check_arrays(arrays[: len(wanted)], wanted)
    shown, reward, flags, run_id, *masks = arrays[: len(wanted)]
    mask = masks[0] if masks else None
    reset, terminated, truncated = flags
    if run_id.any() and ((run_id < 0) | (run_id >= RUN_IDS)).any():
        raise WireError(f"run ids outside 0..{RUN_IDS - 1}")
    if not (flags.any() or len(arrays) > len(wanted) or message.text):  # nearly always
        return HostStep(shown, reward, reset, terminated, truncated, run_id, mask, None, {})
    absent = terminated & truncated & ~reset
    if absent.any() and (spec.vector_envs is None or absent.all()):
        raise WireError("a step that holds rows back, of environments that hold none back")
    truncated_now = truncated & ~absent
    if (truncated_now & (terminated | ~reset)).any():
        raise WireError("a step that met the clock and did not end by it")
    ended = np.flatnonzero(reset & (terminated | truncated))
    final = final_mask = None
    if len(arrays) > len(wanted) and len(ended):
        finals = arrays[len(wanted) :]
        of_ended: list[tuple[Any, tuple[int, ...]]] = [(space.dtype, (len(ended), *space.shape))]
        if spec.action_mask_size:
            of_ended.append((_BOOL, (len(ended), spec.action_mask_size)))
        _check_arrays(finals, of_ended)
        final = finals[0]
        final_mask = finals[1] if spec.action_mask_size else None
    elif len(arrays) > len(wanted):
        raise WireError("final observations of episodes that did not end")
    elif truncated_now.any():
        raise WireError("a step was truncated and has no final observation")
    infos = _infos(message.text, ended.tolist())
    return HostStep(
        shown, reward, reset, terminated, truncated, run_id, mask, final, infos, final_mask
    )


def encode_action(action: NDArray[Any], *, block: int, sequence: int) -> bytes:
    """Returns the message that answers step `sequence` of a block, a row for each environment."""
    return encode(Kind.ACTION, block=block, sequence=sequence, arrays=(action,))


def decode_action(message: Message, spec: EnvSpec, rows: int) -> NDArray[Any]:
    """Returns the actions of an ACTION, which the environments can take.

    Raises:
        WireError: wrong count, dtype or shape, or an action outside the space.
    """
    if len(message.arrays) != 1:
        raise WireError(f"an action of {len(message.arrays)} arrays")
    try:
        check_action(message.arrays[0], rows, spec.action_space)
    except ValueError as error:
        raise WireError(str(error)) from error
    return message.arrays[0]


def _check_arrays(
    arrays: Sequence[NDArray[Any]], wanted: Sequence[tuple[Any, tuple[int, ...]]]
) -> None:
    got = [(array.dtype, array.shape) for array in arrays]
    if got != wanted:
        said = ", ".join(f"{dtype} {shape}" for dtype, shape in got)
        expected = ", ".join(f"{dtype} {shape}" for dtype, shape in wanted)
        raise WireError(f"a step of {said or 'nothing'}, and not of {expected}")


def _infos(text: Mapping[str, Any], ended: Sequence[int]) -> EpisodeInfo:
    """Returns the infos of the rows that ended; whatever else there is is no step."""
    if not text:
        return {}
    infos = text.get("infos")
    if len(text) != 1 or not isinstance(infos, dict):
        raise WireError(f"a step that says {', '.join(text)[:100]}")
    rows = {str(row): row for row in ended}
    if not infos.keys() <= rows.keys():
        raise WireError("infos of episodes that did not end")
    if not all(isinstance(scalars, dict) and _fits(scalars) for scalars in infos.values()):
        raise WireError(f"infos that are no numbers, or longer than {INFO_NBYTES} bytes")
    return {rows[row]: scalars for row, scalars in infos.items()}


def _fits(scalars: Mapping[str, Any]) -> bool:
    """Whether an info is a few numbers, as the table has room for."""
    return all(map(_is_number, scalars.values())) and len(json.dumps(dict(scalars))) <= INFO_NBYTES


def _is_number(value: Any) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < _MAX_INT
    return isinstance(value, float)


def _space(space: gym.Space[Any]) -> Any:
    """Returns a space in words of our own: those of Gymnasium differ from version to version."""
    if isinstance(space, gym.spaces.Dict):
        return {name: _space(part) for name, part in space.spaces.items()}
    if isinstance(space, gym.spaces.Tuple):
        return [_space(part) for part in space.spaces]
    if isinstance(space, gym.spaces.Box):
        bounds = np.stack((space.low, space.high))
        digest = hashlib.sha256(np.ascontiguousarray(bounds).tobytes()).hexdigest()[:8]
        extent = f"{bounds.min():g}..{bounds.max():g}" if bounds.size else "nothing"
        return f"{space.dtype} {list(space.shape)} in {extent} (bounds {digest})"
    if isinstance(space, gym.spaces.Discrete):
        return f"{int(space.n)} choices from {int(space.start)}"
    if isinstance(space, gym.spaces.MultiDiscrete):
        return f"choices {space.nvec.tolist()} from {space.start.tolist()}"
    return str(space)


def _short(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, dict | list) else str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
