"""Where in a run a call is made."""

from __future__ import annotations

import dataclasses


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

    @property
    def fraction(self) -> float | None:
        """How much of the run lies behind: 0 at the first step, below 1 at the last one."""
        return None if self.index is None or not self.count else self.index / self.count
