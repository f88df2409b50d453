"""How the weak predictions of a call are computed, and by which way."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stg_hooks.errors import CallError, SettingError, StgWarning, closest
from stg_hooks.guidance.settings import Branch
from stg_hooks.guidance.trace import Stats
from stg_hooks.hooks.compiled import compiled_among, eagerly, is_compiled, surrounding
from stg_hooks.hooks.forward import Patch, patched, pushed
from stg_hooks.model.layers import Layer, find_layers
from stg_hooks.model.source import parameter_names
from stg_hooks.model.tensors import computes_in_half
from stg_hooks.modes.switch import Switch
from stg_hooks.passes.batched import BatchedPass, RowsError
from stg_hooks.passes.caches import Caches
from stg_hooks.passes.effects import Randomness
from stg_hooks.passes.findings import Findings, KnownLayout, forget, recall
from stg_hooks.passes.gaps import GapError
from stg_hooks.passes.guided_call import Arguments, GuidedCall, checking, layout_of, weak_pass
from stg_hooks.passes.inputs import Inputs, Written
from stg_hooks.passes.rows import (
    Indices,
    Rows,
    agree,
    are_as_finite,
    first_batch,
    halves,
    own_predictions,
    predictions,
    replace_predictions,
    take_rows,
)
from stg_hooks.passes.shared import (
    DRAWS_RANDOM_NUMBERS,
    Layout,
    Prefix,
    PrefixMismatchError,
    Recording,
    Repetition,
    prefix_units,
)
from stg_hooks.passes.state import Snapshot
from stg_hooks.passes.streaming import weights_are_streamed
from stg_hooks.passes.transaction import Transactions

EXECUTIONS = ("auto", "sequential", "batched", "full")


def check_execution(execution: object) -> None:
    """Raise unless `execution` is one of `EXECUTIONS`."""
    if execution not in EXECUTIONS:
        names = ", ".join(map(repr, EXECUTIONS))
        raise SettingError(f"execution={execution!r}: there is {names}.{closest(str(execution), EXECUTIONS)}")


_LAYOUTS = 64
_PATIENCE = 2  # calls
_SUSPECTS = (RuntimeError, IndexError, TypeError, ValueError)  # themselves, not what derives from them


class NotSharedError(Exception):
    """Weak passes cannot be made on top of the cond pass."""


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
    assumed (`"whole"`). A model that is compiled as a whole, or has step caches, allows `"full"` only.
    """

    def __init__(
        self, model: nn.Module, branches: Sequence[Branch], execution: str, stats: Stats, caches: Caches
    ) -> None:
        """Resolve the layers of every branch; touch nothing.

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
        self._streams = weights_are_streamed(model)
        is_auto = execution == "auto"
        if is_auto:
            execution = "batched" if self._streams else "sequential"
        self.way = execution
        self._is_chosen = not is_auto
        self._stats = stats
        self._caches = caches
        self._model = model
        self._names = parameter_names(model)
        layers = find_layers(model)
        self.switches = [Switch(model, branch.layers, branch.mode, branch.kind, layers) for branch in branches]
        _check_different(self.switches, branches)
        self._blocks = {id(layer.module) for layer in layers if layer.index is not None}
        starts = [[_block_of(module, layers) for module in switch.modules] for switch in self.switches]
        self._starts = [{id(module) for module in modules} for modules in starts]
        self._prefix = prefix_units(model, list(itertools.chain(*starts)))
        skipped = [module for switch in self.switches for module in switch.modules]
        batched = prefix_units(model, skipped)
        self._blocks_in = {
            id(unit): sum(id(module) in self._blocks for module in unit.modules()) for unit in (*self._prefix, *batched)
        }
        # What surrounds the blocks may hold tables that have no rows.
        self._batched = [u for u in batched if self._blocks_in[id(u)] or any(u is module for module in skipped)]
        # In the order in which one follows where the one before is not possible.
        self._units = {
            "batched": _unique(self._prefix, self._batched),
            "sequential": self._prefix,
            "full": [],
            "whole": [],
        }
        self._surrounding = {way: surrounding(model, units) for way, units in self._units.items()}
        self._uncompiled: list[nn.Module] = []
        self._patches: dict[int, Patch] = {}
        self._key = execution, *(switch.key for switch in self.switches)
        self._found = Findings()
        self._written: Written = {}
        self._is_new = True
        self._seen: Counter[Hashable] = Counter()  # how often a layout had to be recorded
        # Offloading hooks may move buffers, too.
        self._state = Transactions(model, self.switches, with_buffers=not self._streams)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Prepare the model, without effect on plain calls; restore it at the end."""
        self._choose()
        with ExitStack() as stack:
            for switch in self.switches:
                stack.enter_context(switch.installed())
            self._patches = {id(unit): stack.enter_context(patched(unit)) for unit in self._units[self.way]}
            yield

    def _choose(self) -> None:
        """Take the next way where the model, as it is now, does not allow the one that was asked for."""
        asked, ways = self.way, list(self._units)
        obstacle = advice = ""
        for way in ways[ways.index(asked) :]:
            compiled = compiled_among(self._surrounding[way])
            if self._caches.found is not None and way in ("batched", "sequential"):
                obstacle = f"what a step cache keeps ({self._caches.found.name}) depends on which pass computes it"
            elif compiled is not None:
                obstacle = f"{type(compiled).__name__} is compiled as a whole, so its blocks are not seen from outside"
                advice = " Compile the blocks instead, and it works: for block in model.blocks: block.compile()."
            else:
                break
        self.way = way
        self._uncompiled = [m for m in (*self._units[way], *self._surrounding[way]) if not is_compiled(m)]
        if way != asked and self._is_chosen:
            self._warn(
                f"execution={asked!r}: {obstacle}. Going on with execution={way!r}, which gives the same results; "
                f"execution='auto' asks for that without this warning.{advice}"
            )

    def _patches_of(self, units: Sequence[nn.Module]) -> list[Patch]:
        return [self._patches[id(unit)] for unit in units]

    def _agree(self, found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
        return agree(found, expected, computes_in_half(self._model))

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        """Look at the arguments of a call, before it is made."""
        return Inputs(args, kwargs, self._written)

    def _look(self) -> Snapshot:
        """Look at what the model keeps before a call; the first time, recall what is known of a model like this."""
        before = self._state.kept.look()
        if self._is_new:
            self._is_new = False
            if self._caches.found is None and not any(switch.is_custom for switch in self.switches):
                self._found = recall(self._model, (self._key, before.mark()))
        return before

    def cond_pass(
        self,
        denoiser: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        rows: Rows | None = None,
        inputs: Inputs | None = None,
        cut: Arguments | None = None,
    ) -> tuple[Any, GuidedCall]:
        """Make a call that is going to be guided, and find out on the way what helps its weak passes.

        Args:
            denoiser: the callable whose call is being guided.
            args: positional arguments of the call.
            kwargs: keyword arguments of the call.
            rows: its cond rows; all, if left out.
            inputs: the same arguments, where they have been looked at already.
            cut: as in `GuidedCall`.

        Returns:
            What the denoiser returns for this call, and what to pass to `weak_predictions`.
        """
        if inputs is None or not inputs.are(args, kwargs):
            inputs = self.inputs(args, kwargs)
        call = GuidedCall(denoiser, inputs, rows, cut=cut)
        call.layout = layout_of(args, kwargs, rows)
        before, kept_before = self._look(), self._state.keeps_state
        with self._state.cond_pass(call, before) as randomness:
            output = self._cond_pass(call, args, kwargs, randomness)
        if call.changes_state and call.weaks is not None:  # it has kept what belongs to rows of ours
            before.put_back()
            self._stop_batching(RowsError("it keeps something from one call to the next"))
            call.weaks, call.prefix, call.check = None, None, None
            output = denoiser(*call.inputs.again()[0], **call.inputs.again()[1])
            call.after = self._state.kept.look(before)
        if call.changes_state and not kept_before:
            forget(self._model)  # what it computes in other calls depends on what it keeps
        call.inputs.compare()
        return output, call

    def _cond_pass(
        self, call: GuidedCall, args: tuple[Any, ...], kwargs: dict[str, Any], randomness: Randomness
    ) -> Any:
        denoiser, rows, batch = call.denoiser, call.rows, first_batch(args, kwargs)
        if any(map(is_compiled, self._uncompiled)):
            self._stop_sharing("a part of it was compiled inside the `with`")
        if self.way == "full" and self._is_to_be_checked(call) and not self._streams:
            output = denoiser(*args, **kwargs)
            call.changes_state = randomness.is_used()
            return output
        if self.way in ("full", "whole") or batch is None or (rows is not None and not rows.fit(batch)):
            return denoiser(*args, **kwargs)
        cond = slice(None) if rows is None else rows.of(batch)
        known = self._found.known.get(call.layout)
        if known is not None and known.prefix.has_new_hooks():
            self._found.known.pop(call.layout)
            known = None
        is_batched = self.way == "batched" and call.cut is None  # hosts say how to cut, not how to add rows
        if is_batched and known is not None and known.in_one_pass:
            try:
                return self._batched_pass(call, batch, cond)
            except RowsError as error:
                self._stop_batching(error)
        once = dataclasses.replace(call) if is_batched else None  # as it is made here: weak passes may go another way
        look = partial(self._state.kept.look, call.before) if known is None or self._state.keeps_state else None
        units = self._prefix
        if known is None:
            self._seen[call.layout] += 1
            prefix: Prefix = Recording(self._starts, batch, cond, call.layout in self._found.keeps_all, look)
        else:
            prefix = Repetition(known.prefix, self._starts, batch, cond, look)
            if look is None:
                units = [unit for unit in units if id(unit) in known.prefix.units]
        with pushed(self._patches_of(units), [prefix.action(unit) for unit in units]):
            output = denoiser(*args, **kwargs)
        prefix.finish()
        if isinstance(prefix, Repetition) and prefix.differs:
            self._found.known.pop(call.layout, None)
        else:
            call.prefix = prefix
        if once is not None:
            own = predictions(output)
            call.check = lambda weaks: self._try_batched(once, batch, cond, own, weaks)
        return output

    def _batched_pass(self, call: GuidedCall, batch: int, cond: Indices) -> Any:
        skipped = [switch.actions for switch in self.switches]
        once = BatchedPass(skipped, batch, cond, self._batched)
        args, kwargs = once.arguments(*call.inputs.again(), self._names)
        with once.running(self._patches_of(self._batched)):
            output = call.denoiser(*args, **kwargs)
        own, call.weaks = once.split(predictions(output))
        for branch, not_run in enumerate(once.not_run):
            self._count(branch, not_run)
        return replace_predictions(output, own)

    def _try_batched(
        self, call: GuidedCall, batch: int, cond: Indices, own: list[Tensor], weaks: list[list[Tensor]]
    ) -> None:
        """Make a call once more in one pass, and compare: some models let rows influence each other."""
        stats = dataclasses.replace(self._stats)
        try:
            with self._state.transaction(call), weak_pass():
                again = predictions(self._batched_pass(call, batch, cond))
            expected = [*own, *itertools.chain(*weaks)]
            got = [*again, *itertools.chain(*(call.weaks or []))]
            if not self._agree(got, expected):
                raise RowsError("rows influence each other, or were cut wrongly")
            self._found.known[call.layout].in_one_pass = True
        except Exception as error:
            self._stop_batching(error)
        finally:
            vars(self._stats).update(vars(stats))

    def _stop_batching(self, error: Exception) -> None:
        self.way = "sequential"
        reason = f"{type(error).__name__}: {error}"
        self._warn(
            f"the calls of {type(self._model).__name__} cannot be made with more rows ({reason}). Going on "
            "with execution='sequential' instead of 'batched', which gives the same results."
        )

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
            call.alone = dict.fromkeys(range(len(self.switches)), cond)
        if call.weaks is not None:
            return call.weaks
        results = None if call.reuses else self._shared_passes(call)
        if results is None:
            if call.rows is not None:
                call.alone.clear()
            is_cut = self.way == "full" and call.rows is not None and not self._state.keeps_state
            if is_cut and self._is_to_be_checked(call):
                is_cut = self._check_rows(call)
            # Where a check is only put off to the next call, nothing is known about cutting rows.
            results = [self._full_pass(call, branch, is_cut) for branch in range(len(self.switches))]
            self._make_again(call, is_checked=is_cut)
            if call.conclude is not None:  # an error that has nothing to do with sharing has been raised again
                call.conclude()
        else:
            self._make_again(call, is_checked=True)
            if call.check is not None and call.changes_state:
                self._stop_batching(RowsError("it keeps something from one call to the next"))
            elif call.check is not None:
                call.check(results)
        return results

    # --- passes that share the prefix

    def _shared_passes(self, call: GuidedCall) -> list[list[Tensor]] | None:
        """Run the weak passes on top of the cond pass; `None` where full ones are needed."""
        prefix = call.prefix
        if prefix is None or self.way in ("full", "whole") or None in prefix.ends:
            return None
        if prefix.batch != (call.count if call.rows is None else call.rows.batch_of(call.count)):
            return None
        if prefix.obstacle == DRAWS_RANDOM_NUMBERS and self._seen[call.layout] <= _PATIENCE:
            return None  # it may have been another thread
        if prefix.obstacle:
            self._stop_sharing(prefix.obstacle, "whole" if prefix.obstacle == DRAWS_RANDOM_NUMBERS else "full")
            return None
        if prefix.has_new_state or (call.changes_state and not self._sets_again(prefix)):
            # The first time that may be a cache.
            if self._seen[call.layout] > 1:
                self._stop_sharing("it keeps something from one call to the next", "whole")
            return None
        is_to_be_checked = isinstance(prefix, Recording) and (call.rows is not None or call.is_comparable)
        if isinstance(prefix, Recording) and not is_to_be_checked and prefix.has_gaps:
            self._found.keeps_all.add(call.layout)  # without a check nothing would tell that NaN has come through
            return None
        is_known = isinstance(prefix, Repetition)
        if is_known and call.random_before is not None and not self._found.known[call.layout].draws:
            del self._found.known[call.layout]  # blocks whose calls are not looked at may draw them
            return None
        prefix.is_reused = prefix.is_reused or is_to_be_checked
        stats = dataclasses.replace(self._stats)
        results = []
        try:
            for branch, switch in enumerate(self.switches):
                # Without a copy of what the branch leaves: it would have the cond rows alone.
                with switch.switched_on():
                    results.append(self._shared_pass(call, prefix, branch))
                self._count(branch, prefix.answered(branch))
            if is_to_be_checked:
                self._check_shared(call, prefix, results)
        except (NotSharedError, PrefixMismatchError, GapError) as error:
            vars(self._stats).update(vars(stats))
            self._found.known.pop(call.layout, None)
            if isinstance(prefix, Repetition):
                pass  # this call goes another way than the one that was recorded: the next one is recorded anew
            elif prefix.is_broken:
                self._stop_sharing("it calls other blocks in the weak pass than in the cond pass")
            elif isinstance(error, GapError):
                self._found.keeps_all.add(call.layout)  # from the next call on
            else:
                call.conclude = partial(self._stop_sharing, str(error))
            return None
        if isinstance(prefix, Recording):
            if len(self._found.known) >= _LAYOUTS:
                self._found.known.clear()
            self._found.known[call.layout] = KnownLayout(Layout(prefix), call.random_before is not None)
        return results

    def _sets_again(self, prefix: Prefix) -> bool:
        """Tell whether a call has set what the model keeps before its blocks, as a weak pass will do again.

        What it has set after them may come from them, and be reused in a later call.
        """
        started = prefix.started
        return started is not None and not (started.changes() or started.written() or self._state.kept.replaced())

    def _shared_pass(self, call: GuidedCall, prefix: Prefix, branch: int) -> list[Tensor]:
        """Run a pass on the cond rows, up to the end of a branch's prefix from the record.

        Raises:
            NotSharedError: what it returns does not fit the cond pass.
            PrefixMismatchError: it took another way than the cond pass.
            GapError: outputs are wanted that were not kept.
        """
        try:
            found = self._replayed(call, prefix, branch)
        except _SUSPECTS as error:
            if type(error) not in _SUSPECTS:
                raise
            if prefix.has_gaps:
                raise GapError from error
            # Before rows have been cut successfully they are under suspicion; if innocent, a full pass fails as well.
            if call.rows is None or not isinstance(prefix, Recording):
                raise
            raise NotSharedError(f"{type(error).__name__}: {error}") from error
        if prefix.is_broken:
            raise PrefixMismatchError
        if [tensor.shape for tensor in found] != [c.shape for c in call.cond]:
            raise NotSharedError("the rows of its hidden states cannot be told apart")
        return found

    def _replayed(self, call: GuidedCall, prefix: Prefix, branch: int) -> list[Tensor]:
        for _ in range(2):
            args, kwargs = self._cond_rows(call)
            try:
                # The replay comes last, so that it is asked first: up to its end no layer is skipped.
                patches = self._patches_of(self._prefix)
                with self._state.transaction(call), weak_pass(), prefix.replayed(branch, patches, self._prefix):
                    return own_predictions(call.denoiser(*args, **kwargs))
            except RuntimeError as error:
                if prefix.is_dense or "single memory location" not in str(error):
                    raise
                prefix.is_dense = True
        raise AssertionError

    def _check_shared(self, call: GuidedCall, prefix: Prefix, weaks: Sequence[Sequence[Tensor]]) -> None:
        """Make a pass once more with nothing skipped: it has to give what the cond pass gave.

        Of many branches, those with the shortest and the longest prefix are tried.

        Raises:
            NotSharedError: it does not, and what `_shared_pass` raises.
        """
        by_length = sorted(range(len(self.switches)), key=lambda branch: prefix.ends[branch] or 0)
        for branch in {by_length[0], by_length[-1]}:
            # Without gradients: checkpointing, which computes this call again for them, makes no such pass.
            with torch.no_grad(), checking():
                again = self._shared_pass(call, prefix, branch)
                if call.rows is not None:
                    call.alone[branch] = again
            if prefix.has_gaps and not all(are_as_finite(found, call.cond) for found in (again, *weaks)):
                raise GapError
            if not self._agree(again, call.cond):
                if prefix.has_gaps:
                    raise GapError
                raise NotSharedError("with nothing skipped, the cond rows alone do not give the cond prediction again")

    def _stop_sharing(self, reason: str, way: str = "full") -> None:
        self.way, self._uncompiled = way, []
        self._warn(
            f"{type(self._model).__name__} does not let the weak pass share work with the cond pass ({reason}). "
            "Weak passes are made in full from now on. execution='full' asks for that, without this warning."
        )

    # --- the textbook

    def full_pass(
        self, branch: int, denoiser: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Make a call with the layers of one branch bypassed, and return what the denoiser returns."""
        switch = self.switches[branch]
        apart = self._caches.apart(id(switch), switch.modules, switch.is_bypass)
        with weak_pass(), apart, switch.switched_on():
            output = denoiser(*args, **kwargs)
        self._count(branch, ())
        return output

    def _full_pass(self, call: GuidedCall, branch: int, is_cut: bool) -> list[Tensor]:
        """Run a weak pass as the textbook does, on the cond rows alone or on all."""
        args, kwargs = self._cond_rows(call) if is_cut else call.inputs.again()
        with self._state.full_pass(call, branch):
            # The model may keep its predictions itself, in memory that is put back.
            weak = own_predictions(self.full_pass(branch, call.denoiser, args, kwargs))
        if call.rows is not None and not is_cut:
            weak = [call.rows.take(tensor) for tensor in weak]
        if call.rows is None or not is_cut:
            call.alone[branch] = call.cond
        return weak

    def _make_again(self, call: GuidedCall, is_checked: bool) -> None:
        """Make the first calls of a layout once more with nothing skipped: what is kept out of sight shows in them.

        Args:
            call: what `cond_pass` gave.
            is_checked: it has been compared with weak passes that share work with it.

        Raises:
            CallError: what comes out is another prediction than the cond pass has made.
        """
        count = self._found.again[call.layout] = self._found.again.get(call.layout, 0) + 1
        if count > _PATIENCE or not call.is_comparable or self._caches.found is not None:
            return
        suspects = self._state.suspects()
        is_suspect = bool(suspects) or self._state.keeps_state or self._state.kept.has_opaque()
        if not is_suspect and (is_checked or count > 1):
            return
        for _ in range(2 if is_suspect else 1):  # what is counted modulo two comes out right once
            args, kwargs = call.inputs.again()
            with self._state.transaction(call), torch.no_grad(), checking(), weak_pass(), eagerly():
                again = own_predictions(call.denoiser(*args, **kwargs))
            again = again if call.rows is None else [call.rows.take(tensor) for tensor in again]
            if not self._agree(again, call.cond):
                found = "; ".join(suspects[:2])
                raise CallError(
                    f"{type(self._model).__name__} predicts something else when the same call is made once more, so it "
                    "keeps something from one call to the next that cannot be put back after a weak pass"
                    f"{f' ({found})' if found else ''}. Keep it in an attribute of the model, or switch it off."
                )

    def _is_to_be_checked(self, call: GuidedCall) -> bool:
        return call.rows is not None and call.layout not in self._found.cut

    def _check_rows(self, call: GuidedCall) -> bool:
        """Make a pass on the cond rows with nothing skipped, once: it has to give what the cond pass gave.

        Returns:
            Whether it does.
        """
        assert call.rows is not None
        try:
            args, kwargs = self._cond_rows(call)
            no_caches = self._caches.apart(self, [self._model], bypassed=False)
            with self._state.transaction(call), torch.no_grad(), checking(), weak_pass(), eagerly(), no_caches:
                again, cond = own_predictions(call.denoiser(*args, **kwargs)), call.cond
                if self._caches.found is not None:  # which have made the cond pass another one than it is by itself
                    args, kwargs = call.inputs.again()
                    cond = [call.rows.take(t) for t in predictions(call.denoiser(*args, **kwargs))]
            if self._agree(again, cond):
                self._found.cut.add(call.layout)
                if self._caches.found is None:
                    call.alone = dict.fromkeys(range(len(self.switches)), again)
                return True
            reason = "the cond rows alone do not give the cond prediction again"
        except _SUSPECTS as error:
            if type(error) not in _SUSPECTS:
                raise
            reason = f"{type(error).__name__}: {error}"
        call.conclude = partial(self._stop_cutting, reason)
        return False

    def _stop_cutting(self, reason: str) -> None:
        self.way = "whole"
        self._warn(
            f"the calls of {type(self._model).__name__} cannot be cut down to their cond rows ({reason}). Weak "
            "passes are made with all rows from now on."
        )

    def _cond_rows(self, call: GuidedCall) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = call.inputs.again()
        if call.rows is None:
            return args, kwargs
        if call.cut is not None:
            return call.cut(args, kwargs)
        batch = call.rows.batch_of(call.count)
        return take_rows(args, kwargs, self._names, batch, call.rows.of(batch))

    # --- the weak model's uncond prediction

    def weak_halves(self, denoiser: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call with rows `[uncond, cond]`, in which the weak model of the first branch predicts the uncond ones.

        Each half is a call of its own. That they give what the whole call does is found out once for each layout; where
        they do not, or the model keeps something, both models make whole calls.

        Returns:
            What the denoiser returns for the whole call, with these predictions.
        """
        batch = first_batch(args, kwargs)
        if batch is None or batch % 2:
            raise CallError(f"a call with {batch or 'no'} rows cannot be [uncond, cond], which batched_cfg=True says.")
        unconds, conds = (Rows.chosen(half, batch) for half in (slice(batch // 2), slice(batch // 2, None)))
        layout, before = layout_of(args, kwargs, conds), self._look()
        halved = {layout, layout_of(args, kwargs, unconds)}
        if halved <= self._found.cut and not self._state.keeps_state:
            inputs, found = self.inputs(args, kwargs), []
            for rows in (unconds, conds):
                assert rows is not None
                own_args, own_kwargs = take_rows(*inputs.again(), self._names, batch, rows.of(batch))
                with self.switches[0].switched_on() if rows is unconds else nullcontext():
                    output = denoiser(*own_args, **own_kwargs)
                found.append(own_predictions(output))
            if not before.differs():
                return replace_predictions(output, [torch.cat(pair) for pair in zip(*found, strict=True)])
            before.put_back()  # and go the long way, from now on
            args, kwargs = inputs.again()
        output, call = self.cond_pass(denoiser, args, kwargs, unconds)
        own = own_predictions(output)
        stats = dataclasses.replace(self._stats)
        (weak,) = self.weak_predictions(call, [halves(tensor)[0] for tensor in own])
        vars(self._stats).update(vars(stats))  # a weak pass takes the place of an uncond one
        if halved - self._found.cut == {layout}:
            other = dataclasses.replace(call, rows=conds, layout=layout, cond=[halves(tensor)[1] for tensor in own])
            if not self._check_rows(other) and other.conclude is not None:
                other.conclude()
        joined = [torch.cat([uncond, halves(tensor)[1]]) for uncond, tensor in zip(weak, own, strict=True)]
        return replace_predictions(output, joined)

    def _warn(self, message: str) -> None:
        warnings.warn(message, StgWarning, stacklevel=2)

    def _count(self, branch: int, not_run: Iterable[int]) -> None:
        """Count a weak pass in which these units did not run, nor the branch's skipped layers."""
        switch = self.switches[branch]
        skipped = sum(id(module) in self._blocks for module in switch.bypassed)
        saved = skipped + sum(self._blocks_in[unit] for unit in not_run)
        self._stats.weak_passes += 1
        self._stats.blocks_saved += saved
        self._stats.blocks_run += len(self._blocks) - saved


def _unique(*units: Sequence[nn.Module]) -> list[nn.Module]:
    return list({id(unit): unit for unit in itertools.chain(*units)}.values())


def _block_of(module: nn.Module, layers: Sequence[Layer]) -> nn.Module:
    """Find the block that a module is in: a prefix ends before it."""
    for layer in layers:
        if any(inner is module for inner in layer.module.modules()):
            return layer.module
    return module


def _check_different(switches: Sequence[Switch], branches: Sequence[Branch]) -> None:
    """Raise if two branches would compute the same."""
    seen: dict[object, int] = {}
    for i, (switch, branch) in enumerate(zip(switches, branches, strict=True)):
        what = switch.key
        if what in seen:
            first = branches[seen[what]].scale
            both = "" if isinstance(first, Tensor) or isinstance(branch.scale, Tensor) else f" {first + branch.scale}"
            raise SettingError(
                f"branches {seen[what]} and {i} perturb the same layers in the same way. Give one of them, with "
                f"scale{both or ' the sum of both'}."
            )
        seen[what] = i
