"""Statements of a pipeline's code, and how they combine predictions."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import TypeAlias

_CONVERSIONS = ("float", "double", "half", "bfloat16", "to", "type", "clone", "contiguous", "detach")


Guards: TypeAlias = "tuple[ast.expr, ...]"


@dataclasses.dataclass(frozen=True)
class Added:
    """A weighted difference of predictions that has a name, and the sum in which that is added to cond."""

    difference: ast.expr
    name: str
    sum: ast.expr


@dataclasses.dataclass(frozen=True)
class Combination:
    """The expression that combines predictions, and the assignments that may change its weight before it."""

    expression: ast.expr
    cond: str
    uncond: str
    guards: Guards
    changes: tuple[Guards, ...]
    others: tuple[str, ...] = ()
    """Further predictions that it combines."""
    added: Added | None = None
    """Where it is a difference, what adds it to the cond prediction."""


@dataclasses.dataclass(frozen=True)
class Found:
    """A statement, with the conditions under which it runs, the cache context and the outermost loop that it is in."""

    statement: ast.stmt
    guards: Guards
    context: ast.expr | None
    loop: ast.stmt | None

    @property
    def lines(self) -> range:
        """Where it stands."""
        return range(self.statement.lineno, (self.statement.end_lineno or self.statement.lineno) + 1)

    @property
    def batches(self) -> ast.expr | None:
        """What the innermost loop around it goes through, where that is not the loop of the steps itself."""
        loops = [] if self.loop is None else [node for node in ast.walk(self.loop) if isinstance(node, ast.For)]
        around = [loop for loop in loops if any(node is self.statement for node in ast.walk(loop))]
        return around[-1].iter if len(around) > 1 else None

    @property
    def value(self) -> ast.expr | None:
        """What it assigns."""
        return self.statement.value if isinstance(self.statement, ast.Assign) else None

    @property
    def target(self) -> str:
        """The name that it assigns to, the first one of several."""
        return next(iter(self.targets), "")

    @property
    def targets(self) -> tuple[str, ...]:
        """The names that it assigns to; an empty one for anything else."""
        target = self.statement.targets[0] if isinstance(self.statement, ast.Assign) else None
        found = target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]
        return tuple(one.id if isinstance(one, ast.Name) else "" for one in found)


def blend_of(call: Found, statements: Sequence[Found]) -> Combination | None:
    """Find where the prediction of a call is mixed into the one before it, `pred = w * pred + (1 - w) * other`."""
    names = [call.target, *(found.target for found in statements if call.target in names_in(found.statement))]
    pairs = ((name, found) for found in statements for name in names if found.target not in ("", name))
    combined = (combination_of((call,), [name, found.target], [found]) for name, found in pairs)
    return next((one for one in combined if one is not None), None)


def combination_of(
    made: Sequence[Found], predictions: Sequence[str], statements: Sequence[Found], is_named: bool = True
) -> Combination | None:
    """Find the expression that combines predictions, cond, uncond and others, after the statements that make them.

    Without names that tell, both have to come to it as they are: `None` if one is assigned anew, other than converted.
    """
    later = [found for found in statements if found.statement.lineno > made[0].statement.lineno]
    first = statements.index(made[-1]) if made[-1] in statements else -1
    is_several = len({*predictions}) == len(predictions) > 1
    for place, found in enumerate(later):
        value = getattr(found.statement, "value", None)
        expression = _smallest(value, *predictions) if isinstance(value, ast.expr) and is_several else None
        if expression is None or found in statements[: first + 1]:
            continue
        before = [other for other in later[:place] if other not in made]
        if not is_named and any(_changes(other, {*predictions}) for other in before):
            return None
        weights = {name.lstrip("_") for name in names_in(expression)} - {*predictions, "self"}
        changes = tuple(
            other.guards
            for other in before
            if isinstance(other.statement, ast.Assign)
            and {name.lstrip("_") for target in other.statement.targets for name in names_in(target)} & weights
        )
        cond, uncond, *others = predictions
        added = _added(found, cond, later[place + 1 :])
        return Combination(expression, cond, uncond, found.guards, changes, tuple(others), added)
    return None


def _added(difference: Found, cond: str, later: Sequence[Found]) -> Added | None:
    """Find the expression that adds a difference to the cond prediction."""
    if difference.target in ("", cond) or difference.value is None:
        return None
    values = (found.value for found in later if found.value is not None)
    sums = (found for value in values if (found := _smallest(value, cond, difference.target)) is not None)
    return next((Added(difference.value, difference.target, one) for one in sums), None)


def _smallest(value: ast.expr, *wanted: str) -> ast.BinOp | None:
    """Find the smallest operation that holds these names, as often as the whole expression does."""

    def count(node: ast.AST) -> list[int]:
        names = list(names_in(node))
        return [names.count(name) for name in wanted]

    found = [node for node in ast.walk(value) if isinstance(node, ast.BinOp) and count(node) == count(value)]
    return found[-1] if found and all(count(value)) else None


def _changes(found: Found, names: set[str]) -> bool:
    """Return whether a statement may make something else of predictions than to convert them."""
    statement = found.statement
    if isinstance(statement, ast.Expr):
        return bool(names & set(names_in(statement)))
    if not isinstance(statement, ast.Assign) or not names & {n for one in statement.targets for n in names_in(one)}:
        return False
    value: ast.expr = statement.value
    while isinstance(value, ast.Call) and tail(value.func) in _CONVERSIONS and isinstance(value.func, ast.Attribute):
        value = value.func.value
    return ast.unparse(value) != ast.unparse(statement.targets[0])


def tail(node: ast.AST) -> str:
    """Return the last part of a dotted name; nothing for anything else."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def names_in(node: ast.AST) -> Iterator[str]:
    """Go through the names in a piece of code, the last parts of dotted ones."""
    return (name for inner in ast.walk(node) if (name := tail(inner)))


def mentions(pattern: re.Pattern[str], node: ast.AST) -> bool:
    """Tell whether a piece of code holds a name that a pattern finds."""
    return any(pattern.search(name) for name in names_in(node))
