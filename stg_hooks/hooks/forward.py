"""Replace `forward` on module instances, for one thread at a time, and put everything back.

A forward hook can change what a module returns but cannot keep it from computing, so a bypassed block needs its
`forward` replaced. However many sessions touch a module, it gets one replacement, which the last session removes.
Copies and pickles that are made meanwhile get none: they are of the module as it was.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from torch import nn

from stg_hooks.errors import CallError
from stg_hooks.hooks.compiled import is_compiled

Action = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""What to do instead of `forward`: called with what would have run otherwise, and the call's arguments."""

T = TypeVar("T")
_MISSING = object()
_CLOCK = itertools.count(1)


def now() -> int:
    """Return a number that is higher than all before, to tell which came first."""
    return next(_CLOCK)


class _Local(threading.local):
    # Plain attributes, because torch.compile can trace and guard them, which it cannot do with a context variable;
    # and on the instance, because it cannot guard one that appears while it traces.
    def __init__(self) -> None:
        self.around: tuple[Action, ...] = ()
        self.instead: Action | None = None
        self.since = 0


class Patch:
    """The replaced `forward` of one module, and what it does in the current thread.

    Any number of actions go around `forward`, the last one first. At the bottom, at most one takes its place.
    """

    def __init__(self) -> None:
        """Start without effect."""
        self._local = _Local()
        self._everywhere: tuple[Action, ...] = ()
        self._place: tuple[nn.Module, str, Callable[..., Any]] | None = None
        self._again: list[Undo] = []

    @contextmanager
    def _placed(self, module: nn.Module, name: str, forward: Callable[..., Any]) -> Iterator[None]:
        self._place = module, name, forward
        try:
            yield
        finally:
            self._place = None  # a cycle, which would keep the module alive
            while self._again:
                self._again.pop()()

    def is_lost(self) -> bool:
        """Tell whether what was there before has been put back, and calls of the module do not come here any more.

        Pipelines of diffusers with `enable_model_cpu_offload` do that to their models at the end of each run.
        """
        if self._place is None or self.is_in_place():
            return False
        module, name, forward = self._place
        found = getattr(module, name)
        while getattr(found, "__func__", None) is not type(module).forward:
            if found is forward or not hasattr(found, "__wrapped__"):
                return False  # on top of ours, or not known
            found = found.__wrapped__
        return True

    def check(self, *_: Any) -> None:
        """Raise where it is lost; may be called as a hook.

        Raises:
            CallError: it is.
        """
        if self.is_lost() and self._place is not None:
            raise CallError(
                f"something else has put back the forward of {type(self._place[0]).__name__} inside the `with`, as "
                "pipelines with model offloading do at the end of each run, so nothing would be skipped any more. "
                "Enter the `with` anew for each run."
            )

    def bring_back(self) -> bool:
        """Install again where it is lost, for calls to come; tell whether that was so."""
        if not self.is_lost() or self._place is None:
            return False
        module, name, _ = self._place
        again = self.wrap(getattr(module, name))
        self._again.append(set_attribute(module, name, again))
        self._place = module, name, again
        return True

    def is_in_place(self) -> bool:
        """Tell whether calls of the module still come here first."""
        if self._place is None:
            return False
        module, name, forward = self._place
        return module.__dict__.get(name) is forward

    @contextmanager
    def everywhere(self, action: Action) -> Iterator[None]:
        """Let calls from all threads do this first, within a `with` that may end in any order with others."""
        with _LOCK:
            self._everywhere += (action,)
        try:
            yield
        finally:
            with _LOCK:
                self._everywhere = tuple(other for other in self._everywhere if other is not action)

    def replace(self, action: Action, since: int) -> tuple[Action | None, int]:
        """Let calls from this thread do this in place of `forward`; return what to pass to `put_back`.

        Args:
            action: what to do; it is given the real `forward`, not what another action would do in its place.
            since: when this was asked for (`now`); what has been asked for later stays.
        """
        before = self._local.instead, self._local.since
        if since >= self._local.since:
            self._local.instead, self._local.since = action, since
        return before

    def put_back(self, before: tuple[Action | None, int]) -> None:
        """Go back to what stood in place of `forward` before `replace`."""
        self._local.instead, self._local.since = before

    def wrap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return a `forward` that does what has been chosen for the calling thread."""
        local, patch = self._local, self

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            actions, instead = patch._everywhere + local.around, local.instead
            if len(actions) == 1 and instead is None:
                return actions[0](original, args, kwargs)
            if actions:
                return _run(actions, original, instead, args, kwargs)
            if instead is not None:
                return instead(original, args, kwargs)
            return original(*args, **kwargs)

        return forward


def _run(
    actions: tuple[Action, ...],
    original: Callable[..., Any],
    instead: Action | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    def proceed(*args: Any, **kwargs: Any) -> Any:
        if len(actions) > 1:
            return _run(actions[:-1], original, instead, args, kwargs)
        return original(*args, **kwargs) if instead is None else instead(original, args, kwargs)

    return actions[-1](proceed, args, kwargs)


@contextmanager
def pushed(patches: Sequence[Patch], actions: Sequence[Action]) -> Iterator[None]:
    """Let calls of several modules from this thread do something else within a `with`.

    Args:
        patches: the modules' patches.
        actions: one action for each.
    """
    places = [patch._local for patch in patches]
    before = [place.around for place in places]
    try:
        for place, others, action in zip(places, before, actions, strict=True):
            place.around = (*others, action)
        yield
    finally:
        for place, others in zip(places, before, strict=True):
            place.around = others


@contextmanager
def set_aside(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let calls of modules from this thread, within a `with`, do nothing of what was chosen for them."""
    with _LOCK:
        entries = [_SHARED[key] for module in modules if (key := (id(module), "forward")) in _SHARED]
    patches: list[Patch] = [entry[0] for entry in entries]
    before = [(patch._local.around, patch._local.instead, patch._local.since) for patch in patches]
    try:
        for patch in patches:
            patch._local.around, patch._local.instead, patch._local.since = (), None, 0
        yield
    finally:
        for patch, state in zip(patches, before, strict=True):
            patch._local.around, patch._local.instead, patch._local.since = state


