"""What a model keeps from one call to the next, and passes that leave none of it changed."""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
import operator
import types
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stg_hooks.errors import CallError
from stg_hooks.hooks.compiled import is_compiled
from stg_hooks.hooks.forward import Action, patched, pushed
from stg_hooks.model.layers import is_attention
from stg_hooks.passes.effects import _NO_STATE, count_of_writes

# What these keep is not what a prediction depends on, or is put right by themselves.
_LIBRARIES = {"torch", "accelerate", "bitsandbytes", "torchao", "peft", "stg_hooks", "numpy", "builtins", "threading"}
_CLASSES_KNOWN = _LIBRARIES | {"diffusers", "transformers"}
_NO_ATTRIBUTE = {*_NO_STATE, "forward", "_old_forward", "_internal_dict", "__getstate__", "_compiled_call_impl"}
_NUMBERS = (int, float, complex, str, bytes, bool, type(None))
_STATELESS = (*_NUMBERS, nn.Module, nn.Parameter, type, types.ModuleType, torch.dtype, torch.device)
_DEPTH = 12
_HOLDERS = 20_000
_LARGE = 1 << 20  # entries
_LOOKS = 4
_MISSING = object()

Contents = dict[Any, Any]


class _Attributes:
    """A dictionary, or the attributes of an object or a module."""

    def __init__(self, mapping: dict[Any, Any], start: int = 0, apart: Iterable[str] = ()) -> None:
        self.mapping, self.start, self.apart = mapping, start, frozenset(apart)

    def values(self) -> list[Any]:
        return list(self.mapping.values())[self.start :]

    def getter(self) -> Callable[[dict[Any, Any]], tuple[Any, ...]]:
        """Return what reads its values as fast as can be."""
        names = [*self.mapping][self.start :]
        if len(names) < 2:
            return operator.itemgetter(names[0], names[0]) if names else _nothing
        return operator.itemgetter(*names)

    def read(self) -> Contents:
        # In one step: other threads may install something on the same module meanwhile.
        return {k: v for k, v in dict(self.mapping).items() if k not in self.apart}

    def write(self, contents: Contents) -> None:
        for key in [key for key in list(self.mapping) if key not in self.apart and key not in contents]:
            del self.mapping[key]
        for key, value in contents.items():
            self.mapping[key] = value


class _Named:
    """Some attributes of an object: of a closure's cell, a class, an object with slots, a module of Python."""

    def __init__(self, owner: object, names: tuple[str, ...]) -> None:
        self.owner, self.names = owner, names

    def values(self) -> list[Any]:
        return [_get(self.owner, name) for name in self.names]

    def read(self) -> Contents:
        return dict(zip(self.names, self.values(), strict=True))

    def write(self, contents: Contents) -> None:
        for name, value in contents.items():
            if value is _MISSING:
                if _get(self.owner, name) is not _MISSING:
                    delattr(self.owner, name)
            else:
                setattr(self.owner, name, value)


class _Globals(_Named):
    owner: dict[str, Any]

    def values(self) -> list[Any]:
        return [self.owner.get(name, _MISSING) for name in self.names]

    def write(self, contents: Contents) -> None:
        for name, value in contents.items():
            if value is _MISSING:
                self.owner.pop(name, None)
            else:
                self.owner[name] = value


