"""Atari 2600 by ale-py: settings, names and the family.

Protocols: IMPALA, arXiv:1802.01561, Table G.1 (the defaults); Machado et al. 2018, arXiv:1709.06009
(sticky actions); Mnih et al. 2015, Nature 518 (frame skip, max-pooling, no-op starts). Frames are
always grey, as in all three. Rewards are always raw: clipping belongs to the algorithm.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import gymnasium as gym
import numpy as np

from headrace.envs.atari_vector import AtariVector
from headrace.errors import ConfigError
from headrace.specs import EnvSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class AtariConfig:
    """Settings of every Atari game; the defaults are those of the IMPALA paper."""

    frame_skip: int = 4
    """Repeats each action for so many env_frames, one agent step (Mnih et al. 2015; IMPALA Table
    G.1: 4)."""
    max_pool: bool = True
    """Shows the maximum of the last two frames of a skip: sprites flicker (Mnih et al. 2015)."""
    frame_size: int = 84
    """Shows grey frames of so many pixels in height and width, after area interpolation (IMPALA
    Table G.1: 84 x 84)."""
    frame_stack: int = 4
    """Shows the policy so many of the newest frames at once (IMPALA Table G.1: 4)."""
    noop_max: int = 30
    """Begins an episode with 0 to noop_max - 1 random no-op env_frames, as ale-py draws them (Mnih
    et al. 2015: 30, drawn from 1 to 30); 0 and 1 both mean none."""
    sticky_probability: float = 0.0
    """Repeats the action before with this chance per env_frame (Machado et al. 2018: 0.25; IMPALA:
    0)."""
    life_loss_ends_episode: bool = True
    """Terminates at a lost life, while the emulator goes on (IMPALA Table G.1: yes)."""
    full_action_space: bool = False
    """Offers all 18 actions, not the game's own (IMPALA experts: its own; Machado et al. 2018:
    all)."""
    max_episode_frames: int = 108_000
    """Truncates an episode after so many env_frames, no-ops apart: 108 000 are 30 minutes (Mnih et
    al. 2015: 5 minutes)."""

    def __post_init__(self) -> None:
        for name in ("frame_skip", "frame_size", "frame_stack", "max_episode_frames"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.noop_max < 0:
            raise ConfigError(f"noop_max must be at least 0, not {self.noop_max}")
        if not 0.0 <= self.sticky_probability <= 1.0:
            raise ConfigError(
                f"sticky_probability must be in [0, 1], not {self.sticky_probability}"
            )


_SCREEN = (210, 160, 3)  # rows, columns and colours of the Atari's screen


@lru_cache(maxsize=1)
def _rom_of_game() -> dict[str, str]:
    """Rom by game id, from the registry that ale-py fills; its ids alone do not say TicTacToe3D."""
    try:
        import ale_py  # noqa: F401, PLC0415  # optional, and its import registers the games
    except ImportError as missing:
        raise ConfigError("Atari needs ale-py: pip install 'headrace[atari]'") from missing
    return {
        game: str(entry.kwargs["game"])
        for game, entry in gym.registry.items()
        if re.fullmatch(r"ALE/\w+-v5", game)
    }


def games() -> list[str]:
    """Every single-player game that ale-py ships, such as ALE/Pong-v5, sorted.

    Raises:
        ConfigError: ale-py is not installed.
    """
    return sorted(_rom_of_game())


def _rom(name: str) -> str:
    """Rom of a game id; names of other packages are only suggested, never guessed."""
    rom = _rom_of_game().get(name)
    if rom is None:
        nearest = ", ".join(_nearest(name)) or "none"
        raise ConfigError(f"no Atari game named {name!r}; nearest: {nearest}")
    return rom


def _nearest(name: str) -> list[str]:
    known = {_bare(game): game for game in games()}
    if _bare(name) in known:
        return [known[_bare(name)]]
    return [known[bare] for bare in difflib.get_close_matches(_bare(name), known)]


def _bare(name: str) -> str:
    """A game's name without what packages put around it: ALE/, NoFrameskip, version."""
    return re.sub(r"^ale/|-ramnoframeskip|noframeskip|deterministic|-v\d+$|_", "", name.lower())


