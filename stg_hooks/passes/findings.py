"""What has been found out about the calls of a model, kept for as long as the model lives and stays as it is."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Hashable
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from torch import nn

if TYPE_CHECKING:
    from stg_hooks.passes.repetition import Outline


_AT_ONCE = 8
ALL = range(sys.maxsize)
"""The numbers of all calls."""


@dataclasses.dataclass
class KnownLayout:
    """What is known about the calls of one layout."""

    prefix: Outline
    draws: bool
    """Such calls draw random numbers, after the prefix."""
    in_one_pass: bool = False
    """One pass with more rows has given the same."""


@dataclasses.dataclass
class Findings:
    """What checks have found out about the calls of one model, by their layouts; no values and no modules."""

    layouts: dict[Hashable, KnownLayout] = dataclasses.field(default_factory=dict)
    """Those whose weak passes can share the prefix."""
    keeps: dict[Hashable, frozenset[int] | range] = dataclasses.field(default_factory=dict)
    """For a layout, the calls of units whose outputs are kept though the model holds them no more."""
    in_full: dict[Hashable, str] = dataclasses.field(default_factory=dict)
    """Layouts whose weak passes cannot share the prefix, and why; those of others may."""
    can_be_cut: set[Hashable] = dataclasses.field(default_factory=set)
    """Layouts whose cond rows are known to be found."""
    again: dict[Hashable, int] = dataclasses.field(default_factory=dict)
    """How many calls of a layout have been, or could have been, made once more."""


def recall(model: nn.Module, key: Hashable) -> Findings:
    """Return what is known of a model in the state that `key` tells, or findings that are to be filled."""
    found = _REMEMBERED.setdefault(model, {})
    if key not in found:
        while len(found) >= _AT_ONCE:
            del found[next(iter(found))]
        found[key] = Findings()
    return found[key]


def forget(model: nn.Module) -> None:
    """Check the calls of a model anew from now on."""
    _REMEMBERED.pop(model, None)


_REMEMBERED: WeakKeyDictionary[nn.Module, dict[Hashable, Findings]] = WeakKeyDictionary()
