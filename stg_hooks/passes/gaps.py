"""What stands for a value that was let go, and tells when it is wanted after all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class GapError(Exception):
    """A value is wanted that was let go."""

    def __init__(self, name: str = "", calls: frozenset[int] = frozenset()) -> None:
        """Say what wants it.

        Args:
            name: of the torch function.
            calls: the numbers of the calls whose outputs it comes from; none where that is not known.
        """
        super().__init__(name)
        self.calls = calls


class _OfThread(threading.local):
    are_free = False
    """Gaps may be computed with: whatever comes out is let go, too, before it can matter."""


GAPS = _OfThread()


@contextmanager
def gaps(are_free: bool) -> Iterator[None]:
    """Say within a `with` whether gaps may be computed with."""
    before, GAPS.are_free = GAPS.are_free, are_free
    try:
        yield
    finally:
        GAPS.are_free = before


class Gap(Tensor):
    """A tensor of NaN, and what is computed from it.

    NaN alone would not tell: it is lost in a comparison, a mask or `nan_to_num`.
    """

    calls: frozenset[int] = frozenset()
    """The numbers of the calls whose outputs it comes from."""

    @classmethod
    def of(cls, rows: Tensor, calls: frozenset[int]) -> Gap:
        """Return a gap in the place of a tensor."""
        gap = rows.as_subclass(cls)
        gap.calls = calls
        return gap

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Compute with gaps while that cannot matter, and give gaps."""
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # what comes out is a gap still
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        name = getattr(func, "__name__", "")
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Gap)]
        calls = frozenset[int]().union(*(gap.calls for gap in given))
        if name in _READS or (_writes(name, kwargs) and not isinstance(kwargs.get("out", args[0]), Gap)):
            raise GapError(name, calls)
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)
        if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(found)):
            return found  # a shape, a type
        if not GAPS.are_free:
            raise GapError(name, calls)
        return pytree.tree_map_only(Tensor, lambda tensor: cls.of(tensor, calls), found)


_READS = {"item", "tolist", "numpy", "equal", "allclose", "is_nonzero", "__contains__", "__array__", "__dlpack__"}
_READS |= {"__bool__", "__float__", "__int__", "__index__", "__complex__"}


def _writes(name: str, kwargs: dict[str, Any]) -> bool:
    is_inplace = name.endswith("_") and not name.endswith("__")
    is_operator = name.startswith("__i") and name not in ("__invert__", "__index__", "__int__")
    return kwargs.get("out") is not None or is_inplace or is_operator or name == "__setitem__"
