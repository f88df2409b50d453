"""A tensor that has a shape but no values: what the weak pass is given for outputs of the cond pass that were let go.

Whatever is computed from it is absent too, also by way of comparisons and indices, so that a prediction that depends on
it is known by its type. Where a value is wanted (by an `if`, or to be written into a real tensor), it raises.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class Origin(Protocol):
    """Where an absent value would have come from."""

    asked: bool
    """Set as soon as the value is wanted: an exception may be swallowed by code that it passes through."""


class AbsentError(RuntimeError):
    """The values of an absent tensor are wanted."""

    def __init__(self, origins: Iterable[Origin]) -> None:
        """Note at all origins that their values are wanted."""
        super().__init__("the values of this tensor were not kept")
        for origin in origins:
            origin.asked = True


class Absent(Tensor):
    """A tensor without values."""

    meta: Tensor
    origins: frozenset[Origin]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, meta: Tensor, device: torch.device, origins: Iterable[Origin]) -> Absent:  # noqa: D417 - cls
        """Make a tensor of the shape and type of another one, without memory.

        Args:
            meta: a tensor on the meta device.
            device: the device that it pretends to be on.
            origins: where its values would have come from.
        """
        absent: Absent = Tensor._make_wrapper_subclass(
            cls, meta.shape, strides=meta.stride(), dtype=meta.dtype, layout=meta.layout, device=device
        )
        absent.meta = meta
        absent.origins = frozenset(origins)
        return absent

    @classmethod
    def like(cls, tensor: Tensor, origin: Origin) -> Absent:
        """Make what stands for a tensor that is no longer kept."""
        return cls(tensor.detach().to("meta"), tensor.device, [origin])

    def data_ptr(self) -> int:
        """Raise: a kernel that asks for an address would read from nowhere."""
        raise AbsentError(self.origins)

    def numpy(self, *, force: bool = False) -> Any:
        """Raise: there is nothing to hand out."""
        raise AbsentError(self.origins)

    def tolist(self) -> Any:
        """Raise: there is nothing to list."""
        raise AbsentError(self.origins)

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise AbsentError(self.origins)

    def __dlpack__(self, *_: Any, **__: Any) -> Any:
        raise AbsentError(self.origins)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """Show what there is: the shape."""
        return f"Absent(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}')"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Compute the shape of a result, which is absent as well.

        Raises:
            AbsentError: the result is no tensor, a real tensor would be written into, or its shape depends on values.
        """
        kwargs = dict(kwargs or {})
        absents = list(absent_in((args, kwargs)))
        origins = frozenset(origin for absent in absents for origin in absent.origins)
        if func._schema.is_mutable:
            return _written(func, args, kwargs, origins)
        device = absents[0].device
        if kwargs.get("device") is not None:
            device, kwargs["device"] = torch.device(kwargs["device"]), torch.device("meta")
        try:
            result = func(*pytree.tree_map(_meta, args), **pytree.tree_map(_meta, kwargs))
        except Exception as error:
            raise AbsentError(origins) from error
        if not all(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result)):
            raise AbsentError(origins)
        return pytree.tree_map(lambda leaf: cls(leaf, device, origins), result)


def absent_in(value: Any) -> Iterable[Absent]:
    """List the absent tensors in a structure."""
    return [leaf for leaf in pytree.tree_leaves(value) if type(leaf) is Absent]


def _meta(leaf: Any) -> Any:
    if type(leaf) is Absent:
        return leaf.meta
    return leaf.to("meta") if isinstance(leaf, Tensor) else leaf


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], origins: frozenset[Origin]) -> Any:
    """Write into an absent tensor, which leaves it absent."""
    named = zip(func._schema.arguments, args, strict=False)
    written = [value for argument, value in named if argument.alias_info and argument.alias_info.is_write]
    others = {argument.name for argument in func._schema.arguments if argument.alias_info} & kwargs.keys()
    if len(written) != 1 or type(written[0]) is not Absent or others or torch.Tag.inplace_view in func.tags:
        raise AbsentError(origins)
    written[0].origins |= origins
    return written[0]
