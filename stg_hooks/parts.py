"""The parts of one call's predictions, by the labels of its role: taking the cond ones, putting guided ones back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from stg_hooks.errors import CallError
from stg_hooks.guidance.samples import count_of_samples
from stg_hooks.passes.rows import HALF, Rows, first_batch, halves
from stg_hooks.roles import Role, phrase


def of_call(role: Role, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Role:
    """Find the parts of a call whose cond rows are listed; other roles are what they are.

    Raises:
        CallError: the call does not have these rows, or leaves open which of the others belong to which cond row.
    """
    if role.listed is None:
        return role
    batch = count_of_samples(args, kwargs) if role.samples else first_batch(args, kwargs)
    chosen = Rows.chosen(role.listed, batch)
    if chosen is None or chosen.listed is None or batch is None:
        return dataclasses.replace(role, rows="cond", order=None)
    conds = sorted(chosen.listed)
    others = _others(conds, batch)
    count, half = len(others), batch // 2
    order = [*conds, *(row for part in others for row in part)]
    if count == 1 and conds == [*range(half, batch)]:
        return dataclasses.replace(role, rows="uncond+cond", order=None)
    rows = "cond+uncond" if count == 1 else "+".join(["cond", *["image"] * count])
    if order == [*range(batch)] and (count == 1 or not role.samples):
        return dataclasses.replace(role, rows=rows, order=None)
    if role.samples:
        raise CallError(f"rows={role.listed!r}: of a list of {batch} samples, the first or the last half may be cond.")
    return dataclasses.replace(role, rows=rows, order=tuple(order))


def _others(conds: Sequence[int], batch: int) -> list[list[int]]:
    """List the rows that are not cond, as parts with one for each cond row.

    Raises:
        CallError: they can be divided in more than one way, or not at all.
    """
    others = [row for row in range(batch) if row not in conds]
    count, rest = divmod(len(others), len(conds))
    if count == 1 and not rest:
        return [others]
    if not rest and conds == [*range(conds[0], batch, count + 1)]:  # sample after sample
        return [others[i::count] for i in range(count)]
    parts = [others[i : i + len(conds)] for i in range(0, len(others), len(conds))]
    if rest or any(part[-1] - part[0] >= len(conds) for part in (conds, *parts)):
        raise CallError(
            f"cond rows {[*conds]} of a call with {batch} rows: which of the other {len(others)} belongs to which of "
            "them? Expected as many others for each, part after part or sample after sample."
        )
    return parts


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
    order = role.order or range(batch or 0)
    listed = [order[i * size + k] for i, label in enumerate(role.parts) if label == "cond" for k in range(size)]
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
    new = torch.cat(parts)
    return new if role.order is None else new[torch.tensor(role.order, device=new.device).argsort()]


def _part(role: Role, tensor: Tensor, label: str) -> Tensor | None:
    """Return the rows of a prediction that have a label; `None` if there are none."""
    if len(role.parts) == 1:
        return tensor if label == "cond" else None
    found = [part for of, part in zip(role.parts, _cut(role, tensor), strict=True) if of == label]
    return torch.cat(found) if len(found) > 1 else found[0] if found else None


def _cut(role: Role, tensor: Tensor) -> Sequence[Tensor]:
    if role.is_halved:
        return halves(tensor)
    if role.order is not None:
        if tensor.shape[0] != len(role.order):
            raise CallError(f"a call with {len(role.order)} rows gave a prediction with {tensor.shape[0]}.")
        tensor = tensor[list(role.order)]
    parts: Sequence[Tensor] = tensor.split(_size(role, tensor.shape[0]))
    return parts


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
