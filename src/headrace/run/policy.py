"""A trained policy, in a user's own loop.

The state that the policy carries from step to step (frame stack, recurrent state, previous action)
is a value that the caller keeps and hands back; `act` is the server's own code, so the policy plays
here as it plays there.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from headrace import catalog, tree
from headrace.algorithms.base import ActionMode, Algorithm
from headrace.apart import Apart, known
from headrace.config import RunConfig, from_dict, of_a_run, parse_toml
from headrace.envs import gymnasium
from headrace.envs.checks import mask_flags
from headrace.envs.spaces import action_converter
from headrace.errors import ConfigError
from headrace.networks.models import lower_precision
from headrace.networks.modes import frozen
from headrace.pools.base import Pool
from headrace.pools.inline import InlinePool
from headrace.pools.single import PoolEnv
from headrace.records import PolicyState
from headrace.run import saving
from headrace.run.build import make_algorithm, make_model
from headrace.run.pools import make_pool
from headrace.run.seeds import Use, derived_seed
from headrace.run.system import choose_device
from headrace.run_files import escaped
from headrace.server.acting import Actor, cleared, initial_state
from headrace.specs import EnvSpec
from headrace.telemetry.record import RunDirectory

logger = logging.getLogger("headrace")


class Policy:
    """An agent with the weights of one checkpoint. Made by `headrace.load`."""

    def __init__(
        self, config: RunConfig, algorithm: Algorithm, spec: EnvSpec, device: torch.device
    ) -> None:
        self.config = config
        self.spec = spec
        self.agent_steps = 0
        self._algorithm = algorithm
        self.device = device
        self._leaves = () if spec.structure is None else tree.leaves(spec.structure)
        self._to_own = action_converter(spec.env_action_space)
        self._generator = torch.Generator(device)
        self._generator.manual_seed(derived_seed(config.seed, Use.POLICY_ACTIONS))

    def make_env(self, seed: int | None = None) -> gym.Env[Any, Any]:
        """Returns one environment as agents are judged in: a lost life ends no episode.

        Its observations are as the environment's own space has them, but for float64, which has
        come through float32 (and is float32 where it is the whole observation), and texts, which
        are left out. Its actions are in the environment's own space, as those that `act` gives are.

        Where not every action is always allowed, the info of `reset` and `step` has
        "action_mask", to be handed on to `act`.
        """
        base, resets = self.config.seed if seed is None else seed, itertools.count(1)

        def again(wanted: int | None) -> Pool:
            nonlocal base, resets
            if wanted is None:
                wanted = derived_seed(base, Use.POLICY_RESET, next(resets))
            else:
                base, resets = wanted, itertools.count(1)
            return self.make_pool(num_envs=1, batch_size=1, seed=wanted, in_process=True)

        first = self.make_pool(num_envs=1, batch_size=1, seed=seed, in_process=True)
        return PoolEnv(first, again=again)

    def make_view(self, seed: int) -> gym.Env[Any, Any] | None:
        """Returns a twin of `make_env(seed)` that shows what a person would see, or None."""
        family = catalog.environment_family(self.config.env)
        settings = family.evaluation(self.config.environment)
        with Apart() as apart:
            view = family.make_view(self.config.env, settings, seed=seed)
        if view is None:
            return None
        if family.pool in ("inline", "shm"):
            return PoolEnv(InlinePool(view, batch_size=1, apart=apart))
        kind = family.pool
        return PoolEnv(catalog.resolve("pool", catalog.POOLS, kind)(view, batch_size=1))

    def make_pool(
        self, *, num_envs: int, batch_size: int, seed: int | None = None, in_process: bool = False
    ) -> Pool:
        """Returns a pool of such environments."""
        if seed is None:
            seed = derived_seed(self.config.seed, Use.POLICY_ENVIRONMENTS)
        return make_pool(
            self.config,
            num_envs=num_envs,
            batch_size=batch_size,
            seed=seed,
            evaluation=True,
            in_process=in_process,
        )

    def judged_mode(self) -> tuple[ActionMode, float]:
        """Returns the mode and the epsilon with which agents of this algorithm are judged."""
        epsilon = self._algorithm.eval_epsilon
        return ("epsilon" if epsilon else "greedy"), epsilon

    def actor(self, mode: ActionMode, epsilon: float) -> Actor:
        """Returns what acts for a server's seat with this policy."""
        model: Any = self._algorithm.model
        return Actor(
            algorithm=self._algorithm,
            model=model,
            mode=mode,
            epsilon=epsilon,
            generator=self._generator,
        )

    def initial_state(self, num_envs: int = 1) -> PolicyState:
        """Returns the state before the first observation."""
        model: Any = self._algorithm.model
        return initial_state(self.spec, model, num_envs, self.device)

    def act(
        self,
        observation: Any,
        state: PolicyState,
        *,
        reward: ArrayLike = 0.0,
        reset: ArrayLike = False,
        mode: ActionMode = "greedy",
        epsilon: float = 0.001,
        action_mask: ArrayLike | None = None,
    ) -> tuple[NDArray[Any] | int, PolicyState]:
        """Chooses actions for the newest observations.

        Args:
            observation: One as `make_env` or the environment itself gives it, which is answered
                with one action (an int where actions are one choice); or N of them: an array
                [N, ...] of single frames, or, where it is a dict, a tuple or anything else than a
                Box that torch can hold, a list. Parts that are text are passed over. What a pool
                shows of such an observation, packed rows uint8 [N, nbytes], is taken too.
            state: What the last call, or `initial_state`, returned. It is not changed.
            reward: [N] raw reward of the step that led here.
            reset: [N] whether this is the first observation of an episode.
            mode: greedy takes the likeliest or best action, sample draws from the policy, epsilon
                is greedy but for a share of random ones; so is sample where Q-values act.
            epsilon: That share.
            action_mask: [N, A], or [A] for one, which actions are allowed here. Where the
                environment says so in its info, hand on the `info["action_mask"]` that came with
                the observation; a mask that is a part of the observation is found there.

        Returns:
            The actions, in the environment's own space (its start, shape, dtype and bounds), and
            the state to hand to the next call.

        Raises:
            ValueError: the observations are not as the environment's, or not as many as the state;
                or there is NaN or infinity among them, or a number that their dtype cannot hold,
                such as 0.5 where the environment has bytes; a mask is lacking, or is none of 0
                and 1; there is no such mode.
        """
        if mode not in get_args(ActionMode):
            raise ValueError(f"mode must be {', '.join(get_args(ActionMode))}, not {mode!r}")
        count = len(state.previous_action)
        frames, single = self._frames(observation, count)
        began = torch.from_numpy(np.broadcast_to(np.asarray(reset, np.bool_), count).copy())
        _ensure_numbers(np.asarray(reward, np.float32), "the reward")
        earned = torch.from_numpy(np.broadcast_to(np.asarray(reward, np.float32), count).copy())
        began, earned = began.to(self.device), earned.to(self.device)
        allowed = self._allowed(action_mask, frames)
        mask = None if allowed is None else torch.from_numpy(allowed).to(self.device)
        step, after = self.actor(mode, epsilon).act(
            cleared(state, began),
            torch.from_numpy(frames.copy()).to(self.device),
            earned,
            began,
            mask,
        )
        actions = (step.action if step.env_action is None else step.env_action).cpu().numpy()
        if self.spec.own_action_space is not None:
            actions = np.stack(self._to_own(actions)) if len(actions) else actions
        one_choice = isinstance(self.spec.action_space, gym.spaces.Discrete)
        if single:
            return (int(actions[0]) if one_choice else actions[0]), after
        return actions, after

    def _allowed(self, action_mask: Any, frames: NDArray[np.generic]) -> NDArray[np.bool_] | None:
        """Returns masks [N, A], given or found in the observations; None where there are none."""
        choices, count = self.spec.action_choices, len(frames)
        if action_mask is None and self.spec.has_action_mask:
            parts = tree.unpack(self._leaves, frames.view(np.uint8)) if self._leaves else {}
            action_mask = parts.get("action_mask")
            if action_mask is None:
                raise ValueError(
                    f"not every action of {self.spec.name} is always allowed: hand on "
                    'info["action_mask"] as action_mask'
                )
        if action_mask is None:
            return None
        if not choices:
            raise ValueError("actions are numbers, not choices: there is no action_mask")
        rows = [action_mask] if count == 1 else list(action_mask)
        if len(rows) != count:
            raise ValueError(f"there are {len(rows)} action masks for a state of {count}")
        return np.stack([mask_flags(row, choices) for row in rows])

    def _frames(self, observation: Any, count: int) -> tuple[NDArray[Any], bool]:
        """Returns observations as they travel, [count, ...], and whether it was one without N."""
        space = self.spec.observation_space
        if self._leaves and not _is_packed(observation, count, space.shape):
            return self._packed(observation, count)
        frames = tree.as_dtype(observation, space.dtype, "the observation")
        single = frames.shape == space.shape and count == 1
        if single:
            frames = frames[None]
        if frames.shape != (count, *space.shape):
            raise ValueError(
                f"observation must be {(count, *space.shape)}, as the state is; it is "
                f"{frames.shape}"
            )
        _ensure_numbers(frames)
        return frames, single

    def _packed(self, observation: Any, count: int) -> tuple[NDArray[np.uint8], bool]:
        """Packs one nested observation, or several, and says whether it was one."""
        if isinstance(self.spec.structure, gym.spaces.Dict):
            single = isinstance(observation, Mapping)
        elif isinstance(self.spec.structure, gym.spaces.Tuple):
            single = not isinstance(observation, list)
        else:
            single = np.shape(observation) == self._leaves[0].shape
        several = [observation] if single else list(observation)
        if len(several) != count:
            raise ValueError(f"there are {len(several)} observations for a state of {count}")
        rows = np.zeros((count, *self.spec.observation_space.shape), np.uint8)
        for row, value in zip(rows, several, strict=True):
            tree.pack(self._leaves, value, row)
        for leaf in tree.unpack(self._leaves, rows).values():
            _ensure_numbers(leaf)
        return rows, single


