"""One call that is being guided."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from stg_hooks.passes.effects import Randomness
from stg_hooks.passes.inputs import Inputs
from stg_hooks.passes.rows import Rows, leaves_of

if TYPE_CHECKING:
    from stg_hooks.passes.prefix import Prefix
    from stg_hooks.passes.state import Snapshot


class _Local(threading.local):
    in_weak_pass = False
    is_checking = False


_LOCAL = _Local()


def in_weak_pass() -> bool:
    """Tell whether this thread is computing a weak prediction, which must not be guided again."""
    return _LOCAL.in_weak_pass


@contextmanager
def weak_pass() -> Iterator[None]:
    """Mark the calls of this thread as not to be guided, within a `with`."""
    before, _LOCAL.in_weak_pass = _LOCAL.in_weak_pass, True
    try:
        yield
    finally:
        _LOCAL.in_weak_pass = before


def is_checking() -> bool:
    """Tell whether this thread's pass is made once only, to find out whether weak passes give what they should."""
    return _LOCAL.is_checking


@contextmanager
def checking() -> Iterator[None]:
    """Mark a pass that belongs to no branch, within a `with`."""
    before, _LOCAL.is_checking = _LOCAL.is_checking, True
    try:
        yield
    finally:
        _LOCAL.is_checking = before


WeakCall: TypeAlias = Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]


@dataclasses.dataclass
class GuidedCall:
    """One call that is being guided, between its cond pass and its weak passes."""

    denoiser: Callable[..., Any]
    inputs: Inputs
    rows: Rows | None
    """Its cond rows; `None` where all are."""
    layout: Hashable = None
    weak_call: WeakCall | None = None
    """Takes the arguments of the call, and returns those of its cond rows; where the host knows that better."""
    prefix: Prefix | None = None
    cond: Sequence[Tensor] = ()
    """Its own predictions on its cond rows."""
    is_comparable: bool = True
    """Another pass that skips nothing has to give them again; not where others guide this call, too."""
    random_before: Randomness | None = None
    """Where torch's random numbers stood before it, if it drew some: weak passes draw the same."""
    random_after: Randomness | None = None
    changes_state: bool = False
    """The model keeps something from it; the first time that may be a cache."""
    state_before: Snapshot | None = None
    """What the model kept before it."""
    state_after: Snapshot | None = None
    """What it kept after it, which weak passes leave as it is."""
    reuses: bool = False
    """It ran fewer modules than a call of its layout before: what they compute comes out of a cache."""
    unskipped: dict[int, Sequence[Tensor]] = dataclasses.field(default_factory=dict)
    """For a branch, what its weak pass would give, bit for bit, if it skipped nothing; where that is known."""
    weaks: list[list[Tensor]] | None = None
    """The weak predictions, where they came with the cond pass."""
    check: Callable[[list[list[Tensor]]], None] | None = None
    """What remains to be done with the weak predictions once they are known."""
    conclude: Callable[[], None] | None = None
    """What remains to be done once weak predictions could be computed in another way than tried first."""

    @property
    def count(self) -> int:
        """Number of its cond rows."""
        return self.cond[0].shape[0]


def layout_of(args: tuple[Any, ...], kwargs: dict[str, Any], rows: Rows | None) -> Hashable:
    """What two calls have in common that cut, keep and replay the same; numbers (timesteps) do not count."""

    def describe(leaf: Any) -> object:
        if isinstance(leaf, Tensor):
            return leaf.shape, leaf.dtype, leaf.device
        return leaf if isinstance(leaf, (bool, str)) else type(leaf)

    positional = tuple(map(describe, leaves_of(args, {})))
    named = tuple((name, *map(describe, leaves_of((value,), {}))) for name, value in kwargs.items())
    return rows, torch.is_grad_enabled(), positional, named
