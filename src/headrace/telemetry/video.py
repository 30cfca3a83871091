"""Frames to an MP4 file that browsers play: H.264, yuv420p, index at the front."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any, Self

import imageio.v2
import numpy as np
from numpy.typing import NDArray

from headrace.errors import ConfigError, HeadraceError
from headrace.run_files import ensure_folder, remove

_LARGER_SIDE_PIXELS = 336
_PARTIAL = ".partial.mp4"


def remove_partial(folder: Path) -> None:
    """Removes what is left of videos whose writers were killed; nobody may be writing one.

    Raises:
        ConfigError: the folder is a link.
    """
    ensure_folder(folder)
    for path in folder.glob(f".*{_PARTIAL}"):
        remove(path)


class VideoWriter:
    """Writes frames to a video; the file appears under its name only once it is complete.

    As a context manager it discards the video if the block raises.
    """

    def __init__(self, path: Path, fps: float) -> None:
        """Prepares a video of `fps` frames per second; makes the folder.

        Raises:
            ConfigError: the name does not end in .mp4, or the folder cannot be made.
        """
        if path.suffix.lower() != ".mp4":
            raise ConfigError(f"{path}: the name of a video must end in .mp4")
        if not fps > 0:
            raise ConfigError(f"{path}: frames per second must be above 0, not {fps}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot make the folder of {path}: {error.strerror}") from error
        self.path = path
        self._fps = fps
        # Where nobody can have put a link, which would be written through.
        self._temporary = path.with_name(f".{path.stem}.{secrets.token_hex(8)}{_PARTIAL}")
        self._shape: tuple[int, ...] | None = None
        self._encoder: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is None:
            self.close()
        else:
            self._discard()

    def write(self, frame: NDArray[np.uint8]) -> None:
        """Adds a frame, uint8, [H, W] grey or [H, W, 3] RGB, of the same shape as the first.

        Raises:
            ValueError: the frame has another dtype or shape.
        """
        if self._shape is None:
            self._shape = frame.shape
        grey_or_rgb = frame.ndim == 2 or (frame.ndim == 3 and frame.shape[2] == 3)
        if frame.dtype != np.uint8 or not grey_or_rgb or frame.shape != self._shape:
            raise ValueError(
                f"a frame must be uint8 [H, W] or [H, W, 3] like the first {self._shape}, "
                f"not {frame.dtype} {frame.shape}"
            )
        if self._encoder is None:
            self._encoder = self._open()
            # The encoder starts with the first frame. imageio would fork for it, to run a line of
            # Python in the child, where gRPC's own handlers may close its pipe.
            os.environ.setdefault("IMAGEIO_FFMPEG_NO_PREVENT_SIGINT", "1")
        self._encoder.append_data(_enlarge(frame))

    def close(self) -> None:
        """Completes the file and gives it its name.

        Raises:
            HeadraceError: there was no frame.
        """
        if self._encoder is None:
            raise HeadraceError(f"{self.path}: a video needs at least one frame")
        try:
            self._encoder.close()
            os.replace(self._temporary, self.path)
        finally:
            self._temporary.unlink(missing_ok=True)

    def _discard(self) -> None:
        try:
            if self._encoder is not None:
                self._encoder.close()
        finally:
            self._temporary.unlink(missing_ok=True)

    def _open(self) -> Any:
        return imageio.v2.get_writer(
            self._temporary,
            format="FFMPEG",
            fps=self._fps,
            codec="libx264",
            pixelformat="yuv420p",
            macro_block_size=2,
            ffmpeg_log_level="error",
            output_params=["-movflags", "+faststart"],
        )


def _enlarge(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns [H', W', 3]: enlarged by a whole factor, sides even as yuv420p needs them."""
    factor = max(1, -(-_LARGER_SIDE_PIXELS // max(frame.shape[:2])))
    large = frame.repeat(factor, axis=0).repeat(factor, axis=1)
    rgb = np.stack([large] * 3, axis=2) if large.ndim == 2 else large
    height, width = rgb.shape[:2]
    return np.pad(rgb, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
