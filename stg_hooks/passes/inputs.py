"""The arguments of a call, for the passes that are made after one that may change them.

Some denoisers take residuals out of the lists that they are given, or scale a timestep in place. A pass that is made
with what they have left behind is another one.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from stg_hooks.errors import CallError
from stg_hooks.passes.effects import count_of_writes

Written: TypeAlias = dict[Hashable, frozenset[int]]
"""By the names and the number of a call's arguments: which of its leaves the denoiser writes into."""


class Inputs:
    """The arguments of a call as they were made, and as many copies of them as there are further passes."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], written: Written) -> None:
        """Look at the arguments of a call, before it is made.

        Args:
            args: its positional arguments.
            kwargs: its keyword arguments.
            written: what is known of other calls of the denoiser. Of a kind of call that is not known yet all tensors
                are copied, until it has been made.
        """
        self.given = args, kwargs
        """The arguments themselves."""
        self._leaves, self._spec = pytree.tree_flatten((args, kwargs))
        self._written = written
        self._key = len(args), *kwargs, len(self._leaves)
        self._known = written.get(self._key)
        self._copies = {
            i: leaf.clone()
            for i, leaf in enumerate(self._leaves)
            if isinstance(leaf, Tensor) and (self._known is None or i in self._known)
        }
        self._writes = [count_of_writes(leaf) if isinstance(leaf, Tensor) else None for leaf in self._leaves]

    def are(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Tell whether these arguments are the same objects."""
        own, named = self.given
        pairs = zip((*own, *named.values()), (*args, *kwargs.values()), strict=False)
        return (len(args), *kwargs) == (len(own), *named) and all(a is b for a, b in pairs)

    def compare(self) -> None:
        """Find out what a pass on the arguments themselves has written into.

        Raises:
            CallError: a tensor into which the passes before did not write; its values are lost.
        """
        found = frozenset(i for i in range(len(self._leaves)) if self._is_changed(i))
        if self._known is None:
            self._known = self._written[self._key] = found
            self._copies = {i: self._copies[i] for i in found}
        elif not found <= self._known:
            i = min(found - self._known)
            raise CallError(
                f"the model wrote into a tensor of its call, of shape {tuple(self._leaves[i].shape)}, which it did not "
                "do in the calls before: its values are lost, and the weak pass needs them. Have it write into a copy."
            )

    def again(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments for one more pass: in lists and dictionaries of its own, with tensors to write into."""
        leaves = [self._copies[i].clone() if i in self._copies else leaf for i, leaf in enumerate(self._leaves)]
        arguments: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(leaves, self._spec)
        return arguments

    def _is_changed(self, i: int) -> bool:
        leaf = self._leaves[i]
        if not isinstance(leaf, Tensor):
            return False
        if not leaf.is_inference():
            return bool(count_of_writes(leaf) != self._writes[i])
        if i not in self._copies or leaf.device.type == "meta":  # torch does not count writes in inference mode
            return i in (self._known or ())
        same = (leaf == self._copies[i]) | ((leaf != leaf) & (self._copies[i] != self._copies[i]))
        return not bool(torch.all(same))
