"""What a user sets: the perturbed branches, and what holds in a call."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from stg_hooks.checks import check_choice
from stg_hooks.errors import SettingError
from stg_hooks.guidance.per_output import PerOutput, each_of
from stg_hooks.guidance.rules import Rule, find_rule
from stg_hooks.guidance.scale_values import Scales, check_rescales, check_scales, is_number
from stg_hooks.model.resolve import LayerSpec, items_of, listed
from stg_hooks.modes.frames import Kind, check_kind
from stg_hooks.modes.modes import check_layers_given, check_one_mode, find_mode
from stg_hooks.modes.perturbation import Mode, Perturbation


@dataclasses.dataclass(frozen=True)
class Branch:
    """One perturbed prediction: which layers are skipped, how strongly it counts, what skipped layers do instead.

    A dictionary gives each layer its mode: `stg.Branch({14: "attention", 19: "residual"})`.
    """

    layers: LayerSpec | None = None
    """Left out for a mode that is meant for all of them, `"isolated"`."""
    scale: Scales = 1.0
    mode: str | Mode = "residual"
    kind: Kind | None = None
    """In factorised models: only attention within frames (`"spatial"`) or across them (`"temporal"`)."""

    def __post_init__(self) -> None:
        """Check the scale and the mode; the layers can only be checked against a model."""
        if isinstance(self.layers, Iterator):  # which gives them once only
            object.__setattr__(self, "layers", listed(self.layers))
        check_scales("scale", self.scale)
        if not self.is_by_output:
            check_one_mode(self.layers, self.mode)
            for mode in self.layers.values() if isinstance(self.layers, Mapping) else ():
                find_mode(mode)
        check_layers_given(self.layers, find_mode(self.mode))
        check_kind(self.kind)

    @property
    def key(self) -> Hashable:
        """What is equal for branches whose weak predictions are the same, whatever their scales."""
        return _key(self.layers), find_mode(self.mode), self.kind

    @property
    def is_by_output(self) -> bool:
        """Whether its layers are given by the names of predictions, and not with a mode each."""
        layers = self.layers
        return isinstance(layers, Mapping) and all(map(_is_name, layers)) and not any(map(_is_mode, layers.values()))

    @property
    def parts(self) -> tuple[Branch, ...]:
        """The branches that it stands for: one for each choice of layers, where these are given by prediction."""
        if not self.is_by_output or not isinstance(self.layers, Mapping):
            return (self,)
        same: dict[Hashable, tuple[LayerSpec, dict[str, Any]]] = {}
        for name, layers in self.layers.items():
            scale = self.scale.get(name, 0.0) if isinstance(self.scale, Mapping) else self.scale
            if [*items_of(layers)]:
                same.setdefault(_key(layers), (layers, {}))[1][name] = scale
        return tuple(dataclasses.replace(self, layers=layers, scale=scales) for layers, scales in same.values())


def _is_name(key: object) -> bool:
    return isinstance(key, str)


def _is_mode(value: object) -> bool:
    return isinstance(value, (str, Perturbation)) or (callable(value) and not isinstance(value, nn.Module))


def _key(layers: object) -> Hashable:
    """Return something that is equal for equal choices of layers; modules count by identity."""
    if isinstance(layers, Mapping):
        return tuple((_key(spec), find_mode(mode)) for spec, mode in layers.items())
    return tuple(item if isinstance(item, (str, int, range, re.Pattern)) else id(item) for item in items_of(layers))


@dataclasses.dataclass(frozen=True)
class Settings:
    """What holds in a call. `guidance_scale` is the CFG weight to use instead of the caller's own, or `None`."""

    branches: tuple[Branch, ...]
    rescale: PerOutput[float] = 0.0
    guidance_scale: Scales | None = None
    rule: str | Rule = "cfg"

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        check_rescales(self.rescale)
        find_rule(self.rule)
        if self.guidance_scale is not None:
            check_scales("guidance_scale", self.guidance_scale)

    @functools.cached_property
    def active(self) -> tuple[Branch, ...]:
        """The branches with a scale other than 0."""
        return tuple(branch for branch in self.parts if not is_number(branch.scale, 0))

    @functools.cached_property
    def parts(self) -> tuple[Branch, ...]:
        """The branches, each with layers of its own."""
        return tuple(part for branch in self.branches for part in branch.parts)

    @functools.cached_property
    def changes(self) -> bool:
        """Whether a call with these settings differs from a plain one."""
        return bool(self.active) or self.replaces

    @functools.cached_property
    def replaces(self) -> bool:
        """Whether the final prediction is returned, instead of a term added."""
        return self.rule != "cfg" or self.rescales or self.guidance_scale is not None

    @property
    def rescales(self) -> bool:
        """Whether any prediction is rescaled."""
        return not is_number(self.rescale, 0)

    @property
    def by_name(self) -> list[tuple[str, object]]:
        """What may be given for each prediction, with its name."""
        of_branches: list[tuple[str, object]] = [("scale", branch.scale) for branch in self.branches]
        of_branches += [("layers", branch.layers) for branch in self.branches if branch.is_by_output]
        return [*of_branches, ("rescale", self.rescale), ("guidance_scale", self.guidance_scale)]

    @property
    def of_samples(self) -> bool:
        """Whether it matters which part of a prediction is one sample."""
        scales = [scale for branch in self.branches for scale in each_of(branch.scale)]
        return self.replaces or any(isinstance(scale, Tensor) and scale.ndim > 0 for scale in scales)

    @property
    def why_replaces(self) -> str:
        """The setting that makes `replaces` true, for messages."""
        if self.rule != "cfg":
            return f"rule={self.rule!r}"
        return f"rescale={self.rescale}" if self.rescales else f"guidance_scale={self.guidance_scale}"

    def changed(self, values: Mapping[str, Any] | None) -> Settings:
        """Return these settings with some values changed; without guidance for `None`.

        Args:
            values: new values by name: `layers`, `scale`, `mode` and `kind` of a single branch, or `branches`;
                `rescale`; `guidance_scale`; `rule`. No layers, `[]`, mean no skip guidance.

        Returns:
            The new settings, checked.

        Raises:
            SettingError: an unknown name, a value that cannot be used, or one of a single branch where there are
                several branches.
        """
        if values is None:
            return Settings(())
        if not isinstance(values, Mapping):
            raise SettingError(
                f"a schedule gave {values!r}: expected a dict such as {{'scale': 0.5}}, or None for no guidance."
            )
        names = ("layers", "scale", "mode", "kind", "branches", "rescale", "guidance_scale", "rule")
        for name in values:
            check_choice(f"setting {name!r} in a schedule", name, names)
        whole = {name: values[name] for name in ("rescale", "guidance_scale", "rule") if name in values}
        one = {name: values[name] for name in ("layers", "scale", "mode", "kind") if name in values}
        given = values.get("branches", self.branches)
        if not isinstance(given, (list, tuple)) or not all(isinstance(branch, Branch) for branch in given):
            raise SettingError(
                f"a schedule gave branches={given!r}: expected a list of stg.Branch(layers, scale, mode)."
            )
        branches = tuple(given)
        if one and ("branches" in values or len(branches) != 1):
            raise SettingError(
                f"a schedule gave {', '.join(one)} for {len(branches)} branches: give branches=[stg.Branch(...), ...]."
            )
        if one:
            none = isinstance(one.get("layers"), (list, tuple)) and not one["layers"]
            branches = () if none else (dataclasses.replace(branches[0], **one),)
        return dataclasses.replace(self, branches=branches, **whole)
