"""Scales and schedules that have a name, so that they can be written down with their values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stg_hooks.errors import CallError, SettingError
from stg_hooks.step import Step

_TELL = (
    "In a loop of your own, set it before each step: guider.step = stg.Step({0}), or, within `with stg.apply(...) as "
    "applied`, applied.step = stg.Step(...)."
)


@dataclasses.dataclass(frozen=True)
class AdaptiveScale:
    """A `scale` that falls with the timestep t: `max(0, scale - fall * (1000 - t))`.

    Source: `pag_adaptive_scale` of diffusers' PAG pipelines; sd-perturbed-attention has `fall = scale * a**4` for its
    `adaptive_scale=a`.
    """

    scale: float = 3.0
    fall: float = 0.003

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("scale", "fall"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value < float("inf"):
                raise SettingError(f"adaptive_scale: {name}={value!r}: expected a number, 0 or more.")

    def __call__(self, step: Step) -> float:
        """Return the scale of a step.

        Raises:
            CallError: its timestep is not known.
        """
        t = 1000 * step.sigma if step.timestep is None and step.sigma is not None and step.kind == "flow" else None
        t = step.timestep if t is None else t
        if t is None:
            raise CallError(
                f"adaptive_scale falls with the timestep, which is not known here. {_TELL.format('timestep=t')}"
            )
        return max(0.0, self.scale - self.fall * (1000 - t))


@dataclasses.dataclass(frozen=True)
class ZeroInit:
    """A `schedule` that makes the prediction zero in the first steps: see `stg.rules.zero_init`."""

    steps: int = 1

    def __post_init__(self) -> None:
        """Check the number."""
        if type(self.steps) is not int or self.steps < 0:
            raise SettingError(f"steps={self.steps!r}: expected a number of steps, 0 or more.")

    def __call__(self, step: Step) -> Mapping[str, Any]:
        """Return what holds in a step.

        Raises:
            CallError: its index is not known.
        """
        if step.index is None:
            raise CallError(
                "zero_init is about the first steps of a run, but the step's index is not known here. "
                + _TELL.format("index=i, count=n")
            )
        return {"branches": [], "rule": _zero} if step.index < self.steps else {}


def _zero(cond: Tensor, *_: Any) -> Tensor:
    return torch.zeros_like(cond)


NAMED: Mapping[str, Mapping[str, Any]] = {
    "scale": {"adaptive_scale": AdaptiveScale()},
    "schedule": {"zero_init": ZeroInit()},
}
"""By setting: what may stand there as text with values in brackets, besides names that have tables of their own."""
