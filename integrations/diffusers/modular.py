"""Guide modular pipelines of diffusers: their guider says what each call of a denoiser is for."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

from stg_hooks.errors import CallError, TargetError
from stg_hooks.hooks.processors import Processors
from stg_hooks.integrations.diffusers.call_sites import CallSite
from stg_hooks.integrations.diffusers.host import PipelineHost
from stg_hooks.roles import Role
from stg_hooks.step import Step

_NAME = "__guidance_identifier__"  # what a guider writes on the inputs of each call
_PASTE = "pipe.update_components(guider=diffusers.ClassifierFreeGuidance(guidance_scale=5.0))"


class ModularHost(PipelineHost):
    """A modular pipeline: its blocks ask a guider which calls to make, and each call's inputs carry a name."""

    def _read(self) -> dict[CodeType, tuple[CallSite, ...]]:
        return {}  # no code is read

    def check(self) -> None:
        """Raise where it has no guider, or one whose formula is not known.

        Raises:
            TargetError: so it is.
        """
        from diffusers.guiders.guider_utils import BaseGuidance

        guiders = [part for part in self.pipeline.components.values() if isinstance(part, BaseGuidance)]
        name = next(iter(self.denoisers()))
        if not guiders:
            raise TargetError(
                f"{self.name} has no guider, which would say what it calls its {name} for. If all calls are made with "
                f"the prompt, pass the denoiser: stg.apply(pipe.{name}, ..., batched_cfg=False). Otherwise use "
                "stg.Guider in a loop of your own."
            )
        for guider in guiders:
            problem = _problem(guider)
            if problem:
                raise TargetError(f"apply() cannot guide {self.name}: {problem}")

    tells_when_it_runs = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note the attention processors; the blocks of a run make progress bars of their own."""
        self._processors = Processors(list(self._denoisers.values()))
        yield

    def role(self) -> Role | None:
        """Say what the call that is being made is for."""
        frame = self._frame()
        if frame is None:
            return None
        self.check_same()
        names = frame.f_locals
        batch = next((value for value in names.values() if isinstance(getattr(value, _NAME, None), str)), None)
        if batch is None:
            raise CallError(
                f"{self.name} calls its denoiser without inputs from a guider (line {frame.f_lineno} of "
                f"{frame.f_code.co_filename}), so apply() cannot tell what for. Use stg.Guider in a loop of your own."
            )
        guider = self._guider(names)
        problem = _problem(guider)
        if problem:
            raise CallError(f"{self.name} cannot be guided as it is running now: {problem}")
        together: Sequence[Any] = next(
            (value for value in names.values() if isinstance(value, list) and any(one is batch for one in value)), ()
        )
        follows = any(getattr(one, _NAME, None) == "pred_uncond" for one in together)
        weight = float(guider.guidance_scale) + bool(guider.use_original_formulation)
        if getattr(batch, _NAME) == "pred_cond":
            return Role("cond", weight if follows else None, uncond_follows=follows)
        if getattr(batch, _NAME) == "pred_uncond":
            return Role("uncond", weight)
        raise CallError(f"{self.name} makes a call for {getattr(batch, _NAME)!r}, which apply() does not know.")

    def step(self) -> Step:
        """Say where in its loop over timesteps the pipeline is."""
        frame = self._frame()
        if frame is None:
            return Step()
        guider = self._guider(frame.f_locals)
        if guider is not None:
            return self.step_of(guider)
        state = frame.f_locals.get("block_state")
        return self._step_at(
            frame.f_locals.get("i"), getattr(state, "num_inference_steps", None), frame.f_locals.get("t")
        )

    def step_of(self, guider: Any) -> Step:
        """Say where in its loop over timesteps a guider was told that it is."""
        names = ("_step", "_num_inference_steps", "_timestep")
        return self._step_at(*(getattr(guider, name, None) for name in names))

    def _step_at(self, index: Any, count: Any, timestep: Any) -> Step:
        scheduler = getattr(self.pipeline, "scheduler", None)
        return self._steps.at(scheduler, getattr(scheduler, "timesteps", None), index, count, timestep)

    def _guider(self, names: Any) -> Any:
        chosen = getattr(names.get("block_state"), "guider", None)  # where there is one for each denoiser
        return getattr(self.pipeline, "guider", None) if chosen is None else chosen

    def _frame(self) -> FrameType | None:
        """Find the innermost block that is running for our pipeline."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            if "components" in code.co_varnames[: code.co_argcount] and frame.f_locals["components"] is self.pipeline:
                return frame
            frame = frame.f_back
        return None


def _problem(guider: Any) -> str:
    """Say why a term that is added to both predictions would not come through, if so."""
    kind = type(guider).__name__
    if kind != "ClassifierFreeGuidance":
        return (
            f"its guider is {kind}, and what is added to predictions is known to come through ClassifierFreeGuidance "
            f"only. Use that, {_PASTE}, or stg.Guider in a loop of your own."
        )
    if guider.guidance_rescale:
        return (
            f"its guider has guidance_rescale={guider.guidance_rescale}, which would rescale skip guidance as well. "
            f"Leave it out, {_PASTE}, and use stg.apply(..., rescale={guider.guidance_rescale})."
        )
    return ""