class _Sequence:
    """A list, a deque or a set."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def values(self) -> list[Any]:
        return list(self.owner)

    def read(self) -> Contents:
        return dict(enumerate(self.owner))

    def write(self, contents: Contents) -> None:
        self.owner.clear()
        add = self.owner.update if isinstance(self.owner, set) else self.owner.extend
        add(contents.values())


Holder = _Attributes | _Named | _Sequence


class _Walk:
    """Finds all that a model keeps."""

    def __init__(self, modules: Iterable[nn.Module], with_buffers: bool) -> None:
        self.holders: list[Holder] = []
        self.tensors: list[Tensor] = []
        self.buffers: set[int] = set()
        self.has_opaque = False
        """There are objects into which Python cannot look: iterators, generators, locks."""
        self._seen: set[int] = set()
        self._kept_alive: list[object] = []
        self._sealed: list[dict[str, Any]] = []
        self._own: list[set[str]] = []
        self._modules = list(modules)
        for module in self._modules:
            if _library(type(module)) in _LIBRARIES and "torch.nn" not in type(module).__module__:
                continue
            values = module.__dict__
            own = _own_attributes(type(module))
            if values.keys() <= own:  # of torch, without anything that was set on it alone
                self._sealed.append(values)
                self._own.append(own)
                if with_buffers and module._buffers:
                    self.buffers |= {id(buffer) for buffer in module._buffers.values()}
                    self._hold(_Attributes(module._buffers), module._buffers, 2)
                continue
            start = sum(1 for _ in itertools.takewhile(_NO_STATE.__contains__, list(values)))
            self._hold(_Attributes(values, start, _NO_ATTRIBUTE), values, _DEPTH)
            if with_buffers and module._buffers:
                self.buffers |= {id(buffer) for buffer in module._buffers.values()}
                self._hold(_Attributes(module._buffers), module._buffers, 2)
            replaced = replaced_forward(module)
            if replaced is not None:
                self._walk(replaced, _DEPTH)
            self._class(type(module), _DEPTH)
        self._mappings = [holder.mapping for holder in self.holders if isinstance(holder, _Attributes)]
        self._getters = [holder.getter() for holder in self.holders if isinstance(holder, _Attributes)]
        self._lengths = [*map(len, self._mappings)]
        self._others = [holder for holder in self.holders if not isinstance(holder, _Attributes)]
        self._sizes = [*map(len, self._sealed)]

    def mark(self) -> int:
        """Return a number that tells of which modules the model is made, and what goes around their calls."""
        return hash(tuple(map(_mark, self._modules)))

    def values(self) -> list[Any] | None:
        """List all that is held, in an order of its own; `None` where a container has more or less than it had."""
        if [*map(len, self._mappings)] != self._lengths or [*map(len, self._sealed)] != self._sizes:
            return None
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
        if isinstance(value, _STATELESS) or depth <= 0 or id(value) in self._seen:
            return
        if isinstance(value, Tensor):
            self._seen.add(id(value))
            self.tensors.append(value)
        elif isinstance(value, dict):
            self._hold(_Attributes(value), value, depth)
        elif isinstance(value, (list, deque, set)):
            self._hold(_Sequence(value), value, depth)
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
        elif _library(type(value)) not in _LIBRARIES and not type(value).__module__.startswith("diffusers.hooks"):
            self._object(value, depth)

    def _object(self, value: object, depth: int) -> None:
        if hasattr(value, "__dict__"):
            self._hold(_Attributes(value.__dict__), value, depth)
        slots = tuple(
            name
            for cls in type(value).__mro__
            for name in _names(cls.__dict__.get("__slots__", ()))
            if name not in ("__dict__", "__weakref__") and not name.startswith("__")
        )
        if slots:
            self._hold(_Named(value, slots), slots, depth)
        self._class(type(value), depth)

    def _class(self, cls: type, depth: int) -> None:
        for base in cls.__mro__:
            if _library(base) in _CLASSES_KNOWN or id(base) in self._seen:
                continue
            self._seen.add(id(base))
            data = [name for name, value in vars(base).items() if not name.startswith("__") and _is_data(value)]
            if data:
                self._hold(_Named(base, tuple(data)), data, depth)
            for value in vars(base).values():
                if isinstance(value, types.FunctionType):
                    self._function(value, depth - 1)

    def _function(self, function: types.FunctionType, depth: int) -> None:
        if id(function) in self._seen or depth <= 0 or _library(function) in _CLASSES_KNOWN:
            return
        self._seen.add(id(function))
        for cell in function.__closure__ or ():
            self._hold(_Named(cell, ("cell_contents",)), cell, depth)
        self._walk(function.__defaults__, depth - 1)
        self._walk(function.__kwdefaults__, depth - 1)
        self._walk(inspect_unwrapped(function), depth - 1)
        known = function.__globals__
        names = [name for name in dict.fromkeys(_globals_of(function.__code__)) if name in known]
        data = tuple(name for name in names if _is_data(known[name]))
        if data:
            self._hold(_Globals(known, data), data, depth)
        for name in names:
            value = known[name]
            if isinstance(value, types.FunctionType) and value.__globals__ is known:
                self._function(value, depth - 1)


class Snapshot:
    """What a model kept at one time."""

    def __init__(
        self,
        walk: _Walk,
        contents: list[Contents] | None,
        values: list[Any] | None,
        copies: Callable[[Tensor], Tensor | None],
    ) -> None:
        """Take what is there now; `contents` and `values` are known where nothing has changed its place."""
        self.walk = walk
        self.contents = [holder.read() for holder in walk.holders] if contents is None else contents
        self.values = walk.values() if values is None else values
        self.writes = [count_of_writes(tensor) for tensor in walk.tensors]
        self.copies = {id(tensor): copies(tensor) for tensor in walk.tensors}

    def mark(self) -> int:
        """Return a number that is another one where the model is built, or set, in another way.

        Values of tensors do not count.
        """

        def marked(value: object) -> object:
            return value if isinstance(value, _NUMBERS) else (type(value), id(value))

        held = [[*map(marked, (*contents.keys(), *contents.values()))] for contents in self.contents]
        return hash((self.walk.mark(), tuple(itertools.chain(*held))))

    def is_in_place(self) -> bool:
        """Tell whether all containers hold the same objects still."""
        now, values = self.walk.values(), self.values
        return (
            now is not None and values is not None and len(now) == len(values) and all(map(operator.is_, now, values))
        )

    def written(self) -> list[Tensor]:
        """List the tensors that were written into since."""
        pairs = zip(self.walk.tensors, self.writes, strict=True)
        return [tensor for tensor, writes in pairs if self._is_written(tensor, writes)]

    def _is_written(self, tensor: Tensor, writes: object) -> bool:
        if not tensor.is_inference():
            return bool(count_of_writes(tensor) != writes)
        copy = self.copies[id(tensor)]  # torch does not count writes in inference mode
        return copy is not None and tensor.device.type != "meta" and not torch.equal(tensor, copy)

    def differs(self) -> bool:
        """Tell whether anything is different now."""
        if self.written():
            return True
        if self.is_in_place():
            return False
        pairs = zip(self.walk.holders, self.contents, strict=True)
        return bool(self.walk.added()) or any(not _same(contents, holder.read()) for holder, contents in pairs)

    def changes(self) -> list[tuple[Holder, Any, Any]]:
        """List what holds other tensors now than it did: where, under which key, and what is there."""
        found: list[tuple[Holder, Any, Any]] = []
        if self.is_in_place():
            return found
        found = [(_Attributes(v), key, v[key]) for v, key in self.walk.added() if _has_tensors(v[key])]
        for holder, contents in zip(self.walk.holders, self.contents, strict=True):
            if isinstance(holder, _Sequence) and isinstance(holder.owner, set):
                continue
            for key, value in holder.read().items():
                if contents.get(key, _MISSING) is not value and _has_tensors(value):
                    found.append((holder, key, value))
        return found

    def has_new_tensors(self) -> bool:
        """Tell whether tensors were written into since, or put where there was something else."""
        pairs = zip(self.walk.holders, self.contents, strict=True)
        return bool(self.written()) or any(
            contents.get(key, _MISSING) is not value and _has_tensors(value)
            for holder, contents in pairs
            for key, value in holder.read().items()
        )

    def put_back(self) -> None:
        """Make everything what it was.

        Raises:
            CallError: a tensor was written into of which no copy was made.
        """
        if not self.is_in_place():
            for holder, contents in zip(self.walk.holders, self.contents, strict=True):
                if not _same(contents, holder.read()):
                    holder.write(contents)
            for values, key in self.walk.added():
                del values[key]
        for tensor in self.written():
            copy = self.copies[id(tensor)]
            if copy is None:
                raise CallError(
                    f"the model wrote into a buffer of shape {tuple(tensor.shape)}, which it did not do in the calls "
                    "before: its values are lost, and the weak pass needs them. Keep a new tensor instead."
                )
            with torch.inference_mode() if tensor.is_inference() else torch.no_grad():
                tensor.copy_(copy)


class Kept:
    """What one model keeps; looked at around every call that is guided."""

    def __init__(self, model: nn.Module, with_buffers: bool = True) -> None:
        """Touch nothing.

        Args:
            model: the denoiser.
            with_buffers: not where offloading hooks move buffers about.
        """
        self._model = model
        self._modules = list(model.modules())
        self._with_buffers = with_buffers
        self._last: Snapshot | None = None
        self._looks = 0
        self._written: set[int] = set()

    def look(self, before: Snapshot | None = None) -> Snapshot:
        """Take what the model keeps now; of what has not been written into since `before`, that one's copy is used.

        Returns:
            A new snapshot; `before` itself where nothing has changed.
        """
        self._looks += 1
        last = before or self._last
        changed = set() if last is None else {id(tensor) for tensor in last.written()}
        if before is not None:
            self._written |= changed

        def copied(tensor: Tensor) -> Tensor | None:
            # Tables and the like are copied once, and not in every call.
            copy = None if last is None or id(tensor) in changed else last.copies.get(id(tensor))
            if copy is not None or (before is not None and id(tensor) in before.copies and id(tensor) not in changed):
                return copy
            is_large = tensor.numel() > _LARGE and id(tensor) in walk.buffers
            if is_large and self._looks > _LOOKS and id(tensor) not in self._written:
                return None
            return tensor.detach().clone()

        if last is not None and last.is_in_place():
            if before is not None and not changed:
                return before
            walk = last.walk
            self._last = Snapshot(walk, last.contents, last.values, copied)
        else:
            walk = _Walk(self._modules, self._with_buffers)
            self._last = Snapshot(walk, None, None, copied)
        return self._last

    def has_opaque(self) -> bool:
        """Tell whether it keeps objects into which Python cannot look."""
        return self._last is not None and self._last.walk.has_opaque

    def replaced(self) -> list[str]:
        """Name the modules whose `forward` was replaced from outside, each with the function that replaces it."""
        names = []
        for name, module in self._model.named_modules():
            function = replaced_forward(module)
            if function is not None:
                what = getattr(function, "__qualname__", type(function).__qualname__)
                names.append(f"{name or type(module).__name__}.forward is {_module_of(function)}.{what}")
        return names

    def hooked(self) -> list[str]:
        """Name the modules with hooks, neither ours nor a known library's, that may change what passes through them."""
        names = []
        for name, module in self._model.named_modules():
            for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
                own = getattr(hook, "func", hook)
                if _library(own) not in _LIBRARIES | {"diffusers"} and _may_alter(own):
                    what = getattr(own, "__qualname__", type(own).__qualname__)
                    names.append(f"{name or type(module).__name__} has the hook {_module_of(own)}.{what}")
        return names


