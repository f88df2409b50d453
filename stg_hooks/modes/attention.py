"""Replace the self-attention that a layer computes, in single calls of the layer."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stg_hooks.errors import BlockError
from stg_hooks.hooks.compiled import eagerly, is_compiled
from stg_hooks.hooks.forward import Patch, patched, pushed
from stg_hooks.hosts import plain_attention
from stg_hooks.model import objects
from stg_hooks.model.attention import attention_modules
from stg_hooks.model.objects import copied
from stg_hooks.model.source import bound_arguments, signature_text
from stg_hooks.modes.kernels import advice, seeing
from stg_hooks.modes.self_attention import Change, SelfAttention
from stg_hooks.modes.token_labels import (
    NOTHING,
)

if TYPE_CHECKING:
    from stg_hooks.modes.text_tokens import TextTokens


class AttentionSeam:
    """The attention inside one layer: installed once, then replaced in single calls of the layer."""

    def __init__(
        self,
        layer: nn.Module,
        targets: Sequence[tuple[str, nn.Module]],
        text: TextTokens | None = None,
        named: Collection[str] = (),
    ) -> None:
        """Prepare for one layer; change nothing yet.

        Args:
            layer: a block, or an attention module.
            targets: the attention modules inside whose attention is replaced, with names for messages; the layer
                itself may be one of them.
            text: finds the text in what the layer is given as one stream; leave it out where text makes no difference.
            named: those among the targets that were asked for by name, each of which has to be perturbed.
        """
        self._layer = layer
        self._text = text
        self._named = named
        self._targets = targets
        self._opaque = [module for module in layer.modules() if _is_opaque(module)]
        self._patches: dict[int, Patch] = {}
        self._computes_itself: bool | None = None
        """Whether the layer computes attention itself, with what its attention modules hold, and does not call them."""

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replace `forward` of the attention modules, without effect until a call asks for it."""
        with ExitStack() as stack:
            inner = [module for _, module in self._targets if module is not self._layer]
            modules = [*inner, *self._opaque]
            self._patches = {id(module): stack.enter_context(patched(module)) for module in modules}
            yield

    def run(self, change: Change, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute the layer with its self-attention replaced, and not compiled.

        Args:
            change: what self-attention gives instead.
            forward: computes the layer as it is.
            args: positional arguments of the call.
            kwargs: keyword arguments of the call.

        Returns:
            What the layer returns.

        Raises:
            BlockError: no self-attention was found in the call, or it is not computed where it can be replaced.
        """
        if is_compiled(self._layer):
            forward = self._layer._call_impl
        run = self._run
        if "torch._dynamo" in sys.modules:  # what is compiled cannot be followed: break the graph here
            run = torch.compiler.disable(_eagerly(run))
        return run(change, forward, args, kwargs)

    def _run(self, change: Change, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mode = SelfAttention(change, needs_text=self._text is not None)
        known = self._text.given_to(self._layer, args, kwargs) if self._text else NOTHING
        targets = self._targets
        if self._computes_itself:
            targets = [(type(self._layer).__name__, self._layer)]
        before = copied(args, kwargs) if self._computes_itself is None else None
        inner = [(name, module) for name, module in targets if module is not self._layer]
        whole = [name for name, module in targets if module is self._layer]
        patches = [self._patches[id(module)] for module in (*(module for _, module in inner), *self._opaque)]
        actions = [mode.around(name, module) for name, module in inner] + [mode.through] * len(self._opaque)
        with pushed(patches, actions), seeing(mode.kernel, self._layer), mode:
            if whole:
                output = mode.around(whole[0], self._layer, known)(forward, args, kwargs)
            else:
                # Attention that the layer turns out to compute itself has to be seen.
                plain = nullcontext() if before is None else plain_attention(self._layer)
                with mode.provenance.call(bound_arguments(self._layer, args, kwargs), known), plain:
                    output = forward(*args, **kwargs)
        if before is not None:
            self._computes_itself = not mode.replaced and mode.outside > 0 and self._are_all(targets)
            if self._computes_itself:
                _write_back(before, (args, kwargs))
                return self._run(change, forward, args, kwargs)
        missed = [(name, module) for name, module in targets if name in self._named and name not in mode.perturbed]
        if missed or not mode.replaced:
            raise mode.unseen or BlockError(
                self._explain(mode, missed or self._targets, lambda: forward(*args, **kwargs))
            )
        return output

    def _are_all(self, targets: Sequence[tuple[str, nn.Module]]) -> bool:
        """Tell whether these are all attention modules inside the layer, none of them asked for by name."""
        is_named = any(name in self._named for name, _ in targets)
        return not is_named and len(targets) == len(attention_modules(self._layer))

    def _explain(self, mode: SelfAttention, targets: Sequence[tuple[str, nn.Module]], run: Callable[[], Any]) -> str:
        kind = type(self._layer).__name__
        names = ", ".join(repr(name) for name, _ in targets)
        if mode.crossed:
            signatures = {f"{type(m).__name__}.forward{signature_text(m)}": None for _, m in targets}
            return (
                f"the attention in {names} of {kind} is cross-attention: its keys come from other tokens than its "
                "queries. Attention modes replace self-attention only; skip another layer, or use mode='residual' on "
                f"the block.\n  it is:    {', '.join(signatures)}"
            )
        said = f"a perturbed layer, {kind}, did not call its attention ({names}), so nothing was perturbed."
        return f"{said}{advice([self._layer, *(module for _, module in targets)], run)}"


def _eagerly(run: Callable[..., Any]) -> Callable[..., Any]:
    """Have nothing compiled inside: functions that layers call may be, and would be compiled with what follows them."""

    @functools.wraps(run)
    def instead(*args: Any) -> Any:
        with eagerly():
            return run(*args)

    return instead


def _write_back(copies: Any, originals: Any) -> None:
    """Undo what a layer has written into its arguments."""
    with torch.no_grad():
        for copy, original in zip(objects.leaves(copies), objects.leaves(originals), strict=True):
            if isinstance(original, Tensor) and not torch.equal(copy, original):
                original.copy_(copy)


def _is_opaque(module: nn.Module) -> bool:
    """Tell whether a module may compute in ways that are not torch functions (quantised layers, fused norms)."""
    is_leaf = next(module.children(), None) is None and next(module.parameters(), None) is not None
    return is_leaf and type(module).__module__.partition(".")[0] != "torch"
