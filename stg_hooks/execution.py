"""How the weak predictions of a call are computed, and by which way."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stg_hooks.absent import AbsentError, absent_in
from stg_hooks.batched import BatchedPass, RowsError
from stg_hooks.calls import first_batch, predictions, replace_predictions, take_rows
from stg_hooks.errors import CallError, SettingError, StgWarning, closest
from stg_hooks.inspection import parameter_names
from stg_hooks.layers import Layer, find_layers
from stg_hooks.patching import Patch, patched, pushed
from stg_hooks.prefix import Place, PrefixMismatchError, Recording, prefix_units
from stg_hooks.settings import Branch
from stg_hooks.skip import Switch

EXECUTIONS = ("auto", "sequential", "batched", "full")

Layout = tuple[object, ...]


class _Local(threading.local):
    in_weak_pass = False


_LOCAL = _Local()


def in_weak_pass() -> bool:
    """Tell whether this thread is computing a weak prediction, which nobody is to guide again."""
    return _LOCAL.in_weak_pass


@contextmanager
def weak_pass() -> Iterator[None]:
    """Let nobody guide, or look at, the calls that this thread makes within a `with`."""
    before, _LOCAL.in_weak_pass = _LOCAL.in_weak_pass, True
    try:
        yield
    finally:
        _LOCAL.in_weak_pass = before


@dataclasses.dataclass
class Stats:
    """What has happened so far to calls that are guided."""

    calls: int = 0
    """Calls of the denoiser that the target made."""
    guided_calls: int = 0
    """Those to which a guidance term was added."""
    weak_passes: int = 0
    """Weak predictions that were computed, one per guided call and branch."""
    blocks_run: int = 0
    """Numbered layers that were computed for weak predictions."""
    blocks_saved: int = 0
    """Numbered layers that were not: skipped, or shared with the cond pass."""
    seconds: float = 0.0
    """Time spent on guidance after the cond pass has returned; on a GPU, the time to launch it."""


@dataclasses.dataclass
class GuidedCall:
    """One call that is being guided, between its cond pass and its weak passes."""

    denoiser: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batched_cfg: bool
    recording: Recording | None = None
    weaks: list[list[Tensor]] | None = None
    """The weak predictions, where they came with the cond pass."""
    check: Callable[[list[list[Tensor]]], None] | None = None
    """What remains to be done with the weak predictions once they are known."""


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
    separately. Where a model turns out not to allow a way, the next one is taken from then on, and a warning says so:
    batched, sequential, full.
    """

    def __init__(self, model: nn.Module, branches: Sequence[Branch], execution: str, stats: Stats) -> None:
        """Resolve the layers of every branch; touch nothing.

        Args:
            model: the module that holds the layers.
            branches: what to skip, one weak prediction each.
            execution: one of `EXECUTIONS`.
            stats: where to count weak passes and blocks.

        Raises:
            LayerError: a layer that does not exist or cannot be skipped in its mode.
            SettingError: an unknown execution, or two branches that are the same.
        """
        if execution not in EXECUTIONS:
            names = ", ".join(map(repr, EXECUTIONS))
            raise SettingError(f"execution={execution!r}: there is {names}.{closest(str(execution), EXECUTIONS)}")
        self._streams = weights_are_streamed(model)
        if execution == "auto":
            execution = "batched" if self._streams else "sequential"
        self.way = execution
        self._stats = stats
        self._model = model
        self._names = parameter_names(model)
        self.switches = [Switch(model, branch.layers, branch.mode, branch.kind) for branch in branches]
        _check_different(self.switches, branches)
        layers = find_layers(model)
        self._blocks = {id(layer.module) for layer in layers if layer.index is not None}
        self._starts = [[_block_of(module, layers) for module in switch.modules] for switch in self.switches]
        self._prefix = prefix_units(model, [start for starts in self._starts for start in starts])
        skipped = [module for switch in self.switches for module in switch.modules]
        batched = prefix_units(model, skipped)
        self._blocks_in = {
            id(unit): sum(id(module) in self._blocks for module in unit.modules()) for unit in (*self._prefix, *batched)
        }
        # What surrounds the blocks may hold tables that have no rows.
        self._batched = [u for u in batched if self._blocks_in[id(u)] or any(u is module for module in skipped)]
        self._patches: dict[int, Patch] = {}
        self._wanted: set[Place] = set()
        self._calls = 0
        self._has_shared = False
        self._proven: set[Layout] = set()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Prepare the model, without effect on plain calls; restore it at the end."""
        units = {
            "full": [],
            "sequential": self._prefix,
            "batched": list({id(unit): unit for unit in (*self._prefix, *self._batched)}.values()),
        }
        with ExitStack() as stack:
            for switch in self.switches:
                stack.enter_context(switch.installed())
            self._patches = {id(unit): stack.enter_context(patched(unit)) for unit in units[self.way]}
            yield

    def _patches_of(self, units: Sequence[nn.Module]) -> list[Patch]:
        return [self._patches[id(unit)] for unit in units]

    def cond_pass(
        self, denoiser: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], batched_cfg: bool
    ) -> tuple[Any, GuidedCall]:
        """Make a call that is going to be guided, and find out on the way what helps its weak passes.

        Args:
            denoiser: the callable whose call is being guided.
            args: positional arguments of the call.
            kwargs: keyword arguments of the call.
            batched_cfg: the rows of the call are `[uncond, cond]`.

        Returns:
            What the denoiser returns for this call, and what to pass to `weak_predictions`.
        """
        call = GuidedCall(denoiser, args, kwargs, batched_cfg)
        batch = first_batch(args, kwargs)
        if self.way == "full" or batch is None or (batched_cfg and batch % 2):
            return denoiser(*args, **kwargs), call
        cond = slice(batch // 2, None) if batched_cfg else slice(None)
        once = dataclasses.replace(call)  # as it is made here: weak passes may go another way
        if self.way == "batched" and _layout(call, cond) in self._proven:
            try:
                return self._batched_pass(call, batch, cond), call
            except RowsError as error:
                self._stop_batching(error)
        self._calls += 1
        recording = Recording(self._model, self._starts, batch, cond, self._wanted, self._is_thorough)
        with pushed(self._patches_of(self._prefix), [recording.action(unit) for unit in self._prefix]):
            output = denoiser(*args, **kwargs)
        recording.finish()
        call.recording = recording
        if self.way == "batched":
            own = predictions(output)
            call.check = lambda weaks: self._try_batched(once, batch, cond, own, weaks)
        return output, call

    @property
    def _is_thorough(self) -> bool:
        # What a model keeps may be a cache that its first call fills. Who moves weights about may move buffers, too.
        return self._calls <= 2 and not self._streams

    def _batched_pass(self, call: GuidedCall, batch: int, cond: slice) -> Any:
        skipped = [switch.actions for switch in self.switches]
        once = BatchedPass(skipped, batch, cond, self._batched)
        args, kwargs = once.arguments(call.args, call.kwargs, self._names)
        with once.running(self._patches_of(self._batched)):
            output = call.denoiser(*args, **kwargs)
        own, call.weaks = once.split(predictions(output))
        for branch, not_run in enumerate(once.not_run):
            self._count(branch, not_run)
        return replace_predictions(output, own)

    def _try_batched(
        self, call: GuidedCall, batch: int, cond: slice, own: list[Tensor], weaks: list[list[Tensor]]
    ) -> None:
        """Make a call once more in one pass, and compare: some models let rows influence each other."""
        stats = dataclasses.replace(self._stats)
        try:
            with weak_pass():
                again = predictions(self._batched_pass(call, batch, cond))
            expected = [*own, *itertools.chain(*weaks)]
            got = [*again, *itertools.chain(*(call.weaks or []))]
            if not all(_agree(one, other) for one, other in zip(got, expected, strict=True)):
                raise RowsError("rows influence each other, or were cut wrongly")
            self._proven.add(_layout(call, cond))
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

    def weak_predictions(self, call: GuidedCall, cond: Sequence[Tensor]) -> list[list[Tensor]]:
        """Compute the weak predictions of a call.

        Args:
            call: what `cond_pass` gave.
            cond: the call's own predictions on its cond rows.

        Returns:
            For each branch, one weak prediction per prediction of the denoiser.

        Raises:
            CallError: the weak pass returned other shapes than the cond pass: rows were cut wrongly.
        """
        if call.weaks is not None:
            return call.weaks
        args, kwargs = call.args, call.kwargs
        if call.batched_cfg:
            half = cond[0].shape[0]
            args, kwargs = take_rows(args, kwargs, self._names, 2 * half, slice(half, None))
            if call.recording is not None and call.recording.batch != 2 * half:
                call.recording = None
        results = []
        is_shared = True
        for branch, switch in enumerate(self.switches):
            weak, reason = self._shared_pass(branch, call, args, kwargs, cond)
            if weak is None:
                is_shared = False
                with weak_pass(), switch.switched_on():
                    weak = predictions(call.denoiser(*args, **kwargs))
                self._count(branch, ())
            if [w.shape for w in weak] != [c.shape for c in cond]:
                raise CallError(
                    f"the weak pass of {type(self._model).__name__} returned {[tuple(w.shape) for w in weak]}, but the "
                    f"cond pass {[tuple(c.shape) for c in cond]}: the rows of its arguments could not be told apart. "
                    "Guide the calls with stg.Guider, which is given cond and uncond separately."
                )
            if reason is not None:  # an error that has nothing to do with sharing has been raised again
                self._stop_sharing(reason)
            results.append([tensor.clone() for tensor in weak])  # the next call may use their memory
        if call.check is not None and is_shared:
            call.check(results)
        return results

    def _shared_pass(
        self,
        branch: int,
        call: GuidedCall,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        cond: Sequence[Tensor],
    ) -> tuple[list[Tensor] | None, str | None]:
        """Run a weak pass on top of a recording.

        Returns:
            The predictions, or `None` where a full pass is needed; and why from now on each one has to be, if so.
        """
        recording = call.recording
        if recording is None or recording.ends[branch] is None or self.way == "full":
            return None, None
        if recording.obstacle:
            return None, recording.obstacle
        if recording.has_new_state:
            return None, "it keeps something from one call to the next" if self._calls > 1 else None
        weak, reason = None, None
        try:
            # The replay comes last, so that it is asked first: up to its end no layer is skipped.
            replayed = recording.replayed(branch, self._patches_of(self._prefix), self._prefix)
            with weak_pass(), self.switches[branch].switched_on(), replayed:
                weak = predictions(call.denoiser(*args, **kwargs))
        except (PrefixMismatchError, AbsentError):
            pass
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            # Before rows have been cut successfully they are under suspicion; if innocent, a full pass fails as well.
            suspects = (RuntimeError, IndexError, TypeError, ValueError)  # themselves, not what derives from them
            if self._has_shared or not call.batched_cfg or type(error) not in suspects:
                raise
            reason = f"{type(error).__name__}: {error}"
        if recording.is_broken:
            return None, "it calls other blocks in the weak pass than in the cond pass"
        absents = [] if weak is None else absent_in(weak)
        for origin in (origin for absent in absents for origin in absent.origins):
            origin.asked = True
        asked = recording.asked()
        if asked:
            self._wanted |= asked  # kept from the next call on
            return None, None
        if weak is not None and [w.shape for w in weak] != [c.shape for c in cond]:
            return None, "the rows of its hidden states cannot be told apart"
        if weak is not None:
            self._has_shared = True
            self._count(branch, recording.answered(branch))
        return weak, reason

    def _stop_sharing(self, reason: str) -> None:
        self.way = "full"
        self._warn(
            f"{type(self._model).__name__} does not let the weak pass share work with the cond pass ({reason}). "
            "Guidance stays exact, at the price of a full pass. execution='full' asks for that, without this warning."
        )

    def _warn(self, message: str) -> None:
        warnings.warn(message, StgWarning, stacklevel=2)

    def _count(self, branch: int, not_run: Iterable[int]) -> None:
        """Count a weak pass in which these units did not run, nor the branch's skipped layers."""
        switch = self.switches[branch]
        skipped = sum(id(module) in self._blocks for module in switch.modules) if switch.is_bypass else 0
        saved = skipped + sum(self._blocks_in[unit] for unit in not_run)
        self._stats.weak_passes += 1
        self._stats.blocks_saved += saved
        self._stats.blocks_run += len(self._blocks) - saved


