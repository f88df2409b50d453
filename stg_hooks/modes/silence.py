"""Modules that give zero in single calls of the layer that they are in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stg_hooks.hooks.forward import Action, Patch, patched, pushed


class Silence:
    """Some modules of one layer: installed once, then silenced in single calls of the layer."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        """Take the modules; touch nothing."""
        self.modules = list(modules)
        self._patches: dict[int, Patch] = {}
        self._known: dict[Any, tuple[torch.Size, torch.dtype]] = {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replace `forward` of the modules, without effect until a call asks for it."""
        with ExitStack() as stack:
            self._patches = {id(module): stack.enter_context(patched(module)) for module in self.modules}
            yield

    @contextmanager
    def doing(
        self, action: Callable[[nn.Module], Action], modules: Sequence[nn.Module] | None = None
    ) -> Iterator[None]:
        """Let modules do something else in calls from this thread within a `with`.

        Args:
            action: returns what a module does instead.
            modules: which of them; all, if left out.
        """
        chosen = self.modules if modules is None else modules
        with pushed([self._patches[id(module)] for module in chosen], [action(module) for module in chosen]):
            yield

    def zero(self, module: nn.Module, called: list[nn.Module]) -> Action:
        """Return what makes a module give zero and notes that it was called; each kind of call computes once."""

        def action(proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            # What a module returns is told by what it returned for the same shapes before.
            called.append(module)
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            key = id(module), *((tensor.shape, tensor.dtype) for tensor in tensors)
            if key in self._known:
                shape, dtype = self._known[key]
                return tensors[0].new_zeros(shape, dtype=dtype)
            output = proceed(*args, **kwargs)
            if isinstance(output, Tensor) and tensors:
                self._known[key] = output.shape, output.dtype
            return pytree.tree_map_only(Tensor, torch.zeros_like, output)

        return action
