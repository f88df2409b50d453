"""The parts of one call's predictions, by the labels of its role: taking the cond ones, putting guided ones back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from stg_hooks.errors import CallError
from stg_hooks.passes.rows import HALF, Rows, first_batch, halves
from stg_hooks.roles import Role, phrase


def cond_rows(role: Role, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rows | None:
    """Say which rows of a call weak passes are made with; `None` for all.

    Raises:
        CallError: it cannot have these parts.
    """
    if role.is_whole or len(role.parts) == 1 or not role.is_cond:
        return None
    if role.is_halved:
        return HALF
    batch = first_batch(args, kwargs)
    size = _size(role, batch or 0)
    listed = [i * size + k for i, label in enumerate(role.parts) if label == "cond" for k in range(size)]
    return Rows.chosen(listed, batch)


def sides(role: Role, found: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return the cond and the uncond predictions in what a call predicted.

    Raises:
        CallError: it cannot have these parts.
    """
    if role.is_list_of_both:
        return _sides_of_list(role, found)
    conds = [_part(role, tensor, "cond") for tensor in found]
    return [c for c in conds if c is not None], [_part(role, tensor, "uncond") for tensor in found]


def uncond_side(role: Role, found: Sequence[Tensor]) -> list[Tensor]:
    """Return what a call without cond rows predicted to go with a cond prediction."""
    parts = [_part(role, tensor, "uncond") for tensor in found] if len(role.parts) > 1 else found
    return [part for part in parts if part is not None]


def put_back(
    role: Role, new: Sequence[Tensor], found: Sequence[Tensor], put: Callable[[Tensor, Tensor], Tensor]
) -> list[Tensor]:
    """Put what is guided in the place of all that the caller combines.

    Args:
        role: of the call.
        new: for each prediction, one value for its cond (or else its uncond) rows.
        found: what the call predicted.
        put: takes such a value and a part of a prediction, and returns the part to put there.

    Returns:
        New predictions.
    """
    if role.is_list_of_both:
        new = [*new, *new]
    return [_put_in_parts(role, value, tensor, put) for value, tensor in zip(new, found, strict=True)]


def _put_in_parts(role: Role, value: Tensor, tensor: Tensor, put: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    if len(role.parts) == 1 or role.samples:
        return put(value, tensor)
    count = role.parts.count("cond" if role.is_cond else "uncond")
    values, seen, parts = value.chunk(count), dict.fromkeys(role.parts, 0), []
    for label, part in zip(role.parts, _cut(role, tensor), strict=True):
        parts.append(part if label == "apart" else put(values[min(seen[label], count - 1)], part))
        seen[label] += 1
    return torch.cat(parts)


def _part(role: Role, tensor: Tensor, label: str) -> Tensor | None:
    """Return the rows of a prediction that have a label; `None` if there are none."""
    if len(role.parts) == 1:
        return tensor if label == "cond" else None
    found = [part for of, part in zip(role.parts, _cut(role, tensor), strict=True) if of == label]
    return torch.cat(found) if len(found) > 1 else found[0] if found else None


def _cut(role: Role, tensor: Tensor) -> Sequence[Tensor]:
    return halves(tensor) if role.is_halved else tensor.split(_size(role, tensor.shape[0]))


def _size(role: Role, batch: int) -> int:
    """Return the number of rows in each part.

    Raises:
        CallError: they do not come out even.
    """
    size, rest = divmod(batch, len(role.parts))
    if rest or not size:
        raise CallError(f"a call with {batch} rows cannot be {phrase(role.rows)}.")
    return size


def _sides_of_list(role: Role, found: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
    first, second = list(found[: len(found) // 2]), list(found[len(found) // 2 :])
    conds, unconds = (first, second) if role.rows == "cond+uncond" else (second, first)
    if [c.shape for c in conds] != [u.shape for u in unconds]:
        shapes = [tuple(tensor.shape) for tensor in found]
        raise CallError(f"a list of predictions of the shapes {shapes} cannot be {phrase(role.rows)} samples.")
    return conds, [*unconds]
