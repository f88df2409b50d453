"""The demo's world: six-frame clips of a red and a blue handwritten digit that glide over a dark background."""

from __future__ import annotations

from torch import Tensor

COLOURS = ("red", "blue")
DIGITS = 10

FRAMES = 6
SIZE = 16
BACKGROUND = -0.85
FOLD = 4


def fold(clips: Tensor) -> Tensor:
    """Turn pixels into latents: blocks of 4 x 4 pixels become channels and the background becomes zero.

    Args:
        clips: pixels in [-1, 1], (B, 3, F, H, W).

    Returns:
        Latents, (B, 48, F, H / 4, W / 4).
    """
    batch, channels, frames, height, width = clips.shape
    blocks = (clips - BACKGROUND).reshape(batch, channels, frames, height // FOLD, FOLD, width // FOLD, FOLD)
    return blocks.permute(0, 1, 4, 6, 2, 3, 5).reshape(
        batch, channels * FOLD * FOLD, frames, height // FOLD, width // FOLD
    )


def unfold(latents: Tensor) -> Tensor:
    """Turn latents back into pixels; the inverse of `fold`.

    Args:
        latents: (B, 48, F, H, W).

    Returns:
        Pixels, not clamped, (B, 3, F, 4 H, 4 W).
    """
    batch, channels, frames, height, width = latents.shape
    blocks = latents.reshape(batch, channels // FOLD**2, FOLD, FOLD, frames, height, width)
    return blocks.permute(0, 1, 4, 5, 2, 6, 3).reshape(batch, -1, frames, height * FOLD, width * FOLD) + BACKGROUND
