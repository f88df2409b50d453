"""Attention functions that are not torch functions: found where they are held, and replaced for single calls.

`ATTENTION_FUNCTIONS` of the adapters names them. While a perturbed layer runs, each is replaced in the namespaces of
all modules that hold it, and wherever else the model's own code does (in a list, an attribute, a default argument), by
something that looks at the thread: elsewhere it is the function itself.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import sys
import threading
import types
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from stg_hooks.model.called import called_attention
from stg_hooks.modes.holders import Slot, called, plain, slots_in, with_another
from stg_hooks.modes.layouts import Layout, guessed

Seen = Callable[[Callable[..., Any], Layout | None, tuple[Any, ...], dict[str, Any]], Any]
"""What to do in place of an attention function: gets the function, its layout and the arguments of the call."""


# What is not looked into beyond its namespaces: code that holds kernels nowhere else.
_LIBRARIES = frozenset({"builtins", "torch", "diffusers", "transformers", "accelerate", "peft", "stg_hooks"})


class _OfThread(threading.local):
    seen: Seen | None = None


@dataclasses.dataclass(frozen=True)
class _Held:
    """A function where it is held, and what is held there: itself, or what calls it."""

    slot: Slot
    value: Any
    layout: Layout | None


class _Place:
    """A function in one place, and what takes its place."""

    def __init__(self, held: _Held) -> None:
        self.slot, self.value = held.slot, held.value
        self.users: set[object] = set()
        function = called(held.value)

        @functools.wraps(plain(held.value))
        def instead(*args: Any, **kwargs: Any) -> Any:
            seen = _LOCAL.seen
            return function(*args, **kwargs) if seen is None else seen(function, held.layout, args, kwargs)

        self.instead = with_another(held.value, instead)


_LOCAL = _OfThread()
_LOCK = threading.RLock()
_PLACES: dict[Hashable, _Place] = {}
"""Those that are in use now, by what tells their slot."""
_FOUND: tuple[object, list[_Held]] = (None, [])
_BELOW: weakref.WeakKeyDictionary[nn.Module, tuple[object, list[_Held]]] = weakref.WeakKeyDictionary()


@contextmanager
def seeing(
    seen: Seen, model: nn.Module | None = None, others: Mapping[str, Callable[..., Any]] | None = None
) -> Iterator[None]:
    """Pass calls of attention functions from this thread to `seen` within a `with`.

    Args:
        seen: is called in place of a function.
        model: what runs: a function may also be held by a module in it, or in the code of its package.
        others: functions beside those of the table, by their dotted names.
    """
    found = _found(others or {}, model)
    if not found:
        yield
        return
    session = object()
    before, _LOCAL.seen = _LOCAL.seen, seen
    try:
        with _LOCK:
            for held in found:
                place = _PLACES.get(held.slot.key)
                if place is None and held.slot.read() is held.value:
                    place = _PLACES[held.slot.key] = _Place(held)
                if place is not None:
                    place.users.add(session)
                    held.slot.write(place.instead)
        yield
    finally:
        _LOCAL.seen = before
        with _LOCK:
            for key, place in list(_PLACES.items())[::-1]:
                place.users.discard(session)
                if not place.users:
                    if place.slot.read() is place.instead:
                        place.slot.write(place.value)
                    del _PLACES[key]


def _found(others: Mapping[str, Callable[..., Any]], model: nn.Module | None) -> list[_Held]:
    """Find the functions wherever they are held. Looked for anew when modules or the table have changed."""
    global _FOUND
    table: Mapping[str, Layout] = importlib.import_module("stg_hooks.adapters").ATTENTION_FUNCTIONS
    with _LOCK:
        stated = [
            (sys.modules.get(name.rpartition(".")[0]), function, layout)
            for name, layout in table.items()
            if callable(function := _function(name))
        ]
        key = len(sys.modules), stated
        functions: dict[int, Layout | None] = {id(f): None for f in others.values()}
        functions.update({id(function): layout for _, function, layout in stated})
        if others or key != _FOUND[0]:
            found = list(_in_namespaces(functions)) if functions else []
            if others:
                return found
            _FOUND = key, found
        if model is None or not functions:
            return _FOUND[1]
        if model not in _BELOW or _BELOW[model][0] != key:
            _BELOW[model] = key, list(_below(model, functions))
        return _FOUND[1] + _BELOW[model][1]


def _function(name: str) -> Any:
    module, _, function = name.rpartition(".")
    return _value(Slot(vars(sys.modules[module]), function)) if module in sys.modules else None


def _value(slot: Slot) -> Any:
    """Return what a slot holds when nothing is in its place."""
    place = _PLACES.get(slot.key)
    return slot.read() if place is None else place.value


def _in_namespaces(functions: Mapping[int, Layout | None]) -> Iterator[_Held]:
    """Find functions under their names in all modules of Python."""
    modules: list[Any] = list(sys.modules.values())
    for module in modules:
        namespace = vars(module) if isinstance(module, types.ModuleType) else {}  # others put anything there
        for name in list(namespace):
            slot = Slot(namespace, name)
            value = _value(slot)
            if id(plain(value)) in functions:
                yield _Held(slot, value, functions[id(plain(value))])


def _below(model: nn.Module, functions: Mapping[int, Layout | None]) -> Iterator[_Held]:
    """Find functions that modules in a model hold, and what is in the packages of their code, however deep."""
    modules = list(model.modules())
    classes = {cls for module in modules for cls in type(module).__mro__}
    packages = {cls.__module__.partition(".")[0] for cls in classes} - _LIBRARIES

    def is_own(name: str) -> bool:
        return name.partition(".")[0] in packages

    def is_wanted(value: Any) -> bool:
        return id(plain(value)) in functions

    found: list[Any] = [module for name, module in list(sys.modules.items()) if is_own(name)]
    namespaces = [vars(module) for module in found if isinstance(module, types.ModuleType)]
    direct = {Slot(namespace, name).key for namespace in namespaces for name in namespace}
    for slot, value in slots_in([*map(vars, modules), *namespaces], _value, is_wanted, is_own):
        if slot.key not in direct:
            yield _Held(slot, value, functions[id(plain(value))])


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
        with torch.no_grad(), seeing(note, others=named):
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
    for held in _in_namespaces({id(function): None}):
        if held.value is function:
            return f"{held.slot.owner.get('__name__')}.{held.slot.name}"
    return None
