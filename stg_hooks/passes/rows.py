"""One call of a denoiser: which rows it has, the call on some of them, the predictions in what it returned."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import repeat
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stg_hooks.errors import CallError
from stg_hooks.model.source import is_positional
from stg_hooks.model.tensors import is_prediction as is_prediction
from stg_hooks.model.tensors import leaves_of as leaves_of

Indices: TypeAlias = slice | tuple[int, ...]
"""Some rows of a call; a slice has step 1."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which rows of a call are conditional: the second half, or those that are listed."""

    listed: tuple[int, ...] | None = None
    batch: int | None = None
    """Number of rows of a call, where they are listed."""

    @classmethod
    def chosen(cls, rows: slice | Sequence[int] | Sequence[bool] | Tensor | None, batch: int | None) -> Rows | None:
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


def predictions(output: Any) -> list[Tensor]:
    """Find the predictions in what a denoiser returned.

    Args:
        output: a tensor; a tuple, list, dictionary or registered output object; an object with `.sample`; or, where
            none of these holds one, any object with predictions in its attributes.

    Returns:
        The floating-point tensors in it that have dimensions, in order; usually one, two for video with audio.

    Raises:
        CallError: there is none.
    """
    found = _found(output) or _found(output, is_open=True)
    if not found:
        raise CallError(
            f"the denoiser returned a {type(output).__name__} without a floating-point tensor that has dimensions. "
            "Expected a tensor, a list, tuple or dict of tensors, or an object with .sample or with tensors in its "
            "attributes."
        )
    return found


def places_of_predictions(output: Any) -> dict[str, int]:
    """Say where in what a denoiser returned predictions may be, and how many are there.

    Args:
        output: as for `predictions`.

    Returns:
        Keys, attributes or positions, in order.
    """
    if isinstance(output, Mapping):
        parts = {str(key): part for key, part in output.items()}
    elif isinstance(output, (tuple, list)):
        names = getattr(output, "_fields", map(str, range(len(output))))
        parts = dict(zip(names, output, strict=True))
    else:
        parts = {"0": output} if isinstance(output, Tensor) else _parts(output, is_open=not _found(output))
        parts = {name: part for name, part in parts.items() if _found(part)}
    return {name: len(_found(part)) for name, part in parts.items()}


def own_predictions(output: Any) -> list[Tensor]:
    """Copy the predictions: a denoiser may write its next ones into the same memory, as CUDA graphs do.

    Args:
        output: as for `predictions`.

    Returns:
        New tensors, as `predictions` finds them.

    Raises:
        CallError: there is none.
    """
    return [tensor.clone() for tensor in predictions(output)]


def replace_predictions(output: Any, new: Sequence[Tensor]) -> Any:
    """Build an output of the same type with other predictions.

    Args:
        output: what the denoiser returned; not changed.
        new: one tensor for each that `predictions` found.

    Returns:
        A new output of the same structure.
    """
    return _replaced(output, iter(new), is_open=not _found(output))


def _found(output: Any, is_open: bool = False) -> list[Tensor]:
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(output):
        if not isinstance(leaf, Tensor):
            for part in _parts(leaf, is_open).values():
                found += _found(part)
        elif is_prediction(leaf):
            found.append(leaf)
    return found


def _replaced(output: Any, rest: Iterator[Tensor], is_open: bool = False) -> Any:
    leaves, spec = pytree.tree_flatten(output)
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            leaves[i] = next(rest) if is_prediction(leaf) else leaf
            continue
        new = {name: _replaced(part, rest) for name, part in _parts(leaf, is_open).items() if _found(part)}
        if new:
            leaves[i] = _with_parts(leaf, new)
    return pytree.tree_unflatten(leaves, spec)


