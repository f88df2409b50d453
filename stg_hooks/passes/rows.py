"""One call of a denoiser: which rows it has, and the call on some of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from stg_hooks.errors import CallError
from stg_hooks.model.source import is_positional
from stg_hooks.model.tensors import leaves_of as leaves_of
from stg_hooks.passes.packed import NO_ROWS, Packed, packed_in, packed_rows

Indices: TypeAlias = slice | tuple[int, ...]
"""Some rows of a call; a slice has step 1."""
SomeRows: TypeAlias = slice | Sequence[int] | Sequence[bool] | Tensor
"""Rows as a user lists them: a slice, numbers in any order, or a mask with one bool per row."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which rows of a call are conditional: the second half, or those that are listed."""

    listed: tuple[int, ...] | None = None
    batch: int | None = None
    """Number of rows of a call, where they are listed."""

    @classmethod
    def chosen(cls, rows: SomeRows | None, batch: int | None) -> Rows | None:
        """Read what a host says; `None` for all rows.

        Args:
            rows: a slice, indices in any order, or a mask of one bool per row.
            batch: number of rows of the call.

        Raises:
            CallError: rows that the call does not have, or none.
        """
        if rows is None:
            return None
        if batch is None:
            raise CallError("rows= was given for a call without a tensor that has rows.")
        given = range(batch)[rows] if isinstance(rows, slice) else rows.tolist() if isinstance(rows, Tensor) else rows
        listed = [*given]
        if listed and all(isinstance(row, bool) for row in listed):
            if len(listed) != batch:
                raise CallError(f"rows= is a mask of {len(listed)} rows, but the call has {batch}.")
            listed = [i for i, is_cond in enumerate(listed) if is_cond]
        if not listed or len({*listed}) < len(listed) or not all(0 <= row < batch for row in listed):
            raise CallError(f"rows={rows!r}: expected some of the rows 0 to {batch - 1} of the call, each once.")
        return None if listed == [*range(batch)] else cls(tuple(listed), batch)

    def fit(self, batch: int) -> bool:
        """Tell whether a call may have this many rows."""
        return batch % 2 == 0 if self.listed is None else batch == self.batch

    def batch_of(self, count: int) -> int:
        """Return the number of rows of a call, of which so many are conditional."""
        return 2 * count if self.batch is None else self.batch

    def of(self, batch: int) -> Indices:
        """Return the rows, as a slice where they follow each other."""
        if self.listed is None:
            return slice(batch // 2, batch)
        first, last = self.listed[0], self.listed[-1]
        return slice(first, last + 1) if self.listed == tuple(range(first, last + 1)) else self.listed

    def take(self, prediction: Tensor) -> Tensor:
        """Return the conditional rows of a prediction.

        Raises:
            CallError: it has another number of rows.
        """
        if self.listed is None:
            return halves(prediction)[1]
        if prediction.shape[0] != self.batch:
            raise CallError(f"a call with {self.batch} rows gave a prediction with {prediction.shape[0]}.")
        return cut(prediction, self.of(self.batch), self.batch, 1)


HALF = Rows()
"""The call's rows are `[uncond, cond]`."""


def take_rows(
    args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[str], batch: int, rows: Indices
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Cut a call down to some of its rows.

    A tensor takes part if its dimension 0 is the batch, or a whole multiple of it (frames folded into the batch);
    two-dimensional multiples, and arguments named like positions, hold one row per token and stay whole. Where the rows
    are the frames of all samples, a `(samples, frames)` tensor takes part too (SVD's own `image_only_indicator`). So do
    arguments about tokens of all rows that lie one after the other (Mochi's own `packed_indices`).

    Args:
        args: positional arguments of the call.
        kwargs: keyword arguments of the call, nested tuples, lists and dicts included.
        names: parameter names that belong to `args`.
        batch: number of rows of the call.
        rows: which of them to keep; a slice has step 1.

    Returns:
        The arguments of the smaller call.
    """
    packed, numbers = packed_in(leaves_of(args, kwargs), batch), listed(rows, batch)

    def take(name: str, leaf: Any) -> Any:
        part = rows_apart(packed, name, leaf, numbers, batch)
        if part is not NO_ROWS:
            return part
        folded = row_factor(leaf, batch) if isinstance(leaf, Tensor) else 0
        return leaf if not folded or (folded > 1 and is_positional(name)) else cut(leaf, rows, batch, folded)

    return map_arguments(take, args, kwargs, names)


def rows_apart(packed: Sequence[Packed], name: str, leaf: Any, rows: Sequence[int], batch: int) -> Any:
    """Return some rows of an argument that has them elsewhere than in dimension 0; `NO_ROWS` if it does not.

    Args:
        packed: what `packed_in` finds in the call.
        name: of the argument; empty where it has none.
        leaf: a value in it.
        rows: the rows of the call, in any order; they may be more than it has.
        batch: number of rows of the call.
    """
    part = packed_rows(packed, leaf, rows) if packed else NO_ROWS
    if part is NO_ROWS and _is_unfolded(leaf, batch) and not is_positional(name):
        frames = leaf.shape[1]  # which stay together
        return leaf if len(rows) % frames else leaf.flatten()[list(rows)].unflatten(0, (-1, frames))
    return part


def _is_unfolded(value: Any, batch: int) -> bool:
    """Tell whether this is a tensor of `(samples, frames)`, where the rows of the call are frames of samples."""
    is_flat = isinstance(value, Tensor) and value.ndim == 2
    return is_flat and value.numel() == batch and value.shape[0] not in (1, batch)


def map_arguments(
    change: Callable[[str, Any], Any], args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Change every leaf of a call's arguments, nested tuples, lists and dicts included.

    Args:
        change: takes the name of the argument and a leaf of its value, returns the new leaf.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        names: parameter names that belong to `args`.

    Returns:
        The new arguments.
    """
    named = zip([*names, *[""] * len(args)], args, strict=False)
    changed = tuple(pytree.tree_map(partial(change, name), value) for name, value in named)
    return changed, {name: pytree.tree_map(partial(change, name), value) for name, value in kwargs.items()}


def row_factor(tensor: Tensor, batch: int) -> int | None:
    """Say how many entries of dimension 0 belong to one row of a call.

    Args:
        tensor: any tensor that goes into or comes out of a part of the call.
        batch: number of rows of the call.

    Returns:
        1 where dimension 0 is the batch, more where frames or pixels are folded into it, 0 where the tensor is common
        to all rows; `None` where it cannot be told: a table with an entry per token, or the batch in dimension 1.
    """
    if tensor.ndim == 0:
        return 0
    folded, rest = divmod(tensor.shape[0], batch)
    if folded != 1 and batch > 1 and tensor.ndim > 2 and tensor.shape[1] == batch:
        return None
    if not folded or rest:
        return 0
    return None if folded > 1 and tensor.ndim == 2 else folded


def cut(tensor: Tensor, rows: Indices, batch: int, folded: int) -> Tensor:
    """Cut a tensor down to some rows of its call.

    Args:
        tensor: the tensor.
        rows: which rows to keep; a slice has step 1.
        batch: number of rows of the call.
        folded: entries of dimension 0 per row, 0 for a tensor that is common to all rows.

    Returns:
        A view, unless the rows are listed.
    """
    if not folded:
        return tensor
    if isinstance(rows, slice):
        start, stop, _ = rows.indices(batch)
        return tensor[start * folded : stop * folded]
    chosen: Tensor = tensor.unflatten(0, (batch, folded))[list(rows)]
    return chosen.flatten(0, 1)


def listed(rows: Indices, batch: int) -> Sequence[int]:
    """List the rows that are chosen of a batch."""
    return range(batch)[rows] if isinstance(rows, slice) else rows


def first_batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Guess the number of rows of a call; `None` without a tensor that has dimensions.

    Latents have three or more. In front of them there may be a timestep, which can be common to all rows.
    """
    tensors = [leaf for leaf in leaves_of(args, kwargs) if isinstance(leaf, Tensor) and leaf.ndim]
    return next((tensor.shape[0] for tensor in tensors if tensor.ndim > 2), tensors[0].shape[0] if tensors else None)


def halves(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Split rows `[uncond, cond]`.

    Raises:
        CallError: an odd number of rows.
    """
    if tensor.shape[0] % 2:
        raise CallError(
            f"a call with {tensor.shape[0]} rows cannot be [uncond, cond]: the number is odd. If every row is "
            "conditional, use batched_cfg=False."
        )
    uncond, cond = torch.chunk(tensor, 2)
    return uncond, cond
