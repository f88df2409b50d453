"""Guide stock diffusers pipelines: which module denoises, and what each of its calls is for."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from stg_hooks.errors import CallError, TargetError
from stg_hooks.hosts import Role
from stg_hooks.patching import Undo, set_attribute, shared

_DENOISERS = ("transformer", "transformer_2", "unet")

# Pipelines whose batched calls are not [uncond, cond], and what their rows are. They are refused, not guessed.
_OTHER_ROWS = {
    "StableCascadeDecoderPipeline": "[cond, uncond]",
    "StableCascadePriorPipeline": "[cond, uncond]",
    "WuerstchenDecoderPipeline": "[cond, uncond]",
    "WuerstchenPriorPipeline": "[cond, uncond]",
    "StableDiffusionInstructPix2PixPipeline": "[text, image, uncond]",
    "StableDiffusionXLInstructPix2PixPipeline": "[text, image, uncond]",
}


class Run:
    """One running call of a pipeline."""

    def __init__(self, pipeline: Any, arguments: dict[str, Any]) -> None:
        """Remember who runs, and with which arguments (defaults filled in)."""
        self.pipeline = pipeline
        self.arguments = arguments


_RUN: ContextVar[Run | None] = ContextVar("stg_hooks_diffusers_run", default=None)
# Name that the pipeline gives to the denoiser call it is about to make: "cond", "uncond", "cond_uncond", ...
_CALL_NAME: ContextVar[str | None] = ContextVar("stg_hooks_diffusers_call_name", default=None)


class PipelineHost:
    """A stock pipeline: asked which call of its denoiser it is making, never changed in what it does."""

    knows_guidance_scale = True

    def __init__(self, pipeline: Any) -> None:
        """Look for the pipeline's denoisers.

        Args:
            pipeline: a diffusers pipeline, any class.

        Raises:
            TargetError: it has no `transformer` or `unet`, or batches its rows in an order that is not supported.
        """
        self.pipeline = pipeline
        self.name = type(pipeline).__name__
        for cls in type(pipeline).__mro__:
            if cls.__name__ in _OTHER_ROWS:
                raise TargetError(
                    f"{self.name} calls its denoiser on rows {_OTHER_ROWS[cls.__name__]}, which apply() does not guide "
                    "yet. Use stg.Guider in a loop of your own."
                )
        found = {name: getattr(pipeline, name, None) for name in _DENOISERS}
        self._denoisers = {name: module for name, module in found.items() if isinstance(module, nn.Module)}
        if not self._denoisers:
            raise TargetError(
                f"{self.name} has no {', '.join(_DENOISERS[:-1])} or {_DENOISERS[-1]} that is a torch.nn.Module. "
                "Pass the module that denoises instead: stg.apply(module, ...)."
            )

    def denoisers(self) -> dict[str, nn.Module]:
        """Return the modules that denoise, in the order in which the pipeline uses them."""
        return dict(self._denoisers)

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Follow which pipeline is running in this thread, and the names it gives to its calls."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(_observed(self.pipeline))
            for module in self._denoisers.values():
                stack.enter_context(_named_calls(module))
            yield

    def role(self, denoiser: str) -> Role | None:
        """Say what the call that this denoiser is in is for."""
        run = _RUN.get()
        if run is None or run.pipeline is not self.pipeline:
            return None
        call = _CALL_NAME.get()
        if call in (None, "cond_uncond"):
            if not self._batches_cfg(run):
                return Role("cond")
            return Role("uncond+cond", self._guidance_scale(run, denoiser))
        if call == "cond":
            follows = _true_cfg(run) if "true_cfg_scale" in run.arguments else self._batches_cfg(run)
            return Role("cond", self._guidance_scale(run, denoiser) if follows else None, uncond_follows=follows)
        if call == "uncond":
            return Role("uncond", self._guidance_scale(run, denoiser))
        return None  # an extra call of the pipeline's own: its built-in perturbations

    def _batches_cfg(self, run: Run) -> bool:
        # The pipeline's own property first: it follows changes that callbacks make during the run.
        value = getattr(self.pipeline, "do_classifier_free_guidance", None)
        if value is None:
            value = run.arguments.get("guidance_scale")
            if value is None:
                raise CallError(
                    f"{self.name} does not say whether it uses classifier-free guidance. Pass its denoiser instead: "
                    f"stg.apply(pipe.{next(iter(self._denoisers))}, ..., batched_cfg=True or False)."
                )
            value = value > 1
        return bool(value)

    def _guidance_scale(self, run: Run, denoiser: str) -> float | Tensor | None:
        if run.arguments.get("use_dynamic_cfg"):
            return None  # CogVideoX changes the weight between this call and its use of the result
        if "true_cfg_scale" in run.arguments:
            return _as_scale(run.arguments["true_cfg_scale"])
        second = getattr(self.pipeline, "_guidance_scale_2", None)
        if denoiser == "transformer_2" and second is not None:
            return _as_scale(second)
        return _as_scale(getattr(self.pipeline, "guidance_scale", run.arguments.get("guidance_scale")))


def host(target: Any) -> PipelineHost:
    """Return who answers for a diffusers pipeline."""
    return PipelineHost(target)


def _true_cfg(run: Run) -> bool:
    negative = (value for name, value in run.arguments.items() if name.startswith("negative_prompt"))
    return run.arguments["true_cfg_scale"] > 1 and any(value is not None for value in negative)


def _as_scale(value: Any) -> float | Tensor | None:
    return value if value is None or isinstance(value, Tensor) else float(value)


def _observed(pipeline: Any) -> contextlib.AbstractContextManager[None]:
    """Note in a context variable when this pipeline is running, so that no other one's calls are guided.

    `pipe(...)` looks `__call__` up on the class, so the instance gets a subclass that differs in nothing else.
    """

    def install() -> tuple[None, Undo]:
        cls = type(pipeline)
        object.__setattr__(pipeline, "__class__", _observed_class(cls))
        return None, lambda: object.__setattr__(pipeline, "__class__", cls)

    return shared(pipeline, "run", install)


def _observed_class(cls: Any) -> type:
    original: Callable[..., Any] = cls.__call__
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        try:
            bound = signature.bind(self, *args, **kwargs)
        except TypeError:
            return original(self, *args, **kwargs)  # raises the error that the user should see
        bound.apply_defaults()
        token = _RUN.set(Run(self, bound.arguments))
        try:
            return original(self, *args, **kwargs)
        finally:
            _RUN.reset(token)

    namespace = {"__call__": __call__, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), {**namespace, "__doc__": cls.__doc__})


def _named_calls(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Note in a context variable the names that the pipeline gives to calls with `cache_context(name)`."""
    original = getattr(module, "cache_context", None)
    if original is None:
        return contextlib.nullcontext()

    def install() -> tuple[None, Undo]:
        @functools.wraps(original)
        @contextlib.contextmanager
        def cache_context(name: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
            token = _CALL_NAME.set(name)
            try:
                with original(name, *args, **kwargs) as value:
                    yield value
            finally:
                _CALL_NAME.reset(token)

        return None, set_attribute(module, "cache_context", cache_context)

    return shared(module, "cache_context", install)
