"""Read what users type into a node: layers, numbers, and lists by noise level."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stg_hooks.errors import SettingError
from stg_hooks.guidance.schedule import required
from stg_hooks.model.resolve import REGEX
from stg_hooks.step import Step

_SEPARATORS = re.compile(r"[,;\s]+")
_SPACED = re.compile(r"(?<=\d)\s*-\s*(?=\d)")  # "8 - 11"
_NUMBER = re.compile(r"[+-]?\d+")
_RANGE = re.compile(r"(.*?)(-?\d+)-(-?\d+)")
_MOST = 1000
SLACK = 1e-6  # noise levels of a run are float32, typed ones are not


def layers_from(text: str, field: str = "layers") -> list[int | str]:
    """Read layers: `14, 19`, `8-11`, `-1`, `single_blocks.3`, `double_blocks.0-2`, `blocks.*.attn1`, `re:blocks.[13]$`.

    Args:
        text: numbers, ranges with both ends, names of a model's layers, globs and regular expressions; separated by
            commas, semicolons or spaces, with or without brackets.
        field: what to call it in errors.

    Returns:
        Numbers and names, as for `stg.skip`; none for an empty text.

    Raises:
        SettingError: a part that cannot be read.
    """
    text = text.strip()
    inside = text.strip("[]()") if text[:1] in ("[", "(") else text
    words = _SEPARATORS.split(_SPACED.sub("-", inside))
    return [layer for word in words if word for layer in _layers_of(word.strip("'\""), field)]


def with_modes(layers: Sequence[int | str], mode: str | None) -> list[int | str] | dict[int | str, str]:
    """Give layers that say so a mode of their own, `14:values`, and the others that of the node.

    Raises:
        SettingError: what stands before a colon cannot be read.
    """
    texts = [str(layer) for layer in layers]
    parts = [("", "", text) if text.startswith(REGEX) else text.rpartition(":") for text in texts]
    if not any(colon for _, colon, _ in parts):
        return [*layers]
    found: dict[int | str, str] = {}
    for (name, colon, own), layer in zip(parts, layers, strict=True):
        for one in layers_from(name) if colon else [layer]:
            found[one] = own if colon else mode or "residual"
    return found


def _layers_of(word: str, field: str) -> list[int | str]:
    if _NUMBER.fullmatch(word):
        return [int(word)]
    found = _RANGE.fullmatch(word)
    if found is not None and (not found[1] or found[1].endswith(".")):
        prefix, first, last = found[1], int(found[2]), int(found[3])
        if first > last or (first < 0 <= last) or last - first >= _MOST:
            raise SettingError(f"{field}: cannot read {word!r} as a range. Write the lower number first, as in 8-11.")
        numbers = range(first, last + 1)
        return [f"{prefix}{number}" for number in numbers] if prefix else [*numbers]
    if not re.search(r"[A-Za-z_*?]", word):
        raise SettingError(
            f"{field}: cannot read {word!r}. Write numbers (14, 19), ranges (8-11) or names (single_blocks.3); the "
            "node STG Layers lists what a model has."
        )
    return [word]


def numbers_from(text: str, field: str) -> list[float]:
    """Read numbers, separated by commas, semicolons or spaces, with or without brackets.

    Args:
        text: what was typed.
        field: what to call it in errors.

    Raises:
        SettingError: something that is not a finite number.
    """
    found = []
    for word in _SEPARATORS.split(text.strip().strip("[]()")):
        if not word:
            continue
        try:
            found.append(float(word))
        except ValueError:
            found.append(math.nan)
        if not math.isfinite(found[-1]):
            raise SettingError(f"{field}: cannot read {word!r} as a number. Write them as in 1.0, 0.9933, 0.985.")
    return found


def layer_lists_from(text: str, field: str) -> list[list[int | str]]:
    """Read lists of layers, one per noise level: `[29], [29], [11, 25]`, or `29, 29, 28` for one layer each.

    Raises:
        SettingError: a part that cannot be read.
    """
    if "[" not in text:
        return [[layer] for layer in layers_from(text, field)]
    inside = text.strip()
    if inside.startswith("[") and re.match(r"\[\s*\[", inside):  # in brackets as a whole
        inside = inside[1:]
    return [layers_from(part, field) for part in re.findall(r"\[([^\[\]]*)\]", inside)]


def limits_from(low: float, high: float) -> tuple[float, float] | None:
    """Read a lowest and a highest noise level, where a negative number means no limit."""
    if low < 0 and high < 0:
        return None
    return max(low, 0.0) * (1 - SLACK), high * (1 + SLACK) if high >= 0 else math.inf


def schedule_from(
    sigmas: str, *, scale: str = "", rescale: str = "", guidance_scale: str = "", layers: str = ""
) -> tuple[Callable[[Step], Mapping[str, Any]], list[Mapping[str, Any]]] | None:
    """Read lists by noise level, as `STGGuiderAdvanced` of ComfyUI-LTXVideo has them.

    An entry holds from its noise level down to the next one: the lowest level that is not below a step's counts, above
    the highest one the last entry.

    Args:
        sigmas: the noise levels.
        scale: weights of `cond - weak`, one per level; left empty, the node's own.
        rescale: likewise.
        guidance_scale: CFG weights; left empty, the sampler's own.
        layers: a list of layers per level; left empty, the node's own.

    Returns:
        A schedule as for `stg.apply`, and all values in it; `None` where every field is empty.

    Raises:
        SettingError: a list that cannot be read or has another length.
    """
    texts = {"scale": scale, "rescale": rescale, "guidance_scale": guidance_scale}
    levels = numbers_from(sigmas, "sigmas")
    lists: dict[str, Sequence[Any]] = {
        name: numbers_from(text, f"{name} by sigma") for name, text in texts.items() if text.strip()
    }
    if layers.strip():
        lists["layers"] = layer_lists_from(layers, "layers by sigma")
    if not levels and not lists:
        return None
    for name, values in lists.items():
        if len(values) != len(levels):
            raise SettingError(f"{name} by sigma has {len(values)} entries, but there are {len(levels)} sigmas.")
    if not lists or len(set(levels)) < len(levels):
        raise SettingError("sigmas: expected noise levels, each once, and at least one list of as many values.")
    entries: list[Mapping[str, Any]] = [{name: lists[name][i] for name in lists} for i in range(len(levels))]

    def schedule(step: Step) -> Mapping[str, Any]:
        sigma = required(step.sigma, "lists by sigma are about the noise level", "sigma") * (1 - SLACK)
        above = [i for i, level in enumerate(levels) if level >= sigma]
        return entries[min(above, key=levels.__getitem__) if above else -1]

    return schedule, entries