def _parts(leaf: Any, is_open: bool) -> dict[str, Any]:
    """Name what may hold predictions in an object that pytree does not know.

    That is its `.sample`. Other attributes count only where there is nothing else (`is_open`): beside a prediction, an
    object is rather a cache.
    """
    if leaf is None or isinstance(leaf, (bool, int, float, str, type, nn.Module)):
        return {}
    sample = getattr(leaf, "sample", None)
    if isinstance(sample, (Tensor, list, tuple, dict)) and not _is_read_only(leaf, "sample"):
        return {"sample": sample}
    if not is_open:
        return {}
    if isinstance(leaf, Mapping):
        return dict(leaf)
    slots = (getattr(cls, "__slots__", ()) for cls in type(leaf).__mro__)
    names = [name for found in slots for name in ([found] if isinstance(found, str) else found)]
    return {name: getattr(leaf, name) for name in (*getattr(leaf, "__dict__", {}), *names) if hasattr(leaf, name)}


def _is_read_only(leaf: Any, name: str) -> bool:
    found = getattr(type(leaf), name, None)
    return isinstance(found, property) and found.fset is None


def _with_parts(output: Any, new: dict[str, Any]) -> Any:
    changed = copy.copy(output)
    for name, value in new.items():
        if isinstance(output, Mapping) and name in output:
            changed[name] = value
        elif dataclasses.is_dataclass(output):
            object.__setattr__(changed, name, value)  # also where it is frozen
        else:
            setattr(changed, name, value)
    return changed


def take_rows(
    args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[str], batch: int, rows: Indices
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Cut a call down to some of its rows.

    A tensor takes part if its dimension 0 is the batch, or a whole multiple of it (frames folded into the batch);
    two-dimensional multiples, and arguments named like positions, hold one row per token and stay whole.

    Args:
        args: positional arguments of the call.
        kwargs: keyword arguments of the call, nested tuples, lists and dicts included.
        names: parameter names that belong to `args`.
        batch: number of rows of the call.
        rows: which of them to keep; a slice has step 1.

    Returns:
        The arguments of the smaller call.
    """

    def take(name: str, leaf: Any) -> Any:
        folded = row_factor(leaf, batch) if isinstance(leaf, Tensor) else 0
        return leaf if not folded or (folded > 1 and is_positional(name)) else cut(leaf, rows, batch, folded)

    return map_arguments(take, args, kwargs, names)


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


def count_of(rows: Indices, batch: int) -> int:
    """Count the rows that are chosen of a batch."""
    return len(range(batch)[rows]) if isinstance(rows, slice) else len(rows)


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


def agree(found: Sequence[Tensor], expected: Sequence[Tensor], in_half: bool = False) -> bool:
    """Tell whether predictions that should be equal are, up to what rounding does in calls with other rows.

    Args:
        found: predictions.
        expected: as many.
        in_half: they were computed in half precision, whatever type they have.

    Returns:
        Whether they have the same shapes and differ by less than 1e-4 of their root mean square in float32 on a CPU,
        2e-3 elsewhere (where its matrix products may be less exact) and 5e-2 in half precision; where one is not
        finite, nothing speaks against it.
    """
    return len(found) == len(expected) and all(map(_agrees, found, expected, repeat(in_half)))


def are_as_finite(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Tell whether predictions are finite where others are."""
    pairs = [(one, other) for one, other in zip(found, expected, strict=True) if one.device.type != "meta"]
    return all(bool((one.isfinite() | ~other.isfinite()).all()) for one, other in pairs)


def _agrees(one: Tensor, other: Tensor, in_half: bool) -> bool:
    if one.shape != other.shape:
        return False
    if one.device.type == "meta":
        return True
    single = 1e-4 if one.device.type == "cpu" else 2e-3
    tolerance = single if one.dtype in (torch.float32, torch.float64) and not in_half else 5e-2
    with torch.no_grad():
        one, other = one.float(), other.float()
        difference = (one - other).square().mean().sqrt()
        # One row alone may have no spread, but a mean.
        return not bool(difference > tolerance * other.square().mean().sqrt() + 1e-12)
