"""Which weak predictions a pipeline makes by itself unless it is told not to, and which arguments tell it."""

from __future__ import annotations

import ast
import inspect
import operator
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from stg_hooks.integrations.diffusers.call_sites import CallSite
from stg_hooks.integrations.diffusers.combinations import tail
from stg_hooks.roles import OwnGuidance

_IS_ON: dict[type[ast.AST], Callable[[Any, Any], bool]] = {ast.Gt: operator.gt, ast.NotEq: operator.ne}


def on_by_default(cls: type, site: CallSite) -> OwnGuidance | None:
    """Read what a pipeline makes a perturbed call for; `None` where that is off unless it is asked for.

    Args:
        cls: the class of the pipeline.
        site: the call.
    """
    parameters = inspect.signature(cls.__call__).parameters
    off: dict[str, float] = {}
    is_on = False
    for guard in site.when:
        for name, compare, threshold in _comparisons(cls, guard):
            default = getattr(parameters.get(name), "default", None)
            if isinstance(default, (int, float)):
                off[name] = threshold
                is_on = is_on or compare(default, threshold)
    return OwnGuidance(cls.__name__, tuple(off.items()), site.isolates) if is_on else None


def _comparisons(cls: type, guard: ast.expr) -> Iterator[tuple[str, Callable[[Any, Any], bool], float]]:
    """Find comparisons of an argument with a number, in a condition or in the property that it names."""
    for node in ast.walk(_read(cls, guard)):
        if not isinstance(node, ast.Compare) or type(node.ops[0]) not in _IS_ON:
            continue
        threshold = getattr(node.comparators[0], "value", None)
        if isinstance(threshold, (int, float)):
            yield tail(node.left).lstrip("_"), _IS_ON[type(node.ops[0])], threshold


def _read(cls: type, guard: ast.expr) -> ast.AST:
    """Return a condition, written out where it is a property of the pipeline."""
    found = inspect.getattr_static(cls, guard.attr, None) if isinstance(guard, ast.Attribute) else None
    if not isinstance(found, property) or found.fget is None:
        return ast.Pass() if isinstance(guard, ast.UnaryOp) else guard
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(found.fget)))
    except (OSError, SyntaxError):
        return guard
