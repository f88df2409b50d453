"""Turn what a pipeline returns into frames, and frames into files: PNG, mp4, animated WebP, strips of frames."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from stg_hooks.errors import ExtraError, TargetError

Array: TypeAlias = Any

STRIP_FRAMES = 16
STRIP_SIDE = 160
_SMALL = 64  # pixels; below, what video compression loses is what there is to see


def needs(*packages: str) -> list[ModuleType]:
    """Import packages that only the writing of samples needs.

    Raises:
        ExtraError: one is missing; says what to install.
    """
    found = []
    for package in packages:
        try:
            found.append(importlib.import_module(package))
        except ImportError as error:
            raise ExtraError(
                f"pictures need {package.partition('.')[0]}, which is not installed: "
                "pip install numpy pillow imageio imageio-ffmpeg tqdm"
            ) from error
    return found


def frames_of(output: Any) -> Array:
    """Find the first sample in what a pipeline returned.

    Args:
        output: a pipeline's output object or tuple, a list of PIL images, an array or a tensor: one sample or a batch
            of them, `(..., H, W, 3)` or `(..., 3, H, W)`; bytes from 0 to 255, or floats from 0 to 1.

    Returns:
        The frames, `(F, H, W, 3)`, uint8; an image has one.

    Raises:
        TargetError: no picture is found, as in latents.
    """
    (np,) = needs("numpy")
    value = output[0] if isinstance(output, tuple) and output else output
    for name in ("frames", "images", "videos"):
        if getattr(output, name, None) is not None:
            value = getattr(output, name)
    if getattr(output, "images", None) is not None:
        value = value[0]  # a batch of images, not a video
    value = _stacked(value)
    if value.ndim not in (3, 4, 5) or 3 not in (value.shape[-1], value.shape[-3]):
        raise TargetError(
            f"the pipeline returned {type(output).__name__} with an array of shape {tuple(value.shape)}, which is no "
            "picture: expected (frames, height, width, 3). Leave output_type out, or pass sample=, a function of "
            "(prompt, generator) that returns such an array."
        )
    if value.shape[-1] != 3:
        value = np.moveaxis(value, -3, -1)
    value = value[0] if value.ndim == 5 else value
    value = value[None] if value.ndim == 3 else value
    if value.dtype == np.uint8:
        return value
    if not np.isfinite(value).all():
        raise TargetError("the sample holds values that are not finite (NaN or infinity): there is nothing to look at.")
    return (value.astype(np.float32).clip(0, 1) * 255).round().astype(np.uint8)


def _stacked(value: Any) -> Array:
    """Turn tensors, PIL images and lists of them into one array."""
    (np,) = needs("numpy")
    if isinstance(value, (list, tuple)):
        return np.stack([_stacked(item) for item in value])
    if hasattr(value, "detach"):
        return value.detach().float().cpu().numpy() if value.is_floating_point() else value.cpu().numpy()
    if hasattr(value, "convert"):
        return np.asarray(value.convert("RGB"))
    return np.asarray(value)


def write_sample(folder: Path, stem: str, frames: Array, fps: int) -> str:
    """Write one sample.

    A single frame becomes a PNG. Several become an mp4 (H.264), if imageio-ffmpeg is installed and their sides are even
    and not small; otherwise an animated WebP without loss.

    Args:
        folder: where.
        stem: the file's name without its ending.
        frames: `(F, H, W, 3)`, uint8.
        fps: frames per second.

    Returns:
        The file's name.
    """
    (image,) = needs("PIL.Image")
    count, height, width, _ = frames.shape
    if count == 1:
        name = f"{stem}.png"
        image.fromarray(frames[0]).save(folder / name)
        return name
    even = height % 2 == 0 and width % 2 == 0 and min(height, width) >= _SMALL
    if even and importlib.util.find_spec("imageio_ffmpeg"):
        (imageio,) = needs("imageio.v2")
        name = f"{stem}.mp4"
        options = {"codec": "libx264", "quality": 8, "macro_block_size": 1, "pixelformat": "yuv420p"}
        with imageio.get_writer(folder / name, format="FFMPEG", fps=fps, **options) as writer:
            for frame in frames:
                writer.append_data(frame)
        return name
    name = f"{stem}.webp"
    first, *rest = [image.fromarray(frame) for frame in frames]
    options = {"lossless": True, "method": 4, "duration": round(1000 / fps), "loop": 0, "minimize_size": False}
    first.save(folder / name, save_all=True, append_images=rest, **options)
    return name


def write_strip(folder: Path, stem: str, frames: Array) -> tuple[str, int, int, int]:
    """Write up to 16 frames side by side in one picture, each at most 160 pixels on its longer side.

    Args:
        folder: where.
        stem: the file's name without its ending.
        frames: `(F, H, W, 3)`, uint8.

    Returns:
        The file's name, how many frames are in it, and the width and height of one.
    """
    (np, image) = needs("numpy", "PIL.Image")
    count, height, width, _ = frames.shape
    chosen = np.linspace(0, count - 1, min(count, STRIP_FRAMES)).round().astype(int)
    factor = min(1.0, STRIP_SIDE / max(height, width))
    size = max(1, round(width * factor)), max(1, round(height * factor))
    strip = image.new("RGB", (size[0] * len(chosen), size[1]))
    for position, i in enumerate(chosen):
        frame = image.fromarray(frames[i])
        strip.paste(frame if factor == 1 else frame.resize(size, image.Resampling.LANCZOS), (position * size[0], 0))
    name = f"{stem}.strip.webp"
    quality: dict[str, Any] = {"lossless": True} if factor == 1 else {"quality": 90, "method": 4}
    strip.save(folder / name, **quality)
    return name, len(chosen), *size
