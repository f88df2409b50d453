"""What a user asked for, and the plan that comes of it and of what is published for the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from stg_hooks.errors import SettingError
from stg_hooks.guidance.per_output import PerOutput
from stg_hooks.guidance.published import preset_for, recommended
from stg_hooks.guidance.rules import Rule
from stg_hooks.guidance.scale_values import Scales, check_rescales, is_number
from stg_hooks.guidance.schedule import Plan, Schedule
from stg_hooks.guidance.settings import Branch, Settings
from stg_hooks.model.resolve import LayerSpec
from stg_hooks.modes.frames import Kind
from stg_hooks.modes.modes import find_mode
from stg_hooks.modes.perturbation import Mode
from stg_hooks.step import Step


@dataclasses.dataclass(frozen=True)
class Request:
    """What a user asked for, as `apply` describes it."""

    layers: LayerSpec | None = None
    scale: Scales | Callable[[Step], Scales] | None = None
    mode: str | Mode | None = None
    kind: Kind | None = None
    rescale: PerOutput[float] | None = None
    branches: Sequence[Branch] | None = None
    preset: str | None = None
    start: float | None = None
    stop: float | None = None
    sigma_range: tuple[float, float] | None = None
    schedule: Schedule | None = None
    rule: str | Rule | None = None
    on: str = "cond"


def plan_from(model: nn.Module, request: Request) -> Plan:
    """Turn what a user asked for into a plan.

    Args:
        model: the module whose published setting counts when no layers are given.
        request: what was asked for.

    Returns:
        The plan, checked as far as this can be done before a run.

    Raises:
        SettingError: a value that cannot be used, or a contradiction.
    """
    layers, scale, schedule = request.layers, request.scale, request.schedule
    mode, kind, branches, rule = request.mode, request.kind, request.branches, request.rule
    start, stop, rescale, sigma_range = request.start, request.stop, request.rescale, request.sigma_range
    if callable(scale):
        if schedule is not None:
            raise SettingError("give either scale=function or schedule=, whose values may hold a scale, not both.")
        function = scale
        scale, schedule = None, lambda step: {"scale": function(step)}
    is_of_model = layers is None and mode is not None and find_mode(mode).is_of_model
    if request.preset is not None or (layers is None and branches is None and not is_of_model):
        if layers is not None or branches is not None:
            raise SettingError("give either preset=, or layers or branches, not both.")
        published = recommended(model) if request.preset is None else preset_for(model, request.preset)
        if all(when is None for when in (start, stop, sigma_range, schedule)):
            start, stop = published.start, published.stop
        if published.schedule and schedule is None:
            schedule = published.schedule
        branches = published.branches
        if any(value is not None for value in (scale, mode, kind)):  # one of your own in the published layers
            own: dict[str, Any] = {"scale": scale, "mode": mode, "kind": kind}
            first = branches[0] if mode is None else dataclasses.replace(branches[0], kind=None)
            branches = [dataclasses.replace(first, **{name: v for name, v in own.items() if v is not None})]
            scale = mode = kind = None
        if request.on == "uncond":  # what is published is for a term that is added
            branches = [dataclasses.replace(branches[0], scale=1.0)]
        elif not all(is_number(branch.scale, 0) for branch in branches):
            rescale = published.rescale if rescale is None else rescale
            rule = published.rule if rule is None else rule
    found, factor = branches_from(layers, scale, mode, kind, rescale, branches)
    base = Settings(tuple(found), factor, rule="cfg" if rule is None else rule)
    start, stop = 0.0 if start is None else start, 1.0 if stop is None else stop
    return Plan(base, start=start, stop=stop, sigma_range=sigma_range, schedule=schedule)


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
    branch = Branch(layers, 1.0 if scale is None else scale, "residual" if mode is None else mode, kind)
    return [branch], 0.0 if rescale is None else rescale
