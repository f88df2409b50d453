"""How the weak prediction of a call is computed.

The textbook way: run the denoiser once more, on the cond rows, with the layers bypassed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from stg_hooks.calls import predictions, take_rows
from stg_hooks.errors import CallError
from stg_hooks.inspection import parameter_names
from stg_hooks.settings import Branch
from stg_hooks.skip import Switch


class _Local(threading.local):
    in_weak_pass = False


_LOCAL = _Local()


def in_weak_pass() -> bool:
    """Tell whether this thread is computing a weak prediction, which nobody is to guide again."""
    return _LOCAL.in_weak_pass


@contextmanager
def weak_pass() -> Iterator[None]:
    """Mark what happens inside the `with` as part of a weak prediction."""
    before, _LOCAL.in_weak_pass = _LOCAL.in_weak_pass, True
    try:
        yield
    finally:
        _LOCAL.in_weak_pass = before


class FullPass:
    """One full pass of the denoiser per branch, with the branch's layers bypassed."""

    def __init__(self, model: nn.Module, branches: Sequence[Branch]) -> None:
        """Resolve the layers of every branch; touch nothing.

        Args:
            model: the module that holds the layers.
            branches: what to skip, one weak prediction each.
        """
        self.switches = [Switch(model, branch.layers, branch.mode) for branch in branches]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Prepare the model's layers, without effect on plain calls; restore them at the end."""
        with ExitStack() as stack:
            for switch in self.switches:
                stack.enter_context(switch.installed())
            yield

    def weak_predictions(
        self, denoiser: Any, args: tuple[Any, ...], kwargs: dict[str, Any], cond: Sequence[Tensor], rows: slice
    ) -> list[list[Tensor]]:
        """Compute the weak predictions of a call.

        Args:
            denoiser: the callable whose call is being guided.
            args: positional arguments of the call.
            kwargs: keyword arguments of the call.
            cond: the call's own predictions on the same rows; they say what shapes to expect.
            rows: which rows of the call are conditional.

        Returns:
            For each branch, one weak prediction per prediction of the denoiser.

        Raises:
            CallError: the weak pass returned other shapes than the cond pass: rows were cut wrongly.
        """
        batch = cond[0].shape[0] if rows == slice(None) else 2 * cond[0].shape[0]
        if rows != slice(None):
            names = parameter_names(denoiser) if isinstance(denoiser, nn.Module) else []
            args, kwargs = take_rows(args, kwargs, names, batch, rows)
        results = []
        for switch in self.switches:
            with weak_pass(), switch.switched_on():
                weak = predictions(denoiser(*args, **kwargs))
            if [w.shape for w in weak] != [c.shape for c in cond]:
                raise CallError(
                    f"the weak pass of {type(denoiser).__name__} returned {[tuple(w.shape) for w in weak]} where the "
                    f"cond pass returned {[tuple(c.shape) for c in cond]}: the rows of its arguments could not be "
                    "told apart. Guide the calls with stg.Guider, which is given cond and uncond separately."
                )
            results.append(weak)
        return results
