"""The guidance formula: tensors in, tensor out; it holds no modules and no state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from stg_hooks.checks import is_real
from stg_hooks.errors import SettingError, TargetError
from stg_hooks.guidance.per_output import PerOutput, check_named, each_of
from stg_hooks.guidance.rules import Rule, find_rule

Scale = float | Tensor
Scales = PerOutput[Scale]
"""A scale for all predictions of a call, or one for each of several, such as video and audio."""


def combine(
    cond: Tensor,
    weak: Tensor | Sequence[Tensor],
    uncond: Tensor | None = None,
    *,
    scale: Scale | Sequence[Scale] = 1.0,
    guidance_scale: Scale = 1.0,
    rescale: float = 0.0,
    rule: str | Rule = "cfg",
) -> Tensor:
    """Combine predictions into the guided one.

    `out = uncond + guidance_scale * (cond - uncond) + sum_i scale_i * (cond - weak_i)`, then
    `out *= rescale * std(cond) / std(out) + (1 - rescale)`, the standard deviation taken per sample.
    Without `uncond`: `out = cond + sum_i scale_i * (cond - weak_i)`. Computed in float32.

    Args:
        cond: prediction with the prompt, `(B, ...)`.
        weak: prediction of the weak model with the prompt, shape of `cond`; or one per branch.
        uncond: prediction without the prompt, shape of `cond`.
        scale: weight of `cond - weak`; one for all branches, or one per branch. At 0 `weak` is ignored. A
            tensor holds one value per sample, `(B,)`, or has the dimensions of `cond` (a value per frame, say); with
            fewer values, of which B is a multiple, one per prompt, whose samples are neighbours.
        guidance_scale: CFG weight, 1 = off: then `uncond` is ignored. A tensor as for `scale`.
        rescale: 0 = off, 1 = the result has the standard deviation of `cond`.
        rule: how they become one before `rescale`: `"cfg"` as above, another rule of `stg.rules` by its name; or a
            function of `(cond, uncond, terms, guidance_scale)` in float32, where `terms` are the
            `scale_i * (cond - weak_i)` and `uncond` is `None` where CFG is off.

    Returns:
        The guided prediction in the shape and dtype of `cond`.

    Raises:
        SettingError: a scale that is not finite or does not fit the predictions, `rescale` outside [0, 1], or unequal
            numbers of branches and scales, or an unknown rule.
        TargetError: predictions that are no tensors or differ in shape; or a rule that returns no such tensor.

    Source: STG, arXiv 2411.18664, Eq. 13 and 20 and Alg. 4; rescale after arXiv 2305.08891, sec. 3.4.
    """
    if hasattr(weak, "sample") or not isinstance(weak, Iterable):
        raise _not_a_tensor("weak", weak)
    weaks = [weak] if isinstance(weak, Tensor) else list(weak)
    scales = list(scale) if isinstance(scale, Sequence) else [scale] * len(weaks)
    if len(scales) != len(weaks):
        raise SettingError(f"{len(weaks)} weak predictions but {len(scales)} scales: give one, or one per branch.")
    for name, value in [("guidance_scale", guidance_scale), *(("scale", s) for s in scales)]:
        check_scale(name, value)
    check_rescale(rescale)
    for name, tensor in [("cond", cond), ("uncond", uncond), *(("weak", w) for w in weaks)]:
        if tensor is None and name == "uncond":
            continue
        if not isinstance(tensor, Tensor):
            raise _not_a_tensor(name, tensor)
        if tensor.shape != cond.shape:
            raise TargetError(f"{name} has shape {tuple(tensor.shape)}, but cond has {tuple(cond.shape)}.")

    c, g = cond.float(), fitted("guidance_scale", guidance_scale, cond)
    u = None if uncond is None or is_number(guidance_scale, 1) else uncond.float()
    out: object = find_rule(rule)(c, u, terms(c, weaks, scales), g)
    if not isinstance(out, Tensor) or out.shape != c.shape:
        what = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
        name = getattr(rule, "__name__", None) or repr(rule)
        raise TargetError(f"rule={name} returned {what}: expected a tensor of the shape of cond, {tuple(c.shape)}.")
    if rescale:
        out = out * _std_factor(c, out, float(rescale))
    return out.to(cond.dtype, copy=out is cond or out is uncond)


def terms(cond: Tensor, weaks: Sequence[Tensor], scales: Sequence[Scale]) -> list[Tensor]:
    """Compute what each branch adds to a prediction: `scale_i * (cond - weak_i)`, in float32.

    Args:
        cond: prediction with the prompt, `(B, ...)`.
        weaks: one prediction of the weak model per branch, shape of `cond`.
        scales: one weight per branch, as for `combine`.

    Returns:
        The terms in float32, shape of `cond`; none for a branch that is switched off.

    Raises:
        SettingError: a scale that does not fit the predictions.
    """
    c = cond.float()
    found = []
    for scale, weak in zip(scales, weaks, strict=True):
        if is_number(scale, 0):  # not even NaN counts
            continue
        s = fitted("scale", scale, c)
        term = s * (c - weak.float())
        found.append(torch.where(s == 0, 0.0, term) if isinstance(s, Tensor) else term)
    return found


def _not_a_tensor(name: str, value: object) -> TargetError:
    tensor = "a tensor, or a list of them" if name == "weak" else "a tensor"
    hint = f" Pass {name}.sample." if hasattr(value, "sample") else ""
    return TargetError(f"{name} must be {tensor}, not {type(value).__name__}.{hint}")


def correction(cond: Tensor, weaks: Sequence[Tensor], scales: Sequence[Scale]) -> Tensor:
    """Compute what skip guidance adds to a prediction in all: `sum_i scale_i * (cond - weak_i)`, in float32.

    Args:
        cond: as for `terms`.
        weaks: as for `terms`.
        scales: as for `terms`.

    Returns:
        The sum in float32, shape of `cond`.

    Raises:
        SettingError: a scale that does not fit the predictions.
    """
    return sum(terms(cond, weaks, scales), torch.zeros_like(cond, dtype=torch.float32))


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


def _std_factor(cond: Tensor, out: Tensor, rescale: float) -> Tensor:
    dims = list(range(1, cond.ndim)) or None
    std_out = out.std(dim=dims, keepdim=True)
    # A constant prediction has nothing to rescale: 0 / 0 would turn it into NaN.
    ratio = torch.where(std_out > 0, cond.std(dim=dims, keepdim=True) / std_out, torch.ones_like(std_out))
    return rescale * ratio + (1.0 - rescale)


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
