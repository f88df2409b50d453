"""Guide every call that an existing pipeline or module makes."""

from __future__ import annotations

import dataclasses
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from stg_hooks import activation
from stg_hooks.calls import halves, predictions, replace_predictions
from stg_hooks.combine import Scale, check_scale, combine, correction
from stg_hooks.errors import CallError, SettingError, StgWarning
from stg_hooks.execution import Execution, GuidedCall, Stats, in_weak_pass
from stg_hooks.hosts import Host, ModuleHost, Role, pipeline_host
from stg_hooks.layers import LayerSpec
from stg_hooks.patching import patched, shared
from stg_hooks.perturb import Mode
from stg_hooks.settings import Branch, branches_from


@dataclasses.dataclass
class _Step:
    """What a cond call has found out: its predictions, and for each of them the weak ones of all branches."""

    conds: list[Tensor]
    weaks: list[list[Tensor]]


@dataclasses.dataclass
class _Call:
    """One call of the denoiser, as it was made."""

    role: Role
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    guided: GuidedCall | None = None
    step: _Step | None = None  # for an uncond call: the cond call before it


class _OfThread(threading.local):
    """What one stage of a step leaves for the next: the cond call for its hook, and for the uncond call."""

    call: _Call | None = None
    step: _Step | None = None


class _OfModel(threading.local):
    """What sessions that guide the same denoiser must know of each other."""

    unguided: list[Tensor] | None = None


