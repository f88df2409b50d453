"""What adapters state about classes of modules: read when it is needed, by the names of a class and of its bases."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn


def stated(table: str, module: nn.Module) -> list[Any]:
    """Look a module's class up in a table of `stg_hooks.adapters`.

    Args:
        table: the name of a mapping from class names to facts, or of a collection of class names.
        module: any module.

    Returns:
        The facts about its class and the bases of it, the class first; for a collection, the names found.
    """
    facts: Mapping[str, Any] | Collection[str] = getattr(_adapters(), table)
    found = [cls.__name__ for cls in type(module).__mro__ if cls.__name__ in facts] if facts else []
    return [facts[name] for name in found] if isinstance(facts, Mapping) else found


@functools.cache
def _adapters() -> Any:
    return importlib.import_module("stg_hooks.adapters")
