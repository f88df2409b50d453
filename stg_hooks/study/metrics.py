"""Measure pictures and videos without any model: what a sweep writes beside its samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from stg_hooks.errors import SettingError, TargetError

Array: TypeAlias = Any
"""A numpy array; numpy loads when the first sample is measured."""
Metric: TypeAlias = Callable[[Array, str], float]
"""Takes a video `(F, H, W, 3)`, float32 from 0 to 1, and its prompt; an image is a video of one frame."""

_LUMA = (0.299, 0.587, 0.114)
_STEP = 0.5 / 255


def sharpness(video: Array, prompt: str = "") -> float | None:
    """Measure fine detail: the standard deviation of the Laplacian of brightness, mean over frames."""
    y = _brightness(video)
    if min(y.shape[1:]) < 3:
        return None
    around = y[:, :-2, 1:-1] + y[:, 2:, 1:-1] + y[:, 1:-1, :-2] + y[:, 1:-1, 2:]
    return float((around - 4 * y[:, 1:-1, 1:-1]).std(axis=(1, 2)).mean())


def contrast(video: Array, prompt: str = "") -> float:
    """Measure the standard deviation of brightness within a frame, mean over frames."""
    return float(_brightness(video).std(axis=(1, 2)).mean())


def saturation(video: Array, prompt: str = "") -> float:
    """Measure the saturation of HSV, `(max - min) / max` over the three channels, mean over pixels."""
    import numpy as np

    high, low = video.max(axis=-1), video.min(axis=-1)
    return float(np.where(high > 0, (high - low) / np.maximum(high, 1e-12), 0).mean())


def clipped(video: Array, prompt: str = "") -> float:
    """Measure the part of all channel values that are black or white in 8 bits."""
    return float(((video < _STEP) | (video > 1 - _STEP)).mean())


def flicker(video: Array, prompt: str = "") -> float | None:
    """Measure by how much the mean brightness changes from frame to frame; `None` for an image."""
    import numpy as np

    return float(np.abs(np.diff(_brightness(video).mean(axis=(1, 2)))).mean()) if len(video) > 1 else None


def motion(video: Array, prompt: str = "") -> float | None:
    """Measure by how much a pixel's brightness changes from frame to frame; `None` for an image."""
    import numpy as np

    return float(np.abs(np.diff(_brightness(video), axis=0)).mean()) if len(video) > 1 else None


def difference(video: Array, other: Array) -> float | None:
    """Measure the mean absolute difference between two videos; `None` where their shapes differ."""
    import numpy as np

    return float(np.abs(video - other).mean()) if video.shape == other.shape else None


BUILT_IN: Mapping[str, Callable[[Array, str], float | None]] = {
    "sharpness": sharpness,
    "contrast": contrast,
    "saturation": saturation,
    "clipped": clipped,
    "flicker": flicker,
    "motion": motion,
}
DIFFERENCE = "difference"
"""The name of `difference` to the unguided sample, of the same prompt and seed."""


def own_metrics(metrics: Mapping[str, Metric] | Sequence[Metric] | Metric | None) -> dict[str, Metric]:
    """Name a user's metrics.

    Args:
        metrics: functions of a video and its prompt, by name; or a function that has a name, or a list of them.

    Returns:
        The functions by name.

    Raises:
        TargetError: something that is not callable.
        SettingError: a name that is missing, or taken.
    """
    metrics = [metrics] if callable(metrics) else metrics
    named: dict[str, Metric] = {}
    pairs = metrics.items() if isinstance(metrics, Mapping) else ((None, metric) for metric in metrics or ())
    for given, metric in pairs:
        if not callable(metric):
            raise TargetError(
                f"metrics: {metric!r} is not callable. A metric is a function of (video, prompt), where the video is "
                "an array (F, H, W, 3) from 0 to 1."
            )
        name = given or getattr(metric, "__name__", None)
        if not name or name == "<lambda>":
            raise SettingError('metrics: a function has no name. Give one: metrics={"name": function}.')
        if name in {*BUILT_IN, DIFFERENCE, *named}:
            raise SettingError(f"metrics: the name {name!r} is taken by another metric. Give another one.")
        named[name] = metric
    return named


def _brightness(video: Array) -> Array:
    import numpy as np

    return video @ np.asarray(_LUMA, dtype=video.dtype)
