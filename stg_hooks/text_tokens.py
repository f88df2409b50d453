"""Find the text among the tokens of a block that is given text and video as one stream, joined before the blocks.

Inside such a block nothing tells one from the other. So, once for each layout of a call, the model is run up to the
block twice, with other latents the second time and every block before it handing its inputs through: tokens that stay
the same are not video.
"""

from __future__ import annotations

import itertools
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stg_hooks.calls import is_positional
from stg_hooks.errors import StgWarning
from stg_hooks.inspection import bound_arguments
from stg_hooks.layers import find_layers
from stg_hooks.patching import Action, now, patched, set_aside
from stg_hooks.provenance import Runs, sounds_like_text
from stg_hooks.streams import Streams

_Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
_Found = dict[str, Runs]


class _OfThread(threading.local):
    call: _Call | None = None


class _ReachedError(Exception):
    """Ends a look when the block has been reached."""


class TextTokens:
    """The text in the streams of a model's blocks."""

    def __init__(self, model: nn.Module) -> None:
        """Prepare for one model; touch nothing.

        Args:
            model: the module that is called, and that puts text and video together.
        """
        self._model = model
        self._streams = [(layer.module, Streams(layer.module)) for layer in find_layers(model)]
        self._numbered = sum(layer.index is not None for layer in find_layers(model))
        self._known: dict[object, _Found] = {}
        self._local = _OfThread()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Note the calls of the model within a `with`."""
        with patched(self._model) as patch, patch.everywhere(self._note):
            yield

    def _note(self, proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before, self._local.call = self._local.call, (proceed, args, kwargs)
        try:
            return proceed(*args, **kwargs)
        finally:
            self._local.call = before

    def given_to(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Found:
        """Find the text in what a block is given.

        Args:
            block: a block of the model, in a call of it.
            args: the positional arguments of the block's call.
            kwargs: its keyword arguments.

        Returns:
            Name of an argument to the runs of its tokens, where there are tokens of both kinds in it. For rows that
            hold text in different places, the kind of a run is a tuple with an entry per row.
        """
        call = self._local.call
        given = {name: leaf for name, leaf in bound_arguments(block, args, kwargs).items() if isinstance(leaf, Tensor)}
        main = next((leaf for name, leaf in given.items() if not sounds_like_text(name)), None)
        if call is None or not _is_stream(main):
            return {}
        if any(sounds_like_text(name) and _is_stream(leaf) and leaf.ndim == main.ndim for name, leaf in given.items()):
            return {}  # its arguments tell
        root = list(_named_leaves(bound_arguments(self._model, *call[1:])))
        latents = [leaf for _, leaf in _latents(root)]
        if len(latents) == len([leaf for _, leaf in root if _may_carry_tokens(leaf)]):
            return {}  # nothing but latents
        key = id(block), tuple((name, *_layout(name, leaf)) for name, leaf in root)
        if key not in self._known:
            self._known[key] = self._look(block, call, latents)
        return self._known[key]

    def _look(self, block: nn.Module, call: _Call, latents: list[Tensor]) -> _Found:
        proceed, args, kwargs = call

        def change(leaf: Any) -> Any:
            return _other(leaf) if any(leaf is latent for latent in latents) else leaf

        try:
            with torch.no_grad(), set_aside(self._model.modules()), _eagerly():
                one = self._reach(block, proceed, args, kwargs)
                other = self._reach(block, proceed, *pytree.tree_map(change, (args, kwargs)))
            pairs = {name: (tensor, other[name]) for name, tensor in one.items()}
            runs = {name: _runs(*pair) for name, pair in pairs.items() if pair[0].shape == pair[1].shape}
        except Exception as error:  # whatever goes wrong in a call that nobody has asked for
            warnings.warn(
                f"{type(self._model).__name__} puts text and video together before {type(block).__name__}, and it "
                f"cannot be found out which tokens are which ({type(error).__name__}: {error}). The attention mode "
                "treats them all as video there. mode='values' does so by definition.",
                StgWarning,
                stacklevel=2,
            )
            return {}
        return {name: found for name, found in runs.items() if found}

    def _reach(
        self, block: nn.Module, proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Run the model up to a block and return the streams that this is given."""
        found: dict[str, Tensor] = {}

        def reached(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = bound_arguments(block, args, kwargs)
            found.update({name: leaf.clone() for name, leaf in given.items() if _is_stream(leaf)})
            raise _ReachedError

        with ExitStack() as stack:
            others = [(module, _bypass(streams)) for module, streams in self._streams[: self._numbered]]
            for module, action in [*others, (block, reached)]:
                patch = stack.enter_context(patched(module))
                stack.callback(patch.put_back, patch.replace(action, now()))
            try:
                proceed(*args, **kwargs)
            except _ReachedError:
                return found
        raise RuntimeError("the block was not reached")


def _bypass(streams: Streams) -> Action:
    def action(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        known, output = streams.bypass(args, kwargs)
        if not known:
            streams.learn(args, kwargs, forward(*args, **kwargs))
            _, output = streams.bypass(args, kwargs)
        return output

    return action


def _runs(one: Tensor, other: Tensor) -> Runs:
    """Say which tokens are the same in both; empty where all are of one kind."""
    same = (one == other).flatten(2).all(-1) if one.ndim > 2 else (one == other).all(-1)[None]
    if not same.any() or same.all():
        return ()
    if (same == same[:, :1]).all():  # the sequence comes first
        same = same[:, :1].T
    columns = [row[0] if len(set(row)) == 1 else tuple(row) for row in same.T.tolist()]
    return tuple((kind, len(list(group))) for kind, group in itertools.groupby(columns))


def _named_leaves(given: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in given.items():
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, Tensor) and not is_positional(name):
                yield name, leaf


def _is_stream(leaf: Any) -> TypeGuard[Tensor]:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim in (2, 3) and leaf.shape[-2] > 1


def _may_carry_tokens(leaf: Tensor) -> bool:
    return leaf.is_floating_point() and leaf.ndim > 1


def _latents(root: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Choose what is denoised, and what comes in the same form and is no text."""
    candidates = [(name, leaf) for name, leaf in root if _may_carry_tokens(leaf) and "mask" not in name]
    candidates = [(name, leaf) for name, leaf in candidates if not sounds_like_text(name)]
    if not candidates:
        return []
    main, first = candidates[0]
    return [
        (name, leaf) for name, leaf in candidates if leaf.ndim == first.ndim and (name == main or "embed" not in name)
    ]


def _other(latents: Tensor) -> Tensor:
    """Return other numbers of the same shape, without drawing random ones."""
    wave = torch.arange(latents.numel(), device=latents.device, dtype=torch.float32).sin()
    return latents + wave.reshape(latents.shape).to(latents.dtype)


def _layout(name: str, leaf: Tensor) -> tuple[object, ...]:
    """Describe what decides where text is: shapes, and what masks say."""
    return tuple(leaf.shape), (tuple(leaf.flatten().tolist()) if "mask" in name else None)


def _eagerly() -> AbstractContextManager[object]:
    """Have nothing compiled for a look."""
    if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
        stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
        return stance
    return nullcontext()
