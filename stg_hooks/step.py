"""Where in a run a call is made."""

from __future__ import annotations

import dataclasses
import functools
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stg_hooks.errors import CallError, SettingError


@dataclasses.dataclass(frozen=True)
class Step:
    """Where in a run a call is made; what is not known is `None`.

    `index` counts steps from 0, out of `count`. `sigma` is the noise level: the standard deviation of the noise in
    units of the data in a `"karras"` schedule (k-diffusion, Euler, DPM-Solver) and in a `"ddpm"` one, where it is
    `sqrt((1 - abar) / abar)`; the share of noise in the mixture, from 0 to 1, in a `"flow"` schedule
    (`timestep / 1000`). `kind` says which of them it is.
    """

    index: int | None = None
    count: int | None = None
    sigma: float | None = None
    kind: str | None = None
    timestep: float | None = None
    """What a pipeline passes to its denoiser: from 1000 at pure noise to 0, mostly."""
    of_sampler: bool = dataclasses.field(default=False, repr=False, compare=False)
    """It was told by the noise level that a sampler passes, which may evaluate a step more than once (Heun's)."""

    @property
    def fraction(self) -> float | None:
        """How much of the run lies behind: 0 at the first step, below 1 at the last one."""
        return None if self.index is None or not self.count else self.index / self.count


def check_step(step: Step | None) -> Step | None:
    """Raise unless what was set as the step is one, or `None`."""
    if step is None:
        return None
    if not isinstance(step, Step):
        raise SettingError(f"step={step!r}: expected stg.Step(index=i, count=n, sigma=...).")
    if step.index is not None and (step.index < 0 or (step.count is not None and step.index >= step.count)):
        raise SettingError(f"step={step!r}: steps count from 0 to count - 1.")
    return step


def check_once(step: Step, before: Step, what: str) -> None:
    """Raise if two calls with the prompt are of one step: windows or prompts, which memory of a run would mix up.

    At step 0 a new run begins, for all that is known. Different noise levels tell the evaluations of a solver apart.

    Args:
        step: of the call.
        before: of the call before it.
        what: remembers something from step to step, for the message.

    Raises:
        CallError: they cannot be told apart.
    """
    if step.index and (step.index, step.sigma) == (before.index, before.sigma) and not step.of_sampler:
        raise CallError(
            f"{what} remembers one call with the prompt per step, and this is the second one at step {step.index}. For "
            "windows, tiles or prompts that are predicted apart, give each of them a stg.Guider (and a rule object) of "
            "its own, or do without. Where a solver evaluates a step twice, say at which noise level: "
            "stg.Step(index=i, count=n, sigma=...)."
        )


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
            SettingError: they are none.
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
