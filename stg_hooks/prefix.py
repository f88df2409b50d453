"""Prefix sharing: what the weak pass has in common with the cond pass is computed once.

Until the first skipped layer runs, both passes do the same. So the cond pass is recorded: the outputs, cond rows only,
of the blocks that finish before that layer. The weak pass then runs the denoiser again, and those blocks answer from
the record instead of computing. What surrounds the blocks (embeddings of tokens, text and time) is cheap, and runs.

What is kept is what the model itself still holds on to when the first skipped layer starts: one block's output in a
chain of blocks, more in a U-Net. The rest was overwritten; in its place the weak pass is given absent tensors, which
tell when that conclusion was wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from stg_hooks.absent import Absent, AbsentError
from stg_hooks.calls import cut, leaves_of, row_factor
from stg_hooks.effects import Arguments, Randomness, State
from stg_hooks.layers import attention_modules, is_attention
from stg_hooks.patching import Action, Patch, pushed

Place = tuple[int, int]
"""An output of a unit: the unit's `id`, and which of its outputs."""


class PrefixMismatchError(Exception):
    """The weak pass called other modules than the cond pass before the first skipped layer."""


def prefix_units(model: nn.Module, starts: Collection[nn.Module]) -> list[nn.Module]:
    """List the modules whose outputs a prefix is made of: blocks, as large as can be, and those where a prefix ends.

    Args:
        model: the denoiser.
        starts: the modules before which the prefixes of the branches end.

    Returns:
        Modules of which none contains another: `starts`, and entries of lists and modules with attention that hold
        none of them.
    """
    wanted = {id(module) for module in starts}

    def walk(module: nn.Module) -> Iterator[nn.Module]:
        is_list = isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential))
        for child in module.children():
            if id(child) in wanted:
                yield child
            elif _is_container(child) or any(id(inner) in wanted for inner in child.modules()):
                yield from walk(child)
            elif is_list or is_attention(child) or attention_modules(child):
                yield child

    return list({id(unit): unit for unit in walk(model)}.values())


def _is_container(module: nn.Module) -> bool:
    # A module from `torch.compile(block)` has its `forward` on the instance.
    return type(module).forward is nn.Module.forward and "forward" not in module.__dict__


@dataclasses.dataclass(eq=False)
class _Origin:
    """Where an absent tensor comes from."""

    place: Place
    asked: bool = False


class _Leaf:
    """One tensor among a unit's outputs: a copy of its cond rows, as long as anybody can still ask for it."""

    def __init__(self, place: Place, value: Tensor, rows: Tensor, is_needed: bool) -> None:
        self.origin = _Origin(place)
        self.is_needed = is_needed or value.requires_grad or type(value) is not Tensor
        self.storage = StorageWeakRef(value.untyped_storage()) if type(value) is Tensor else None
        self.copy = rows.clone()

    def is_held(self) -> bool:
        """Tell whether the model still holds the output, or a view of it."""
        return self.storage is not None and not self.storage.expired()

    def let_go(self) -> None:
        self.copy = Absent.like(self.copy, self.origin)  # not the leaf, which holds it

    @property
    def is_gone(self) -> bool:
        return type(self.copy) is Absent


@dataclasses.dataclass(frozen=True)
class _Given:
    """An output that is one of the unit's arguments, handed on."""

    index: int


@dataclasses.dataclass
class _Record:
    """One call of a unit."""

    unit: nn.Module
    spec: pytree.TreeSpec | None
    """The structure of its output; `None` for a bare tensor."""
    values: list[Any] | None
    """Its outputs; `None` where they cannot be shared, and the unit has to run again."""

    @property
    def leaves(self) -> list[_Leaf]:
        return [value for value in self.values or () if isinstance(value, _Leaf)]


