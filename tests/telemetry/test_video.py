"""Videos are real MP4 files, whole or not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest

from headrace.errors import ConfigError, HeadraceError
from headrace.telemetry.video import VideoWriter, remove_partial


def decode(path: Path, height: int, width: int) -> tuple[np.ndarray, str]:
    """Returns frames [N, height, width, 3] and what ffmpeg says of the file.

    Runs ffmpeg itself, because imageio's reader leaves pipes open and warnings are errors here.
    """
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path), "-f", "rawvideo"]
    done = subprocess.run([*command, "-pix_fmt", "rgb24", "-"], capture_output=True, check=True)
    frames = np.frombuffer(done.stdout, dtype=np.uint8).reshape(-1, height, width, 3)
    return frames, done.stderr.decode()


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((84, 84), (336, 336)),
        ((210, 160, 3), (420, 320)),
        ((10, 5), (340, 170)),
        ((401, 333, 3), (402, 334)),
    ],
)
def test_video_reads_back(tmp_path: Path, shape: tuple[int, ...], size: tuple[int, int]) -> None:
    path = tmp_path / "videos" / "episode.mp4"
    with VideoWriter(path, fps=30) as video:
        for index in range(12):
            video.write(np.full(shape, 20 * index, dtype=np.uint8))
        assert not path.exists()
    assert [entry.name for entry in path.parent.iterdir()] == ["episode.mp4"]
    frames, said = decode(path, *size)
    for part in ("h264", "yuv420p", f"{size[1]}x{size[0]}", "30 fps"):
        assert part in said
    assert len(frames) == 12
    assert [int(frame.mean()) for frame in frames] == pytest.approx(range(0, 240, 20), abs=4)


def test_name_must_end_in_mp4(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.mp4"):
        VideoWriter(tmp_path / "episode.gif", fps=30)


def test_frames_must_be_alike(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", fps=30) as video:
        video.write(np.zeros((84, 84), dtype=np.uint8))
        with pytest.raises(ValueError, match=r"\(84, 80\)"):
            video.write(np.zeros((84, 80), dtype=np.uint8))
        with pytest.raises(ValueError, match="float64"):
            video.write(np.zeros((84, 84)))  # type: ignore[arg-type]


def test_video_of_a_block_that_raises_is_discarded(tmp_path: Path) -> None:
    frames = iter([np.zeros((84, 84), dtype=np.uint8), np.zeros((2, 2), dtype=np.uint8)])
    video = VideoWriter(tmp_path / "a.mp4", fps=30)
    with pytest.raises(ValueError, match="like the first"), video:
        list(map(video.write, frames))
    assert list(tmp_path.iterdir()) == []


def test_video_without_frames_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(HeadraceError, match="frame"), VideoWriter(tmp_path / "a.mp4", 30):
        pass
    assert list(tmp_path.iterdir()) == []


def test_only_what_was_never_finished_is_removed(tmp_path: Path) -> None:
    VideoWriter(tmp_path / "b.mp4", fps=30)._temporary.touch()
    (tmp_path / "a.mp4").touch()
    remove_partial(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    remove_partial(tmp_path / "nowhere")


def test_a_link_where_one_may_be_expected_is_not_written_through(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_text("kept")
    for name in (f".a.{os.getpid()}", ".a"):
        (tmp_path / f"{name}.partial.mp4").symlink_to(theirs)
    with VideoWriter(tmp_path / "a.mp4", fps=30) as video:
        video.write(np.zeros((84, 84), dtype=np.uint8))
    assert theirs.read_text() == "kept"
    assert VideoWriter(tmp_path / "a.mp4", fps=30)._temporary != video._temporary


def test_leftovers_go_whatever_they_are_and_nothing_outside(tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    for folder in (theirs, ours, ours / ".a.1.partial.mp4", theirs / ".x.1.partial.mp4"):
        folder.mkdir()
    (ours / ".b.1.partial.mp4").symlink_to(theirs)
    remove_partial(ours)
    assert list(ours.iterdir()) == []
    ours.rmdir()
    ours.symlink_to(theirs)
    with pytest.raises(ConfigError, match="is a link"):
        remove_partial(ours)
    assert [path.name for path in theirs.iterdir()] == [".x.1.partial.mp4"]


def test_no_film_forks_this_process(tmp_path: Path) -> None:
    """What a library does in the child of a fork, as gRPC does, is not the film's to survive."""
    code = f"""
import os
os.register_at_fork(before=lambda: print("forked", flush=True))
from pathlib import Path
import numpy as np
from headrace.telemetry.video import VideoWriter
with VideoWriter(Path({str(tmp_path / "film.mp4")!r}), 15.0) as video:
    for _ in range(3):
        video.write(np.zeros((32, 32), np.uint8))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (tmp_path / "film.mp4").exists()
    assert done.stdout == ""
