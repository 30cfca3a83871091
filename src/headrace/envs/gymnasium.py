"""Every environment that speaks Gymnasium: by its id, or made by a function of the user's."""

from __future__ import annotations

import copy
import difflib
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray

from headrace.apart import Apart
from headrace.envs import packages
from headrace.envs.checks import Translated, error_text
from headrace.envs.global_draws import Own, seed_spaces
from headrace.envs.gymnasium_batch import GymnasiumBatch
from headrace.envs.gymnasium_vector import FirstOf, VectorBatch
from headrace.envs.wrappers import Env, GymnasiumConfig, Rendered, wrapped
from headrace.errors import ConfigError, EnvironmentFault
from headrace.imports import has_no, import_named
from headrace.specs import EnvSpec, vectors_of

_TRIED_STEPS = 8  # random ones, before a run starts


class GymnasiumFamily:
    """Any Gymnasium id, or "module:factory"; `catalog` asks it for every name that is not ours."""

    config_type: type[Any] = GymnasiumConfig
    pool = "shm"

    def spec(self, name: str, config: GymnasiumConfig) -> EnvSpec:
        """Returns the spec; makes one environment, takes a few random steps, and closes it.

        Raises:
            ConfigError: no such environment, it needs what is not installed, or it breaks the
                contract at once.
        """
        return _tried(name, config)[0]

    def notices(self, name: str, config: GymnasiumConfig) -> list[str]:
        """Returns what is odd about an environment but can be lived with, one sentence each."""
        return list(_tried(name, config)[1])

    def evaluation(self, config: GymnasiumConfig) -> GymnasiumConfig:
        """Judges under the settings of training: each of them says what the task is.

        A time limit stays too, since there are environments that never end without it.
        """
        return config

    def make(
        self,
        name: str,
        config: GymnasiumConfig,
        *,
        num_envs: int,
        batch_size: int,
        threads: int,
        seed: int,
        first_env: int = 0,
        draws_seed: int | None = None,
    ) -> GymnasiumBatch | VectorBatch | FirstOf:
        """Makes `num_envs` copies, which are stepped one after the other in the caller's thread.

        With `draws_seed` each has global random states of its own, which begin there. A factory of
        vectors is asked for as few as have at most `batch_size` environments, if it can be asked.
        """
        own = Own.of(num_envs, first_env=first_env, draws_seed=draws_seed)
        makers = own.around([partial(_make, name, config)] * num_envs)
        spans = vectors_of(num_envs, most=batch_size)
        made = own.run(makers[0], spans[0][1])
        if isinstance(made, VectorEnv):
            fixed = not _takes_num_envs(name, config)
            if fixed:
                size = made.num_envs
                spans = [(first, first + size) for first in range(0, num_envs, size)]
            vectors = [made, *(own.run(makers[first], end - first) for first, end in spans[1:])]
            own = own._replace(draws=[own.draws[first] for first, _ in spans] if own.draws else ())
            batch = _vectors(
                name, config, vectors, spans, fixed=fixed, seed=seed, first_env=first_env, own=own
            )
            return FirstOf(batch, num_envs) if num_envs < batch.num_envs else batch
        envs: list[Env] = own.run(lambda: [made, *(make() for make in makers[1:])])
        envs = own.run(lambda: [wrapped(env, config, name) for env in envs])
        if own.draws:
            seed_spaces(envs, [draws.seed for draws in own.draws])
        return _batch(name, config, envs, seed=seed, first_env=first_env, own=own)

    def make_view(self, name: str, config: GymnasiumConfig, *, seed: int) -> GymnasiumBatch | None:
        """Makes one copy whose observations are its rendered frames; None if it has none.

        Raises:
            ConfigError: it has, but they cannot be drawn here.
        """
        if sys.platform == "linux" and not os.environ.get("DISPLAY"):
            os.environ.setdefault("MUJOCO_GL", "egl")  # else MuJoCo wants a window
        own = Own.of(1, first_env=0, draws_seed=None)
        env: Env | None = own.run(_drawing, name, config)
        if env is None:
            return None
        return _batch(name, config, [env], seed=seed, first_env=0, own=own)


def _drawing(name: str, config: GymnasiumConfig) -> Env | None:
    """Makes an environment that shows its rendered frames; None if it has none."""
    with packages.quietly():
        env = _make(name, config)
        modes = env.metadata.get("render_modes") or ()
        is_vector = isinstance(env, VectorEnv)  # whose frames are several
        if env.render_mode != "rgb_array" or is_vector:
            env.close()
            if "rgb_array" not in modes or is_vector or not _takes_render_mode(name):
                return None
            env = _make(name, config, render_mode="rgb_array")
    with Translated(lambda error: _failed(name, "be drawn here", error)), packages.quietly():
        _simplify_mujoco(env)
        return Rendered(wrapped(env, config, name))


