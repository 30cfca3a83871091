"""EnvPool: environments in C++ of many packages, by "envpool:" and EnvPool's own id.

Weng et al. 2022, "EnvPool", arXiv:2206.10558; the facts here are those of version 1.2.5. MuJoCo,
DeepMind Control, Procgen, MiniGrid, Box2D, Google Research Football and more, stepped by its own
threads. `envpool:Pong-v5` plays whole games with raw rewards; lives that end episodes, and the
protocols of the papers, are settings of `ALE/Pong-v5` (`envs.atari`), whose emulator is newer.

Where an episode terminates at the very step of the clock, EnvPool says truncated.
"""

from __future__ import annotations

import difflib
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np

from headrace.envs.envpool_spaces import Actions, Observations, actions, observations
from headrace.envs.envpool_vector import EnvpoolVector
from headrace.errors import ConfigError
from headrace.specs import EnvSpec

PREFIX = "envpool:"
_IMAGE_STACK = 4  # frames that EnvPool itself stacks for Atari and ViZDoom, SEED RL for football

_SAID_ELSEWHERE = {
    "num_envs": "server.num_envs",
    "batch_size": "server's batch size",
    "num_threads": "env_threads",
    "seed": "seed",
    "env_seed": "seed",
    "max_episode_steps": "max_episode_steps",
    "stack_num": "frame_stack",
    "frame_stack": "frame_stack",
    "reward_clip": "the algorithm's reward_transform",
    "episodic_life": "life_loss_ends_episode of the family ALE/",
    "zero_discount_on_life_loss": "life_loss_ends_episode of the family ALE/",
}
# Unknown to `make_spec`, or they would break what this family promises its pool.
_FIXED = ("max_num_players", "base_path", "gym_reset_return_info", "render_mode", "render_env_id")


