"""Read source and signatures: what `forward` takes, returns and uses, without running it."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


@functools.cache
def _unwrapped(forward: Callable[..., Any]) -> Callable[..., Any]:
    plain: Callable[..., Any] = inspect.unwrap(forward)
    return plain


def class_forward(module: nn.Module) -> Callable[..., Any]:
    """Return the `forward` that the module's class defines, below decorators and whatever sits on the instance."""
    return _unwrapped(type(module).forward)


@functools.cache
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)


def bound_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Map the arguments of a call to the parameter names of the module's `forward`, defaults left out.

    Args:
        module: the module that was called.
        args: its positional arguments, `self` not among them.
        kwargs: its keyword arguments.

    Returns:
        Name to value; members of `**kwargs` under their own names, `*args` as one tuple.
    """
    try:
        bound = _signature(class_forward(module)).bind(module, *args, **kwargs).arguments
    except TypeError:  # a decorator takes more than the function below it: positions are all there is
        return {**{str(i): value for i, value in enumerate(args)}, **kwargs}
    named = dict(list(bound.items())[1:])
    for name, parameter in _signature(class_forward(module)).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named.update(named.pop(name, {}))
    return named


def attribute_order(module: nn.Module) -> dict[str, int]:
    """Rank the attribute names that the module's `forward` mentions by where it mentions them first."""
    code = getattr(class_forward(module), "__code__", None)
    return {name: rank for rank, name in enumerate(code.co_names)} if code else {}


ReturnNames = str | tuple[str | None, ...]
"""What a `return` statement names: one variable, or a tuple of variables and `None`s."""


@functools.cache
def return_names(forward: Callable[..., Any]) -> ReturnNames | None:
    """Read which variables a function returns.

    Args:
        forward: a plain function, not a bound method.

    Returns:
        The names, `None` standing for a literal `None` in a tuple; `None` when the source is not there,
        returns differ, or something other than plain names is returned.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return None
    found = {_names_of(node.value) for node in _returns(tree.body[0])}
    return found.pop() if len(found) == 1 else None


def _returns(node: ast.AST) -> Iterator[ast.Return]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Return):
            yield child
        elif not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
            yield from _returns(child)


def _names_of(value: ast.expr | None) -> ReturnNames | None:
    if isinstance(value, ast.Name):
        return value.id
    if isinstance(value, ast.Tuple):
        names: list[str | None] = []
        for element in value.elts:
            if isinstance(element, ast.Name):
                names.append(element.id)
            elif isinstance(element, ast.Constant) and element.value is None:
                names.append(None)
            else:
                return None
        return tuple(names)
    return None


def parameter_names(module: nn.Module) -> list[str]:
    """List the parameter names of the module's `forward` in order, `self` left out."""
    return list(_signature(class_forward(module)).parameters)[1:]
