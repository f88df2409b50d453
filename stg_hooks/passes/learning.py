"""Let a call of a model tell its layers, where looking does not find them, before anything of that call is computed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from stg_hooks.errors import LayerError
from stg_hooks.hooks.compiled import eagerly
from stg_hooks.model.layers import was_recorded
from stg_hooks.modes.recorded import Change, learn_from_calls
from stg_hooks.passes.caches import Caches
from stg_hooks.passes.effects import Randomness
from stg_hooks.passes.guided_call import weak_pass
from stg_hooks.passes.inputs import Inputs
from stg_hooks.passes.rows import leaves_of
from stg_hooks.passes.state import Kept
from stg_hooks.passes.streaming import weights_are_streamed

_Made = TypeVar("_Made")
_LOCK = threading.RLock()


class _OfThread(threading.local):
    is_learning = False


_LOCAL = _OfThread()


def is_learning() -> bool:
    """Tell whether this thread makes a call only to learn from it, in which nothing is skipped."""
    return _LOCAL.is_learning


def made_ahead(make: Callable[[], _Made]) -> _Made | None:
    """Make what needs to know layers; `None` where a call of the model has to tell them first.

    Args:
        make: makes it.

    Raises:
        LayerError: a layer that does not exist, whatever a call tells, or cannot be skipped in its mode.
    """
    try:
        return make()
    except LayerError as error:
        if not error.is_unseen:
            raise
        return None


def learn_once(model: nn.Module, denoiser: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Do as `learn`, unless that has been done for this model."""
    with _LOCK:
        if not was_recorded(model):
            learn(model, denoiser, args, kwargs)


def learn(model: nn.Module, denoiser: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Make a call twice, without gradients, and remember what it tells of the model's layers.

    What the model keeps, its arguments and random numbers are afterwards what they were.

    Args:
        model: the module that holds the layers.
        denoiser: makes the call: the module, or what calls it.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.

    Raises:
        Exception: what the denoiser raises for these arguments.
    """
    inputs, randomness = Inputs(args, kwargs, {}), Randomness.for_call(args, kwargs)
    generators = [leaf for leaf in leaves_of(args, kwargs) if isinstance(leaf, torch.Generator)]
    states = [generator.get_state() for generator in generators]
    before = Kept(model, with_buffers=not weights_are_streamed(model)).look()

    def put_back() -> None:
        before.put_back()
        randomness.put_back()
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)

    def call(change: Change) -> None:
        own_args, own_kwargs = change(*inputs.again())
        try:
            with Caches(model).apart(learn):
                denoiser(*own_args, **own_kwargs)
        finally:
            put_back()

    outer, _LOCAL.is_learning = _LOCAL.is_learning, True
    try:
        with torch.no_grad(), eagerly(), weak_pass():
            learn_from_calls(model, call)
    finally:
        _LOCAL.is_learning = outer
