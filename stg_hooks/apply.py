"""Guide every call that an existing pipeline or module makes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import nn

from stg_hooks.denoiser import GuidedDenoiser
from stg_hooks.errors import CallError, LayerError, NotCopied, SettingError, warn
from stg_hooks.guidance.channels import VarianceWatch
from stg_hooks.guidance.guide import Guidance
from stg_hooks.guidance.per_output import PerOutput
from stg_hooks.guidance.request import Request
from stg_hooks.guidance.rules import Rule
from stg_hooks.guidance.scale_values import Scales
from stg_hooks.guidance.schedule import Asked, Plan, Schedule
from stg_hooks.guidance.settings import Branch
from stg_hooks.guidance.trace import Stats, Trace
from stg_hooks.hooks import activation
from stg_hooks.hosts import Host, pipeline_host
from stg_hooks.model.resolve import LayerSpec
from stg_hooks.modes.frames import Kind
from stg_hooks.modes.perturbation import Mode
from stg_hooks.module_calls import ModuleCalls
from stg_hooks.module_host import ModuleHost
from stg_hooks.ranks.link import check_own_copy, ranks_from
from stg_hooks.session import Session
from stg_hooks.step import Step
from stg_hooks.uncond import UncondDenoiser

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from stg_hooks.passes.guided_call import WeakCall
    from stg_hooks.passes.rows import SomeRows


class apply(NotCopied):  # noqa: N801 - reads as the verb it is: `with stg.apply(pipe, layers=[34], scale=1.0):`
    """Guide every call that a stock pipeline, or a module, makes inside a `with`.

    What is hooked is the denoiser. It adds `a = sum_i scale_i * (cond - weak_i)` to the cond *and* the uncond
    prediction, so that the pipeline's own `u + g * (c - u)` becomes `u + g * (c - u) + a` for whatever `g` it uses.
    With `rescale` or another `rule`, both become the final prediction instead, which the pipeline's combination then
    leaves alone.
    """

    def __init__(
        self,
        target: object,
        layers: LayerSpec | None = None,
        scale: Scales | Callable[[Step], Scales] | None = None,
        *,
        rescale: PerOutput[float] | None = None,
        mode: str | Mode | None = None,
        kind: Kind | None = None,
        branches: Sequence[Branch] | None = None,
        preset: str | None = None,
        start: float | None = None,
        stop: float | None = None,
        sigma_range: tuple[float, float] | None = None,
        schedule: Schedule | None = None,
        rule: str | Rule | None = None,
        on: str = "cond",
        every: int = 1,
        batched_cfg: bool | None = None,
        rows: str | SomeRows | None = None,
        weak_call: WeakCall | None = None,
        guidance_scale: Scales | None = None,
        channels: int | None = None,
        execution: str = "auto",
        group: ProcessGroup | None = None,
        timeout: float = 300.0,
        scope: str = "context",
        strict: bool = False,
    ) -> None:
        """Choose what to guide and how; nothing is touched before the `with`.

        Args:
            target: a diffusers pipeline, or a module whose calls are to be guided.
            layers: what the weak model skips, as for `skip`; left out, the setting published for the model is used.
            scale: weight of `cond - weak`; 1.0 unless a published setting says otherwise. 0 makes no weak prediction;
                a `rescale` or `rule` that is given holds nevertheless. A function of the `Step` changes it during the
                run. For a model that predicts several things, `{"video": 1.0, "audio": 0.5}`: what is not named is off.
                `rescale`, `layers` and `guidance_scale` may be given so, too; `stg.adapters.OUTPUTS` has the names.
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
            rule: as for `combine`, `"cfg"` unless a published setting says otherwise; another one
                replaces the pipeline's own combination.
            on: `"uncond"` lets the weak model make the *uncond* prediction instead, `w(u) + g * (c - w(u))`: no extra
                pass is made, and `scale` has no meaning. For modules with `batched_cfg`, and pipelines that do CFG.
            every: compute weak predictions in every so many steps only and use `cond - weak` again in between. An
                approximation; 1, the default, is exact. A step makes one call with the prompt then: windows that are
                predicted apart need an `apply` or `Guider` each. For the demo's model in 24 steps, 2 is off by 9 % of
                what guidance changes, and 4 by 30 % (benchmarks/results/every.md).
            batched_cfg: for a module: its rows are `[uncond, cond]`, or the samples in the lists that it takes and
                returns. Left out, every row counts as conditional.
            rows: for a module whose rows are in another order: their parts of equal size by name, `"cond+uncond"`, or
                which rows are cond: a slice, such as `slice(1, None, 2)` for `[u, c, u, c]`, a list of row numbers, or
                a mask with one bool per row. The others belong to them in their order, the first to the first.
            weak_call: for a module whose arguments cannot be cut down to the cond rows by looking at them: a function
                that takes `(args, kwargs)` of a call and returns those of its cond rows, in their order in the call.
                The first call of each layout finds out whether it does.
            guidance_scale: for a module with `batched_cfg` or `rows`, and `rescale`: the CFG weight that its caller
                applies.
            channels: for a module: how many channels (dimension 1) of a prediction are guided, where the others are a
                learned variance. Left out, all are. Pipelines are asked themselves.
            execution: how the weak prediction is computed: `"sequential"` (a second pass that starts at the first
                skipped layer), `"batched"` (weak rows ride along in the same pass: one sweep over the weights, more
                memory), `"full"` (the textbook's second pass), or `"auto"`, which chooses.
            group: spread the cond, weak and uncond predictions of each call over the processes of a group of
                torch.distributed, one device each: with three of them, a step takes as long as one forward. Every
                process holds the model and runs the same code with the same seeds, and all get the same predictions; a
                pipeline that calls its model for uncond apart makes that call on all of them. A model that draws
                random numbers (dropout) gets other ones than on one device; a model that is itself spread over these
                processes (FSDP, tensor or context parallelism) is refused. Gradients do not pass.
            timeout: seconds that a process waits for the others before it is an error on all of them. On GPUs, NCCL's
                own timeout holds for predictions that are on their way.
            scope: where the `with` is in force: in the thread or asyncio task that enters it and the tasks that this
                one starts (`"context"`), or in every thread and task of the process while it is open (`"process"`), as
                a server needs it that enters once and answers in worker threads.
            strict: raise where there would be a warning that nothing, or less than asked for, was guided: in the first
                call in which a skip changes nothing (this synchronises with the GPU once), or at the end of the `with`.

        Raises:
            LayerError: a layer that does not exist or cannot be skipped in this mode.
            SettingError: a setting that cannot be used, or `layers` left out where nothing is published.
            TargetError: a target that is neither a pipeline nor a module, or whose model has a step cache that cannot
                be kept apart for weak passes; or no process group.

        Source: STG, arXiv 2411.18664, Eq. 13 and 20, Alg. 4.
        """
        self._scope = activation.check_scope(scope)
        host = _find_host(target, ModuleCalls(batched_cfg, rows, weak_call, guidance_scale, channels))
        is_pipeline = not isinstance(host, ModuleHost)
        denoisers = host.denoisers()
        request = Request(
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
        with _shown_as_pipeline(is_pipeline):
            guidance = Guidance("stg.apply", next(iter(denoisers.values())), request, every, channels, strict)
        guidance.outputs.check_names([("guidance_scale", guidance_scale)])
        if is_pipeline:
            guidance.variance = VarianceWatch(is_told=True)
            guidance.watch.target = "pipe"
        if group is not None and weak_call is not None:
            raise SettingError("weak_call= says how to cut cond rows only, and group= predicts uncond rows apart, too.")
        self._session = Session(host, guidance, ranks_from(group, timeout, on))
        if on == "uncond":
            self._check_uncond(batched_cfg)
            if channels is not None:
                raise SettingError(
                    f"channels={channels}: with on='uncond', all channels of the uncond rows come from the weak model. "
                    "Leave channels out and use the variance of the cond rows, or use stg.Guider."
                )
        replacing = [
            settings.why_replaces for settings in self.plan.possible if settings.rescales or settings.rule != "cfg"
        ]
        if replacing and not host.knows_guidance_scale:
            raise SettingError(
                f"{replacing[0]} needs the final prediction, hence the CFG weight: pass guidance_scale=, the "
                "value that the caller of this module applies (1.0 for none)."
            )
        unique = {id(module): module for module in denoisers.values()}
        with _shown_as_pipeline(is_pipeline):
            self._guides = [
                UncondDenoiser(self._session, module)
                if on == "uncond"
                else GuidedDenoiser(self._session, module, execution)
                for module in unique.values()
            ]
        self._session.models = tuple(unique.values())
        if self._session.ranks is not None:
            for model in self._session.models:
                check_own_copy(model, self._session.ranks)
        self._entered: list[tuple[activation.Entry, ExitStack]] = []
        self._before = Stats()  # when the first of those that are inside entered
        self._unless_entered = activation.unless_entered(self, "stg.apply", "guided nothing")

    def __repr__(self) -> str:
        """Say what is guided, and how to have it guided."""
        state = "in force" if activation.is_active(self._session) else "not entered: with stg.apply(...):"
        return f"<stg.apply of {self._session.host.name}, {state}>"

    def not_to_be_entered(self) -> None:
        """Say that it was made for its checks alone, so that dropping it is no mistake."""
        self._unless_entered.detach()

    def to_dict(self) -> dict[str, Any]:
        """Return what was asked for as JSON can hold it: `stg.apply(pipe, **json.load(file))` asks for the same.

        Returns:
            Settings by their names, without those that were left out. A branch is a dictionary, a function of a module
            its name, `"module:function"`.

        Raises:
            SettingError: JSON cannot hold a setting, such as a function that no module has under its name.
        """
        return self._session.guidance.to_dict()

    @property
    def stats(self) -> Stats:
        """What has happened so far."""
        return self._session.guidance.stats

    @property
    def trace(self) -> Trace:
        """What guidance did, call by call."""
        return self._session.guidance.trace

    @property
    def plan(self) -> Plan:
        """Which settings hold when."""
        return self._session.guidance.plan

    @property
    def step(self) -> Step | None:
        """Set it before each call where the target is a module and a schedule needs to know the step."""
        return self._session.step

    @step.setter
    def step(self, step: Step | None) -> None:
        self._session.step = step

    def _check_uncond(self, batched_cfg: bool | None) -> None:
        for settings in self.plan.possible:
            if settings.replaces:
                raise SettingError(f"{settings.why_replaces} cannot be combined with on='uncond' here: use stg.Guider.")
        if isinstance(self._session.host, ModuleHost) and not batched_cfg:
            raise SettingError(
                "on='uncond' needs to know which rows are unconditional: pass batched_cfg=True if the rows of this "
                "module's calls are [uncond, cond], or use stg.Guider."
            )

    def __enter__(self) -> apply:
        """Register the hooks; with a group, meet the other processes.

        Raises:
            RankError: they did not come, or hold another model.
        """
        self._unless_entered.detach()
        if self._session.ranks is not None:
            for model in self._session.models:
                self._session.ranks.enter(model)
        self._session.host.check_same()
        if not self._entered:
            self._before, self.plan.asked = dataclasses.replace(self.stats), Asked()
            self._session.calls_elsewhere = 0
            self._session.told.clear()
        with ExitStack() as stack:
            stack.enter_context(self._session.host.watched())
            for guide in self._guides:
                stack.enter_context(guide.installed())
            entry = activation.enter(self._session, self._scope)
            stack.callback(activation.leave, entry)
            self._entered.append((entry, stack.pop_all()))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Restore the model, and report what was not guided after all.

        Raises:
            CallError: `__enter__` was not called before; or, with `strict`, something was not guided.
            LayerError: with `strict`, a skip changed nothing.
            RankError: with a group: another process is not leaving.
        """
        if not self._entered:
            raise CallError(
                "stg.apply was left without having been entered. Write: with stg.apply(pipe, layers=[...]):"
            )
        # Several threads may have entered this object: leave what was entered here.
        here = activation.innermost(self._entered)
        left = self._entered[-1] if here is None else here
        self._entered.remove(left)
        left[1].close()
        session = self._session
        if session.ranks is not None:
            session.ranks.leave(error)
        lost, session.lost_steps = session.lost_steps, 0
        try:
            if kind is not None:
                return
            session.guidance.watch.report(wait=True)
            if not session.host.tells_when_it_runs:
                try:
                    session.host.check_same()
                except CallError as error:
                    self._complain(str(error))
            name, calls = session.host.name, self.stats.calls - self._before.calls
            if lost:
                self._complain(
                    f"stg.apply() did not guide {lost} of {calls} calls: the uncond call that {name} makes after them, "
                    "and that rescale has to wait for, did not come (as in a run that was interrupted)."
                )
            if not self._entered and self.stats.guided_calls == self._before.guided_calls:
                nothing = self._why_nothing(calls)
                if nothing:
                    self._complain(f"stg.apply() guided nothing: {nothing}")
            elif session.calls_elsewhere and here is None and isinstance(session.host, ModuleHost):
                # What is left elsewhere than it was entered, as a generator that threads take turns with, ran there.
                self._complain(f"stg.apply() did not guide {self._elsewhere()}")
        finally:
            if not self._entered:
                session.guidance.watch.forget()

    def _why_nothing(self, calls: int) -> str:
        """Say why nothing was guided; nothing where that was asked for, or where a run is still to end."""
        plan, asked, name = self.plan, self.plan.asked, self._session.host.name
        if plan.is_off:
            return ""
        if not calls and self._session.calls_elsewhere:
            is_told = not isinstance(self._session.host, ModuleHost) and not self._session.guidance.watch.strict
            return "" if is_told else f"it did not guide {self._elsewhere()}"
        if plan.is_constant:
            seen = f"its denoiser was called {calls} times, but none of the calls was to be guided"
            return (
                f"{seen if calls else f'{name} made no call'} inside this `with`. Guidance follows the pipeline (or "
                "module) that was passed to apply, in this thread."
            )
        if not (asked.began and asked.ended) or asked.guided:
            return ""
        levels = " Its noise levels went from {:.4g} to {:.4g}.".format(*asked.sigmas) if asked.sigmas else ""
        return (
            f"{name} made a whole run, of which no step was to be guided, by what start=, stop=, sigma_range=, scale= "
            f"or schedule= says.{levels}"
        )

    def _elsewhere(self) -> str:
        return (
            f"{self._session.calls_elsewhere} calls that {self._session.host.name} got in other threads, tasks or "
            f"contexts than the one that entered the `with`. {activation.ENTER_THERE}"
        )

    def _complain(self, text: str) -> None:
        if self._session.guidance.watch.strict:
            raise CallError(text)
        warn(text)


@contextmanager
def _shown_as_pipeline(is_pipeline: bool) -> Iterator[None]:
    """Let an error about layers say `pipe`, which its user has, where it would say `model`."""
    try:
        yield
    except (LayerError, SettingError) as error:
        if is_pipeline:
            error.args = (str(error).replace("stg.layers(model)", "stg.layers(pipe)"), *error.args[1:])
        raise


def _find_host(target: object, said: ModuleCalls) -> Host:
    if isinstance(target, nn.Module):
        return ModuleHost(target, said)
    host = pipeline_host(target)
    if any(value is not None for value in vars(said).values()):
        raise SettingError(
            "batched_cfg=, rows=, weak_call=, guidance_scale= and channels= describe the calls of a module. A pipeline "
            "is asked itself: leave them out, or pass its denoiser."
        )
    return host
