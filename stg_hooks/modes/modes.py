"""The modes: what a skipped layer gives back instead of its own output."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stg_hooks.errors import BlockError, named
from stg_hooks.model.source import bound_arguments
from stg_hooks.modes.attention import AttentionSeam, Change
from stg_hooks.modes.branches import bypassed
from stg_hooks.modes.feed_forward import FeedForwards
from stg_hooks.modes.residual import Streams, copied


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """One call of a skipped layer, as a mode sees it."""

    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    streams: Streams
    forward: Callable[..., Any]
    seam: AttentionSeam
    feed_forwards: FeedForwards
    memory: dict[str, Any]
    """Whatever a mode wants to remember from one call of the layer to the next."""

    def compute(self, attention: Change | None = None) -> Any:
        """Run the layer and return its real output.

        Args:
            attention: what a computation of self-attention inside gives instead, from an
                `attention_calls.AttentionCall`.
        """
        if attention is None:
            return self.forward(*self.args, **self.kwargs)
        return self.seam.run(attention, self.forward, self.args, self.kwargs)


Mode = Callable[[LayerCall], Any]


def residual(call: LayerCall) -> Any:
    """Bypass a block: every stream leaves it as it entered, `z_{l+1} = z_l` (STG-R).

    Args:
        call: the call of the block; it is not computed, except once where its source does not tell what it returns.

    Returns:
        The block's inputs, in the structure of its output; zeros for a branch, to which the model itself adds them.

    Source: STG, arXiv 2411.18664, Eq. 15.
    """
    through = call.streams.handed_through(call.forward, call.args, call.kwargs)
    if not call.streams.may_be_branch:
        return through
    return bypassed(call.layer, call.args, call.kwargs, through, call.memory)


def attention(call: LayerCall) -> Any:
    """Make the self-attention map the identity, `softmax(Q K^T) V -> I V`; projections, gate and residual stay (STG-A).

    In joint attention a video token attends to itself and to all text, and text to everything, as the authors run it.

    Source: STG, arXiv 2411.18664, Eq. 17; reference code, commit 9cdd383.
    """
    return call.compute(attention=lambda a: a.own_values_and_text() if a.sees_text else a.own_values())


def values(call: LayerCall) -> Any:
    """Give every token, text included, its own value in self-attention, `softmax(Q K^T) V -> V`.

    Source: PAG, arXiv 2403.17377, Eq. 14; LTX-2's perturbed attention.
    """
    return call.compute(attention=lambda a: a.own_values())


def attention_input(call: LayerCall) -> Any:
    """Put the (normalised) input of self-attention in its place, before the output projection, `softmax(Q K^T) V -> x`.

    Source: LTX-Video's `AttentionSkip`.
    """
    return call.compute(attention=lambda a: a.own_inputs())


def smoothed(call: LayerCall) -> Any:
    """Blur the queries of self-attention over all video tokens, `softmax(mean(Q) K^T) V`: the limit of infinite width.

    Source: SEG, arXiv 2408.00760, Eq. 11.
    """
    return call.compute(attention=lambda a: a.mean_queries())


def feed_forward(call: LayerCall) -> Any:
    """Let the feed-forward of a block add nothing, `x + FF(x) -> x`."""
    with call.feed_forwards.giving_zero():
        return call.compute()


def shuffled(call: LayerCall) -> Any:
    """Permute the tokens of the denoised stream at the entry of a block and restore their order after it.

    One permutation per number of tokens, the same in every call, so that no random numbers of the caller are used.

    Source: token perturbation guidance, arXiv 2506.10036.
    """
    stream = _token_stream(call)
    order = torch.randperm(stream.shape[1], generator=torch.Generator().manual_seed(0)).to(stream.device)
    back = order.argsort()
    handed_through = call.streams.handed_through(call.forward, call.args, call.kwargs)
    real = None if call.memory.get("order matters") else _computed_apart(call)
    args, kwargs = pytree.tree_map(lambda leaf: leaf[:, order] if leaf is stream else leaf, (call.args, call.kwargs))
    output = call.forward(*args, **kwargs)
    output = pytree.tree_map(lambda leaf, source: leaf[:, back] if source is stream else leaf, output, handed_through)
    if not call.memory.get("order matters"):
        _check_that_order_matters(call, output, real)
    return output


def _computed_apart(call: LayerCall) -> Any:
    args, kwargs = copied(call.args, call.kwargs)  # which the layer may write into
    return call.forward(*args, **kwargs)


def _check_that_order_matters(call: LayerCall, output: Any, real: Any) -> None:
    pairs = zip(pytree.tree_leaves(output), pytree.tree_leaves(real), strict=True)
    if all(torch.allclose(one, other, rtol=1e-4, atol=1e-6) for one, other in pairs if isinstance(one, Tensor)):
        raise BlockError(
            f"mode='shuffled' changes nothing in {type(call.layer).__name__}, which does not know where its tokens "
            "are: their positions come in elsewhere. Use mode='smoothed'."
        )
    call.memory["order matters"] = True


def _token_stream(call: LayerCall) -> Tensor:
    for value in bound_arguments(call.layer, call.args, call.kwargs).values():
        if isinstance(value, Tensor) and value.is_floating_point():
            if value.ndim == 3:
                return value
            break
    raise BlockError(
        f"mode='shuffled' permutes tokens, and the first tensor that {type(call.layer).__name__} was given is not "
        "(batch, tokens, channels). Use mode='smoothed', or skip a block inside it."
    )


MODES: dict[str, Mode] = {
    "residual": residual,
    "attention": attention,
    "values": values,
    "attention-input": attention_input,
    "feed-forward": feed_forward,
    "smoothed": smoothed,
    "shuffled": shuffled,
}
OF_ATTENTION = (attention, values, attention_input, smoothed)
"""Modes that replace the computation of attention inside a layer."""
BLIND_TO_TEXT = (values, attention_input)
"""Those among them that treat text and video alike."""
OF_BLOCKS = (residual, feed_forward, shuffled)
"""Modes that only a whole block can have."""


def find_mode(mode: str | Mode) -> Mode:
    """Look up a mode by name; a callable is a mode already.

    Args:
        mode: a name among `MODES`, or a callable that takes a `LayerCall` and returns what the layer should return.

    Returns:
        The callable.

    Raises:
        SettingError: a name that is no mode, or something that is neither.
    """
    return named("mode", mode, MODES)
