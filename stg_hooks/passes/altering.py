"""Tell by its code whether a hook may change what it looks at."""

from __future__ import annotations

import dis
from typing import Any


def may_alter(hook: Any) -> bool:
    """Tell whether a hook may return something, or write into what it is given, by its code."""
    function = getattr(hook, "__func__", hook)
    code = getattr(function if hasattr(function, "__code__") else type(function).__call__, "__code__", None)
    if code is None:
        return True
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("RESUME", "PRECALL", "CACHE")]
    returns = [i for i, step in enumerate(steps) if step.opname.startswith("RETURN_")]
    results = [i for i in returns if _value_of(steps[i]) and not (i and _is_none(steps[i - 1]))]
    methods = [step.argval for step in steps if step.opname in ("LOAD_METHOD", "LOAD_ATTR")]
    if len(returns) == 1 and methods and methods[0] in _COLLECTS and not any(step.is_jump_target for step in steps):
        results = []  # `lambda *call: seen.append(...)`
    # Writes go by torch's names for them, or by an index.
    names = [step.argval for step in steps if isinstance(step.argval, str)]
    writes = any(name.endswith("_") and not name.endswith("__") for name in names)
    return bool(results) or writes or any(step.opname == "STORE_SUBSCR" for step in steps)


_COLLECTS = ("append", "appendleft", "extend", "add", "update", "clear", "insert", "discard")


def _is_none(step: dis.Instruction) -> bool:
    return step.opname == "LOAD_CONST" and step.argval is None


def _value_of(step: dis.Instruction) -> bool:
    return step.opname != "RETURN_CONST" or step.argval is not None
