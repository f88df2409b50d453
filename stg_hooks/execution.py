"""How the weak predictions of a call are computed: sharing the prefix with the cond pass, or by a full pass each."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stg_hooks.calls import first_batch, predictions, take_rows
from stg_hooks.errors import CallError, SettingError, StgWarning, closest
from stg_hooks.inspection import parameter_names
from stg_hooks.patching import patched, pushed
from stg_hooks.prefix import PrefixMismatchError, Recording, prefix_units
from stg_hooks.settings import Branch
from stg_hooks.skip import Switch

EXECUTIONS = ("auto", "sequential", "full")
_ALL = slice(None)


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


class Execution:
    """Computes the weak predictions of one denoiser, one per branch.

    `"full"` is the textbook: one more pass of the denoiser on the cond rows, with the branch's layers bypassed.
    `"sequential"` does the same with the modules that run before the branch's first skipped layer answering from what
    the cond pass has computed; the cond pass itself runs untouched.
    """

    def __init__(self, model: nn.Module, branches: Sequence[Branch], execution: str) -> None:
        """Resolve the layers of every branch; touch nothing.

        Args:
            model: the module that holds the layers.
            branches: what to skip, one weak prediction each.
            execution: one of `EXECUTIONS`.

        Raises:
            LayerError: a layer that does not exist or cannot be skipped in its mode.
            SettingError: an unknown execution.
        """
        if execution not in EXECUTIONS:
            names = ", ".join(map(repr, EXECUTIONS))
            raise SettingError(f"execution={execution!r}: there is {names}.{closest(str(execution), EXECUTIONS)}")
        self._model = model
        self._shares = execution != "full"
        self.switches = [Switch(model, branch.layers, branch.mode) for branch in branches]
        skipped = [layer.module for switch in self.switches for layer in switch.layers]
        self._units = prefix_units(model, skipped) if self._shares else []
        self._keep_all = False
        self._proven: set[tuple[int, ...]] = set()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Prepare the model, without effect on plain calls; restore it at the end."""
        with ExitStack() as stack:
            for switch in self.switches:
                stack.enter_context(switch.installed())
            self._patches = [stack.enter_context(patched(unit)) for unit in self._units]
            yield

    @contextmanager
    def recording(self, args: tuple[Any, ...], kwargs: dict[str, Any], batched_cfg: bool) -> Iterator[Recording | None]:
        """Keep what the weak passes can use of a cond pass that is made inside the `with`.

        Args:
            args: positional arguments of the call.
            kwargs: keyword arguments of the call.
            batched_cfg: the rows of the call are `[uncond, cond]`.

        Returns:
            A context manager that gives what to pass to `weak_predictions`.
        """
        batch = first_batch(args, kwargs)
        if not self._shares or batch is None or (batched_cfg and batch % 2):
            yield None
            return
        skipped = [[layer.module for layer in switch.layers] for switch in self.switches]
        recording = Recording(skipped, batch, slice(batch // 2, None) if batched_cfg else _ALL, self._keep_all)
        with pushed(self._patches, [recording.action(unit) for unit in self._units]):
            yield recording

    def weak_predictions(
        self,
        denoiser: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        cond: Sequence[Tensor],
        batched_cfg: bool,
        recording: Recording | None,
    ) -> list[list[Tensor]]:
        """Compute the weak predictions of a call.

        Args:
            denoiser: the callable whose call is being guided.
            args: positional arguments of the call.
            kwargs: keyword arguments of the call.
            cond: the call's own predictions on its cond rows.
            batched_cfg: the rows of the call are `[uncond, cond]`.
            recording: what `recording` gave for this call.

        Returns:
            For each branch, one weak prediction per prediction of the denoiser.

        Raises:
            CallError: the weak pass returned other shapes than the cond pass: rows were cut wrongly.
        """
        if batched_cfg:
            half = cond[0].shape[0]
            names = parameter_names(denoiser) if isinstance(denoiser, nn.Module) else []
            args, kwargs = take_rows(args, kwargs, names, 2 * half, slice(half, None))
            if recording is not None and recording.batch != 2 * half:
                recording = None
        results = []
        for branch, switch in enumerate(self.switches):
            weak = None
            if recording is not None and recording.ends[branch] is not None:
                weak = self._replay(branch, recording, denoiser, args, kwargs, cond)
            if weak is None:
                with _weak_pass(), switch.switched_on():
                    weak = predictions(denoiser(*args, **kwargs))
            if [w.shape for w in weak] != [c.shape for c in cond]:
                raise CallError(
                    f"the weak pass of {type(denoiser).__name__} returned {[tuple(w.shape) for w in weak]} where the "
                    f"cond pass returned {[tuple(c.shape) for c in cond]}: the rows of its arguments could not be "
                    "told apart. Guide the calls with stg.Guider, which is given cond and uncond separately."
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
            self._shares = False
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
        return weak


def _has_nan(tensor: Tensor) -> bool:
    return bool(tensor.isnan().any())
