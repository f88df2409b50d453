"""Turn what was typed into what the library and the pipelines take."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stg_hooks.checks import is_real
from stg_hooks.cli.failures import USAGE, FailureError, hints, shortened
from stg_hooks.cli.models import DEMO, Source
from stg_hooks.errors import SettingError, StgError, closest

DEMO_PROMPT = "red 3 blue 7"
_LAYER = re.compile(r"-?\d+")
_NAMED = re.compile(r"[A-Za-z_*?]|^\D*$")  # a name, or a pattern of names; `2-5`, `[2` and `2.5` are neither


_TOGETHER, _ONE_BY_ONE = ("to skip them together", "+"), ("one by one", ",")


def in_groups(
    typed: Sequence[str] | None, ways: Sequence[tuple[str, str]] = (_TOGETHER, _ONE_BY_ONE)
) -> list[list[int | str]] | None:
    """Read layers, numbers or names: `2,5,2+5` is three settings, the last of which skips both.

    Args:
        typed: what was typed, for each time that the option was given.
        ways: what the command does with several layers, and what stands between them.
    """
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
    if not all(_LAYER.fullmatch(word) or _NAMED.search(word) for group in groups for word in group):
        numbers = re.findall(r"\d+", typed[0])
        hint = "; ".join(f"{what}: --layers {between.join(numbers)}" for what, between in ways)
        raise FailureError(
            f"--layers {shlex.quote(typed[0])}: layers are numbers or names" + (f"; {hint}" if numbers else "."), USAGE
        )
    _check_once("--layers", typed[0], ["+".join(group) for group in groups])
    return [[int(word) if _LAYER.fullmatch(word) else word for word in group] for group in groups]


def together(typed: Sequence[str] | None) -> list[int | str] | None:
    """Read the layers of one setting."""
    groups = in_groups(typed, [_TOGETHER])
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
    groups = in_groups(typed, [_ONE_BY_ONE])
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
        numbers = [float(word) for word in text.split(",")]
    except ValueError:
        raise FailureError(f"{name} {text!r}: expected numbers, such as 0.5,1.0.", USAGE) from None
    if not all(map(math.isfinite, numbers)):
        raise FailureError(f"{name} {text}: expected finite numbers, such as 0.5,1.0.", USAGE)
    _check_once(name, text, numbers)
    return numbers


def words_from(name: str, text: str) -> list[str]:
    """Read words with commas between them; those in brackets belong to a word, as in `smoothed(sigma=9, height=3)`."""
    words = [word.strip() for word in re.split(r",(?![^()]*\))", text)]
    if not all(words):
        raise FailureError(f"{name} {text!r}: expected words, such as residual,attention.", USAGE)
    _check_once(name, text, words)
    return words


def _check_once(name: str, text: str, values: Sequence[object]) -> None:
    for i, value in enumerate(values):
        if value in values[:i]:
            raise FailureError(f"{name} {text}: {value} is there twice.", USAGE)


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
            f'--settings {file}: expected an object such as {{"layers": [34], "scale": 1.0}}, not '
            f"{shortened(json.dumps(found))}.",
            USAGE,
        )
    for name in found:
        if name not in _SAVED:
            raise FailureError(
                f"--settings {file}: unknown setting {name!r}; choose from {', '.join(_SAVED)}.{closest(name, _SAVED)}",
                USAGE,
            )
    weight = found.get("guidance_scale")
    if weight is not None and not (is_real(weight) and math.isfinite(weight)):
        raise FailureError(f"--settings {file}: guidance_scale={json.dumps(weight)}: expected a number.", USAGE)
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
        raise FailureError(f"--settings {file}: {hints(' '.join(str(error).split()))}", USAGE) from error


# Arguments of pipelines whose options have other names than they; and those that a command gives by itself.
_OPTIONS = {"num_inference_steps": "--steps", "num_frames": "--frames"}
_OURS = {
    "generator": "--seed says which noise a run starts from",
    "output_type": "the results are written as they are to be looked at",
    "return_dict": "the results are read from what is returned",
}


class Typed(NamedTuple):
    """An argument of the pipeline, and how its user typed it."""

    name: str
    value: Any
    text: str


def options_from(given: Mapping[str, Any], setting: Sequence[str] | None = None) -> list[Typed]:
    """List the arguments of the pipeline: those with an option of their own, and `--set name=value`.

    Args:
        given: the first, by name, whether typed (not `None`) or not; of the prompt there may be a list.
        setting: the second. A value is read as JSON where it is JSON, otherwise as text.

    Raises:
        FailureError: a value that cannot be read, or an argument that is given twice, or not to be given so.
    """
    options = [
        Typed(name, value, f"{_option(name)} {_typed(value)}".rstrip())
        for name, values in given.items()
        for value in (values if isinstance(values, list) else [values])
        if value is not None
    ]
    for text in setting or ():
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise FailureError(f"--set {text!r}: expected name=value, such as height=480.", USAGE)
        if name in _OURS or name.startswith("callback"):
            why = _OURS.get(name, "it takes a function")
            raise FailureError(f"--set {text}: {name} cannot be set on the command line; {why}.", USAGE)
        if name in given:
            raise FailureError(f"--set {text}: {name} has an option of its own: {_option(name)} {value}", USAGE)
        if any(name == option.name for option in options):
            raise FailureError(f"--set {name}=... is given twice. Give it once.", USAGE)
        options.append(Typed(name, _value_of(text, value), f"--set {text}"))
    return options


def settings_of(options: Iterable[Typed]) -> dict[str, Any]:
    """Return the arguments of the pipeline besides the prompt."""
    return {option.name: option.value for option in options if option.name != "prompt"}


@contextlib.contextmanager
def named_as_typed(options: Collection[Typed]) -> Iterator[None]:
    """Have errors about arguments of the pipeline name the options that they were typed with.

    Raises:
        FailureError: the pipeline has no such argument, or refuses its value.
    """
    from stg_hooks.study.sampling import RefusedError

    try:
        yield
    except RefusedError as error:
        reason = str(error.__cause__ or error)
        # Those that it names; otherwise those that only pipelines know; otherwise any of them.
        choices = [
            [option.text for option in options if re.search(rf"\b{option.name}\b", reason) or _holds(reason, option)],
            [option.text for option in options if option.text.startswith("--set")],
            [option.text for option in options],
        ]
        blamed = " ".join(next(filter(None, choices), ["this call"]))
        raise FailureError(f"{blamed}: the pipeline refused it: {shortened(reason)}", USAGE) from error
    except SettingError as error:
        for option in options:
            if str(error).startswith(f"{option.name}: "):
                raise FailureError(f"{option.text}{str(error).removeprefix(option.name)}", USAGE) from error
        raise


def _option(name: str) -> str:
    return _OPTIONS.get(name, f"--{name.replace('_', '-')}")


def _typed(value: Any) -> str:
    return shlex.quote(str(value)) if isinstance(value, (str, int, float)) else ""


def _holds(reason: str, option: Typed) -> bool:
    return isinstance(option.value, str) and repr(option.value) in reason


def _value_of(text: str, value: str) -> Any:
    try:
        found = json.loads(value)
    except json.JSONDecodeError:
        return value
    if isinstance(found, float) and not math.isfinite(found):
        raise FailureError(f"--set {text}: expected a finite number.", USAGE)
    return found


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
