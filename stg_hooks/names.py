"""Look up what a user names: a word of a table, with values in brackets (`"smoothed(sigma=10)"`), or their object."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from stg_hooks.errors import SettingError, closest

T = TypeVar("T")
_WITH_VALUES = re.compile(r"\s*([\w-]+)\s*\((.*)\)\s*", re.DOTALL)


def named(what: str, value: Any, table: Mapping[str, T], elsewhere: Mapping[str, str] | None = None) -> T:
    """Look up what a name stands for; a callable stands for itself.

    Args:
        what: the setting, for the error.
        value: what the user gave: a name in the table, which values may follow in brackets, or a callable.
        table: what there is, by name.
        elsewhere: names that other tools have for these, in lower case, and the name here.

    Returns:
        The callable, with these values in place of its own.

    Raises:
        SettingError: a name that is not in the table, values that it does not have, or something that is neither.
    """
    if isinstance(value, str):
        name, values = _read(value)
        if name not in table:
            names = ", ".join(map(repr, table))
            ours = (elsewhere or {}).get(name.lower().replace("_", "-"))
            hint = f" Here it is called {what}={ours!r}." if ours else closest(name, table)
            raise SettingError(f"unknown {what} {value!r}; choose from {names}, or pass a callable.{hint}")
        if values is None:
            there = _values_of(table[name])
            how = f"Write them by their names, as in {what}={spelt(name, there)!r}" if there else f"{name!r} has none"
            raise SettingError(f"{what}={value!r}: cannot read the values in brackets. {how}.")
        return _with(f"{what}={value!r}", name, table[name], dict(values)) if values else table[name]
    if isinstance(value, type):
        raise SettingError(f"{what}={value.__name__} is a class: pass an object, {value.__name__}(...).")
    if not callable(value):
        raise SettingError(f"{what}={value!r}: expected a name or a callable, not {type(value).__name__}.")
    return cast(T, value)


def spelt(name: str, values: Mapping[str, Any]) -> str:
    """Write a name with its values, as `named` reads it."""
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in values.items())})" if values else name


@functools.lru_cache(maxsize=256)
def _read(text: str) -> tuple[str, tuple[tuple[str, Any], ...] | None]:
    """Take a name and its values apart; the latter are `None` where they cannot be read."""
    found = _WITH_VALUES.fullmatch(text)
    if found is None:
        return text, ()
    try:
        call = cast("ast.Call", ast.parse(f"f({found[2]})", mode="eval").body)
        if call.args or not all(keyword.arg for keyword in call.keywords):
            raise ValueError
        return found[1], tuple((str(keyword.arg), ast.literal_eval(keyword.value)) for keyword in call.keywords)
    except (ValueError, SyntaxError, AttributeError):
        return found[1], None


def _values_of(found: Any) -> dict[str, Any]:
    """Return what can be set in what a name stands for: fields of a dataclass, a function's arguments by name alone."""
    if dataclasses.is_dataclass(found):
        return {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    parameters = inspect.signature(found).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def _with(asked: str, name: str, found: Any, values: dict[str, Any]) -> Any:
    """Put values in the place of those that something has."""
    names = list(_values_of(found))
    for key in values:
        if key not in names:
            there = f"choose from {', '.join(names)}" if names else "it has none"
            raise SettingError(f"{asked}: {name!r} has no value {key!r}; {there}.{closest(key, names)}")
    if dataclasses.is_dataclass(found):
        return dataclasses.replace(cast(Any, found), **values)
    return functools.partial(found, **values)
