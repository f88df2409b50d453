"""Notice what a part of a model does besides returning something.

Answering from a record for a module that also writes into its arguments, leaves something in an attribute or draws
random numbers would leave all of that undone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stg_hooks.passes.entries import Entries, other_leaves
from stg_hooks.passes.rows import leaves_of

# What every module has; parameters, which offloading hooks move about; and what these hooks leave on modules.
NO_STATE = {*nn.Module().__dict__, "_hf_hook", "_diffusers_hook"}
_DEPTH = 3

Marks = list[tuple[object, object]]


class Arguments:
    """What a module is given, before it runs."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at the arguments of a call, into objects, and at values where torch does not count writes.

        Args:
            args: its positional arguments.
            kwargs: its keyword arguments.
        """
        self._args, self._kwargs = args, kwargs
        self.entries = Entries(args, kwargs)
        self.leaves = other_leaves(args, kwargs)
        self.tensors = [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]
        self._marks = self._look()

    def written(self) -> list[int] | None:
        """List the leaves that were written into; `None` where a list or an object changed."""
        leaves, now = other_leaves(self._args, self._kwargs), self._look()
        if len(now) != len(self._marks) or any(
            a is not b for a, b in zip(self.leaves, leaves, strict=True) if isinstance(a, Tensor)
        ):
            return None
        changed = [i for i, (a, b) in enumerate(zip(self._marks, now, strict=True)) if not _equal(a, b)]
        return None if any(not isinstance(self.leaves[i], Tensor) for i in changed) else changed

    def _look(self) -> list[Marks]:
        return [[*_walk(leaf, _DEPTH)] for leaf in other_leaves(self._args, self._kwargs)]


class Randomness:
    """Where torch's own random numbers stand."""

    def __init__(self, device: torch.device) -> None:
        """Look at the generators of the CPU and of a device."""
        self._device = device
        self._states = self._look()

    @classmethod
    def for_call(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Randomness:
        """Look at the generators that a call with these arguments would use."""
        tensors = [leaf for leaf in leaves_of(args, kwargs) if isinstance(leaf, Tensor)]
        return cls(tensors[0].device if tensors else torch.device("cpu"))

    def is_used(self) -> bool:
        """Tell whether random numbers were drawn since."""
        return any(not torch.equal(a, b) for a, b in zip(self._states, self._look(), strict=True))

    def put_back(self) -> None:
        """Let the next numbers be those that were next."""
        torch.set_rng_state(self._states[0])
        for state in self._states[1:]:
            torch.cuda.set_rng_state(state, self._device)

    def _look(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        if self._device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self._device))
        return states


def _walk(value: object, depth: int) -> Iterator[tuple[object, object]]:
    if isinstance(value, Tensor):
        yield value, value.clone() if value.is_inference() else count_of_writes(value)
        return
    yield value, None
    if not depth or isinstance(value, (nn.Module, type)):
        return
    if isinstance(value, Mapping):
        children = [*value.keys(), *value.values()]
    elif isinstance(value, (list, tuple, set, frozenset)):
        children = [*value]
    else:
        children = [*getattr(value, "__dict__", {}).values()]
    for child in children:
        yield from _walk(child, depth - 1)


def count_of_writes(tensor: Tensor) -> object:
    """Return a number that a write into the tensor changes; nothing in inference mode, where torch does not count."""
    return None if tensor.is_inference() else tensor._version


def _equal(before: Marks, after: Marks) -> bool:
    def same(a: object, b: object) -> bool:
        return a is b or (isinstance(a, (int, float, str)) and type(a) is type(b) and a == b)

    def unwritten(a: object, b: object) -> bool:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return bool(((a == b) | ((a != a) & (b != b))).all())
        return a == b

    pairs = zip(before, after, strict=False)
    return len(before) == len(after) and all(same(a, c) and unwritten(b, d) for (a, b), (c, d) in pairs)
