"""Which weak predictions a pipeline makes by itself unless it is told not to, and which arguments tell it."""

from __future__ import annotations

import ast
import inspect
import operator
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from stg_hooks.hosts import OwnGuidance
from stg_hooks.integrations.diffusers.call_sites import Site

_IS_ON: dict[type[ast.AST], Callable[[Any, Any], bool]] = {ast.Gt: operator.gt, ast.NotEq: operator.ne}


def on_by_default(cls: type, site: Site) -> OwnGuidance | None:
    """Read what a pipeline makes a perturbed call for; `None` where that is off unless it is asked for.

    Args:
        cls: the class of the pipeline.
        site: the call.
    """
    parameters = inspect.signature(getattr(cls, "__call__")).parameters
    off: dict[str, float] = {}
    is_on = False
    for guard in site.when:
        for name, compare in _thresholds(cls, guard):
            default = getattr(parameters.get(name), "default", None)
            if not isinstance(default, (int, float)):
                continue
            comparator = compare.comparators[0]
            assert isinstance(comparator, ast.Constant)
            off[name] = comparator.value
            is_on = is_on or _IS_ON[type(compare.ops[0])](default, comparator.value)
    return OwnGuidance(cls.__name__, tuple(off.items()), site.isolates) if is_on else None


def _thresholds(cls: type, guard: ast.expr) -> Iterator[tuple[str, ast.Compare]]:
    """Find comparisons of an argument with a number, in a condition or in the property that it names."""
    if isinstance(guard, ast.UnaryOp):
        return
    if isinstance(guard, ast.Attribute):
        found = inspect.getattr_static(cls, guard.attr, None)
        if not isinstance(found, property) or found.fget is None:
            return
        try:
            tree: ast.AST = ast.parse(textwrap.dedent(inspect.getsource(found.fget)))
        except (OSError, SyntaxError):
            return
    else:
        tree = guard
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and type(node.ops[0]) in _IS_ON and isinstance(node.comparators[0], ast.Constant):
            left = node.left
            name = left.attr if isinstance(left, ast.Attribute) else left.id if isinstance(left, ast.Name) else ""
            yield name.lstrip("_"), node
