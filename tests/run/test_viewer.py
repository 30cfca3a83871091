"""The viewer: whole clips, frames on the page, and no work that nobody asked for."""

from __future__ import annotations

import http.client
import io
import json
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from headrace import catalog, preset
from headrace.errors import PeerLost
from headrace.run import viewer
from headrace.run.build import make_algorithm, make_model
from headrace.run.film import Player
from headrace.run.policy import Policy
from headrace.run.role import Follower
from headrace.run.seeds import Use, derived_seed
from headrace.telemetry import live
from headrace.telemetry.live import LivePage

CPU = torch.device("cpu")


class FakeFollower(Follower):
    """Follows nothing: its weights are as old as the test says, and time does not pass."""

    def __init__(self, run: Path, **settings: Any) -> None:
        """Takes the fields of `ViewerConfig`."""
        self.run = run
        self.config = preset("catch", "catch", viewer=settings)
        spec = catalog.environment_family("catch").spec("catch", self.config.environment)
        model: Any = make_model(self.config, spec, CPU).requires_grad_(False)
        self.policy = Policy(
            self.config, make_algorithm(self.config, model, spec, torch.float32), spec, CPU
        )
        self.policy.agent_steps = 12_345_678
        self.versions = iter(range(1_000_000))
        self.told: list[Mapping[str, Any]] = []
        self.asked: list[float] = []
        self.rested: list[float] = []
        self.over: Callable[[], bool] = lambda: bool(self.clips)
        self.on_rest: Callable[[], None] = lambda: None

    @property
    def clips(self) -> list[Mapping[str, Any]]:
        return [message for message in self.told if "clip" in message]

    @property
    def notes(self) -> list[str]:
        return [message["note"] for message in self.told if "note" in message]

    @property
    def address(self) -> str:
        return next(note for note in self.notes if "http:" in note).rpartition(" ")[2]

    def newest(self, timeout_s: float) -> int:
        self.asked.append(timeout_s)
        return next(self.versions)

    def rest(self, seconds: float) -> None:
        self.rested.append(seconds)
        assert len(self.rested) < 100_000, f"it does not end; it said {self.told}"
        self.on_rest()
        if self.over():
            raise PeerLost("the run is over")

    def tell(self, message: Mapping[str, Any]) -> None:
        self.told.append(json.loads(json.dumps(message)))


def watch_to_the_end(follower: FakeFollower) -> None:
    with pytest.raises(PeerLost):
        viewer.view(follower)