@contextmanager
def patched(module: nn.Module) -> Iterator[Patch]:
    """Replace `forward` on a module instance, or share the replacement that is there already.

    Of a module that was compiled in place, the compiled call is replaced instead, so that what we do stays outside.

    Args:
        module: the module; its class stays untouched.

    Returns:
        A context manager that gives the patch, without effect until something is set.
    """

    def install() -> tuple[Patch, Undo]:
        patch = Patch()
        name = "_compiled_call_impl" if is_compiled(module) else "forward"
        forward = patch.wrap(getattr(module, name))
        with ExitStack() as stack:
            stack.callback(set_attribute(module, "__getstate__", _plain_state(module, name, forward)))
            stack.callback(set_attribute(module, name, forward))
            stack.enter_context(patch._placed(module, name, forward))
            return patch, stack.pop_all().close

    with installed_once(module, "forward", install) as patch:
        yield patch


def _plain_state(module: nn.Module, name: str, forward: Callable[..., Any]) -> Callable[[], Any]:
    """Let deep copies and pickles of a module be made as if nothing had been installed on it."""
    # A copied `forward` would go on calling the original module, with the original's weights.
    get_state: Callable[[], Any] = module.__getstate__
    before = {key: module.__dict__[key] for key in (name, "__getstate__") if key in module.__dict__}

    def plain() -> Any:
        state = get_state()
        if isinstance(state, dict):
            for key in (name, "__getstate__"):
                if state.get(key) is forward or _is_ours(state.get(key)):
                    del state[key]
                    state.update({key: before[key]} if key in before else {})
            hooks = {key: value for key, value in state.items() if key.startswith("_forward_")}
            ours = {number for entries in hooks.values() for number, hook in entries.items() if _is_ours(hook)}
            for key, entries in hooks.items():
                state[key] = type(entries)((number, hook) for number, hook in entries.items() if number not in ours)
        return state

    return plain


def _is_ours(hook: object) -> bool:
    return str(getattr(hook, "__module__", "")).partition(".")[0] == __name__.partition(".")[0]


Undo = Callable[[], None]


def set_attribute(owner: object, name: str, value: object) -> Undo:
    """Set an attribute on an instance, below any `__setattr__`.

    Args:
        owner: the instance.
        name: the attribute.
        value: its new value.

    Returns:
        A function that brings the instance's own attribute back, or removes it where it had none. Where other
        code has put a value on top in the meantime, that one stays: it usually holds ours and calls it.
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
def installed_once(owner: object, what: str, install: Callable[[], tuple[T, Undo]]) -> Iterator[T]:
    """Keep something installed on an object while at least one `with` needs it, whichever of them ends last.

    Args:
        owner: the object that it is installed on.
        what: a name for the kind of thing.
        install: installs it and returns it together with a function that removes it.

    Returns:
        A context manager that gives what `install` returned the first time.
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
