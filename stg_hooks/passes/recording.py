"""Record a cond pass: the first one of its layout, which finds out all, and those after it, which know what to keep."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from stg_hooks.passes.effects import Arguments, State, count_of_writes
from stg_hooks.passes.prefix import Given, Leaf, Origin, Place, Prefix, Record
from stg_hooks.passes.rows import Indices, cut, leaves_of, row_factor


class _LiveLeaf:
    """An output, as long as it is open whether anybody can still ask for it."""

    def __init__(self, leaf: Leaf, value: Tensor, is_needed: bool) -> None:
        self.leaf = leaf
        self.is_needed = is_needed or value.requires_grad or type(value) is not Tensor
        self.storage = StorageWeakRef(value.untyped_storage()) if type(value) is Tensor else None

    def is_held(self) -> bool:
        """Tell whether the model still holds the output, or a view of it."""
        return self.storage is not None and not self.storage.expired()


class Recording(Prefix):
    """The prefix of a call of which nothing is known yet."""

    def __init__(
        self,
        starts: Sequence[Collection[int]],
        batch: int,
        rows: Indices,
        wanted: Collection[Place],
        state: State | None,
    ) -> None:
        """Start with nothing recorded.

        Args:
            starts: for each branch, the modules (by `id`) before the first of which its prefix ends.
            batch: number of rows of the call.
            rows: which of them are conditional.
            wanted: outputs to keep, whether or not anybody seems to hold on to them.
            state: what the denoiser keeps, as it is before the call; `None` not to look.
        """
        super().__init__(starts, batch, rows)
        self._wanted = wanted
        self._with_grad = torch.is_grad_enabled()
        self._state = state
        self._live: list[_LiveLeaf] = []
        self._last: list[_LiveLeaf] = []

    def _begin(self, unit: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[Any], None]:
        given = Arguments(args, kwargs)
        # Let go what nobody holds any more before the next block allocates. The last output may be held in another
        # form: a hook or the model itself may have converted it.
        for live in self._live:
            if not live.is_needed and not live.is_held() and live not in self._last:
                live.leaf.let_go()
        self._live = [live for live in self._live if live.leaf.is_kept]
        return lambda output: self._append(unit, given, output)

    def _end(self, branch: int) -> None:
        for live in self._live:
            live.is_needed = live.is_needed or live.is_held() or live in self._last

    def finish(self) -> None:
        """Conclude what can be shared, at the end of the prefixes or of the pass."""
        super().finish()
        for live in self._live:
            if not live.is_needed:
                live.leaf.let_go()
        self._live.clear()
        self._last.clear()
        if self._state is not None and self._state.is_changed():
            self.has_new_state = True
        self._state = None

    def _append(self, unit: nn.Module, given: Arguments, output: Any) -> None:
        values, spec = ([output], None) if isinstance(output, Tensor) else pytree.tree_flatten(output)
        if self._with_grad and not torch.is_grad_enabled():
            self.obstacle = "it computes without gradients inside, as reentrant checkpointing does"
        if given.are_changed():
            self.obstacle = f"{type(unit).__name__} writes into its arguments"
        sources = {id(leaf): i for i, leaf in enumerate(given.leaves)}
        storages = {_storage(tensor) for tensor in given.tensors}
        seen: dict[int, _LiveLeaf] = {}
        outputs: list[Any] = []
        for i, value in enumerate(values):
            if not isinstance(value, Tensor):
                outputs.append(value)
            elif id(value) in sources:
                outputs.append(Given(sources[id(value)]))
            elif not self._has_known_rows(value) or _storage(value) in storages:
                break  # a view of an argument is still one when the argument changes
            else:
                live = seen.get(id(value)) or self._new((id(unit), i), value, bool(unit._forward_hooks))
                seen[id(value)] = live
                outputs.append(live.leaf)
        can_share = len(outputs) == len(values) and all(_is_plain(value) for value in outputs)
        self.records.append(Record(unit, spec, outputs if can_share else None))
        self._last = list(seen.values()) if can_share else []
        self._live += self._last
        if not can_share:  # it will run again, on what it was given
            for live in self._live:
                live.is_needed = live.is_needed or live.storage in storages

    def _has_known_rows(self, value: Tensor) -> bool:
        if self.rows == slice(None):
            return True
        folded = row_factor(value, self.batch)
        # Frames are folded into maps. Anything flatter may be a table with an entry per token (Mochi's positions).
        return folded is not None and (folded <= 1 or value.ndim >= 4)

    def _new(self, place: Place, value: Tensor, is_watched: bool) -> _LiveLeaf:
        folded = 0 if self.rows == slice(None) else row_factor(value, self.batch) or 0
        leaf = Leaf(Origin(place), cut(value, self.rows, self.batch, folded).clone(), value.shape, folded)
        return _LiveLeaf(leaf, value, is_watched or place in self._wanted)


class Layout:
    """What the prefixes of all calls of one layout have in common: which outputs are kept, and what all look like."""

    def __init__(self, recording: Recording) -> None:
        """Remember what a recording has found out, without its values."""
        self.ends = list(recording.ends)
        self.records = [_without_values(record) for record in recording.records]


class Repetition(Prefix):
    """The prefix of a call whose layout is known: nothing is copied but what will be asked for."""

    def __init__(self, layout: Layout, starts: Sequence[Collection[int]], batch: int, rows: Indices) -> None:
        """Start with nothing recorded.

        Args:
            layout: what is known.
            starts: for each branch, the modules (by `id`) before the first of which its prefix ends.
            batch: number of rows of the call.
            rows: which of them are conditional.
        """
        super().__init__(starts, batch, rows)
        self.records = list(layout.records)
        self.differs = False
        """This call goes another way than the ones before it."""
        self._layout = layout

    def _begin(self, unit: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[Any], None]:
        position = self._position
        if position == len(self.records) or self.records[position].unit is not unit:
            self._differ()
            return lambda _: None
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        writes = [count_of_writes(tensor) for tensor in tensors]

        def conclude(output: Any) -> None:
            if writes != [count_of_writes(tensor) for tensor in tensors]:
                self.obstacle = f"{type(unit).__name__} writes into its arguments"
            self._take(position, args, kwargs, output)

        return conclude

    def _end(self, branch: int) -> None:
        if self.ends[branch] != self._layout.ends[branch]:
            self._differ()

    def _differ(self) -> None:
        self.differs = self.is_complete = True

    def _take(self, position: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        record = self.records[position]
        if record.values is None:
            return None
        values, spec = ([output], None) if isinstance(output, Tensor) else pytree.tree_flatten(output)
        if spec != record.spec:
            return self._differ()
        leaves = leaves_of(args, kwargs) if any(isinstance(value, Given) for value in record.values) else []
        taken: dict[Leaf, Leaf] = {}
        outputs: list[Any] = []
        for value, known in zip(values, record.values, strict=True):
            if isinstance(known, Leaf):
                if not isinstance(value, Tensor) or value.shape != known.shape or value.dtype != known.rows.dtype:
                    return self._differ()
                if known.is_kept and known not in taken:
                    rows = cut(value, self.rows, self.batch, known.folded).clone()
                    taken[known] = Leaf(known.origin, rows, known.shape, known.folded)
                outputs.append(taken.get(known, known))
            elif isinstance(known, Given):
                if value is not leaves[known.index]:
                    return self._differ()
                outputs.append(known)
            elif type(value) is not type(known) or value != known:
                return self._differ()
            else:
                outputs.append(known)
        if taken:
            self.records[position] = Record(record.unit, record.spec, outputs)
        return None


def _without_values(record: Record) -> Record:
    if record.values is None:
        return record
    empty = {leaf: dataclasses.replace(leaf) for leaf in record.leaves}
    for leaf in empty.values():
        if leaf.is_kept:
            leaf.let_go()
            leaf.is_kept = True
    return Record(record.unit, record.spec, [empty[v] if isinstance(v, Leaf) else v for v in record.values])


def _storage(tensor: Tensor) -> StorageWeakRef | None:
    return StorageWeakRef(tensor.untyped_storage()) if type(tensor) in (Tensor, nn.Parameter) else None


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, (Leaf, Given, bool, int, float, str))
