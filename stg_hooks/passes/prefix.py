"""Prefix sharing: what the weak pass has in common with the cond pass is computed once.

Until the first skipped layer runs, both passes do the same. So the cond pass is recorded: what the blocks that finish
before that layer return, and what they write into their arguments, cond rows only. The weak pass then runs the denoiser
again, and those blocks answer from the record instead of computing. What surrounds the blocks (embeddings of tokens,
text and time) is cheap, and runs.

What is kept is what the model itself still holds when the first skipped layer starts: one block's output in a chain of
blocks, more in a U-Net. The rest was overwritten; in its place the weak pass is given a gap, which holds NaN and raises
where that conclusion was wrong: when the model computes with it after the prefix, or asks for its numbers.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stg_hooks.hooks.forward import Action, Patch, pushed
from stg_hooks.passes.entries import Entry, other_leaves, set_again
from stg_hooks.passes.gaps import GAPS, Gap, gaps
from stg_hooks.passes.rows import Indices

if TYPE_CHECKING:
    from stg_hooks.passes.state import Snapshot

DRAWS_RANDOM_NUMBERS = "it draws random numbers"


class PrefixMismatchError(Exception):
    """The weak pass called other modules than the cond pass before the first skipped layer."""


@dataclasses.dataclass(eq=False)
class Output:
    """One tensor that a unit returns, or writes into its argument."""

    rows: Tensor
    """Its cond rows: a copy, or NaN."""
    shape: torch.Size
    """Of all its rows."""
    folded: int
    """Entries of dimension 0 per row, 0 where every row is conditional."""
    is_kept: bool = True
    is_overwritten: bool = False
    """A later unit writes into the same memory."""
    gap: Gap | None = None
    """What weak passes are given in its place where it was let go."""

    def let_go(self, is_overwritten: bool = False) -> None:
        """Forget the values: the model holds them no more."""
        self.is_overwritten = is_overwritten
        rows = self.rows
        self.rows = torch.full((), float("nan"), dtype=rows.dtype, device=rows.device).expand(rows.shape)
        self.is_kept = False


@dataclasses.dataclass(frozen=True)
class Given:
    """An output that is one of the unit's arguments."""

    index: int


@dataclasses.dataclass(eq=False)
class UnitCall:
    """One call of a unit."""

    unit: weakref.ref[nn.Module]
    """Weak, because what is known of a model must not keep its parts alive."""
    spec: pytree.TreeSpec | None
    """The structure of its output; `None` for a bare tensor."""
    values: list[Any] | None
    """Its outputs; `None` where they cannot be shared, and the unit has to run again."""
    writes: list[tuple[int, Output]]
    """What it writes, by the number of the argument."""
    entries: Sequence[Entry] = ()
    """What it sets in dictionaries."""

    def __post_init__(self) -> None:
        """Look at what the call needs."""
        is_given = any(isinstance(value, Given) for value in self.values or ())
        self.takes_arguments = bool(self.writes or self.entries or is_given)
        self.keeps = any(output.is_kept for output in self.outputs)
        self.is_watched = self.has_hooks

    @property
    def has_hooks(self) -> bool:
        """Whether hooks of others look at what the unit returns."""
        return bool(getattr(self.unit(), "_forward_hooks", None))

    @property
    def outputs(self) -> list[Output]:
        """The tensors that it returns and writes."""
        return [value for value in self.values or () if isinstance(value, Output)] + [out for _, out in self.writes]

    def replaced(self, new: dict[Output, Output], entries: Sequence[Entry] | None = None) -> UnitCall:
        """Return the same call with other outputs, and other entries."""
        entries = self.entries if entries is None else entries
        values = None if self.values is None else [new.get(v, v) if isinstance(v, Output) else v for v in self.values]
        return UnitCall(
            self.unit, self.spec, values, [(i, new.get(output, output)) for i, output in self.writes], entries
        )


