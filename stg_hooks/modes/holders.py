"""Where code holds a function: in lists and dictionaries, classes, objects, default arguments and closures."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

_LARGE = 1000  # entries of lists and dictionaries that are not looked into
_DEEP = 3  # of containers in containers
_NOT_OURS = frozenset({"_parameters", "_buffers", "_modules"})


@dataclasses.dataclass(frozen=True)
class Slot:
    """One place that holds a value."""

    owner: Any
    """A dictionary, list, class or cell; a function, for a default argument; a `Slot` that holds a tuple."""
    name: Any

    @property
    def key(self) -> Hashable:
        """Tells it from other places, as long as what holds it lives."""
        return (self.owner.key if isinstance(self.owner, Slot) else id(self.owner)), self.name

    def read(self) -> Any:
        """Return what it holds; `None` where there is nothing any more."""
        owner, name = self.owner, self.name
        try:
            if isinstance(owner, types.CellType):
                return owner.cell_contents
            if isinstance(owner, type):
                return vars(owner)[name]
            return self._tuple()[name] if isinstance(owner, (Slot, types.FunctionType)) else owner[name]
        except (LookupError, TypeError, ValueError):  # ValueError: an empty cell
            return None

    def write(self, value: Any) -> None:
        """Put something else there."""
        owner, name = self.owner, self.name
        if isinstance(owner, types.CellType):
            owner.cell_contents = value
        elif isinstance(owner, type):
            setattr(owner, name, value)
        elif isinstance(owner, (Slot, types.FunctionType)):
            found = list(self._tuple())
            found[name] = value
            if isinstance(owner, Slot):
                owner.write(tuple(found))
            else:
                owner.__defaults__ = tuple(found)
        else:
            owner[name] = value

    def _tuple(self) -> tuple[Any, ...]:
        found: tuple[Any, ...] = self.owner.read() if isinstance(self.owner, Slot) else self.owner.__defaults__
        return found


def plain(value: Any) -> Any:
    """Return the function that a value calls in the end: of a `partial`, a static method, a compiled function."""
    value = called(value)
    return getattr(value, "_torchdynamo_orig_callable", value) if type(value) is types.FunctionType else value


def called(value: Any) -> Any:
    """Return what `with_another` replaces: the function inside, still compiled where it was."""
    while type(value) in (functools.partial, staticmethod):  # and not `isinstance`, which asks objects of others
        value = value.func if type(value) is functools.partial else value.__func__
    return value


def with_another(value: Any, function: Callable[..., Any]) -> Any:
    """Make what a value is with another function in it."""
    if type(value) is functools.partial:
        return functools.partial(with_another(value.func, function), *value.args, **value.keywords)
    if type(value) is staticmethod:
        return staticmethod(with_another(value.__func__, function))
    return function


def slots_in(
    roots: Iterable[Any],
    read: Callable[[Slot], Any],
    is_wanted: Callable[[Any], bool],
    is_own: Callable[[str], bool],
) -> Iterator[tuple[Slot, Any]]:
    """Find the places below some roots that hold something wanted.

    Args:
        roots: dictionaries, as namespaces are; functions, classes.
        read: tells what a place holds.
        is_wanted: tells what is looked for.
        is_own: tells by the name of a module whether its functions, classes and objects are looked into.

    Yields:
        Each place, and what it holds.
    """
    seen: set[int] = set()

    def look(owner: Any, depth: int, of: Slot | None = None) -> Iterator[tuple[Slot, Any]]:
        if id(owner) in seen:
            return
        seen.add(id(owner))
        for slot in _slots(owner, of):
            value = read(slot)
            if is_wanted(value):
                yield slot, value
            elif depth and _is_container(value, is_own):
                yield from look(value, depth - 1, slot)

    for root in roots:
        yield from look(root, _DEEP)


def _slots(owner: Any, of: Slot | None) -> Iterator[Slot]:
    kind = type(owner)
    if issubclass(kind, dict):
        yield from (Slot(owner, name) for name in list(owner) if name not in _NOT_OURS)
    elif issubclass(kind, list):
        yield from (Slot(owner, i) for i in range(len(owner)))
    elif kind is tuple and of is not None:
        yield from (Slot(of, i) for i in range(len(owner)))
    elif kind is types.FunctionType:
        yield from (Slot(owner, i) for i in range(len(owner.__defaults__ or ())))
        yield from (Slot(owner.__kwdefaults__, name) for name in owner.__kwdefaults__ or ())
        yield from (Slot(cell, "cell") for cell in owner.__closure__ or ())
    elif issubclass(kind, type):
        yield from (Slot(owner, name) for name in list(vars(owner)) if not name.startswith("__") or name == "__call__")
    elif kind is staticmethod:
        yield from _slots(owner.__func__, of)
    elif type(getattr(owner, "__dict__", None)) is dict:
        yield from (Slot(vars(owner), name) for name in list(vars(owner)))


def _is_container(value: Any, is_own: Callable[[str], bool]) -> bool:
    kind = type(value)
    if issubclass(kind, (dict, list)) or kind is tuple:
        return 0 < len(value) <= _LARGE
    if issubclass(kind, (Tensor, nn.Module, types.ModuleType)):
        return False
    home = value.__func__ if kind is staticmethod else value
    home = home if type(home) is types.FunctionType or isinstance(home, type) else kind
    return is_own(str(getattr(home, "__module__", "")))
