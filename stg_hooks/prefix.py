"""Prefix sharing: what the weak pass has in common with the cond pass is computed once.

Until the first skipped layer runs, both passes do the same. So the cond pass is recorded: the outputs, cond rows only,
of the modules that finish before that layer. The weak pass then runs the denoiser again, and those modules answer from
the record instead of computing.

What is kept is what the model itself still holds on to when the first skipped layer starts: one block's output in a
chain of blocks, more in a U-Net. All else was overwritten, so nothing can ask for it; in its place the weak pass is
given NaN, which reaches the prediction if that conclusion is ever wrong, and is looked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from stg_hooks.calls import cut, row_factor
from stg_hooks.patching import Action, Patch, pushed


class PrefixMismatchError(Exception):
    """The weak pass called other modules than the cond pass before the first skipped layer."""


def prefix_units(model: nn.Module, skipped: Sequence[nn.Module]) -> list[nn.Module]:
    """List the modules whose outputs a prefix is made of: the largest that hold no skipped layer, and those layers.

    Args:
        model: the denoiser.
        skipped: the layers that any branch skips.

    Returns:
        Modules of which none contains another, `ModuleList`s and the like opened up.
    """
    wanted = {id(module) for module in skipped}

    def holds_skipped(module: nn.Module) -> bool:
        return any(id(child) in wanted for child in module.modules())

    def walk(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            if id(child) in wanted:
                yield child
            elif type(child).forward is nn.Module.forward or holds_skipped(child):
                yield from walk(child)
            else:
                yield child

    return list({id(unit): unit for unit in walk(model)}.values())


@dataclasses.dataclass
class _Leaf:
    """One tensor among a unit's outputs: a copy of its cond rows, as long as anybody can still ask for it."""

    copy: Tensor | None
    size: int
    nan: Tensor | None
    original: StorageWeakRef | None
    """Whether the model still holds the output, or a view of it; `None` where that cannot be told."""
    needed: bool = False

    @classmethod
    def of(cls, value: Tensor, kept: Tensor, keep: bool) -> _Leaf:
        # What has a gradient to carry, cannot be NaN or is no plain tensor is kept, whoever holds on to it.
        if keep or value.requires_grad or not value.is_floating_point() or type(value) is not Tensor:
            return cls(kept.clone(), value.numel(), None, None)
        nan = kept.new_full((), torch.nan).expand(kept.shape)  # takes no memory
        return cls(kept.clone(), value.numel(), nan, StorageWeakRef(value.untyped_storage()))

    def is_held(self) -> bool:
        return self.original is None or not self.original.expired()


@dataclasses.dataclass
class _Record:
    unit: nn.Module
    leaves: list[Any]
    spec: pytree.TreeSpec
    is_shared: bool


