"""Denoisers that predict several things in a call, video and audio say: what these are called, and settings by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias, TypeVar

from torch import nn

from stg_hooks.errors import SettingError, closest
from stg_hooks.model.facts import stated

T = TypeVar("T")
PerOutput: TypeAlias = T | Mapping[str, T] | tuple[T, ...]
"""A setting: one value for all predictions of a call, or by their names, or one for each in their order."""


def each_of(setting: Any) -> Iterable[Any]:
    """Return the values of a setting."""
    if isinstance(setting, Mapping):
        return setting.values()
    return setting if isinstance(setting, tuple) else (setting,)


def check_named(name: str, setting: Mapping[Any, Any]) -> None:
    """Raise unless a setting by name has names."""
    if not setting or not all(isinstance(key, str) for key in setting):
        raise SettingError(f'{name}={dict(setting)!r}: expected names of predictions, as {{"video": 1.0}}.')


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What the predictions of a denoiser are called."""

    model: str
    """Class name of the denoiser."""
    names: tuple[str, ...] = ()
    """One for each prediction of a call; none where nothing names them."""

    @classmethod
    def stated(cls, model: nn.Module) -> Outputs:
        """Return what is known before a call."""
        return cls(type(model).__name__, next(iter(stated("OUTPUTS", model)), ()))

    def called(self, places: Mapping[str, int]) -> Outputs:
        """Return what the predictions that a call returned are called.

        Args:
            places: where in its output predictions may be, by key, attribute or position, and how many are there.
        """
        is_by_position = all(place.isdecimal() for place in places)
        names = self.names if len(places) <= len(self.names) else () if is_by_position else tuple(places)
        counts = zip(names, places.values(), strict=False)
        return Outputs(self.model, tuple(name for name, count in counts for _ in range(count)))

    def check(self, name: str, setting: object) -> None:
        """Raise where a setting names something that is not predicted.

        Raises:
            SettingError: so it does.
        """
        if not isinstance(setting, Mapping):
            return
        check_named(name, setting)
        if not self.names:
            asked = tuple(setting)
            raise SettingError(
                f"{name}={dict(setting)!r} is by name, but nothing names the predictions of {self.model}. Give one "
                "value for all, or first state what they are, in their order:\n"
                f"  from stg_hooks.adapters import OUTPUTS\n"
                f'  OUTPUTS["{self.model}"] = {asked!r}'.replace("'", '"')
            )
        for key in setting:
            if key not in self.names:
                names = ", ".join(dict.fromkeys(self.names))
                raise SettingError(
                    f"{name}={dict(setting)!r}: {self.model} predicts {names}.{closest(key, self.names)}"
                )

    def check_names(self, settings: Iterable[tuple[str, object]]) -> None:
        """Check settings with their names as far as that can be done before a call."""
        for name, setting in settings:
            if self.names:
                self.check(name, setting)

    def of(self, name: str, setting: PerOutput[T], index: int, off: T) -> T:
        """Return what a setting is for one of the predictions; what it does not name is off.

        Raises:
            SettingError: it names something that is not predicted.
        """
        if not isinstance(setting, Mapping):
            return setting[index] if isinstance(setting, tuple) else setting
        self.check(name, setting)
        return setting.get(self.names[index], off)


UNNAMED = Outputs("the denoiser")
"""Predictions of which nothing is known."""
