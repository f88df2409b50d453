"""What guidance did: counts, and for each step how large its term was and where it pointed."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from typing import overload

import torch
from torch import Tensor

from stg_hooks.guidance.scale_values import Scales
from stg_hooks.step import Step


@dataclasses.dataclass
class Stats:
    """What has happened so far to calls that are guided."""

    calls: int = 0
    """Calls of the denoiser that the target made."""
    guided_calls: int = 0
    """Those to which a guidance term was added."""
    weak_passes: int = 0
    """Weak predictions that were computed, one per guided call and branch."""
    blocks_run: int = 0
    """Numbered layers that were computed for weak predictions."""
    blocks_saved: int = 0
    """Numbered layers that were not: skipped, or shared with the cond pass."""
    seconds: float = 0.0
    """Time spent on guidance after the cond pass has returned; on a GPU, the time to launch it."""


@dataclasses.dataclass(frozen=True)
class TraceRow:
    """One guided call. What is on the device stays there until it is read."""

    _step: Step | Callable[[], Step]
    scales: tuple[Scales, ...]
    _size: Tensor
    _cosine: Tensor | None

    @property
    def step(self) -> Step:
        """Where in the run it was made."""
        return self._step if isinstance(self._step, Step) else self._step()

    @property
    def size(self) -> float:
        """The guidance term relative to the prediction, `||sum_i scale_i * (cond - weak_i)|| / ||cond||`."""
        return self._size.item()

    @property
    def cosine(self) -> float | None:
        """Its cosine with the CFG direction `cond - uncond`; `None` without CFG."""
        return None if self._cosine is None else self._cosine.item()


class Trace(Sequence[TraceRow]):
    """What guidance did, call by call; the last `LENGTH` guided calls are kept."""

    LENGTH = 10_000

    def __init__(self) -> None:
        """Start empty."""
        self._rows: deque[TraceRow] = deque(maxlen=self.LENGTH)

    def __len__(self) -> int:
        """Count the guided calls that are kept."""
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> TraceRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[TraceRow]: ...
    def __getitem__(self, index: int | slice) -> TraceRow | list[TraceRow]:
        """Return a row, or several."""
        return list(self._rows)[index] if isinstance(index, slice) else self._rows[index]

    def add(
        self,
        step: Step | Callable[[], Step],
        scales: Sequence[Scales],
        terms: Sequence[Tensor],
        conds: Sequence[Tensor],
        unconds: Sequence[Tensor | None],
    ) -> None:
        """Measure a guided call; nothing is brought to the CPU yet.

        Args:
            step: where in the run it was made, or a function that finds out.
            scales: one per branch.
            terms: what skip guidance adds, one per prediction.
            conds: the predictions with the prompt.
            unconds: those without it, or `None`.
        """
        term, cond = _flat(terms), _flat(conds)
        known = [uncond for uncond in unconds if uncond is not None]
        cosine = None
        if len(known) == len(conds):
            cosine = torch.nn.functional.cosine_similarity(term, cond - _flat(known), dim=0)
        self._rows.append(TraceRow(step, tuple(scales), term.norm() / cond.norm(), cosine))


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    parts = [tensor.detach().float().flatten() for tensor in tensors]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
