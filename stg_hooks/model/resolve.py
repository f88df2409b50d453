"""Find the layers that a user asked for: by index, name, glob, regular expression or module."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any, SupportsIndex, cast

from torch import Tensor, nn

from stg_hooks.errors import LayerError, TargetError, closest
from stg_hooks.model.attention import attention_modules
from stg_hooks.model.flow import bystanders
from stg_hooks.model.layers import Layer, find_layers, is_list, is_side, was_recorded

LayerName = SupportsIndex | str | re.Pattern[str] | range | nn.Module
LayerSpec = LayerName | Iterable["LayerName"] | Mapping[Any, Any]
"""What may be passed as `layers`: indices, dotted names, globs or regular expressions, modules, a list of those, or a
dictionary that gives each of them its mode.
"""

REGEX = "re:"
"""What a regular expression begins with where it is written as text; no name of a module holds a colon."""

_DEPTH = 20  # of lists in lists
_MOST = 10_000  # layers that a generator gives
_SHOWN = 120  # characters of what a user typed, in messages


def resolve(model: nn.Module, spec: object, known: list[Layer] | None = None) -> list[Layer]:
    """Find the layers that a user asked for; all of them, or an error and none.

    Args:
        model: the module that holds the layers.
        spec: an index (negative ones count from the end), a range, a dotted name or an unambiguous tail of one, a
            glob whose `*` stays between two dots, a regular expression (`re.compile(...)`, or text that begins with
            `re:`) that is looked for in dotted names, a module, or a list of those.
        known: what `find_layers` gives, where that was called already.

    Returns:
        The layers, each once, numbered ones in running order.

    Raises:
        LayerError: an unknown layer, an ambiguous name, an empty list, or a model without layers.
        TargetError: `model` is not a module, or `spec` holds something that does not name a layer.
    """
    given: object = model  # whatever it was annotated as
    if not isinstance(given, nn.Module):
        held = next((name for name in ("transformer", "unet") if isinstance(getattr(given, name, None), nn.Module)), "")
        hint = f" Pass its denoiser, pipe.{held}, or guide it by stg.apply(pipe, ...)." if held else ""
        raise TargetError(f"expected a torch.nn.Module to find layers in, not {type(given).__name__}.{hint}")
    known = find_layers(model) if known is None else known
    chosen: dict[str, Layer] = {}
    # Names first: what is wrong with them is known at once, and of numbers a call of the model may have to tell.
    for item in sorted(items_of(spec), key=lambda item: isinstance(item, (int, range))):
        for layer in _resolve_one(model, known, item):
            chosen.setdefault(layer.name, layer)
    if not chosen:
        raise LayerError(f"layers={_shown(spec)} names no layer. {_what_exists(model, known)}")
    order = {layer.name: position for position, layer in enumerate(known)}
    return sorted(chosen.values(), key=lambda layer: order.get(layer.name, len(order)))


def items_of(spec: object) -> Iterator[object]:
    """Flatten what was passed as `layers`; ranges stay whole, however long they are.

    Raises:
        TargetError: lists in lists without end.
    """
    return _flat(spec, 0)


def listed(spec: Iterator[object]) -> list[object]:
    """List what a generator, or the like, gives.

    Raises:
        TargetError: it seems to have no end.
    """
    found = list(islice(spec, _MOST + 1))
    if len(found) > _MOST:
        raise TargetError(f"layers= gives more than {_MOST} layers: give a list of those to skip.")
    return found


def _flat(spec: object, depth: int) -> Iterator[object]:
    if depth > _DEPTH:
        raise TargetError(f"layers= is nested more than {_DEPTH} lists deep: give one list.")
    if type(spec) in (list, tuple):  # most of all, and much faster told than what counts as an index
        for item in cast("list[object]", spec):
            yield from _flat(item, depth + 1)
    elif type(spec) is int or isinstance(
        spec, (bool, str, bytes, range, Mapping, Tensor)
    ):  # reading a tensor may synchronise with the GPU
        yield spec
    elif isinstance(spec, SupportsIndex) and (index := _index_of(spec)) is not None:
        yield index
    elif isinstance(spec, nn.Module) and not isinstance(spec, (nn.ModuleList, nn.Sequential)):
        yield spec
    elif isinstance(spec, Iterable) and getattr(spec, "ndim", None) != 0:  # an array without dimensions is not a list
        for item in spec:
            yield from _flat(item, depth + 1)
    else:
        yield spec


def _index_of(value: SupportsIndex) -> int | None:
    """Return what an integer of any library is; `None` for what only may be one, as an array."""
    try:
        return operator.index(value)
    except TypeError:
        return None


def _resolve_one(model: nn.Module, known: list[Layer], item: object) -> list[Layer]:
    if isinstance(item, bool):
        raise TargetError(f"layers=[{item}]: expected an index, a name or a module, not a bool.")
    if isinstance(item, int):
        return [_by_index(model, known, item)]
    if isinstance(item, range):
        return [_by_index(model, known, index) for index in item]  # ends at the first that is out of range
    if isinstance(item, re.Pattern) or (isinstance(item, str) and item.startswith(REGEX)):
        return _by_pattern(model, known, item)
    if isinstance(item, str):
        return _by_name(model, known, item)
    if isinstance(item, nn.Module):
        return [_by_module(model, known, item)]
    raise TargetError(
        f"layers=[{_shown(item)}]: expected an index, a range, a dotted name, a glob, a regular expression or a "
        f"module, not {type(item).__name__}."
    )


def _shown(value: object) -> str:
    """Show what a user typed, as much of it as fits in a message."""
    try:
        text = repr(value)
    except Exception:  # of an integer with thousands of digits, or of an object of theirs
        return f"<{type(value).__name__}>"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _by_index(model: nn.Module, known: list[Layer], index: int) -> Layer:
    numbered = [layer for layer in known if layer.index is not None]
    if not -len(numbered) <= index < len(numbered):
        raise unseen(model, f"layers=[{_shown(index)}]: {_what_exists(model, known)} See stg.layers(model).")
    return numbered[index]


def _by_name(model: nn.Module, known: list[Layer], name: str) -> list[Layer]:
    if any(character in name for character in "*?["):
        matches = _named_so(model, known, lambda full: _glob_matches(name, full))
        if not matches:
            raise LayerError(
                f"layers=[{_shown(name)}] matches no layer. {_what_exists(model, known)} See stg.layers(model)."
            )
        return matches
    matches = [layer for layer in known if _is_tail(name, layer.name)]
    if not matches:
        matches = [
            Layer(None, full, module, attention_modules(module))
            for full, module in model.named_modules()
            if full and _is_tail(name, full)
        ]
    if len(matches) == 1:
        return matches
    exact = [layer for layer in matches if layer.name == name]
    if exact:
        return exact
    if matches:
        names = ", ".join(repr(layer.name) for layer in matches[:4])
        raise LayerError(
            f"layers=[{_shown(name)}] is ambiguous: {len(matches)} modules of {type(model).__name__} end in it ({names}"
            f"{', ...' if len(matches) > 4 else ''}). Write more of the name."
        )
    if name.removeprefix("-").isdecimal() and len(name) < 10:
        raise LayerError(
            f"layers=[{_shown(name)}] is not the name of a module. For an index write layers=[{int(name)}]."
        )
    asked = name[:_SHOWN]
    inside = [f"{layer.name}.{attention}" for layer in known for attention in layer.attention]
    existing = [*(layer.name for layer in known), *inside]
    tails = [tail for full in existing for tail in (full, full.split(".", 1)[-1])]
    numbers = _numbers(asked)  # another one is never a guess: a wrong layer does damage
    tails = [tail for tail in tails if not numbers or _numbers(tail) == numbers]
    raise LayerError(
        f"layers=[{_shown(name)}]: {type(model).__name__} has no module of that name."
        f"{closest(asked, tails)} {_what_exists(model, known)} See stg.layers(model)."
    )


def _by_pattern(model: nn.Module, known: list[Layer], pattern: re.Pattern[str] | str) -> list[Layer]:
    """Find the layers in whose names a regular expression is found."""
    asked = f"layers=[{_shown(pattern)}]"
    try:
        found_in = re.compile(pattern.removeprefix(REGEX) if isinstance(pattern, str) else pattern).search
        matches = _named_so(model, known, lambda name: found_in(name) is not None)
    except re.error as error:
        raise LayerError(f"{asked} is not a regular expression: {error}.") from error
    except TypeError:
        raise TargetError(f"{asked}: expected a regular expression for text, not for bytes.") from None
    if not matches:
        raise LayerError(f"{asked} is found in no name. {_what_exists(model, known)} See stg.layers(model).")
    return matches


def _named_so(model: nn.Module, known: list[Layer], fits: Callable[[str], bool]) -> list[Layer]:
    """Find the layers whose names fit; where there is none, the outermost modules, without cross-attention."""
    found = [layer for layer in known if fits(layer.name)]
    if found:
        return found
    outer = ""
    for name, module in model.named_modules():
        if name and fits(name) and not (outer and name.startswith(f"{outer}.")):
            outer = name
            if not getattr(module, "is_cross_attention", False):
                found.append(Layer(None, name, module, attention_modules(module)))
    return found


def _by_module(model: nn.Module, known: list[Layer], wanted: nn.Module) -> Layer:
    for layer in known:
        if layer.module is wanted:
            return layer
    for name, module in model.named_modules():
        if module is wanted and name:
            return Layer(None, name, module, attention_modules(module))
    raise LayerError(
        f"layers=[{type(wanted).__name__}(...)]: that module is not inside this {type(model).__name__}. "
        f"{_what_exists(model, known)} See stg.layers(model)."
    )


def _is_tail(tail: str, name: str) -> bool:
    return name == tail or name.endswith(f".{tail}")


def _numbers(name: str) -> list[str]:
    return re.findall(r"\d+", name)


def _glob_matches(pattern: str, name: str) -> bool:
    # Part by part, so that `*` never crosses a dot and `blocks.1` is not `blocks.10`.
    wanted, parts = pattern.split("."), name.split(".")
    return len(wanted) <= len(parts) and all(
        fnmatchcase(part, want) for part, want in zip(parts[-len(wanted) :], wanted, strict=True)
    )


def unseen(model: nn.Module, text: str) -> LayerError:
    """Make an error about layers of which one call of the model may tell, where looking finds none."""
    error = LayerError(text)
    error.is_unseen = not was_recorded(model) and all(layer.index is None for layer in find_layers(model))
    return error


def _what_exists(model: nn.Module, known: list[Layer]) -> str:
    count = sum(layer.index is not None for layer in known)
    kind = type(model).__name__
    if not count:
        names = f'Pass modules or dotted names of its blocks (layers=["{_some_name(model)}"])'
        if was_recorded(model):
            seen = "in a call of it, neither attention nor a list of blocks was seen"
            return f"{kind} has no numbered layers: {seen}. {names}."
        return (
            f"{kind} has no numbered layers: no ModuleList in it holds blocks with attention. "
            f"{names}, or let one call tell: stg.layers(model, example=dict(...)), with the arguments that it is "
            "called with."
        )
    return f"{kind} has {count} layers (0...{count - 1})."


def _some_name(model: nn.Module) -> str:
    """Name what most likely is a block: the first entry of the largest list that is not for text or the like."""
    lists = [(name, module) for name, module in model.named_modules() if name and is_list(module) and len(module)]
    if not lists:
        return next((name for name, _ in model.named_children()), "body.0")
    aside = bystanders(model)

    def rank(entry: tuple[str, nn.Module]) -> tuple[bool, int]:
        name, module = entry
        is_main = not is_side(name) and name.partition(".")[0] not in aside
        return is_main, sum(parameter.numel() for parameter in module.parameters())

    name, chosen = max(lists, key=rank)
    return f"{name}.{next(iter(chosen._modules))}"