class Copies:
    """What a branch of its own has left behind, for the steps in which a step cache computes less."""

    def __init__(self) -> None:
        """Start with nothing."""
        self._places: dict[tuple[int, Any], tuple[Holder, Any]] = {}
        self._tensors: dict[int, tuple[Tensor, Tensor]] = {}

    def __bool__(self) -> bool:
        return bool(self._places or self._tensors)

    def keep(self, start: Snapshot) -> None:
        """Keep what a weak pass that has begun at `start` has left."""
        for holder, key, value in start.changes():
            self._places[_place(holder), key] = holder, value
        for tensor in start.written():
            self._tensors[id(tensor)] = tensor, tensor.detach().clone()

    def use(self, before: Snapshot, after: Snapshot) -> bool:
        """Put what was kept where the cond pass between two looks has changed nothing; tell if there is any."""
        used = False
        old = {_place(holder): contents for holder, contents in zip(before.walk.holders, before.contents, strict=True)}
        new = {_place(holder): contents for holder, contents in zip(after.walk.holders, after.contents, strict=True)}
        for (owner, key), (holder, value) in self._places.items():
            if old.get(owner, {}).get(key, _MISSING) is new.get(owner, {}).get(key, _MISSING):
                holder.write({**holder.read(), key: value})
                used = True
        writes = dict(zip(map(id, before.walk.tensors), before.writes, strict=True))
        later = dict(zip(map(id, after.walk.tensors), after.writes, strict=True))
        for tensor, copy in self._tensors.values():
            if id(tensor) in writes and writes[id(tensor)] == later.get(id(tensor)):
                with torch.no_grad():
                    tensor.copy_(copy)
                used = True
        return used


