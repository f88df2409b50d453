"""Settings: one perturbed branch, and what has been published for known models."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from stg_hooks.combine import Scale, check_rescale, check_scale
from stg_hooks.errors import SettingError
from stg_hooks.layers import LayerSpec
from stg_hooks.perturb import Mode, find_mode


@dataclasses.dataclass(frozen=True)
class Branch:
    """One perturbed prediction: which layers are skipped, how strongly it counts, what skipped layers do instead."""

    layers: LayerSpec
    scale: Scale = 1.0
    mode: str | Mode = "residual"

    def __post_init__(self) -> None:
        """Check the scale and the mode; the layers can only be checked against a model."""
        check_scale("scale", self.scale)
        find_mode(self.mode)


@dataclasses.dataclass(frozen=True)
class Published:
    """A setting that somebody published for a model, with its source.

    `model` is a class name, and `where` what the model's configuration must say for the setting to be meant for it.
    """

    name: str
    model: str
    where: Mapping[str, object]
    layers: tuple[int, ...]
    mode: str
    scale: float
    source: str
    rescale: float = 0.0
    guidance_scale: float | None = None
    steps: str | None = None
    note: str = ""

    def fits(self, module: nn.Module) -> bool:
        """Tell whether a module is of this class and configuration."""
        if self.model not in {cls.__name__ for cls in type(module).__mro__}:
            return False
        config = getattr(module, "config", {})
        values = config if isinstance(config, Mapping) else vars(config)
        return all(values.get(key) == value for key, value in self.where.items())

    def to_dict(self) -> dict[str, Any]:
        """Return the setting as plain lists, strings and numbers."""
        return {**dataclasses.asdict(self), "where": dict(self.where), "layers": list(self.layers)}


def published_settings(module: nn.Module) -> list[Published]:
    """Return the published settings for a module, the recommended one first."""
    table: Sequence[Published] = importlib.import_module("stg_hooks.adapters").PUBLISHED
    return [setting for setting in table if setting.fits(module)]


def recommended(module: nn.Module) -> Published:
    """Return the published setting to use for a module when its user names no layers.

    Raises:
        SettingError: nothing is published for it, saying what to do instead.
    """
    found = published_settings(module)
    if found:
        return found[0]
    table: Sequence[Published] = importlib.import_module("stg_hooks.adapters").PUBLISHED
    kin = {cls.__name__ for cls in type(module).__mro__}
    others = "; ".join(
        f"{entry.name} with {dict(entry.where)}: layers={list(entry.layers)}" for entry in table if entry.model in kin
    )
    raise SettingError(
        f"no layers given, and no setting is published for this {type(module).__name__}"
        + (f" (there is one for {others})." if others else ".")
        + " Name the layers, for example layers=[-2]; stg.layers(...) lists them. One or two layers in the last two "
        "thirds and scales from 0.5 to 1 are a usual start."
    )


def branches_from(
    model: nn.Module,
    layers: LayerSpec | None,
    scale: Scale | None,
    mode: str | Mode | None,
    rescale: float | None,
    branches: Sequence[Branch] | None,
) -> tuple[list[Branch], float]:
    """Turn what a user gave into branches and a rescale; left-out values come from the published setting or defaults.

    Args:
        model: the module whose published setting counts when no layers are given.
        layers: as for `apply`.
        scale: as for `apply`.
        mode: as for `apply`.
        rescale: as for `apply`.
        branches: as for `apply`.

    Returns:
        The branches and the rescale to use, both checked.

    Raises:
        SettingError: a value that cannot be used, a contradiction, or no layers where nothing is published.
    """
    if rescale is not None:
        check_rescale(rescale)
    if branches is not None:
        if layers is not None or scale is not None or mode is not None:
            raise SettingError("give either branches=[...], or layers, scale and mode for a single one, not both.")
        if not branches or not all(isinstance(branch, Branch) for branch in branches):
            raise SettingError(f"branches={branches!r}: expected a list of stg.Branch(layers, scale, mode).")
        return list(branches), rescale or 0.0
    if scale is not None:
        check_scale("scale", scale)
    if layers is not None:
        branch = Branch(layers, 1.0 if scale is None else scale, "residual" if mode is None else mode)
        return [branch], rescale or 0.0
    setting = recommended(model)
    branch = Branch(
        list(setting.layers), setting.scale if scale is None else scale, setting.mode if mode is None else mode
    )
    return [branch], setting.rescale if rescale is None else rescale
