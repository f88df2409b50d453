"""Guidance rules: how a prediction with the prompt, one without it, and skip guidance's terms become one."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor

from stg_hooks.errors import CallError, SettingError
from stg_hooks.guidance.frequencies import bands_of, joined, saliency
from stg_hooks.guidance.scales import AdaptiveScale, ZeroInit
from stg_hooks.names import named
from stg_hooks.step import Step, check_once

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
    return _sum(cond if uncond is None else uncond + guidance_scale * (cond - uncond), terms)


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
    return cfg(cond, None if uncond is None else _projected(cond, uncond), terms, guidance_scale)


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


def apg(
    cond: Tensor,
    uncond: Tensor | None,
    terms: Sequence[Tensor],
    guidance_scale: float | Tensor,
    *,
    eta: float = 0.0,
    norm: float | None = None,
    norm_dim: int | tuple[int, ...] | None = None,
) -> Tensor:
    """Weaken the part of the CFG direction that is parallel to cond, which oversaturates.

    `u + g * (d_orthogonal + eta * d_parallel) + sum_i t_i`, where `d = c - u`, shortened to the length `norm` if it is
    longer, and d_parallel is its projection onto c; per sample. With eta 1 and no `norm` this is `cfg`. For other
    values than the defaults: `rule="apg(eta=0.5, norm=15.0)"`.

    Args:
        cond: as for `cfg`; the paper takes predictions of the clean sample.
        uncond: as for `cfg`.
        terms: as for `cfg`.
        guidance_scale: as for `cfg`.
        eta: how much of the parallel part is kept, from 0 to 1.
        norm: greatest length of the direction per sample; `None` for any.
        norm_dim: over which dimensions lengths and projections are taken, as `(-1, -2)`: of each frame and channel
            apart; left out, over all of a sample.

    Returns:
        The guided prediction.

    Source: APG, arXiv 2410.02416, Alg. 1, without its momentum (see `AveragedApg`), on top of u as diffusers has it
    (the paper: c, g - 1).
    """
    if uncond is None:
        return _sum(cond, terms)
    return _apg(cond, uncond, cond - uncond, terms, guidance_scale, eta, norm, norm_dim)


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
        return _sum(cond, terms)
    # Of two rows the singular vectors follow from their products: the matrix [[cc, cu], [cu, uu]].
    cc, cu, uu = _dot(cond, cond), _dot(cond, uncond), _dot(uncond, uncond)
    angle = 0.5 * torch.atan2(2 * cu, cc - uu)
    common = angle.cos() * cond + angle.sin() * uncond
    return cfg(cond, _projected(uncond, common), terms, guidance_scale)


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
        return _sum(cond, terms)
    d = cond - uncond
    square = _dot(uncond, uncond)
    ratio = torch.where(square > 0, _dot(d, d) / square, torch.inf).sqrt()
    weakened = 1 + (guidance_scale - 1) * torch.exp(-alpha * ratio)
    return cfg(cond, uncond, terms, weakened)


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.averages: dict[tuple[int, torch.Size], tuple[Step, Tensor]] = {}
        """By output and shape: the step in which it was formed, and the average."""


class AveragedApg:
    """`apg` with the paper's momentum: the direction is a running average, `d <- (c - u) + momentum * d_before`.

    It remembers d from step to step, which a function cannot do: pass an object of this class as `rule=` to `apply` or
    `Guider`, one for each of them. The average starts with a run: at step 0, or where steps start again. A second call
    in one step, as of windows that are predicted apart, is an error where it has the shape of the first.
    """

    def __init__(
        self,
        momentum: float = -0.5,
        eta: float = 0.0,
        norm: float | None = None,
        norm_dim: int | tuple[int, ...] | None = None,
    ) -> None:
        """Choose the weights.

        Args:
            momentum: how much of the average before is added; below 0 takes it away, as the paper recommends.
            eta: as for `apg`.
            norm: as for `apg`.
            norm_dim: as for `apg`.

        Raises:
            SettingError: the momentum is not a number between -1 and 1.

        Source: APG, arXiv 2410.02416, Alg. 1.
        """
        if type(momentum) not in (int, float) or not -1 < momentum < 1:
            raise SettingError(f"momentum={momentum!r}: expected a number between -1 and 1.")
        self.momentum, self.eta, self.norm, self.norm_dim = momentum, eta, norm, norm_dim
        self._local = _OfThread()

    def __call__(
        self, cond: Tensor, uncond: Tensor | None, terms: Sequence[Tensor], guidance_scale: float | Tensor
    ) -> Tensor:
        """Refuse: a call alone belongs to no run."""
        raise SettingError(
            "AveragedApg remembers the steps of a run, of which stg.combine knows nothing. Use rule='apg', or pass the "
            "rule to stg.apply or stg.Guider."
        )

    def at(self, step: Step, output: int) -> Rule:
        """Return the rule of one call.

        Args:
            step: where in the run it is made.
            output: which of the model's predictions is combined.

        Raises:
            CallError: the index of the step is not known.
        """
        if step.index is None:
            raise CallError(
                "AveragedApg starts with a run, but the step's index is not known here. In a loop of your own, set it "
                "before each step: guider.step = stg.Step(index=i, count=n), or, within `with stg.apply(...) as "
                "applied`, applied.step = stg.Step(...). For a sampler that calls denoiser(x, sigma): "
                "stg.Guider(..., sigmas=sigmas), or its callback."
            )
        return functools.partial(self._combine, step, output)

    def _combine(
        self,
        step: Step,
        output: int,
        cond: Tensor,
        uncond: Tensor | None,
        terms: Sequence[Tensor],
        guidance_scale: float | Tensor,
    ) -> Tensor:
        if uncond is None:
            return _sum(cond, terms)
        assert step.index is not None
        averages = self._local.averages
        if step.index == 0:  # those of runs before
            for key in [key for key, (last, _) in averages.items() if last.index]:
                del averages[key]
        direction = cond - uncond
        last, before = averages.get((output, cond.shape), (step, None))
        if before is not None and last.index is not None and 0 < step.index >= last.index:
            check_once(step, last, "AveragedApg")
            direction = direction + self.momentum * before.to(direction.device)
        averages[output, cond.shape] = step, direction.detach()
        return _apg(cond, uncond, direction, terms, guidance_scale, self.eta, self.norm, self.norm_dim)


def at_step(rule: str | Rule, step: Step, output: int) -> str | Rule:
    """Return the rule of one call; most are the same in all."""
    return rule.at(step, output) if isinstance(rule, AveragedApg) else rule


def _apg(
    cond: Tensor,
    uncond: Tensor,
    direction: Tensor,
    terms: Sequence[Tensor],
    guidance_scale: float | Tensor,
    eta: float,
    norm: float | None,
    norm_dim: int | tuple[int, ...] | None,
) -> Tensor:
    dims = None if norm_dim is None else _dims(norm_dim, cond)
    if norm is not None:
        length = _dot(direction, direction, dims).sqrt()
        direction = direction * torch.where(length > norm, norm / length, 1.0)
    parallel = _projected(direction, cond, dims)
    return _sum(uncond + guidance_scale * (direction - parallel + eta * parallel), terms)


def _dims(given: int | tuple[int, ...], cond: Tensor) -> list[int]:
    dims = [given] if isinstance(given, int) else [*given]
    if not dims or any(type(dim) is not int or not -cond.ndim <= dim < cond.ndim for dim in dims):
        raise SettingError(f"norm_dim={given!r}: expected dimensions of predictions of shape {tuple(cond.shape)}.")
    return dims


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
        return _sum(cond, terms)
    weights: object = scales  # whatever was typed
    if (
        not isinstance(weights, (tuple, list))
        or not weights
        or not all(type(weight) in (int, float) for weight in weights)
    ):
        raise SettingError(f"frequency_decoupled: scales={scales!r}: expected a CFG weight for each band: (10.0, 5.0).")
    bands = zip(bands_of(cond - uncond, len(weights)), bands_of(cond, len(weights)), strict=True)
    kept = [d - (1 - parallel) * _projected(d, c) if parallel != 1 else d for d, c in bands]
    return _sum(uncond + joined([weight * band for weight, band in zip(weights, kept, strict=True)]), terms)


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
    term, dims = _sum(torch.zeros_like(cond), terms), [*range(1, cond.ndim)] or None
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
    of_cfg, of_skips = guidance_scale * (cond - uncond), _sum(torch.zeros_like(cond), terms)
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
        done.append(reduce(lambda rest, before: rest - _projected(rest, before), done, term))
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


def find_rule(rule: str | Rule) -> Rule:
    """Look up a rule by name; a callable is a rule already.

    Raises:
        SettingError: an unknown name, or neither a name nor a function.
    """
    return named("rule", rule, RULES)


def _sum(base: Tensor, terms: Sequence[Tensor]) -> Tensor:
    return base + reduce(torch.add, terms) if terms else base


def _dot(one: Tensor, other: Tensor, dims: list[int] | None = None) -> Tensor:
    """Multiply sample by sample, `(B, 1, ...)`; in float64, as latents of a video have millions of entries."""
    product = one.double() if one.device.type != "mps" else one
    return (product * other).sum(dim=dims or list(range(1, one.ndim)) or None, keepdim=True).to(one.dtype)


def _projected(vector: Tensor, onto: Tensor, dims: list[int] | None = None) -> Tensor:
    """Project sample by sample; onto zero, there is nothing to project."""
    square = _dot(onto, onto, dims)
    return torch.where(square > 0, _dot(vector, onto, dims) / square, 0.0) * onto
