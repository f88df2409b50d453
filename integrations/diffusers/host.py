"""Guide stock diffusers pipelines: which modules denoise, and what each of their calls is for."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections import ChainMap
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import CodeType, FrameType
from typing import Any

from torch import nn

from stg_hooks.errors import CallError, TargetError, is_of_library
from stg_hooks.hooks.forward import Undo, installed_once, set_attribute
from stg_hooks.hooks.processors import Processors
from stg_hooks.integrations.diffusers.call_roles import Latents, holds, latents_of, role_of
from stg_hooks.integrations.diffusers.call_sites import CallSite, UnreadableError
from stg_hooks.integrations.diffusers.expressions import evaluate
from stg_hooks.integrations.diffusers.own_guidance import on_by_default
from stg_hooks.integrations.diffusers.pipeline_code import call_sites_of
from stg_hooks.integrations.diffusers.running import calling_pipeline as calling_pipeline
from stg_hooks.integrations.diffusers.running import is_modular
from stg_hooks.integrations.diffusers.scheduler_steps import SchedulerSteps
from stg_hooks.integrations.diffusers.watching import runs_watched
from stg_hooks.roles import OwnGuidance, Role
from stg_hooks.step import Step

DENOISERS = ("transformer", "transformer_2", "unet")


class PipelineHost:
    """A stock pipeline: its code and its running frame say what a call is for.

    Within a `with`, two of its methods are wrapped, to look at its denoisers when a run begins and after each step.
    """

    knows_guidance_scale = True
    tells_when_it_runs = True

    def __init__(self, pipeline: Any) -> None:
        """Look for the pipeline's denoisers, and for their calls.

        Args:
            pipeline: a diffusers pipeline, any class.

        Raises:
            TargetError: it has no `transformer` or `unet`, does not call it, or it cannot be told what its calls are
                for.
        """
        self.pipeline = pipeline
        self.name = type(pipeline).__name__
        found = {name: getattr(pipeline, name, None) for name in DENOISERS}
        self._denoisers = {name: module for name, module in found.items() if isinstance(module, nn.Module)}
        if not self._denoisers:
            raise TargetError(
                f"{self.name} has no {', '.join(DENOISERS[:-1])} or {DENOISERS[-1]} that is a torch.nn.Module. "
                "Pass the module that denoises instead: stg.apply(module, ...)."
            )
        self._callers: tuple[Any, ...] = (pipeline,)
        self._sites = self._read()
        self._processors: Processors | None = None
        self._sums: dict[int, float] = {}
        self._latents = Latents()
        self._own: dict[tuple[type, range], OwnGuidance | None] = {}
        self._steps = SchedulerSteps()

    def _read(self) -> dict[CodeType, tuple[CallSite, ...]]:
        from diffusers import DiffusionPipeline

        names = tuple(self._denoisers)
        elsewhere = (
            f"Pass the denoiser instead, and say what its rows are: stg.apply(pipe.{names[0]}, ..., batched_cfg=True) "
            "for [uncond, cond], batched_cfg=False if every row is conditional; or use stg.Guider in your own loop."
        )
        try:
            sites = call_sites_of(type(self.pipeline), DiffusionPipeline, names)
            if not sites:
                self._callers = tuple(self._inner())
                found = [call_sites_of(type(inner), DiffusionPipeline, names) for inner in self._callers]
                sites = {code: of_code for of_one in found for code, of_code in of_one.items()}
        except UnreadableError as error:
            raise TargetError(
                f"apply() cannot tell what {self.name} calls its denoiser for: {error}. {elsewhere}"
            ) from error
        except OSError as error:
            raise TargetError(f"the source of {self.name}, which apply() reads, is not there. {elsewhere}") from error
        if not sites:
            raise TargetError(f"{self.name} does not call its {names[0]} itself. {elsewhere}")
        return sites

    def _inner(self) -> Iterator[Any]:
        """Find the pipelines in this one that have the same denoisers: it leaves the calls to them."""
        from diffusers import DiffusionPipeline

        for value in vars(self.pipeline).values():
            own = (
                [getattr(value, name, None) for name in self._denoisers] if isinstance(value, DiffusionPipeline) else []
            )
            if any(module is not None and module in self._denoisers.values() for module in own):
                yield value

    def denoisers(self) -> dict[str, nn.Module]:
        """Return the modules that denoise, in the order in which the pipeline uses them."""
        return dict(self._denoisers)

    def is_calling(self) -> bool:
        """Tell whether this very pipeline makes the call that is being made, in whatever thread."""
        return self._frame() is not None

    def role(self) -> Role | None:
        """Say what the call that is being made is for."""
        frame = self._frame()
        if frame is None:
            return None
        self.check_same()
        site = next((site for site in self._sites[frame.f_code] if frame.f_lineno in site.lines), None)
        if site is None:
            raise CallError(self._why_not_read(frame))
        names = ChainMap(frame.f_locals, frame.f_globals)
        try:
            role = role_of(site, names, self._sums)
            if role is not None and not site.is_named:
                self._check_latents(role, frame)
            channels = None if site.channels is None else evaluate(site.channels, names)
            own = self._own_guidance(frame, names) if role is not None and role.is_cond else ()
            return role and dataclasses.replace(role, channels=channels, is_clean=site.are_clean, own=own)
        except UnreadableError as error:
            raise CallError(
                f"{self.name} cannot be guided as it is running now: {error}. Switch that off, or use stg.Guider in a "
                "loop of your own."
            ) from error
        except LookupError as error:
            raise CallError(
                f"{self.name} does not say, when it calls its denoiser, what for (line {frame.f_lineno} of "
                f"{frame.f_code.co_filename}: {error}). Use stg.Guider in a loop of your own."
            ) from error

    def _own_guidance(self, frame: FrameType, names: Mapping[str, Any]) -> tuple[OwnGuidance, ...]:
        """Say which weak predictions the pipeline is going to make itself in this step, as it does by default."""
        cls, found = type(frame.f_locals["self"]), []
        for site in self._sites[frame.f_code]:
            if site.kind not in ("perturbed", "named") or not site.when:
                continue
            if (cls, site.lines) not in self._own:
                self._own[cls, site.lines] = on_by_default(cls, site)
            own = self._own[cls, site.lines]
            try:
                if own is not None and holds(site.when, names):
                    found.append(own)
            except LookupError:  # it depends on values that the step computes later
                continue
        return tuple(found)

    def check_same(self) -> None:
        """Raise where a denoiser was replaced: the new one has no hooks, so that its calls would be plain.

        Raises:
            CallError: one was.
        """
        for caller, (name, module) in itertools.product(self._callers, self._denoisers.items()):
            found = getattr(caller, name, None)
            # One that calls it, as torch.compile() gives, is guided through it; one that was taken away is not called.
            if found is None or found is module:
                continue
            if not isinstance(found, nn.Module) or all(inner is not module for inner in found.modules()):
                raise CallError(
                    f"the {name} of {self.name} was replaced after stg.apply() was made, so calls of the new one are "
                    f"not guided. Leave the `with`, set pipe.{name}, and make stg.apply(pipe, ...) anew."
                )

    def check(self) -> None:
        """Do nothing: reading its code has checked all. A modular pipeline's guider is checked here."""

    def watched(self) -> AbstractContextManager[None]:
        """Look at the start of each run, and after each of its steps, whether a denoiser was replaced."""
        return self._watched()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        self._processors = Processors(list(self._denoisers.values()))
        with ExitStack() as stack:
            for caller in self._callers:
                stack.enter_context(runs_watched(caller, self._processors.note, self._check_in_run))
            yield

    def _check_in_run(self) -> None:
        try:
            self.check_same()
        except CallError:
            self.put_back()
            raise

    def put_back(self) -> None:
        """Put the attention processors back that were there when the run began."""
        if self._processors is not None:
            self._processors.put_back()

    def _why_not_read(self, frame: FrameType) -> str:
        """Say what calls the denoiser where the pipeline itself does not: a callback, most likely."""
        caller, inner = None, sys._getframe(1)
        while inner is not frame and inner.f_back is not None:
            if not is_of_library(inner):
                caller = inner
            inner = inner.f_back
        if caller is None:
            return (
                f"{self.name} calls its denoiser where apply() has read no call (line {frame.f_lineno} of "
                f"{frame.f_code.co_filename}). Use stg.Guider in a loop of your own."
            )
        code = caller.f_code
        given = [name for name, value in frame.f_locals.items() if name.startswith("callback") and callable(value)]
        return (
            f"{getattr(code, 'co_qualname', code.co_name)} (line {caller.f_lineno} of {code.co_filename}), which "
            f"{self.name} calls{f' as its {given[0]}' if given else ''}, calls the denoiser, and apply() cannot tell "
            "what for. Make such calls after the run, outside the `with`, or use stg.Guider in a loop of your own."
        )

    def _check_latents(self, role: Role, frame: FrameType) -> None:
        latents = latents_of(frame)
        if latents is not None:
            timesteps = getattr(getattr(self.pipeline, "scheduler", None), "timesteps", None)
            self._latents.check(role, (frame.f_code, frame.f_lasti), timesteps, latents, self.step())

    def step(self) -> Step:
        """Say where in its loop over timesteps the pipeline is."""
        frame = self._frame()
        names = {} if frame is None else frame.f_locals
        scheduler = getattr(names.get("self", self.pipeline), "scheduler", None)
        timesteps = names.get("timesteps", getattr(scheduler, "timesteps", None))
        count = None if timesteps is None else len(timesteps)
        return self._steps.at(scheduler, timesteps, names.get("i"), count, names.get("t"))

    def _frame(self) -> FrameType | None:
        """Find the innermost method that is calling a denoiser, if it belongs to our pipeline."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code not in self._sites:
            frame = frame.f_back
        caller = None if frame is None else frame.f_locals.get("self")
        return frame if any(caller is one for one in self._callers) else None


def host(target: Any) -> PipelineHost:
    """Return the host of a diffusers pipeline.

    Raises:
        TargetError: it cannot be guided.
    """
    found = host_of_running(target)
    found.check()
    return found


def calling_host(pipeline: Any, denoiser: nn.Module) -> PipelineHost | None:
    """Return the host of a running pipeline, if its code tells what it calls a denoiser for."""
    try:
        found = host_of_running(pipeline)
    except TargetError:
        return None
    return found if any(module is denoiser for module in found.denoisers().values()) else None


def host_of_running(pipeline: Any) -> PipelineHost:
    """Return the host of a pipeline, whatever guider it has."""
    if is_modular(pipeline):
        from stg_hooks.integrations.diffusers.modular import ModularHost

        return ModularHost(pipeline)
    return PipelineHost(pipeline)


def plain_attention(attention: nn.Module) -> AbstractContextManager[object]:
    """Have an attention module of diffusers use the native backend, whatever others it was told to use."""
    processor = getattr(attention, "processor", None)
    if not hasattr(processor, "_attention_backend"):
        return nullcontext()

    def install() -> tuple[None, Undo]:
        return None, set_attribute(processor, "_attention_backend", "native")

    return installed_once(processor, "_attention_backend", install)
