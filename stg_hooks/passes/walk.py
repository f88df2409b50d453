"""Everything that a model keeps besides its parameters, found by walking through its attributes."""

from __future__ import annotations

import functools
import inspect
import itertools
import types
import weakref
from collections import deque
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from stg_hooks.hooks.compiled import is_compiled
from stg_hooks.passes.effects import NO_STATE
from stg_hooks.passes.holders import Attributes, Globals, Holder, Items, Named

# What these keep is not what a prediction depends on, or is put right by themselves.
KNOWN_LIBRARIES = {
    "torch",
    "accelerate",
    "bitsandbytes",
    "torchao",
    "peft",
    "stg_hooks",
    "numpy",
    "builtins",
    "threading",
}
_CLASSES_KNOWN = KNOWN_LIBRARIES | {"diffusers", "transformers"}
_NO_ATTRIBUTE = {*NO_STATE, "forward", "_old_forward", "_internal_dict", "__getstate__", "_compiled_call_impl"}
NUMBERS = (int, float, complex, str, bytes, bool, type(None))
STATELESS = (*NUMBERS, nn.Module, nn.Parameter, type, types.ModuleType, torch.dtype, torch.device)
_DEPTH = 12
_HOLDERS = 20_000


class Walk:
    """Finds all that a model keeps."""

    def __init__(self, modules: Iterable[nn.Module], with_buffers: bool) -> None:
        self.holders: list[Holder] = []
        self.tensors: list[Tensor] = []
        self.buffers: set[int] = set()
        self.has_opaque = False
        """There are objects into which Python cannot look: iterators, generators, locks."""
        self._functions: list[int] = []
        self._seen: set[int] = set()
        self._kept_alive: list[object] = []
        self._sealed: list[dict[str, Any]] = []
        self._own: list[set[str]] = []
        self._modules = list(modules)
        for module in self._modules:
            if library_of(type(module)) in KNOWN_LIBRARIES and "torch.nn" not in type(module).__module__:
                continue
            values = module.__dict__
            own = _own_attributes(type(module))
            if with_buffers and module._buffers:
                self.buffers |= {id(buffer) for buffer in module._buffers.values()}
                self._hold(Attributes(module._buffers), module._buffers, 2)
            if values.keys() <= own:  # of torch, without anything that was set on it alone
                self._sealed.append(values)
                self._own.append(own)
                continue
            self._hold(Attributes(values, _NO_ATTRIBUTE), values, _DEPTH)
            replaced = replaced_forward(module)
            if replaced is not None:
                self._walk(replaced, _DEPTH)
            self._class(type(module), _DEPTH)
        self._mappings = [holder.mapping for holder in self.holders if isinstance(holder, Attributes)]
        self._getters = [holder.getter() for holder in self.holders if isinstance(holder, Attributes)]
        self._lengths = [*map(len, self._mappings)]
        self._others = [holder for holder in self.holders if not isinstance(holder, Attributes)]
        self._sizes = [*map(len, self._sealed)]
        self._attributes = [module.__dict__ for module in self._modules]
        # Ours are others in each `with`, and tell nothing.
        self._forwards = [attributes.get("forward") for attributes in self._attributes]
        self._replaced = [*map(replaced_forward, self._modules)]

    def mark(self) -> Hashable:
        """Return what tells of which modules and functions the model is made, and what goes around their calls."""
        return tuple(map(_mark, self._modules)), tuple(self._functions)

    def values(self) -> list[Any] | None:
        """List all that is held, in an order of its own; `None` where a container has more or less than it had."""
        if [*map(len, self._mappings)] != self._lengths or [*map(len, self._sealed)] != self._sizes:
            return None
        forwards = [attributes.get("forward") for attributes in self._attributes]
        if forwards != self._forwards:
            if any(a is not b for a, b in zip(map(replaced_forward, self._modules), self._replaced, strict=True)):
                return None
            self._forwards = forwards
        found: list[Any] = []
        try:
            for getter, mapping in zip(self._getters, self._mappings, strict=True):
                found += getter(mapping)
        except KeyError:
            return None
        for holder in self._others:
            found += holder.values()
        return found

    def added(self) -> list[tuple[dict[str, Any], str]]:
        """List the attributes that were set since on modules of torch that had none of their own."""
        if [*map(len, self._sealed)] == self._sizes:
            return []
        return [(values, key) for values, own in zip(self._sealed, self._own, strict=True) for key in {*values} - own]

    def _hold(self, holder: Holder, owner: object, depth: int) -> None:
        if id(owner) in self._seen or len(self.holders) > _HOLDERS:
            return
        self._seen.add(id(owner))
        self._kept_alive.append(owner)
        self.holders.append(holder)
        for value in holder.read().values():
            self._walk(value, depth - 1)

    def _walk(self, value: Any, depth: int) -> None:
        if isinstance(value, STATELESS) or depth <= 0 or id(value) in self._seen:
            return
        if isinstance(value, Tensor):
            self._seen.add(id(value))
            self.tensors.append(value)
        elif isinstance(value, dict):
            self._hold(Attributes(value), value, depth)
        elif isinstance(value, (list, deque, set)):
            self._hold(Items(value), value, depth)
        elif isinstance(value, (tuple, frozenset)):
            for inner in value:
                self._walk(inner, depth - 1)
        elif isinstance(value, types.FunctionType):
            self._function(value, depth)
        elif isinstance(value, types.MethodType):
            self._walk(value.__func__, depth - 1)
            self._walk(value.__self__, depth - 1)
        elif isinstance(value, functools.partial):
            for inner in (value.func, value.args, value.keywords):
                self._walk(inner, depth - 1)
        elif isinstance(value, Iterator):
            self.has_opaque = True
        elif not (library_of(type(value)) in KNOWN_LIBRARIES or type(value).__module__.startswith("diffusers.hooks")):
            self._object(value, depth)

    def _object(self, value: object, depth: int) -> None:
        if hasattr(value, "__dict__"):
            self._hold(Attributes(value.__dict__), value, depth)
        slots = tuple(
            name
            for cls in type(value).__mro__
            for name in _names(cls.__dict__.get("__slots__", ()))
            if name not in ("__dict__", "__weakref__") and not name.startswith("__")
        )
        if slots:
            self._hold(Named(value, slots), slots, depth)
        self._class(type(value), depth)

    def _class(self, cls: type, depth: int) -> None:
        for base in cls.__mro__:
            if library_of(base) in _CLASSES_KNOWN or id(base) in self._seen:
                continue
            self._seen.add(id(base))
            data = [name for name, value in vars(base).items() if not name.startswith("__") and _is_data(value)]
            if data:
                self._hold(Named(base, tuple(data)), data, depth)
            for value in vars(base).values():
                if isinstance(value, types.FunctionType):
                    self._function(value, depth - 1)

    def _function(self, function: types.FunctionType, depth: int) -> None:
        if id(function) in self._seen or depth <= 0 or library_of(function) in _CLASSES_KNOWN:
            return
        self._seen.add(id(function))
        self._functions.append(serial(function))
        for cell in function.__closure__ or ():
            self._hold(Named(cell, ("cell_contents",)), cell, depth)
        self._walk(function.__defaults__, depth - 1)
        self._walk(function.__kwdefaults__, depth - 1)
        self._walk(_unwrapped(function), depth - 1)
        known = function.__globals__
        names = [name for name in dict.fromkeys(_globals_of(function.__code__)) if name in known]
        data = tuple(name for name in names if _is_data(known[name]))
        if data:
            self._hold(Globals(known, data), data, depth)
        for name in names:
            value = known[name]
            if isinstance(value, types.FunctionType):
                self._functions.append(serial(value))
                if value.__globals__ is known:
                    self._function(value, depth - 1)


