"""Frames taken apart into bands of spatial frequencies, and saliency: what some rules look at."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from stg_hooks.errors import SettingError, TargetError


def bands_of(prediction: Tensor, count: int) -> list[Tensor]:
    """Take frames apart into a Laplacian pyramid.

    Args:
        prediction: `(B, ..., H, W)`.
        count: how many bands.

    Returns:
        The bands from the highest frequencies to the lowest, each half as high and wide; `joined` puts them together.

    Raises:
        SettingError: the frames are too small for that many.
        TargetError: the prediction has no frames: it is a sequence of tokens.
    """
    check_frames(prediction)
    least = 3 * 2 ** max(0, count - 2)
    if min(prediction.shape[-2:]) < least:
        raise SettingError(
            f"{count} bands of frequencies need frames of {least} rows and columns or more, and these have "
            f"{prediction.shape[-2]} and {prediction.shape[-1]}."
        )
    levels = [prediction]
    for _ in range(count - 1):
        height, width = levels[-1].shape[-2:]
        levels.append(_resized(_blurred(levels[-1]), height // 2, width // 2))
    return [level - _up(above, level) for level, above in itertools.pairwise(levels)] + levels[-1:]


def joined(bands: Sequence[Tensor]) -> Tensor:
    """Put bands together."""
    found = bands[-1]
    for band in bands[-2::-1]:
        found = band + _up(found, band)
    return found


def saliency(term: Tensor) -> Tensor:
    """Say how much each place of a frame stands out among all of it, `softmax(blur(|term|))`; shape of `term`."""
    check_frames(term)
    blurred = _filtered(term.abs(), torch.tensor([-1.0, 0.0, 1.0]).square().mul(-0.5).exp())
    return blurred.flatten(-2).softmax(-1).reshape(term.shape)


def check_frames(prediction: Tensor) -> None:
    """Raise `TargetError` unless a prediction has rows and columns."""
    if prediction.ndim < 4:
        raise TargetError(
            f"this rule looks at the rows and columns of frames, and the predictions are {tuple(prediction.shape)}: "
            "tokens in a sequence. Use another rule."
        )


def _up(small: Tensor, like: Tensor) -> Tensor:
    return _blurred(_resized(small, *like.shape[-2:]))


def _blurred(frames: Tensor) -> Tensor:
    return _filtered(frames, torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]))


def _resized(frames: Tensor, height: int, width: int) -> Tensor:
    flat = F.interpolate(frames.flatten(0, -3)[:, None], size=(height, width), mode="bilinear", align_corners=False)
    return flat.reshape(*frames.shape[:-2], height, width)


def _filtered(frames: Tensor, weights: Tensor) -> Tensor:
    """Filter rows and columns with the same weights, whose sum is made one; frames are reflected at their edges."""
    weights = (weights / weights.sum()).to(frames)
    reach = len(weights) // 2
    flat = F.pad(frames.flatten(0, -3)[:, None], (reach, reach, reach, reach), mode="reflect")
    return F.conv2d(flat, torch.outer(weights, weights)[None, None]).reshape(frames.shape)
