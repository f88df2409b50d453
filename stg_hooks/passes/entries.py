"""Numbers, words and lists of them that a module sets in dictionaries that it is given, as ComfyUI's U-Nets do.

Such an entry tells later code something. It is recorded and set again where a module answers from the record.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from typing import Any, TypeAlias

from stg_hooks.model.tensors import leaves_of

Entry: TypeAlias = tuple[int, Hashable, Any]
"""Which of the dictionaries among the arguments, key and value."""
_MISSING = object()


class Entries:
    """The entries of the dictionaries among a module's arguments, before it runs."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at the arguments of a call.

        Args:
            args: its positional arguments.
            kwargs: its keyword arguments.
        """
        self._dicts = _dicts(args, kwargs)
        self._before = [{key: list(v) if type(v) is list else v for key, v in one.items()} for one in self._dicts]

    def set_since(self) -> list[Entry] | None:
        """List the numbers and words that were set since; `None` where such an entry was taken out, or made another."""
        found: list[Entry] = []
        for i, (now, before) in enumerate(zip(self._dicts, self._before, strict=True)):
            for key, old in before.items():
                if _is_plain(old) and not _is_plain(now.get(key, _MISSING)):
                    return None
            for key, value in now.items():
                old = before.get(key, _MISSING)
                if _is_plain(value) and (type(old) is not type(value) or old != value):
                    if old is not _MISSING and not _is_plain(old):
                        return None
                    found.append((i, key, copy.deepcopy(value)))
        return found


def set_again(entries: Sequence[Entry], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Set entries in the dictionaries among the arguments of another call."""
    dicts = _dicts(args, kwargs)
    for i, key, value in entries:
        dicts[i][key] = copy.deepcopy(value)


def other_leaves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """List the leaves of a call's arguments without these entries, so that the places of the others do not change."""
    return leaves_of(tuple(map(_without, args)), {name: _without(value) for name, value in kwargs.items()})


def _dicts(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[dict[Hashable, Any]]:
    return [value for value in (*args, *kwargs.values()) if type(value) is dict]


def _without(value: Any) -> Any:
    return {key: one for key, one in value.items() if not _is_plain(one)} if type(value) is dict else value


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