@dataclass(frozen=True, kw_only=True, slots=True)
class EnvpoolConfig:
    """Settings of every environment of EnvPool."""

    frame_stack: int = 0
    """Shows the policy so many of the newest observations at once; 0 takes what is usual: 4 for
    Atari, ViZDoom and Google Research Football, else 1."""
    max_episode_steps: int = 0
    """Truncates an episode after so many agent steps; 0 leaves the environment's own limit."""
    env_kwargs: str = ""
    """Passes other settings to `envpool.make`, a JSON object, as '{"frame_skip": 2}'."""

    def __post_init__(self) -> None:
        for name in ("frame_stack", "max_episode_steps"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, not {getattr(self, name)}")
        for name in _parsed(self.env_kwargs):
            if name in _SAID_ELSEWHERE:
                raise ConfigError(
                    f"env_kwargs must not set {name}: its place is {_SAID_ELSEWHERE[name]}"
                )
            if name in _FIXED:
                raise ConfigError(f"env_kwargs must not set {name}: headrace does")


def _parsed(env_kwargs: str) -> dict[str, Any]:
    if not env_kwargs.strip():
        return {}
    try:
        values = json.loads(env_kwargs)
    except (RecursionError, ValueError) as error:
        raise ConfigError(f"env_kwargs must be a JSON object: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"env_kwargs must be a JSON object, not {env_kwargs!r}")
    return values


def _package() -> Any:
    try:
        import envpool  # noqa: PLC0415  # optional
    except ImportError as missing:
        raise ConfigError(
            f"EnvPool cannot be imported ({missing}): pip install 'headrace[envpool]'"
        ) from missing
    return envpool


def _task(name: str) -> str:
    """EnvPool's id of an environment's name."""
    task = name.removeprefix(PREFIX)
    known = _package().list_all_envs()
    if not name.startswith(PREFIX) or task not in known:
        nearest = ", ".join(PREFIX + near for near in _nearest(task, known)) or "none"
        raise ConfigError(f"no environment of EnvPool named {name!r}; nearest: {nearest}")
    return task


def _nearest(task: str, known: list[str]) -> list[str]:
    def bare(name: str) -> str:
        return re.sub(r"^(ale|procgen)/|noframeskip|-v\d+$|[_-]", "", name.lower())

    by_name = {bare(entry): entry for entry in known}
    return [by_name[near] for near in difflib.get_close_matches(bare(task), by_name)]


class _Task:
    """What EnvPool says of one environment and these settings; nothing is started."""

    def __init__(self, name: str, config: EnvpoolConfig) -> None:
        self.task = _task(name)
        own = _parsed(config.env_kwargs)
        with _refusals(name):
            fields = _package().make_spec(self.task).config
            self.kwargs = {**_our_defaults(fields), **own}
            if config.max_episode_steps:
                self.kwargs["max_episode_steps"] = config.max_episode_steps
            asked = _package().make_spec(self.task, **self.kwargs)
            if asked.config.max_num_players > 1:
                raise ConfigError(f"{name}: environments with several players are not supported")
            self.observations: Observations = observations(asked.observation_space)
            self.actions: Actions = actions(name, asked.action_space)
        images = "stack_num" in fields._fields
        stacked = images or self.task.startswith("gfootball/")
        usual = _IMAGE_STACK if stacked else 1
        self.spec = EnvSpec(
            name=name,
            observation_space=self.observations.space,
            action_space=self.actions.space,
            action_repeat=int(asked.config.frame_skip) if images else 1,
            frame_stack=config.frame_stack or usual,
            structure=self.observations.structure,
        )


def _our_defaults(fields: Any) -> dict[str, Any]:
    """Settings with which an environment is what a pool expects, of those that it has."""
    wanted = {
        # Frames cross to the device once and are stacked there.
        "stack_num": 1,
        "channel_first": False,
        "use_combined_action": True,  # ViZDoom: one choice, not a vector without bounds
        "use_fire_reset": False,
    }
    return {name: value for name, value in wanted.items() if name in fields._fields}


@contextmanager
def _refusals(name: str) -> Iterator[None]:
    """Turns what EnvPool says of a user's mistake into one sentence."""
    try:
        # float32 has fewer digits than some bounds, of which Gymnasium would warn each time.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ImportError as missing:
        raise ConfigError(
            f"{name}: EnvPool lacks a library of the system: {missing} "
            "(Procgen: apt-get install libqt5gui5)"
        ) from missing
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ConfigError(f"{name}: EnvPool refuses: {error}") from error


class EnvpoolFamily:
    """Every environment that EnvPool has, stepped by its own threads."""

    config_type: type[Any] = EnvpoolConfig
    pool = "native"

    def spec(self, name: str, config: EnvpoolConfig) -> EnvSpec:
        """Returns the spec; nothing is started.

        Raises:
            ConfigError: no such environment, EnvPool or a library is not installed, a setting that
                it does not have, or several players.
        """
        return _Task(name, config).spec

    def evaluation(self, config: EnvpoolConfig) -> EnvpoolConfig:
        """Judges under the settings of training: they change neither rewards nor lives."""
        return config

    def make(
        self,
        name: str,
        config: EnvpoolConfig,
        *,
        num_envs: int,
        batch_size: int,
        threads: int,
        seed: int,
        first_env: int = 0,
    ) -> EnvpoolVector:
        """Starts `num_envs` environments on `threads` threads (0: as many as there are cores)."""
        if not 1 <= batch_size <= num_envs:
            raise ConfigError(f"batch_size must be in [1, num_envs={num_envs}], not {batch_size}")
        task = _Task(name, config)
        # int32 on the other side; consecutive seeds would make run 1 share episodes with run 0.
        words = np.random.SeedSequence(seed).generate_state(first_env + num_envs)[first_env:]
        with _refusals(name):
            engine = _package().make_gymnasium(
                task.task,
                num_envs=num_envs,
                batch_size=batch_size,
                num_threads=threads,
                seed=(words >> 1).astype(np.int32),
                **task.kwargs,
            )
            # Made at its first use and kept: not among the warnings of the server's thread.
            assert isinstance(engine.observation_space, gym.Space)
        return EnvpoolVector(
            engine,
            task.spec,
            num_envs=num_envs,
            batch_size=batch_size,
            observation=task.observations.convert,
            action=task.actions.convert,
        )

    def make_view(self, name: str, config: EnvpoolConfig, *, seed: int) -> None:
        """A person sees what the agent sees."""


ENVPOOL = EnvpoolFamily()
