"""Follow what a layer computes by torch's own functions, and let a mode replace its self-attention.

A `TorchFunctionMode`, in force in this thread while the layer runs, sees every torch function that the layer calls. It
passes those that compute self-attention to the mode and leaves everything else alone: cross-attention, other layers,
other threads. So attention processors, fused projections and hand-written blocks need no code of their own. What a mode
can do with the attention that is found is in `attention_calls`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from stg_hooks.errors import BlockError, StgError
from stg_hooks.hooks.forward import Action
from stg_hooks.hosts import plain_attention
from stg_hooks.model.source import bound_arguments
from stg_hooks.modes.attention_calls import AttentionCall, HandMade, MultiHead, Opaque, ScaledDotProduct, of_sequences
from stg_hooks.modes.kernels import advice
from stg_hooks.modes.layouts import Arguments, Layout
from stg_hooks.modes.token_labels import (
    NOTHING,
    Provenance,
    Runs,
    carries_tokens,
    named_tensors,
)

if TYPE_CHECKING:
    pass


Change = Callable[[AttentionCall], Any]
"""What a computation of self-attention gives instead."""


class SelfAttention(TorchFunctionMode):
    """Sees what a layer computes, follows where it comes from, and replaces its self-attention."""

    def __init__(self, change: Change, needs_text: bool) -> None:
        super().__init__()
        self._needs_text = needs_text
        self.unseen: BlockError | None = None
        """Says of attention to several streams that it was not seen, should nothing else have been replaced."""
        self.provenance = Provenance()
        self.replaced = 0
        self.crossed = 0
        self.outside = 0  # computed by the layer itself, outside its attention modules
        self.perturbed: set[str] = set()
        self._change = change
        self._inside: tuple[str, nn.Module] | None = None
        self._is_own = False  # what is computed now is what a mode gives, and not the layer's

    def around(self, name: str, module: nn.Module, known: Mapping[str, Runs] = NOTHING) -> Action:
        """Return what an attention module does: compute, with its self-attention replaced."""

        def action(proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            before, self._inside = self._inside, (name, module)
            replaced, crossed = self.replaced, self.crossed
            given, plain = bound_arguments(module, args, kwargs), plain_attention(module)
            try:
                with self.provenance.call(given, known) as outputs, plain:
                    output = proceed(*args, **kwargs)
                    outputs.append(output)
            except Exception as error:
                is_compiled = type(error).__module__.startswith("torch._dynamo")
                if isinstance(error, StgError) or (isinstance(plain, nullcontext) and not is_compiled):
                    raise
                raise BlockError(
                    f"{name!r} ({type(module).__name__}) cannot compute its attention with torch's "
                    f"scaled_dot_product_attention ({type(error).__name__}: {str(error).splitlines()[0]}), which is "
                    "where it is replaced. Use mode='residual' on the block."
                ) from error
            finally:
                self._inside = before
            if self.replaced > replaced:
                self.perturbed.add(name)
            elif self.crossed == crossed:
                self._not_seen(name, module, given, lambda: proceed(*args, **kwargs))
            return output

        return action

    def _not_seen(self, name: str, module: nn.Module, given: Mapping[str, Any], run: Callable[[], Any]) -> None:
        """Raise, unless the module is given several streams: then it most likely is cross-attention beside ours."""
        error = BlockError(
            f"{name!r} ({type(module).__name__}) computes its attention neither with torch's "
            "scaled_dot_product_attention nor with a softmax, so it cannot be replaced, and nothing would be "
            "perturbed. Set another attention processor or backend, or use mode='residual' on the "
            f"block.{advice([module], run)}"
        )
        streams = {id(leaf) for part, leaf in named_tensors(given) if carries_tokens(part, leaf) and leaf.ndim > 2}
        if len(streams) < 2:
            raise error
        self.unseen = error

    def kernel(
        self, function: Callable[..., Any], layout: Layout | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Stand in for an attention function that an adapter names."""
        if layout is None:
            return function(*args, **kwargs)
        if self._inside is None:
            self.outside += 1
            output = _out_of_sight(function, args, kwargs)
        else:
            output = self._in_kernel(function, Arguments(layout, function, args, kwargs), layout, args, kwargs)
        self.provenance.follow(None, args, kwargs, output)
        return output

    def _in_kernel(
        self,
        function: Callable[..., Any],
        given: Arguments,
        layout: Layout,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        query, key, value = (given.tensor(which) for which in (layout.q, layout.k, layout.v))
        if not self._is_self_attention(query, key):
            self.crossed += 1
            return _out_of_sight(function, args, kwargs)
        q, k, v = (given.in_heads(tensor) for tensor in (query, key, value))
        if given.tensors == "(b s) h d":
            calls = of_sequences(self._packed_runs(query, len(query)), q, given.get(layout.ends))
        else:
            runs, key_runs = (self._runs(tensor, t.shape[-2]) for tensor, t in ((query, q), (key, k)))
            calls = [(slice(None), runs, key_runs)]
        self.replaced += 1
        options: dict[str, Any] = {"attn_mask": _mask(given, layout, k), "scale": given.get(layout.scale)}
        unknown, made = tuple(given.not_understood()), []
        for rows, runs, key_runs in calls:
            some = (q[..., rows, :], k[..., rows, :], v[..., rows, :])
            if some[0].shape[-2] != some[1].shape[-2] and not runs:
                raise self._lengths_differ(some[0].shape[-2], some[1].shape[-2])
            made.append(self._changed(Opaque(runs, self._inputs(), key_runs, *some, options, unknown)))
        output = given.as_output(torch.cat(made, dim=-2) if len(made) > 1 else made[0]).to(query.dtype)
        return (output, None) if _returns_more(function, args, kwargs) else output

    def _changed(self, call: Opaque) -> Tensor:
        self._is_own = True  # unlike torch functions, this is not out of sight of the mode
        try:
            rows = [self._change(row) for row in call.by_row()] if call.rows_differ else [self._change(call)]
        finally:
            self._is_own = False
        return torch.cat(rows) if len(rows) > 1 else rows[0]

    def _packed_runs(self, tensor: Tensor, total: int) -> Runs:
        """Say which tokens are text where the sequences of all rows lie one after the other."""
        label = self.provenance.label(tensor)
        if not self._needs_text or label is None:
            return ()
        one = sum(count for _, count in label.runs)
        if one and total % one == 0:
            rows = range(total // one)
            return tuple(
                (kind[row - len(rows)] if isinstance(kind, tuple) else kind, count)
                for row in rows
                for kind, count in label.runs
            )
        given = self.provenance.arguments
        if any(name in given and given[name].ndim > 2 for name in label.sources - {self.provenance.main}):
            raise self._text_is_lost(total)
        return ()

    def through(self, proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Follow tensors through a module whatever it calls: custom kernels are not torch functions."""
        output = proceed(*args, **kwargs)
        self.provenance.follow(None, args, kwargs, output)
        return output

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._is_own:
            return func(*args, **kwargs)
        if self._inside is not None and func in _SEAMS:
            output = _SEAMS[func](self, args, kwargs)
        elif self._inside is not None and func in _SOFTMAX:
            output = self.softmax(func, args, kwargs)
        else:
            self.outside += func in _SEAMS or (func in _SOFTMAX and self._is_of_product(args[0]))
            output = func(*args, **kwargs)
        self.provenance.follow(func, args, kwargs, output)
        return output

    def scaled_dot_product(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Stand in for `scaled_dot_product_attention`."""
        given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
        query, key, value = (given.pop(name) for name in _ARGUMENTS[:3])
        if not self._is_self_attention(query, key):
            self.crossed += 1
            return F.scaled_dot_product_attention(query, key, value, **given)
        runs, key_runs = self._runs(query, query.shape[-2]), self._runs(key, key.shape[-2])
        if query.shape[-2] != key.shape[-2] and (runs or query.shape[-2] != _videos(key_runs)):
            raise self._lengths_differ(query.shape[-2], key.shape[-2])
        self.replaced += 1
        call = ScaledDotProduct(runs, self._inputs(), key_runs, query, key, value, given)
        return torch.cat([self._change(row) for row in call.by_row()]) if call.rows_differ else self._change(call)

    def multi_head(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Stand in for `multi_head_attention_forward`."""
        given = {**dict(zip(_MULTI_HEAD_ARGUMENTS, args, strict=False)), **kwargs}
        query, key, value = (given.pop(name) for name in _MULTI_HEAD_ARGUMENTS[:3])
        if not self._is_self_attention(query, key):
            self.crossed += 1
            return F.multi_head_attention_forward(query, key, value, **given)
        if len(query) != len(key):
            raise self._lengths_differ(len(query), len(key))
        self.replaced += 1
        return self._change(MultiHead(self._common(self._runs(query, len(query))), self._inputs(), query, given))

    def softmax(self, function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Stand in for a softmax, which may be that of attention maps that are computed by hand."""
        logits, dim = args[0], kwargs.get("dim", args[1] if len(args) > 1 else None)
        label = self.provenance.label(logits)
        if label is None or label.product is None or dim not in (-1, logits.ndim - 1):
            return function(*args, **kwargs)
        if label.product[0] != label.product[1]:
            self.crossed += 1
            return function(*args, **kwargs)
        if logits.shape[-2] != logits.shape[-1]:
            raise self._lengths_differ(*logits.shape[-2:])
        self.replaced += 1
        runs = self._common(self._runs(logits, logits.shape[-1]))
        return self._change(HandMade(runs, self._inputs(), logits, lambda new: function(new, *args[1:], **kwargs)))

    def _is_of_product(self, logits: Tensor) -> bool:
        label = self.provenance.label(logits)
        return label is not None and label.product is not None

    def _error(self, what: str) -> BlockError:
        name, module = self._inside or ("", None)
        return BlockError(f"{name!r} ({type(module).__name__}) {what}")

    def _is_self_attention(self, query: Tensor, key: Tensor) -> bool:
        ours, theirs = self.provenance.label(query), self.provenance.label(key)
        if ours is not None and theirs is not None:
            if ours.sources < theirs.sources:  # of the keys some are text that does not attend itself
                return _videos(theirs.runs_along(key.shape[-2])) == query.shape[-2]
            return ours.sources == theirs.sources
        if len([t for t in self.provenance.arguments.values() if t.ndim > 2]) == 1:  # nothing else to attend to
            return True
        name, module = self._inside or ("", None)
        if query.shape != key.shape and "cross" in f"{name} {type(module).__name__}".lower():
            return False
        raise self._error(
            "computes its queries or keys in a way that cannot be followed, so it is not known whether this is "
            "self-attention. Use mode='residual' on the block."
        )

    def _lengths_differ(self, queries: int, keys: int) -> BlockError:
        return self._error(
            f"has {queries} queries but {keys} keys, so a token has no key and value of its own. Use mode='residual' "
            "on the block."
        )

    def _runs(self, tensor: Tensor, total: int) -> Runs:
        """Say which of the tokens are text."""
        given = self.provenance.arguments
        main = given.get(self.provenance.main or "")
        label = self.provenance.label(tensor)
        if label is None and main is not None:  # made from the only argument, in a way that could not be followed
            label = self.provenance.label(main)
            if label is not None and label.runs and not label.runs_along(total):
                raise self._text_is_lost(total)
        runs = label.runs_along(total) if label is not None else ()
        if not runs and label is not None and main is not None and main.ndim == 3:
            others = [given[name] for name in sorted(label.sources) if name in given and given[name] is not main]
            if any(other.ndim == 3 and other.shape[1] + main.shape[1] == total for other in others):
                raise self._text_is_lost(total)
        return runs if len({is_text for is_text, _ in runs}) > 1 else ()

    def _common(self, runs: Runs) -> Runs:
        if any(isinstance(is_text, tuple) for is_text, _ in runs):
            raise self._error(
                "computes its attention by hand, and the rows of this call hold text in different places. Make one "
                "call per row, set a processor that uses scaled_dot_product_attention, or use mode='values'."
            )
        return runs

    def _text_is_lost(self, total: int) -> BlockError:
        return self._error(
            f"puts {total} tokens together in a way that cannot be followed, so it is not known which of "
            "them are text. Use mode='residual' on the block."
        )

    def _inputs(self) -> tuple[Tensor, ...]:
        given, main = self.provenance.arguments, self.provenance.main
        return tuple(given[name] for name in sorted(given, key=lambda name: name != main))


def _mask(given: Arguments, layout: Layout, key: Tensor) -> Tensor | None:
    mask, lengths = given.get(layout.mask), given.get(layout.lengths)
    if lengths is not None:
        counts: Tensor = torch.arange(key.shape[-2], device=key.device) < lengths.to(key.device)[:, None]
        return counts[:, None, None]
    return mask if isinstance(mask, Tensor) else None


def _out_of_sight(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function of which the layout is known: what it does inside is not looked at, and some compile it."""
    with torch._C.DisableTorchFunction():
        return function(*args, **kwargs)


@functools.cache
def _forms() -> dict[int, tuple[Any, bool]]:
    return {}


def _returns_more(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Tell whether a function returns more than its output, which versions of it do and others do not: by one call."""
    known = _forms()
    if id(function) not in known or known[id(function)][0] is not function:
        known[id(function)] = function, isinstance(_out_of_sight(function, args, kwargs), tuple)
    return known[id(function)][1]


def _videos(runs: Runs) -> int:
    return sum(count for is_text, count in runs if not is_text)


_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_MULTI_HEAD_ARGUMENTS = tuple(inspect.signature(F.multi_head_attention_forward).parameters)
_SEAMS: dict[Any, Callable[[SelfAttention, tuple[Any, ...], dict[str, Any]], Any]] = {
    F.scaled_dot_product_attention: SelfAttention.scaled_dot_product,
    F.multi_head_attention_forward: SelfAttention.multi_head,
}
_SOFTMAX = (torch.softmax, Tensor.softmax, F.softmax)
