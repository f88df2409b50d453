"""Find the functions that a module's code calls and that, by their names, compute attention."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from stg_hooks.model.source import attribute_of_self, class_forward, parsed, unwrapped, words_of


def calls_attention(module: nn.Module) -> bool:
    """Tell whether the `forward` of a module calls a function that, by its name, computes attention.

    Methods that it calls are followed; its children are not.
    """
    return any(True for _ in _attention_calls(module, class_forward(module), set()))


def called_attention(module: nn.Module) -> list[Callable[..., Any]]:
    """List the functions that, by their names, compute attention where a module calls them, what they call first.

    Methods are followed, objects of its own that are no modules (processors), and the functions themselves.
    """
    found: dict[int, Callable[..., Any]] = {}

    def follow(method: Callable[..., Any], depth: int) -> None:
        for function in _attention_calls(module, method, set()):
            if inspect.isfunction(function) or callable(function):
                if depth and inspect.isfunction(function) and not str(function.__module__).startswith("torch"):
                    follow(unwrapped(function), depth - 1)
                found.setdefault(id(function), function)

    follow(class_forward(module), _DEEPEST)
    return list(found.values())


def _attention_calls(module: nn.Module, method: Callable[..., Any], read: set[str]) -> Iterator[Any]:
    """Find calls of what by its name computes attention: the functions, `None` where that is not known."""
    names = getattr(method, "__globals__", {})
    for function, own, is_attention in _telling_calls(method):
        if own in module._modules:
            continue
        if is_attention:
            yield _value(function, names)
        if own is not None and own not in read:
            read.add(own)
            called = getattr(module, own, None)
            called = getattr(called, "__func__", called)
            if called is not None and not inspect.isroutine(called) and not isinstance(called, type):
                called = type(called).__call__ if callable(called) else None
            if inspect.isfunction(called):
                yield from _attention_calls(module, unwrapped(called), read)


@functools.cache
def _telling_calls(method: Callable[..., Any]) -> list[tuple[ast.expr, str | None, bool]]:
    """List the calls in a method that may compute attention: of what, which attribute of `self` it is, by its name."""
    tree = parsed(method)
    found = []
    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, ast.Call):
            own = attribute_of_self(node.func)
            words = words_of(own or str(getattr(node.func, "attr", None) or getattr(node.func, "id", "")))
            count = len(node.args) + len(node.keywords)
            is_attention = count >= 3 and not _ATTENTION_WORDS.isdisjoint(words) and "mask" not in words
            if is_attention or own is not None:
                found.append((node.func, own, is_attention))
    return found


def _value(node: ast.expr, names: dict[str, Any]) -> Any:
    """Return what a dotted name stands for among the globals of a function; `None` where it cannot be told."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        return getattr(_value(node.value, names), node.attr, None)
    return None


_DEEPEST = 3  # functions that call functions


_ATTENTION_WORDS = words_of("attention attn sdpa sageattn")
