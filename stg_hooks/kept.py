"""Differences of an evaluation that later steps use again: `every`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from stg_hooks.settings import Branch
from stg_hooks.step import Step


@dataclasses.dataclass
class Kept:
    """What an evaluation leaves for the steps that use it again (`every`)."""

    differences: list[list[Tensor]]
    branches: tuple[Branch, ...]
    index: int | None
    used: int = 1

    @classmethod
    def after(
        cls, conds: Sequence[Tensor], weaks: Sequence[Sequence[Tensor]], branches: tuple[Branch, ...], step: Step
    ) -> Kept:
        """Keep the differences of an evaluation."""
        found = [[c - weak for weak in of_one] for c, of_one in zip(conds, weaks, strict=True)]
        return cls(found, branches, step.index)

    def weaks(self, conds: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return, for each prediction, weak ones that differ from it as they did then."""
        self.used += 1
        return [[c - difference for difference in found] for c, found in zip(conds, self.differences, strict=True)]

    def serves(self, call_of: Step, branches: tuple[Branch, ...], every: int) -> bool:
        """Tell whether it may be used again in a call."""
        again = self.index is None or call_of.index is None or call_of.index > self.index
        same = [(b.layers, b.mode, b.kind) for b in branches] == [(b.layers, b.mode, b.kind) for b in self.branches]
        return self.used < every and again and same
