"""State that all passes of one denoiser share."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from stg_hooks.errors import CallError
from stg_hooks.model.source import parameter_names
from stg_hooks.model.tensors import computes_in_half
from stg_hooks.passes.findings import Findings
from stg_hooks.passes.returned import agree
from stg_hooks.passes.rows import take_rows

if TYPE_CHECKING:
    from stg_hooks.guidance.trace import Stats
    from stg_hooks.modes.switch import Switch
    from stg_hooks.passes.caches import Caches
    from stg_hooks.passes.guided_call import GuidedCall
    from stg_hooks.passes.transaction import Transactions
    from stg_hooks.passes.units import Units
    from stg_hooks.passes.ways import Ways

# What a call may raise because its rows were cut wrongly: these types themselves, not what derives from them.
_SUSPECTS = (RuntimeError, IndexError, TypeError, ValueError)


def may_come_of_cutting(error: BaseException) -> bool:
    """Tell whether an error may come of rows that were cut wrongly; if not, a pass on all rows raises it as well."""
    return type(error) in _SUSPECTS


@dataclasses.dataclass(eq=False)
class Context:
    """State that all passes of one denoiser share."""

    model: nn.Module
    switches: Sequence[Switch]
    """The branches."""
    units: Units
    ways: Ways
    caches: Caches
    stats: Stats
    transactions: Transactions
    found: Findings = dataclasses.field(default_factory=Findings)
    """What checks have found out."""
    recorded: Counter[Hashable] = dataclasses.field(default_factory=Counter)
    """How often a layout had to be recorded."""

    def __post_init__(self) -> None:
        """Look at the names of the denoiser's parameters."""
        self.names = parameter_names(self.model)

    def agree(self, found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
        """Tell whether predictions are the same, up to the rounding of the model's type."""
        return agree(found, expected, computes_in_half(self.model))

    def cond_arguments(self, call: GuidedCall) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a call for its cond rows, to write into."""
        args, kwargs = call.inputs.again()
        if call.rows is None:
            return args, kwargs
        if call.weak_call is not None:
            return _pair(call.weak_call(args, kwargs))
        batch = call.rows.batch_of(call.count)
        return take_rows(args, kwargs, self.names, batch, call.rows.of(batch))

    def count(self, branch: int, not_run: Iterable[int]) -> None:
        """Count a weak pass in which these units did not run, nor the branch's skipped layers."""
        run, saved = self.units.blocks_run(self.switches[branch], not_run)
        self.stats.weak_passes += 1
        self.stats.blocks_saved += saved
        self.stats.blocks_run += run

    def stats_so_far(self) -> Stats:
        """Return what has been counted so far, for `restore_stats`."""
        return dataclasses.replace(self.stats)

    def restore_stats(self, before: Stats) -> None:
        """Forget what was counted since."""
        vars(self.stats).update(vars(before))


def _pair(found: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what `weak_call` gave.

    Raises:
        CallError: that is not arguments of a call.
    """
    if not isinstance(found, tuple) or [type(part) for part in found] != [tuple, dict]:
        raise CallError(
            f"weak_call= returned {type(found).__name__}: expected the arguments of the cond rows, a tuple and a "
            "dictionary: return (args, kwargs)."
        )
    return found