def _simplify_mujoco(env: Env) -> None:
    """Lets MuJoCo's camera go with the body, and leaves out what a processor draws slowly.

    Gymnasium 1.4 lets some bodies run out of the picture. Without a GPU, shadows, reflections and
    smooth edges are nine tenths of the time that a frame takes.
    """
    renderer: Any = getattr(env.unwrapped, "mujoco_renderer", None)
    model: Any = getattr(renderer, "model", None)
    if model is None:
        return
    if getattr(renderer, "camera_id", None) == -1:
        import mujoco  # noqa: PLC0415  # optional

        renderer.camera_id = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
    # Read when the first frame is drawn.
    model.vis.quality.shadowsize = model.vis.quality.offsamples = 0
    model.mat_reflectance[:] = 0.0


GYMNASIUM = GymnasiumFamily()


def _batch(
    name: str,
    config: GymnasiumConfig,
    envs: list[Env],
    *,
    seed: int,
    first_env: int,
    own: Own | None = None,
) -> GymnasiumBatch:
    return GymnasiumBatch(
        envs,
        name=name,
        seed=seed,
        first_env=first_env,
        strictness=config.strictness,
        frame_stack=config.frame_stack,
        action_repeat=config.frame_skip,
        own=own,
    )


def _vectors(
    name: str,
    config: GymnasiumConfig,
    vectors: Sequence[Any],
    spans: Sequence[tuple[int, int]],
    **of_batch: Any,
) -> VectorBatch:
    """Takes vectors whose environments are to be `spans`.

    Raises:
        ConfigError: they have others, or there are settings that they cannot have.
    """
    plain = GymnasiumConfig()
    for setting in ("frame_skip", "resize", "grey", "time_limit"):
        if getattr(config, setting) != getattr(plain, setting):
            raise ConfigError(
                f"{name} gives a vector, around whose environments {setting} cannot be put: leave "
                f"out --{setting.replace('_', '-')}, and have the vector do it"
            )
    for vector, (first, end) in zip(vectors, spans, strict=True):
        if vector.num_envs != end - first:
            raise ConfigError(
                f"{name} gave a vector of {vector.num_envs} environments where one of {end - first}"
                " is needed: make as many as num_envs says, or always equally many"
            )
    own: Own = of_batch["own"]
    if own.draws:
        seed_spaces(vectors, [draws.seed for draws in own.draws])
    return VectorBatch(
        vectors,
        name=name,
        strictness=config.strictness,
        frame_stack=config.frame_stack,
        **of_batch,
    )


def forget() -> None:
    """Has every environment asked anew: a class may have been changed since, in a notebook."""
    _TRIED.clear()


def believe(name: str, config: GymnasiumConfig, spec: EnvSpec, notices: Sequence[str]) -> None:
    """Takes the word of another process, which has tried the environment: none is made here."""
    _TRIED[name, config] = spec, tuple(notices)


_TRIED: dict[tuple[str, GymnasiumConfig], tuple[EnvSpec, tuple[str, ...]]] = {}


def _tried(name: str, config: GymnasiumConfig) -> tuple[EnvSpec, tuple[str, ...]]:
    """Returns the spec and the notices of an environment, which is tried but once."""
    if (name, config) not in _TRIED:
        _TRIED[name, config] = _try(name, config)
    return _TRIED[name, config]


def _try(name: str, config: GymnasiumConfig) -> tuple[EnvSpec, tuple[str, ...]]:
    """Makes one environment and steps it, so that what is wrong is said before anything starts."""
    rng = np.random.default_rng(0)
    with Apart(), packages.quietly():
        try:
            batch = GYMNASIUM.make(name, config, num_envs=1, batch_size=1, threads=1, seed=0)
            step = batch.reset()
            for _ in range(_TRIED_STEPS):
                action = random_action(batch.spec, step.action_mask, rng)
                step = batch.step(step.env_id, action)
        except EnvironmentFault as fault:
            raise ConfigError(str(fault)) from fault
        with Translated(lambda error: ConfigError(f"{name}: close raised {error_text(error)}")):
            batch.close()
    return batch.spec, tuple(batch.notices)


def random_action(
    spec: EnvSpec, mask: NDArray[np.bool_] | None, rng: np.random.Generator
) -> NDArray[Any]:
    """Returns one random allowed action, [1] or [1, D]."""
    space = spec.action_space
    if isinstance(space, gym.spaces.Box):
        return rng.uniform(space.low, space.high)[None].astype(np.float32)
    ends = np.cumsum(spec.action_choices)
    allowed = np.ones(ends[-1], np.bool_) if mask is None else mask[0]
    choices = [
        int(rng.choice(np.flatnonzero(flags) if flags.any() else len(flags)))
        for flags in np.split(allowed, ends[:-1].tolist())
    ]
    return np.array(choices, np.int64).reshape(1, *spec.action_shape)


