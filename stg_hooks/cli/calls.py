"""Turn what was typed into what the library and the pipelines take."""

from __future__ import annotations

import contextlib
import importlib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stg_hooks.cli.failures import USAGE, FailureError
from stg_hooks.cli.models import DEMO, Source
from stg_hooks.errors import StgError, closest

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
    """Read words with commas between them; those in brackets belong to a word, as in `smoothed(sigma=9, height=3)`."""
    words = [word.strip() for word in re.split(r",(?![^()]*\))", text)]
    if not all(words):
        raise FailureError(f"{name} {text!r}: expected words, such as residual,attention.", USAGE)
    return words


def guidance_from(
    layers: Sequence[str] | None,
    scale: float | None,
    mode: str | None,
    rescale: float | None = None,
    start: float | None = None,
    stop: float | None = None,
) -> dict[str, Any]:
    """Return what `apply` takes; what was not typed is left out, so that a file or the published setting counts."""
    given = {"layers": together(layers), "scale": scale, "mode": mode}
    given |= {"rescale": rescale, "start": start, "stop": stop}
    return {name: value for name, value in given.items() if value is not None}


# What a file of settings may hold: what `apply` and `Guider` write into one.
_SAVED = (
    *("layers", "scale", "mode", "kind", "branches", "preset", "rescale", "rule", "schedule"),
    *("start", "stop", "sigma_range", "on", "every", "strict", "guidance_scale"),
)


def guidance_in(file: Path | None) -> dict[str, Any]:
    """Read a file of settings, as `to_dict` of `apply` and `Guider` and the cells of a sweep write it.

    Raises:
        FailureError: it cannot be read, is not a JSON object, or holds something else than settings.
    """
    if file is None:
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise FailureError(f"--settings {file}: {error.strerror}.", USAGE) from error
    except ValueError as error:
        raise FailureError(f"--settings {file}: this is not valid JSON ({error}).", USAGE) from error
    if not isinstance(found, dict):
        raise FailureError(
            f'--settings {file}: expected an object such as {{"layers": [34], "scale": 1.0}}, not a list or a number.',
            USAGE,
        )
    for name in found:
        if name not in _SAVED:
            raise FailureError(
                f"--settings {file}: unknown setting {name!r}; choose from {', '.join(_SAVED)}.{closest(name, _SAVED)}",
                USAGE,
            )
    return found


@contextlib.contextmanager
def blamed_on(file: Path | None, names: Collection[str]) -> Iterator[None]:
    """Have errors about settings of a file name the file.

    Args:
        file: where they stand.
        names: which settings count as they stand there.

    Raises:
        FailureError: an error about one of them.
    """
    try:
        yield
    except StgError as error:
        if not any(re.search(rf"\b{name}\b", str(error)) for name in names):
            raise
        raise FailureError(f"--settings {file}: {' '.join(str(error).split())}", USAGE) from error


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
