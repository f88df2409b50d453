"""Adaptive projected guidance, alone and averaged over the steps of a run."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stg_hooks.checks import is_real
from stg_hooks.errors import CallError, SettingError
from stg_hooks.guidance.vectors import dot, projected, total
from stg_hooks.step import Step, check_once

if TYPE_CHECKING:
    from stg_hooks.guidance.rules import Rule


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
        return total(cond, terms)
    return _apg(cond, uncond, cond - uncond, terms, guidance_scale, eta, norm, norm_dim)


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
        if not is_real(momentum) or not -1 < momentum < 1:
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
            return total(cond, terms)
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
        length = dot(direction, direction, dims).sqrt()
        direction = direction * torch.where(length > norm, norm / length, 1.0)
    parallel = projected(direction, cond, dims)
    return total(uncond + guidance_scale * (direction - parallel + eta * parallel), terms)


def _dims(given: int | tuple[int, ...], cond: Tensor) -> list[int]:
    dims = [given] if isinstance(given, int) else [*given]
    if not dims or any(type(dim) is not int or not -cond.ndim <= dim < cond.ndim for dim in dims):
        raise SettingError(f"norm_dim={given!r}: expected dimensions of predictions of shape {tuple(cond.shape)}.")
    return dims
