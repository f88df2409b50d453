"""Batched execution: cond and weak rows go through the denoiser together, in one pass over its weights.

The call gets the cond rows once more for every branch. Until a branch's first skipped layer its rows would only repeat
the cond rows, so blocks run without them and their outputs are copied; a skipped layer runs without them, too, and its
mode says what those rows get instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stg_hooks.hooks.checkpointing import checkpointed
from stg_hooks.hooks.forward import Action, Patch, pushed
from stg_hooks.model.source import is_positional
from stg_hooks.passes.context import Context
from stg_hooks.passes.guided_call import GuidedCall, weak_pass
from stg_hooks.passes.packed import NO_ROWS, packed_in
from stg_hooks.passes.returned import predictions, replace_predictions
from stg_hooks.passes.rows import (
    Indices,
    cut,
    leaves_of,
    listed,
    map_arguments,
    row_factor,
    rows_apart,
)


class RowsError(Exception):
    """The rows of a call, or of a block's output, cannot be told apart."""


@dataclasses.dataclass
class _Group:
    """Consecutive rows: the call's own (branch `None`), or those of one branch."""

    branch: int | None
    rows: slice


class BatchedRows:
    """One pass of a denoiser on its own rows and on those of every branch."""

    def __init__(
        self, skipped: Sequence[Mapping[int, Action]], batch: int, cond: Indices, units: Sequence[nn.Module]
    ) -> None:
        """Lay the rows out.

        Args:
            skipped: for each branch, what it does in its skipped layers, by `id` of the module.
            batch: number of rows of the call as it was made.
            cond: which of them are conditional.
            units: blocks, none inside another, the skipped layers among them.
        """
        self._size = len(listed(cond, batch))
        self._batch = batch
        self._cond = cond
        self._skipped = skipped
        self._units = units
        self._started = [False] * len(skipped)
        self.not_run: list[list[int]] = [[] for _ in skipped]
        """For each branch, the units (by `id`) that ran without its rows before its first skipped layer."""
        self._inside = False
        rows = [slice(batch + i * self._size, batch + (i + 1) * self._size) for i in range(len(skipped))]
        self._groups = [_Group(None, slice(0, batch)), *(_Group(i, branch) for i, branch in enumerate(rows))]
        self._total = batch + len(skipped) * self._size

    def arguments(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[str]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Append the cond rows to the arguments of a call, once per branch."""
        packed = packed_in(leaves_of(args, kwargs), self._batch)
        more = [*range(self._batch), *[*listed(self._cond, self._batch)] * len(self._skipped)]

        def extend(name: str, leaf: Any) -> Any:
            part = rows_apart(packed, name, leaf, more, self._batch)
            if part is not NO_ROWS:
                return part
            folded = row_factor(leaf, self._batch) if isinstance(leaf, Tensor) else 0
            if not folded or (folded > 1 and (self._batch == 1 or is_positional(name))):
                return leaf
            return torch.cat([leaf] + [cut(leaf, self._cond, self._batch, folded)] * len(self._skipped))

        return map_arguments(extend, args, kwargs, names)

    @contextmanager
    def running(self, patches: Sequence[Patch]) -> Iterator[None]:
        """Handle the rows of the branches in calls of the units within a `with`."""
        with pushed(patches, [self._action(unit) for unit in self._units]):
            yield

    def split(self, found: Sequence[Tensor]) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Split what was predicted into the call's own rows and, for each branch, the weak ones."""
        if any(prediction.shape[:1] != (self._total,) for prediction in found) or not all(self._started):
            raise RowsError
        parts = [[prediction[group.rows] for prediction in found] for group in self._groups]
        return parts[0], parts[1:]

    def _action(self, unit: nn.Module) -> Action:
        def run(proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._inside:
                return proceed(*args, **kwargs)
            if torch.is_grad_enabled() and not torch.compiler.is_compiling() and checkpointed():
                raise RowsError("gradient checkpointing would compute blocks again, with other rows")
            skips = [id(unit) in skipped for skipped in self._skipped]
            self._started = [started or skip for started, skip in zip(self._started, skips, strict=True)]
            for branch, not_run in enumerate(self.not_run):
                if not self._started[branch]:
                    not_run.append(id(unit))
            computed = [
                g for g in self._groups if g.branch is None or (self._started[g.branch] and not skips[g.branch])
            ]
            if len(computed) == len(self._groups):
                return proceed(*args, **kwargs)
            self._inside = True
            try:
                own_args, own_kwargs = self._take(computed, args, kwargs)
                output = proceed(*own_args, **own_kwargs)
                instead = {
                    i: self._skipped[i][id(unit)](proceed, *self._take([self._groups[i + 1]], args, kwargs))
                    for i, skip in enumerate(skips)
                    if skip
                }
            finally:
                self._inside = False
            return self._join(output, computed, instead)

        return run

    def _take(
        self, groups: list[_Group], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        packed = packed_in(leaves_of(args, kwargs), self._total)
        rows = [row for group in groups for row in listed(group.rows, self._total)]

        def of_leaf(leaf: Any) -> Any:
            part = rows_apart(packed, "", leaf, rows, self._total)
            return self._rows_of(groups, leaf) if part is NO_ROWS else part

        def take(value: Any) -> Any:
            is_leaf = value is None or isinstance(value, (Tensor, bool, int, float))
            return of_leaf(value) if is_leaf else pytree.tree_map(of_leaf, value)

        return tuple(map(take, args)), {name: take(value) for name, value in kwargs.items()}

    def _rows_of(self, groups: list[_Group], value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        folded = row_factor(value, self._total)
        if not folded or (folded > 1 and value.ndim < 4):  # flatter ones may be tables with an entry per token
            return value
        parts = [cut(value, group.rows, self._total, folded) for group in groups]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _join(self, output: Any, computed: list[_Group], instead: dict[int, Any]) -> Any:
        leaves, spec = ([output], None) if isinstance(output, Tensor) else pytree.tree_flatten(output)
        others = {branch: pytree.tree_leaves(value) for branch, value in instead.items()}
        if any(len(other) != len(leaves) for other in others.values()):
            raise RowsError
        count = self._batch + self._size * (len(computed) - 1)
        joined = []
        for i, leaf in enumerate(leaves):
            folded = row_factor(leaf, count) if isinstance(leaf, Tensor) else 0
            if folded is None or (folded > 1 and count == 1):
                raise RowsError
            if not folded:
                joined.append(leaf)
                continue
            base = leaf[: self._batch * folded]
            later = iter(torch.split(leaf[self._batch * folded :], self._size * folded))
            parts = [base]
            for group in self._groups[1:]:
                if group.branch in others:
                    parts.append(others[group.branch][i])
                else:
                    parts.append(next(later) if group in computed else cut(base, self._cond, self._batch, folded))
            joined.append(torch.cat(parts))
        return joined[0] if spec is None else pytree.tree_unflatten(joined, spec)


class BatchedPasses:
    """Makes calls together with their weak passes, and finds out whether that gives what two passes do."""

    def __init__(self, context: Context) -> None:
        """Take the state that all passes of the denoiser share."""
        self._context = context

    def cond_pass(self, call: GuidedCall, batch: int, cond: Indices) -> Any:
        """Make a call with the rows of all branches; leave the weak predictions in it.

        Args:
            call: the call.
            batch: number of its rows.
            cond: which of them are conditional.

        Returns:
            What the denoiser returns, with the call's own rows only.

        Raises:
            RowsError: rows cannot be told apart.
        """
        output, not_run = self._pass(call, batch, cond)
        for branch, units in enumerate(not_run):
            self._context.count(branch, units)
        return output

    def _pass(self, call: GuidedCall, batch: int, cond: Indices) -> tuple[Any, list[list[int]]]:
        units = self._context.units
        once = BatchedRows([switch.actions for switch in self._context.switches], batch, cond, units.batched)
        args, kwargs = once.arguments(*call.inputs.again(), self._context.names)
        with once.running(units.patches(units.batched)):
            output = call.denoiser(*args, **kwargs)
        own, call.weaks = once.split(predictions(output))
        return replace_predictions(output, own), once.not_run

    def compare(
        self, call: GuidedCall, batch: int, cond: Indices, own: list[Tensor], weaks: list[list[Tensor]]
    ) -> None:
        """Make a call once more in one pass: some models let rows influence each other."""
        try:
            with self._context.transactions.transaction(call), weak_pass():
                again = predictions(self._pass(call, batch, cond)[0])
            if not self._context.agree([*again, *chain(*(call.weaks or []))], [*own, *chain(*weaks)]):
                raise RowsError("rows influence each other, or were cut wrongly")
            self._context.found.layouts[call.layout].in_one_pass = True
        except Exception as error:
            self._context.ways.stop_batching(error)