class Recording:
    """One cond pass, as far as the weak passes can share it."""

    def __init__(
        self,
        model: nn.Module,
        starts: Sequence[Collection[nn.Module]],
        batch: int,
        rows: slice,
        wanted: Collection[Place],
        thorough: bool,
    ) -> None:
        """Start with nothing recorded.

        Args:
            model: the denoiser.
            starts: for each branch, the modules before the first of which its prefix ends.
            batch: number of rows of the call.
            rows: which of them are conditional.
            wanted: outputs to keep, whether or not anybody seems to hold on to them.
            thorough: look for all that could be in the way, not only for what is found at no cost.
        """
        self.batch = batch
        self.rows = rows
        self.records: list[_Record] = []
        self.ends: list[int | None] = [None] * len(starts)
        self.obstacle: str | None = None
        """What the prefix does besides returning something, so that it cannot be shared."""
        self.has_new_state = False
        """The prefix has changed something that the model keeps; the first time that may be a cache."""
        self.is_complete = False
        """The prefixes of all branches have ended."""
        self.is_broken = False
        """A weak pass called other modules."""
        self._model = model
        self._starts = [{id(module) for module in modules} for modules in starts]
        self._wanted = wanted
        self._thorough = thorough
        self._state: State | None = None
        self._randomness: Randomness | None = None
        self._live: list[_Leaf] = []
        self._inside = False

    # --- the cond pass

    def action(self, unit: nn.Module) -> Action:
        """Return what a unit does during the cond pass: compute, and have its output recorded."""

        def record(proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self.is_complete or torch.compiler.is_compiling():  # what is traced cannot be recorded
                return proceed(*args, **kwargs)
            self._note_ends(unit)  # also if another unit calls it, which is then not part of the prefix
            if self._inside or self.is_complete:
                return proceed(*args, **kwargs)
            given = Arguments(args, kwargs, self._thorough)
            self._begin(given)
            self._inside = True
            try:
                output = proceed(*args, **kwargs)
            finally:
                self._inside = False
            if not self.is_complete:
                self._append(unit, given, output)
            return output

        return record

    def _begin(self, given: Arguments) -> None:
        if self._randomness is None:
            self._randomness = Randomness(given.tensors[0].device if given.tensors else torch.device("cpu"))
            self._state = State(self._model) if self._thorough else None
        # Let go what nobody holds any more before the next block allocates. The last output may be held in another
        # form: a hook or the model itself may have converted it.
        last = self.records[-1].leaves if self.records else []
        for leaf in self._live:
            if not leaf.is_needed and not leaf.is_held() and not any(leaf is other for other in last):
                leaf.let_go()
        self._live = [leaf for leaf in self._live if not leaf.is_gone]

    def _note_ends(self, unit: nn.Module) -> None:
        for branch, starts in enumerate(self._starts):
            if self.ends[branch] is None and id(unit) in starts:
                self.ends[branch] = len(self.records)
                last = self.records[-1].leaves if self.records else []
                for leaf in self._live:
                    leaf.is_needed = leaf.is_needed or leaf.is_held() or any(leaf is other for other in last)
                self.is_complete = all(end is not None for end in self.ends)
        if self.is_complete:
            self.finish()

    def finish(self) -> None:
        """Conclude what can be shared, at the end of the prefixes or of the pass."""
        for leaf in self._live:
            if not leaf.is_needed:
                leaf.let_go()
        self._live.clear()
        if self._randomness is not None and self._randomness.is_used():
            self.obstacle = "it draws random numbers"
        if self._state is not None and self._state.is_changed():
            self.has_new_state = True
        self._state = self._randomness = None

    def _append(self, unit: nn.Module, given: Arguments, output: Any) -> None:
        values, spec = ([output], None) if isinstance(output, Tensor) else pytree.tree_flatten(output)
        if given.are_changed():
            self.obstacle = f"{type(unit).__name__} writes into its arguments"
        sources = {id(leaf): i for i, leaf in enumerate(given.leaves)}
        storages = {_storage(tensor) for tensor in given.tensors}
        seen: dict[int, _Leaf] = {}
        outputs: list[Any] = []
        for i, value in enumerate(values):
            if not isinstance(value, Tensor):
                outputs.append(value)
            elif id(value) in sources:
                outputs.append(_Given(sources[id(value)]))
            elif not self._has_known_rows(value) or _storage(value) in storages:
                break  # a view of an argument is still one when the argument changes
            else:
                leaf = seen.get(id(value)) or self._leaf((id(unit), i), value)
                seen[id(value)] = leaf
                outputs.append(leaf)
        can_share = len(outputs) == len(values) and all(_is_plain(value) for value in outputs)
        self.records.append(_Record(unit, spec, outputs if can_share else None))
        if can_share:
            self._live += seen.values()
        else:  # it will run again, on what it was given
            for leaf in self._live:
                leaf.is_needed = leaf.is_needed or leaf.storage in storages

    def _has_known_rows(self, value: Tensor) -> bool:
        if self.rows == slice(None):
            return True
        folded = row_factor(value, self.batch)
        # Frames are folded into maps. Anything flatter may be a table with an entry per token (Mochi's positions).
        return folded is not None and (folded <= 1 or value.ndim >= 4)

    def _leaf(self, place: Place, value: Tensor) -> _Leaf:
        folded = 0 if self.rows == slice(None) else row_factor(value, self.batch) or 0
        return _Leaf(place, value, cut(value, self.rows, self.batch, folded), place in self._wanted)

    # --- the weak passes

    def answered(self, branch: int) -> list[int]:
        """List the units (by `id`) that answer from the record in a branch's weak pass."""
        return [id(record.unit) for record in self.records[: self.ends[branch]] if record.values is not None]

    def asked(self) -> set[Place]:
        """List the outputs that were let go and, as it turned out, are wanted."""
        origins = (leaf.origin for record in self.records for leaf in record.leaves)
        return {origin.place for origin in origins if origin.asked}

    @contextmanager
    def replayed(self, branch: int, patches: Sequence[Patch], units: Sequence[nn.Module]) -> Iterator[None]:
        """Let units answer from the record within a `with`, until the branch's prefix ends.

        Args:
            branch: which branch's weak pass this is.
            patches: the patches of the units.
            units: the modules that a prefix is made of.

        Raises:
            PrefixMismatchError: the pass called other modules than the recorded one, or not all of them.
            AbsentError: an output that was let go is wanted.
        """
        end = self.ends[branch]
        assert end is not None
        position = 0
        inside = False

        def action_of(unit: nn.Module) -> Action:
            def replay(proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                nonlocal position, inside
                if inside or position == end:
                    return self._run(proceed, args, kwargs)
                record = self.records[position]
                if record.unit is not unit:
                    self.is_broken = True
                    raise PrefixMismatchError
                position += 1
                if record.values is not None:
                    return self._answer(record, args, kwargs)
                inside = True
                try:
                    return self._run(proceed, args, kwargs)
                finally:
                    inside = False

            return replay

        with pushed(patches, [action_of(unit) for unit in units]):
            yield
        if position != end:
            self.is_broken = True
            raise PrefixMismatchError

    @staticmethod
    def _run(proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        absents = [leaf for leaf in leaves_of(args, kwargs) if type(leaf) is Absent]
        if absents:
            raise AbsentError(origin for absent in absents for origin in absent.origins)
        return proceed(*args, **kwargs)

    def _answer(self, record: _Record, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert record.values is not None
        # Later code may write into what it is given, and another branch may need it again.
        several = len(self.ends) > 1
        given = leaves_of(args, kwargs)
        copies = {id(leaf): leaf.copy.clone() if several else leaf.copy for leaf in record.leaves}
        values = []
        for value in record.values:
            if isinstance(value, _Leaf):
                values.append(copies[id(value)])
            else:
                values.append(given[value.index] if isinstance(value, _Given) else value)
        return values[0] if record.spec is None else pytree.tree_unflatten(values, record.spec)


def _storage(tensor: Tensor) -> StorageWeakRef | None:
    return StorageWeakRef(tensor.untyped_storage()) if type(tensor) in (Tensor, nn.Parameter) else None


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, (_Leaf, _Given, bool, int, float, str))
