"""Guide stock diffusers pipelines: which modules denoise, and what each of their calls is for."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections import ChainMap
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from types import CodeType, FrameType
from typing import Any

from torch import Tensor, nn

from stg_hooks.errors import CallError, TargetError
from stg_hooks.hosts import Role
from stg_hooks.integrations.call_roles import Latents, evaluate, latents_of, role_of
from stg_hooks.integrations.call_sites import Site, UnreadableError
from stg_hooks.integrations.pipeline_code import call_sites_of
from stg_hooks.patching import Undo, set_attribute, shared
from stg_hooks.step import Step

DENOISERS = ("transformer", "transformer_2", "unet")


class PipelineHost:
    """A stock pipeline: its code and its running frame say what a call is for; the pipeline itself stays untouched."""

    knows_guidance_scale = True

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
        self._sites = self._read()
        self._sums: dict[int, float] = {}
        self._latents = Latents()
        self._read_already: dict[str, tuple[Tensor, list[float]]] = {}

    def _read(self) -> dict[CodeType, tuple[Site, ...]]:
        from diffusers import DiffusionPipeline

        names = tuple(self._denoisers)
        elsewhere = (
            f"Pass the denoiser instead, and say what its rows are: stg.apply(pipe.{names[0]}, ..., batched_cfg=True) "
            "for [uncond, cond], batched_cfg=False if every row is conditional; or use stg.Guider in your own loop."
        )
        try:
            sites = call_sites_of(type(self.pipeline), DiffusionPipeline, names)
        except UnreadableError as error:
            raise TargetError(
                f"apply() cannot tell what {self.name} calls its denoiser for: {error}. {elsewhere}"
            ) from error
        except OSError as error:
            raise TargetError(f"the source of {self.name}, which apply() reads, is not there. {elsewhere}") from error
        if not sites:
            raise TargetError(f"{self.name} does not call its {names[0]} itself. {elsewhere}")
        return sites

    def denoisers(self) -> dict[str, nn.Module]:
        """Return the modules that denoise, in the order in which the pipeline uses them."""
        return dict(self._denoisers)

    def role(self) -> Role | None:
        """Say what the call that is being made is for."""
        frame = self._frame()
        if frame is None:
            return None
        site = next((site for site in self._sites[frame.f_code] if frame.f_lineno in site.lines), None)
        if site is None:
            raise CallError(
                f"{self.name} calls its denoiser where apply() has read no call (line {frame.f_lineno} of "
                f"{frame.f_code.co_filename}). Use stg.Guider in a loop of your own."
            )
        names = ChainMap(frame.f_locals, frame.f_globals)
        try:
            role = role_of(site, names, self._sums)
            if role is not None and not site.is_named:
                self._check_latents(role, frame)
            channels = None if site.channels is None else evaluate(site.channels, names)
            return role and dataclasses.replace(role, channels=channels)
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

    def _check_latents(self, role: Role, frame: FrameType) -> None:
        latents = latents_of(frame)
        if latents is not None:
            timesteps = getattr(getattr(self.pipeline, "scheduler", None), "timesteps", None)
            self._latents.check(role, (frame.f_code, frame.f_lasti), timesteps, latents, self.step())

    def step(self) -> Step:
        """Say where in its loop over timesteps the pipeline is."""
        frame = self._frame()
        names = {} if frame is None else frame.f_locals
        scheduler = getattr(self.pipeline, "scheduler", None)
        timesteps = names.get("timesteps", getattr(scheduler, "timesteps", None))
        index, count = names.get("i"), None if timesteps is None else len(timesteps)
        if not isinstance(index, int) or count is None:
            return Step()
        return Step(index, count, *self._noise_level(scheduler, index, names))

    def _noise_level(self, scheduler: Any, index: int, names: Mapping[str, Any]) -> tuple[float | None, str | None]:
        """Return the noise level of a step, and in which units: see `Step`."""
        config = getattr(scheduler, "config", {})
        sigmas = getattr(scheduler, "sigmas", None)
        index += getattr(scheduler, "begin_index", None) or 0
        flow = "FlowMatch" in type(scheduler).__name__ or config.get("prediction_type") == "flow_prediction"
        if isinstance(sigmas, Tensor) and index < len(sigmas):
            sigma = self._values("sigmas", sigmas)[index]
            return (1.0 - sigma if flow and config.get("invert_sigmas") else sigma), "flow" if flow else "karras"
        alphas, timestep = getattr(scheduler, "alphas_cumprod", None), names.get("t")
        if flow or alphas is None or timestep is None:
            return None, None
        timesteps = names.get("timesteps")
        if isinstance(timesteps, Tensor):
            timestep = self._values("timesteps", timesteps)[names["i"]]
        alpha = self._values("alphas_cumprod", alphas)[int(timestep)]
        return math.sqrt((1.0 - alpha) / alpha) if alpha > 0 else math.inf, "ddpm"

    def _values(self, name: str, values: Tensor) -> list[float]:
        """Read a tensor of the scheduler, once in a run: it may lie on the GPU, for which each reading waits."""
        known = self._read_already.get(name)
        if known is None or known[0] is not values:
            self._read_already[name] = known = values, values.tolist()
        return known[1]

    def _frame(self) -> FrameType | None:
        """Find the innermost method that is calling a denoiser, if it belongs to our pipeline."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code not in self._sites:
            frame = frame.f_back
        return frame if frame is not None and frame.f_locals.get("self") is self.pipeline else None


def host(target: Any) -> PipelineHost:
    """Return who answers for a diffusers pipeline."""
    return PipelineHost(target)


def plain_attention(attention: nn.Module) -> AbstractContextManager[object]:
    """Have an attention module of diffusers use the native backend, whatever others it was told to use."""
    processor = getattr(attention, "processor", None)
    if not hasattr(processor, "_attention_backend"):
        return nullcontext()

    def install() -> tuple[None, Undo]:
        return None, set_attribute(processor, "_attention_backend", "native")

    return shared(processor, "_attention_backend", install)
