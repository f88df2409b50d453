"""Measure what a guided step of a pipeline costs, as the pipeline is loaded."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

import stg_hooks as stg
from stg_hooks.cli.failures import FailureError


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to run the pipeline."""

    name: str
    seconds: tuple[float, ...]
    """Of each step but the first of a run, which often does more than the others."""
    peak: int | None
    """Bytes of accelerator memory in use at most; `None` on a CPU."""

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The middle half of the steps lies between them."""
        low, _, high = statistics.quantiles(self.seconds * 2 if len(self.seconds) == 1 else self.seconds, n=4)
        return low, high


def measure(
    pipe: Any,
    run: Callable[[Callable[..., dict[str, Any]]], object],
    guidance: Mapping[str, Any],
    rounds: int,
    progress: Callable[[str], object],
) -> list[Row]:
    """Time steps without guidance and with each execution of it, in turns.

    Args:
        pipe: the pipeline.
        run: runs it once, with what to call at the end of each step.
        guidance: layers, scale and mode, as for `apply`.
        rounds: how often each way has its turn, after one that does not count.
        progress: told what runs next.
    """
    device = torch.device(pipe._execution_device if hasattr(pipe, "_execution_device") else pipe.device)
    ways: dict[str, Callable[[], AbstractContextManager[Any]]] = {"plain": nullcontext}
    for execution in ("full", "sequential", "batched"):
        ways[execution] = lambda execution=execution: stg.apply(pipe, **guidance, execution=execution)  # type: ignore[misc]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, int] = {}
    for number in range(rounds + 1):
        for name, session in ways.items():
            progress(f"{name}, {f'round {number} of {rounds}' if number else 'warming up'}")
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            ends: list[float] = []

            def ended(*_: object, ends: list[float] = ends) -> dict[str, Any]:
                if device.type != "cpu":
                    getattr(torch, device.type).synchronize()
                ends.append(time.perf_counter())
                return {}

            with session():
                run(ended)
            if len(ends) < 2:
                raise FailureError(f"{type(pipe).__name__} made {len(ends)} steps: two are needed to time one.")
            if number:
                seconds[name] += [later - earlier for earlier, later in itertools.pairwise(ends)]
            if device.type == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated(device)
    return [Row(name, tuple(found), peaks.get(name)) for name, found in seconds.items()]
