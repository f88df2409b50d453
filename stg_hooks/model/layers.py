"""Look at a model: find its stacks of blocks, number and name its layers, resolve what a user asks for."""

from __future__ import annotations

import dataclasses
import functools
import operator
import re
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from itertools import islice, zip_longest
from typing import Any, SupportsIndex, cast

from torch import Tensor, nn

from stg_hooks.errors import LayerError, TargetError, closest
from stg_hooks.model.facts import stated
from stg_hooks.model.flow import bystanders
from stg_hooks.model.source import calls_attention, running_order, words_of

LayerName = SupportsIndex | str | re.Pattern[str] | range | nn.Module
LayerSpec = LayerName | Iterable["LayerName"] | Mapping[Any, Any]
"""What may be passed as `layers`: indices, dotted names, globs or regular expressions, modules, a list of those, or a
dictionary that gives each of them its mode.
"""

REGEX = "re:"
"""What a regular expression begins with where it is written as text; no name of a module holds a colon."""

# Children that hold the projections of an attention: one set of these names is enough to recognise one.
_PROJECTIONS = (
    {"to_q", "to_k"},
    {"to_qkv"},
    {"q_proj", "k_proj"},
    {"qkv_proj"},
    {"q", "k", "v"},
    {"qkv"},
    {"wq", "wk"},
    {"query", "key"},
    {"query_key_value"},
    {"in_proj_weight"},
)
# What the projections of attention are called, in parts of their names.
_ATTENTION_WORDS = words_of(
    "q k v o qkv kv qk wq wk wv wo query key value to proj projection out attn attention query_key_value in add"
)
_QUERY = re.compile(r"(?<![a-zA-Z])(q|query)(?![a-zA-Z])")
_DEPTH = 20  # of lists in lists
_MOST = 10_000  # layers that a generator gives
_SHOWN = 120  # characters of what a user typed, in messages
# Stacks that prepare conditioning rather than denoise: they can be named, but are not numbered.
_SIDE_WORDS = words_of(
    "refiner refiners text txt context caption captions embed embeds embedder embedders embedding embeddings perceiver "
    "vace control controls controlnet connector connectors adapter adapters"
)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One skippable layer of a model.

    `index` is its number in the order in which the main blocks run, `None` for blocks that only a name can reach.
    """

    index: int | None
    name: str
    module: nn.Module
    attention: tuple[str, ...]
    """Names of the attention modules inside, relative to the block; empty when the layer is one itself."""

    @property
    def block(self) -> str:
        """Class name of the layer."""
        return type(self.module).__name__


@dataclasses.dataclass(frozen=True)
class Run:
    """What calls of a model have told of it, by names of modules in it."""

    order: tuple[str, ...]
    """Layers in the order in which they ran."""
    aside: frozenset[str]
    """Those among them that are given the same whatever is denoised."""
    attention: frozenset[str]
    """Modules that compute attention, and of which looking does not tell."""


_RUNS: weakref.WeakKeyDictionary[nn.Module, Run] = weakref.WeakKeyDictionary()
_SEEN: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # modules that were seen to compute attention


def remember(model: nn.Module, run: Run) -> None:
    """Remember what calls of a model have told; layers that did not run are not numbered any more."""
    _RUNS[model] = run
    for name in run.attention:
        _SEEN.add(model.get_submodule(name))


def is_attention(module: nn.Module) -> bool:
    """Tell whether a module computes attention itself.

    By its projections, its class name, or an adapter; for a block that holds no module of attention also by the norms
    of its queries and keys (`q_norm`, a `QKNorm`), a fused projection (`img_attn_qkv`), or a call of an attention
    function in its `forward`.
    """
    if _is_named_attention(module):
        return True
    return _computes_attention(module) and not any(map(_is_named_attention, module.modules()))


def _is_named_attention(module: nn.Module) -> bool:
    names = {*module._modules, *module._parameters}
    if any(wanted <= names for wanted in _PROJECTIONS):
        return True
    if _SEEN and module in _SEEN:
        return True
    kind = type(module).__name__
    if "Attention" in kind and not any(word in kind for word in ("Block", "Layer", "Norm", "Transformer", "Pool")):
        return True
    return bool(stated("ATTENTION", module))


def _computes_attention(module: nn.Module) -> bool:
    if type(module).__module__.startswith("torch.") or not any(map(_is_projection, module.children())):
        return False
    names = {*module._modules, *module._parameters}
    if any("qkv" in words_of(name) for name in names):
        return True
    # A child that projects as well is the attention itself.
    norms = [child._modules for child in module.children() if not any(map(_is_projection, child.children()))]
    if any(map(_has_pair, (names, *norms))):
        return True
    return calls_attention(module)


def _has_pair(names: Collection[str]) -> bool:
    return any(_of_key(name) in names for name in names)


@functools.lru_cache(maxsize=4096)
def _of_key(query: str) -> str | None:
    """Return what goes with `norm_q`, `q_norm`, `query_norm` and the like."""
    of_key = _QUERY.sub(lambda found: "key" if found[0] == "query" else "k", query, count=1)
    return of_key if of_key != query else None


def is_bare_attention(module: nn.Module) -> bool:
    """Tell attention from a block that computes it beside other things: most of its weights are projections of it."""
    if not is_attention(module):
        return False
    sizes = {True: 0, False: 0}
    for name, child in module._modules.items():
        if child is not None:
            is_of_attention = not _ATTENTION_WORDS.isdisjoint(words_of(name)) or is_attention(child)
            sizes[is_of_attention] += sum(parameter.numel() for parameter in child.parameters())
    return sizes[True] >= sizes[False]


def _is_projection(module: nn.Module) -> bool:
    return any(parameter is not None and parameter.ndim > 1 for parameter in module._parameters.values())


def attention_modules(module: nn.Module) -> tuple[str, ...]:
    """Name the outermost attention modules inside a module, itself excluded."""
    found: list[str] = []
    for name, child in module.named_modules():
        if name and is_attention(child) and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    return tuple(found)


def find_layers(model: nn.Module) -> list[Layer]:
    """List the skippable layers of a model, the numbered ones first and in running order.

    A layer is an entry of a `ModuleList` (or `Sequential`, `ModuleDict`) that holds attention, or a module of the same
    class beside such lists; the stages of a U-Net, recognised by their attention-free lists beside the attention, are
    looked into instead. Children are visited in the order in which `forward` mentions them, so that `mid_block` comes
    between `down_blocks` and `up_blocks`. Main blocks are those that `forward` gives what is denoised.

    Args:
        model: any module.

    Returns:
        Numbered layers in running order, then the blocks of side stacks (refiners of text or noise, hints).
    """
    found = list(_walk(model, ""))
    in_lists = {type(entry.module) for entry in found if not entry.is_alone}
    found = [entry for entry in found if not entry.is_alone or type(entry.module) in in_lists]
    named_so = [entry for entry in found if not _is_side(entry.name)] or found
    main = [entry for entry in named_so if not entry.is_aside] or named_so
    run = _RUNS.get(model) if _RUNS else None
    if run is not None and run.order:
        ran = [entry for entry in main if entry.name in run.order]
        main = [entry for entry in ran if entry.name not in run.aside] or ran or main
        main.sort(key=lambda entry: run.order.index(entry.name) if entry.name in run.order else 0)
    chosen = {entry.name for entry in main}
    layers = [Layer(i, entry.name, entry.module, attention_modules(entry.module)) for i, entry in enumerate(main)]
    side = [entry for entry in found if entry.name not in chosen]
    return layers + [Layer(None, entry.name, entry.module, attention_modules(entry.module)) for entry in side]


@dataclasses.dataclass(frozen=True)
class _Found:
    name: str
    module: nn.Module
    is_aside: bool
    """Whether nothing that is denoised goes through it."""
    is_alone: bool
    """Whether it is in no list: a layer only if lists hold modules of its class."""


def _walk(module: nn.Module, path: str, is_aside: bool = False) -> Iterator[_Found]:
    aside = bystanders(module)
    for name in _in_running_order(module):
        child = module.get_submodule(name)
        if not _holds_attention(child):
            continue
        holder = module.get_submodule(name.rpartition(".")[0])
        beside = is_aside or name.partition(".")[0] in aside
        if _is_container(holder) and not _is_container(child) and not _is_stage(child, holder):
            yield _Found(f"{path}{name}", child, beside, is_alone=False)
            continue
        inner = list(_walk(child, f"{path}{name}.", beside))
        yield from inner
        if not inner or all(entry.is_alone for entry in inner):
            yield _Found(f"{path}{name}", child, beside, is_alone=True)


def _in_running_order(module: nn.Module) -> list[str]:
    """Name the children of a module, entries in place of its lists, as `forward` mentions them."""
    children = [name for name, child in module._modules.items() if child is not None]
    if _is_container(module):
        return children

    def entries(name: str, which: slice | int) -> list[str]:
        child = module._modules[name]
        if not isinstance(child, nn.ModuleList):
            return [name]
        numbers = range(len(child))
        chosen = numbers[which] if isinstance(which, slice) else numbers[which : which + 1 or None]
        return [f"{name}.{number}" for number in chosen]

    mentioned: list[str] = []
    for group in running_order(module):
        columns = [entries(name, which) for name, which in group if name in children]
        mentioned += [name for row in zip_longest(*columns) for name in row if name is not None]
    unmentioned = [entry for name in children for entry in entries(name, slice(None)) if entry not in mentioned]
    return list(dict.fromkeys(unmentioned + mentioned))


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential))


def _holds_attention(module: nn.Module) -> bool:
    return any(is_attention(child) for child in module.modules())


def _is_stage(module: nn.Module, holder: nn.Module) -> bool:
    """Tell a stage of a U-Net (lists of residual blocks beside lists of attention) from a transformer block.

    An entry of a dictionary that has lists of its own is looked into as well: it may be one of several models.
    """
    if is_attention(module):
        return False
    if isinstance(holder, nn.ModuleDict):
        return any(_is_container(inner) and _holds_attention(inner) for inner in module.modules())
    lists = [child for child in module._modules.values() if isinstance(child, nn.ModuleList) and len(child)]
    return len({_holds_attention(child) for child in lists}) == 2


def _is_side(name: str) -> bool:
    return not _SIDE_WORDS.isdisjoint(words_of(name))


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
    if not isinstance(model, nn.Module):
        raise TargetError(f"expected a torch.nn.Module to find layers in, not {type(model).__name__}.")
    known = find_layers(model) if known is None else known
    chosen: dict[str, Layer] = {}
    for item in items_of(spec):
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
    ):  # reading a tensor may wait for the GPU
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
        raise LayerError(f"layers=[{_shown(index)}]: {_what_exists(model, known)} See stg.layers(model).")
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


def _glob_matches(pattern: str, name: str) -> bool:
    # Part by part, so that `*` never crosses a dot and `blocks.1` is not `blocks.10`.
    wanted, parts = pattern.split("."), name.split(".")
    return len(wanted) <= len(parts) and all(
        fnmatchcase(part, want) for part, want in zip(parts[-len(wanted) :], wanted, strict=True)
    )


def _what_exists(model: nn.Module, known: list[Layer]) -> str:
    count = sum(layer.index is not None for layer in known)
    kind = type(model).__name__
    if not count:
        return (
            f"{kind} has no numbered layers: no ModuleList in it holds blocks with attention. "
            f'Pass modules or dotted names of its blocks (layers=["{_some_name(model)}"]), or let one call tell: '
            "stg.layers(model, example=dict(...)), with the arguments that it is called with."
        )
    return f"{kind} has {count} layers (0...{count - 1})."


def _some_name(model: nn.Module) -> str:
    """Name what most likely is a block: the first entry of the largest list that is not for text or the like."""
    lists = [(name, module) for name, module in model.named_modules() if name and _is_container(module) and len(module)]
    if not lists:
        return next((name for name, _ in model.named_children()), "body.0")
    aside = bystanders(model)

    def rank(entry: tuple[str, nn.Module]) -> tuple[bool, int]:
        name, module = entry
        is_main = not _is_side(name) and name.partition(".")[0] not in aside
        return is_main, sum(parameter.numel() for parameter in module.parameters())

    name, chosen = max(lists, key=rank)
    return f"{name}.{next(iter(chosen._modules))}"
