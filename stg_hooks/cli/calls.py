"""Turn what was typed into what the library and the pipelines take."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from stg_hooks.cli.failures import USAGE, FailureError
from stg_hooks.cli.models import DEMO, Source

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


def prompt_for(source: Source, typed: str | None, image: str | None) -> str:
    """Return the prompt; the embedded model has a usual one, and with an image there may be none."""
    if typed is None and source.name != DEMO and image is None:
        raise FailureError('--prompt is missing: say what to show, --prompt "a fox in the snow", or --image.', USAGE)
    return (DEMO_PROMPT if source.name == DEMO else "") if typed is None else typed


def picture_from(where: str | None) -> Any:
    """Load the image of `--image`, a file or URL."""
    if where is None:
        return None
    try:
        return importlib.import_module("diffusers.utils").load_image(where)
    except (OSError, ValueError) as error:
        raise FailureError(f"--image {where}: no image that can be read ({' '.join(str(error).split())}).") from error
