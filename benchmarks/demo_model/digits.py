"""Draw real clips for the demo's model: the handwritten digits that scikit-learn ships, set in motion."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from stg_hooks.demo.clips import BACKGROUND, FRAMES, SIZE

DIGIT = 8  # pixels: two lanes of as many rows hold a digit each
RGB = ((1.0, -0.15, -0.4), (-0.4, 0.3, 1.0))  # in the order of COLOURS
HELD_OUT = 297  # images that no training sees


@functools.cache
def _images() -> tuple[Tensor, Tensor]:
    """Read the digits: (1797, 8, 8) in 0..1, and what they are."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images).float().div(16).mul(1.3).clamp(max=1), torch.tensor(data.target)


def draw(count: int, generator: torch.Generator, held_out: bool = False) -> tuple[Tensor, Tensor]:
    """Draw labelled clips: each digit has a lane of its own, the upper or the lower half, and bounces to and fro.

    Args:
        count: number of clips B.
        generator: source of randomness.
        held_out: take the images that training does not see.

    Returns:
        Clips in [-1, 1], (B, 3, 6, 16, 16), and which digit is red and which is blue, (B, 2).
    """
    images, targets = _images()
    first, last = (len(images) - HELD_OUT, len(images)) if held_out else (0, len(images) - HELD_OUT)
    chosen = torch.randint(first, last, (count, 2), generator=generator)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 2, 1, generator=generator)

    time = torch.arange(FRAMES)
    room = SIZE - DIGIT
    sign = torch.randint(2, (count, 2, 1), generator=generator) * 2 - 1
    distance = uniform(0, 2 * room) + sign * uniform(0.8, 1.8) * time
    x = room - (distance.remainder(2 * room) - room).abs()  # bounces
    upper = torch.randint(2, (count, 1, 1), generator=generator)
    y = (SIZE // 2 * torch.cat([upper, 1 - upper], dim=1)).expand(-1, -1, FRAMES)

    place = torch.arange(SIZE) + 0.5
    across = ((place - x[..., None]) * 2 / DIGIT - 1)[..., None, :].expand(-1, -1, -1, SIZE, -1)
    down = ((place - y[..., None]) * 2 / DIGIT - 1)[..., None].expand(-1, -1, -1, -1, SIZE)
    grid = torch.stack([across, down], dim=-1).flatten(0, 2)  # (B 2 F, H, W, 2)
    ink = images[chosen][:, :, None, None].expand(-1, -1, FRAMES, -1, -1, -1).flatten(0, 2)  # (B 2 F, 1, 8, 8)
    inked = F.grid_sample(ink, grid, align_corners=False).view(count, 2, 1, FRAMES, SIZE, SIZE)
    rgb = torch.tensor(RGB)[None, :, :, None, None, None]
    return BACKGROUND + ((rgb - BACKGROUND) * inked).sum(1), targets[chosen]