class Recording:
    """One cond pass, as far as the weak passes can share it."""

    def __init__(self, skipped: Sequence[Sequence[nn.Module]], batch: int, rows: slice, keep_all: bool) -> None:
        """Start with nothing recorded.

        Args:
            skipped: the layers that each branch skips.
            batch: number of rows of the call.
            rows: which of them are conditional.
            keep_all: keep every output, also those that nobody seems to hold on to.
        """
        self.batch = batch
        self.rows = rows
        self.records: list[_Record] = []
        self.ends: list[int | None] = [None] * len(skipped)
        self._skipped = [{id(module) for module in modules} for modules in skipped]
        self._keep_all = keep_all
        self._live: list[_Leaf] = []
        self._largest = 0
        self._inside = False

    def action(self, unit: nn.Module) -> Action:
        """Return what a unit does during the cond pass: compute, and have its output recorded."""

        def record(proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._inside:
                return proceed(*args, **kwargs)
            self._note_ends(unit)
            if all(end is not None for end in self.ends):
                return proceed(*args, **kwargs)
            self._inside = True
            try:
                output = proceed(*args, **kwargs)
            finally:
                self._inside = False
            self._append(unit, output)
            return output

        return record

    def _note_ends(self, unit: nn.Module) -> None:
        for branch, skipped in enumerate(self._skipped):
            if self.ends[branch] is None and id(unit) in skipped:
                self.ends[branch] = len(self.records)
                last = self.records[-1].leaves if self.records else []
                for leaf in self._live:
                    leaf.needed = leaf.needed or leaf.is_held() or any(leaf is other for other in last)

    def _append(self, unit: nn.Module, output: Any) -> None:
        values, spec = pytree.tree_flatten(output)
        # Drop what nobody holds any more before the new copy is made: at most two of a chain's outputs exist at once.
        # Small outputs (embeddings of time or text) are worth keeping for those who use something computed from them.
        self._largest = max([self._largest, *(value.numel() for value in values if isinstance(value, Tensor))])
        for leaf in self._live:
            if not leaf.needed and not leaf.is_held() and 4 * leaf.size > self._largest:
                leaf.copy = None
        self._live = [leaf for leaf in self._live if leaf.copy is not None]
        shared = all(self._can_share(value) for value in values)
        leaves = [self._leaf(value) if shared and isinstance(value, Tensor) else value for value in values]
        self.records.append(_Record(unit, leaves if shared else [], spec, shared))
        self._live += [leaf for leaf in leaves if isinstance(leaf, _Leaf)]

    def _can_share(self, value: Any) -> bool:
        if isinstance(value, Tensor):
            if self.rows == slice(None):
                return True
            folded = row_factor(value, self.batch)
            # Frames are folded into maps. Anything flatter may be a table with an entry per token (Mochi's positions).
            return folded is not None and (folded <= 1 or value.ndim >= 4)
        return value is None or isinstance(value, (bool, int, float, str))

    def _leaf(self, value: Tensor) -> _Leaf:
        folded = 0 if self.rows == slice(None) else row_factor(value, self.batch) or 0
        return _Leaf.of(value, cut(value, self.rows, self.batch, folded), self._keep_all)

    def answered(self, branch: int) -> list[int]:
        """List the units (by `id`) that answer from the record in a branch's weak pass."""
        return [id(record.unit) for record in self.records[: self.ends[branch]] if record.is_shared]

    def poisoned(self, branch: int) -> tuple[int, ...]:
        """Say which records of a branch's prefix have outputs that were let go: an identity of what was concluded."""
        return tuple(
            position
            for position, record in enumerate(self.records[: self.ends[branch]])
            if any(isinstance(leaf, _Leaf) and leaf.copy is None for leaf in record.leaves)
        )

    @contextmanager
    def replayed(self, branch: int, patches: Sequence[Patch], units: Sequence[nn.Module]) -> Iterator[None]:
        """Let units answer from the record within a `with`, until the branch's first skipped layer.

        Args:
            branch: which branch's weak pass this is.
            patches: the patches of the units.
            units: the modules that a prefix is made of.

        Raises:
            PrefixMismatchError: the pass called other modules than the recorded one, or not all of them.
        """
        end = self.ends[branch]
        assert end is not None
        position = 0
        inside = False

        def action_of(unit: nn.Module) -> Action:
            def replay(proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                nonlocal position, inside
                if inside or position == end:
                    return proceed(*args, **kwargs)
                record = self.records[position]
                if record.unit is not unit:
                    raise PrefixMismatchError
                position += 1
                if record.is_shared:
                    return self._answer(record)
                inside = True
                try:
                    return proceed(*args, **kwargs)
                finally:
                    inside = False

            return replay

        with pushed(patches, [action_of(unit) for unit in units]):
            yield
        if position != end:
            raise PrefixMismatchError

    def _answer(self, record: _Record) -> Any:
        # Later code may write into what it is given, and another branch may need it again.
        several = len(self.ends) > 1
        values = []
        for leaf in record.leaves:
            if not isinstance(leaf, _Leaf):
                values.append(leaf)
            elif leaf.copy is None:
                values.append(leaf.nan)
            else:
                values.append(leaf.copy.clone() if several else leaf.copy)
        return pytree.tree_unflatten(values, record.spec)
