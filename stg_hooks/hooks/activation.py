"""Know whether a `with` block is in force where a call is made: in its own thread or task, or in the whole process."""

from __future__ import annotations

import dataclasses
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from stg_hooks.checks import check_choice
from stg_hooks.errors import StgWarning, users_frame

SCOPES = ("context", "process")

ENTER_THERE = (
    "Pass scope='process' to have it in force in every thread and task while the `with` is open, or enter the `with` "
    "in the thread that makes the calls."
)


Held = TypeVar("Held")


@dataclasses.dataclass(eq=False)
class Entry:
    """One `with`: what it puts in force, until it is left; contexts that outlive it keep nothing alive."""

    session: object | None


# A context variable, so that another thread or task sees none of this, while a task that is started inside the `with`
# inherits it, as `asyncio.to_thread` does.
_ACTIVE: ContextVar[tuple[Entry, ...]] = ContextVar("stg_hooks_active", default=())
# What is in force in every thread and task. The tuple is replaced, never changed: calls read it without the lock.
_EVERYWHERE: tuple[Entry, ...] = ()
_LOCK = threading.Lock()


def check_scope(scope: str) -> str:
    """Return the name of a scope.

    Raises:
        SettingError: an unknown name.
    """
    check_choice(f"scope={scope!r}", scope, SCOPES)
    return scope


def enter(session: object, scope: str = "context") -> Entry:
    """Put a session in force, here or everywhere; return what to pass to `leave`."""
    global _EVERYWHERE
    entry = Entry(session)
    if scope == "process":
        with _LOCK:
            _EVERYWHERE = (*_EVERYWHERE, entry)
    else:
        _ACTIVE.set((*_open(), entry))
    return entry


def leave(entry: Entry) -> None:
    """Undo one `enter`, from any thread or task: a generator may be closed elsewhere than it was started."""
    global _EVERYWHERE
    entry.session = None
    active = list(_ACTIVE.get())  # loops, as an interrupt comes between calls of functions only
    for position in reversed(range(len(active))):
        if active[position].session is None:
            del active[position]
    _ACTIVE.set(tuple(active))
    with _LOCK:
        everywhere = list(_EVERYWHERE)
        for position in reversed(range(len(everywhere))):
            if everywhere[position] is entry:
                del everywhere[position]
        _EVERYWHERE = tuple(everywhere)


def _open() -> tuple[Entry, ...]:
    return tuple(entry for entry in _ACTIVE.get() if entry.session is not None)


def innermost(entered: Sequence[tuple[Entry, Held]]) -> tuple[Entry, Held] | None:
    """Find the last of some `with` blocks that is in force here."""
    found = None
    for block in tuple(entered):  # which other threads leave meanwhile; a loop, as in `leave`
        for entry in (*_ACTIVE.get(), *_EVERYWHERE):
            if entry is block[0] and entry.session is not None:
                found = block
    return found


def is_active(session: object) -> bool:
    """Tell whether a session is in force here."""
    return any(entry.session is session for entry in (*_ACTIVE.get(), *_EVERYWHERE))


def others(session: object) -> list[object]:
    """List the other sessions that are in force here."""
    found = [entry.session for entry in (*_ACTIVE.get(), *_EVERYWHERE)]
    return [other for other in found if other is not None and other is not session]


@contextmanager
def entered(session: object) -> Iterator[None]:
    """Mark a session as in force within a `with`."""
    entry = enter(session)
    try:
        yield
    finally:
        leave(entry)


def unless_entered(owner: object, call: str, outcome: str) -> weakref.finalize[..., object]:
    """Warn when something that is meant for a `with` is dropped, or still held at the end, without having been entered.

    Args:
        owner: what is to be entered.
        call: how its user made it, for the message.
        outcome: what it has done, for the message.

    Returns:
        What to `detach` on entering.
    """
    frame = users_frame(sys._getframe(1))
    place = ("", 0) if frame is None else (frame.f_code.co_filename, frame.f_lineno)
    text = f"{call}(...) was made but never entered, so it {outcome}. Write: with {call}(...):"
    return weakref.finalize(owner, warnings.warn_explicit, text, StgWarning, *place)
