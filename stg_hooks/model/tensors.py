"""Find tensors in what a call takes and returns."""

from __future__ import annotations

from typing import Any

from torch import Tensor
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
