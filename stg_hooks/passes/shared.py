"""Weak passes that begin at the first skipped layer: what comes before it answers from the record of the cond pass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from stg_hooks.passes.context import Context, may_come_of_cutting
from stg_hooks.passes.findings import ALL, KnownLayout
from stg_hooks.passes.gaps import GapError
from stg_hooks.passes.guided_call import GuidedCall, checking, weak_pass
from stg_hooks.passes.prefix import DRAWS_RANDOM_NUMBERS, Prefix, PrefixMismatchError
from stg_hooks.passes.recording import Recording
from stg_hooks.passes.repetition import Outline, Repetition
from stg_hooks.passes.returned import are_as_finite, own_predictions

_LAYOUTS = 64
_PATIENCE = 2  # calls of a layout
_WANTED = 3  # outputs, one after the other


class NotSharedError(Exception):
    """Weak passes cannot be made on top of the cond pass."""


class SharedPasses:
    """Makes weak passes on top of the cond pass, and finds out whether they give what full ones do."""

    def __init__(self, context: Context) -> None:
        """Take the state that all passes of the denoiser share."""
        self._context = context

    def weak_predictions(self, call: GuidedCall) -> list[list[Tensor]] | None:
        """Make the weak predictions of a call; `None` where full passes are needed."""
        prefix, found = call.prefix, self._context.found
        if prefix is None or not self._is_possible(call, prefix):
            return None
        is_to_be_checked = isinstance(prefix, Recording) and (call.rows is not None or call.is_comparable)
        if isinstance(prefix, Recording) and not is_to_be_checked and prefix.has_gaps:
            found.keeps[call.layout] = ALL  # without a check nothing would tell that NaN has come through
            return None
        if isinstance(prefix, Repetition) and call.random_before is not None and not found.layouts[call.layout].draws:
            del found.layouts[call.layout]  # blocks whose calls are not looked at may draw them
            return None
        prefix.is_reused = prefix.is_reused or is_to_be_checked
        weaks, counted = [], self._context.stats_so_far()
        try:
            for branch, switch in enumerate(self._context.switches):
                # Without a copy of what the branch leaves: it would have the cond rows alone.
                with switch.switched_on():
                    weaks.append(self._pass(call, prefix, branch))
                self._context.count(branch, prefix.answered(branch))
            if is_to_be_checked:
                self._check(call, prefix, weaks)
        except (NotSharedError, PrefixMismatchError, GapError) as error:
            self._context.restore_stats(counted)
            self._give_up(call, prefix, error)
            return None
        if isinstance(prefix, Recording):
            if len(found.layouts) >= _LAYOUTS:
                found.layouts.clear()
            found.layouts[call.layout] = KnownLayout(Outline(prefix), call.random_before is not None)
        return weaks

    def _is_possible(self, call: GuidedCall, prefix: Prefix) -> bool:
        """Tell whether what was recorded may serve; if not, say what that means for later calls."""
        ways, times = self._context.ways, self._context.recorded[call.layout]
        if not ways.shares or None in prefix.ends:
            return False
        if prefix.batch != (call.count if call.rows is None else call.rows.batch_of(call.count)):
            return False
        if prefix.obstacle == DRAWS_RANDOM_NUMBERS and times <= _PATIENCE:
            return False  # it may have been another thread
        if prefix.obstacle == DRAWS_RANDOM_NUMBERS:
            ways.stop_sharing(prefix.obstacle, "all rows")
            return False
        if prefix.obstacle:
            self._context.found.in_full[call.layout] = prefix.obstacle
            return False
        if prefix.has_new_state or (call.changes_state and not self._sets_again(prefix)):
            # The first time that may be a cache.
            if times > 1:
                ways.stop_sharing("it keeps something from one call to the next", "all rows")
            return False
        return True

    def _give_up(self, call: GuidedCall, prefix: Prefix, error: Exception) -> None:
        """Conclude what a failure says of later calls; this one's weak passes are made in full."""
        ways, found = self._context.ways, self._context.found
        found.layouts.pop(call.layout, None)
        if isinstance(prefix, Repetition):
            return  # this call goes another way than the one that was recorded: the next one is recorded anew
        if prefix.is_broken:
            ways.stop_sharing("it calls other blocks in the weak pass than in the cond pass")
        elif isinstance(error, GapError):
            # From the next call on; a model that wants one output after the other gets all.
            kept = found.keeps.get(call.layout, frozenset())
            is_few = isinstance(kept, frozenset) and len(kept) < _WANTED
            found.keeps[call.layout] = error.calls.union(kept) if error.calls and is_few else ALL
        else:
            call.conclude = partial(ways.stop_sharing, str(error))

    def _sets_again(self, prefix: Prefix) -> bool:
        """Tell whether a call has set what the model keeps before its blocks, as a weak pass will do again.

        What it has set after them may come from them, and be reused in a later call.
        """
        started = prefix.started
        kept = self._context.transactions.kept
        return started is not None and not (started.changes() or started.written() or kept.replaced())

    def _pass(self, call: GuidedCall, prefix: Prefix, branch: int) -> list[Tensor]:
        """Run a pass on the cond rows, up to the end of a branch's prefix from the record.

        Raises:
            NotSharedError: what it returns does not fit the cond pass.
            PrefixMismatchError: it took another way than the cond pass.
            GapError: outputs are wanted that were not kept.
        """
        try:
            found = self._replayed(call, prefix, branch)
        except Exception as error:
            if not may_come_of_cutting(error):
                raise
            if prefix.has_gaps:
                raise GapError from error
            # Rows may have been cut wrongly. If that is not the cause, a full pass raises the same error.
            if call.rows is None or not isinstance(prefix, Recording):
                raise
            raise NotSharedError(f"{type(error).__name__}: {error}") from error
        if prefix.is_broken:
            raise PrefixMismatchError
        if [tensor.shape for tensor in found] != [c.shape for c in call.cond]:
            raise NotSharedError("the rows of its hidden states cannot be told apart")
        return found

    def _replayed(self, call: GuidedCall, prefix: Prefix, branch: int) -> list[Tensor]:
        units = self._context.units
        patches = units.patches(units.prefix)
        for _ in range(2):
            args, kwargs = self._context.cond_arguments(call)
            try:
                # The replay comes last, so that it is asked first: up to its end no layer is skipped.
                replay = prefix.replayed(branch, patches, units.prefix)
                with self._context.transactions.transaction(call), weak_pass(), replay:
                    return own_predictions(call.denoiser(*args, **kwargs))
            except RuntimeError as error:
                if prefix.needs_own_memory or "single memory location" not in str(error):
                    raise
                prefix.needs_own_memory = (
                    True  # torch does not write into an expanded NaN: each answer gets memory of its own
                )
        raise AssertionError("the second attempt has returned or raised")

    def _check(self, call: GuidedCall, prefix: Prefix, weaks: Sequence[Sequence[Tensor]]) -> None:
        """Make a pass once more with nothing skipped: it has to give what the cond pass gave.

        Of many branches, those with the shortest and the longest prefix are tried.

        Raises:
            NotSharedError: it does not, and what `_pass` raises.
        """
        by_length = sorted(range(len(weaks)), key=lambda branch: prefix.ends[branch] or 0)
        for branch in {by_length[0], by_length[-1]}:
            # Without gradients: checkpointing, which computes this call again for them, makes no such pass.
            with torch.no_grad(), checking():
                again = self._pass(call, prefix, branch)
                if call.rows is not None:
                    call.unskipped[branch] = again
            if prefix.has_gaps and not all(are_as_finite(found, call.cond) for found in (again, *weaks)):
                raise GapError
            if not self._context.agree(again, call.cond):
                if prefix.has_gaps:
                    raise GapError
                raise NotSharedError("with nothing skipped, the cond rows alone do not give the cond prediction again")
