"""Make a call, and its weak predictions in the way that the model allows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from stg_hooks.checks import is_real
from stg_hooks.errors import SettingError
from stg_hooks.hooks.forward import pushed
from stg_hooks.model.layers import find_layers
from stg_hooks.modes.switch import Switch
from stg_hooks.passes.batched import BatchedPasses, RowsError
from stg_hooks.passes.caches import Caches
from stg_hooks.passes.context import Context
from stg_hooks.passes.effects import Randomness
from stg_hooks.passes.findings import forget, recall
from stg_hooks.passes.full import FullPasses
from stg_hooks.passes.guided_call import GuidedCall, WeakCall, layout_of
from stg_hooks.passes.inputs import Inputs, Written
from stg_hooks.passes.prefix import Prefix
from stg_hooks.passes.recording import Recording
from stg_hooks.passes.repetition import Repetition
from stg_hooks.passes.returned import predictions
from stg_hooks.passes.rows import Indices, Rows, first_batch
from stg_hooks.passes.shared import SharedPasses
from stg_hooks.passes.state import Snapshot
from stg_hooks.passes.transaction import Transactions
from stg_hooks.passes.units import Units
from stg_hooks.passes.ways import Ways, check_execution

if TYPE_CHECKING:
    from stg_hooks.guidance.settings import Branch
    from stg_hooks.guidance.trace import Stats


class Execution:
    """Computes the weak predictions of one denoiser, one per branch.

    `"full"`: the textbook, one more pass of the denoiser on the cond rows per branch, with its layers bypassed.
    `"sequential"`: the same, but blocks that run before the branch's first skipped layer answer with what the cond pass
    has computed. The cond pass itself runs untouched, so that the call's own rows are bit-identical to plain ones.
    `"batched"`: the weak rows ride along in the cond pass, from the first skipped layer on. One sweep over the weights
    instead of two; more memory, and the call's own rows agree to rounding only. Each new layout of a call is compared
    with a full pass once.
    `"auto"`: `"batched"` where weights are brought to the device in every pass (see `weights_are_streamed`), because a
    second sweep over them is what costs there; otherwise `"sequential"`, which computes the same.

    All give the same predictions, to rounding, for a denoiser that is a function of its arguments and treats rows
    separately. Where work is shared, or rows `[uncond, cond]` have to be cut, whether this one does is found out in the
    first call of each layout (its shapes, types and switches): there the weak pass is made once more with nothing
    skipped, and has to give cond again. Where a model turns out not to allow a way, the next one is taken from then on,
    and a warning says so: batched, sequential, full, and in the end a full pass on all rows, of which nothing is
    assumed (`"all rows"`). A model that is compiled as a whole, or has step caches, allows `"full"` only.
    """

    def __init__(
        self, model: nn.Module, branches: Sequence[Branch], execution: str, stats: Stats, caches: Caches
    ) -> None:
        """Resolve the layers of every branch; change nothing yet.

        Args:
            model: the module that holds the layers.
            branches: what to skip, one weak prediction each.
            execution: one of `EXECUTIONS`.
            stats: where to count weak passes and blocks.
            caches: the model's step caches.

        Raises:
            LayerError: a layer that does not exist or cannot be skipped in its mode.
            SettingError: an unknown execution, or two branches that are the same.
        """
        check_execution(execution)
        layers = find_layers(model)
        self.switches = [Switch(model, branch.layers, branch.mode, branch.kind, layers) for branch in branches]
        _check_different(self.switches, branches)
        self._units = Units(model, self.switches, layers)
        self._ways = Ways(model, execution, self._units, caches)
        self._key = self._ways.now, *(switch.key for switch in self.switches)
        # Offloading hooks may move buffers, too.
        self._transactions = Transactions(model, self.switches, with_buffers=not self._ways.streams_weights)
        self._model, self._caches = model, caches
        self.context = Context(model, self.switches, self._units, self._ways, caches, stats, self._transactions)
        """What its passes work with."""
        self.full = FullPasses(self.context)
        """Its passes as the textbook makes them."""
        self._shared = SharedPasses(self.context)
        self._batched = BatchedPasses(self.context)
        self._written: Written = {}
        self._is_new = True
        self._last: Hashable = None  # layout of the call before

    @property
    def way(self) -> str:
        """The way that is taken now."""
        return self._ways.now

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Prepare the model, without effect on plain calls; restore it at the end."""
        self._ways.choose()
        with ExitStack() as stack:
            for switch in self.switches:
                stack.enter_context(switch.installed())
            stack.enter_context(self._units.installed(self._ways.now))
            yield

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        """Look at the arguments of a call, before it is made."""
        return Inputs(args, kwargs, self._written)

    def look(self) -> Snapshot:
        """Look at what the model keeps before a call; the first time, recall what is known of it in this state."""
        before = self._transactions.kept.look()
        if self._is_new:
            self._is_new = False
            if self._caches.found is None and not any(switch.is_custom for switch in self.switches):
                self.context.found = recall(self._model, (self._key, before.mark()))
        return before

    def cond_pass(
        self,
        denoiser: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        rows: Rows | None = None,
        inputs: Inputs | None = None,
        weak_call: WeakCall | None = None,
    ) -> tuple[Any, GuidedCall]:
        """Make a call that is going to be guided, and find out on the way what helps its weak passes.

        Args:
            denoiser: the callable whose call is being guided.
            args: positional arguments of the call.
            kwargs: keyword arguments of the call.
            rows: its cond rows; all, if left out.
            inputs: the same arguments, where they have been looked at already.
            weak_call: as in `GuidedCall`.

        Returns:
            What the denoiser returns for this call, and what to pass to `weak_predictions`.
        """
        if inputs is None or not inputs.are(args, kwargs):
            inputs = self.inputs(args, kwargs)
        call = GuidedCall(denoiser, inputs, rows, weak_call=weak_call)
        call.layout = layout_of(args, kwargs, rows)
        before, kept_before = self.look(), self._transactions.keeps_state
        with self._transactions.cond_pass(call, before) as randomness:
            output = self._cond_pass(call, args, kwargs, randomness)
        if call.changes_state and call.weaks is not None:  # it has kept what belongs to rows of ours
            before.put_back()
            self._ways.stop_batching(RowsError("it keeps something from one call to the next"))
            call.weaks, call.prefix, call.check = None, None, None
            output = denoiser(*call.inputs.again()[0], **call.inputs.again()[1])
            call.after = self._transactions.kept.look(before)
        if call.changes_state and not kept_before:
            forget(self._model)  # what it computes in other calls depends on what it keeps
        call.inputs.compare()
        return output, call

    def _cond_pass(
        self, call: GuidedCall, args: tuple[Any, ...], kwargs: dict[str, Any], randomness: Randomness
    ) -> Any:
        ways, known = self._ways, self.context.found.layouts
        ways.notice_compiling()
        obstacle, before, self._last = self.context.found.in_full.get(call.layout), self._last, call.layout
        if ways.shares and obstacle is not None and before == call.layout:  # a call now and then is not worth a word
            ways.tell_of_full_passes(obstacle)
        if self.full.is_taken(call) and self.full.is_to_be_checked(call) and not ways.streams_weights:
            output = call.denoiser(*args, **kwargs)
            call.changes_state = randomness.is_used()
            return output
        batch = first_batch(args, kwargs)
        is_shared = ways.shares and obstacle is None
        if not is_shared or batch is None or (call.rows is not None and not call.rows.fit(batch)):
            return call.denoiser(*args, **kwargs)
        cond = slice(None) if call.rows is None else call.rows.of(batch)
        if call.layout in known and known[call.layout].prefix.has_new_hooks():
            del known[call.layout]
        is_batched = ways.now == "batched" and call.weak_call is None  # hosts say how to cut, not how to add rows
        if is_batched and call.layout in known and known[call.layout].in_one_pass:
            try:
                return self._batched.cond_pass(call, batch, cond)
            except RowsError as error:
                ways.stop_batching(error)
        once = dataclasses.replace(call) if is_batched else None  # as it is made here: weak passes may go another way
        output = self._recorded(call, args, kwargs, batch, cond)
        if once is not None:
            call.check = partial(self._batched.compare, once, batch, cond, predictions(output))
        return output

    def _recorded(
        self, call: GuidedCall, args: tuple[Any, ...], kwargs: dict[str, Any], batch: int, cond: Indices
    ) -> Any:
        """Make a call, and record its prefix."""
        context, transactions = self.context, self._transactions
        known = context.found.layouts.get(call.layout)
        look = partial(transactions.kept.look, call.before) if known is None or transactions.keeps_state else None
        starts, units = self._units.starts, self._units.prefix
        if known is None:
            context.recorded[call.layout] += 1
            prefix: Prefix = Recording(
                starts, batch, cond, context.found.keeps.get(call.layout, ()), self._units.aside, look
            )
        else:
            prefix = Repetition(known.prefix, starts, batch, cond, look)
            if look is None:
                units = [unit for unit in units if id(unit) in known.prefix.units]
        with pushed(self._units.patches(units), [prefix.action(unit) for unit in units]):
            output = call.denoiser(*args, **kwargs)
        prefix.finish()
        if isinstance(prefix, Repetition) and prefix.differs:
            context.found.layouts.pop(call.layout, None)
        else:
            call.prefix = prefix
        return output

    def weak_predictions(
        self,
        call: GuidedCall,
        cond: Sequence[Tensor],
        denoiser: Callable[..., Any] | None = None,
        inputs: Inputs | None = None,
    ) -> list[list[Tensor]]:
        """Compute the weak predictions of a call.

        Args:
            call: what `cond_pass` gave.
            cond: the call's own predictions on its cond rows.
            denoiser: what makes weak passes, where that is not what made the cond pass.
            inputs: its arguments, where they are others.

        Returns:
            For each branch, one weak prediction per prediction of the denoiser.
        """
        call.cond = cond
        if denoiser is not None:
            call.denoiser = denoiser
        if inputs is not None:
            call.inputs = inputs
        if call.rows is None:
            call.unskipped = dict.fromkeys(range(len(self.switches)), cond)
        if call.weaks is not None:
            return call.weaks
        weaks = None if call.reuses else self._shared.weak_predictions(call)
        if weaks is None:
            return self.full.weak_predictions(call)
        self.full.make_again(call, is_checked=True)
        if call.check is not None and call.changes_state:
            self._ways.stop_batching(RowsError("it keeps something from one call to the next"))
        elif call.check is not None:
            call.check(weaks)
        return weaks


def _check_different(switches: Sequence[Switch], branches: Sequence[Branch]) -> None:
    """Raise if two branches would compute the same."""
    seen: dict[object, int] = {}
    for i, (switch, branch) in enumerate(zip(switches, branches, strict=True)):
        what = switch.key
        if what in seen:
            first = branches[seen[what]].scale
            both = f" {first + branch.scale}" if is_real(first) and is_real(branch.scale) else ""
            raise SettingError(
                f"branches {seen[what]} and {i} perturb the same layers in the same way. Give one of them, with "
                f"scale{both or ' the sum of both'}."
            )
        seen[what] = i
