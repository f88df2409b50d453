"""Settings as JSON can hold them: lists, numbers, and names of functions."""

from __future__ import annotations

import dataclasses
import functools
import json
import numbers
import re
import sys
from collections.abc import Mapping
from typing import Any

from stg_hooks.errors import SettingError
from stg_hooks.guidance.rules import RULES
from stg_hooks.guidance.scales import NAMED
from stg_hooks.guidance.settings import Branch
from stg_hooks.model.resolve import REGEX
from stg_hooks.modes.modes import Custom
from stg_hooks.modes.perturbation import Perturbation
from stg_hooks.names import named, spelt

_SHOWN = 100  # characters of a value, in messages
_OBJECTS = ("scale", "mode", "rule", "schedule")  # may be given as an object of a module, by its name


def written(name: str, value: Any) -> Any:
    """Return what a setting is in JSON; `read` turns it back.

    Args:
        name: of the setting.
        value: what a user gave.

    Returns:
        Lists, dictionaries, numbers, strings and `None`. A branch becomes a dictionary, a range a list, and a function
        its name, `"module:function"`.

    Raises:
        SettingError: JSON cannot hold it.
    """
    plain = _written(value)
    try:
        json.dumps(plain)
    except (TypeError, ValueError) as error:
        raise SettingError(
            f"{name}={_shown(value)} cannot be saved as JSON, as these settings are: {error}. Give numbers, strings, "
            "lists of them, stg.Branch, or a function that a module has under its name (a lambda has none)."
        ) from error
    return plain


def read(name: str, plain: Any) -> Any:
    """Return a setting that `written` has returned, as it was.

    A name of a function is looked up in modules that have been imported, and none is imported for it: a file of
    settings that comes from elsewhere runs nothing new.

    Args:
        name: of the setting.
        plain: what JSON held.

    Returns:
        What it stands for.

    Raises:
        SettingError: there is no such function, or a branch has something that branches do not have.
    """
    if name == "branches" and isinstance(plain, list):
        return [_branch(one) for one in plain]
    if name == "schedule" and isinstance(plain, list):
        return [(pair[0], _values(pair[1])) if _is_pair(pair) else pair for pair in plain]
    if name == "layers" and isinstance(plain, Mapping):  # of a mode each; in JSON, numbers are text there
        return {
            _number(key): read("layers" if isinstance(mode, Mapping) else "mode", mode) for key, mode in plain.items()
        }
    if name in NAMED and isinstance(plain, str) and "(" in plain:
        return named(name, plain, NAMED[name])
    if name in _OBJECTS and isinstance(plain, str) and ":" in plain:
        return _found(name, plain)
    return plain


def _written(value: Any) -> Any:
    if isinstance(value, Branch):
        return {field.name: _written(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {_written(key): _written(one) for key, one in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [_written(one) for one in value]
    if isinstance(value, Perturbation) and not isinstance(value, Custom):
        return value.spelling
    for name, usual in ((name, usual) for table in NAMED.values() for name, usual in table.items()):
        if type(value) is type(usual):
            return spelt(name, dataclasses.asdict(value))
    if isinstance(value, functools.partial) and not value.args:
        names = [name for name, rule in RULES.items() if rule is value.func]
        return spelt(names[0], value.keywords) if names else value
    if isinstance(value, re.Pattern) and isinstance(value.pattern, str):
        return REGEX + _with_flags(value)
    if isinstance(value, (bool, float)):
        return value
    if isinstance(value, numbers.Real):  # NumPy's, too
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    name = f"{getattr(value, '__module__', None)}:{getattr(value, '__qualname__', None)}"
    return name if callable(value) and _lookup(name) is value else value


def _with_flags(pattern: re.Pattern[str]) -> str:
    """Write a regular expression with the flags it was compiled with, which text has to hold itself."""
    flags = "".join(letter for letter in "aimsx" if pattern.flags & re.RegexFlag[letter.upper()])
    return f"(?{flags}){pattern.pattern}" if flags else pattern.pattern


def _shown(value: object) -> str:
    first, *more = str(value if isinstance(value, str) else repr(value)).splitlines() or [""]
    return first[:_SHOWN] + ("..." if more or len(first) > _SHOWN else "")


def _number(key: Any) -> Any:
    return int(key) if isinstance(key, str) and key.removeprefix("-").isdecimal() else key


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2


def _values(values: Any) -> Any:
    return {key: read(key, one) for key, one in values.items()} if isinstance(values, Mapping) else values


def _branch(plain: Any) -> Any:
    if not isinstance(plain, Mapping):
        return plain
    try:
        return Branch(**_values(plain))
    except TypeError as error:
        names = ", ".join(field.name for field in dataclasses.fields(Branch))
        raise SettingError(f"branches= holds {dict(plain)!r}: expected {names}.") from error


def _lookup(name: str) -> Any:
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


def _found(setting: str, name: str) -> Any:
    found = _lookup(name)
    if found is None:
        module = name.partition(":")[0]
        why = "has nothing of this name" if module in sys.modules else f"is not imported: import {module} first"
        raise SettingError(f"{setting}={name!r} is a function of the module {module}, which {why}.")
    return found