@lru_cache
def _num_minimal_actions(rom: str) -> int:
    """Asks one bare emulator (a tenth of a second); a vector environment would start threads."""
    import ale_py  # noqa: PLC0415  # optional
    from ale_py import roms  # noqa: PLC0415  # optional

    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    path = roms.get_rom_path(rom)
    if path is None:
        raise ConfigError(f"ale-py has no rom for {rom}: pip install --force-reinstall ale-py")
    emulator = ale_py.ALEInterface()
    emulator.loadROM(path)
    return len(emulator.getMinimalActionSet())


class AtariFamily:
    """Every game that ale-py ships, stepped by its own threads."""

    config_type: type[Any] = AtariConfig
    pool = "native"

    def spec(self, name: str, config: AtariConfig) -> EnvSpec:
        """Returns the spec: one grey frame [frame_size, frame_size] of uint8.

        Raises:
            ConfigError: no such game, or ale-py is not installed.
        """
        rom = _rom(name)
        num_actions = 18 if config.full_action_space else _num_minimal_actions(rom)
        return EnvSpec(
            name=name,
            observation_space=gym.spaces.Box(0, 255, (config.frame_size,) * 2, np.uint8),
            action_space=gym.spaces.Discrete(num_actions),
            action_repeat=config.frame_skip,
            frame_stack=config.frame_stack,
        )

    def evaluation(self, config: AtariConfig) -> AtariConfig:
        """Judges whole games: a lost life ends nothing; all else as in training."""
        return replace(config, life_loss_ends_episode=False)

    def make(
        self,
        name: str,
        config: AtariConfig,
        *,
        num_envs: int,
        batch_size: int,
        threads: int,
        seed: int,
        first_env: int = 0,
    ) -> AtariVector:
        """Starts `num_envs` emulators on `threads` threads (0: as many as there are cores)."""
        if not 1 <= batch_size <= num_envs:
            raise ConfigError(f"batch_size must be in [1, num_envs={num_envs}], not {batch_size}")
        spec, frame = self.spec(name, config), (config.frame_size, config.frame_size)
        copies = {"num_envs": num_envs, "batch_size": batch_size, "num_threads": threads}
        emulators = _start(name, config, frame=frame, grayscale=True, **copies)
        return AtariVector(emulators, spec, seed=seed, first_env=first_env)

    def make_view(self, name: str, config: AtariConfig, *, seed: int) -> AtariVector:
        """Starts one emulator that shows the screen of the Atari in its colours."""
        spec = replace(
            self.spec(name, config), observation_space=gym.spaces.Box(0, 255, _SCREEN, np.uint8)
        )
        copies = {"num_envs": 1, "batch_size": 1, "num_threads": 1}
        emulators = _start(name, config, frame=_SCREEN[:2], grayscale=False, **copies)
        return AtariVector(emulators, spec, seed=seed)


def _start(
    name: str, config: AtariConfig, *, frame: tuple[int, int], grayscale: bool, **copies: int
) -> Any:
    """Starts ale-py's vector environment with every setting said aloud."""
    from ale_py.vector_env import AtariVectorEnv  # noqa: PLC0415  # optional

    return AtariVectorEnv(
        _rom(name),
        **copies,
        thread_affinity_offset=-1,
        max_num_frames_per_episode=config.max_episode_frames,
        repeat_action_probability=config.sticky_probability,
        full_action_space=config.full_action_space,
        continuous=False,
        autoreset_mode="SameStep",
        img_height=frame[0],
        img_width=frame[1],
        grayscale=grayscale,
        # Frames cross to the device once and are stacked there.
        stack_num=1,
        frameskip=config.frame_skip,
        maxpool=config.max_pool,
        noop_max=config.noop_max,
        # Its episodic_life starts a new game at every lost life; life_loss_info only tells.
        episodic_life=False,
        life_loss_info=config.life_loss_ends_episode,
        reward_clipping=False,
        use_fire_reset=False,
    )


ATARI = AtariFamily()
