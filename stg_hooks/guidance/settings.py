"""Settings: one perturbed branch, and what has been published for known models."""

from __future__ import annotations

import dataclasses
import importlib
import operator
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from stg_hooks.errors import SettingError, closest
from stg_hooks.guidance.combine import Scales, check_rescales, check_scales
from stg_hooks.guidance.outputs import PerOutput
from stg_hooks.model.resolve import LayerSpec, items_of, listed
from stg_hooks.modes.frames import Kind
from stg_hooks.modes.modes import check_one_mode, find_mode
from stg_hooks.modes.perturbation import Mode, Perturbation
from stg_hooks.modes.sites import check_kind, check_layers_given


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
    table = _table()
    others = "; ".join(
        f"layers={list(entry.layers)} for {entry.name} with {dict(entry.where)}"
        for entry in table
        if _is_a(module, entry.model)
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
            f"preset={name!r} does not exist."
            + (closest(str(name), names) or f" There is {', '.join(map(repr, names))}.")
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


def branches_from(
    layers: LayerSpec | None,
    scale: Scales | None,
    mode: str | Mode | None,
    kind: Kind | None,
    rescale: PerOutput[float] | None,
    branches: Sequence[Branch] | None,
) -> tuple[list[Branch], PerOutput[float]]:
    """Turn what a user gave into branches and a rescale.

    Args:
        layers: as for `apply`.
        scale: as for `apply`.
        mode: as for `apply`.
        kind: as for `apply`.
        rescale: as for `apply`.
        branches: as for `apply`.

    Returns:
        The branches and the rescale to use, both checked.

    Raises:
        SettingError: a value that cannot be used, or a contradiction.
    """
    if rescale is not None:
        check_rescales(rescale)
    if branches is not None:
        if any(value is not None for value in (layers, scale, mode, kind)):
            raise SettingError("give either branches=[...], or layers, scale, mode and kind for one, not both.")
        given: object = branches  # whatever it was annotated as
        if not isinstance(given, Sequence) or not given or not all(isinstance(branch, Branch) for branch in given):
            raise SettingError(f"branches={branches!r}: expected a list of stg.Branch(layers, scale, mode).")
        return list(branches), rescale or 0.0
    return [Branch(layers, 1.0 if scale is None else scale, mode or "residual", kind)], rescale or 0.0
