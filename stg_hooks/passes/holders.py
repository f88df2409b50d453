"""What holds the values that a model keeps, read and written in one way: attributes, globals, lists, ..."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

MISSING = object()

Contents = dict[Any, Any]


class Attributes:
    """A dictionary, or the attributes of an object or a module."""

    def __init__(self, mapping: dict[Any, Any], apart: Iterable[str] = ()) -> None:
        self.mapping, self.apart = mapping, frozenset(apart)

    def getter(self) -> Callable[[dict[Any, Any]], tuple[Any, ...]]:
        """Return what reads its values as fast as can be."""
        names = [name for name in list(self.mapping) if name not in self.apart]
        if len(names) < 2:
            return operator.itemgetter(names[0], names[0]) if names else _nothing
        return operator.itemgetter(*names)

    def read(self) -> Contents:
        """Return what it holds, by name or place."""
        # In one step: other threads may install something on the same module meanwhile.
        return {k: v for k, v in dict(self.mapping).items() if k not in self.apart}

    def write(self, contents: Contents) -> None:
        """Make it hold this again, and nothing else."""
        for key in [key for key in list(self.mapping) if key not in self.apart and key not in contents]:
            del self.mapping[key]
        for key, value in contents.items():
            self.mapping[key] = value


class Named:
    """Some attributes of an object: of a closure's cell, a class, an object with slots, a module of Python."""

    def __init__(self, owner: object, names: tuple[str, ...]) -> None:
        self.owner, self.names = owner, names

    def values(self) -> list[Any]:
        """List what it holds."""
        return [_get(self.owner, name) for name in self.names]

    def read(self) -> Contents:
        """Return what it holds, by name or place."""
        return dict(zip(self.names, self.values(), strict=True))

    def write(self, contents: Contents) -> None:
        """Make it hold this again, and nothing else."""
        for name, value in contents.items():
            if value is MISSING:
                if _get(self.owner, name) is not MISSING:
                    delattr(self.owner, name)
            else:
                setattr(self.owner, name, value)


class Globals(Named):
    """Some names of a Python module."""

    owner: dict[str, Any]

    def values(self) -> list[Any]:
        """List what it holds."""
        return [self.owner.get(name, MISSING) for name in self.names]

    def write(self, contents: Contents) -> None:
        """Make it hold this again, and nothing else."""
        for name, value in contents.items():
            if value is MISSING:
                self.owner.pop(name, None)
            else:
                self.owner[name] = value


class Items:
    """A list, a deque or a set."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def values(self) -> list[Any]:
        """List what it holds."""
        return list(self.owner)

    def read(self) -> Contents:
        """Return what it holds, by name or place."""
        return dict(enumerate(self.owner))

    def write(self, contents: Contents) -> None:
        """Make it hold this again, and nothing else."""
        self.owner.clear()
        add = self.owner.update if isinstance(self.owner, set) else self.owner.extend
        add(contents.values())


Holder = Attributes | Named | Items


def _nothing(_: object) -> tuple[Any, ...]:
    return ()


def _get(owner: object, name: str) -> Any:
    try:
        return getattr(owner, name)
    except (AttributeError, ValueError):
        return MISSING
