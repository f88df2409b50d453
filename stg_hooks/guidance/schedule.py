"""Guidance that changes during a run: which settings hold at a step, or at a noise level."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from stg_hooks.checks import is_count, is_real
from stg_hooks.errors import CallError, SettingError
from stg_hooks.guidance.settings import Settings
from stg_hooks.step import Step

_HOW_TO_TELL = (
    "In a loop of your own, set it before each step: guider.step = stg.Step(index=i, count=n, sigma=...), or, within "
    "`with stg.apply(...) as applied`, applied.step = stg.Step(...). For a sampler that calls denoiser(x, sigma): "
    "stg.Guider(..., sigmas=sigmas)."
)

Levels: TypeAlias = Sequence[tuple[float, Mapping[str, Any] | None]]
Schedule: TypeAlias = Callable[[Step], Mapping[str, Any] | None] | Levels


@dataclasses.dataclass
class Asked:
    """What a plan has been asked in a run, and whether it ever answered with guidance."""

    began: bool = False
    ended: bool = False
    guided: bool = False
    sigmas: list[float] = dataclasses.field(default_factory=list)
    """The highest noise level and the lowest one, where they are known."""

    def note(self, step: Step, settings: Settings) -> None:
        """Take down one answer."""
        self.began = self.began or step.index == 0
        self.ended = self.ended or (step.index is not None and step.index + 1 == step.count)
        self.guided = self.guided or settings.changes
        if step.sigma is not None:
            self.sigmas = [max([step.sigma, *self.sigmas]), min([step.sigma, *self.sigmas])]


class Plan:
    """Says which settings hold in a step."""

    def __init__(
        self,
        base: Settings,
        *,
        start: float = 0.0,
        stop: float = 1.0,
        sigma_range: tuple[float, float] | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        """Combine the settings of a run with when they hold.

        Args:
            base: the settings that a schedule starts from.
            start: part of the run from which on there is guidance, from 0 to 1; 0 includes the first step.
            stop: part of the run from which on there is none; 1 includes the last step, `start` switches it off.
            sigma_range: lowest and highest noise level with guidance, both included.
            schedule: a function of the `Step`; or a list of (noise level, values) from high to low, of which the first
                one counts whose level is not above the step's, or else the last one.

        Raises:
            SettingError: a fraction outside [0, 1], `start` after `stop`, an empty range, or values that cannot be
                used.
        """
        for name, value in (("start", start), ("stop", stop)):
            if not _is_number(value) or not 0 <= value <= 1:
                raise SettingError(f"{name}={value!r}: expected a part of the run, from 0 to 1.")
        if start > stop:
            raise SettingError(f"start={start} lies after stop={stop}.")
        if sigma_range is not None:
            low, high = _pair(sigma_range)
            if not low <= high:
                raise SettingError(f"sigma_range={sigma_range!r}: the first one is the lowest noise level.")
        self.base = base
        self.asked = Asked()
        self._start, self._stop = start, stop
        self._range = sigma_range
        self._function = schedule if callable(schedule) else None
        self._levels = [] if schedule is None or callable(schedule) else _levels(base, schedule)

    @property
    def is_constant(self) -> bool:
        """Whether the same settings hold in every step."""
        return (self._start, self._stop) == (0.0, 1.0) and not (self._range or self._function or self._levels)

    @property
    def possible(self) -> list[Settings]:
        """All settings that may hold in the run, as far as that can be told before it."""
        return [settings for _, settings in self._levels] or [self.base]

    @property
    def is_off(self) -> bool:
        """Whether it was said that no step is to be guided."""
        return self._start == self._stop or not any(settings.changes for settings in self.possible)

    def at(self, step: Step) -> Settings:
        """Return what holds in a step.

        Raises:
            CallError: it depends on something about the step that is not known.
            SettingError: a schedule gave something that cannot be used.
        """
        found = self._at(step)
        self.asked.note(step, found)
        return found

    def _at(self, step: Step) -> Settings:
        if (self._start, self._stop) != (0.0, 1.0):
            fraction = required(step.fraction, "start= and stop= are parts of the run", "index and count")
            if not self._start <= fraction < self._stop:
                return Settings(())
        if self._range is not None:
            sigma = required(step.sigma, "sigma_range= is about the noise level", "sigma")
            if not self._range[0] <= sigma <= self._range[1]:
                return Settings(())
        if self._function is not None:
            return self.base.changed(_called(self._function, step))
        if self._levels:
            sigma = required(step.sigma, "the schedule is a list of noise levels", "sigma")
            return next((found for level, found in self._levels if level <= sigma), self._levels[-1][1])
        return self.base


def check_every(every: object) -> None:
    """Raise unless `every` is a number of steps."""
    if not is_count(every):
        raise SettingError(f"every={every!r}: expected a number of steps, 1 or more.")


def _levels(base: Settings, schedule: Any) -> list[tuple[float, Settings]]:
    try:
        levels = [(float(level), base.changed(values)) for level, values in schedule]
    except (TypeError, ValueError) as error:
        if isinstance(error, SettingError):
            raise
        raise SettingError(
            f"schedule={schedule!r}: expected a function of the step, or a list of (noise level, values) such as "
            "[(0.9, None), (0.3, {'scale': 1.0}), (0.0, {'scale': 0.5})]."
        ) from error
    bounds = [math.inf, *(level for level, _ in levels)]
    if not levels or any(not low <= high or low == high < math.inf for high, low in itertools.pairwise(bounds)):
        raise SettingError("schedule=: expected noise levels from high to low, each once.")
    return levels


def _pair(value: Any) -> tuple[float, float]:
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(map(_is_number, value)):
        return value[0], value[1]
    raise SettingError(f"sigma_range={value!r}: expected (lowest, highest) noise level.")


def _is_number(value: Any) -> bool:
    return is_real(value) and not math.isnan(value)


def _called(function: Callable[[Step], Mapping[str, Any] | None], step: Step) -> Mapping[str, Any] | None:
    try:
        return function(step)
    except TypeError as error:
        missing = [name for name in ("index", "count", "sigma", "fraction") if getattr(step, name) is None]
        if not missing or "None" not in str(error):
            raise
        raise CallError(
            f"a function of the step failed ({error}); the step's {', '.join(missing)} is not known here, hence None. "
            + _HOW_TO_TELL
        ) from error


def required(value: float | None, what: str, missing: str) -> float:
    """Return something about the step, or raise where it is not known."""
    if value is None:
        raise CallError(f"{what}, but the step's {missing} is not known here. {_HOW_TO_TELL}")
    return value
