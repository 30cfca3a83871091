"""A user's own `gymnasium.vector.VectorEnv` as a `BatchEnv`, in every autoreset mode of Gymnasium.

    SAME_STEP   a row that ended shows the next episode; info["final_obs"] has its last observation
    DISABLED    a row that ended shows its last observation, and is reset here, by `reset_mask`
    NEXT_STEP   a row that ended shows its last observation; the next step ignores its action, has
                no reward, and shows the next episode

In the last mode the other rows must step before a row that ended can say how its next episode
begins. So it is `absent` from that step, and comes with the next one: its end, its last reward and
the first observation of its next episode. The step that only begins an episode is never shown.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from numpy.typing import NDArray

from headrace import tree
from headrace.envs.checks import Call, Checks, Strictness, Translated, parts_of, show
from headrace.envs.global_draws import Own
from headrace.envs.gymnasium_batch import NO_FINAL_MASK, allows_nothing, numbers_of
from headrace.envs.returned import kept
from headrace.envs.spaces import action_space, actions_converter, observation_space, without_text
from headrace.errors import ConfigError, EnvironmentFault
from headrace.specs import EnvSpec
from headrace.steps import EnvStep, EpisodeInfo

Vector = VectorEnv[Any, Any, Any]
Info = Mapping[str, Any]

_NO_NUMBERS = {
    "action_mask",
    "_action_mask",
    "final_obs",
    "_final_obs",
    "final_info",
    "_final_info",
}
_DESCRIBED = "https://gymnasium.farama.org/api/vector/#gymnasium.vector.AutoresetMode"


class Stretch(NamedTuple):
    """A vector and its rows."""

    env: Vector
    mode: AutoresetMode
    step: Callable[..., Any]
    reset: Callable[..., Any]
    first: int
    end: int


class VectorBatch:
    """Vectors of one kind, whose environments stand one after the other.

    What they do depends on the seed and on the number of the first environment of each.
    """

    def __init__(
        self,
        vectors: Sequence[Vector],
        *,
        name: str,
        seed: int,
        fixed: bool,
        first_env: int = 0,
        strictness: Strictness = "normal",
        frame_stack: int = 1,
        own: Own | None = None,
    ) -> None:
        """Takes the vectors, which it owns, and resets the first: its info has the masks.

        Args:
            vectors: in the order of their environments.
            name: what the user typed.
            seed: of the run.
            fixed: whether none can be had with another number of environments.
            first_env: number of the first environment within the run.
            strictness: see `GymnasiumConfig`.
            frame_stack: see `EnvSpec`.
            own: what they were made with; of each vector.

        Raises:
            ConfigError: spaces that are not supported, or no word on when episodes begin.
            EnvironmentFault: the reset went wrong.
        """
        self._own = Own(contextvars.copy_context()) if own is None else own
        steps = self._own.around([env.step for env in vectors])
        resets = self._own.around([env.reset for env in vectors])
        ends = np.cumsum([env.num_envs for env in vectors]).tolist()
        self._stretches = {
            end - env.num_envs: Stretch(env, _mode(env, name), step, reset, end - env.num_envs, end)
            for env, step, reset, end in zip(vectors, steps, resets, ends, strict=True)
        }
        self.num_envs: int = ends[-1]
        self._first_env = first_env
        self._running: int | None = None
        self._checks = Checks(name, first_env=first_env, strictness=strictness)
        self.notices = self._checks.notices
        """What is wrong with the environments but can be lived with, one sentence each."""
        words = np.random.SeedSequence(seed).generate_state(first_env + self.num_envs)[first_env:]
        self._seeds: list[int] | None = (words >> 1).tolist()  # int32 in some environments

        space, own_actions = vectors[0].single_observation_space, vectors[0].single_action_space
        try:
            actions = action_space(own_actions)
            observed, structure = observation_space(space)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
        self._to_actions = actions_converter(own_actions)
        self._parts = parts_of(structure or space)
        self._packed = structure is not None
        for dropped in without_text(space)[1]:
            self.notices.append(f"{name}: {dropped!r} of the observation is text and is left out")
        self._first: tuple[Any, Info] | None = kept(self._reset(self._stretches[0]))
        self._masked = "" if isinstance(actions, gym.spaces.Box) else _masked(*self._first)
        self._ensure_alike(space, own_actions)
        self.spec = EnvSpec(
            name=name,
            observation_space=observed,
            action_space=actions,
            frame_stack=frame_stack,
            structure=structure,
            has_action_mask=bool(self._masked),
            own_action_space=None if own_actions == actions else own_actions,
            vector_envs=vectors[0].num_envs if fixed else 0,
        )
        self._action = some_actions(self.spec, self.num_envs)  # that each row got last
        self._held = np.zeros(self.num_envs, np.bool_)  # rows that are absent,
        self._ends = self._rows(np.arange(self.num_envs, dtype=np.int32))  # and how they ended
        self._infos: dict[int, dict[str, float]] = {}

    @property
    def current_env(self) -> int | None:
        """Number within the run of the first environment of the vector whose code runs now."""
        return self._running

    def reset(self) -> EnvStep:
        """Starts every environment."""
        out = self._rows(np.arange(self.num_envs, dtype=np.int32))
        first, self._first = self._first, None
        for stretch in self._stretches.values():
            observation, info = first or self._reset(stretch)
            first = None
            part = _cut(out, stretch.first, stretch.end)
            self._gather(stretch, observation, "reset", part.observation)
            self._write_masks(stretch, observation, info, None, part)
        self._seeds = None
        self._held.fill(False)
        out.reset.fill(True)
        return out._replace(final_observation=None, final_action_mask=None)

    def step(self, env_id: NDArray[np.int32], action: NDArray[Any]) -> EnvStep:
        """Steps the vectors whose environments are named; see `BatchEnv.step`."""
        self._action[env_id] = action
        asked = [
            np.arange(first, stretch.end, dtype=np.int32)
            for first, stretch in self._stretches.items()
            if ((env_id >= first) & (env_id < stretch.end)).any()
        ]
        out = self._rows(np.concatenate(asked))
        ended, infos = self._step_all(out)
        if not ended:
            out = out._replace(final_observation=None, final_action_mask=None)
        return out._replace(episode_info=infos)

    def step_into(self, out: EnvStep, action: NDArray[Any]) -> tuple[bool, EpisodeInfo | None]:
        """Steps the vectors of `out.env_id` into the arrays of `out`; see `GymnasiumBatch`.

        Actions of rows that were absent are ignored.
        """
        self._action[out.env_id] = action
        return self._step_all(out)

    def close(self) -> None:
        """Closes the vectors."""
        for stretch in self._stretches.values():
            self._own.run(stretch.env.close)

    def _step_all(self, out: EnvStep) -> tuple[bool, EpisodeInfo | None]:
        infos: dict[int, dict[str, float]] = {}
        ended, place = False, 0
        while place < len(out.env_id):
            stretch = self._stretches[int(out.env_id[place])]
            part = _cut(out, place, place + stretch.env.num_envs)
            told = self._step(stretch, part)
            if part.absent.all():  # nobody would answer
                told = self._step(stretch, part)
            ended |= told is not None
            infos |= {place + row: numbers for row, numbers in (told or {}).items() if numbers}
            place += stretch.env.num_envs
        return ended, infos or None

    def _step(self, stretch: Stretch, out: EnvStep) -> dict[int, dict[str, float]] | None:
        """Steps a vector into its rows.

        Returns:
            The final infos of the episodes whose end is shown, by row; None if there is no end.
        """
        actions = self._to_actions(self._action[stretch.first : stretch.end].copy())
        result = self._call(stretch, "step", lambda: stretch.step(actions))
        if not isinstance(result, tuple | list) or len(result) != 5:
            what = "observations, rewards, terminations, truncations, infos"
            raise self._fault(stretch, f"step must return ({what}), not {show(result)}")
        observation, reward, terminated, truncated, info = result
        if not isinstance(info, Mapping):
            raise self._fault(stretch, f"step returned the info {show(info)}, not a dictionary")
        envs = range(stretch.first, stretch.end)
        self._checks.rewards(self._per_row(stretch, "rewards", reward), envs, out.reward)
        for name, values, flags in (
            ("terminations", terminated, out.terminated),
            ("truncations", truncated, out.truncated),
        ):
            flags[...] = self._checks.flags(name, self._per_row(stretch, name, values), envs)
        self._gather(stretch, observation, "step", out.observation)
        np.logical_or(out.terminated, out.truncated, out=out.reset)
        out.truncated[out.terminated] = False
        ended = np.flatnonzero(out.reset)
        if stretch.mode is AutoresetMode.NEXT_STEP:
            return self._hold(stretch, observation, info, ended, out)
        if not len(ended):
            self._write_masks(stretch, observation, info, None, out)
            return None
        told = self._write_ends(stretch, observation, info, ended, out, into=out)
        if stretch.mode is AutoresetMode.DISABLED:
            self._write_masks(stretch, observation, info, np.flatnonzero(~out.reset), out)
            observation, info = self._restart(stretch, ended, out)
            self._write_masks(stretch, observation, info, ended, out)
        else:
            self._write_masks(stretch, observation, info, None, out)
        return told

    def _hold(
        self,
        stretch: Stretch,
        observation: Any,
        info: Info,
        ended: NDArray[np.intp],
        out: EnvStep,
    ) -> dict[int, dict[str, float]] | None:
        """Holds back the rows that ended, and gives those that were held back before."""
        first, held = stretch.first, self._held[stretch.first : stretch.end]
        begin = np.flatnonzero(held)
        if not (len(begin) or len(ended)):
            self._write_masks(stretch, observation, info, None, out)
            return None
        if out.reset[begin].any():
            raise self._checks.fault(
                first + int(begin[out.reset[begin]][0]),
                "the step after an end, which only begins the next episode, ended that: "
                'metadata["autoreset_mode"] is NEXT_STEP, and the vector does something else',
            )
        ends = _cut(self._ends, first, stretch.end)
        _copy_ends(ends, out, begin)
        told = {}
        if self._infos:
            told = {row: self._infos.pop(first + row, {}) for row in begin.tolist()}
        _copy_ends(out, ends, ended, finals=False)
        infos = self._write_ends(stretch, observation, info, ended, out, into=ends)
        self._infos |= {first + row: numbers for row, numbers in infos.items()}
        out.reset.fill(False)
        out.reset[begin] = True
        out.terminated[ended] = out.truncated[ended] = True  # absent
        held.fill(False)
        held[ended] = True
        self._write_masks(stretch, observation, info, np.flatnonzero(~held), out)
        return told if len(begin) else None

    def _write_ends(
        self,
        stretch: Stretch,
        observation: Any,
        info: Info,
        rows: NDArray[np.intp],
        out: EnvStep,
        *,
        into: EnvStep,
    ) -> dict[int, dict[str, float]]:
        """Writes final observations and their masks; returns the final infos, by row."""
        assert into.final_observation is not None
        if stretch.mode is not AutoresetMode.SAME_STEP:
            finals: Any = observation
            into.final_observation[rows] = out.observation[rows]
        else:
            flags = info.get("_final_obs")
            finals = info.get("final_obs")
            lacks = rows if finals is None else rows[:0] if flags is None else rows[~flags[rows]]
            if len(lacks):
                raise self._checks.fault(
                    stretch.first + int(lacks[0]),
                    'its episode ended, and info["final_obs"] has no last observation of it, which '
                    'metadata["autoreset_mode"] SAME_STEP promises: put it there',
                )
            into.final_observation[rows] = self._shown(stretch, finals, rows)
            info = info.get("final_info", {})
        if into.final_action_mask is not None:
            into.final_action_mask[rows] = True
            cut = rows[out.truncated[rows]]
            for row, mask in zip(cut, self._found_masks(finals, info, cut), strict=True):
                if mask is not None and not allows_nothing(mask):
                    env = stretch.first + int(row)
                    into.final_action_mask[row] = self._checks.masks(
                        [mask], self.spec.action_choices, [env]
                    )[0]
                elif NO_FINAL_MASK not in self.notices:
                    self.notices.append(NO_FINAL_MASK)
        if isinstance(info, Mapping) and not info.keys() - _NO_NUMBERS:
            return {}
        return {row: numbers_of(_of_row(info, row)) for row in rows.tolist()}

    def _restart(self, stretch: Stretch, rows: NDArray[np.intp], out: EnvStep) -> tuple[Any, Info]:
        """Resets the environments that ended, and no others."""
        reset_mask = out.reset.copy()
        observation, info = self._reset(stretch, {"reset_mask": reset_mask})
        rest = np.flatnonzero(~out.reset)
        if self._shown(stretch, observation, rest).tobytes() != out.observation[rest].tobytes():
            raise self._fault(
                stretch,
                'reset(options={"reset_mask": mask}) shows other observations of environments '
                "that are not in the mask than step did: it must reset those of the mask alone "
                f"({_DESCRIBED})",
            )
        out.observation[rows] = self._shown(stretch, observation, rows)
        return observation, info

    def _reset(self, stretch: Stretch, options: dict[str, Any] | None = None) -> tuple[Any, Info]:
        """Resets a vector, with its seeds if it is the first time."""
        seed: Any = None
        if self._seeds is not None:
            seed = self._seeds[stretch.first : stretch.end]
            if not isinstance(stretch.env.unwrapped, SyncVectorEnv | AsyncVectorEnv):
                seed = seed[0]  # a `VectorEnv` promises to take one number
        more = {} if options is None else {"options": options}
        result = self._call(stretch, "reset", lambda: stretch.reset(seed=seed, **more))
        if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], Mapping):
            text = f"reset must return (observations, infos), not {show(result)}"
            raise self._fault(stretch, text)
        return result

    def _call(self, stretch: Stretch, call: Call, run: Callable[[], Any]) -> Any:
        """Runs the code of a vector."""
        self._running = self._first_env + stretch.first
        try:
            with Translated(lambda error: self._checks.raised(stretch.first, call, error)):
                return self._own.run(run)
        finally:
            self._running = None

    def _fault(self, stretch: Stretch, text: str) -> EnvironmentFault:
        return self._checks.fault(stretch.first, f"its vector's {text}")

    def _ensure_alike(self, *spaces: gym.Space[Any]) -> None:
        """Refuses vectors with other spaces than the first."""
        names = ("single_observation_space", "single_action_space")
        for stretch in self._stretches.values():
            for name, space in zip(names, spaces, strict=True):
                if (own := getattr(stretch.env, name)) != space:
                    text = f"{name} is {own}, and that of the first vector {space}"
                    raise self._fault(stretch, text)

    def _per_row(self, stretch: Stretch, name: str, values: Any) -> Any:
        """Returns what must be one value for each environment."""
        if np.shape(values) != (stretch.env.num_envs,):
            raise self._fault(
                stretch,
                f"step returned {name} of shape {np.shape(values)}: return one for each of its "
                f"{stretch.env.num_envs} environments",
            )
        return values

    def _gather(
        self,
        stretch: Stretch,
        observation: Any,
        call: Call,
        out: NDArray[Any],
        rows: NDArray[np.intp] | None = None,
    ) -> None:
        """Writes the observations of all rows, or of some, as they travel, [N, ...].

        `observation` is a batch, or a list or an array of single ones.
        """
        size, envs = stretch.env.num_envs, range(stretch.first, stretch.end)
        some: Any = slice(None) if rows is None else rows
        whose = envs if rows is None else [envs[row] for row in rows]
        views = {"": out}
        if self._packed:
            views = tree.unpack([part.leaf for part in self._parts], out)
        is_list = isinstance(observation, list) or _is_of_objects(observation)
        for part in self._parts:
            view = views[part.leaf.path]
            if is_list:
                given = [observation[env - stretch.first] for env in whose]
                self._checks.observations(part, given, whose, call, view)
                continue
            try:
                column = np.asarray(tree.part_of(part.leaf, observation))
            except (KeyError, IndexError, TypeError) as error:
                text = f"{call} returned observations without {part.leaf.path!r}"
                raise self._fault(stretch, f"{text}: {show(observation)}") from error
            if column.shape[:1] != (size,):
                what = part.leaf.path and f"with a part {part.leaf.path!r} "
                raise self._fault(
                    stretch,
                    f"{call} returned observations {what}of shape {column.shape}, which is not one "
                    f"for each of its {size} environments",
                )
            self._checks.column(part, column[some], whose, call, view)

    def _shown(self, stretch: Stretch, observation: Any, rows: NDArray[np.intp]) -> NDArray[Any]:
        """Returns the observations of some rows."""
        space = self.spec.observation_space
        out = np.zeros((len(rows), *space.shape), space.dtype)
        if len(rows):
            self._gather(stretch, observation, "step", out, rows)
        return out

    def _write_masks(
        self,
        stretch: Stretch,
        observation: Any,
        info: Info,
        rows: NDArray[np.intp] | None,
        out: EnvStep,
    ) -> None:
        """Writes what is allowed in all rows, or in some."""
        if out.action_mask is None:
            if "action_mask" in info and self.spec.action_choices:
                raise self._fault(
                    stretch,
                    "step has an action_mask in its info, and reset has none: put it in both",
                )
            return
        if rows is None:
            rows = np.arange(stretch.env.num_envs)
        if not len(rows):
            return
        found = self._found_masks(observation, info, rows)
        envs = (stretch.first + rows).tolist()
        out.action_mask[rows] = self._checks.masks(found, self.spec.action_choices, envs)

    def _found_masks(self, observation: Any, info: Any, rows: NDArray[np.intp]) -> Any:
        """Returns the masks of some rows as they were given, None where there is none."""
        given = info if self._masked == "info" else observation
        if not isinstance(given, Mapping):  # one of each environment
            return [(given[row] or {}).get("action_mask") for row in rows]
        masks, there = given.get("action_mask"), None
        if self._masked == "info":
            there = given.get("_action_mask")
        if masks is None:
            return [None] * len(rows)
        if isinstance(masks, tuple):  # one array of each number of an action
            masks = [tuple(part[row] for part in masks) for row in range(len(masks[0]))]
        if there is None or np.all(np.asarray(there)[rows]):
            return masks[rows] if isinstance(masks, np.ndarray) else [masks[row] for row in rows]
        return [masks[row] if there[row] else None for row in rows]

    def _rows(self, env_id: NDArray[np.int32]) -> EnvStep:
        """Returns room for a step."""
        count, shown = len(env_id), self.spec.observation_space
        masks = self.spec.action_mask_size
        return EnvStep(
            env_id=env_id,
            run_id=np.zeros(count, np.int64),
            observation=np.zeros((count, *shown.shape), shown.dtype),
            reward=np.zeros(count, np.float32),
            reset=np.zeros(count, np.bool_),
            terminated=np.zeros(count, np.bool_),
            truncated=np.zeros(count, np.bool_),
            final_observation=np.zeros((count, *shown.shape), shown.dtype),
            action_mask=np.ones((count, masks), np.bool_) if masks else None,
            final_action_mask=np.ones((count, masks), np.bool_) if masks else None,
        )


class FirstOf:
    """The first environments of a vector that has more: the others step too, and are not shown."""

    def __init__(self, env: VectorBatch, num_envs: int) -> None:
        """Shows `num_envs` environments."""
        self.spec, self.num_envs, self.notices = env.spec, num_envs, env.notices
        self._env = env
        self._env_id = np.arange(env.num_envs, dtype=np.int32)
        self._action = some_actions(env.spec, env.num_envs)

    @property
    def current_env(self) -> int | None:
        """See `VectorBatch`."""
        return self._env.current_env

    def reset(self) -> EnvStep:
        """Starts every environment."""
        return self._first(self._env.reset())

    def step(self, env_id: NDArray[np.int32], action: NDArray[Any]) -> EnvStep:
        """Steps the vector; see `BatchEnv.step`."""
        self._action[env_id] = action
        step = self._first(self._env.step(self._env_id, self._action))
        while step.absent.all():  # nobody would answer
            step = self._first(self._env.step(self._env_id, self._action))
        return step

    def close(self) -> None:
        """Closes the vector."""
        self._env.close()

    def _first(self, step: EnvStep) -> EnvStep:
        """Returns the rows that are shown, and chooses an action for each of the others."""
        count, ends = self.num_envs, np.cumsum(self.spec.action_choices)[:-1].tolist()
        masks = () if step.action_mask is None else step.action_mask[count:]
        for row, mask in enumerate(masks, count):
            allowed = [flags.argmax() for flags in np.split(mask, ends)]
            self._action[row] = np.reshape(allowed, self.spec.action_shape)
        infos = {row: info for row, info in (step.episode_info or {}).items() if row < count}
        return _cut(step, 0, count)._replace(episode_info=infos or None)


def some_actions(spec: EnvSpec, count: int) -> NDArray[Any]:
    """Returns actions that are in their space, [N] or [N, D]."""
    actions = np.zeros((count, *spec.action_shape), spec.action_dtype)
    space = spec.action_space
    return np.clip(actions, space.low, space.high) if isinstance(space, gym.spaces.Box) else actions


def _mode(env: Vector, name: str) -> AutoresetMode:
    """Returns when the environments of a vector begin anew, as it says."""
    mode = env.metadata.get("autoreset_mode")
    try:
        return AutoresetMode(mode)
    except ValueError as error:
        raise ConfigError(
            f"{name} does not say when its environments begin anew: "
            f'metadata["autoreset_mode"] is {show(mode)}; set it to NEXT_STEP, SAME_STEP or '
            "DISABLED of gymnasium.vector.AutoresetMode"
        ) from error


def _masked(observation: Any, info: Info) -> str:
    """Returns where the masks of a vector are: "info", "observation" or nowhere, ""."""
    if "action_mask" in info:
        return "info"
    is_part = isinstance(observation, Mapping) and "action_mask" in observation
    return "observation" if is_part else ""


def _of_row(info: Any, row: int) -> Mapping[str, Any]:
    """Returns the info of one environment, as far as it is in a vector's."""
    if not isinstance(info, Mapping):  # one of each environment
        own = info[row]
        return own if isinstance(own, Mapping) else {}
    return {
        name: values[row]
        for name, values in info.items()
        if isinstance(values, np.ndarray)
        and len(values) > row
        and not (name.startswith("_") and name[1:] in info)
        and np.broadcast_to(info.get(f"_{name}", True), values.shape[:1])[row]
    }


def _is_of_objects(observation: Any) -> bool:
    return isinstance(observation, np.ndarray) and observation.dtype == np.object_


def _cut(step: EnvStep, first: int, end: int) -> EnvStep:
    """Returns views of some rows, without infos."""
    columns: list[Any] = [None if column is None else column[first:end] for column in step[:-1]]
    return EnvStep(*columns)


def _copy_ends(
    source: EnvStep, target: EnvStep, rows: NDArray[np.intp], *, finals: bool = True
) -> None:
    """Copies how episodes ended, with or without what was seen last."""
    names = ("reward", "terminated", "truncated", "final_observation", "final_action_mask")
    for name in names if finals else names[:3]:
        if getattr(source, name) is not None:
            getattr(target, name)[rows] = getattr(source, name)[rows]
