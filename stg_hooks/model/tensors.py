"""Find tensors in what a call takes and returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def leaves_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """List the leaves of a call's arguments; much faster than pytree where few of them are nested."""
    leaves: list[Any] = []
    for value in (*args, *kwargs.values()):
        if value is None or isinstance(value, (Tensor, bool, int, float, str)):
            leaves.append(value)
        else:
            leaves += pytree.tree_leaves(value)
    return leaves


def is_prediction(tensor: Tensor) -> bool:
    """Tell whether a tensor that a denoiser returned may be a prediction, and not a count or a loss beside it."""
    return tensor.is_floating_point() and tensor.ndim > 0


def computes_in_half(model: nn.Module) -> bool:
    """Tell whether a model may compute in less than single precision, whatever type its predictions have in the end."""
    devices = {parameter.device.type for parameter in model.parameters()}
    if any(torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) for kind in devices):
        return True
    return any(parameter.dtype.itemsize < 4 for parameter in model.parameters())
