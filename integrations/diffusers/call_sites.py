"""What a denoiser's call in a pipeline's code is for, and how its predictions are combined."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

from stg_hooks.integrations.diffusers.expressions import evaluate

# Names of cache contexts, and of the guiders' batches.
KINDS = {"cond": "cond", "pred_cond": "cond", "uncond": "uncond", "pred_uncond": "uncond", "cond_uncond": "both"}

Guards: TypeAlias = "tuple[ast.expr, ...]"


class UnreadableError(Exception):
    """A function's calls of its denoiser do not follow any known pattern; the message says which calls."""


@dataclasses.dataclass(frozen=True)
class Site:
    """A call of a denoiser in a function's code.

    `kind` says what it is for: `"cond"`, `"uncond"`, `"both"` (rows `[uncond, cond]`, while `guards` hold),
    `"samples"` (a list of samples, the first half of them cond and the second half uncond, while `guards` hold),
    `"perturbed"` (a weak prediction of the pipeline's own), or `"unused"`. Where the code names it at run time,
    `context` is that name. For a cond call, `guards` are the conditions under which the uncond call follows; `None` if
    none does. While `unless` holds, the prediction is guided in some way that is not understood. `channels` is how many
    channels of the prediction are guided, where the others predict a variance.
    """

    lines: range
    kind: str
    context: ast.expr | None = None
    guards: Guards | None = None
    combination: Combination | None = None
    unless: ast.expr | None = None
    channels: ast.expr | None = None

    def kind_now(self, names: Mapping[str, Any]) -> str:
        """Return what the call is for in the running function, whose variables are given."""
        return self.kind if self.context is None else KINDS.get(str(evaluate(self.context, names)), "perturbed")


@dataclasses.dataclass(frozen=True)
class Combination:
    """The expression that combines both predictions, and the assignments that may change its weight before it."""

    expression: ast.expr
    cond: str
    uncond: str
    guards: Guards
    changes: tuple[Guards, ...]
    is_named: bool = True

    def weight(self, names: Mapping[str, Any], sums: dict[int, float]) -> Any:
        """Return `g` of `uncond + g * (cond - uncond)`, or `None` if it is not known yet.

        Args:
            names: the variables of the running function.
            sums: keeps what the weights sum to. Of tensors that is looked at once only, as it waits for the GPU; what
                they sum to is a matter of the expression.

        Raises:
            UnreadableError: the running function combines them in another way.
        """
        try:
            other = next((guard for guard in self.guards if not evaluate(guard, names)), None)
            if other is not None:
                raise UnreadableError(f"it combines its predictions in another way, as {ast.unparse(other)} is false")
            if any(holds(guards, names) for guards in self.changes):
                return None
            g = evaluate(self.expression, {**names, self.cond: 1.0, self.uncond: 0.0})
            total = g + evaluate(self.expression, {**names, self.cond: 0.0, self.uncond: 1.0})
        except (LookupError, TypeError):
            return None
        found = sums.get(id(self)) if hasattr(total, "max") else None
        if found is None:
            found = next((value for value in (1.0, 0.0) if _is_near(total, value)), None)
            if found is None:
                raise UnreadableError(f"the weights in {ast.unparse(self.expression)} do not sum to one")
            sums[id(self)] = found
        if not self.is_named and isinstance(g, (int, float)) and g < 0:
            raise UnreadableError(f"{ast.unparse(self.expression)} has a negative weight: which is cond is not clear")
        return g if found else None  # 0: a difference, which is added to something


def _is_near(value: Any, wanted: float) -> bool:
    error = abs(value - wanted)
    return float(error.max() if hasattr(error, "max") else error) < 1e-4


def holds(guards: Guards, names: Mapping[str, Any]) -> bool:
    """Return whether all conditions are true in a running function."""
    return all(bool(evaluate(guard, names)) for guard in guards)
