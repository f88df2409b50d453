"""Turn what was typed into what the library and the pipelines take."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from stg_hooks.cli.failures import USAGE, FailureError
from stg_hooks.cli.models import DEMO, Source

DEMO_PROMPT = "red 3 blue 7"


def in_groups(typed: Sequence[str] | None) -> list[list[int | str]] | None:
    """Read layers, numbers or names: `2,5,2+5` is three settings, the last of which skips both."""
    if not typed:
        return None
    if len(typed) > 1:
        raise FailureError(
            f"--layers is given {len(typed)} times. Give it once: --layers {'+'.join(typed)} skips them together, "
            f"--layers {','.join(typed)} one by one.",
            USAGE,
        )
    groups = [[word.strip() for word in group.split("+")] for group in typed[0].split(",")]
    if not all(word for group in groups for word in group):
        raise FailureError(
            f"--layers {typed[0]!r}: expected numbers or names, such as 34 or blocks.4; 2+5 skips both, 2,5 is two "
            "settings.",
            USAGE,
        )
    return [[int(word) if word.lstrip("-").isdigit() else word for word in group] for group in groups]


def together(typed: Sequence[str] | None) -> list[int | str] | None:
    """Read the layers of one setting."""
    groups = in_groups(typed)
    if groups is not None and typed and len(groups) > 1:
        joined = typed[0].replace(",", "+")
        raise FailureError(
            f"--layers {typed[0]}: commas stand between settings, and here there is one. To skip these layers "
            f"together: --layers {joined}",
            USAGE,
        )
    return groups[0] if groups else None


def one_by_one(typed: Sequence[str] | None) -> list[int | str] | None:
    """Read layers that are looked at by themselves."""
    groups = in_groups(typed)
    if groups is not None and typed and any(len(group) > 1 for group in groups):
        apart = typed[0].replace("+", ",")
        raise FailureError(
            f"--layers {typed[0]}: profile measures each layer by itself: --layers {apart}. sweep tries them together.",
            USAGE,
        )
    return [layer for group in groups for layer in group] if groups else None


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


def guidance_from(layers: Sequence[str] | None, scale: float | None, mode: str | None) -> dict[str, Any]:
    """Return what `apply` takes; what was not typed is left out, so that the published setting counts."""
    given = {"layers": together(layers), "scale": scale, "mode": mode}
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
