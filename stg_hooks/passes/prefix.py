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
from torch.utils import _pytree as pytree

from stg_hooks.hooks.forward import Action, Patch, pushed
from stg_hooks.model.layers import attention_modules, is_attention
from stg_hooks.passes.absent import Absent, AbsentError
from stg_hooks.passes.effects import Randomness
from stg_hooks.passes.rows import Indices, leaves_of

DRAWS_RANDOM_NUMBERS = "it draws random numbers"

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
class Origin:
    """Where an absent tensor comes from."""

    place: Place
    asked: bool = False


@dataclasses.dataclass(eq=False)
class Leaf:
    """One tensor among a unit's outputs."""

    origin: Origin
    rows: Tensor
    """Its cond rows: a copy, or absent."""
    shape: torch.Size
    """Of all its rows."""
    folded: int
    """Entries of dimension 0 per row, 0 where every row is conditional."""
    is_kept: bool = True

    def let_go(self) -> None:
        """Forget the values: nobody can ask for them any more, it seems."""
        self.rows, self.is_kept = Absent.like(self.rows, self.origin), False


@dataclasses.dataclass(frozen=True)
class Given:
    """An output that is one of the unit's arguments, handed on."""

    index: int


@dataclasses.dataclass
class Record:
    """One call of a unit."""

    unit: nn.Module
    spec: pytree.TreeSpec | None
    """The structure of its output; `None` for a bare tensor."""
    values: list[Any] | None
    """Its outputs; `None` where they cannot be shared, and the unit has to run again."""

    @property
    def leaves(self) -> list[Leaf]:
        """The tensors among them that are not handed on."""
        return [value for value in self.values or () if isinstance(value, Leaf)]


class Prefix:
    """What the weak passes of one call can share with its cond pass; filled while that runs."""

    def __init__(self, starts: Sequence[Collection[int]], batch: int, rows: Indices) -> None:
        """Start with nothing.

        Args:
            starts: for each branch, the modules (by `id`) before the first of which its prefix ends.
            batch: number of rows of the call.
            rows: which of them are conditional.
        """
        self.batch = batch
        self.rows = rows
        self.records: list[Record] = []
        self.ends: list[int | None] = [None] * len(starts)
        self.obstacle: str | None = None
        """What the prefix does besides returning something, so that it cannot be shared."""
        self.has_new_state = False
        """The prefix has changed something that the model keeps; the first time that may be a cache."""
        self.is_complete = False
        """The prefixes of all branches have ended."""
        self.is_broken = False
        """A weak pass called other modules."""
        self.is_reused = len(starts) > 1
        """More than one pass is going to be made with it."""
        self._starts = starts
        self._inside = False
        self._position = 0
        self._randomness: Randomness | None = None

    # --- the cond pass

    def action(self, unit: nn.Module) -> Action:
        """Return what a unit does during the cond pass: compute, and have its output recorded."""

        def record(proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if torch.compiler.is_compiling():  # what is traced cannot be recorded
                return proceed(*args, **kwargs)
            if not self.is_complete:
                self._note_ends(unit)  # also if another unit calls it, which is then not part of the prefix
            if self._inside or self.is_complete:
                return proceed(*args, **kwargs)
            if self._randomness is None:
                self._randomness = Randomness.for_call(args, kwargs)
            conclude = self._begin(unit, args, kwargs)
            self._inside = True
            try:
                output = proceed(*args, **kwargs)
            finally:
                self._inside = False
            if not self.is_complete:
                conclude(output)
                self._position += 1
            return output

        return record

    def _begin(self, unit: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[Any], None]:
        """Look at a call before it is made; return what looks at its output."""
        raise NotImplementedError

    def _end(self, branch: int) -> None:
        """Look at what is there when a branch's prefix ends."""

    def _note_ends(self, unit: nn.Module) -> None:
        for branch, starts in enumerate(self._starts):
            if self.ends[branch] is None and id(unit) in starts:
                self.ends[branch] = self._position
                self._end(branch)
        self.is_complete = self.is_complete or all(end is not None for end in self.ends)
        if self.is_complete:
            self.finish()

    def finish(self) -> None:
        """Conclude what can be shared, at the end of the prefixes or of the pass."""
        if self._randomness is not None and self._randomness.is_used():
            self.obstacle = DRAWS_RANDOM_NUMBERS
        self._randomness = None

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

    def _answer(self, record: Record, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert record.values is not None
        # Later code may write into what it is given, and another pass may need it again.
        copies = {leaf: leaf.rows.clone() if self.is_reused and leaf.is_kept else leaf.rows for leaf in record.leaves}
        if record.spec is None and copies:
            return copies[record.values[0]]
        given = leaves_of(args, kwargs)
        values = []
        for value in record.values:
            if isinstance(value, Leaf):
                values.append(copies[value])
            else:
                values.append(given[value.index] if isinstance(value, Given) else value)
        return values[0] if record.spec is None else pytree.tree_unflatten(values, record.spec)
