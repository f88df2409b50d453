"""Sums, products and projections of predictions, sample by sample."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor


def total(base: Tensor, terms: Sequence[Tensor]) -> Tensor:
    """Add terms to a prediction."""
    return base + reduce(torch.add, terms) if terms else base


def dot(one: Tensor, other: Tensor, dims: list[int] | None = None) -> Tensor:
    """Multiply sample by sample, `(B, 1, ...)`; in float64, as latents of a video have millions of entries."""
    product = one.double() if one.device.type != "mps" else one
    return (product * other).sum(dim=dims or list(range(1, one.ndim)) or None, keepdim=True).to(one.dtype)


def projected(vector: Tensor, onto: Tensor, dims: list[int] | None = None) -> Tensor:
    """Project sample by sample; onto zero, there is nothing to project."""
    square = dot(onto, onto, dims)
    return torch.where(square > 0, dot(vector, onto, dims) / square, 0.0) * onto
