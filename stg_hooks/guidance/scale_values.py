"""Scales and rescale: what may be given, and how it fits a prediction."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from stg_hooks.checks import is_real
from stg_hooks.errors import SettingError
from stg_hooks.guidance.per_output import PerOutput, check_named, each_of

Scale = float | Tensor
Scales = PerOutput[Scale]
"""A scale for all predictions of a call, or one for each of several, such as video and audio."""


def is_number(scale: Scales | None, value: float) -> bool:
    """Tell whether a scale is this very number; of a tensor that cannot be told without waiting for the GPU."""
    if isinstance(scale, (Mapping, tuple)):
        return all(not isinstance(one, Tensor) and one == value for one in each_of(scale))
    return not isinstance(scale, Tensor) and scale == value


def fitted(name: str, scale: Scale, cond: Tensor) -> Scale:
    """Give a weight of one value per sample the dimensions of a prediction, in float32; numbers stay numbers.

    One value per prompt counts for the neighbouring samples that are made of the prompt.
    """
    if not isinstance(scale, Tensor):
        return float(scale)
    given, scale = tuple(scale.shape), _per_row(scale, cond.shape[0]) if scale.ndim in (1, cond.ndim) else scale
    shape = tuple(scale.shape)
    if len(shape) == 1 and shape[0] in (1, cond.shape[0]):
        shape += (1,) * (cond.ndim - 1)
    if len(shape) not in (0, cond.ndim) or any(n not in (1, m) for n, m in zip(shape, cond.shape, strict=False)):
        raise SettingError(
            f"{name} has shape {given}, which does not fit predictions of shape {tuple(cond.shape)}. Pass a number, "
            f"one value per sample ({cond.shape[0]},) or per prompt, or a tensor of {cond.ndim} dimensions, each of "
            "them 1 or that of the prediction."
        )
    return scale.to(cond.device, torch.float32).reshape(shape)


def of_sample(name: str, scale: Scale, index: int, count: int) -> Scale:
    """Return the weight of one sample of a list, whose prediction has a dimension for the batch, of size 1.

    Args:
        name: what to call the weight in errors.
        scale: a number, or a tensor whose dimension 0 holds one value per sample, or per prompt.
        index: which sample.
        count: number of samples.

    Raises:
        SettingError: a tensor for another number of samples.
    """
    if not isinstance(scale, Tensor) or scale.ndim == 0 or scale.shape[0] == 1:
        return scale
    rows = _per_row(scale, count)
    if rows.shape[0] != count:
        raise SettingError(
            f"{name} has shape {tuple(scale.shape)}, which does not fit a list of {count} samples. Pass a number, or "
            f"one value per sample ({count},) or per prompt."
        )
    return rows[index : index + 1]


def _per_row(scale: Tensor, rows: int) -> Tensor:
    """Repeat one value per prompt for its samples, which are neighbours where pipelines make several of a prompt."""
    repeats, rest = divmod(rows, scale.shape[0]) if scale.shape[0] else (1, 0)
    return scale if rest or repeats <= 1 or scale.shape[0] == 1 else scale.repeat_interleave(repeats, dim=0)


def check_scale(name: str, value: object) -> None:
    """Raise unless `value` is a finite number or a tensor, whose values are not read: that would block the GPU."""
    if isinstance(value, Tensor):
        return
    if not is_real(value):
        raise SettingError(f"{name}={value!r}: expected a number, not {type(value).__name__}.{_as_number(name, value)}")
    if not math.isfinite(value):
        off = 1.0 if name == "guidance_scale" else 0.0
        raise SettingError(f"{name}={value!r}: expected a finite number. Use {name}={off} to switch it off.")


def check_scales(name: str, value: object) -> None:
    """Raise unless `value` is a scale, or scales by the names of predictions."""
    _check_each(name, value, lambda one: check_scale(name, one))


def check_rescales(value: object) -> None:
    """Raise unless `value` is a rescale, or holds some by the names of predictions."""
    _check_each("rescale", value, check_rescale)


def _check_each(name: str, value: object, check: Callable[[object], None]) -> None:
    if isinstance(value, Mapping):
        check_named(name, value)
    for one in value.values() if isinstance(value, Mapping) else [value]:
        check(one)


def check_rescale(value: object) -> None:
    """Raise unless `value` lies in [0, 1]."""
    if not is_real(value) or not 0.0 <= value <= 1.0:
        more = _as_number("rescale", value)
        raise SettingError(f"rescale={value!r}: expected a number from 0.0 (off) to 1.0 (full).{more}")


def _as_number(name: str, value: object) -> str:
    """Phrase the number that a string holds, as settings that were read from a file or a form do."""
    try:
        number = float(value) if isinstance(value, str) else math.nan
    except ValueError:
        return ""
    return f" Write {name}={number:g}." if math.isfinite(number) else ""