def frames_of(path: Path, height: int, width: int) -> np.ndarray:
    """Returns [N, height, width, 3]."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path), "-f", "rawvideo"]
    done = subprocess.run([*command, "-pix_fmt", "rgb24", "-"], capture_output=True, check=True)
    return np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3)


def get(address: str, path: str) -> tuple[http.client.HTTPResponse, bytes]:
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(parts.netloc, timeout=30)
    try:
        connection.request("GET", f"{path}?{parts.query}")
        answer = connection.getresponse()
        return answer, answer.read()
    finally:
        connection.close()


def test_a_clip_has_every_frame_of_its_episode(tmp_path: Path) -> None:
    follower = FakeFollower(tmp_path, video_interval_s=3600.0)
    watch_to_the_end(follower)
    path = tmp_path / "videos" / "agent_steps_000012345678.mp4"
    assert list(path.parent.iterdir()) == [path]
    with Player(follower.policy, seed=derived_seed(follower.config.seed, Use.VIEWER)) as player:
        scenes = list(player.episode("greedy", 0.0))
    assert follower.clips == [{"clip": str(path), "return": scenes[-1].earned}]
    assert follower.notes == [f"clip videos/{path.name}, return {scenes[-1].earned:.2f}"]
    height, width = scenes[0].picture.shape
    factor = -(-336 // max(height, width))
    frames = frames_of(path, height * factor, width * factor)
    small = frames[:, factor // 2 :: factor, factor // 2 :: factor, 0]
    assert len(small) == len(scenes)
    pictures = np.stack([scene.picture for scene in scenes])
    np.testing.assert_array_equal(small > 127, pictures > 127)


def test_clips_come_at_the_interval_and_with_newer_weights(tmp_path: Path) -> None:
    follower = FakeFollower(tmp_path, video_interval_s=1e-9)

    def newest(timeout_s: float) -> int:
        follower.policy.agent_steps += 1000
        return 1

    follower.newest = newest  # type: ignore[method-assign]
    follower.over = lambda: len(follower.clips) == 3
    watch_to_the_end(follower)
    names = [Path(message["clip"]).name for message in follower.clips]
    steps = [int(name.removeprefix("agent_steps_").removesuffix(".mp4")) for name in names]
    assert steps[0] > 12_345_678
    assert np.diff(steps).tolist() == [1000, 1000]
    assert sorted(path.name for path in (tmp_path / "videos").iterdir()) == sorted(names)


def test_without_weights_there_is_nothing_to_see(tmp_path: Path) -> None:
    follower = FakeFollower(tmp_path, video_interval_s=3600.0)
    follower.versions = iter((-1, -1, -1, -1, 0, 1))
    watch_to_the_end(follower)
    assert follower.asked == [viewer._ANSWER_S] * 5
    assert len(follower.clips) == 1


def test_newer_weights_are_asked_for_during_play_without_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(viewer, "_REFRESH_S", 0.0)
    follower = FakeFollower(tmp_path, video_interval_s=3600.0)
    watch_to_the_end(follower)
    start, first, *during = follower.asked
    assert start == first == viewer._ANSWER_S
    assert len(during) > 5
    assert set(during) == {0.0}


def test_the_end_of_the_run_ends_a_clip_and_leaves_nothing(tmp_path: Path) -> None:
    follower = FakeFollower(tmp_path, video_interval_s=3600.0)
    follower.over = lambda: len(follower.rested) == 4  # that is in mid-episode
    watch_to_the_end(follower)
    assert list((tmp_path / "videos").iterdir()) == []
    assert follower.told == []


def test_what_a_killed_viewer_left_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in (".agent_steps_000000000001.77.partial.mp4", "agent_steps_000000000001.mp4"):
        (folder / name).touch()
    follower = FakeFollower(tmp_path, video_interval_s=3600.0)
    watch_to_the_end(follower)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["agent_steps_000000000001.mp4", "agent_steps_000012345678.mp4"]


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_clip_that_cannot_be_written_is_a_note(tmp_path: Path, kind: str) -> None:
    run, theirs = tmp_path / "run", tmp_path / "theirs"
    for folder in (run, theirs):
        folder.mkdir()
    (theirs / ".x.partial.mp4").touch()
    if kind == "file":
        (run / "videos").touch()
    else:
        (run / "videos").symlink_to(theirs)
    follower = FakeFollower(run, video_interval_s=1e-9)
    follower.over = lambda: False
    follower.versions = iter(range(4))
    with pytest.raises(StopIteration):  # it goes on until here
        viewer.view(follower)
    assert follower.clips == []
    assert len(follower.notes) == 3
    assert all(f"no clip: {run / 'videos'} is " in note for note in follower.notes)
    assert [path.name for path in theirs.iterdir()] == [".x.partial.mp4"]


def test_the_page_shows_the_play_while_somebody_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "_FRAME_WAIT_S", 0.01)
    follower = FakeFollower(tmp_path, watch=True, watch_fps=1 / 3600)
    seen: list[int] = []
    shapes, states = set(), []

    def look() -> None:
        answer, data = get(follower.address, "/frame")
        if answer.status == 200:
            seen.append(int(answer.getheader("X-Frame") or 0))
            shapes.add(np.asarray(Image.open(io.BytesIO(data))).shape)
            states.append(json.loads(get(follower.address, "/state")[1]))

    follower.on_rest = look
    follower.over = lambda: len(seen) == 30
    watch_to_the_end(follower)
    assert seen == list(range(1, 31))
    with Player(follower.policy, seed=0) as player:
        assert shapes == {next(player.episode("greedy", 0.0)).picture.shape}
    assert [state["step"] for state in states[:4]] == [0, 1, 2, 3]
    assert states[0]["agent steps"] == 12_345_678
    assert states[0]["last return"] is None
    assert states[-1]["last return"] in (-1.0, 1.0)
    assert states[-1]["episode"] > states[0]["episode"] == 1
    idle, first, *others = follower.rested
    assert (idle, first) == (viewer._IDLE_S, 0.0)
    assert min(others) > 100  # an hour and more between two frames, but here time does not pass
    assert not (tmp_path / "videos").exists()


def test_where_nobody_looks_nothing_is_played(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Player, "episode", lambda *_: pytest.fail("it plays"))
    follower = FakeFollower(tmp_path, watch=True)
    follower.over = lambda: len(follower.rested) == 50
    watch_to_the_end(follower)
    assert set(follower.rested) == {viewer._IDLE_S}
    assert len(follower.asked) == 1  # a role that never asks would count as one that cannot start


def test_who_leaves_ends_the_play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_FRAME_WAIT_S", 0.01)
    follower = FakeFollower(tmp_path, watch=True)

    def look_for_a_while() -> None:
        if len(follower.rested) < 5:
            get(follower.address, "/frame")
        else:
            monkeypatch.setattr(viewer, "_LOOKING_S", 0.0)

    follower.on_rest = look_for_a_while
    follower.over = lambda: len(follower.rested) == 20
    watch_to_the_end(follower)
    assert set(follower.rested[6:]) == {viewer._IDLE_S}


def test_a_clip_that_is_due_comes_before_who_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "_FRAME_WAIT_S", 0.01)
    follower = FakeFollower(tmp_path, watch=True, video_interval_s=1e-9)
    follower.on_rest = lambda: (get(follower.address, "/frame"), None)[1]
    follower.over = lambda: len(follower.clips) == 2
    watch_to_the_end(follower)


def test_the_end_of_the_run_closes_the_page(tmp_path: Path) -> None:
    follower = FakeFollower(tmp_path, watch=True)
    follower.over = lambda: True
    watch_to_the_end(follower)
    with pytest.raises(ConnectionRefusedError):
        get(follower.address, "/")


def test_a_port_that_is_taken_is_a_note_and_another_is_found(tmp_path: Path) -> None:
    with LivePage("somebody else's") as other:
        follower = FakeFollower(tmp_path, watch=True, watch_port=other.port)
        follower.over = lambda: True
        watch_to_the_end(follower)
        taken, watch = follower.notes
        assert f"port {other.port} " in taken
        assert "--watch-port" in taken
        assert urlsplit(watch.rpartition(" ")[2]).port not in (None, other.port)
