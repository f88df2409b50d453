"""Guidance rules: how a prediction with the prompt, one without it, and skip guidance's terms become one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor

from stg_hooks.checks import is_real
from stg_hooks.errors import SettingError
from stg_hooks.guidance.apg import apg
from stg_hooks.guidance.frequencies import bands_of, joined, saliency
from stg_hooks.guidance.scales import AdaptiveScale, ZeroInit
from stg_hooks.guidance.vectors import dot, projected, total
from stg_hooks.names import named
from stg_hooks.step import Step

Rule = Callable[[Tensor, Tensor | None, Sequence[Tensor], "float | Tensor"], Tensor]
"""Takes cond, uncond (`None`: no CFG), the terms `scale_i * (cond - weak_i)` and guidance_scale, all in float32."""


def cfg(cond: Tensor, uncond: Tensor | None, terms: Sequence[Tensor], guidance_scale: float | Tensor) -> Tensor:
    """Combine as classifier-free guidance with skip guidance does: `u + g * (c - u) + sum_i t_i`.

    Args:
        cond: prediction with the prompt, `(B, ...)`.
        uncond: prediction without it, shape of `cond`; `None` for no CFG.
        terms: what skip guidance adds, one per branch, shape of `cond`.
        guidance_scale: CFG weight g.

    Returns:
        The guided prediction.

    Source: STG, arXiv 2411.18664, Eq. 6, 13 and 20.
    """
    return total(cond if uncond is None else uncond + guidance_scale * (cond - uncond), terms)


def zero_star(cond: Tensor, uncond: Tensor | None, terms: Sequence[Tensor], guidance_scale: float | Tensor) -> Tensor:
    """Scale the uncond prediction to fit cond best: `a u + g * (c - a u) + sum_i t_i`, `a = <c, u> / ||u||^2`.

    The product and the norm are taken per sample. For the zeroed first steps of the paper, see `zero_init`.

    Args:
        cond: as for `cfg`.
        uncond: as for `cfg`.
        terms: as for `cfg`.
        guidance_scale: as for `cfg`.

    Returns:
        The guided prediction.

    Source: CFG-Zero*, arXiv 2503.18886, sec. 4.1.
    """
    return cfg(cond, None if uncond is None else projected(cond, uncond), terms, guidance_scale)


def zero_init(steps: int = 1) -> ZeroInit:
    """Make a `schedule` that makes the prediction zero in the first steps, so that the sampler stays where it is.

    CFG-Zero* as diffusers' guider has it: `rule="zero_star", schedule=stg.rules.zero_init(1)`, in a file
    `"schedule": "zero_init(steps=1)"`. For models of flow matching, whose first predictions with CFG are worse than
    none.

    Args:
        steps: how many, from the first one.

    Returns:
        A function for `schedule=`.

    Raises:
        SettingError: a number below 0.

    Source: CFG-Zero*, arXiv 2503.18886, sec. 4.2.
    """
    return ZeroInit(steps)


def adaptive_scale(scale: float = 3.0, fall: float = 0.003) -> AdaptiveScale:
    """Make a `scale` that falls with the timestep t: `max(0, scale - fall * (1000 - t))`.

    In a file: `"scale": "adaptive_scale(scale=3.0, fall=0.003)"`.

    Args:
        scale: at the first step of a run.
        fall: how much less it is a timestep later, of 1000.

    Returns:
        A function for `scale=`.

    Raises:
        SettingError: a number below 0.

    Source: `pag_adaptive_scale` of diffusers' PAG pipelines.
    """
    return AdaptiveScale(scale, fall)


def tangential(cond: Tensor, uncond: Tensor | None, terms: Sequence[Tensor], guidance_scale: float | Tensor) -> Tensor:
    """Take from uncond only what lies along the direction that it has in common with cond.

    `u' + g * (c - u') + sum_i t_i`, where u' is the projection of u onto the first right singular vector of the two
    rows c and u; per sample. What is left out is the part of u that leads away from the data.

    Args:
        cond: as for `cfg`.
        uncond: as for `cfg`.
        terms: as for `cfg`.
        guidance_scale: as for `cfg`.

    Returns:
        The guided prediction.

    Source: tangential damping CFG (TCFG), arXiv 2503.18137, Alg. 1.
    """
    if uncond is None:
        return total(cond, terms)
    # Of two rows the singular vectors follow from their products: the matrix [[cc, cu], [cu, uu]].
    cc, cu, uu = dot(cond, cond), dot(cond, uncond), dot(uncond, uncond)
    angle = 0.5 * torch.atan2(2 * cu, cc - uu)
    common = angle.cos() * cond + angle.sin() * uncond
    return cfg(cond, projected(uncond, common), terms, guidance_scale)


def magnitude_aware(
    cond: Tensor,
    uncond: Tensor | None,
    terms: Sequence[Tensor],
    guidance_scale: float | Tensor,
    *,
    alpha: float = 8.0,
) -> Tensor:
    """Weaken CFG where cond and uncond are far apart, as in the first steps: `u + g' * (c - u) + sum_i t_i`.

    `g' = 1 + (g - 1) * exp(-alpha * ||c - u|| / ||u||)`, per sample. For another alpha:
    `rule="magnitude_aware(alpha=4.0)"`.

    Args:
        cond: as for `cfg`.
        uncond: as for `cfg`.
        terms: as for `cfg`.
        guidance_scale: as for `cfg`.
        alpha: how fast CFG falls with the ratio of the norms; 0 is `cfg`.

    Returns:
        The guided prediction.

    Source: MAMBO-G, arXiv 2508.03442.
    """
    if uncond is None:
        return total(cond, terms)
    d = cond - uncond
    square = dot(uncond, uncond)
    ratio = torch.where(square > 0, dot(d, d) / square, torch.inf).sqrt()
    weakened = 1 + (guidance_scale - 1) * torch.exp(-alpha * ratio)
    return cfg(cond, uncond, terms, weakened)


def at_step(rule: str | Rule, step: Step, output: int) -> str | Rule:
    """Return the rule of one call; most are the same in all."""
    found: str | Rule = rule.at(step, output) if remembers(rule) else rule  # type: ignore[union-attr]
    return found


def remembers(rule: object) -> bool:
    """Tell whether a rule remembers the steps of a run: it has `at(step, output)`, which gives the rule of one call."""
    return hasattr(rule, "at")


def frequency_decoupled(
    cond: Tensor,
    uncond: Tensor | None,
    terms: Sequence[Tensor],
    guidance_scale: float | Tensor,
    *,
    scales: tuple[float, ...] = (10.0, 5.0),
    parallel: float = 1.0,
) -> Tensor:
    """Guide each band of spatial frequencies with a CFG weight of its own: `u + sum_k g_k * (c - u)_k + sum_i t_i`.

    The bands are those of a Laplacian pyramid of each frame, from the highest frequencies to the lowest. The weights
    take the place of guidance_scale, which only has to be other than 1, so that there is CFG:
    `rule="frequency_decoupled(scales=(10, 5))"`. For predictions with rows and columns, `(B, ..., H, W)`.

    Args:
        cond: as for `cfg`; the paper takes predictions of the clean sample.
        uncond: as for `cfg`.
        terms: as for `cfg`.
        guidance_scale: as for `cfg`.
        scales: a weight for each band, as many as there are to be.
        parallel: how much is kept of the part of each band that is parallel to cond's, from 0 to 1.

    Returns:
        The guided prediction.

    Raises:
        SettingError: no weights, or more bands than the frames are large enough for.
        TargetError: predictions without rows and columns.

    Source: FDG, arXiv 2506.19713, Alg. 1 and 2.
    """
    if uncond is None:
        return total(cond, terms)
    weights: object = scales
    if not isinstance(weights, (tuple, list)) or not weights or not all(map(is_real, weights)):
        raise SettingError(f"frequency_decoupled: scales={scales!r}: expected a CFG weight for each band: (10.0, 5.0).")
    bands = zip(bands_of(cond - uncond, len(weights)), bands_of(cond, len(weights)), strict=True)
    kept = [d - (1 - parallel) * projected(d, c) if parallel != 1 else d for d, c in bands]
    return total(uncond + joined([weight * band for weight, band in zip(weights, kept, strict=True)]), terms)


def rescaled_terms(
    cond: Tensor,
    uncond: Tensor | None,
    terms: Sequence[Tensor],
    guidance_scale: float | Tensor,
    *,
    rescale: float = 0.7,
    partial: bool = False,
) -> Tensor:
    """Rescale what skip guidance adds, and not CFG: `p + f * T`, `f = rescale * std(c) / std(b + T) + 1 - rescale`.

    p is the prediction of `cfg` without terms, T the sum of the terms, and b is p, or with `partial` c; per sample.

    Args:
        cond: as for `cfg`; the source takes predictions of the clean sample.
        uncond: as for `cfg`.
        terms: as for `cfg`.
        guidance_scale: as for `cfg`.
        rescale: from 0 (off) to 1.
        partial: measure beside cond alone.

    Returns:
        The guided prediction.

    Source: `rescale` with `rescale_mode` full and partial of sd-perturbed-attention, commit 59be2a7.
    """
    plain = cfg(cond, uncond, (), guidance_scale)
    if not terms:
        return plain
    term, dims = total(torch.zeros_like(cond), terms), [*range(1, cond.ndim)] or None
    around = ((cond if partial else plain) + term).std(dims, keepdim=True)
    ratio = torch.where(around > 0, cond.std(dims, keepdim=True) / around, 1.0)
    return plain + (rescale * ratio + 1 - rescale) * term


def salient(cond: Tensor, uncond: Tensor | None, terms: Sequence[Tensor], guidance_scale: float | Tensor) -> Tensor:
    """Take in each place what stands out more, CFG's term or skip guidance's: `u + (g * (c - u) or sum_i t_i)`.

    What stands out is the larger of `softmax(blur(|term|))` over a frame and channel. Without CFG, as `cfg`.

    Args:
        cond: as for `cfg`; the source takes predictions of the clean sample.
        uncond: as for `cfg`.
        terms: as for `cfg`.
        guidance_scale: as for `cfg`.

    Returns:
        The guided prediction.

    Raises:
        TargetError: predictions without rows and columns.

    Source: saliency-adaptive noise fusion, arXiv 2311.10329; `rescale_mode` snf of sd-perturbed-attention.
    """
    if uncond is None or not terms:
        return cfg(cond, uncond, terms, guidance_scale)
    of_cfg, of_skips = guidance_scale * (cond - uncond), total(torch.zeros_like(cond), terms)
    return uncond + torch.where(saliency(of_skips) > saliency(of_cfg), of_skips, of_cfg)


def orthogonal(cond: Tensor, uncond: Tensor | None, terms: Sequence[Tensor], guidance_scale: float | Tensor) -> Tensor:
    """Combine as `cfg`, and count of every term only what no branch before it has contributed.

    `t_2 <- t_2 - <t_1, t_2> / ||t_1||^2 t_1`, per sample; so on for further branches. Scales do not change directions.

    Args:
        cond: as for `cfg`.
        uncond: as for `cfg`.
        terms: as for `cfg`; for factorised models the spatial and the temporal one.
        guidance_scale: as for `cfg`.

    Returns:
        The guided prediction.

    Source: STG, arXiv 2411.18664, Eq. 21.
    """
    done: list[Tensor] = []
    for term in terms:
        done.append(reduce(lambda rest, before: rest - projected(rest, before), done, term))
    return cfg(cond, uncond, done, guidance_scale)


RULES: dict[str, Rule] = {
    "cfg": cfg,
    "zero_star": zero_star,
    "apg": apg,
    "orthogonal": orthogonal,
    "tangential": tangential,
    "magnitude_aware": magnitude_aware,
    "frequency_decoupled": frequency_decoupled,
    "rescaled_terms": rescaled_terms,
    "salient": salient,
}


# What other tools call them.
_ELSEWHERE = dict.fromkeys(("cfg-zero", "cfg-zero*", "cfg-zero-star", "cfgzerostar"), "zero_star")
_ELSEWHERE |= {"adaptive-projected-guidance": "apg", "tcfg": "tangential", "fdg": "frequency_decoupled"}
_ELSEWHERE |= {"mambo-g": "magnitude_aware", "mambo": "magnitude_aware"}


def find_rule(rule: str | Rule) -> Rule:
    """Look up a rule by name; a callable is a rule already.

    Raises:
        SettingError: an unknown name, or neither a name nor a function.
    """
    return named("rule", rule, RULES, _ELSEWHERE)
