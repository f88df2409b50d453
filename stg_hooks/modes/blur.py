"""A Gaussian blur of tokens on a grid."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def gaussian_blur(grid: Tensor, sigma: float) -> Tensor:
    """Blur over rows and columns; what lies beyond an edge is reflected at it.

    Args:
        grid: `(..., height, width, channels)`.
        sigma: the width of the Gaussian. Its kernel reaches to 3 sigma, and at most half-way over the grid.

    Returns:
        The blurred grid.

    Source: the code of SEG, arXiv 2408.00760.
    """
    rows, columns = (_weights(size, sigma, grid.device).to(grid.dtype) for size in grid.shape[-3:-1])
    return torch.einsum("...hwc,ih,jw->...ijc", grid, rows, columns)


def _weights(size: int, sigma: float, device: torch.device) -> Tensor:
    """Return what each of `size` places is after the blur, as weights of all of them, `(size, size)`."""
    odd = math.ceil(6 * sigma) + 1 - math.ceil(6 * sigma) % 2
    reach = min(odd, size + 1 - size % 2) // 2
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float32, device=device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    places = F.pad(torch.eye(size, device=device)[:, None], (reach, reach), mode="reflect")
    return F.conv1d(places, (kernel / kernel.sum())[None, None])[:, 0].T.contiguous()