class apply:  # noqa: N801 - reads as the verb it is: `with stg.apply(pipe, layers=[34], scale=1.0):`
    """Guide every call that a stock pipeline, or a module, makes inside a `with`.

    One forward hook on the denoiser adds `a = sum_i scale_i * (cond - weak_i)` to the cond *and* the uncond
    prediction, so that the pipeline's own `u + g * (c - u)` becomes `u + g * (c - u) + a` for whatever `g` it uses.
    With `rescale`, both become the final prediction instead, which the pipeline's combination then leaves alone.
    """

    def __init__(
        self,
        target: object,
        layers: LayerSpec | None = None,
        scale: Scale | None = None,
        *,
        rescale: float | None = None,
        mode: str | Mode | None = None,
        branches: Sequence[Branch] | None = None,
        batched_cfg: bool | None = None,
        guidance_scale: Scale | None = None,
        execution: str = "auto",
    ) -> None:
        """Choose what to guide and how; nothing is touched before the `with`.

        Args:
            target: a diffusers pipeline, or a module whose calls are to be guided.
            layers: what the weak model skips, as for `skip`; left out, the setting published for the model is used.
            scale: weight of `cond - weak`; 1.0 unless a published setting says otherwise. 0 switches guidance off.
            rescale: from 0 (off, the default) to 1 (the guided prediction has the standard deviation of cond).
            mode: what a skipped layer does instead, `"residual"` by default.
            branches: several perturbed predictions, instead of `layers`, `scale` and `mode`.
            batched_cfg: for a module: its rows are `[uncond, cond]`. Left out, every row counts as conditional.
            guidance_scale: for a module with `batched_cfg` and `rescale`: the CFG weight that its caller applies.
            execution: how the weak prediction is computed: `"sequential"` (a second pass that starts at the first
                skipped layer), `"full"` (the textbook's second pass), or `"auto"`, which chooses.

        Raises:
            LayerError: a layer that does not exist or cannot be skipped in this mode.
            SettingError: a setting that cannot be used, or `layers` left out where nothing is published.
            TargetError: a target that is neither a pipeline nor a module.

        Source: STG, arXiv 2411.18664, Eq. 13 and 20, Alg. 4.
        """
        self.host = _find_host(target, batched_cfg, guidance_scale)
        denoisers = self.host.denoisers()
        self.branches, self.rescale = branches_from(
            next(iter(denoisers.values())), layers, scale, mode, rescale, branches
        )
        if self.rescale and not self.host.knows_guidance_scale:
            raise SettingError(
                f"rescale={self.rescale} needs the final prediction, hence the CFG weight: pass guidance_scale=, the "
                "value that the caller of this module applies (1.0 for none)."
            )
        self.stats = Stats()
        unique = {id(module): module for module in denoisers.values()}
        self._guides = [_Guide(self, module, execution) for module in unique.values()]
        self.lost_steps = 0
        self._entered: list[ExitStack] = []

    def __enter__(self) -> apply:
        """Register the hooks."""
        with ExitStack() as stack:
            for guide in self._guides:
                stack.enter_context(guide.installed())
            activation.enter(self)
            stack.callback(activation.leave, self)
            self._entered.append(stack.pop_all())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Restore the model, and report if nothing was guided."""
        self._entered.pop().close()
        lost, self.lost_steps = self.lost_steps, 0
        if kind is None and lost:
            warnings.warn(
                f"stg.apply(rescale={self.rescale}) did not guide {lost} of {self.stats.calls} calls: the uncond call "
                f"that {self.host.name} makes after them did not come (as in a run that was interrupted).",
                StgWarning,
                stacklevel=2,
            )
        if kind is None and self.is_on and not self.stats.guided_calls:
            seen = f"its denoiser was called {self.stats.calls} times, but none of the calls was to be guided"
            warnings.warn(
                f"stg.apply() guided nothing: {seen if self.stats.calls else f'{self.host.name} made no call'} inside "
                "this `with`. Guidance follows the pipeline (or module) that was passed to apply, in this thread.",
                StgWarning,
                stacklevel=2,
            )

    @property
    def is_on(self) -> bool:
        """Whether any branch has a scale other than 0."""
        return any(isinstance(branch.scale, Tensor) or branch.scale != 0 for branch in self.branches)


def _find_host(target: object, batched_cfg: bool | None, guidance_scale: Scale | None) -> Host:
    if guidance_scale is not None:
        check_scale("guidance_scale", guidance_scale)
    if isinstance(target, nn.Module):
        return ModuleHost(target, bool(batched_cfg), guidance_scale)
    host = pipeline_host(target)
    if batched_cfg is not None or guidance_scale is not None:
        raise SettingError(
            "batched_cfg= and guidance_scale= describe the calls of a module. A pipeline is asked itself: leave them "
            "out, or pass its denoiser."
        )
    return host


class _Guide:
    """Guides the calls of one denoiser."""

    def __init__(self, owner: apply, model: nn.Module, execution: str) -> None:
        self._owner = owner
        self._model = model
        self._execution = Execution(model, owner.branches, execution, owner.stats)
        self._local = _OfThread()

    @contextmanager
    def installed(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.callback(self._local.__dict__.clear)
            self._of_model = stack.enter_context(shared(self._model, "guided", lambda: (_OfModel(), lambda: None)))
            stack.enter_context(self._execution.installed())
            stack.enter_context(stack.enter_context(patched(self._model)).everywhere(self._around))
            stack.enter_context(self._model.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True))
            stack.enter_context(self._model.register_forward_hook(self._after, with_kwargs=True))
            yield

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find out what a call is for, and keep its arguments as they were made."""
        if in_weak_pass():
            return
        self._local.call = self._of_model.unguided = None
        role = self._owner.host.role() if activation.is_active(self._owner) else None
        if role is None:
            return
        self._local.call = call = _Call(role, args, kwargs)
        if role.rows == "uncond":
            call.step, self._local.step = self._local.step, None

    def _around(self, proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call that is going to be guided, so that its weak passes can share work with it."""
        call = self._local.call
        if call is None or in_weak_pass() or call.role.rows == "uncond" or not self._owner.is_on:
            return proceed(*args, **kwargs)
        output, call.guided = self._execution.cond_pass(proceed, args, kwargs, call.role.rows == "uncond+cond")
        return output

    def _after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Guide what a call has returned."""
        if in_weak_pass():
            return None
        call, self._local.call = self._local.call, None
        if call is None:
            return None
        stats = self._owner.stats
        stats.calls += 1
        if not self._owner.is_on:
            return None
        start = time.perf_counter()
        now = predictions(output)
        before = self._of_model.unguided
        if before is None:
            self._of_model.unguided = before = now
        elif self._owner.rescale:
            raise CallError(
                f"another stg.apply() has guided this call of {type(self._model).__name__} already, so "
                f"rescale={self._owner.rescale} cannot give the final prediction. Use one stg.apply(branches=[...])."
            )
        new = self._guided(call, before, now)
        stats.guided_calls += 1
        stats.seconds += time.perf_counter() - start
        return replace_predictions(output, new)

    def _guided(self, call: _Call, unguided: Sequence[Tensor], output: Sequence[Tensor]) -> list[Tensor]:
        """Return the guided `output`; `unguided` differs from it where another session came first."""
        role, rescale = call.role, self._owner.rescale
        if role.rows == "uncond":
            return self._uncond(call.step, role, output)
        both = role.rows == "uncond+cond"
        unconds: list[Tensor | None] = [None] * len(output)
        conds = list(unguided)
        if both:
            pairs = [halves(tensor) for tensor in unguided]
            unconds, conds = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        self._expect_scale(role, both or role.uncond_follows)
        if call.guided is None:
            raise CallError(
                f"a call of {type(self._model).__name__} that is to be guided did not reach its forward: "
                "something replaced it inside the `with`. Enter stg.apply() last."
            )
        # Weak passes go the whole way, so that other people's hooks see them as they saw the cond pass.
        call.guided.denoiser, call.guided.args, call.guided.kwargs = self._model, call.args, call.kwargs
        by_branch = self._execution.weak_predictions(call.guided, conds)
        step = _Step(conds, [list(weaks) for weaks in zip(*by_branch, strict=True)])
        if role.uncond_follows and not (rescale and role.guidance_scale == 1):
            if self._local.step is not None and rescale:
                self._owner.lost_steps += 1
            self._local.step = step
            if rescale:  # the final prediction has to wait for uncond
                return conds
        if rescale:
            final = self._final(step, role, unconds)
            return [torch.cat([tensor, tensor]) for tensor in final] if both else final
        return [
            _add(tensor, torch.cat([term, term]) if both else term)
            for tensor, term in zip(output, self._corrections(step), strict=True)
        ]

    def _uncond(self, step: _Step | None, role: Role, output: Sequence[Tensor]) -> list[Tensor]:
        if self._owner.rescale and role.guidance_scale == 1:
            return list(output)  # it has no weight, and cond is the final prediction already
        if step is None or [c.shape for c in step.conds] != [u.shape for u in output]:
            raise CallError(
                f"{self._owner.host.name} made an uncond call without a matching cond call before it, so the weak "
                "prediction of this step is not known. Use stg.Guider in a loop of your own."
            )
        if not self._owner.rescale:
            return [_add(u, term) for u, term in zip(output, self._corrections(step), strict=True)]
        # The caller has cond already and will compute u' + g * (c - u'): choose u' so that this is the final one.
        g = role.guidance_scale
        assert g is not None
        final = self._final(step, role, output)
        return [((f.float() - g * c.float()) / (1.0 - g)).to(c.dtype) for f, c in zip(final, step.conds, strict=True)]

    def _expect_scale(self, role: Role, cfg: bool) -> None:
        if self._owner.rescale and cfg and role.guidance_scale is None:
            raise CallError(
                f"rescale={self._owner.rescale} needs the CFG weight of this step, which {self._owner.host.name} does "
                "not tell before the call. Use rescale=0.0."
            )

    def _final(self, step: _Step, role: Role, unconds: Sequence[Tensor | None]) -> list[Tensor]:
        scales = [branch.scale for branch in self._owner.branches]
        g = 1.0 if role.guidance_scale is None else role.guidance_scale
        return [
            combine(c, weaks, u, scale=scales, guidance_scale=g, rescale=self._owner.rescale)
            for c, weaks, u in zip(step.conds, step.weaks, unconds, strict=True)
        ]

    def _corrections(self, step: _Step) -> list[Tensor]:
        scales = [branch.scale for branch in self._owner.branches]
        return [correction(c, weaks, scales) for c, weaks in zip(step.conds, step.weaks, strict=True)]


def _add(prediction: Tensor, term: Tensor) -> Tensor:
    return (prediction.float() + term).to(prediction.dtype)
