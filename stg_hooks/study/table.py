"""Show what can be skipped in a model, and what is recommended."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from stg_hooks.errors import CallError, TargetError
from stg_hooks.guidance.published import Published, published_settings
from stg_hooks.guidance.settings import Branch
from stg_hooks.hosts import denoisers_of
from stg_hooks.model.attention import is_attention
from stg_hooks.model.layers import Layer, find_layers
from stg_hooks.modes.frames import kinds_of
from stg_hooks.passes.learning import learn


def layers(target: object, example: Mapping[str, Any] | Sequence[Any] | None = None) -> LayerTable:
    """List what can be skipped in a model or in the denoisers of a pipeline.

    Args:
        target: a module, or a diffusers pipeline.
        example: for a module, arguments that it can be called with: a dictionary, or a list of positional ones. It is
            called with them, twice. That tells which modules compute attention where looking does not, in which order
            blocks run, and which never run, or not with what is denoised; numbers of layers follow that from then on.

    Returns:
        A table that prints, iterates over `Layer` records, and has `.to_dict()`.

    Raises:
        TargetError: neither a module nor a pipeline; or an example for a pipeline.
        CallError: the model cannot be called with the example.
    """
    if example is not None:
        if not isinstance(target, nn.Module):
            raise TargetError(f"example= is for a module, not for {type(target).__name__}: pass its denoiser.")
        is_named = isinstance(example, Mapping)
        args, kwargs = (() if is_named else tuple(example)), (dict(example) if is_named else {})
        try:
            learn(target, target, args, kwargs)
        except Exception as error:
            raise CallError(
                f"example= does not fit: {type(target).__name__} could not be called with it ({type(error).__name__}: "
                f"{error}). Pass what the model is called with: example=dict(...), or a tuple of arguments."
            ) from error
    return LayerTable(denoisers_of(target))


class LayerTable:
    """The layers of one or more models: prints as a table, iterates over layers, `.to_dict()` for machines."""

    def __init__(self, models: dict[str, nn.Module]) -> None:
        """Look at each model.

        Args:
            models: denoisers by name; a lone module under an empty name.
        """
        self._models = {name: type(model).__name__ for name, model in models.items()}
        self._layers = {name: find_layers(model) for name, model in models.items()}
        self._kinds = {name: kinds_of(model) for name, model in models.items()}
        self._published = {name: published_settings(model) for name, model in models.items()}

    def __iter__(self) -> Iterator[Layer]:
        """Iterate over all layers."""
        return (layer for layers in self._layers.values() for layer in layers)

    def __len__(self) -> int:
        """Count all layers."""
        return sum(map(len, self._layers.values()))

    def to_dict(self) -> dict[str, Any]:
        """Return everything in the table as plain lists, strings and numbers."""
        return {
            name: {
                "model": self._models[name],
                "layers": [
                    {
                        "index": row.index,
                        "name": row.name,
                        "block": row.block,
                        "attention": list(row.attention),
                        "kinds": self._kinds_in(name, row),
                    }
                    for row in layers
                ],
                "published": [setting.to_dict() for setting in self._published[name]],
            }
            for name, layers in self._layers.items()
        }

    def _kinds_in(self, name: str, layer: Layer) -> dict[str, str]:
        found = {part: self._kinds[name].get(f"{layer.name}.{part}") for part in layer.attention}
        return {part: kind for part, kind in found.items() if kind is not None}

    def __repr__(self) -> str:
        """Format the table as text."""
        return "\n\n".join(self._format(name) for name in self._layers)

    def _format(self, name: str) -> str:
        found, published = self._layers[name], self._published[name]
        count = sum(layer.index is not None for layer in found)
        title = f"{name} ({self._models[name]})" if name else self._models[name]
        recommended = set(published[0].layers) if published else set()
        rows = [("index", "name", "block", "attention inside", "")]
        rows += [_row(layer, layer.index in recommended, self._kinds_in(name, layer)) for layer in found]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        cells = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        notes = [_describe(setting) for setting in published]
        return "\n  ".join([f"{title}: {count} layers", *(line.rstrip() for line in cells + notes)])


def _row(layer: Layer, recommended: bool, kinds: Mapping[str, str]) -> tuple[str, str, str, str, str]:
    inside = ", ".join(f"{name} ({kinds[name]})" if name in kinds else name for name in layer.attention)
    return (
        "-" if layer.index is None else str(layer.index),
        layer.name,
        layer.block,
        "(is one itself)" if is_attention(layer.module) else inside,
        "<- published" if recommended else "",
    )


def _describe(setting: Published) -> str:
    when = f", start={setting.start:g}, stop={setting.stop:g}" if (setting.start, setting.stop) != (0, 1) else ""
    when += ", other values by noise level" if setting.schedule else ""
    return (
        f"published for {setting.name}: {' and '.join(map(_describe_branch, setting.branches))}, "
        f"rescale={setting.rescale}{when} ({setting.source})"
    )


def _describe_branch(branch: Branch) -> str:
    kind = f", kind={branch.kind!r}" if branch.kind else ""
    return f"layers={branch.layers}, mode={branch.mode!r}{kind}, scale={branch.scale}"
