"""Learn from calls of a model what looking does not tell: which modules compute attention, and when blocks run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from stg_hooks.model import objects
from stg_hooks.model.attention import is_attention
from stg_hooks.model.layers import Run, find_layers, remember
from stg_hooks.modes.kernels import seeing

_ATTENTION = (F.scaled_dot_product_attention, F.multi_head_attention_forward)
_ENTRIES = 4096  # of what a module is given that are compared
_SOFTMAX = (torch.softmax, Tensor.softmax, F.softmax)


Change: TypeAlias = Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]


def learn_from_calls(model: nn.Module, call: Callable[[Change], None]) -> None:
    """Have a model called twice, the second time with other latents; remember what ran and what computed attention.

    Args:
        model: any module; `find_layers` follows what is remembered of it from then on.
        call: calls it, with arguments that it changes first; with the same random numbers each time.

    Raises:
        Exception: what the first call raises.
    """
    first, second = _Recorder(model), _Recorder(model)
    with first.recording():
        call(lambda args, kwargs: (args, kwargs))
    with suppress(Exception), second.recording():  # other latents may not be accepted, as tokens are not
        call(_with_other_latents)
    remember(model, Run((), frozenset(), frozenset(first.attention)))
    names = [layer.name for layer in find_layers(model)]
    order = [name for name in first.order if name in names]
    same = {name for name in order if name in second.given and _equal(first.given[name], second.given[name])}
    remember(model, Run(tuple(order), frozenset(same), frozenset(first.attention)))


class _Recorder(TorchFunctionMode):
    """Notes which modules run in a call of this thread, what they are given, and which compute attention."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._thread = threading.get_ident()
        self._running: list[nn.Module] = []
        self.order: list[str] = []
        self.given: dict[str, list[Tensor]] = {}
        self.attention: set[str] = set()
        self._names = {id(module): name for name, module in model.named_modules()}

    @contextmanager
    def recording(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, module in self._model.named_modules():
                if name:
                    stack.callback(module.register_forward_pre_hook(self._enters, with_kwargs=True).remove)
                    stack.callback(module.register_forward_hook(self._leaves, always_call=True).remove)
            stack.enter_context(seeing(self._kernel, self._model))
            stack.enter_context(self)
            yield

    def _enters(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() != self._thread:
            return
        name = self._names[id(module)]
        self._running.append(module)
        if name not in self.given:
            self.order.append(name)
            leaves = objects.leaves((args, kwargs))
            self.given[name] = [_sample(leaf) for leaf in leaves if isinstance(leaf, Tensor)]

    def _leaves(self, module: nn.Module, *_: Any) -> None:
        if self._running and self._running[-1] is module and threading.get_ident() == self._thread:
            self._running.pop()

    def _kernel(self, function: Callable[..., Any], _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._note()
        return function(*args, **kwargs)

    def _note(self) -> None:
        own = [module for module in self._running if not type(module).__module__.startswith("torch.nn")]
        if own and not any(is_attention(inner) for inner in own[-1].modules()):
            self.attention.add(self._names[id(own[-1])])

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _ATTENTION or (func in _SOFTMAX and args and args[0].ndim > 2):
            self._note()
        return func(*args, **(kwargs or {}))


def _with_other_latents(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Change the first tensor of numbers, which is what is denoised."""
    leaves = objects.leaves((args, kwargs))
    latents = next((leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()), None)
    changed: tuple[tuple[Any, ...], dict[str, Any]] = objects.map_tensors(
        lambda leaf: leaf.flip(-1) + 0.5 if leaf is latents else leaf, (args, kwargs)
    )
    return changed


def _sample(tensor: Tensor) -> Tensor:
    """Copy some of the entries, from all over a tensor: enough to tell whether it is the same in another call."""
    return tensor.reshape(-1)[:: tensor.numel() // _ENTRIES | 1].clone()


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))
