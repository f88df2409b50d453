"""Evaluate the plain expressions in which a pipeline says what it is doing, without executing any code of it.

An expression that calls something is refused.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

_BINARY: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
_UNARY: dict[type[ast.AST], Callable[[Any], Any]] = {ast.Not: operator.not_, ast.USub: operator.neg}


def evaluate(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """Compute an expression.

    Args:
        node: its syntax tree.
        names: what the names in it stand for.

    Returns:
        Its value.

    Raises:
        LookupError: it holds something else than names, attributes, items, constants, operators and comparisons, or a
            name or attribute that does not exist (yet).
    """
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return names[node.id]
    if isinstance(node, ast.Attribute):
        try:
            return getattr(evaluate(node.value, names), node.attr)
        except AttributeError as error:
            raise LookupError(str(error)) from error
    if isinstance(node, ast.Subscript):
        return evaluate(node.value, names)[evaluate(node.slice, names)]
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](evaluate(node.operand, names))
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _BINARY[type(node.op)](evaluate(node.left, names), evaluate(node.right, names))
    if isinstance(node, ast.BoolOp):
        stop = isinstance(node.op, ast.Or)
        value = None
        for operand in node.values:
            value = evaluate(operand, names)
            if bool(value) is stop:
                break
        return value
    if isinstance(node, ast.Compare):
        left = evaluate(node.left, names)
        for op, comparator in zip(node.ops, node.comparators, strict=True):
            right = evaluate(comparator, names)
            if not _BINARY[type(op)](left, right):
                return False
            left = right
        return True
    raise LookupError(f"cannot evaluate {ast.unparse(node)}")
