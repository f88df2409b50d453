"""The guidance formula: tensors in, tensor out; it holds no modules and no state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from stg_hooks.errors import SettingError, TargetError
from stg_hooks.guidance.rules import Rule, find_rule
from stg_hooks.guidance.scale_values import Scale, check_rescale, check_scale, fitted, is_number


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


def _std_factor(cond: Tensor, out: Tensor, rescale: float) -> Tensor:
    dims = list(range(1, cond.ndim)) or None
    std_out = out.std(dim=dims, keepdim=True)
    # A constant prediction has nothing to rescale: 0 / 0 would turn it into NaN.
    ratio = torch.where(std_out > 0, cond.std(dim=dims, keepdim=True) / std_out, torch.ones_like(std_out))
    return rescale * ratio + (1.0 - rescale)
