"""The predictions in what a denoiser returned: find, replace and compare them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stg_hooks.errors import CallError
from stg_hooks.model.tensors import is_prediction


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
