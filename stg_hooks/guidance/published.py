"""What has been published for known models: settings, with their sources."""

from __future__ import annotations

import dataclasses
import importlib
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from stg_hooks.errors import SettingError, closest
from stg_hooks.guidance.settings import Branch
from stg_hooks.model.layers import find_layers
from stg_hooks.modes.frames import Kind


@dataclasses.dataclass(frozen=True)
class Kin:
    """A class of another code base for a model that is published under the name of another class."""

    model: str
    where: Mapping[str, str]
    """By name of a value of the configuration there: the attribute of the module here that tells it."""
    has: tuple[str, ...] = ()
    """Attributes without which it is a module of another family, of a class of the same name."""
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """What class names of modules are called in the configuration there."""

    def found_in(self, module: nn.Module, key: str) -> object:
        """Return what a module says about a value of the configuration; `None` where it does not."""
        if any(getattr(module, name, None) is None for name in self.has):
            return None
        try:
            value = operator.attrgetter(self.where[key])(module)
        except (AttributeError, KeyError):
            return None
        if isinstance(value, nn.ModuleList):
            return len(value)
        kind = type(value).__name__
        return self.names.get(kind, kind) if isinstance(value, nn.Module) else value


@dataclasses.dataclass(frozen=True)
class Published:
    """A setting that was published for a model, with its source.

    `model` is a class name, and `where` what the model's configuration must say for the setting to be meant for it.
    """

    name: str
    model: str
    where: Mapping[str, object]
    layers: tuple[int, ...]
    mode: str
    scale: float
    source: str
    kind: Kind | None = None
    also: tuple[Branch, ...] = ()
    """Further branches, where more than one prediction is perturbed."""
    rescale: float = 0.0
    guidance_scale: float | None = None
    steps: str | None = None
    note: str = ""
    schedule: tuple[tuple[float, Mapping[str, Any] | None], ...] = ()
    """Where it changes with the noise level: as for `apply`."""
    start: float = 0.0
    """Part of the run from which on there is guidance, and `stop`, from which on there is none."""
    stop: float = 1.0
    rule: str = "cfg"
    """How the predictions become one, as for `apply`."""

    def fits(self, module: nn.Module) -> bool:
        """Tell whether a module is of this class and configuration."""
        return _is_a(module, self.model) and self.found_in(module) == dict(self.where)

    def found_in(self, module: nn.Module) -> dict[str, object]:
        """Return what a module says about itself where `where` asks."""
        kin = _kin(module)
        if kin is not None:
            return {key: kin.found_in(module, key) for key in self.where}
        config = getattr(module, "config", {})
        values = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
        return {key: values.get(key) for key in self.where}

    @property
    def branches(self) -> list[Branch]:
        """The perturbed predictions."""
        return [Branch(list(self.layers), self.scale, self.mode, self.kind), *self.also]

    def to_dict(self) -> dict[str, Any]:
        """Return the setting as plain lists, strings and numbers."""
        return {**dataclasses.asdict(self), "where": dict(self.where), "layers": list(self.layers)}


def _kin(module: nn.Module) -> Kin | None:
    """Return what is known of the module's class where it is one of another code base."""
    adapters = importlib.import_module("stg_hooks.adapters")
    models = {setting.model for setting in adapters.PUBLISHED}
    names = (cls.__name__ for cls in type(module).__mro__)
    nearest = next((name for name in names if name in adapters.KIN or name in models), None)
    kin: Kin | None = adapters.KIN.get(nearest)
    return kin


def _is_a(module: nn.Module, model: str) -> bool:
    """Tell whether a module is of a class, or of one of another code base for the same."""
    kin = _kin(module)
    return model == kin.model if kin is not None else model in {cls.__name__ for cls in type(module).__mro__}


def _table() -> Sequence[Published]:
    table: Sequence[Published] = importlib.import_module("stg_hooks.adapters").PUBLISHED
    return table


def published_names() -> list[str]:
    """Return the names of all published settings, as `preset` takes them."""
    return [setting.name for setting in _table()]


def published_settings(module: nn.Module) -> list[Published]:
    """Return the published settings for a module, the recommended one first."""
    return [setting for setting in _table() if setting.fits(module)]


def recommended(module: nn.Module) -> Published:
    """Return the published setting to use for a module when its user names no layers.

    Raises:
        SettingError: nothing is published for it, saying what to do instead.
    """
    found = published_settings(module)
    if found:
        return found[0]
    count = sum(layer.index is not None for layer in find_layers(module))
    others = "; ".join(
        f"layers={list(entry.layers)} for {entry.name} with {dict(entry.where)}"
        for entry in _table()
        if _is_a(module, entry.model) and max(entry.layers) < count
    )
    # No rule of thumb about depth: in what we measured none held, and some layers do damage at every scale.
    raise SettingError(
        f"no layers given, and no setting is published for this {type(module).__name__}. "
        + (f"For others of its class there is {others}: start from these. " if others else "")
        + "stg.layers(model) lists what can be skipped, and stg.profile measures which layers do damage."
    )


def preset_for(module: nn.Module, name: str) -> Published:
    """Return a published setting by its name.

    Raises:
        SettingError: there is none of this name, or it is for another model.
    """
    table = _table()
    found = [setting for setting in table if setting.name.lower() == str(name).lower()]
    if not found:
        fitting = [setting.name for setting in published_settings(module)]
        names = published_names()
        raise SettingError(
            f"unknown preset {name!r}."
            + (closest(str(name), names) or f" Choose from {', '.join(map(repr, names))}.")
            + (f" For this model: {', '.join(map(repr, fitting))}." if fitting else "")
        )
    if not found[0].fits(module):
        here = type(module).__name__
        if _is_a(module, found[0].model):
            here += f" with {found[0].found_in(module)}"
        raise SettingError(
            f"preset={name!r} is for a {found[0].model} with {dict(found[0].where)}, but this is a {here}."
        )
    return found[0]
