"""Follow tensors inside objects that torch's pytree does not know: dataclasses, and objects with tensors in attributes.

Blocks may take and return such objects. They are taken apart into `Opened` nodes, which pytree knows, and put together
again as new objects of their class.
"""

from __future__ import annotations

import dataclasses
import enum
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_WHOLE = (
    type(None), Tensor, bool, int, float, str, bytes, nn.Module, enum.Enum, type, types.FunctionType, types.MethodType,
    torch.dtype, torch.device, torch.Size, torch.Generator,
)  # fmt: skip
_USUAL = frozenset({Tensor, type(None), bool, int, float, str})
_DEPTH = 4  # of objects in objects


@dataclasses.dataclass
class Opened:
    """An object that was taken apart."""

    cls: type
    parts: dict[str, Any]


def _parts(opened: Opened) -> tuple[list[Any], tuple[type, tuple[str, ...]]]:
    return list(opened.parts.values()), (opened.cls, tuple(opened.parts))


def _parts_with_keys(opened: Opened) -> tuple[list[tuple[Any, Any]], tuple[type, tuple[str, ...]]]:
    keyed = [(pytree.GetAttrKey(name), value) for name, value in opened.parts.items()]
    return keyed, (opened.cls, tuple(opened.parts))


def _put_together(values: Any, context: tuple[type, tuple[str, ...]]) -> Any:
    cls, names = context
    made: Any = object.__new__(cls)
    for name, value in zip(names, values, strict=True):
        object.__setattr__(made, name, value)  # also where the class is frozen
    return made


pytree.register_pytree_node(Opened, _parts, _put_together, flatten_with_keys_fn=_parts_with_keys)


def flatten(value: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """Flatten a value as pytree does, objects that hold tensors included."""
    leaves, spec = pytree.tree_flatten(value)
    for leaf in leaves:
        if type(leaf) not in _USUAL and _is_openable(leaf):
            return pytree.tree_flatten(_opened(value))
    return leaves, spec


def flatten_with_paths(value: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """List leaves with their paths, objects that hold tensors included."""
    return pytree.tree_flatten_with_path(_opened(value))[0]


def leaves(value: Any) -> list[Any]:
    """List the leaves of a value, objects that hold tensors included."""
    return flatten(value)[0]


def map_tensors(change: Callable[[Tensor], Any], value: Any) -> Any:
    """Rebuild a value with its tensors changed, those in objects included."""
    found, spec = flatten(value)
    return pytree.tree_unflatten([change(leaf) if isinstance(leaf, Tensor) else leaf for leaf in found], spec)


def _opened(value: Any, depth: int = _DEPTH) -> Any:
    def opened(leaf: Any) -> Any:
        if not _is_openable(leaf):
            return leaf
        parts = {name: _opened(part, depth - 1) if depth else part for name, part in _attributes(leaf).items()}
        return Opened(type(leaf), parts)

    return pytree.tree_map(opened, value)


def _is_openable(leaf: Any) -> bool:
    if isinstance(leaf, _WHOLE) or (callable(leaf) and not dataclasses.is_dataclass(leaf)):
        return False
    return any(isinstance(part, Tensor) for part in pytree.tree_leaves(list(_attributes(leaf).values())))


def _attributes(leaf: Any) -> dict[str, Any]:
    names = [name for cls in type(leaf).__mro__ for name in _slots(cls)]
    slots = {name: getattr(leaf, name) for name in names if hasattr(leaf, name)}
    return {**slots, **getattr(leaf, "__dict__", {})}


def _slots(cls: type) -> list[str]:
    slots = cls.__dict__.get("__slots__", ())
    names = [slots] if isinstance(slots, str) else list(slots)
    return [name for name in names if not name.startswith("__")]


def copied(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copy the tensors among the arguments of a call, each once, for a call that may write into them."""
    leaves, spec = flatten((args, kwargs))
    copies = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    first = [next(i for i, other in enumerate(leaves) if other is leaf) for leaf in leaves]
    own: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten([copies[i] for i in first], spec)
    return own
