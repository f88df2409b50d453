"""Measure a guidance term: how large it is, where it points, and where in space and time it acts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stg_hooks.errors import SettingError


def relative_norm(d: Tensor, cond: Tensor) -> Tensor:
    """Compute `||d|| / ||cond||` over all elements."""
    return torch.div(d.float().norm(), cond.float().norm())


def cosine(d: Tensor, direction: Tensor) -> Tensor:
    """Compute the cosine between two tensors over all elements; NaN where one of them is zero."""
    a, b = d.float().flatten(), direction.float().flatten()
    return torch.div(a @ b, a.norm() * b.norm())


def std_ratio(d: Tensor, cond: Tensor) -> Tensor:
    """Compute `std(cond + d) / std(cond)` per sample, over all but dimension 0, mean over samples."""
    c = cond.float().flatten(1)
    return ((c + d.float().flatten(1)).std(dim=1) / c.std(dim=1)).mean()


def high_frequency(picture: Tensor) -> Tensor:
    """Compute the part of the energy in the upper half of spatial frequencies.

    The upper half is all that changes faster than 1/4 cycle per position, in whatever direction: half of the highest
    frequency that rows and columns can hold. White noise has about 0.8 of its energy there.

    Args:
        picture: `(..., H, W)`.

    Returns:
        From 0 to 1; NaN for zeros.
    """
    height, width = picture.shape[-2:]
    energy = torch.fft.fft2(picture.float(), norm="ortho").abs().square()
    rows = torch.fft.fftfreq(height, device=picture.device)
    columns = torch.fft.fftfreq(width, device=picture.device)
    is_high = rows[:, None].square() + columns.square() > 0.25**2 * (1 + 1e-6)
    return torch.sum(energy[..., is_high]) / torch.sum(energy)


def temporal(picture: Tensor) -> Tensor:
    """Compute the part of the energy that differs between frames: `sum (d - mean_F d)^2 / sum d^2`.

    Args:
        picture: `(B, C, F, H, W)`.

    Returns:
        From 0 to 1; NaN for zeros.
    """
    d = picture.float()
    return (d - d.mean(dim=2, keepdim=True)).square().sum() / d.square().sum()


def as_picture(
    tensor: Tensor, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], layout: str | None = None
) -> Tensor | None:
    """Arrange a prediction as frames.

    Args:
        tensor: a prediction, or something of its shape.
        model: the denoiser; its configuration tells which dimension holds channels.
        args: of its call, which say how tokens lie in frames; `kwargs` as well.
        kwargs: see `args`.
        layout: what the dimensions are, instead of looking: `"BCFHW"`, `"BFCHW"`, `"BCHW"` or another order.

    Returns:
        `(B, C, F, H, W)`, one frame for an image; `None` where it cannot be told.

    Raises:
        SettingError: a layout that does not fit.
    """
    if layout is not None:
        return _arranged(tensor, layout)
    channels = _channels(model)
    if tensor.ndim == 5:
        is_second, is_third = tensor.shape[1] in channels, tensor.shape[2] in channels
        if channels and is_second == is_third:
            return None
        return tensor.transpose(1, 2) if is_third else tensor
    if tensor.ndim == 4 and (not channels or tensor.shape[1] in channels):
        return tensor[:, :, None]
    if tensor.ndim == 3:
        grid = _grid(args, kwargs, tensor.shape[1])
        return None if grid is None else tensor.transpose(1, 2).unflatten(2, grid)
    return None


def _arranged(tensor: Tensor, layout: str) -> Tensor:
    if not set("BCHW") <= set(layout) <= set("BCFHW") or len(layout) != len(set(layout)):
        raise SettingError(f"layout={layout!r}: expected an order of the letters B, C, H, W and, for videos, F.")
    if len(layout) != tensor.ndim:
        raise SettingError(f"layout={layout!r} has {len(layout)} dimensions, but predictions {tuple(tensor.shape)}.")
    if "F" not in layout:
        tensor, layout = tensor.unsqueeze(0), f"F{layout}"
    return tensor.permute([layout.index(letter) for letter in "BCFHW"])


def _channels(model: nn.Module) -> set[int]:
    config = getattr(model, "config", {})
    values = config if isinstance(config, Mapping) else vars(config)
    found = values.get("out_channels") or values.get("in_channels")
    return {found} if isinstance(found, int) else set()


def _grid(args: tuple[Any, ...], kwargs: Mapping[str, Any], tokens: int) -> tuple[int, int, int] | None:
    """Find out how many frames, rows and columns tokens make, from what else the denoiser is given."""
    triples: list[Any] = [tuple(kwargs.get(name) for name in ("num_frames", "height", "width"))]
    for leaf in pytree.tree_leaves((args, kwargs), is_leaf=_is_triple):
        if _is_triple(leaf):
            triples.append(leaf)
        elif isinstance(leaf, Tensor) and leaf.ndim in (2, 3) and leaf.shape[-1] == 3 and leaf.shape[-2] == tokens:
            positions = leaf.reshape(-1, tokens, 3)[0]
            triples.append(tuple(len(positions[:, i].unique()) for i in range(3)))
    return next((triple for triple in triples if _is_triple(triple) and math.prod(triple) == tokens), None)


def _is_triple(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 3 and all(isinstance(number, int) for number in value)
