"""Gymnasium environments of one kind as a `BatchEnv`: a plain loop, arrays afterwards.

The loop does nothing but call `step`, and keep what another copy could change; what is rare (ends,
errors, prints) is looked at after it.
"""

from __future__ import annotations

import contextvars
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from headrace import tree
from headrace.envs.checks import Call, Checks, Strictness, Translated, parts_of, show
from headrace.envs.global_draws import Own
from headrace.envs.returned import Sharing, kept
from headrace.envs.spaces import action_converter, action_space, observation_space, without_text
from headrace.errors import ConfigError, EnvironmentFault
from headrace.specs import ActionSpace, EnvSpec
from headrace.steps import EnvStep, EpisodeInfo

FindMask = Callable[[Any, Mapping[str, Any]], Any]
"""From the observation and the info of a copy to its action mask."""

_GOES_ON = (False, False)  # terminated, truncated

NO_FINAL_MASK = (
    "a step that truncates an episode has no action_mask, or one that allows nothing: every action "
    "counts as allowed in the value of that last observation; say there what would be allowed, or "
    "terminate where the game is over"
)


class GymnasiumBatch:
    """N environments, reset by us in the step in which they end.

    What a copy does depends on the seed and on `first_env` plus its place, on nothing else of the
    batch: its first reset is seeded, later ones go on with the environment's own random numbers.
    """

    def __init__(
        self,
        envs: Sequence[gym.Env[Any, Any]],
        *,
        name: str,
        seed: int,
        first_env: int = 0,
        strictness: Strictness = "normal",
        frame_stack: int = 1,
        action_repeat: int = 1,
        own: Own | None = None,
    ) -> None:
        """Takes the environments, which it owns, and resets the first: its info has the mask.

        `own` is what they were made with.

        Raises:
            ConfigError: spaces that are not supported.
            EnvironmentFault: the reset went wrong.
        """
        self.num_envs = len(envs)
        self._envs = list(envs)
        self._own = Own(contextvars.copy_context()) if own is None else own
        self._run = self._own.run if self._own.draws else self._own.context.run
        self._sharing = Sharing()
        self._bind(None)
        self._checks = Checks(name, first_env=first_env, strictness=strictness)
        self.notices = self._checks.notices
        """What is wrong with the environments but can be lived with, one sentence each."""
        self._first_env = first_env
        words = np.random.SeedSequence(seed).generate_state(first_env + len(envs))[first_env:]
        self._seeds: list[int] | None = (words >> 1).tolist()  # int32 in some environments
        self._whose: Sequence[int] = ()
        self._results: list[Any] = []
        self._translated = {
            "reset": Translated(lambda error: self._raised("reset", error)),
            "step": Translated(lambda error: self._raised("step", error)),
        }

        space, own_actions = envs[0].observation_space, envs[0].action_space
        try:
            actions = action_space(own_actions)
            observed, structure = observation_space(space)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
        self._to_actions = action_converter(own_actions)
        self._parts = parts_of(structure or space)
        self._packed = structure is not None
        for dropped in without_text(space)[1]:
            self.notices.append(f"{name}: {dropped!r} of the observation is text and is left out")
        first = self._reset([0])
        self._find_mask = self._where_masks_are(actions, *(part[0] for part in first))
        if self._find_mask is None and (methods := self._mask_methods(actions)):
            self._bind(methods)
            self._find_mask = _mask_in_info
            first[1][0] = self._first_info(first[1][0], methods[0])
        self._first: tuple[list[Any], list[Mapping[str, Any]]] | None = first
        has_mask = self._find_mask is not None
        if has_mask and action_repeat > 1:
            raise ConfigError(
                f"{name}: frame_skip repeats actions that its action_mask may forbid in between: "
                "leave out --frame-skip"
            )
        self._ensure_alike(space, own_actions)
        self.spec = EnvSpec(
            name=name,
            observation_space=observed,
            action_space=actions,
            action_repeat=action_repeat,
            frame_stack=frame_stack,
            structure=structure,
            has_action_mask=has_mask,
            own_action_space=None if own_actions == actions else own_actions,
        )
        self._choices = self.spec.action_choices if has_mask else ()

    @property
    def current_env(self) -> int | None:
        """Number within the run of the environment whose code runs now; None between calls."""
        place = len(self._results)
        return self._first_env + self._whose[place] if place < len(self._whose) else None

    def reset(self) -> EnvStep:
        """Starts every copy."""
        envs = range(self.num_envs)
        if self._first is None:
            observations, infos = self._reset(envs)
        else:
            observations, infos = self._first
            rest = self._reset(envs[1:])
            observations, infos = [*observations, *rest[0]], [*infos, *rest[1]]
            self._first = self._seeds = None
        out = self._rows(np.arange(self.num_envs, dtype=np.int32))
        self._gather(observations, envs, "reset", out.observation)
        if out.action_mask is not None:
            out.action_mask[...] = self._masks(envs, observations, infos)
        out.reset.fill(True)
        return out._replace(final_observation=None, final_action_mask=None)

    def step(self, env_id: NDArray[np.int32], action: NDArray[Any]) -> EnvStep:
        """Steps the named copies, and resets those that end."""
        out = self._rows(env_id)
        ended, episode_info = self.step_into(out, action)
        if not ended:
            out = out._replace(final_observation=None, final_action_mask=None)
        return out._replace(episode_info=episode_info)

    def step_into(self, out: EnvStep, action: NDArray[Any]) -> tuple[bool, EpisodeInfo | None]:
        """Steps the copies `out.env_id` and writes what they show into the arrays of `out`.

        That is what `step` returns, less its run ids, which never change. Rows of the final
        observation and of its action mask are written where an episode ended.

        Returns:
            Whether an episode ended, and the numbers of the final infos.
        """
        envs = out.env_id.tolist()
        self._whose = envs
        self._results = []
        with self._translated["step"]:
            self._run(self._take_steps, envs, self._to_actions(action))
        try:
            observations, rewards, ended_well, cut, last_infos = zip(*self._results, strict=True)
        except (TypeError, ValueError) as error:
            raise self._wrong_result(self._results, envs) from error
        self._checks.rewards(rewards, envs, out.reward)
        self._gather(observations, envs, "step", out.observation)
        if _all_false(ended_well) and _all_false(cut):
            for flags in (out.terminated, out.truncated, out.reset):
                flags.fill(False)
            rows: list[int] = []
        else:
            out.terminated[...] = self._checks.flags("terminated", ended_well, envs)
            out.truncated[...] = self._checks.flags("truncated", cut, envs)
            np.logical_or(out.terminated, out.truncated, out=out.reset)
            out.truncated[out.terminated] = False
            rows = np.flatnonzero(out.reset).tolist()
        shown: Sequence[Any] = observations
        infos: Sequence[Any] = last_infos
        episode_info = None
        self._ensure_seen(infos[0], envs[0])
        if rows:
            episode_info = self._final_infos(infos, rows, envs)
            if out.final_action_mask is not None:
                self._write_final_masks(rows, envs, observations, infos, out)
            shown, infos = self._restart(rows, envs, observations, infos, out)
        if out.action_mask is not None:
            out.action_mask[...] = self._masks(envs, shown, infos)
        return bool(rows), episode_info

    def close(self) -> None:
        """Closes the environments."""
        for env in self._envs:
            self._run(env.close)

    def _ensure_alike(self, *spaces: gym.Space[Any]) -> None:
        """Refuses copies with other spaces than the first had before it was reset.

        Raises:
            EnvironmentFault: names the copy.
        """
        names = ("observation_space", "action_space")
        for place, env in enumerate(self._envs):
            for name, space in zip(names, spaces, strict=True):
                own = getattr(env, name)
                if own is not space and (own != space or own.dtype != space.dtype):
                    raise self._checks.fault(
                        place,
                        f"its {name} is {own}, and that of the first copy was {space} when it was "
                        "made: all copies must have the same, from the start",
                    )

    def _bind(self, masks: Sequence[Callable[[], Any]] | None) -> None:
        """Chooses what is called for a step and for a reset of each copy."""
        steps: list[Callable[..., Any]] = [env.step for env in self._envs]
        resets: list[Callable[..., Any]] = [env.reset for env in self._envs]
        if masks is not None:
            steps, resets = (list(map(_with_mask, calls, masks)) for calls in (steps, resets))
        self._steps, self._resets = self._own.around(steps), self._own.around(resets)

    def _take_steps(self, envs: Sequence[int], actions: Sequence[Any]) -> None:
        """Steps copies, one after the other."""
        append, steps = self._results.append, self._steps
        if len(envs) == 1 or not self._sharing.possible:
            for env, own_action in zip(envs, actions, strict=True):
                result = steps[env](own_action)
                if type(result) is tuple and result[2:4] != _GOES_ON:
                    result = kept(result)  # what ends rarely may share what it shows at its end
                append(result)
            return
        shown = []
        for env, own_action in zip(envs, actions, strict=True):
            result = steps[env](own_action)
            shown.append(result)
            append(kept(result))
        self._sharing.watch(shown)

    def _take_resets(self, envs: Sequence[int]) -> None:
        """Resets copies; what they show is kept, since it may have to wait for others."""
        shown, seeds = [], self._seeds
        for env in envs:
            result = self._resets[env](seed=seeds[env] if seeds else None)
            shown.append(result)
            self._results.append(kept(result))
        self._sharing.watch(shown)

    def _reset(self, envs: Sequence[int]) -> tuple[list[Any], list[Mapping[str, Any]]]:
        """Resets copies, with their seeds if it is the first time."""
        self._whose = envs
        results: list[Any] = []
        self._results = results
        with self._translated["reset"]:
            self._run(self._take_resets, envs)
        for env, result in zip(envs, results, strict=True):
            if (
                not isinstance(result, tuple)
                or len(result) != 2
                or not isinstance(result[1], Mapping)
            ):
                text = f"reset must return (observation, info), not {show(result)}"
                raise self._checks.fault(env, text)
        return [result[0] for result in results], [result[1] for result in results]

    def _where_masks_are(
        self, actions: ActionSpace, observation: Any, info: Mapping[str, Any]
    ) -> FindMask | None:
        """Returns what finds the mask of a copy, in its info or its observation.

        That is info["action_mask"] (Gymnasium's own environments), or a part "action_mask" of a
        Dict (PettingZoo, RLlib). None where there is none.
        """
        if isinstance(actions, gym.spaces.Box):
            return None
        if "action_mask" in info:
            return _mask_in_info
        if isinstance(observation, Mapping) and "action_mask" in observation:
            return lambda observation, _: observation["action_mask"]
        return None

    def _mask_methods(self, actions: ActionSpace) -> list[Callable[[], Any]] | None:
        """Returns the method `action_masks` of every copy, as sb3-contrib has it, if they do."""
        if isinstance(actions, gym.spaces.Box):
            return None
        try:
            methods = [env.get_wrapper_attr("action_masks") for env in self._envs]
        except AttributeError:
            return None
        if not all(map(callable, methods)):
            text = f"action_masks is {show(methods[0])}: make it a method that returns the mask"
            raise self._checks.fault(0, text)
        return methods

    def _first_info(self, info: Mapping[str, Any], mask: Callable[[], Any]) -> Mapping[str, Any]:
        """Returns the info of the first reset with the mask, for which nobody had asked yet."""
        self._results = []
        with self._translated["reset"]:
            self._run(lambda: self._results.append(kept(mask())))
        return {**info, "action_mask": self._results[0]}

    def _masks(
        self, envs: Sequence[int], observations: Sequence[Any], infos: Sequence[Any]
    ) -> NDArray[np.bool_]:
        """Returns what every copy allows now, [N, A]."""
        assert self._find_mask is not None
        found = list(map(self._find_mask, observations, infos))
        return self._checks.masks(found, self.spec.action_choices, envs)

    def _write_final_masks(
        self,
        rows: Sequence[int],
        envs: Sequence[int],
        observations: Sequence[Any],
        infos: Sequence[Any],
        out: EnvStep,
    ) -> None:
        """Writes what could still be done in episodes that only the clock has ended.

        An environment that has no mask there, or one of nothing, allows everything, which is said.
        """
        assert out.final_action_mask is not None
        assert self._find_mask is not None
        out.final_action_mask[rows] = True
        for row in (row for row in rows if out.truncated[row]):
            mask = self._find_mask(observations[row], infos[row])
            if mask is not None and not allows_nothing(mask):
                choices = self.spec.action_choices
                out.final_action_mask[row] = self._checks.masks([mask], choices, [envs[row]])[0]
            elif NO_FINAL_MASK not in self.notices:
                self.notices.append(NO_FINAL_MASK)

    def _ensure_seen(self, info: Any, env: int) -> None:
        """Refuses a mask that comes too late for the first step of an episode.

        Raises:
            EnvironmentFault: it came in `step` alone.
        """
        is_late = self._find_mask is None and isinstance(info, Mapping) and "action_mask" in info
        if is_late and not isinstance(self.spec.action_space, gym.spaces.Box):
            raise self._checks.fault(
                env,
                "step has an action_mask in its info, and reset has none: put it in both",
            )

    def _restart(
        self,
        rows: Sequence[int],
        envs: Sequence[int],
        observations: Sequence[Any],
        infos: Sequence[Any],
        out: EnvStep,
    ) -> tuple[Sequence[Any], Sequence[Any]]:
        """Resets copies that ended; returns the observations and infos that hold now."""
        whose = [envs[row] for row in rows]
        first, fresh = self._reset(whose)
        assert out.final_observation is not None
        out.final_observation[rows] = out.observation[rows]
        shown = np.zeros_like(out.observation[: len(rows)])
        self._gather(first, whose, "reset", shown)
        out.observation[rows] = shown
        if self._find_mask is None:
            return observations, infos
        observations, infos = list(observations), list(infos)
        for row, observation, info in zip(rows, first, fresh, strict=True):
            observations[row], infos[row] = observation, info
        return observations, infos

    def _rows(self, env_id: NDArray[np.int32]) -> EnvStep:
        """Returns room for a step of these copies."""
        count, shown = len(env_id), self.spec.observation_space
        return EnvStep(
            env_id=env_id,
            run_id=np.zeros(count, np.int64),
            observation=np.zeros((count, *shown.shape), shown.dtype),
            reward=np.zeros(count, np.float32),
            reset=np.zeros(count, np.bool_),
            terminated=np.zeros(count, np.bool_),
            truncated=np.zeros(count, np.bool_),
            final_observation=np.zeros((count, *shown.shape), shown.dtype),
            action_mask=self._room_for_masks(count),
            final_action_mask=self._room_for_masks(count),
        )

    def _room_for_masks(self, count: int) -> NDArray[np.bool_] | None:
        return np.ones((count, sum(self._choices)), np.bool_) if self._choices else None

    def _gather(
        self, observations: Sequence[Any], envs: Sequence[int], call: Call, out: NDArray[Any]
    ) -> None:
        """Writes observations as they travel, [N, ...]."""
        if not self._packed:
            self._checks.observations(self._parts[0], observations, envs, call, out)
            return
        views = tree.unpack([part.leaf for part in self._parts], out)
        for part in self._parts:
            self._checks.observations(part, observations, envs, call, views[part.leaf.path])

    def _final_infos(
        self, infos: Sequence[Any], rows: Sequence[int], envs: Sequence[int]
    ) -> dict[int, dict[str, float]] | None:
        """Returns the numbers of the final infos, by row; None if there are none."""
        found = {}
        for row in rows:
            if not isinstance(infos[row], Mapping):
                text = f"step returned the info {show(infos[row])}, which is not a dictionary"
                raise self._checks.fault(envs[row], text)
            if numbers := numbers_of(infos[row]):
                found[row] = numbers
        return found or None

    def _raised(self, call: Call, error: BaseException) -> EnvironmentFault:
        place = min(len(self._results), len(self._whose) - 1)
        return self._checks.raised(self._whose[place], call, error)

    def _wrong_result(self, results: Sequence[Any], envs: Sequence[int]) -> EnvironmentFault:
        for env, result in zip(envs, results, strict=True):
            if not isinstance(result, tuple | list) or len(result) != 5:
                what = "observation, reward, terminated, truncated, info"
                return self._checks.fault(env, f"step must return ({what}), not {show(result)}")
        return self._checks.fault(envs[0], "step returned what cannot be read")


