"""The demo's world: six-frame clips of one sprite that moves over a dark background."""

from __future__ import annotations

import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle")
COLOURS = ("red", "green", "blue", "yellow")
MOTIONS = ("left", "right", "up", "down")

FRAMES = 6
SIZE = 24
RADIUS = 4.0
SPEED = (2.2, 2.8)  # pixels per frame: five steps of it cross most of the 16 pixels that the centre can travel
BACKGROUND = -0.8
FOLD = 4

_RGB = ((0.95, -0.7, -0.7), (-0.7, 0.75, -0.65), (-0.6, -0.35, 1.0), (0.95, 0.8, -0.7))
_DIRECTION = ((-1.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.0, 1.0))  # (x, y) with y pointing down, in the order of MOTIONS


def labels(count: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw conditions uniformly.

    Args:
        count: number of conditions.
        generator: source of randomness.

    Returns:
        Indices into SHAPES, COLOURS and MOTIONS, (count, 3), int64.
    """
    sizes = (len(SHAPES), len(COLOURS), len(MOTIONS))
    return torch.stack([torch.randint(size, (count,), generator=generator) for size in sizes], dim=1)


def render(shape: Tensor, colour: Tensor, motion: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw anti-aliased clips with random speed and start; the sprite never leaves the frame.

    Args:
        shape: indices into SHAPES, (B,).
        colour: indices into COLOURS, (B,).
        motion: indices into MOTIONS, (B,).
        generator: source of randomness.

    Returns:
        Clips in [-1, 1], (B, 3, 6, 24, 24).
    """
    count = shape.shape[0]
    speed, along, across = torch.rand(3, count, generator=generator)
    travel = (SPEED[0] + (SPEED[1] - SPEED[0]) * speed) * (FRAMES - 1)
    room = SIZE - 2 * RADIUS
    direction = torch.tensor(_DIRECTION)[motion]
    middle = (along - 0.5) * (room - travel)
    centre = middle[:, None] * direction.abs() + (across[:, None] - 0.5) * room * (1 - direction.abs())
    time = torch.linspace(-0.5, 0.5, FRAMES)
    path = SIZE / 2 + centre[:, None] + time[None, :, None] * (travel[:, None] * direction)[:, None]  # (B, F, 2)

    grid = torch.arange(SIZE) + 0.5
    x = grid - path[..., 0, None, None]  # (B, F, 1, W)
    y = grid[:, None] - path[..., 1, None, None]  # (B, F, H, 1)
    # Signed distances to the outlines, in pixels: half a pixel to either side is the anti-aliased rim.
    distance = torch.stack(
        [
            (x.square() + y.square()).sqrt() - RADIUS,
            torch.maximum(x.abs(), y.abs()) - 0.9 * RADIUS,
            torch.maximum(y - RADIUS, (2 * x.abs() - y - RADIUS) / 5**0.5),
        ],
        dim=1,
    )
    inside = (0.5 - distance[torch.arange(count), shape]).clamp(0, 1)[:, None]  # (B, 1, F, H, W)
    rgb = torch.tensor(_RGB)[colour][:, :, None, None, None]
    return BACKGROUND + (rgb - BACKGROUND) * inside


def draw(count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Draw labelled clips, all conditions equally likely.

    Args:
        count: number of clips B.
        generator: source of randomness.

    Returns:
        Clips (B, 3, 6, 24, 24) and labels (B, 3).
    """
    label = labels(count, generator)
    shape, colour, motion = label.unbind(dim=1)
    return render(shape, colour, motion, generator), label


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
