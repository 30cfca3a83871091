"""The viewer: shows the agent while it trains, in clips and on a page of this machine.

    follower: newest weights -> player -> scenes -> videos/agent_steps_000012345678.mp4
                                                 -> live page at 127.0.0.1

Run as a program by `run.roles`. Where no clip is due and nobody looks at the page, it rests.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from headrace.errors import ConfigError
from headrace.run.film import Player, Scene, Strayed, write_film
from headrace.run.role import Follower, follow
from headrace.run.seeds import Use, derived_seed
from headrace.run_files import ensure_folder
from headrace.telemetry.live import LivePage
from headrace.telemetry.record import RunDirectory
from headrace.telemetry.video import remove_partial

_ANSWER_S = 2.0  # longest wait for weights before an episode; those it has do, if they are late
_IDLE_S = 0.2  # between two looks whether there is something to do
_REFRESH_S = 3.0  # of play, between two questions for newer weights
_LOOKING_S = 5.0  # after a picture was asked for, somebody looks


def view(follower: Follower) -> None:
    """Plays when a clip is due or somebody looks, until the run is over.

    Raises:
        PeerLost: it is.
    """
    settings = follower.config.viewer
    folder = RunDirectory(follower.run).videos
    with contextlib.suppress(ConfigError):  # which each clip says
        remove_partial(folder)
    with ExitStack() as stack:
        page = None
        if settings.watch:
            page = stack.enter_context(_open_page(follower, settings.watch_port))
        player = stack.enter_context(
            Player(
                follower.policy,
                seed=derived_seed(follower.config.seed, Use.VIEWER),
                on_message=lambda text: follower.tell({"note": text}),
            )
        )
        play = Play(follower, player, page, fps=settings.watch_fps)
        play.refresh(_ANSWER_S)
        due_s = time.monotonic() if settings.video_interval_s else math.inf
        while True:
            now_s = time.monotonic()
            if now_s < due_s and not play.watched():
                follower.rest(_IDLE_S)
            elif play.refresh(_ANSWER_S) < 0:
                pass  # training has not begun
            elif now_s >= due_s:
                due_s = now_s + settings.video_interval_s
                _write_clip(follower, play, folder)
            else:
                with contextlib.suppress(Strayed):
                    for _ in play.scenes():
                        if not play.watched() or time.monotonic() >= due_s:
                            break


class Play:
    """Plays episodes with the newest weights, and shows them on the page if there is one."""

    def __init__(
        self, follower: Follower, player: Player, page: LivePage | None, *, fps: float
    ) -> None:
        self._follower = follower
        self._player = player
        self._page = page
        self._step_s = 1.0 / fps
        self._next_s = 0.0  # when the next picture may be shown to who looks
        self._version = -1
        self._episodes = 0
        self._last_return: float | None = None

    def watched(self) -> bool:
        """Whether somebody looks at the page."""
        return self._page is not None and self._page.watched(_LOOKING_S)

    def refresh(self, timeout_s: float) -> int:
        """Takes the newest weights; returns their version, -1 if there are none yet."""
        self._version = self._follower.newest(timeout_s)
        return self._version

    def scenes(self) -> Iterator[Scene]:
        """Plays one episode: as fast as it can, or at the page's pace while somebody looks.

        Raises:
            PeerLost: the run is over.
            Strayed: see `Player.episode`.
        """
        mode, epsilon = self._follower.policy.judged_mode()
        refresh_s = time.monotonic() + _REFRESH_S
        for scene in self._player.episode(mode, epsilon):
            now_s = time.monotonic()
            self._follower.rest(max(0.0, self._next_s - now_s) if self.watched() else 0.0)
            self._next_s = max(now_s, self._next_s) + self._step_s
            if now_s >= refresh_s:
                refresh_s = now_s + _REFRESH_S
                self.refresh(0.0)  # does not wait: the answer is found at the next question
            self._show(scene)
            yield scene

    def _show(self, scene: Scene) -> None:
        if scene.last:
            self._episodes += 1
            self._last_return = scene.earned
        if self._page is not None:
            numbers = {
                "updates": self._version,
                "agent steps": self._follower.agent_steps,
                "episode": self._episodes + (not scene.last),
                "step": scene.steps,
                "return so far": scene.earned,
                "last return": self._last_return,
            }
            self._page.show(scene.picture, numbers)


def _open_page(follower: Follower, port: int) -> LivePage:
    """Opens the page, at another port if this one is taken, and tells its address."""
    title = f"{follower.config.env} · {follower.config.algorithm} · {follower.run.name}"
    try:
        page = LivePage(title, port)
    except ConfigError as error:
        follower.tell({"note": f"{error}; this page has taken another"})
        page = LivePage(title)
    follower.tell({"note": f"watch the agent at {page.address}"})
    return page


def _write_clip(follower: Follower, play: Play, folder: Path) -> None:
    """Films one episode, named after the age of the weights that it starts with."""
    path = folder / f"agent_steps_{follower.agent_steps:012d}.mp4"
    try:
        ensure_folder(folder)
        earned = write_film(play.scenes, path)
    except (ConfigError, OSError) as error:
        follower.tell({"note": f"no clip: {str(error).splitlines()[0]}"})
        return
    follower.tell({"clip": str(path), "return": earned})
    follower.tell({"note": f"clip {folder.name}/{path.name}, return {earned:.2f}"})


def main() -> None:
    """Shows the agent until the parent leaves."""
    follow(view)


if __name__ == "__main__":
    main()
