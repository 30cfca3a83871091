"""Known packages of environments: what to import for their ids, and how to install them."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from importlib import metadata, util
from typing import NamedTuple

import gymnasium as gym

heard: ContextVar[bool] = ContextVar("heard", default=False)
"""Whether `quietly` keeps what is printed: in a process that may die, it is the last words."""


class Package(NamedTuple):
    """One package of environments."""

    name: str
    """For people."""
    pattern: str
    """Regular expression of the names of its environments."""
    module: str
    """What is imported, and missing where it is not installed."""
    distribution: str
    """Its name for pip, of which the version is shown."""
    install: str
    """What to type."""
    example: str
    """One of its environments."""
    register: str = ""
    """Function of the module that registers its ids, where importing it does not."""


def _pip(what: str) -> str:
    return f"pip install {what}"


_CLASSIC = r"(CartPole|Acrobot|MountainCar|MountainCarContinuous|Pendulum)-v\d+"
_TOY = r"(Blackjack|FrozenLake|FrozenLake8x8|CliffWalking|CliffWalkingSlippery|Taxi)-v\d+"
_BOX2D = r"(LunarLander|LunarLanderContinuous|BipedalWalker|BipedalWalkerHardcore|CarRacing)-v\d+"
_MUJOCO = (
    r"(Ant|HalfCheetah|Hopper|Humanoid|HumanoidStandup|InvertedDoublePendulum|InvertedPendulum|"
    r"Pusher|Reacher|Swimmer|Walker2d)-v\d+"
)
PACKAGES = (
    Package(
        "Atari (ale-py)", r"ALE/.+", "ale_py", "ale-py", _pip("'headrace[atari]'"), "ALE/Pong-v5"
    ),
    Package(
        "Classic control", _CLASSIC, "gymnasium", "gymnasium", _pip("gymnasium"), "CartPole-v1"
    ),
    Package("Toy text", _TOY, "gymnasium", "gymnasium", _pip("gymnasium"), "FrozenLake-v1"),
    Package("Box2D", _BOX2D, "Box2D", "box2d", _pip("'headrace[box2d]'"), "LunarLander-v3"),
    Package("MuJoCo", _MUJOCO, "mujoco", "mujoco", _pip("'headrace[mujoco]'"), "HalfCheetah-v5"),
    Package(
        "MiniGrid",
        r"(MiniGrid|BabyAI)-.+",
        "minigrid",
        "minigrid",
        _pip("minigrid"),
        "MiniGrid-Empty-5x5-v0",
    ),
    Package(
        "EnvPool",
        r"envpool:.+",
        "envpool",
        "envpool",
        _pip("'headrace[envpool]'"),
        "envpool:Hopper-v5",
    ),
    Package(
        "MinAtar",
        r"MinAtar/.+",
        "minatar.gym",
        "MinAtar",
        _pip("--no-deps MinAtar"),
        "MinAtar/Breakout-v1",
        "register_envs",
    ),
    Package(
        "ViZDoom",
        r"Vizdoom.+",
        "vizdoom.gymnasium_wrapper",
        "vizdoom",
        _pip("vizdoom"),
        "VizdoomBasic-v1",
    ),
    Package(
        "MiniWorld",
        r"MiniWorld-.+",
        "miniworld",
        "miniworld",
        _pip("miniworld"),
        "MiniWorld-Hallway-v0",
    ),
    Package(
        "PyBullet",
        r".+Bullet(Env)?-v\d+",
        "pybullet_envs_gymnasium",
        "pybullet-envs-gymnasium",
        _pip("pybullet-envs-gymnasium"),
        "HopperBulletEnv-v0",
    ),
    Package("NetHack", r"NetHack.+", "nle", "nle", _pip("nle"), "NetHackScore-v0"),
)


def package_of(name: str) -> Package | None:
    """Returns the package that has an environment of this name, if it is a known one."""
    return next((p for p in PACKAGES if re.fullmatch(p.pattern, name)), None)


def is_installed(package: Package) -> bool:
    """Whether the module can be found; it is not imported."""
    return util.find_spec(package.module.partition(".")[0]) is not None


def register(package: Package) -> None:
    """Imports a package, so that Gymnasium knows its ids.

    Raises:
        ImportError: it, or something that it needs, is not installed.
    """
    with quietly():
        module = importlib.import_module(package.module)
        if package.register and not any(
            re.fullmatch(package.pattern, name) for name in gym.registry
        ):
            getattr(module, package.register)()


def available() -> list[tuple[str, str, str]]:
    """Returns name, an example, and version or how to install it, of every known package."""
    return [(p.name, p.example, _state(p)) for p in PACKAGES]


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Drops what is printed and warned of meanwhile, by C code too; packages greet and advise."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if heard.get():
            yield
            return
        for fd, redirect in (
            (1, contextlib.redirect_stdout),
            (2, contextlib.redirect_stderr),
        ):
            stack.enter_context(redirect(io.StringIO()))
            kept = os.dup(fd)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, fd)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, fd)
            os.close(nowhere)
        yield


def _state(package: Package) -> str:
    if not is_installed(package):
        return package.install
    try:
        return f"installed {metadata.version(package.distribution)}"
    except metadata.PackageNotFoundError:
        return "installed"
