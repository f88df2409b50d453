"""Attention functions that are not torch functions: found where they are called, and replaced for single calls.

`ATTENTION_FUNCTIONS` of the adapters names them. While a perturbed layer runs, each is replaced in the namespaces of
all modules that hold it, by something that looks at the thread: elsewhere it is the function itself.
"""

from __future__ import annotations

import functools
import importlib
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from stg_hooks.model.called import called_attention
from stg_hooks.modes.layouts import Layout, guessed

Seen = Callable[[Callable[..., Any], Layout | None, tuple[Any, ...], dict[str, Any]], Any]
"""What to do in place of an attention function: gets the function, its layout and the arguments of the call."""


class _OfThread(threading.local):
    seen: Seen | None = None


class _Place:
    """A function under one of its names in a module."""

    def __init__(self, namespace: dict[str, Any], name: str, value: Any, function: Any, layout: Layout | None) -> None:
        self.namespace, self.name, self.value = namespace, name, value
        self.users: set[object] = set()

        @functools.wraps(function)
        def instead(*args: Any, **kwargs: Any) -> Any:
            seen = _LOCAL.seen
            return value(*args, **kwargs) if seen is None else seen(value, layout, args, kwargs)

        self.instead = instead


_LOCAL = _OfThread()
_LOCK = threading.RLock()
_PLACES: dict[tuple[int, str], _Place] = {}
"""Those that are in use now, by the namespace's id and the name."""
_FOUND: tuple[object, list[tuple[dict[str, Any], str, Any, Any, Layout | None]]] = (None, [])


@contextmanager
def seeing(seen: Seen, others: Mapping[str, Callable[..., Any]] | None = None) -> Iterator[None]:
    """Pass calls of attention functions from this thread to `seen` within a `with`.

    Args:
        seen: is called in place of a function.
        others: functions beside those of the table, by their dotted names.
    """
    found = _found(others or {})
    if not found:
        yield
        return
    session = object()
    before, _LOCAL.seen = _LOCAL.seen, seen
    try:
        with _LOCK:
            for namespace, name, value, function, layout in found:
                place = _PLACES.get((id(namespace), name))
                if place is None and namespace.get(name) is value:
                    place = _Place(namespace, name, value, function, layout)
                    _PLACES[id(namespace), name] = place
                if place is not None:
                    place.users.add(session)
                    namespace[name] = place.instead
        yield
    finally:
        _LOCAL.seen = before
        with _LOCK:
            for key, place in list(_PLACES.items()):
                place.users.discard(session)
                if not place.users:
                    if place.namespace.get(place.name) is place.instead:
                        place.namespace[place.name] = place.value
                    del _PLACES[key]


def _found(others: Mapping[str, Callable[..., Any]]) -> list[tuple[dict[str, Any], str, Any, Any, Layout | None]]:
    """Find the functions wherever a module holds them. Looked for anew when modules or the table have changed."""
    global _FOUND
    table: Mapping[str, Layout] = importlib.import_module("stg_hooks.adapters").ATTENTION_FUNCTIONS
    with _LOCK:
        stated = [
            (sys.modules.get(name.rpartition(".")[0]), function, layout)
            for name, layout in table.items()
            if callable(function := _function(name))
        ]
        key = len(sys.modules), stated
        if not others and key == _FOUND[0]:
            return _FOUND[1]
        functions: dict[int, tuple[Any, Layout | None]] = {id(f): (f, None) for f in others.values()}
        functions.update({id(function): (function, layout) for _, function, layout in stated})
        found = list(_held(functions)) if functions else []
        if not others:
            _FOUND = key, found
        return found


def _function(name: str) -> Any:
    module, _, function = name.rpartition(".")
    found = vars(sys.modules[module]).get(function) if module in sys.modules else None
    place = _PLACES.get((id(vars(sys.modules[module])), function)) if found is not None else None
    return place.value if place is not None else found


def _held(
    functions: Mapping[int, tuple[Any, Layout | None]],
) -> Iterator[tuple[dict[str, Any], str, Any, Any, Layout | None]]:
    modules: list[Any] = list(sys.modules.values())
    for module in modules:
        namespace = vars(module) if isinstance(module, types.ModuleType) else {}  # others put anything there
        for name, held in list(namespace.items()):
            place = _PLACES.get((id(namespace), name))
            value = place.value if place is not None else held
            plain = getattr(value, "_torchdynamo_orig_callable", value) if type(value) is types.FunctionType else value
            if id(plain) in functions:
                yield namespace, name, value, *functions[id(plain)]


def advice(modules: Iterable[nn.Module], run: Callable[[], Any]) -> str:
    """Write the line that names the function in which modules seem to compute attention; nothing without one.

    Args:
        modules: an attention module, or a block; their code is read.
        run: calls them once more, to see what the function is given.
    """
    functions = {id(f): f for module in modules for f in called_attention(module)}
    named = {name: f for f in functions.values() if (name := _dotted(f)) is not None}
    lines: dict[int, str | None] = {}

    def note(function: Callable[..., Any], _: Layout | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = function(*args, **kwargs)
        lines.setdefault(id(function), guessed(function, args, kwargs, output))
        return output

    try:
        with torch.no_grad(), seeing(note, named):
            run()
    except Exception:  # in a call that the caller did not make
        return ""
    for name, function in named.items():
        if (line := lines.get(id(function))) is not None:
            return (
                " If a function computes it, first name that, and how it takes its tensors:\n"
                "  from stg_hooks.adapters import ATTENTION_FUNCTIONS, Layout\n"
                f'  ATTENTION_FUNCTIONS["{name}"] = {line}'
            )
    return ""


def _dotted(function: Callable[..., Any]) -> str | None:
    """Name a function by its own module, or by another one that holds it."""
    own = f"{getattr(function, '__module__', None)}.{getattr(function, '__name__', None)}"
    if _function(own) is function:
        return own
    held = next(_held({id(function): (function, None)}), None)
    return None if held is None else f"{held[0].get('__name__')}.{held[1]}"
