"""Use the differences of an earlier step again: what `every` does."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from stg_hooks.errors import CallError
from stg_hooks.guidance.settings import Branch
from stg_hooks.step import Step, check_once


@dataclasses.dataclass
class Differences:
    """What `every` uses again: `cond - weak` of an earlier step."""

    differences: list[list[Tensor]]
    branches: tuple[Branch, ...]
    step: Step
    last: Step
    """Of the call that was made last, guided or not."""
    used: int = 1
    is_over: bool = False
    """Another run has begun."""

    @classmethod
    def of(
        cls, conds: Sequence[Tensor], weaks: Sequence[Sequence[Tensor]], branches: tuple[Branch, ...], step: Step
    ) -> Differences:
        """Keep the differences of a step; gradients do not pass from step to step."""
        found = [[(c - weak).detach() for weak in of_one] for c, of_one in zip(conds, weaks, strict=True)]
        return cls(found, branches, step, step)

    def weaks(self, conds: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return, for each prediction, weak ones that differ from it as they did then.

        Raises:
            CallError: predictions of another shape.
        """
        shapes = [[tuple(c.shape)] * len(self.branches) for c in conds]
        then = [[tuple(difference.shape) for difference in found] for found in self.differences]
        if shapes != then:
            raise CallError(
                f"every= would use differences of step {self.step.index} again, of the shapes {then}, in a call that "
                f"predicts {shapes}. Give each size a stg.Guider or stg.apply of its own, or use every=1."
            )
        self.used += 1
        return [[c - difference for difference in found] for c, found in zip(conds, self.differences, strict=True)]

    def serves(self, call_of: Step, branches: tuple[Branch, ...], every: int) -> bool:
        """Tell whether it may be used again in a call; ask in every call, also in those without guidance.

        Raises:
            CallError: it is the second guided call of one step.
        """
        before, self.last = self.last, call_of
        if branches:
            check_once(call_of, before, f"every={every}")
        if call_of.index is None or before.index is None or self.step.index is None:
            return False
        self.is_over = self.is_over or (call_of.index < before.index and not call_of.of_sampler)
        is_later = call_of.index > self.step.index
        is_same = [branch.key for branch in branches] == [branch.key for branch in self.branches]
        return not self.is_over and is_later and self.used < every and is_same
