"""Read which children of a module its `forward` gives what is denoised, without running it.

What is denoised is the first argument (the second, where the first is the time), and whatever is computed from it. What
functions inside it are given may be that as well. A child that `forward` calls with other things
only (a text encoder, an extractor of faces) prepares conditions, and one that it calls only where an argument switches
on what is off by default (the masking of a training step) does not run in sampling.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from stg_hooks.model.source import class_forward, parsed, unwrapped

# What these tell of a tensor does not carry it on.
_FACTS = frozenset({"device", "dtype", "shape", "ndim", "size", "dim", "requires_grad", "training", "numel"})
_TIMES = frozenset({"t", "time", "times", "timestep", "timesteps", "sigma", "sigmas"})
_LOOPS = 2  # readings of a body, after which what comes from an earlier turn of a loop is known


def bystanders(module: nn.Module) -> frozenset[str]:
    """Name the children that a module calls, but never with what is denoised, or not in sampling.

    Args:
        module: any module.

    Returns:
        Names of children. What cannot be read (calls through other objects) is not among them.
    """
    cls: Any = type(module)
    return _bystanders(cls, class_forward(module)) & frozenset(module._modules)


@functools.cache
def _bystanders(cls: type, forward: Callable[..., Any]) -> frozenset[str]:
    tree = parsed(forward)
    parameters = [] if tree is None else [a.arg for a in (*tree.args.posonlyargs, *tree.args.args)][1:]
    if tree is None or not parameters:
        return frozenset()
    reader = _Flow(cls)
    unknown = [a.arg for a in (tree.args.vararg, tree.args.kwarg) if a is not None]
    first = parameters[:2] if parameters[0] in _TIMES else parameters[:1]
    reader.read(tree, {*first, *unknown})
    return frozenset(name for name, carries in reader.calls.items() if not any(carries))


class _Flow:
    """Follows what is denoised through a method and the methods that it calls."""

    def __init__(self, cls: type) -> None:
        self.calls: dict[str, list[bool]] = {}
        """Child to an entry per call: whether that call carries what is denoised."""
        self._cls = cls
        self._read: set[tuple[str, frozenset[str]]] = set()
        self._flows: set[str] = set()
        self._kept: set[str] = set()  # attributes that carry it
        self._children: dict[str, set[str]] = {}  # variables that stand for a child, or an entry of it
        self._off: set[str] = set()  # arguments that are off by default
        self._is_off = False

    def read(self, tree: ast.FunctionDef, flows: Iterable[str]) -> None:
        outer = self._flows, self._children, self._off
        self._flows, self._children, self._off = set(flows), {}, _off_by_default(tree)
        for _ in range(_LOOPS):
            self._body(tree.body)
        self._flows, self._children, self._off = outer

    def _body(self, statements: Iterable[ast.AST]) -> None:
        for statement in statements:
            self._statement(statement)

    def _statement(self, node: ast.AST) -> None:
        if isinstance(node, ast.If):
            self._expression(node.test)
            before, self._is_off = self._is_off, self._is_off or self._is_false(node.test)
            self._body(node.body)
            self._is_off = before
            self._body(node.orelse)
        elif isinstance(node, (ast.For, ast.AsyncFor)):
            self._expression(node.iter)
            self._bind(node.target, node.iter)
            self._body([*node.body, *node.orelse])
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)) and node.value is not None:
            self._expression(node.value)
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                self._bind(target, node.value)
        elif isinstance(node, ast.expr):
            self._expression(node)
        elif isinstance(node, ast.withitem):
            self._expression(node.context_expr)
            if node.optional_vars is not None:
                self._bind(node.optional_vars, node.context_expr)
        else:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                self._flows |= _arguments(node)
            self._body(ast.iter_child_nodes(node))

    def _bind(self, target: ast.AST, value: ast.AST) -> None:
        names = {node.id for node in ast.walk(target) if isinstance(node, ast.Name) and node.id != "self"}
        self._off -= names  # set to something else
        if self._carries(value):
            self._flows |= names
            self._kept |= {inner.attr for inner in ast.walk(target) if _is_own(inner)}  # type: ignore[attr-defined]
        children = self._passed(value) if _is_listing(value) else self._itself(value)
        for name in names:
            self._children[name] = children

    def _expression(self, node: ast.AST) -> None:
        for inner in ast.walk(node):
            if isinstance(inner, ast.comprehension):
                self._bind(inner.target, inner.iter)
            elif isinstance(inner, ast.NamedExpr):
                self._bind(inner.target, inner.value)
            elif isinstance(inner, ast.Lambda):
                self._flows |= _arguments(inner)
        for call in [inner for inner in ast.walk(node) if isinstance(inner, ast.Call)]:
            given = [*call.args, *(keyword.value for keyword in call.keywords)]
            carries = any(map(self._carries, given))
            called = set() if _is_listing(call) else self._named(call.func).union(*map(self._passed, given))
            for name in called:
                self.calls.setdefault(name, []).append(carries and not self._is_off)
            base = call.func.value if isinstance(call.func, ast.Attribute) else None
            if isinstance(base, ast.Name) and base.id == "self":
                self._method(call, call.func.attr)  # type: ignore[attr-defined]
            elif isinstance(base, ast.Name) and carries:
                self._flows.add(base.id)  # `skips.append(x)`

    def _method(self, call: ast.Call, name: str) -> None:
        method = getattr(self._cls, name, None)
        tree = parsed(unwrapped(method)) if callable(method) and not isinstance(method, type) else None
        if tree is None:
            return
        parameters = [a.arg for a in (*tree.args.posonlyargs, *tree.args.args)][1:]
        flows = {p for p, value in zip(parameters, call.args, strict=False) if self._carries(value)}
        flows |= {k.arg for k in call.keywords if k.arg is not None and self._carries(k.value)}
        if any(isinstance(value, ast.Starred) for value in call.args) or any(k.arg is None for k in call.keywords):
            flows |= {*parameters}
        if (name, frozenset(flows)) not in self._read:
            self._read.add((name, frozenset(flows)))
            self.read(tree, flows)

    def _carries(self, node: ast.AST) -> bool:
        if isinstance(node, ast.Name):
            return node.id in self._flows
        if isinstance(node, ast.Attribute) and node.attr in _FACTS:
            return False
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "len":
            return False
        if _is_own(node):
            return node.attr in self._kept  # type: ignore[attr-defined]
        if isinstance(node, ast.Call) and _is_own(node.func) and self._kept:
            method = getattr(self._cls, node.func.attr, None)  # type: ignore[attr-defined]
            if method is not None and not isinstance(method, type):
                return True  # what it returns may come from these
        return any(map(self._carries, ast.iter_child_nodes(node)))

    def _named(self, node: ast.AST) -> set[str]:
        """Name the children that an expression is made of."""
        found: set[str] = set()
        for inner in ast.walk(node):
            found |= self._itself(inner)
        return found

    def _passed(self, node: ast.AST) -> set[str]:
        """Name the children that are handed over in an argument, and not called for it."""
        if isinstance(node, ast.Call):
            parts = [*node.args, *(keyword.value for keyword in node.keywords)]
            if isinstance(node.func, ast.Attribute) and _is_listing(node):
                parts.append(node.func.value)  # `self.blocks.items()`
            return set[str]().union(*map(self._passed, parts))
        return self._itself(node) or set[str]().union(*map(self._passed, ast.iter_child_nodes(node)))

    def _itself(self, node: ast.AST) -> set[str]:
        """Name the child that `self.blocks`, `self.blocks[i]` or a variable is."""
        while isinstance(node, (ast.Subscript, ast.Starred)):
            node = node.value
        if isinstance(node, ast.Name):
            return self._children.get(node.id, set())
        return {node.attr} if _is_own(node) else set()  # type: ignore[attr-defined]

    def _is_false(self, test: ast.AST) -> bool:
        if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
            return any(map(self._is_false, test.values))
        return isinstance(test, ast.Name) and test.id in self._off


def _is_own(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"


def _arguments(function: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> set[str]:
    args = function.args
    return {a.arg for a in (*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg) if a is not None}


def _is_listing(node: ast.AST) -> bool:
    """Tell `enumerate(self.blocks)`, `self.blocks.items()` and the like from a call of a child."""
    if not isinstance(node, ast.Call):
        return False
    listing = ("enumerate", "zip", "reversed", "range", "len", "list", "iter", "items", "values", "keys", "isinstance")
    name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
    return name in listing


def _off_by_default(tree: ast.FunctionDef) -> set[str]:
    positional = [*tree.args.posonlyargs, *tree.args.args]
    pairs = [*zip(reversed(positional), reversed(tree.args.defaults), strict=False)]
    pairs += [(a, d) for a, d in zip(tree.args.kwonlyargs, tree.args.kw_defaults, strict=True) if d is not None]
    return {a.arg for a, default in pairs if isinstance(default, ast.Constant) and default.value is False}
