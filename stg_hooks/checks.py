"""Tell numbers from what else a user may give."""

from __future__ import annotations

import numbers
from typing import Any, TypeGuard


def is_real(value: object) -> TypeGuard[float]:
    """Tell whether something is a real number, NumPy's included; a bool is none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_count(value: Any) -> TypeGuard[int]:
    """Tell whether something is a whole number above 0, NumPy's included; a bool is none."""
    return not isinstance(value, bool) and isinstance(value, numbers.Integral) and int(value) > 0