def _make(name: str, config: GymnasiumConfig, count: int = 1, **more: Any) -> Any:
    """Makes one environment, or a vector of them: of `count`, where a factory takes their number.

    Raises:
        ConfigError: no such environment, or it cannot be made.
    """
    keywords = config.keywords() | more
    make: Callable[..., Any]
    if _is_factory(name):
        make = _factory(name)
    else:
        spec = copy.copy(_registered(name))
        # The batch resets first and checks what comes; both wrappers would cost each step.
        spec.order_enforce = False
        keywords |= {"disable_env_checker": True}
        if config.time_limit:
            keywords["max_episode_steps"] = -1

        def make(**keywords: Any) -> Env:
            return gym.make(spec, **keywords)

    with Translated(lambda error: _not_made(name, error)):
        sized = _takes_num_envs(name, config)
        env = make(**keywords, **({"num_envs": count} if sized else {}))
        if sized and isinstance(env, gym.Env):  # which has a setting of that name
            env.close()
            env = make(**keywords)
    if not isinstance(env, gym.Env | VectorEnv):
        raise ConfigError(
            f"{name} gave a {type(env).__module__}.{type(env).__name__}, which is not a "
            "gymnasium.Env"
        )
    of_one = "single_" if isinstance(env, VectorEnv) else ""
    for space in (f"{of_one}observation_space", f"{of_one}action_space"):
        if not isinstance(getattr(env, space, None), gym.Space):
            raise ConfigError(
                f"{name} has no {space}: set it in __init__, to a gymnasium.spaces one"
            )
    return env


def _not_made(name: str, error: BaseException) -> ConfigError:
    if isinstance(error, ImportError | gym.error.DependencyNotInstalled):
        return ConfigError(_needs(name, error))
    return _failed(name, "be made", error)


def _failed(name: str, what: str, error: BaseException) -> ConfigError:
    text = error_text(error)
    no_display = (
        "; without a display, MuJoCo needs MUJOCO_GL=egl or osmesa"
        if re.search(r"GL|gl[A-Z]", text)
        else ""
    )
    return ConfigError(f"{name} cannot {what}: {text}{no_display}")


def _is_factory(name: str) -> bool:
    """Whether a name is "module:factory", and not an id, which has a version or a slash."""
    return name.rpartition(":")[2].isidentifier() and ":" in name


def _factory(name: str) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    try:
        module = import_named(module_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"cannot import the environment {name!r}: {error} (modules are looked for in "
            "PYTHONPATH and, last, in this folder)"
        ) from error
    if not hasattr(module, attribute):
        raise ConfigError(f"cannot import the environment {name!r}: {has_no(module, attribute)}")
    factory = getattr(module, attribute)
    if not callable(factory):
        raise ConfigError(f"{name} is not a function or class that makes a gymnasium.Env")
    return factory  # type: ignore[no-any-return]


def _takes_num_envs(name: str, config: GymnasiumConfig) -> bool:
    """Whether a factory is asked for vectors of as many environments as are wanted."""
    if not _is_factory(name) or "num_envs" in config.keywords():
        return False
    return "num_envs" in inspect.signature(_factory(name)).parameters


def _takes_render_mode(name: str) -> bool:
    if not _is_factory(name):
        return True
    parameters = inspect.signature(_factory(name)).parameters
    return "render_mode" in parameters or any(
        parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()
    )


def _registered(name: str) -> Any:
    """Returns Gymnasium's own spec of an id, after importing the package that registers it."""
    module, _, bare = name.rpartition(":")
    package = packages.package_of(bare)
    try:
        if module:
            import_named(module)
        if bare not in gym.registry and package is not None:
            packages.register(package)
    except ImportError as error:
        raise ConfigError(_needs(name, error)) from error
    found = gym.registry.get(bare)
    if found is None:
        near = difflib.get_close_matches(bare, list(gym.registry), 3, 0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "`headrace envs` lists packages"
        raise ConfigError(
            f"no environment named {name!r}; {hint} (your own: module:factory, or module:ID)"
        )
    return found


def _needs(name: str, error: BaseException) -> str:
    """Says which package is missing, and how to get it."""
    package = packages.package_of(name.rpartition(":")[2])
    if package is None or packages.is_installed(package):
        return f"{name} needs a package that is missing: {error}"
    return f"{name} needs {package.distribution}: {package.install}"
