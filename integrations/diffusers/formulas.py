"""Guidance formulas in code: `base + weight * (cond - uncond)`, in whatever spelling."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Formula:
    """`base + weight * (cond - uncond)`, where `base` is one of both."""

    node: ast.BinOp
    cond: str
    uncond: str
    weight: ast.expr

    @property
    def is_evident(self) -> bool:
        """Whether a weight that is written so is positive, so that it is clear which is which."""
        opposite = (ast.UnaryOp, ast.BinOp)
        return not any(
            isinstance(node, opposite)
            and (isinstance(node.op, ast.USub) or (isinstance(node.op, ast.Sub) and _is_constant(node)))
            for node in ast.walk(self.weight)
        )


def _is_constant(node: ast.expr) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.left, ast.Constant)


class Plain(ast.NodeTransformer):
    """Rewrite other spellings: `a += b`, `a: T = b`, and `torch.lerp(u, c, w)` as `u + w * (c - u)`."""

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        """Write `a += b` as `a = a + b`."""
        self.generic_visit(node)
        value = ast.BinOp(_read(node.target), node.op, node.value)
        _at(value, node)
        return _at(ast.Assign([node.target], value), node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        """Leave the annotation out."""
        self.generic_visit(node)
        return node if node.value is None else _at(ast.Assign([node.target], node.value), node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Write `lerp` out."""
        self.generic_visit(node)
        if tail(node.func) != "lerp":
            return node
        given = list(node.args)
        if isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) != "torch":
            given.insert(0, node.func.value)
        named = {word.arg: word.value for word in node.keywords}
        given += [named[name] for name in ("input", "end", "weight") if name in named]
        if len(given) != 3:
            return node
        start, end, weight = given
        product = ast.BinOp(weight, ast.Mult(), ast.BinOp(end, ast.Sub(), start))
        return _at(ast.BinOp(start, ast.Add(), product), node)


def _read(target: ast.expr) -> ast.expr:
    return ast.parse(ast.unparse(target), mode="eval").body


def _at(new: ast.AST, old: ast.AST) -> ast.AST:
    for node in ast.walk(new):
        if "lineno" in node._attributes:
            ast.copy_location(node, old) if not hasattr(node, "lineno") else None
    return new


def tail(node: ast.AST) -> str:
    """Return the last part of a dotted name; nothing for anything else."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def formula(node: ast.AST) -> Formula | None:
    """Read `base + weight * (cond - uncond)`, in any order of its terms and factors."""
    if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add)):
        return None
    for base, product in ((node.left, node.right), (node.right, node.left)):
        if not (isinstance(product, ast.BinOp) and isinstance(product.op, ast.Mult)):
            continue
        for difference, weight in ((product.left, product.right), (product.right, product.left)):
            if isinstance(difference, ast.BinOp) and isinstance(difference.op, ast.Sub):
                cond, uncond = ast.unparse(difference.left), ast.unparse(difference.right)
                if cond != uncond and ast.unparse(base) in (cond, uncond):
                    return Formula(node, cond, uncond, weight)
    return None


def formulas(node: ast.AST) -> Iterator[Formula]:
    """Find all of them in some code."""
    return (found for inner in ast.walk(node) if (found := formula(inner)) is not None)
