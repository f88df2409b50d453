"""Write pictures and videos whole or not at all."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stg_hooks.cli.failures import USAGE, FailureError
from stg_hooks.study.results import PROFILE_FILE, SWEEP_FILE

ENDINGS = (".mp4", ".webp", ".gif", ".png")
_SMALL = 128  # pixels; a smaller picture is enlarged by whole pixels, to be seen at all


def check_output(path: Path, force: bool) -> None:
    """Make sure that the result can be written, before it is computed.

    Raises:
        FailureError: it exists, has an ending that is not known, or needs a package.
    """
    suffix = path.suffix.lower()
    if suffix not in ENDINGS:
        raise FailureError(f"{path}: end it in {', '.join(ENDINGS)}.", USAGE)
    if suffix == ".mp4" and not importlib.util.find_spec("imageio_ffmpeg"):
        raise FailureError(f"{path}: mp4 needs imageio-ffmpeg: pip install imageio-ffmpeg, or end it in .webp.")
    if path.is_dir():
        raise FailureError(f"{path}: is a folder. Name a file.", USAGE)
    if path.exists() and not force:
        raise FailureError(f"{path}: exists already. Choose another name, or pass --force to replace it.", USAGE)
    check_folder(path.parent)


def check_folder(folder: Path) -> None:
    """Make sure that a folder exists and can be written to, or can be made, before hours are spent on what goes there.

    Raises:
        FailureError: it cannot.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    named = f"{there}" if there == folder else f"{folder}: {there}"
    if not there.is_dir():
        raise FailureError(f"{named} is a file. Name a folder.", USAGE)
    if not os.access(there, os.W_OK | os.X_OK):
        raise FailureError(f"{named} cannot be written to.")
    try:
        with tempfile.TemporaryFile(dir=there):  # permissions do not tell of a read-only or a full disk
            pass
    except OSError as error:
        raise FailureError(f"{named} cannot be written to ({error.strerror}).") from error


def check_results(folder: Path) -> None:
    """Make sure that a folder holds what profile or sweep wrote.

    Raises:
        FailureError: it does not.
    """
    if folder.is_file():
        raise FailureError(f"{folder} is a file. Name the folder that profile or sweep wrote.", USAGE)
    if not any((folder / name).exists() for name in (PROFILE_FILE, SWEEP_FILE)):
        what = "holds no results" if folder.is_dir() else "does not exist"
        made = f"stg-hooks profile MODEL --out {folder}, or stg-hooks sweep MODEL --out {folder}"
        raise FailureError(f"{folder} {what}. Write some there first: {made}", USAGE)


def write_frames(path: Path, frames: Any, fps: float) -> None:
    """Write an image or a video in the format that the path's ending names.

    Args:
        path: where; a file there is replaced once the new one is whole.
        frames: `(F, H, W, 3)`, uint8.
        fps: frames per second.
    """
    times = max(1, -(-_SMALL // max(frames.shape[1:3])))
    frames = frames.repeat(times, axis=1).repeat(times, axis=2)
    with whole(path) as partial:
        if path.suffix.lower() == ".mp4":
            _write_mp4(partial, frames, fps)
        else:
            (image,) = _needs("PIL.Image")
            first, *rest = [image.fromarray(frame) for frame in frames]
            moving = {"save_all": True, "append_images": rest, "duration": round(1000 / fps), "loop": 0} if rest else {}
            first.save(partial, quality=90, **moving)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a path beside the real one to write to, and move it there if nothing fails; folders are made as needed."""
    new = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
        if not path.exists():
            with contextlib.suppress(OSError):  # something else lies there by now
                for folder in new:
                    folder.rmdir()


def _write_mp4(path: Path, frames: Any, fps: float) -> None:
    imageio, ffmpeg = _needs("imageio.v2", "imageio_ffmpeg")
    odd = [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)]  # the codec wants even sides
    (np,) = _needs("numpy")
    frames = np.pad(frames, odd, mode="edge")
    options = {"codec": "libx264", "quality": 8, "macro_block_size": 1, "pixelformat": "yuv420p"}
    with imageio.get_writer(path, format="FFMPEG", fps=fps, ffmpeg_log_level="quiet", **options) as writer:
        for frame in frames:
            writer.append_data(frame)
    # ffmpeg is a process of its own: what it could not write, it does not tell.
    try:
        written = ffmpeg.count_frames_and_secs(str(path))[0]
    except (OSError, RuntimeError):
        written = 0
    if written != len(frames):
        raise FailureError(f"{path.parent}: only {written} of {len(frames)} frames could be written. Is the disk full?")


def _needs(*names: str) -> list[Any]:
    from stg_hooks.study.media import needs  # here: it brings torch along

    return list(needs(*names))
