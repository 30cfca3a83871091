"""Who is compared at what, in which environment, and by which commands."""

from __future__ import annotations

import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

RUNNERS = Path(__file__).resolve().parent / "peer_runners"
SAC_ENV = "HalfCheetah-v5"
_HALF_CHEETAH = ("--env", SAC_ENV)


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One line of the table."""

    passes: float | None
    """Times that each sample goes through a gradient; compare like with like. None: it says so."""
    flags: tuple[str, ...] = ()
    peer: str | None = None
    """Name in PEERS; None is headrace, or a script."""
    script: Path | None = None
    """A user's own, which says on its last line how fast it was."""
    judged: bool = True
    """Whether a runner can also train until a return."""
    extra: bool = False
    """Whether it runs only when named: a variant of a peer that was found to be slower."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One task, and all that can be compared at it."""

    contestants: dict[str, Contestant]
    runners: dict[str, tuple[str, ...]]
    """Script in `peer_runners` of each peer, run with the Python of that peer's environment, and
    flags of every call."""
    frames_per_step: int


# What pip installs, exact; every line is also a constraint on the others. torch comes first and
# alone, so that nothing that follows can choose another build of it.
PEERS = {
    "sb3": (
        "torch==2.13.0",
        "stable-baselines3==2.9.2",
        "gymnasium==1.4.0",
        "numpy==2.4.6",
        "mujoco==4.0.0",
        "imageio==2.38.1",
        "packaging==26.3",
        "ale-py==0.12.1",
        "opencv-python-headless==5.0.0.93",
    ),
    "sbx": (
        "torch==2.13.0",
        "stable-baselines3==2.9.2",
        "sbx-rl==0.28.0",
        "jax==0.10.2",
        "jaxlib==0.10.2",
        "flax==0.12.8",
        "optax==0.2.8",
        "tfp-nightly==0.26.0.dev20261027",
        "gymnasium==1.4.0",
        "numpy==2.4.6",
        "mujoco==4.0.0",
        "imageio==2.38.1",
        "packaging==26.3",
    ),
    "rllib": (
        "torch==2.13.0",
        "ray[rllib]==2.60.0",
        "gymnasium==1.2.2",
        "numpy==2.4.6",
        "ale-py==0.12.1",
        "opencv-python-headless==5.0.0.93",
        "mujoco==4.0.0",
        "imageio==2.38.1",
        "packaging==26.3",
    ),
    "sample-factory": (
        "torch==2.13.0",
        "sample-factory==2.1.1",
        "gymnasium==0.29.1",
        "numpy==1.26.4",
        "ale-py==0.12.1",
        "opencv-python-headless==4.11.0.86",
    ),
}
PONG = Job(
    contestants={
        "headrace": Contestant(passes=1),
        "headrace-float32": Contestant(passes=1, flags=("--precision", "float32")),
        "sample-factory-appo": Contestant(passes=1, peer="sample-factory"),
        "rllib-impala": Contestant(passes=1, peer="rllib"),
        "sb3-ppo-1-epoch": Contestant(passes=1, peer="sb3", flags=("--epochs", "1")),
        "sb3-ppo": Contestant(passes=4, peer="sb3", flags=("--epochs", "4")),
    },
    runners={
        "sb3": ("sb3_ppo.py",),
        "sample-factory": ("sample_factory_appo.py",),
        "rllib": ("rllib_train.py", "--algorithm", "impala"),
    },
    frames_per_step=4,
)
# Batches of 256 and one update per step: each transition is sampled 256 times on average. Threads
# are each package's own choice. For sb3 that is one per core, the faster where nothing else runs,
# and far slower than one thread where something does: measure both.
SAC = Job(
    contestants={
        "headrace": Contestant(passes=256),
        "headrace-float32": Contestant(passes=256, flags=("--precision", "float32")),
        "headrace-eager": Contestant(passes=256, flags=("--compile", "off")),
        "sb3": Contestant(passes=256, peer="sb3"),
        "sbx": Contestant(passes=256, peer="sbx"),
        "rllib": Contestant(passes=256, peer="rllib", judged=False),
        "sb3-1-thread": Contestant(passes=256, peer="sb3", flags=("--threads", "1"), extra=True),
        "sbx-8-at-once": Contestant(passes=256, peer="sbx", flags=("--at-once", "8"), extra=True),
    },
    runners={
        "sb3": ("sb3_sac.py", *_HALF_CHEETAH, "--library", "sb3"),
        "sbx": ("sb3_sac.py", *_HALF_CHEETAH, "--library", "sbx"),
        "rllib": ("rllib_train.py", *_HALF_CHEETAH, "--algorithm", "sac"),
    },
    frames_per_step=1,
)
JOBS = {"pong": PONG, "sac": SAC}


def make_environment(name: str, cache: Path) -> Path:
    """Returns the Python of a peer's environment, made unless it is there with these versions.

    Raises:
        OSError, subprocess.CalledProcessError: it cannot be made here.
    """
    packages = PEERS[name]
    folder = cache.resolve() / name
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    wanted = "\n".join(packages) + "\n"
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    print(f"making the environment of {name} in {folder}", file=sys.stderr, flush=True)
    venv.create(folder, with_pip=True, clear=True)
    constraints = folder / "constraints.txt"
    constraints.write_text(wanted)
    pip = [str(python), "-m", "pip", "install", "--quiet", "-c", str(constraints)]
    subprocess.run([*pip, packages[0]], check=True, stdout=sys.stderr)
    subprocess.run([*pip, *packages], check=True, stdout=sys.stderr)
    stamp.write_text(wanted)
    return python
