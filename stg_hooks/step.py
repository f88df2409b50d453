"""Where in a run a call is made."""

from __future__ import annotations

import dataclasses

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
