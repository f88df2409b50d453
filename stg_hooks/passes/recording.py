"""Record the prefix of a call of which nothing is known yet: find out what has to be kept."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Container, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from stg_hooks.passes.effects import Arguments, Randomness
from stg_hooks.passes.prefix import DRAWS_RANDOM_NUMBERS, Given, Output, Prefix, UnitCall
from stg_hooks.passes.rows import Indices, cut, row_factor

if TYPE_CHECKING:
    from stg_hooks.passes.state import Snapshot


class Recording(Prefix):
    """The prefix of a call of which nothing is known yet."""

    def __init__(
        self,
        starts: Sequence[Collection[int]],
        batch: int,
        rows: Indices,
        keeps: Container[int],
        aside: Container[int],
        look: Callable[[], Snapshot] | None,
    ) -> None:
        """Start with nothing recorded.

        Args:
            starts: for each branch, the modules (by `id`) before the first of which its prefix ends.
            batch: number of rows of the call.
            rows: which of them are conditional.
            keeps: the numbers of the calls whose outputs to keep though the model does not hold them any more.
            aside: units (by `id`) whose outputs are kept in any case.
            look: looks at what the model keeps.
        """
        super().__init__(starts, batch, rows, look)
        self._keeps, self._aside = keeps, aside
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
        return len(self.calls)

    def finish(self) -> None:
        """Conclude what can be shared, at the end of the prefixes or of the pass."""
        super().finish()
        if self._randomness is not None and self._randomness.is_used():
            self.obstacle = DRAWS_RANDOM_NUMBERS
        self._randomness = None
        self._let_go(self._live)
        self._live, self._last = [], []
        self.calls = [call.replaced({}) for call in self.calls]

    def _conclude(
        self, unit: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], before: Arguments, output: Any
    ) -> None:
        values, spec = ([output], None) if isinstance(output, Tensor) else pytree.tree_flatten(output)
        if self._with_grad and not torch.is_grad_enabled():
            self.obstacle = "it computes without gradients inside, as reentrant checkpointing does"
        written, entries = before.written(), before.entries.set_since()
        if written is None or entries is None:
            self.obstacle = f"{type(unit).__name__} writes into its arguments"
        sources = {id(leaf): i for i, leaf in enumerate(before.leaves)}
        storages = {_storage(tensor) for tensor in before.tensors}
        is_watched, lives = bool(unit._forward_hooks) or id(unit) in self._aside, dict[int, _Live]()
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
            self.calls.append(UnitCall(weakref.ref(unit), spec, None, []))
            self._last = []
            for live in self._live:
                live.is_needed = live.is_needed or live.storage in storages
            return
        for _, tensor in into:
            lives[id(tensor)] = live = lives.get(id(tensor)) or self._new(tensor, is_watched)
            self._let_go([other for other in self._live if other.memory == live.memory], is_overwritten=True)
        writes = [(i, lives[id(tensor)].output) for i, tensor in into]
        self.calls.append(UnitCall(weakref.ref(unit), spec, outputs, writes, entries or ()))
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
        return _Live(output, value, is_watched or len(self.calls) in self._keeps)


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


def _storage(tensor: Tensor) -> StorageWeakRef | None:
    return StorageWeakRef(tensor.untyped_storage()) if type(tensor) in (Tensor, nn.Parameter) else None


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, (Output, Given, bool, int, float, str))
