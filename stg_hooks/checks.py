"""Check what a user gave: a number, a word of several."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any, TypeGuard

from stg_hooks.errors import SettingError, closest


def is_real(value: object) -> TypeGuard[float]:
    """Tell whether something is a real number, NumPy's included, and not a bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_count(value: Any) -> TypeGuard[int]:
    """Tell whether something is a whole number above 0, NumPy's included, and not a bool."""
    return not isinstance(value, bool) and isinstance(value, numbers.Integral) and int(value) > 0


def check_choice(asked: str, value: object, choices: Sequence[str]) -> None:
    """Raise unless a value is one of some words; `asked` is what the user typed.

    Raises:
        SettingError: it is another.
    """
    if value not in choices:
        names = ", ".join(map(repr, choices))
        raise SettingError(f"unknown {asked}; choose from {names}.{closest(str(value), choices)}")