def _ensure_numbers(values: NDArray[Any], named: str = "the observation") -> None:
    """Raises ValueError for NaN and infinity, which a policy would answer as it does any other."""
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        what = "NaN" if np.isnan(values).any() else "an infinite number, or one beyond float32"
        raise ValueError(f"{named} has {what}, of which a policy can say nothing")


def _is_packed(observation: Any, count: int, shape: tuple[int, ...]) -> bool:
    """Whether an observation is what a pool shows of it, and not the environment's own."""
    if not isinstance(observation, np.ndarray) or observation.dtype != np.uint8:
        return False
    return observation.shape == (count, *shape) or (count == 1 and observation.shape == shape)


def load(
    run: str | Path, *, trust_code: bool = False, device: str = "auto", precision: str = "float32"
) -> Policy:
    """Loads the newest whole checkpoint of a run directory.

    Args:
        run: The run directory.
        trust_code: Whether to import code that the run names from outside headrace. Read it first.
        device: auto, cpu, cuda or cuda:N.
        precision: float32, or bfloat16 as a run may have acted in.

    Raises:
        ConfigError: there is no run or no whole checkpoint, or it names code that is not trusted.
    """
    with known():
        return _load(run, trust_code=trust_code, device=device, precision=precision)


def _load(run: str | Path, *, trust_code: bool, device: str, precision: str) -> Policy:
    gymnasium.forget()
    directory = RunDirectory.open(Path(run))
    values = of_a_run(parse_toml(directory.read_config(), directory.config_path))
    config = from_dict(values, trust_code=trust_code)
    saved, warnings = saving.newest(directory, without=("replay",))
    if saved is None:
        raise ConfigError(f"{run} has no whole checkpoint yet; {' '.join(warnings)}".rstrip("; "))
    for warning in warnings:
        logger.warning("%s", escaped(warning))
    where = choose_device(device)
    spec = catalog.environment_family(config.env, trust_code=trust_code).spec(
        config.env, config.environment
    )
    if difference := saving.difference_of_spec(spec, saved):
        logger.warning("%s", difference)
    model = frozen(make_model(config, spec, where, trust_code=trust_code))
    if anew := saving.load_weights(model, saved):
        logger.warning("%s lacks, and so the agent is without, %s", saved.path, ", ".join(anew))
    if precision == "bfloat16":
        lower_precision(model, torch.bfloat16)
    algorithm = make_algorithm(config, model, spec, torch.float32, trust_code=trust_code)
    policy = Policy(config, algorithm, spec, where)
    policy.agent_steps = int(saved.meta["agent_steps"])
    return policy
