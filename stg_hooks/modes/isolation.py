"""The attention of a block from one of its streams to another: found in one call, and made to give nothing.

A block of video and audio has attention whose queries are video and whose keys are audio, and the other way round.
Which of its attention that is, the labels of its tensors tell (`token_labels`); no name of a model is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stg_hooks.errors import BlockError
from stg_hooks.hooks.compiled import is_compiled
from stg_hooks.hooks.forward import Action
from stg_hooks.model import objects
from stg_hooks.model.attention import attention_modules
from stg_hooks.model.objects import copied
from stg_hooks.model.source import bound_arguments, class_forward, return_names, signature_text
from stg_hooks.modes.feed_forward import Silence
from stg_hooks.modes.residual import Streams
from stg_hooks.modes.token_labels import Provenance, carries_tokens, named_tensors, sounds_like_text


def may_be_isolated(block: nn.Module) -> bool:
    """Tell whether a block may have several streams, and attention between them, as far as its code tells."""
    names = return_names(class_forward(block))
    streams = [names] if isinstance(names, str) else [name for name in names or () if name is not None]
    one = names is not None and sum(not sounds_like_text(name) for name in streams) < 2
    return not one and len(attention_modules(block)) > 1


class Isolation(Silence):
    """The attention between the streams of one block: installed once, then silenced in single calls of the block."""

    def __init__(self, block: nn.Module) -> None:
        """Prepare for one block; change nothing yet."""
        self._block = block
        self._names = {block.get_submodule(name): name for name in attention_modules(block)}
        self._between: list[nn.Module] | None = None
        super().__init__([*self._names])

    def run(self, streams: Streams, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute the block with no attention from one of its streams to another.

        Args:
            streams: what it returns, in terms of its arguments.
            forward: computes the block as it is.
            args: positional arguments of the call.
            kwargs: keyword arguments of the call.

        Raises:
            BlockError: no such attention was found in the call.
        """
        if self._between is None:
            find = torch.compiler.disable(self._find) if torch.compiler.is_compiling() else self._find
            find(streams, forward, args, kwargs)
        assert self._between is not None
        called: list[nn.Module] = []
        with self.doing(lambda module: self.zero(module, called), self._between):
            output = forward(*args, **kwargs)
        if not called:
            raise BlockError(self._explain("did not call it in this call, so nothing was isolated"))
        return output

    def _find(
        self, streams: Streams, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Find the modules of attention between streams, in a call on copies."""
        if is_compiled(self._block):
            forward = self._block._call_impl
        own_args, own_kwargs = copied(args, kwargs)
        through = objects.leaves(streams.passed_through(forward, own_args, own_kwargs))
        given = bound_arguments(self._block, own_args, own_kwargs)
        originals = dict(
            zip(map(id, objects.leaves((own_args, own_kwargs))), objects.leaves((args, kwargs)), strict=True)
        )
        watch = _Watch()
        with self.doing(watch.around), watch, watch.provenance.call(given) as outputs:
            output = forward(*own_args, **own_kwargs)
            outputs.append(output)
        # What a block returns as it came, in an object, is not a stream of it.
        pairs = zip(objects.leaves(output), through, strict=True)
        changed = {id(came) for made, came in pairs if isinstance(came, Tensor) and _differ(made, came, originals)}
        names = [name for name, leaf in named_tensors(given) if id(leaf) in changed and carries_tokens(name, leaf)]
        found = frozenset(name for name in names if not sounds_like_text(name))
        if len(found) < 2:
            told = f"changes {', '.join(sorted(found)) or 'no stream'} only"
            raise BlockError(self._explain(f"{told}, so there are no streams to isolate from each other"))
        between = [module for module, parts in watch.seen if _is_between(parts, found)]
        if not between:
            told = f"has no attention that takes keys of one of {', '.join(sorted(found))} to another"
            raise BlockError(self._explain(f"{told}, so nothing would be isolated"))
        self._between = list(dict.fromkeys(between))

    def _explain(self, what: str) -> str:
        kind = type(self._block).__name__
        return (
            f"mode='isolated': {kind} {what}. It is for blocks of several denoised streams, as video and audio, with "
            f"attention modules from one to the other.\n"
            f"  it is:    {kind}.forward{signature_text(self._block)}\n"
            f"  attention: {', '.join(self._names.values()) or 'none'}"
        )


Parts = Sequence[frozenset[str]]
"""For each tensor that attention was given, the arguments of the block that it comes from."""


class _Watch(TorchFunctionMode):
    """Notes, in one call of a block, what its attention was given."""

    def __init__(self) -> None:
        super().__init__()
        self.provenance = Provenance()
        self.seen: list[tuple[nn.Module, Parts]] = []

    def around(self, module: nn.Module) -> Action:
        """Return what notes the calls of a module of attention."""

        def action(proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = bound_arguments(module, args, kwargs)
            labels = [self.provenance.label(leaf) for name, leaf in named_tensors(given) if carries_tokens(name, leaf)]
            self.seen.append((module, [label.sources for label in labels if label is not None]))
            with self.provenance.call(given) as outputs:
                output = proceed(*args, **kwargs)
                outputs.append(output)
            return output

        return action

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        self.provenance.follow(func, args, kwargs, output)
        return output


def _differ(made: Any, came: Tensor, originals: dict[int, Any]) -> bool:
    """Tell whether a block has changed a stream, be it in place."""
    return made is not came or not torch.equal(came, originals[id(came)])


def _is_between(parts: Parts, streams: frozenset[str]) -> bool:
    """Tell whether attention takes keys of a stream that its queries do not come from: the first tensor holds these."""
    of_streams = [part & streams for part in parts if part & streams]
    return bool(of_streams) and any(not part <= of_streams[0] for part in of_streams[1:])