class Prefix:
    """What the weak passes of one call can share with its cond pass; filled while that runs."""

    def __init__(
        self, starts: Sequence[Collection[int]], batch: int, rows: Indices, look: Callable[[], Snapshot] | None
    ) -> None:
        """Start with nothing.

        Args:
            starts: for each branch, the modules (by `id`) before the first of which its prefix ends.
            batch: number of rows of the call.
            rows: which of them are conditional.
            look: looks at what the model keeps; `None` not to.
        """
        self.batch = batch
        self.rows = rows
        self.calls: list[UnitCall] = []
        self.ends: list[int | None] = [None] * len(starts)
        self.obstacle: str | None = None
        """What the prefix does besides returning something, so that it cannot be shared."""
        self.started: Snapshot | None = None
        """What the model kept when the first block began, where that was looked at."""
        self.has_new_state = False
        """Blocks have changed something that the model keeps; the first time that may be a cache."""
        self.is_complete = False
        """The prefixes of all branches have ended."""
        self.is_broken = False
        """A weak pass called other modules."""
        self.is_reused = len(starts) > 1
        """More than one pass is going to be made with it."""
        self.needs_own_memory = False
        """The model writes into what was let go, so that each answer needs memory of its own."""
        self.starts = starts
        self._all_starts = {key for keys in starts for key in keys}
        self.is_nested = False
        """Units call other units."""
        self._inside = self._has_begun = False
        self._look = look

    @property
    def has_gaps(self) -> bool:
        """Whether anything was let go."""
        return any(not output.is_kept for call in self.calls for output in call.outputs)

    # --- the cond pass

    def action(self, unit: nn.Module) -> Action:
        """Return what a unit does during the cond pass: compute, and have its output recorded."""
        is_start = id(unit) in self._all_starts

        def record(proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self.is_complete or torch.compiler.is_compiling():  # what is traced cannot be recorded
                return proceed(*args, **kwargs)
            if is_start:
                self._note_ends(unit)  # also if another unit calls it, which is then not part of the prefix
            self.is_nested = self.is_nested or self._inside
            if self._inside or self.is_complete:
                return proceed(*args, **kwargs)
            if not self._has_begun:
                self._has_begun = True
                self._start(args, kwargs)
            before = self._begin(unit, args, kwargs)
            self._inside = True
            try:
                output = proceed(*args, **kwargs)
            finally:
                self._inside = False
            if not self.is_complete:
                self._conclude(unit, args, kwargs, before, output)
            return output

        return record

    def _start(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at what is there when the first unit is called."""
        self.started = None if self._look is None else self._look()

    def _begin(self, unit: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Look at a call before it is made; return what `_conclude` needs of that."""
        raise NotImplementedError

    def _conclude(
        self, unit: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], before: Any, output: Any
    ) -> None:
        """Look at a call after it was made."""
        raise NotImplementedError

    def _end(self, branch: int) -> int:
        """Look at what is there when a branch's prefix ends; return how many calls it has."""
        raise NotImplementedError

    def _note_ends(self, unit: nn.Module) -> None:
        for branch, starts in enumerate(self.starts):
            if self.ends[branch] is None and id(unit) in starts:
                self.ends[branch] = self._end(branch)
        if None not in self.ends:
            self.is_complete = True
            self.finish()

    def finish(self) -> None:
        """Conclude what can be shared, at the end of the prefixes or of the pass."""
        if self._has_begun and self.started is not None:
            self.has_new_state = self.started.differs()
        self._has_begun = False

    # --- the weak passes

    def answered(self, branch: int) -> list[int]:
        """List the units (by `id`) that answer from the record in a branch's weak pass."""
        return [id(call.unit()) for call in self.calls[: self.ends[branch]] if call.values is not None]

    @contextmanager
    def replayed(self, branch: int, patches: Sequence[Patch], units: Sequence[nn.Module]) -> Iterator[None]:
        """Let units answer from the record within a `with`, until the branch's prefix ends.

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
                if position == end or inside:
                    return proceed(*args, **kwargs)
                call = self.calls[position]
                if call.unit() is not unit:
                    self.is_broken = True
                    raise PrefixMismatchError
                position += 1
                if call.values is not None:
                    answer = self._answer(position - 1, args, kwargs)
                    GAPS.are_free = position != end
                    return answer
                inside = True
                try:
                    return proceed(*args, **kwargs)
                finally:
                    inside = False
                    GAPS.are_free = position != end

            return replay

        with pushed(patches, [action_of(unit) for unit in units]), gaps(are_free=end > 0):
            yield
        if position != end:
            self.is_broken = True
            raise PrefixMismatchError

    def _answer(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self.calls[number]
        assert call.values is not None
        if not call.takes_arguments and call.spec is None:
            return self._copy(number, call.values[0])
        set_again(call.entries, args, kwargs)
        given = other_leaves(args, kwargs) if call.takes_arguments else []
        for index, output in call.writes:
            given[index].copy_(output.rows)
        copies = {value: self._copy(number, value) for value in call.values if isinstance(value, Output)}
        values = [
            given[value.index] if isinstance(value, Given) else copies[value] if isinstance(value, Output) else value
            for value in call.values
        ]
        return values[0] if call.spec is None else pytree.tree_unflatten(values, call.spec)

    def _copy(self, number: int, value: Any) -> Any:
        if not isinstance(value, Output) or value.is_kept or value.is_overwritten:
            return self._rows_of(value)
        if self.needs_own_memory:
            return Gap.of(self._rows_of(value), frozenset([number]))
        if value.gap is None:
            value.gap = Gap.of(value.rows, frozenset([number]))
        return value.gap

    def _rows_of(self, value: Any) -> Any:
        # Later code may write into what it is given, and another pass may need it again.
        needs_own = isinstance(value, Output) and (self.is_reused if value.is_kept else self.needs_own_memory)
        return value.rows.clone() if needs_own else value.rows if isinstance(value, Output) else value
