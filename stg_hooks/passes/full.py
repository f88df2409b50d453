"""Weak passes as the textbook makes them: the denoiser once more, with layers bypassed; and what has to hold there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stg_hooks.errors import CallError
from stg_hooks.hooks.compiled import eagerly
from stg_hooks.passes.context import Context, may_come_of_cutting
from stg_hooks.passes.guided_call import GuidedCall, checking, weak_pass
from stg_hooks.passes.returned import own_predictions, predictions

_CALLS_MADE_AGAIN = 2  # of a layout


class FullPasses:
    """Makes weak passes that share nothing with the cond pass: on the cond rows, or else on all rows."""

    def __init__(self, context: Context) -> None:
        """Take the state that all passes of the denoiser share."""
        self._context = context

    def weak_output(
        self, branch: int, denoiser: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Make a call with the layers of one branch bypassed, and return what the denoiser returns."""
        switch = self._context.switches[branch]
        apart = self._context.caches.apart(id(switch), switch.modules, switch.is_bypass)
        with weak_pass(), apart, switch.switched_on():
            output = denoiser(*args, **kwargs)
        self._context.count(branch, ())
        return output

    def weak_predictions(self, call: GuidedCall) -> list[list[Tensor]]:
        """Make the weak predictions of a call.

        Raises:
            CallError: the model keeps something that cannot be put back.
        """
        context = self._context
        if call.rows is not None:
            call.unskipped.clear()
        is_cut = self.is_taken(call) and call.rows is not None and not context.transactions.keeps_state
        if is_cut and self.is_to_be_checked(call):
            is_cut = self.can_cut(call)
        # Where a check is only put off to the next call, nothing is known about cutting rows.
        weaks = [self._weak(call, branch, is_cut) for branch in range(len(context.switches))]
        self.make_again(call, is_checked=is_cut)
        if call.conclude is not None:  # an error that has nothing to do with sharing has been raised again
            call.conclude()
        return weaks

    def _weak(self, call: GuidedCall, branch: int, is_cut: bool) -> list[Tensor]:
        args, kwargs = self._context.cond_arguments(call) if is_cut else call.inputs.again()
        with self._context.transactions.full_pass(call, branch):
            # The model may keep its predictions itself, in memory that is put back.
            weak = own_predictions(self.weak_output(branch, call.denoiser, args, kwargs))
        if call.rows is not None and not is_cut:
            weak = [call.rows.take(tensor) for tensor in weak]
        if call.rows is None or not is_cut:
            call.unskipped[branch] = call.cond
        return weak

    def make_again(self, call: GuidedCall, is_checked: bool) -> None:
        """Make the first calls of a layout once more with nothing skipped: what is kept out of sight shows in them.

        Args:
            call: a call, after its weak passes.
            is_checked: it has been compared with weak passes that share work with it.

        Raises:
            CallError: what comes out is another prediction than the cond pass has made.
        """
        context = self._context
        count = context.found.again[call.layout] = context.found.again.get(call.layout, 0) + 1
        if count > _CALLS_MADE_AGAIN or not call.is_comparable or context.caches.found is not None:
            return
        transactions = context.transactions
        suspects = transactions.suspects()
        is_suspect = bool(suspects) or transactions.keeps_state or transactions.kept.has_opaque()
        if not is_suspect and (is_checked or count > 1):
            return
        for _ in range(2 if is_suspect else 1):  # what is counted modulo two comes out right once
            args, kwargs = call.inputs.again()
            with transactions.transaction(call), torch.no_grad(), checking(), weak_pass(), eagerly():
                again = own_predictions(call.denoiser(*args, **kwargs))
            again = again if call.rows is None else [call.rows.take(tensor) for tensor in again]
            if not context.agree(again, call.cond):
                found = "; ".join(suspects[:2])
                raise CallError(
                    f"{type(context.model).__name__} predicts something else when the same call is made once more, so "
                    "it keeps something from one call to the next that cannot be put back after a weak pass"
                    f"{f' ({found})' if found else ''}. Keep it in an attribute of the model, or switch it off."
                )

    def is_taken(self, call: GuidedCall) -> bool:
        """Tell whether the weak passes of a call are made in full, on its cond rows."""
        now, in_full = self._context.ways.now, self._context.found.in_full
        return now == "full" or (now != "all rows" and call.layout in in_full)

    def is_to_be_checked(self, call: GuidedCall) -> bool:
        """Tell whether it is open if calls of this layout can be cut down to their cond rows."""
        return call.rows is not None and call.layout not in self._context.found.can_be_cut

    def can_cut(self, call: GuidedCall) -> bool:
        """Make a pass on the cond rows with nothing skipped, once: it has to give what the cond pass gave.

        Returns:
            Whether it does; if not, `call.conclude` says so.
        """
        assert call.rows is not None
        context = self._context
        try:
            args, kwargs = context.cond_arguments(call)
            no_caches = context.caches.apart(self, [context.model], bypassed=False)
            transaction = context.transactions.transaction(call)
            with transaction, torch.no_grad(), checking(), weak_pass(), eagerly(), no_caches:
                again, cond = own_predictions(call.denoiser(*args, **kwargs)), call.cond
                if context.caches.found is not None:  # which have made the cond pass another one than it is by itself
                    args, kwargs = call.inputs.again()
                    cond = [call.rows.take(t) for t in predictions(call.denoiser(*args, **kwargs))]
            if context.agree(again, cond):
                context.found.can_be_cut.add(call.layout)
                if context.caches.found is None:
                    call.unskipped = dict.fromkeys(range(len(context.switches)), again)
                return True
            reason = "the cond rows alone do not give the cond prediction again"
        except Exception as error:
            if not may_come_of_cutting(error):
                raise
            reason = f"{type(error).__name__}: {error}"
        call.conclude = partial(context.ways.stop_cutting, reason)
        return False
