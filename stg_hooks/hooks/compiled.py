"""See what torch.compile has compiled: what we do at a module has to stay outside, where it is not traced."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def is_compiled(module: nn.Module) -> bool:
    """Tell whether calls of a module are compiled, its hooks included (`module.compile()`)."""
    return getattr(module, "_compiled_call_impl", None) is not None


def surrounding(model: nn.Module, units: Collection[nn.Module]) -> list[nn.Module]:
    """List the modules that call units from within, however deep."""
    found: list[nn.Module] = []
    _holds_one(model, {id(unit) for unit in units}, found)
    return found


def _holds_one(module: nn.Module, wanted: set[int], found: list[nn.Module]) -> bool:
    children = [_holds_one(child, wanted, found) for child in module.children()]  # each is looked at
    if any(children):
        found.append(module)
    return any(children) or id(module) in wanted


def compiled_among(modules: Collection[nn.Module]) -> nn.Module | None:
    """Find one that is compiled together with what is in it: in place, or by `torch.compile(module)`."""
    return next((module for module in modules if is_compiled(module) or "_orig_mod" in module._modules), None)


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep torch.compile out of a function that is called from what was compiled after all."""
    if "torch._dynamo" not in sys.modules:  # which takes a second to import
        return function
    reason = "stg_hooks guides this model from outside: compile it before stg.apply(), and pass what is compiled to it."
    takes_reason = "reason" in inspect.signature(torch.compiler.disable).parameters  # from torch 2.8 on
    disabled: Callable[..., Any] = torch.compiler.disable(function, **({"reason": reason} if takes_reason else {}))

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        # What is disabled costs some time even where nothing is compiled.
        return (disabled if torch.compiler.is_compiling() else function)(*args, **kwargs)

    return call


@contextmanager
def eagerly() -> Iterator[None]:
    """Have nothing compiled within a `with`, for a call that is made once; needs torch 2.6."""
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):
        yield
        return
    # All threads have one stance: the first one sets it, and the last one puts back what was there before.
    with _LOCK:
        stance: Any = _STANCES[0] if _STANCES else torch.compiler.set_stance("force_eager")
        _STANCES.append(stance)
    try:
        yield
    finally:
        with _LOCK:
            if len(_STANCES) == 1:
                stance.__exit__(None, None, None)
            _STANCES.pop()


_STANCES: list[Any] = []
_LOCK = threading.Lock()
