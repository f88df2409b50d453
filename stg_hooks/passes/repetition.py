"""Record the prefix of a call whose layout is known: nothing is looked at or copied but what will be asked for."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stg_hooks.passes.entries import Entries, Entry, other_leaves
from stg_hooks.passes.prefix import Given, Output, Prefix, UnitCall
from stg_hooks.passes.recording import Recording
from stg_hooks.passes.rows import Indices, cut, leaves_of

if TYPE_CHECKING:
    from stg_hooks.passes.state import Snapshot


class Outline:
    """What the prefixes of all calls of one layout have in common: which outputs are kept, and what all look like."""

    def __init__(self, recording: Recording) -> None:
        """Remember what a recording has found out, without its values."""
        self.ends = list(recording.ends)
        self.needs_own_memory = recording.needs_own_memory
        self.calls = [_without_values(call) for call in recording.calls]
        # Of a unit with anything to keep, or that sets anything, all calls are seen, to tell one from the next; of the
        # others none, unless units call each other.
        kept = {id(call.unit()) for call in self.calls if call.keeps or call.entries or recording.is_nested}
        self.units = {*kept, *itertools.chain(*recording.starts)}
        """The units (by `id`) whose calls are to be seen."""
        self.seen = [i for i, call in enumerate(self.calls) if id(call.unit()) in self.units]
        """Those calls, by their numbers."""

    def has_new_hooks(self) -> bool:
        """Tell whether hooks were added that look at outputs which are not kept."""
        return any(call.has_hooks and not call.is_watched for call in self.calls)


class Repetition(Prefix):
    """The prefix of a call whose layout is known: nothing is looked at or copied but what will be asked for.

    Where the call goes another way than those before it, its weak passes find out: their blocks come in another order.
    """

    def __init__(
        self,
        outline: Outline,
        starts: Sequence[Collection[int]],
        batch: int,
        rows: Indices,
        look: Callable[[], Snapshot] | None,
    ) -> None:
        """Start with nothing recorded.

        Args:
            outline: what is known.
            starts: for each branch, the modules (by `id`) before the first of which its prefix ends.
            batch: number of rows of the call.
            rows: which of them are conditional.
            look: looks at what the model keeps; with it, the calls of all units are to be seen.
        """
        super().__init__(starts, batch, rows, look)
        self.calls = list(outline.calls)
        self.needs_own_memory = outline.needs_own_memory
        self.differs = False
        """This call goes another way than the ones before it."""
        self._ends = outline.ends
        self._seen: Sequence[int] = outline.seen if look is None else range(len(self.calls))
        self._done = 0

    def _begin(
        self, unit: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[tuple[int, int]] | None, Entries]:
        call = self.calls[self._seen[self._done]] if self._done < len(self._seen) else None
        if call is None or call.unit() is not unit:
            self._differ()
        return None if call is None or call.writes else _versions(args, kwargs), Entries(args, kwargs)

    def _end(self, branch: int) -> int:
        end = self._ends[branch] or 0
        if bisect.bisect_left(self._seen, end) != self._done:
            self._differ()
        return end

    def _differ(self) -> None:
        self.differs = self.is_complete = True

    def _conclude(
        self,
        unit: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        before: tuple[list[tuple[int, int]] | None, Entries],
        output: Any,
    ) -> None:
        number = self._seen[self._done]
        call = self.calls[number]
        versions, entries = before[0], before[1].set_since()
        if entries is None or (versions is not None and versions != _versions(args, kwargs)):
            return self._differ()
        if call.values is not None:
            took = self._taken(call, args, kwargs, output, entries)
            if took is None:
                return self._differ()
            self.calls[number] = took
        self._done += 1
        return None

    def _taken(
        self, call: UnitCall, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, entries: Sequence[Entry]
    ) -> UnitCall | None:
        """Return a call with what is to be kept of it; `None` where it looks otherwise than known."""
        assert call.values is not None
        values, spec = ([output], None) if isinstance(output, Tensor) else pytree.tree_flatten(output)
        if spec != call.spec:
            return None
        given = other_leaves(args, kwargs) if call.takes_arguments else []
        new: dict[Output, Output] = {}
        for value, known in zip(values, call.values, strict=True):
            if isinstance(known, Output):
                if not self._takes(known, value, new):
                    return None
            elif isinstance(known, Given):
                if value is not given[known.index]:
                    return None
            elif type(value) is not type(known) or value != known:
                return None
        if not all(self._takes(known, given[i], new) for i, known in call.writes):
            return None
        return call.replaced(new, entries) if new or entries or call.entries else call

    def _takes(self, known: Output, value: Any, new: dict[Output, Output]) -> bool:
        if not isinstance(value, Tensor) or value.shape != known.shape or value.dtype != known.rows.dtype:
            return False
        if known.is_kept and known not in new:
            rows = cut(value, self.rows, self.batch, known.folded).clone()
            new[known] = Output(rows, known.shape, known.folded)
        return True


def _versions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[int, int]]:
    given: Sequence[Any] = (*args, *kwargs.values())
    if any(isinstance(value, (list, dict)) for value in given):
        given = leaves_of(args, kwargs)  # one may be added
    tensors = [value for value in given if type(value) is Tensor]
    return [(id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]


def _without_values(call: UnitCall) -> UnitCall:
    new = {output: dataclasses.replace(output) for output in call.outputs}
    for output in new.values():
        if output.is_kept:
            # Which has a shape and a type, and holds no memory.
            output.rows = torch.empty((), dtype=output.rows.dtype, device="meta").expand(output.rows.shape)
    return call.replaced(new)
