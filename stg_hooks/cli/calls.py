"""Turn what was typed into what the library and the pipelines take."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stg_hooks.cli.failures import USAGE, FailureError
from stg_hooks.cli.models import DEMO, Source
from stg_hooks.sampling import Sample, sampler_of

DEMO_PROMPT = "red circle left"


def layers_from(text: str, separator: str = ",") -> list[int | str]:
    """Read layers: numbers or names."""
    words = [word.strip() for word in text.split(separator)]
    if not all(words):
        raise FailureError(f"--layers {text!r}: expected numbers or names, such as 34 or 2,5 or blocks.4.", USAGE)
    return [int(word) if word.lstrip("-").isdigit() else word for word in words]


def in_groups(text: str) -> list[list[int | str]]:
    """Read the columns of a grid: `2,5,2+5` is three, the last of which skips both."""
    return [layers_from(group, "+") for group in text.split(",")]


def numbers_from(name: str, text: str) -> list[float]:
    """Read numbers with commas between them."""
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise FailureError(f"{name} {text!r}: expected numbers, such as 0.5,1.0.", USAGE) from None


def words_from(name: str, text: str) -> list[str]:
    """Read words with commas between them."""
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise FailureError(f"{name} {text!r}: expected words, such as residual,attention.", USAGE)
    return words


def guidance_from(layers: str | None, scale: float | None, mode: str | None) -> dict[str, Any]:
    """Return what `apply` takes; what was not typed is left out, so that the published setting counts."""
    given = {"layers": None if layers is None else layers_from(layers), "scale": scale, "mode": mode}
    return {name: value for name, value in given.items() if value is not None}


def settings_from(typed: Sequence[str] | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the pipeline: those with an option of their own, and `--set name=value`.

    A value is read as JSON where it is JSON, otherwise as text.
    """
    settings = {name: value for name, value in given.items() if value is not None}
    for text in typed or ():
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise FailureError(f"--set {text!r}: expected name=value, such as height=480.", USAGE)
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:
            settings[name] = value
    return settings


def prompt_for(source: Source, prompt: str | None, needed: bool = True) -> str:
    """Return the prompt; the embedded model has a usual one."""
    if prompt is None and source.name == DEMO:
        return DEMO_PROMPT
    if prompt is None and needed:
        raise FailureError('--prompt is missing: say what to show, --prompt "a fox in the snow".', USAGE)
    return prompt or ""


def sampler(pipe: Any, settings: Mapping[str, Any]) -> Sample:
    """Find out how a pipeline is called; one without a prompt (image to video) is called without."""
    parameters = inspect.signature(pipe.__call__).parameters
    if "prompt" in parameters or hasattr(pipe, "stg_sample"):
        return sampler_of(pipe, None, settings, "np")

    def sample(prompt: str, generator: torch.Generator) -> Any:
        if prompt:
            raise FailureError(f"--prompt: {type(pipe).__name__} takes none.", USAGE)
        return pipe(generator=generator, **{"output_type": "np", **settings})

    return sample
