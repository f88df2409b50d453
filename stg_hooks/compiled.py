"""See what torch.compile has compiled: what we do at a module has to stay outside, where it is not traced."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn


def is_compiled(module: nn.Module) -> bool:
    """Tell whether calls of a module are compiled, its hooks included (`module.compile()`)."""
    return getattr(module, "_compiled_call_impl", None) is not None


def surrounding(model: nn.Module, units: Collection[nn.Module]) -> list[nn.Module]:
    """List the modules that call units from within, however deep."""
    wanted, found = {id(unit) for unit in units}, []

    def holds(module: nn.Module) -> bool:
        children = [holds(child) for child in module.children()]  # all of them, so that each is looked at
        inside = any(children)
        if inside:
            found.append(module)
        return inside or id(module) in wanted

    holds(model)
    return found


def compiled_among(modules: Collection[nn.Module]) -> nn.Module | None:
    """Find one that is compiled together with what is in it: in place, or by `torch.compile(module)`."""
    return next((module for module in modules if is_compiled(module) or "_orig_mod" in module._modules), None)


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep torch.compile out of a function that is called from what was compiled after all."""
    if "torch._dynamo" not in sys.modules:  # which takes a second to import
        return function
    reason = "stg_hooks guides this model from outside: compile it before stg.apply(), and pass what is compiled to it."
    disabled: Callable[..., Any] = torch.compiler.disable(function, reason=reason)
    return disabled