def _layout(call: GuidedCall, cond: slice) -> Layout:
    leaves = pytree.tree_leaves((call.args, call.kwargs))
    return cond.start, *(tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor))


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
        what = switch.mode, branch.kind, tuple(layer.name for layer in switch.layers)
        if what in seen:
            first = branches[seen[what]].scale
            both = "" if isinstance(first, Tensor) or isinstance(branch.scale, Tensor) else f" {first + branch.scale}"
            raise SettingError(
                f"branches {seen[what]} and {i} perturb the same layers in the same way. Give one of them, with "
                f"scale{both or ' the sum of both'}."
            )
        seen[what] = i


def weights_are_streamed(model: nn.Module) -> bool:
    """Tell whether a model's weights are brought to the device piece by piece in each pass: the rule of `"auto"`.

    With L blocks and k the first skipped one, a sequential step brings `(2 * L - k - 1) / L` times the weights that a
    batched one brings (1.27 for Mochi), for the same arithmetic. Where weights stay, batched only saves launches, and
    costs memory and copies. `python -m benchmarks.cost`, with and without `--offload`, measures both.

    Args:
        model: the denoiser, as it is when guidance is set up.

    Returns:
        Whether accelerate (CPU or disk offload) or diffusers (group offload) has left its mark on a submodule.
    """
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        if any(getattr(one, "offload", False) for one in getattr(hook, "hooks", [hook])):
            return True
        if "group_offloading" in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}):
            return True
    return False


def _agree(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    tolerance = 1e-4 if one.dtype in (torch.float32, torch.float64) else 3e-2
    difference = (one.float() - other.float()).square().mean().sqrt()
    return bool(difference <= tolerance * other.float().std() + 1e-12)
