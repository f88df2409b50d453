"""Run a model up to one of its modules and return what that is given: for what neither names nor shapes tell.

A probe runs within a call of the model, with that call's arguments or with other latents. Blocks before the module are
bypassed, so that the probe is cheap and tokens do not mix.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from stg_hooks.errors import BlockError
from stg_hooks.hooks.compiled import eagerly
from stg_hooks.hooks.forward import Action, now, patched, set_aside
from stg_hooks.model import objects
from stg_hooks.model.layers import find_layers
from stg_hooks.model.source import bound_arguments, is_positional
from stg_hooks.modes.residual import Streams
from stg_hooks.modes.token_labels import named_tensors, sounds_like_text


@dataclasses.dataclass
class _Call:
    """A call of the model that is being made."""

    model: nn.Module
    proceed: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @functools.cached_property
    def tensors(self) -> list[tuple[str, Tensor]]:
        given = bound_arguments(self.model, self.args, self.kwargs).items()
        leaves = [(name, leaf) for name, value in given for leaf in objects.leaves(value)]
        return [(name, leaf) for name, leaf in leaves if isinstance(leaf, Tensor) and not is_positional(name)]

    @functools.cached_property
    def layout(self) -> Hashable:  # reads masks, which synchronises with the GPU: once, however many blocks ask
        return tuple((name, *_layout(name, leaf)) for name, leaf in self.tensors)


class _OfThread(threading.local):
    call: _Call | None = None


class _ReachedError(Exception):
    """Ends a probe when it has reached the module."""


class Looks:
    """Probes of one model, within its calls."""

    def __init__(self, model: nn.Module) -> None:
        """Prepare for one model; change nothing yet.

        Args:
            model: the module that is called.
        """
        self.model = model
        blocks = [layer.module for layer in find_layers(model) if layer.index is not None]
        self._blocks = [(block, Streams(block)) for block in blocks]
        self._local = _OfThread()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Note the calls of the model within a `with`."""
        with patched(self.model) as patch, patch.everywhere(self._note):
            yield

    def _note(self, proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before, self._local.call = self._local.call, _Call(self.model, proceed, args, kwargs)
        try:
            return proceed(*args, **kwargs)
        finally:
            self._local.call = before

    def tensors(self) -> list[tuple[str, Tensor]]:
        """List the tensors that the call that is being made was given, without those of positions; empty without one.

        Returns:
            Pairs of the argument's name and a tensor.
        """
        return [] if self._local.call is None else self._local.call.tensors

    def layout(self) -> Hashable:
        """Describe what decides where the tokens of the call that is being made are: shapes, and what masks say."""
        return () if self._local.call is None else self._local.call.layout

    def given(self, module: nn.Module, change: Callable[[Tensor], Tensor] | None = None) -> list[dict[str, Tensor]]:
        """Make the call again, up to a module.

        Args:
            module: a module inside the model.
            change: what to give in place of a tensor among the arguments; it may be the same.

        Returns:
            The streams of tokens that the module is given: by name, first for the call as it is, then for the changed.
        """
        assert self._local.call is not None
        proceed, args, kwargs = self._local.call.proceed, self._local.call.args, self._local.call.kwargs
        with torch.no_grad(), set_aside(self.model.modules()), eagerly():
            one = self._reach(module, proceed, args, kwargs)
            if change is None:
                return [one]
            return [one, self._reach(module, proceed, *objects.map_tensors(change, (args, kwargs)))]

    def _reach(
        self, module: nn.Module, proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}

        def reached(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = named_tensors(bound_arguments(module, args, kwargs))
            found.update({name: leaf.clone() for name, leaf in given if is_stream(leaf)})
            raise _ReachedError

        with ExitStack() as stack:
            others = [pair for pair in self._blocks if all(inner is not module for inner in pair[0].modules())]
            for other, action in [*((block, _bypass(streams)) for block, streams in others), (module, reached)]:
                patch = stack.enter_context(patched(other))
                stack.callback(patch.put_back, patch.replace(action, now()))
            try:
                proceed(*args, **kwargs)
            except _ReachedError:
                return found
        raise RuntimeError(f"{type(module).__name__} was not reached")


def is_stream(leaf: Any) -> TypeGuard[Tensor]:
    """Tell whether this may be `(batch, tokens, channels)`, or `(tokens, channels)`."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim in (2, 3) and leaf.shape[-2] > 1


def may_carry_tokens(leaf: Tensor) -> bool:
    """Tell whether a tensor among the arguments of a model may hold latents or text."""
    return leaf.is_floating_point() and leaf.ndim > 1


def latents_among(given: list[tuple[str, Tensor]]) -> list[Tensor]:
    """Choose what is denoised, and what comes in the same form and is not text; what is denoised comes first."""
    candidates = [(name, leaf) for name, leaf in given if may_carry_tokens(leaf) and "mask" not in name]
    candidates = [(name, leaf) for name, leaf in candidates if not sounds_like_text(name)]
    if not candidates:
        return []
    main, first = candidates[0]
    candidates = [(name, leaf) for name, leaf in candidates if name == main or "embed" not in name]
    return [leaf for name, leaf in candidates if _has_form(name, leaf, first)]


def _has_form(name: str, leaf: Tensor, latents: Tensor) -> bool:
    """Tell whether a tensor comes in the form of latents: tokens have as many channels, but for sound beside video."""
    if leaf.ndim != latents.ndim:
        return False
    return leaf.ndim != 3 or leaf.shape[-1] == latents.shape[-1] or "audio" in name


def _layout(name: str, leaf: Tensor) -> tuple[object, ...]:
    return tuple(leaf.shape), (tuple(leaf.flatten().tolist()) if "mask" in name else None)


def _bypass(streams: Streams) -> Action:
    def action(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return streams.passed_through(forward, args, kwargs)
        except BlockError:  # it cannot be bypassed, so it is computed
            return forward(*args, **kwargs)

    return action
