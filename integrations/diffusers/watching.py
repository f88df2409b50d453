"""Be called back when a pipeline's run begins, and after each of its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from stg_hooks.hooks.forward import Undo, installed_once, set_attribute


class _Method:
    """Takes the place of a method that every run of a pipeline calls, and calls back first."""

    def __init__(self, pipeline: Any, name: str) -> None:
        self.callbacks: tuple[Callable[[], None], ...] = ()
        self._pipeline = pipeline
        self._name = name
        self._method = getattr(pipeline, name, lambda *_, **__: nullcontext())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._call_back()
        return self._method(*args, **kwargs)

    def _call_back(self) -> None:
        for callback in self.callbacks:
            callback()

    def __reduce__(self) -> tuple[Any, ...]:
        """Let copies and pickles of the pipeline have a plain one."""
        is_plain = getattr(self._method, "__self__", None) is self._pipeline
        plain = (getattr(type(self._pipeline), self._name), self._pipeline) if is_plain else (self._method,)
        return partial, plain


class _Bar(_Method):
    """A pipeline's `progress_bar`, which all runs make, and which they update after each step."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bar = super().__call__(*args, **kwargs)
        update = getattr(bar, "update", None)
        if callable(update) and hasattr(bar, "__dict__"):

            def checked(*args: Any, **kwargs: Any) -> Any:
                self._call_back()
                return update(*args, **kwargs)

            bar.update = checked
        return bar


@contextmanager
def _called_at(pipeline: Any, name: str, kind: type[_Method], callback: Callable[[], None]) -> Iterator[None]:
    """Call back whenever a pipeline calls a method of its own, within a `with`."""

    def install() -> tuple[_Method, Undo]:
        method = kind(pipeline, name)
        return method, set_attribute(pipeline, name, method)

    with installed_once(pipeline, name, install) as method:
        method.callbacks = (*method.callbacks, callback)
        try:
            yield
        finally:
            method.callbacks = tuple(other for other in method.callbacks if other != callback)


@contextmanager
def runs_watched(pipeline: Any, at_start: Callable[[], None], at_step: Callable[[], None]) -> Iterator[None]:
    """Call back at the start of each run of a pipeline, and after each of its steps, within a `with`."""
    with _called_at(pipeline, "check_inputs", _Method, at_start), _called_at(pipeline, "progress_bar", _Bar, at_step):
        yield
