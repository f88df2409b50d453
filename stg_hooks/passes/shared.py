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

import bisect
import dataclasses
import itertools
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from stg_hooks.hooks.forward import Action, Patch, pushed
from stg_hooks.model.layers import attention_modules, is_attention
from stg_hooks.passes.effects import Arguments, Randomness
from stg_hooks.passes.gaps import GAPS, Gap, gaps
from stg_hooks.passes.rows import Indices, cut, leaves_of, row_factor
from stg_hooks.passes.state import Snapshot

DRAWS_RANDOM_NUMBERS = "it draws random numbers"


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

    def __post_init__(self) -> None:
        """Look at what the call needs."""
        self.takes_arguments = bool(self.writes) or any(isinstance(value, Given) for value in self.values or ())
        self.keeps = any(output.is_kept for output in self.outputs)
        self.is_watched = bool(_hooks_of(self))

    @property
    def outputs(self) -> list[Output]:
        """The tensors that it returns and writes."""
        return [value for value in self.values or () if isinstance(value, Output)] + [out for _, out in self.writes]

    def replaced(self, new: dict[Output, Output]) -> UnitCall:
        """Return the same call with other outputs."""
        values = None if self.values is None else [new.get(v, v) if isinstance(v, Output) else v for v in self.values]
        return UnitCall(self.unit, self.spec, values, [(i, new.get(output, output)) for i, output in self.writes])


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
        self.steps: list[UnitCall] = []
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
        self.is_dense = False
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
        return any(not output.is_kept for step in self.steps for output in step.outputs)

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
        """Look at what is there when a branch's prefix ends; return how many steps it has."""
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
        return [id(step.unit()) for step in self.steps[: self.ends[branch]] if step.values is not None]

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
                step = self.steps[position]
                if step.unit() is not unit:
                    self.is_broken = True
                    raise PrefixMismatchError
                position += 1
                if step.values is not None:
                    answer = self._answer(step, args, kwargs)
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

    def _answer(self, step: UnitCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert step.values is not None
        if not step.takes_arguments and step.spec is None:
            return self._copy(step.values[0])
        given = leaves_of(args, kwargs)
        for index, output in step.writes:
            given[index].copy_(output.rows)
        copies = {value: self._copy(value) for value in step.values if isinstance(value, Output)}
        values = [
            given[value.index] if isinstance(value, Given) else copies[value] if isinstance(value, Output) else value
            for value in step.values
        ]
        return values[0] if step.spec is None else pytree.tree_unflatten(values, step.spec)

    def _copy(self, value: Any) -> Any:
        rows = self._rows_of(value)
        is_gap = isinstance(value, Output) and not value.is_kept and not value.is_overwritten
        return rows.as_subclass(Gap) if is_gap else rows

    def _rows_of(self, value: Any) -> Any:
        # Later code may write into what it is given, and another pass may need it again.
        needs_own = isinstance(value, Output) and (self.is_reused if value.is_kept else self.is_dense)
        return value.rows.clone() if needs_own else value.rows if isinstance(value, Output) else value


class _Live:
    """An output, as long as it is open whether the model still holds it."""

    def __init__(self, output: Output, tensor: Tensor, is_needed: bool) -> None:
        self.output = output
        is_plain = type(tensor) is Tensor and not tensor.requires_grad
        # An integer has no NaN to take its place.
        self.is_needed = is_needed or not is_plain or not (tensor.is_floating_point() or tensor.is_complex())
        self.storage = _storage(tensor)
        self.memory = self.storage, tensor.storage_offset(), tensor.shape

    def is_held(self) -> bool:
        """Tell whether the model still holds the tensor, or a view of it."""
        return self.storage is not None and not self.storage.expired()


class Recording(Prefix):
    """The prefix of a call of which nothing is known yet."""

    def __init__(
        self,
        starts: Sequence[Collection[int]],
        batch: int,
        rows: Indices,
        keeps_all: bool,
        look: Callable[[], Snapshot] | None,
    ) -> None:
        """Start with nothing recorded.

        Args:
            starts: for each branch, the modules (by `id`) before the first of which its prefix ends.
            batch: number of rows of the call.
            rows: which of them are conditional.
            keeps_all: whether to keep what the model does not hold any more, too.
            look: looks at what the model keeps.
        """
        super().__init__(starts, batch, rows, look)
        self._keeps_all = keeps_all
        self._randomness: Randomness | None = None
        self._with_grad = torch.is_grad_enabled()
        self._live: list[_Live] = []
        self._last: list[_Live] = []

    def _start(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._start(args, kwargs)
        self._randomness = Randomness.for_call(args, kwargs)

    def _begin(self, unit: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        # Let go what the model holds no more before the next block allocates. The last output may be held in another
        # form: a hook or the model itself may have converted it.
        self._let_go([live for live in self._live if not live.is_held() and live not in self._last])
        return Arguments(args, kwargs)

    def _let_go(self, lives: Sequence[_Live], is_overwritten: bool = False) -> None:
        for live in lives:
            if not live.is_needed:
                live.output.let_go(is_overwritten)
        self._live = [live for live in self._live if live.output.is_kept]

    def _end(self, branch: int) -> int:
        for live in self._live:
            live.is_needed = live.is_needed or live.is_held() or live in self._last
        return len(self.steps)

    def finish(self) -> None:
        """Conclude what can be shared, at the end of the prefixes or of the pass."""
        super().finish()
        if self._randomness is not None and self._randomness.is_used():
            self.obstacle = DRAWS_RANDOM_NUMBERS
        self._randomness = None
        self._let_go(self._live)
        self._live, self._last = [], []
        self.steps = [step.replaced({}) for step in self.steps]

    def _conclude(
        self, unit: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], before: Arguments, output: Any
    ) -> None:
        values, spec = ([output], None) if isinstance(output, Tensor) else pytree.tree_flatten(output)
        if self._with_grad and not torch.is_grad_enabled():
            self.obstacle = "it computes without gradients inside, as reentrant checkpointing does"
        written = before.written()
        if written is None:
            self.obstacle = f"{type(unit).__name__} writes into its arguments"
        sources = {id(leaf): i for i, leaf in enumerate(before.leaves)}
        storages = {_storage(tensor) for tensor in before.tensors}
        is_watched, lives = bool(unit._forward_hooks), dict[int, _Live]()
        outputs: list[Any] = []
        for value in values:
            if not isinstance(value, Tensor):
                outputs.append(value)
            elif id(value) in sources:
                outputs.append(Given(sources[id(value)]))
            elif not self._has_known_rows(value) or _storage(value) in storages:
                break  # a view of an argument is still one when the argument changes
            else:
                if id(value) not in lives:
                    lives[id(value)] = self._new(value, is_watched)
                outputs.append(lives[id(value)].output)
        into = [(i, before.leaves[i]) for i in written or ()]
        can_share = (
            len(outputs) == len(values)
            and all(map(_is_plain, outputs))
            and all(self._has_known_rows(tensor) for _, tensor in into)
        )
        if not can_share:  # it will run again, on what it was given
            self.steps.append(UnitCall(weakref.ref(unit), spec, None, []))
            self._last = []
            for live in self._live:
                live.is_needed = live.is_needed or live.storage in storages
            return
        for _, tensor in into:
            lives[id(tensor)] = live = lives.get(id(tensor)) or self._new(tensor, is_watched)
            self._let_go([other for other in self._live if other.memory == live.memory], is_overwritten=True)
        writes = [(i, lives[id(tensor)].output) for i, tensor in into]
        self.steps.append(UnitCall(weakref.ref(unit), spec, outputs, writes))
        self._last = list(lives.values())
        self._live += self._last

    def _has_known_rows(self, value: Tensor) -> bool:
        if self.rows == slice(None):
            return True
        folded = row_factor(value, self.batch)
        # Frames are folded into maps. Anything flatter may be a table with an entry per token (Mochi's positions).
        return folded is not None and (folded <= 1 or value.ndim >= 4)

    def _new(self, value: Tensor, is_watched: bool) -> _Live:
        folded = 0 if self.rows == slice(None) else row_factor(value, self.batch) or 0
        output = Output(cut(value, self.rows, self.batch, folded).clone(), value.shape, folded)
        return _Live(output, value, is_watched or self._keeps_all)


class Layout:
    """What the prefixes of all calls of one layout have in common: which outputs are kept, and what all look like."""

    def __init__(self, recording: Recording) -> None:
        """Remember what a recording has found out, without its values."""
        self.ends = list(recording.ends)
        self.is_dense = recording.is_dense
        self.steps = [_without_values(step) for step in recording.steps]
        # Of a unit with anything to keep all calls are seen, to tell one from the next; of the others none, unless
        # units call each other.
        kept = {id(step.unit()) for step in self.steps if step.keeps or recording.is_nested}
        self.units = {*kept, *itertools.chain(*recording.starts)}
        """The units (by `id`) whose calls are to be seen."""
        self.seen = [i for i, step in enumerate(self.steps) if id(step.unit()) in self.units]
        """The steps that are calls of these."""

    def has_new_hooks(self) -> bool:
        """Tell whether hooks were added that look at outputs which are not kept."""
        return any(_hooks_of(step) and not step.is_watched for step in self.steps)


class Repetition(Prefix):
    """The prefix of a call whose layout is known: nothing is looked at or copied but what will be asked for.

    Where the call goes another way than those before it, its weak passes find out: their blocks come in another order.
    """

    def __init__(
        self,
        layout: Layout,
        starts: Sequence[Collection[int]],
        batch: int,
        rows: Indices,
        look: Callable[[], Snapshot] | None,
    ) -> None:
        """Start with nothing recorded.

        Args:
            layout: what is known.
            starts: for each branch, the modules (by `id`) before the first of which its prefix ends.
            batch: number of rows of the call.
            rows: which of them are conditional.
            look: looks at what the model keeps; with it, the calls of all units are to be seen.
        """
        super().__init__(starts, batch, rows, look)
        self.steps = list(layout.steps)
        self.is_dense = layout.is_dense
        self.differs = False
        """This call goes another way than the ones before it."""
        self._ends = layout.ends
        self._seen: Sequence[int] = layout.seen if look is None else range(len(self.steps))
        self._done = 0

    def _begin(self, unit: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[int, int]] | None:
        step = self.steps[self._seen[self._done]] if self._done < len(self._seen) else None
        if step is None or step.unit() is not unit:
            self._differ()
            return None
        return None if step.writes else _versions(args, kwargs)

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
        before: list[tuple[int, int]] | None,
        output: Any,
    ) -> None:
        number = self._seen[self._done]
        step = self.steps[number]
        if before is not None and before != _versions(args, kwargs):
            return self._differ()
        if step.values is not None:
            took = self._taken(step, args, kwargs, output)
            if took is None:
                return self._differ()
            self.steps[number] = took
        self._done += 1
        return None

    def _taken(self, step: UnitCall, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> UnitCall | None:
        """Return a step with what is to be kept of it; `None` where it looks otherwise than known."""
        assert step.values is not None
        values, spec = ([output], None) if isinstance(output, Tensor) else pytree.tree_flatten(output)
        if spec != step.spec:
            return None
        given = leaves_of(args, kwargs) if step.takes_arguments else []
        new: dict[Output, Output] = {}
        for value, known in zip(values, step.values, strict=True):
            if isinstance(known, Output):
                if not self._takes(known, value, new):
                    return None
            elif isinstance(known, Given):
                if value is not given[known.index]:
                    return None
            elif type(value) is not type(known) or value != known:
                return None
        if not all(self._takes(known, given[i], new) for i, known in step.writes):
            return None
        return step.replaced(new) if new else step

    def _takes(self, known: Output, value: Any, new: dict[Output, Output]) -> bool:
        if not isinstance(value, Tensor) or value.shape != known.shape or value.dtype != known.rows.dtype:
            return False
        if known.is_kept and known not in new:
            rows = cut(value, self.rows, self.batch, known.folded).clone()
            new[known] = Output(rows, known.shape, known.folded)
        return True


def _hooks_of(step: UnitCall) -> object:
    return getattr(step.unit(), "_forward_hooks", None)


def _versions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[int, int]]:
    given: Sequence[Any] = (*args, *kwargs.values())
    if any(isinstance(value, (list, dict)) for value in given):
        given = leaves_of(args, kwargs)  # one may be added
    tensors = [value for value in given if type(value) is Tensor]
    return [(id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]


def _without_values(step: UnitCall) -> UnitCall:
    new = {output: dataclasses.replace(output) for output in step.outputs}
    for output in new.values():
        if output.is_kept:
            # Which has a shape and a type, and holds no memory.
            output.rows = torch.empty((), dtype=output.rows.dtype, device="meta").expand(output.rows.shape)
    return step.replaced(new)


def _storage(tensor: Tensor) -> StorageWeakRef | None:
    return StorageWeakRef(tensor.untyped_storage()) if type(tensor) in (Tensor, nn.Parameter) else None


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, (Output, Given, bool, int, float, str))