def numbers_of(info: Mapping[Any, Any]) -> dict[str, float]:
    """Returns the numbers of a final info."""
    return {
        name: float(value)
        for name, value in info.items()
        if isinstance(name, str)
        and name != "TimeLimit.truncated"
        and isinstance(value, int | float | np.number | np.bool_)
        and _is_finite(value)
    }


def _mask_in_info(_: Any, info: Mapping[str, Any]) -> Any:
    return info.get("action_mask")


def _with_mask(call: Callable[..., Any], mask: Callable[[], Any]) -> Callable[..., Any]:
    """Returns a `step` or `reset` that puts into the info what a method says is allowed."""

    def masked(*arguments: Any, **keywords: Any) -> Any:
        result = call(*arguments, **keywords)
        if not isinstance(result, tuple) or not isinstance(result[-1], Mapping):
            return result  # which is refused
        terminated, truncated = result[2:4] if len(result) == 5 else (False, False)
        if _is_set(terminated):  # nothing follows, and a game that is over may know no mask
            return result
        try:
            allowed = mask()
        except Exception:
            if _is_set(truncated):  # as above; what is not there is told
                return result
            raise
        return (*result[:-1], {**result[-1], "action_mask": allowed})

    return masked


def _is_finite(number: Any) -> bool:
    """Whether a number of any kind is one of float64's."""
    try:
        return math.isfinite(number)
    except (OverflowError, TypeError):  # 10**400; a complex number, a duration
        return False


def allows_nothing(mask: Any) -> bool:
    """Whether all flags of a mask are 0; what is no mask is for others to judge."""
    try:
        return not np.any(np.hstack(mask))
    except (TypeError, ValueError):
        return False


def _is_set(flag: Any) -> bool:
    """Whether a flag, as an environment gives it, is true; what is none is for others to judge."""
    return isinstance(flag, bool | int | np.bool_ | np.integer) and bool(flag)


def _all_false(values: tuple[Any, ...]) -> bool:
    """Whether no flag is set; an array among them is for others to judge."""
    try:
        return values.count(False) == len(values)
    except ValueError:
        return False