def replaced_forward(module: nn.Module) -> Any:
    """Return the function that replaces `forward` on a module itself, unless it is ours or a known library's."""
    found = module.__dict__.get("forward")
    while (
        found is not None
        and getattr(found, "__globals__", {}).get("__name__", "").startswith("stg_hooks.")
        and hasattr(found, "__wrapped__")
    ):
        found = found.__wrapped__  # what a patch of ours goes around
    if found is None or (isinstance(found, types.MethodType) and found.__func__ is type(module).forward):
        return None
    function = found.func if isinstance(found, functools.partial) else getattr(found, "__func__", found)
    return None if library_of(function) in KNOWN_LIBRARIES or library_of(function) == "diffusers" else found


def _mark(module: nn.Module) -> Hashable:
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    others = tuple(serial(hook) for hook in hooks if library_of(getattr(hook, "func", hook)) != "stg_hooks")
    forward = serial(type(module).forward), serial(replaced_forward(module)), is_compiled(module)
    tensors = (*module._parameters.values(), *module._buffers.values())
    writes = tuple(0 if tensor is None or tensor.is_inference() else tensor._version for tensor in tensors)
    return serial(module), module.training, forward, others, writes


_SERIALS: dict[int, tuple[weakref.ref[Any], int]] = {}
_COUNTER = itertools.count()


def serial(thing: object) -> int:
    """Number an object. Unlike its `id`, the number is never given to another one when it is gone."""
    key = id(thing)
    known = _SERIALS.get(key)
    if known is not None and known[0]() is thing:
        return known[1]
    try:
        reference = weakref.ref(thing, lambda gone: _forget(key, gone))
    except TypeError:
        return -key  # lists and dictionaries, of which the contents are looked at
    _SERIALS[key] = reference, next(_COUNTER)
    return _SERIALS[key][1]


def _forget(key: int, gone: weakref.ref[Any]) -> None:
    if key in _SERIALS and _SERIALS[key][0] is gone:
        del _SERIALS[key]


def _unwrapped(function: Any) -> Any:
    """Return what a decorator has wrapped, if any."""
    return getattr(function, "__wrapped__", None)


_OWN_ATTRIBUTES: dict[type, set[str]] = {}


def _own_attributes(cls: type) -> set[str]:
    """Name what a module of torch has by its class; nothing for other classes, which may keep state anywhere."""
    if not cls.__module__.startswith("torch.nn.modules"):
        return set()
    if cls not in _OWN_ATTRIBUTES:
        annotated = {name for base in cls.__mro__ for name in inspect.get_annotations(base)}
        _OWN_ATTRIBUTES[cls] = annotated | NO_STATE | {*getattr(cls, "__constants__", ())}
    return _OWN_ATTRIBUTES[cls]


def library_of(thing: Any) -> str:
    """Name the library that a class or a function comes from."""
    return str(getattr(thing, "__module__", None) or "").partition(".")[0]


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _is_data(value: object) -> bool:
    if isinstance(value, (*NUMBERS, Tensor, dict, list, set, deque, tuple)):
        return True
    is_code = isinstance(value, (type, types.ModuleType, nn.Module)) or callable(value) or hasattr(value, "__get__")
    return not is_code and library_of(type(value)) not in _CLASSES_KNOWN and hasattr(value, "__dict__")


def _globals_of(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _globals_of(constant)
