"""How the weak predictions of a call are computed, and by which way."""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stg_hooks.batched import BatchedPass, RowsError
from stg_hooks.calls import first_batch, predictions, replace_predictions, take_rows
from stg_hooks.errors import CallError, SettingError, StgWarning, closest
from stg_hooks.inspection import parameter_names
from stg_hooks.layers import find_layers
from stg_hooks.patching import patched, pushed
from stg_hooks.prefix import PrefixMismatchError, Recording, prefix_units
from stg_hooks.settings import Branch
from stg_hooks.skip import Switch

EXECUTIONS = ("auto", "sequential", "batched", "full")


class _Local(threading.local):
    in_weak_pass = False


_LOCAL = _Local()


def in_weak_pass() -> bool:
    """Tell whether this thread is computing a weak prediction, which nobody is to guide again."""
    return _LOCAL.in_weak_pass


@contextmanager
def _weak_pass() -> Iterator[None]:
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


class Execution:
    """Computes the weak predictions of one denoiser, one per branch.

    `"full"`: the textbook, one more pass of the denoiser on the cond rows per branch, with its layers bypassed.
    `"sequential"`: the same, but what runs before the branch's first skipped layer answers from what the cond pass has
    computed; the cond pass itself runs untouched.
    `"batched"`: the weak rows ride along in the cond pass, from the first skipped layer on.
    `"auto"`: batched where a second sweep over the weights is what costs (they are streamed from the CPU or the disk),
    sequential elsewhere: it computes the same and leaves the cond pass bit-identical.
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
            SettingError: an unknown execution.
        """
        if execution not in EXECUTIONS:
            names = ", ".join(map(repr, EXECUTIONS))
            raise SettingError(f"execution={execution!r}: there is {names}.{closest(str(execution), EXECUTIONS)}")
        if execution == "auto":
            execution = "batched" if weights_are_streamed(model) else "sequential"
        self.way = execution
        self._stats = stats
        self._model = model
        self._names = parameter_names(model)
        self.switches = [Switch(model, branch.layers, branch.mode) for branch in branches]
        skipped = [layer.module for switch in self.switches for layer in switch.layers]
        self._blocks = {id(layer.module) for layer in find_layers(model) if layer.index is not None}
        units = prefix_units(model, skipped) if execution != "full" else []
        self._blocks_in = {id(u): sum(id(module) in self._blocks for module in u.modules()) for u in units}
        if execution == "batched":  # what surrounds the blocks may hold tables that have no rows
            units = [unit for unit in units if self._blocks_in[id(unit)] or any(unit is layer for layer in skipped)]
        self._units = units
        self._keep_all = False
        self._proven: set[tuple[int, ...]] = set()
        self._proven_rows: set[tuple[int, int | None]] = set()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Prepare the model, without effect on plain calls; restore it at the end."""
        with ExitStack() as stack:
            for switch in self.switches:
                stack.enter_context(switch.installed())
            self._patches = [stack.enter_context(patched(unit)) for unit in self._units]
            yield

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
        if self.way == "batched":
            try:
                return self._batched(call, batch, cond), call
            except (RowsError, RuntimeError, ValueError, IndexError, TypeError) as error:
                self._give_up_batched(error)
        skipped = [[layer.module for layer in switch.layers] for switch in self.switches]
        recording = Recording(skipped, batch, cond, self._keep_all)
        with pushed(self._patches, [recording.action(unit) for unit in self._units]):
            output = denoiser(*args, **kwargs)
        call.recording = recording
        return output, call

    def _batched(self, call: GuidedCall, batch: int, cond: slice) -> Any:
        skipped = [switch.actions for switch in self.switches]
        once = BatchedPass(skipped, batch, cond, self._units)
        args, kwargs = once.arguments(call.args, call.kwargs, self._names)
        with once.running(self._patches):
            output = call.denoiser(*args, **kwargs)
        own, weaks = once.split(predictions(output))
        self._prove_batched(call, batch, cond, weaks)
        for branch, not_run in enumerate(once.not_run):
            self._count(branch, not_run)
        call.weaks = weaks
        return replace_predictions(output, own)

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
        args, kwargs, recording = call.args, call.kwargs, call.recording
        if call.batched_cfg:
            half = cond[0].shape[0]
            args, kwargs = take_rows(args, kwargs, self._names, 2 * half, slice(half, None))
            if recording is not None and recording.batch != 2 * half:
                recording = None
        results = []
        for branch, switch in enumerate(self.switches):
            weak = None
            if recording is not None and recording.ends[branch] is not None:
                weak = self._replay(branch, recording, call.denoiser, args, kwargs, cond)
            if weak is None:
                with _weak_pass(), switch.switched_on():
                    weak = predictions(call.denoiser(*args, **kwargs))
                self._count(branch, ())
            if [w.shape for w in weak] != [c.shape for c in cond]:
                raise CallError(
                    f"the weak pass of {type(self._model).__name__} returned {[tuple(w.shape) for w in weak]}, but the "
                    f"cond pass {[tuple(c.shape) for c in cond]}: the rows of its arguments could not be told apart. "
                    "Guide the calls with stg.Guider, which is given cond and uncond separately."
                )
            results.append(weak)
        return results

    def _replay(
        self,
        branch: int,
        recording: Recording,
        denoiser: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        cond: Sequence[Tensor],
    ) -> list[Tensor] | None:
        """Run a weak pass on top of a recording; `None` where it turns out that this cannot be done."""
        let_go = recording.poisoned(branch)
        unproven = bool(let_go) and (branch, *let_go) not in self._proven
        try:
            # The replay comes last, so that it is asked first: up to its end no layer is skipped.
            replayed = recording.replayed(branch, self._patches, self._units)
            with _weak_pass(), self.switches[branch].switched_on(), replayed:
                weak = predictions(denoiser(*args, **kwargs))
        except PrefixMismatchError:
            warnings.warn(
                f"{type(self._model).__name__} calls other modules in the weak pass than in the cond pass, so the two "
                "cannot share work. Guidance stays exact, at the price of a full pass. execution='full' asks for that.",
                StgWarning,
                stacklevel=2,
            )
            self.way = "full"
            return None
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            # NaN in place of an output that was let go has no memory to write to. Anything else fails again below.
            if not unproven:
                raise
            self._keep_all = True
            return None
        if unproven:
            if any(_has_nan(w) and not _has_nan(c) for w, c in zip(weak, cond, strict=True)):
                self._keep_all = True
                return None
            if not any(map(_has_nan, cond)):
                self._proven.add((branch, *let_go))
        self._count(branch, recording.answered(branch))
        return weak

    def _prove_batched(self, call: GuidedCall, batch: int, cond: slice, weaks: list[list[Tensor]]) -> None:
        """Compare with full passes once per layout of rows: some models let rows influence each other."""
        if (batch, cond.start) in self._proven_rows:
            return
        args, kwargs = take_rows(call.args, call.kwargs, self._names, batch, cond)
        for switch, weak in zip(self.switches, weaks, strict=True):
            with _weak_pass(), switch.switched_on():
                expected = predictions(call.denoiser(*args, **kwargs))
            if not all(_agree(w, e) for w, e in zip(weak, expected, strict=True)):
                raise RowsError("rows influence each other, or were cut wrongly")
        self._proven_rows.add((batch, cond.start))

    def _give_up_batched(self, error: Exception) -> None:
        self.way = "sequential"
        warnings.warn(
            f"the calls of {type(self._model).__name__} cannot be cut into rows ({type(error).__name__}: {error}), so "
            "execution='batched' is not possible; going on with 'sequential', which gives the same results.",
            StgWarning,
            stacklevel=2,
        )

    def _count(self, branch: int, not_run: Iterable[int]) -> None:
        """Count a weak pass in which these units did not run, nor the branch's skipped layers."""
        skipped = sum(id(layer.module) in self._blocks for layer in self.switches[branch].layers)
        saved = skipped + sum(self._blocks_in[unit] for unit in not_run)
        self._stats.weak_passes += 1
        self._stats.blocks_saved += saved
        self._stats.blocks_run += len(self._blocks) - saved


def weights_are_streamed(model: nn.Module) -> bool:
    """Tell whether a model's weights are brought to the device piece by piece in each pass."""
    # Told by the marks of those who do it: accelerate's hook, and the group hook in diffusers' registry.
    for module in model.modules():
        if getattr(getattr(module, "_hf_hook", None), "offload", False):
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


def _has_nan(tensor: Tensor) -> bool:
    return bool(tensor.isnan().any())
