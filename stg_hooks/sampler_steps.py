"""The step of a call, by the noise level that the samplers of k-diffusion pass."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stg_hooks.errors import CallError, SettingError
from stg_hooks.step import Step


def noise_levels(sigmas: Tensor | Sequence[float]) -> Tensor:
    """Return the noise levels of a run in float64 on the CPU; raise unless they go from high to low."""
    try:
        levels = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise SettingError(f"sigmas={sigmas!r}: expected noise levels from high to low, (N + 1,).") from error
    if levels.ndim != 1 or len(levels) < 2 or not bool((levels.diff() < 0).all()):
        raise SettingError(
            f"sigmas= has shape {tuple(levels.shape)}: expected the noise levels that are passed to the sampler, from "
            "high to low, (N + 1,)."
        )
    return levels


class SamplerSteps:
    """Finds the step of calls of `denoiser(x, sigma)`, as the samplers of k-diffusion make them."""

    def __init__(self, sigmas: Tensor | Sequence[float] | None) -> None:
        """Start a run.

        Args:
            sigmas: all noise levels of the run, from high to low, `(N + 1,)`, if they are known.

        Raises:
            SettingError: they do not go from high to low.
        """
        self._sigmas = None if sigmas is None else noise_levels(sigmas)
        self._reported: dict[str, Any] | None = None

    def of(self, sigma: object, is_needed: bool) -> Step | Callable[[], Step]:
        """Find out the step of a call, where it is made with a noise level.

        Looking synchronises with the GPU: where only the trace needs it, it is put off until the trace is read.

        Args:
            sigma: the noise level, a number or a tensor.
            is_needed: settings of this call depend on it.

        Raises:
            CallError: the noise level is 0.
        """
        if isinstance(sigma, numbers.Real):
            sigma = torch.tensor(float(sigma))
        if not isinstance(sigma, Tensor):
            return Step()
        first = sigma.detach().reshape(-1)[:1].clone()
        if not is_needed and first.device.type != "cpu":
            return functools.partial(self._at, first, self._reported)
        level = first.item()
        if not level > 0:
            raise CallError(f"called with sigma={level}: there is nothing to denoise. Samplers stop before.")
        if self._reported is not None and _is_new_run(level, self._reported):
            self._reported = None
        return self._at(first, self._reported)

    def callback(self, info: Mapping[str, Any]) -> None:
        """Take what a sampler reports once in each step."""
        if not {"i", "sigma"} <= info.keys():
            raise CallError(f"the sampler reported {sorted(info)}: expected i and sigma among them.")
        # Numbers stay on the device until a schedule needs them.
        self._reported = {name: info[name] for name in ("i", "sigma", "sigma_hat", "n_accept") if name in info}

    def _at(self, sigma: Tensor, reported: Mapping[str, Any] | None) -> Step:
        """Find out the step by the noise level, and by what the sampler has told its callback last."""
        level = sigma.item()
        if self._sigmas is not None:
            index, count = int((self._sigmas > level * (1 + 1e-5)).sum()), len(self._sigmas) - 1
            return Step(min(index, count - 1), count, level, "karras", of_sampler=True)
        if reported is None or _is_new_run(level, reported):
            return Step(0, None, level, "karras", of_sampler=True)
        # The adaptive solver reports at the end of a step, and says there how many it has accepted.
        moved = "n_accept" in reported or abs(level - _level(reported)) > 1e-5 * _level(reported)
        return Step(int(reported["i"]) + moved, None, level, "karras", of_sampler=True)


def _is_new_run(level: float, reported: Mapping[str, Any]) -> bool:
    """Tell whether a noise level lies before what a sampler has reported last."""
    # Churn raises a sampler's noise level by sqrt(2) at most: what lies higher is another run.
    return level > 1.5 * _level(reported)


def _level(reported: Mapping[str, Any]) -> float:
    return float(reported.get("sigma_hat", reported["sigma"]))
