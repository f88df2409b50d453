"""How to make one sample with a target: with its prompt and the noise of a generator, and nothing else changed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias

import torch

from stg_hooks.errors import SettingError, TargetError, closest
from stg_hooks.hosts import denoisers_of

Sample: TypeAlias = Callable[[str, torch.Generator], Any]
"""Makes one sample: takes a prompt and the generator of its noise, returns what was made."""

# What Python and pipelines raise of arguments that they cannot use; subclasses, such as being out of memory, are not.
_OF_ARGUMENTS = (
    *(TypeError, ValueError, AttributeError, KeyError, IndexError),
    *(RuntimeError, ZeroDivisionError, OverflowError, AssertionError),
)


def sampler_of(target: Any, sample: Sample | None, settings: Mapping[str, Any], output_type: str) -> Sample:
    """Find out how to make one sample.

    Args:
        target: a pipeline; or anything else, with `sample`. A pipeline that is not called with a prompt can carry a
            function of `(prompt, generator, **settings)` as `stg_sample`.
        sample: the user's own way, which counts first.
        settings: the pipeline's other arguments.
        output_type: what to ask the pipeline for, if it can be asked and `settings` do not say.

    Returns:
        A function of (prompt, generator).

    Raises:
        SettingError: arguments for a pipeline that is not called, or that the pipeline does not take. What is returned
            raises it (a `RefusedError`), too, where the pipeline refuses their values.
        TargetError: something that cannot be called with a prompt.
    """
    if sample is not None:
        if not callable(sample):
            raise TargetError(f"sample={sample!r}: expected a function of (prompt, generator).")
        if settings:
            raise SettingError(
                f"{', '.join(settings)}: arguments of the pipeline, but sample= makes the calls. Give them there."
            )
        return sample
    own = getattr(target, "stg_sample", None)
    parameters = _parameters(target)
    if own is None and "generator" not in parameters:
        raise TargetError(
            f"{type(target).__name__} is not called with a generator. Say how to make one sample: sample=function, "
            "which takes (prompt, generator)."
        )
    check_arguments(type(target).__name__, parameters if own is None else _passed_on(own, parameters), settings)
    more = {**({"output_type": output_type} if "output_type" in parameters else {}), **settings}

    def make(prompt: str, generator: torch.Generator) -> Any:
        with _refusals(target):
            if own is not None:
                return own(prompt, generator, **settings)
            if takes_prompt(target, settings):
                return target(prompt=prompt, generator=generator, **more)
            return target(generator=generator, **more)

    return make


def check_arguments(name: str, parameters: Mapping[str, inspect.Parameter], settings: Iterable[str]) -> None:
    """Check that a pipeline takes arguments of these names.

    Args:
        name: of the pipeline's class.
        parameters: of its call.
        settings: the names.

    Raises:
        SettingError: it does not take one of them.
    """
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for setting in settings:
        if setting not in parameters:
            raise SettingError(f"{setting}: {name} has no such argument.{closest(setting, parameters)}")


class RefusedError(SettingError):
    """A pipeline does not accept what it was called with: it failed before its first step."""


@contextmanager
def _refusals(pipe: Any) -> Iterator[None]:
    """Tell errors that a pipeline raises before it calls a denoiser, which are about its arguments, from later ones."""
    called: list[bool] = []
    hooks = [model.register_forward_pre_hook(lambda *_: called.append(True)) for model in denoisers_of(pipe).values()]
    try:
        yield
    except Exception as error:
        if called or type(error) not in _OF_ARGUMENTS:
            raise
        raise RefusedError(f"{type(pipe).__name__} refused this call: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()


def rehearse(pipe: Any, make: Sample, prompts: Iterable[str]) -> None:
    """Call a pipeline with each prompt, up to its first step: what it refuses is known before a long run begins.

    Args:
        pipe: the pipeline.
        make: what `sampler_of` returned for it.
        prompts: one call is made with each.

    Raises:
        RefusedError: the pipeline does not accept a prompt, or another argument.
    """

    def stop(*_: object) -> None:
        raise _FirstStep

    hooks = [model.register_forward_pre_hook(stop, prepend=True) for model in denoisers_of(pipe).values()]
    try:
        for prompt in prompts:
            with suppress(_FirstStep), torch.no_grad(), torch.random.fork_rng(devices=[]):
                make(prompt, generator_of(0))
    finally:
        for hook in hooks:
            hook.remove()


class _FirstStep(BaseException):
    """Ends a rehearsal; not an Exception, which a pipeline might catch."""


def takes_prompt(target: object, settings: Mapping[str, Any]) -> bool:
    """Tell whether a pipeline is to be called with a prompt.

    Some make something of an image alone; others refuse a prompt beside its embeddings.
    """
    return hasattr(target, "stg_sample") or ("prompt" in _parameters(target) and "prompt_embeds" not in settings)


def guidance_scale_of(target: object, sample: Sample | None, settings: Mapping[str, Any]) -> float | None:
    """Return the CFG weight that a pipeline is called with, its default where none is given; `None` if unknown."""
    if sample is not None:
        return None
    found = settings.get("guidance_scale", default_of(target, "guidance_scale"))
    return float(found) if isinstance(found, (int, float)) else None


def default_of(target: object, name: str) -> Any:
    """Return what a pipeline takes for an argument that is not given; `None` where it has none, or no number."""
    parameter = _parameters(getattr(target, "stg_sample", target)).get(name)
    return parameter.default if parameter is not None and isinstance(parameter.default, (int, float)) else None


def prompts_from(prompts: str | Sequence[str], pipe: object = None) -> tuple[str, ...]:
    """Check prompts, one string is one prompt; and that the pipeline takes them, if there is one.

    Raises:
        SettingError: there is none, something that is not a string, or a pipeline that is not called with a prompt.
    """
    found = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    if not found or not all(isinstance(prompt, str) for prompt in found):
        raise SettingError(f"prompts={prompts!r}: expected a list of strings, at least one.")
    if any(found) and pipe is not None and not takes_prompt(pipe, {}):
        raise SettingError(f"prompts={prompts!r}: {type(pipe).__name__} is called without a prompt. Leave it out.")
    return found


def generator_of(seed: int) -> torch.Generator:
    """Return a generator on the CPU, whose noise is the same on every device."""
    return torch.Generator().manual_seed(seed)


def _passed_on(own: Callable[..., Any], parameters: Mapping[str, inspect.Parameter]) -> Mapping[str, inspect.Parameter]:
    """Return what a pipeline's `stg_sample` takes: its own arguments, and with `**settings` those of the pipeline."""
    found = _parameters(own)
    named = {name: parameter for name, parameter in found.items() if parameter.kind is not parameter.VAR_KEYWORD}
    return named if len(named) == len(found) else {**parameters, **named}


def _parameters(target: object) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(target).parameters if callable(target) else {}
    except (TypeError, ValueError):
        return {}
