"""Replace `forward` on module instances, for one thread at a time, and put everything back.

A forward hook can change what a module returns but cannot keep it from computing, so a bypassed block needs its
`forward` replaced. However many sessions touch a module, it gets one replacement, which the last session removes.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

Action = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""What to do instead of `forward`: called with what would have run otherwise, and the call's arguments."""

T = TypeVar("T")
_MISSING = object()


class _Local(threading.local):
    # Class attribute: threads that never set it see it empty. A plain attribute, because torch.compile can trace
    # and guard it, which it cannot do with a context variable.
    actions: tuple[Action, ...] = ()


class Patch:
    """The replaced `forward` of one module, and what it does in the current thread."""

    def __init__(self) -> None:
        """Start without effect."""
        self._local = _Local()
        self._everywhere: tuple[Action, ...] = ()

    def push(self, action: Action) -> tuple[Action, ...]:
        """Let calls from this thread do this first; return what to pass to `restore`."""
        before = self._local.actions
        self._local.actions = (*before, action)
        return before

    def restore(self, actions: tuple[Action, ...]) -> None:
        """Go back to what calls from this thread did before `push`."""
        self._local.actions = actions

    @contextmanager
    def everywhere(self, action: Action) -> Iterator[None]:
        """Let calls from all threads do this first, within a `with` that may end in any order with others."""
        self._everywhere += (action,)
        try:
            yield
        finally:
            self._everywhere = tuple(other for other in self._everywhere if other is not action)

    def wrap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return a `forward` that does what has been chosen for the calling thread."""
        local, patch = self._local, self

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            actions = patch._everywhere + local.actions
            if not actions:
                return original(*args, **kwargs)
            return _run(actions, original, args, kwargs)

        return forward


def _run(
    actions: tuple[Action, ...], original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if not actions:
        return original(*args, **kwargs)

    def proceed(*args: Any, **kwargs: Any) -> Any:
        return _run(actions[:-1], original, args, kwargs)

    return actions[-1](proceed, args, kwargs)


@contextmanager
def pushed(patches: Sequence[Patch], actions: Sequence[Action]) -> Iterator[None]:
    """Let calls of several modules from this thread do something else within a `with`.

    Args:
        patches: the modules' patches.
        actions: one action for each.
    """
    before = [patch.push(action) for patch, action in zip(patches, actions, strict=True)]
    try:
        yield
    finally:
        for patch, actions_before in zip(patches, before, strict=True):
            patch.restore(actions_before)


@contextmanager
def patched(module: nn.Module) -> Iterator[Patch]:
    """Replace `forward` on a module instance, or share the replacement that is there already.

    Args:
        module: the module; its class stays untouched.

    Returns:
        A context manager that gives the patch, without effect until something is set.
    """

    def install() -> tuple[Patch, Undo]:
        patch = Patch()
        return patch, set_attribute(module, "forward", patch.wrap(module.forward))

    with shared(module, "forward", install) as patch:
        yield patch


Undo = Callable[[], None]


def set_attribute(owner: object, name: str, value: object) -> Undo:
    """Set an attribute on an instance, below any `__setattr__`.

    Args:
        owner: the instance.
        name: the attribute.
        value: its new value.

    Returns:
        A function that brings the instance's own attribute back, or removes it where it had none. If somebody has put
        another value on top in the meantime, that one stays: it usually holds ours and calls it.
    """
    before = owner.__dict__.get(name, _MISSING)
    owner.__dict__[name] = value

    def undo() -> None:
        if owner.__dict__.get(name) is not value:
            return
        if before is _MISSING:
            del owner.__dict__[name]
        else:
            owner.__dict__[name] = before

    return undo


@contextmanager
def shared(owner: object, what: str, install: Callable[[], tuple[T, Undo]]) -> Iterator[T]:
    """Keep something installed on an object while at least one `with` needs it, whichever of them ends last.

    Args:
        owner: the object that it is installed on.
        what: a name for the kind of thing.
        install: installs it and returns it together with a function that removes it.

    Returns:
        A context manager that gives what `install` returned to the first one who asked.
    """
    key = (id(owner), what)
    with _LOCK:
        if key not in _SHARED:
            _SHARED[key] = [*install(), 0]
        _SHARED[key][2] += 1
    try:
        yield _SHARED[key][0]
    finally:
        with _LOCK:
            entry = _SHARED[key]
            entry[2] -= 1
            if not entry[2]:
                del _SHARED[key]
                entry[1]()


_SHARED: dict[tuple[int, str], list[Any]] = {}
_LOCK = threading.RLock()
