"""Where a mode acts: which modules differ in the weak pass, and which attention inside them is replaced."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import nn

from stg_hooks.errors import LayerError, SettingError
from stg_hooks.model.attention import attention_modules, is_attention
from stg_hooks.model.layers import Layer
from stg_hooks.model.resolve import unseen
from stg_hooks.model.source import signature_text
from stg_hooks.modes.feed_forward import feed_forwards
from stg_hooks.modes.frames import Kind, check_kind, kinds_of, temporal_lines
from stg_hooks.modes.isolation import may_be_isolated

if TYPE_CHECKING:
    from stg_hooks.modes.perturbation import Needs, Perturbation


@dataclasses.dataclass(frozen=True)
class Site:
    """One module that differs in the weak pass."""

    module: nn.Module
    layers: tuple[Layer, ...]
    """The layers that were asked for in it: itself, or attention inside."""
    targets: tuple[tuple[str, nn.Module], ...]
    """The attention modules inside that are replaced by an attention mode, with their full names."""
    mode: Perturbation


def all_for(model: nn.Module, mode: Perturbation, known: Sequence[Layer]) -> list[int]:
    """Number the layers of a model that a mode can act in, where none are named.

    Raises:
        LayerError: there are none.
    """
    found = [layer.index for layer in known if layer.index is not None and _has(layer, mode.needs)]
    if not found:
        kinds = ", ".join(dict.fromkeys(layer.block for layer in known)) or "no blocks"
        raise unseen(model, f"{mode} {mode.verb} blocks, and {type(model).__name__} has none that fit it ({kinds}).")
    return found


def find_sites(
    model: nn.Module, chosen: Sequence[tuple[Layer, Perturbation]], kind: Kind | None, blocks: Sequence[Layer]
) -> list[Site]:
    """Find the modules in which a mode acts, and check that it can.

    A block that is skipped, or that holds perturbed attention, is a site: what happens to the tokens before the
    attention, and hence which of them are text, is seen in its call only.

    Args:
        model: the module that holds the layers.
        chosen: the layers that were asked for, each with its mode.
        kind: only attention within frames (`"spatial"`) or across them (`"temporal"`).
        blocks: all layers of the model.

    Returns:
        Sites, none inside another, in the order of `chosen`.

    Raises:
        LayerError: a layer that cannot be skipped in this mode, has no attention of this kind, or lies in another one.
        SettingError: an unknown kind, or a kind with a mode that does not concern attention.
    """
    check_kind(kind)
    layers = [layer for layer, _ in chosen]
    _check_nesting(layers)
    for mode in dict.fromkeys(mode for _, mode in chosen):
        if kind is not None and mode.needs not in ("attention", "anything"):
            names = _modes(lambda needs: needs == "attention")
            raise SettingError(
                f"kind={kind!r} chooses among the attention of a layer, which {mode} does not change. Choose from "
                f"{names}."
            )
    if kind is not None:
        _check_factorised(model, layers, kind)
    sites: dict[int, Site] = {}
    for layer, mode in chosen:
        targets = _targets(model, layer, kind)
        _check_mode(model, layer, targets, mode, kind)
        module = _enclosing(blocks, layer).module if mode.needs == "attention" else layer.module
        site = sites.get(id(module), Site(module, (), (), mode))
        if site.mode != mode:
            raise LayerError(
                f"{site.layers[0].name!r} and {layer.name!r} are attention of one block: give both the same mode, not "
                f"{site.mode.spelling!r} and {mode.spelling!r}."
            )
        sites[id(module)] = Site(module, (*site.layers, layer), (*site.targets, *targets), mode)
    _check_apart([*sites.values()])
    return [*sites.values()]


def _check_apart(sites: Sequence[Site]) -> None:
    """Raise where one mode changes a block and another one something inside that block."""
    if len({site.mode for site in sites}) < 2:
        return
    for outer in sites:
        inside = {id(module) for module in outer.module.modules()}
        for inner in sites:
            if inner is not outer and id(inner.module) in inside:
                raise LayerError(
                    f"{outer.layers[0].name!r} with {outer.mode} and {inner.layers[0].name!r} with {inner.mode} are in "
                    "one block: give one of them, or use a function as the mode of the block."
                )


def _targets(model: nn.Module, layer: Layer, kind: Kind | None) -> tuple[tuple[str, nn.Module], ...]:
    names = [layer.name] if is_attention(layer.module) else [f"{layer.name}.{name}" for name in layer.attention]
    kinds = kinds_of(model) if kind is not None else {}
    return tuple((name, model.get_submodule(name)) for name in names if kind is None or kinds[name] == kind)


def _enclosing(blocks: Sequence[Layer], layer: Layer) -> Layer:
    around = [block for block in blocks if layer.name.startswith(f"{block.name}.")]
    return max(around, key=lambda block: len(block.name)) if around else layer


def _check_nesting(layers: Sequence[Layer]) -> None:
    for outer in layers:
        for inner in layers:
            if inner.name.startswith(f"{outer.name}."):
                raise LayerError(
                    f"layers=[{outer.name!r}, {inner.name!r}]: the second is inside the first, which is skipped "
                    "already. Name one of them."
                )


def _check_factorised(model: nn.Module, layers: Sequence[Layer], kind: Kind) -> None:
    if not kinds_of(model):
        inside = [f"{layer.name}.{name}" for layer in layers for name in layer.attention]
        raise LayerError(
            f"kind={kind!r}: no name or class in {type(model).__name__} says that attention works across frames. "
            f"{temporal_lines(model, inside or attention_modules(model))}"
        )


def _check_mode(
    model: nn.Module, layer: Layer, targets: Sequence[tuple[str, nn.Module]], mode: Perturbation, kind: Kind | None
) -> None:
    asked = f"layers=[{layer.name!r}]"
    if mode.needs in ("block", "feed-forward", "streams") and not _has(layer, "block"):
        block = layer.name.rpartition(".")[0]
        raise LayerError(
            f"{asked}: {mode} {mode.verb} whole blocks, and this is an attention module inside one. Did you mean "
            f"layers=[{block!r}]?"
        )
    if mode.needs == "feed-forward" and not _has(layer, "feed-forward"):
        raise LayerError(
            f"{asked}: {layer.block} has no feed-forward network to silence. It can have {_possible(layer)}."
        )
    if mode.needs == "streams" and not _has(layer, "streams"):
        raise LayerError(
            f"{asked}: {layer.block} has no two streams with attention between them for {mode}. It can have "
            f"{_possible(layer)}.\n"
            f"  it is:    {layer.block}.forward{signature_text(layer.module)}"
        )
    if mode.needs != "attention":
        return
    if not targets:
        what = "attention" if kind is None else f"{kind} attention"
        inside = [f"{layer.name}.{name}" for name in layer.attention]
        settle = _attention_lines(layer.module) if kind is None else temporal_lines(model, inside)
        raise unseen(
            model,
            f"{asked}: {layer.block} has no {what} for {mode}. It can have {_possible(layer)}.\n"
            f"  it is:    {layer.block}.forward{signature_text(layer.module)}\n"
            f"  it holds: {_children(layer.module)}\n{settle}".rstrip(),
        )
    if is_attention(layer.module) and getattr(layer.module, "is_cross_attention", False):
        raise LayerError(
            f"{asked} is cross-attention: its keys come from other tokens than its queries, and {mode} replaces "
            f"self-attention only. Name the self-attention, or the block around it.\n"
            f"  it is:    {layer.block}.forward{signature_text(layer.module)}"
        )


def _children(module: nn.Module) -> str:
    return ", ".join(f"{name} ({type(child).__name__})" for name, child in module.named_children()) or "no modules"


def _attention_lines(module: nn.Module) -> str:
    """Write how to state which class inside a module computes attention; nothing where none may."""
    networks = feed_forwards(module)
    inner = [child for child in module.children() if not any(child is network for network in networks)]
    for candidate in (*inner, module):
        if not type(candidate).__module__.startswith("torch.") and next(candidate.children(), None) is not None:
            return (
                "If attention is computed there, first state by which class:\n"
                "  from stg_hooks.adapters import ATTENTION\n"
                f'  ATTENTION.add("{type(candidate).__name__}")'
            )
    return ""


def _has(layer: Layer, needs: Needs) -> bool:
    """Tell whether a layer is or holds what a mode needs."""
    is_whole = layer.index is not None or not is_attention(layer.module)
    if needs == "attention":
        return is_attention(layer.module) or bool(layer.attention)
    if needs == "feed-forward":
        return is_whole and bool(feed_forwards(layer.module))
    if needs == "streams":
        return is_whole and may_be_isolated(layer.module)
    return is_whole or needs in ("layer", "anything")


def _possible(layer: Layer) -> str:
    return _modes(lambda needs: _has(layer, needs))


def _modes(fits: Callable[[Needs], bool]) -> str:
    """Name the modes that need something, for a message."""
    from stg_hooks.modes.modes import MODES

    return ", ".join(repr(name) for name, mode in MODES.items() if fits(mode.needs))
