"""Where in a run a scheduler of diffusers is."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from stg_hooks.step import Step


class SchedulerSteps:
    """Tells steps by a scheduler's tensors, which it reads once in a run: on a GPU, each reading waits for it."""

    def __init__(self) -> None:
        """Start with nothing read."""
        self._read: dict[str, tuple[Tensor, list[float]]] = {}

    def at(self, scheduler: Any, timesteps: Any, index: Any, count: Any, timestep: Any) -> Step:
        """Return a step.

        Args:
            scheduler: of the pipeline.
            timesteps: of the run, one for each step.
            index: of the step, from 0.
            count: of all steps.
            timestep: what the step calls it, where `timesteps` does not say.

        Returns:
            The step; nothing is known where it has no index.
        """
        if not isinstance(index, int) or count is None:
            return Step()
        at = self._values("timesteps", timesteps)[index] if isinstance(timesteps, Tensor) else None
        level = self._noise_level(scheduler, index, timestep if at is None else at)
        return Step(index, int(count), *level, at)

    def _noise_level(self, scheduler: Any, index: int, timestep: Any) -> tuple[float | None, str | None]:
        """Return the noise level of a step, and in which units: see `Step`."""
        config = getattr(scheduler, "config", {})
        sigmas = getattr(scheduler, "sigmas", None)
        index += getattr(scheduler, "begin_index", None) or 0
        flow = "FlowMatch" in type(scheduler).__name__ or config.get("prediction_type") == "flow_prediction"
        if isinstance(sigmas, Tensor) and index < len(sigmas):
            sigma = self._values("sigmas", sigmas)[index]
            return (1.0 - sigma if flow and config.get("invert_sigmas") else sigma), "flow" if flow else "karras"
        alphas = getattr(scheduler, "alphas_cumprod", None)
        if flow or alphas is None or timestep is None:
            return None, None
        alpha = self._values("alphas_cumprod", alphas)[int(timestep)]
        return math.sqrt((1.0 - alpha) / alpha) if alpha > 0 else math.inf, "ddpm"

    def _values(self, name: str, values: Tensor) -> list[float]:
        found = self._read.get(name)
        if found is None or found[0] is not values:
            self._read[name] = found = values, values.tolist()
        return found[1]
