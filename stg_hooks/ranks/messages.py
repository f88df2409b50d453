"""What ranks tell each other of settings and arguments, as text, to find out that they were given the same."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stg_hooks.passes.rows import leaves_of

if TYPE_CHECKING:
    pass


_VALUES = "values of the arguments"


_TOLERANCE = 0.05


def samples_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, object]:
    """Describe the arguments of a call: shapes, and a few values. On a GPU this waits for what came before."""
    tensors = [leaf for leaf in leaves_of(args, dict(kwargs)) if isinstance(leaf, Tensor)]
    shapes = [(tuple(tensor.shape), str(tensor.dtype)) for tensor in tensors]
    return {"shapes": shapes, _VALUES: _samples(tensors, 8, 64)}


def _samples(tensors: Sequence[Tensor], each: int, limit: int) -> str:
    """Pick values that lie far apart, of as many tensors as there is room for."""
    with torch.no_grad():
        chosen = [tensor for tensor in tensors if tensor.numel()]
        chosen = chosen[:: -(-len(chosen) * each // limit) or 1]
        picked = [_picked(tensor, each) for tensor in chosen]
        device = picked[0].device if picked else None
        values = torch.cat([p.to(device) for p in picked]).tolist() if picked else []
    found = iter(values)
    return "; ".join(", ".join(f"{next(found):.3g}" for _ in p) for p in picked)


def _picked(tensor: Tensor, count: int) -> Tensor:
    flat = torch.view_as_real(tensor).flatten() if tensor.is_complex() else tensor.detach().flatten()
    return flat[:: max(1, len(flat) // count)][:count].float()


def shortened(value: object) -> str:
    """Write a setting, or the beginning of it and a hash of all."""
    text = " ".join(_text(value).split())
    if len(text) <= 700:
        return text
    return f"{text[:600]}... ({hashlib.sha256(text.encode()).hexdigest()[:16]})"


def _text(value: object) -> str:
    """Say what a setting is, without what differs between processes: addresses, devices."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {_samples([value], 64, 64)}"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_text, value))})"
    return str(getattr(value, "__qualname__", type(value).__qualname__) if callable(value) else value)


def is_same(key: str, mine: str | None, theirs: str | None) -> bool:
    """Compare what was said exactly, and values of tensors as different devices may compute them."""
    if key != _VALUES or mine is None or theirs is None or mine == theirs:
        return mine == theirs
    ours, others = (
        [[float(value) for value in part.split(",")] for part in text.split(";")] for text in (mine, theirs)
    )
    if [len(part) for part in ours] != [len(part) for part in others]:
        return False
    return all(
        abs(a - b) <= _TOLERANCE * max(map(abs, part)) or (math.isnan(a) and math.isnan(b))
        for part, other in zip(ours, others, strict=True)
        for a, b in zip(part, other, strict=True)
    )
