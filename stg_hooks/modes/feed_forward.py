"""The feed-forward networks of a block: found by what they are called, and made to give zero in single calls."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from stg_hooks.errors import BlockError
from stg_hooks.hooks.forward import Action, Patch, patched, pushed

_CLASS = re.compile(r"feed_?forward|mlp|ffn|glumbconv|swiglu|transition|dense\w*actdense", re.IGNORECASE)
# `linear2` is nn.TransformerEncoderLayer's, `down_proj` and `ff_out` are the ends of networks that are the block's own
# children; `proj_mlp` is the first half of a network beside the attention.
_NAME = re.compile(
    r"(ff|ffn|mlp|feed_?forward)\d*(_context|_txt|_text|_audio)?|\w+_(mlp|ffn|ff)|linear2|down_proj|ff_out"
)


def feed_forwards(block: nn.Module) -> list[nn.Module]:
    """List the outermost feed-forward networks inside a block."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in block.named_modules():
        called = name.rpartition(".")[2]
        if not name or any(name.startswith(f"{outer}.") for outer, _ in found) or isinstance(module, nn.ModuleList):
            continue
        owner = block.get_submodule(name.rpartition(".")[0])
        if called == "linear2" and _ends_attention(owner):
            act = getattr(owner, "mlp_act", None)
            found += [] if act is None else [(name, act)]
        elif _NAME.fullmatch(called) or _CLASS.search(type(module).__name__):
            found.append((name, module))
    return [module for _, module in found]


def _ends_attention(owner: nn.Module) -> bool:
    """Tell whether a `linear2` takes more than a network's hidden states: attention as well (Flux's single blocks).

    There, `linear1` makes queries, keys and values, too, and the network's own output is that of its activation.
    """
    made, taken = getattr(owner, "linear1", None), owner.linear2
    return made is not None and getattr(made, "out_features", None) != getattr(taken, "in_features", None)


_FUSED = (nn.TransformerEncoderLayer, nn.MultiheadAttention)


class _UnfusedOnly(TorchFunctionMode):
    """Makes fused layers call their parts: they do so while a `TorchFunctionMode` is in force."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


class Silence:
    """Some modules of one layer: installed once, then silenced in single calls of the layer."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        """Take the modules; change nothing yet."""
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


class FeedForwards(Silence):
    """The feed-forward networks of one layer: installed once, then silenced in single calls of the layer."""

    def __init__(self, block: nn.Module) -> None:
        """Prepare for one layer; change nothing yet.

        Args:
            block: the layer.
        """
        super().__init__(feed_forwards(block))
        self._kind = type(block).__name__
        self._may_fuse = any(isinstance(module, _FUSED) for module in block.modules())

    @contextmanager
    def giving_zero(self) -> Iterator[None]:
        """Let the networks give zero in calls from this thread within a `with`.

        Raises:
            BlockError: none of them was called.
        """
        called: list[nn.Module] = []
        unfused = _UnfusedOnly() if self._may_fuse else nullcontext()
        with self.doing(lambda module: self.zero(module, called)), unfused:
            yield
        if not called:
            raise BlockError(
                f"{self._kind} did not call its feed-forward network, so mode='feed-forward' changed nothing in it. "
                "Use another mode."
            )
