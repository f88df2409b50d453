"""Look at a model: find its stacks of blocks, number and name its layers."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator, Sequence
from itertools import zip_longest

from torch import nn

from stg_hooks.model.attention import attention_modules, is_attention, note_attention
from stg_hooks.model.flow import bystanders
from stg_hooks.model.source import running_order, words_of

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


def remember(model: nn.Module, run: Run) -> None:
    """Remember what calls of a model have told; layers that did not run are not numbered any more."""
    _RUNS[model] = run
    for name in run.attention:
        note_attention(model.get_submodule(name))


def was_recorded(model: nn.Module) -> bool:
    """Tell whether calls of a model have told of its layers."""
    return model in _RUNS


def find_layers(model: nn.Module) -> list[Layer]:
    """List the skippable layers of a model, the numbered ones first and in running order.

    A layer is an entry of a `ModuleList` (or `Sequential`, `ModuleDict`) that holds attention, or a module of the same
    class beside such lists; where no list holds any, and a call has told of the model, a module of a class of which
    there are several, or else an entry of any list. The stages of a U-Net, recognised by their attention-free lists
    beside the attention, are looked into instead. Children are visited in the order in which `forward` mentions them,
    so that `mid_block` comes between `down_blocks` and `up_blocks`. Main blocks are those that `forward` gives what is
    denoised.

    Args:
        model: any module.

    Returns:
        Numbered layers in running order, then the blocks of side stacks (refiners of text or noise, hints).
    """
    found = list(_walk(model, ""))
    run = _RUNS.get(model) if _RUNS else None
    in_lists = {type(entry.module) for entry in found if not entry.is_alone}
    if run is not None and not in_lists:
        found = _repeated(found) or list(_blocks_in_lists(model))
    else:
        found = [entry for entry in found if not entry.is_alone or type(entry.module) in in_lists]
    named_so = [entry for entry in found if not is_side(entry.name)] or found
    main = [entry for entry in named_so if not entry.is_aside] or named_so
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


def _repeated(found: Sequence[_Found]) -> list[_Found]:
    """List the outermost modules of classes of which there are several: `self.block1`, `self.block2`."""
    classes = [type(entry.module) for entry in found]
    several = [entry for entry in found if classes.count(type(entry.module)) > 1]
    return [one for one in several if not any(one.name.startswith(f"{other.name}.") for other in several)]


def _blocks_in_lists(model: nn.Module) -> Iterator[_Found]:
    """Find the outermost entries of lists of which several are of one class, attention or not; not torch's own."""
    inside: set[int] = set()
    for name, holder in model.named_modules():
        if is_list(holder) and id(holder) not in inside:
            entries = {key: entry for key, entry in holder.named_children() if not _is_of_torch(entry)}
            classes = [type(entry) for entry in entries.values()]
            for key, entry in entries.items():
                if classes.count(type(entry)) > 1:
                    inside |= {id(module) for module in entry.modules()}
                    yield _Found(f"{name}.{key}".lstrip("."), entry, is_aside=False, is_alone=False)


def _is_of_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.")


def _walk(module: nn.Module, path: str, is_aside: bool = False) -> Iterator[_Found]:
    aside = bystanders(module)
    for name in _in_running_order(module):
        child = module.get_submodule(name)
        if not _holds_attention(child):
            continue
        holder = module.get_submodule(name.rpartition(".")[0])
        beside = is_aside or name.partition(".")[0] in aside
        if is_list(holder) and not is_list(child) and not _is_stage(child, holder):
            yield _Found(f"{path}{name}", child, beside, is_alone=False)
            continue
        inner = list(_walk(child, f"{path}{name}.", beside))
        yield from inner
        if not inner or all(entry.is_alone for entry in inner):
            yield _Found(f"{path}{name}", child, beside, is_alone=True)


def _in_running_order(module: nn.Module) -> list[str]:
    """Name the children of a module, entries in place of its lists, as `forward` mentions them."""
    children = [name for name, child in module._modules.items() if child is not None]
    if is_list(module):
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


def is_list(module: nn.Module) -> bool:
    """Tell whether a module is one of torch's lists of modules."""
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
        return any(is_list(inner) and _holds_attention(inner) for inner in module.modules())
    lists = [child for child in module._modules.values() if isinstance(child, nn.ModuleList) and len(child)]
    return len({_holds_attention(child) for child in lists}) == 2


def is_side(name: str) -> bool:
    """Tell by its name whether a stack prepares conditioning."""
    return not _SIDE_WORDS.isdisjoint(words_of(name))