@contextmanager
def counted(parts: Mapping[str, nn.Module]) -> Iterator[set[str]]:
    """Note which of these modules run in this thread within a `with`, by their names."""
    run: set[str] = set()

    def noting(name: str) -> Action:
        def note(proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            run.add(name)
            return proceed(*args, **kwargs)

        return note

    with ExitStack() as stack:
        patches = [stack.enter_context(patched(module)) for module in parts.values()]
        stack.enter_context(pushed(patches, list(map(noting, parts))))
        yield run


def parts_of(model: nn.Module) -> dict[str, nn.Module]:
    """List what a step cache may leave out: the model's own parts, entries of lists, attention, and what these call.

    Not what lies inside attention: keys and values of a text may be kept, where the attention itself runs in each step.
    """
    found: dict[str, nn.Module] = {}

    def add(name: str, module: nn.Module) -> None:
        found[name] = module
        if not is_attention(module):
            found.update({f"{name}.{inner}": child for inner, child in module.named_children()})

    for name, module in model.named_modules():
        if not name or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            for inner, child in module.named_children():
                add(f"{name}.{inner}".lstrip("."), child)
        elif is_attention(module):
            add(name, module)
    return found


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
    return None if _library(function) in _LIBRARIES or _library(function) == "diffusers" else found


def _may_alter(hook: Any) -> bool:
    """Tell whether a hook may return something, or write into what it is given, by its code."""
    function = getattr(hook, "__func__", hook)
    code = getattr(function if hasattr(function, "__code__") else type(function).__call__, "__code__", None)
    if code is None:
        return True
    before = None
    for step in dis.get_instructions(code):
        is_none = before is not None and before.opname == "LOAD_CONST" and before.argval is None
        returns = (step.opname == "RETURN_VALUE" and not is_none) or (
            step.opname == "RETURN_CONST" and step.argval is not None
        )
        # By torch's names for it, or by an index.
        writes = (isinstance(step.argval, str) and step.argval.endswith("_") and not step.argval.endswith("__")) or (
            step.opname == "STORE_SUBSCR"
        )
        if returns or writes:
            return True
        before = step
    return False


def _mark(module: nn.Module) -> Hashable:
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    others = tuple(id(hook) for hook in hooks if _library(getattr(hook, "func", hook)) != "stg_hooks")
    forward = id(type(module).forward), id(replaced_forward(module)), is_compiled(module)
    return id(module), type(module), module.training, forward, others


def inspect_unwrapped(function: Any) -> Any:
    """Return what a decorator has wrapped, if any."""
    return getattr(function, "__wrapped__", None)


def _nothing(_: object) -> tuple[Any, ...]:
    return ()


_OWN_ATTRIBUTES: dict[type, set[str]] = {}


def _own_attributes(cls: type) -> set[str]:
    """Name what a module of torch has by its class; nothing for other classes, which may keep state anywhere."""
    if not cls.__module__.startswith("torch.nn.modules"):
        return set()
    if cls not in _OWN_ATTRIBUTES:
        annotated = {name for base in cls.__mro__ for name in inspect.get_annotations(base)}
        _OWN_ATTRIBUTES[cls] = annotated | _NO_STATE | {*getattr(cls, "__constants__", ())}
    return _OWN_ATTRIBUTES[cls]


def _place(holder: Holder) -> int:
    return id(holder.mapping if isinstance(holder, _Attributes) else holder.owner)


def _same(a: Contents, b: Contents) -> bool:
    def equal(x: object, y: object) -> bool:
        return x is y or (isinstance(x, _NUMBERS) and type(x) is type(y) and x == y)

    return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)


def _library(thing: Any) -> str:
    return str(getattr(thing, "__module__", None) or "").partition(".")[0]


def _module_of(function: Any) -> str:
    return str(getattr(function, "__module__", type(function).__module__))


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _is_data(value: object) -> bool:
    if isinstance(value, (*_NUMBERS, Tensor, dict, list, set, deque, tuple)):
        return True
    is_code = isinstance(value, (type, types.ModuleType, nn.Module)) or callable(value) or hasattr(value, "__get__")
    return not is_code and _library(type(value)) not in _CLASSES_KNOWN and hasattr(value, "__dict__")


def _globals_of(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _globals_of(constant)


def _has_tensors(value: object, depth: int = 4) -> bool:
    if isinstance(value, Tensor):
        return True
    if not depth or isinstance(value, _STATELESS):
        return False
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple, deque)) else ()
    return any(_has_tensors(one, depth - 1) for one in (*inner, *getattr(value, "__dict__", {}).values()))


def _get(owner: object, name: str) -> Any:
    try:
        return getattr(owner, name)
    except (AttributeError, ValueError):
        return _MISSING
