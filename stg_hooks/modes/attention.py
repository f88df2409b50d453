"""Find the self-attention that a layer computes, and let a mode replace it.

A `TorchFunctionMode`, in force in this thread while the layer runs, sees every torch function that the layer calls. It
passes those that compute self-attention to the mode and leaves everything else alone: cross-attention, other layers,
other threads. So attention processors, fused projections and hand-written blocks need no code of their own. What a mode
can do with the attention that is found is in `attention_calls`.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from stg_hooks.errors import BlockError, StgError
from stg_hooks.hooks.compiled import eagerly, is_compiled
from stg_hooks.hooks.forward import Action, Patch, patched, pushed
from stg_hooks.hosts import plain_attention
from stg_hooks.model import objects
from stg_hooks.model.layers import attention_modules
from stg_hooks.model.source import bound_arguments, signature_text
from stg_hooks.modes.attention_calls import AttentionCall, HandMade, MultiHead, Opaque, ScaledDotProduct, of_sequences
from stg_hooks.modes.kernels import advice, seeing
from stg_hooks.modes.layouts import Arguments, Layout
from stg_hooks.modes.residual import copied
from stg_hooks.modes.token_labels import (
    NOTHING,
    Provenance,
    Runs,
    carries_tokens,
    named_tensors,
)

if TYPE_CHECKING:
    from stg_hooks.modes.text_tokens import TextTokens

Change = Callable[[AttentionCall], Any]
"""What a computation of self-attention gives instead."""


class AttentionSeam:
    """The attention inside one layer: installed once, then replaced in single calls of the layer."""

    def __init__(
        self,
        layer: nn.Module,
        targets: Sequence[tuple[str, nn.Module]],
        text: TextTokens | None = None,
        named: Collection[str] = (),
    ) -> None:
        """Prepare for one layer; touch nothing.

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
        mode = _SelfAttention(change, needs_text=self._text is not None)
        known = self._text.given_to(self._layer, args, kwargs) if self._text else NOTHING
        targets = self._targets
        if self._computes_itself:
            targets = [(type(self._layer).__name__, self._layer)]
        before = copied(args, kwargs) if self._computes_itself is None else None
        inner = [(name, module) for name, module in targets if module is not self._layer]
        whole = [name for name, module in targets if module is self._layer]
        patches = [self._patches[id(module)] for module in (*(module for _, module in inner), *self._opaque)]
        actions = [mode.around(name, module) for name, module in inner] + [mode.through] * len(self._opaque)
        with pushed(patches, actions), seeing(mode.kernel), mode:
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

    def _explain(self, mode: _SelfAttention, targets: Sequence[tuple[str, nn.Module]], run: Callable[[], Any]) -> str:
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


class _SelfAttention(TorchFunctionMode):
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
        query, key, value = (given[which] for which in (layout.q, layout.k, layout.v))
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


def _videos(runs: Runs) -> int:
    return sum(count for is_text, count in runs if not is_text)


_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_MULTI_HEAD_ARGUMENTS = tuple(inspect.signature(F.multi_head_attention_forward).parameters)
_SEAMS: dict[Any, Callable[[_SelfAttention, tuple[Any, ...], dict[str, Any]], Any]] = {
    F.scaled_dot_product_attention: _SelfAttention.scaled_dot_product,
    F.multi_head_attention_forward: _SelfAttention.multi_head,
}
_SOFTMAX = (torch.softmax, Tensor.softmax, F.softmax)
