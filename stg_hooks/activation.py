"""Know whether a `with` block is in force in the current thread or asyncio task."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

# A context variable, so that another thread or task sees none of this, while a task that is started inside the `with`
# inherits it, as `asyncio.to_thread` does.
_ACTIVE: ContextVar[tuple[object, ...]] = ContextVar("stg_hooks_active", default=())


def enter(session: object) -> None:
    """Mark a session as in force here."""
    _ACTIVE.set((*_ACTIVE.get(), session))


def leave(session: object) -> None:
    """Undo one `enter`; does nothing where the session is not in force (an abandoned generator, say)."""
    active = list(_ACTIVE.get())
    for position in reversed(range(len(active))):
        if active[position] is session:
            del active[position]
            _ACTIVE.set(tuple(active))
            return


def is_active(session: object) -> bool:
    """Tell whether a session is in force here."""
    return any(other is session for other in _ACTIVE.get())


def others(session: object) -> list[object]:
    """List the other sessions that are in force here."""
    return [other for other in _ACTIVE.get() if other is not session]


@contextmanager
def entered(session: object) -> Iterator[None]:
    """Mark a session as in force within a `with`."""
    enter(session)
    try:
        yield
    finally:
        leave(session)
