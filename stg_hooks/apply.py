"""Guide every call that an existing pipeline or module makes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType

from torch import nn

from stg_hooks import activation
from stg_hooks.combine import Scale, check_scale
from stg_hooks.errors import CallError, SettingError, StgWarning
from stg_hooks.execution import Stats
from stg_hooks.guide import Guide
from stg_hooks.hosts import Host, ModuleHost, pipeline_host
from stg_hooks.layers import LayerSpec
from stg_hooks.perturb import Mode
from stg_hooks.rules import Rule
from stg_hooks.schedule import Schedule, check_every, plan_from
from stg_hooks.settings import Branch
from stg_hooks.sites import Kind
from stg_hooks.step import Step
from stg_hooks.trace import Trace
from stg_hooks.uncond import UncondGuide, check_on, check_settings


class apply:  # noqa: N801 - reads as the verb it is: `with stg.apply(pipe, layers=[34], scale=1.0):`
    """Guide every call that a stock pipeline, or a module, makes inside a `with`.

    One forward hook on the denoiser adds `a = sum_i scale_i * (cond - weak_i)` to the cond *and* the uncond
    prediction, so that the pipeline's own `u + g * (c - u)` becomes `u + g * (c - u) + a` for whatever `g` it uses.
    With `rescale` or another `rule`, both become the final prediction instead, which the pipeline's combination then
    leaves alone.
    """

    def __init__(
        self,
        target: object,
        layers: LayerSpec | None = None,
        scale: Scale | Callable[[Step], Scale] | None = None,
        *,
        rescale: float | None = None,
        mode: str | Mode | None = None,
        kind: Kind | None = None,
        branches: Sequence[Branch] | None = None,
        preset: str | None = None,
        start: float | None = None,
        stop: float | None = None,
        sigma_range: tuple[float, float] | None = None,
        schedule: Schedule | None = None,
        rule: str | Rule = "cfg",
        on: str = "cond",
        every: int = 1,
        batched_cfg: bool | None = None,
        guidance_scale: Scale | None = None,
        execution: str = "auto",
    ) -> None:
        """Choose what to guide and how; nothing is touched before the `with`.

        Args:
            target: a diffusers pipeline, or a module whose calls are to be guided.
            layers: what the weak model skips, as for `skip`; left out, the setting published for the model is used.
            scale: weight of `cond - weak`; 1.0 unless a published setting says otherwise. 0 switches guidance off. A
                function of the `Step` changes it during the run.
            rescale: from 0 (off, the default) to 1 (the guided prediction has the standard deviation of cond).
            mode: what a skipped layer does instead, `"residual"` by default.
            kind: in factorised models, only attention within frames (`"spatial"`) or across them (`"temporal"`).
            branches: several perturbed predictions, instead of `layers`, `scale`, `mode` and `kind`.
            preset: name of a published setting, instead of the one that fits the model first.
            start: part of the run from which on there is guidance; 0, the default, includes the first step.
            stop: part of the run from which on there is none; 1, the default, includes the last step.
            sigma_range: lowest and highest noise level with guidance, both included; see `Step`.
            schedule: what changes during the run: a function that takes a `Step` and returns a dict of `layers`,
                `scale`, `mode`, `branches`, `rescale`, `rule` or `guidance_scale` (which replaces the caller's), or
                `None` for no guidance; or a list of (noise level, such a dict) from high to low, of which the first one
                counts whose level is not above the step's, or else the last one.
            rule: as for `combine`; it replaces the pipeline's own combination.
            on: `"uncond"` lets the weak model make the *uncond* prediction instead, `w(u) + g * (c - w(u))`: no extra
                pass is made, and `scale` has no meaning. For modules with `batched_cfg`, and pipelines that do CFG.
            every: compute weak predictions in every so many steps only and use `cond - weak` again in between. An
                approximation; 1, the default, is exact. For the demo's model in 24 steps, 2 is off by 15 % of what
                guidance changes, and 4 by 32 % (benchmarks/results/every.md).
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
        check_on(on, scale)
        self.host = _find_host(target, batched_cfg, guidance_scale)
        denoisers = self.host.denoisers()
        self.plan = plan_from(
            next(iter(denoisers.values())),
            layers=layers,
            scale=scale,
            mode=mode,
            kind=kind,
            rescale=rescale,
            branches=branches,
            preset=preset,
            start=start,
            stop=stop,
            sigma_range=sigma_range,
            schedule=schedule,
            rule=rule,
            on=on,
        )
        check_every(every)
        self.every = every
        if on == "uncond":
            self._check_uncond(batched_cfg)
        replacing = [
            settings.why_replaces for settings in self.plan.known if settings.rescale or settings.rule != "cfg"
        ]
        if replacing and not self.host.knows_guidance_scale:
            raise SettingError(
                f"{replacing[0]} needs the final prediction, hence the CFG weight: pass guidance_scale=, the "
                "value that the caller of this module applies (1.0 for none)."
            )
        self.stats = Stats()
        self.trace = Trace()
        self.step: Step | None = None
        """Set it before each call where the target is a module and a schedule needs to know the step."""
        self.lost_steps = 0
        unique = {id(module): module for module in denoisers.values()}
        self._guides = [
            UncondGuide(self, module) if on == "uncond" else Guide(self, module, execution)
            for module in unique.values()
        ]
        self._entered: list[ExitStack] = []

    def _check_uncond(self, batched_cfg: bool | None) -> None:
        for settings in self.plan.known:
            check_settings(settings)
            if settings.replaces:
                raise SettingError(f"{settings.why_replaces} cannot be combined with on='uncond' here: use stg.Guider.")
        if self.every > 1:
            raise SettingError(f"every={self.every}: on='uncond' makes no extra pass that could be left out.")
        if isinstance(self.host, ModuleHost) and not batched_cfg:
            raise SettingError(
                "on='uncond' needs to know which rows are unconditional: pass batched_cfg=True if the rows of this "
                "module's calls are [uncond, cond], or use stg.Guider."
            )

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
        """Restore the model, and report what was not guided after all.

        Raises:
            CallError: `__enter__` was not called before.
        """
        if not self._entered:
            raise CallError(
                "stg.apply was left without having been entered. Write: with stg.apply(pipe, layers=[...]):"
            )
        self._entered.pop().close()
        complaints = [complaint for guide in self._guides for complaint in guide.complaints()]
        if kind is None and complaints:
            text = f"stg.apply: {'; '.join(complaints)}. Choose other layers: stg.layers(model)."
            warnings.warn(text, StgWarning, stacklevel=2)
        lost, self.lost_steps = self.lost_steps, 0
        if kind is None and lost:
            warnings.warn(
                f"stg.apply() did not guide {lost} of {self.stats.calls} calls: the uncond call that {self.host.name} "
                "makes after them, and that rescale has to wait for, did not come (as in a run that was interrupted).",
                StgWarning,
                stacklevel=2,
            )
        if kind is None and self._expects_guidance and not self.stats.guided_calls:
            seen = f"its denoiser was called {self.stats.calls} times, but none of the calls was to be guided"
            warnings.warn(
                f"stg.apply() guided nothing: {seen if self.stats.calls else f'{self.host.name} made no call'} inside "
                "this `with`. Guidance follows the pipeline (or module) that was passed to apply, in this thread.",
                StgWarning,
                stacklevel=2,
            )

    @property
    def _expects_guidance(self) -> bool:
        return self.plan.is_constant and self.plan.base.changes


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
