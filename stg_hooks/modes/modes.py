"""The modes: what a skipped layer gives instead of its own output, and what each needs of the layer.

A mode is one class. To add one, write it below and put it into `MODES`: errors, checks and tests go through that table.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stg_hooks.errors import BlockError, named
from stg_hooks.model.source import bound_arguments
from stg_hooks.modes.attention import AttentionSeam
from stg_hooks.modes.attention_calls import AttentionCall
from stg_hooks.modes.branches import bypassed
from stg_hooks.modes.feed_forward import FeedForwards
from stg_hooks.modes.residual import Streams, copied
from stg_hooks.modes.self_attention import Change


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
    """What a mode keeps from one call of the layer to the next."""

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
"""What a user may pass as a mode, besides a name: takes the call and returns what the layer should return."""

Needs = Literal["block", "attention", "feed-forward", "anything"]
"""What a layer must be or hold: a whole block, self-attention, a block with a feed-forward network."""


class Perturbation(abc.ABC):
    """A mode that says what it needs."""

    name: ClassVar[str]
    needs: ClassVar[Needs]
    sees_text: ClassVar[bool] = False
    """Whether it has to know which tokens of a joint attention are text."""
    is_bypass: ClassVar[bool] = False
    """Whether the layer is not computed at all."""
    mixes_tokens: ClassVar[bool] = False
    """Whether tokens move to other places, so that it needs all of them on one device."""
    verb: ClassVar[str] = "is for"
    """What it does with a layer, for errors: `mode='residual' bypasses whole blocks`."""

    @abc.abstractmethod
    def __call__(self, call: LayerCall) -> Any:
        """Return what the layer gives instead."""

    def __str__(self) -> str:
        """Write the mode as it is typed, for errors."""
        return f"mode={self.name!r}"


@dataclasses.dataclass(frozen=True)
class Residual(Perturbation):
    """Bypass a block: every stream leaves it as it entered, `z_{l+1} = z_l` (STG-R).

    The block is not computed, except once where its source does not tell what it returns. It gives its inputs in the
    structure of its output; zeros for a branch, to which the model itself adds them.

    Source: STG, arXiv 2411.18664, Eq. 15.
    """

    name = "residual"
    needs = "block"
    is_bypass = True
    verb = "bypasses"

    def __call__(self, call: LayerCall) -> Any:
        """Return the inputs of the block."""
        through = call.streams.handed_through(call.forward, call.args, call.kwargs)
        if not call.streams.may_be_branch:
            return through
        return bypassed(call.layer, call.args, call.kwargs, through, call.memory)


class _OfAttention(Perturbation):
    """A mode that computes the layer with its self-attention replaced."""

    needs = "attention"

    def __call__(self, call: LayerCall) -> Any:
        """Compute the layer with its self-attention replaced."""
        return call.compute(attention=self.change)

    @abc.abstractmethod
    def change(self, attention: AttentionCall) -> Any:
        """Return what one computation of self-attention gives instead."""


@dataclasses.dataclass(frozen=True)
class Attention(_OfAttention):
    """Make the self-attention map the identity, `softmax(Q K^T) V -> I V`; projections, gate and residual stay (STG-A).

    In joint attention a video token attends to itself and to all text, and text to everything, as the authors run it.

    Source: STG, arXiv 2411.18664, Eq. 17; reference code, commit 9cdd383.
    """

    name = "attention"
    sees_text = True

    def change(self, attention: AttentionCall) -> Any:
        """Return `I V`, with the text where there is any."""
        return attention.own_values_and_text() if attention.sees_text else attention.own_values()


@dataclasses.dataclass(frozen=True)
class Values(_OfAttention):
    """Give every token, text included, its own value in self-attention, `softmax(Q K^T) V -> V`.

    Source: PAG, arXiv 2403.17377, Eq. 14; LTX-2's perturbed attention.
    """

    name = "values"

    def change(self, attention: AttentionCall) -> Any:
        """Return `V`."""
        return attention.own_values()


@dataclasses.dataclass(frozen=True)
class AttentionInput(_OfAttention):
    """Put the (normalised) input of self-attention in its place, before the output projection, `softmax(Q K^T) V -> x`.

    Source: LTX-Video's `AttentionSkip`.
    """

    name = "attention-input"

    def change(self, attention: AttentionCall) -> Any:
        """Return `x`."""
        return attention.own_inputs()


@dataclasses.dataclass(frozen=True)
class FeedForward(Perturbation):
    """Let the feed-forward of a block add nothing, `x + FF(x) -> x`."""

    name = "feed-forward"
    needs = "feed-forward"

    def __call__(self, call: LayerCall) -> Any:
        """Compute the layer with its feed-forward networks giving zero."""
        with call.feed_forwards.giving_zero():
            return call.compute()


@dataclasses.dataclass(frozen=True)
class Smoothed(_OfAttention):
    """Blur the queries of self-attention over all video tokens, `softmax(mean(Q) K^T) V`: the limit of infinite width.

    Source: SEG, arXiv 2408.00760, Eq. 11.
    """

    name = "smoothed"
    sees_text = True

    def change(self, attention: AttentionCall) -> Any:
        """Return `softmax(mean(Q) K^T) V`."""
        return attention.mean_queries()


@dataclasses.dataclass(frozen=True)
class Shuffled(Perturbation):
    """Permute the tokens of the denoised stream at the entry of a block and restore their order after it.

    One permutation per number of tokens, the same in every call, so that the caller's random state is not used.

    Source: token perturbation guidance, arXiv 2506.10036.
    """

    name = "shuffled"
    needs = "block"
    mixes_tokens = True

    def __call__(self, call: LayerCall) -> Any:
        """Compute the layer on permuted tokens."""
        stream = _token_stream(call)
        order = torch.randperm(stream.shape[1], generator=torch.Generator().manual_seed(0)).to(stream.device)
        back = order.argsort()
        through = call.streams.handed_through(call.forward, call.args, call.kwargs)
        real = None if call.memory.get("order matters") else _computed_apart(call)
        args, kwargs = pytree.tree_map(
            lambda leaf: leaf[:, order] if leaf is stream else leaf, (call.args, call.kwargs)
        )
        output = call.forward(*args, **kwargs)
        output = pytree.tree_map(lambda leaf, source: leaf[:, back] if source is stream else leaf, output, through)
        if not call.memory.get("order matters"):
            _check_that_order_matters(call, output, real)
        return output


@dataclasses.dataclass(frozen=True)
class Custom(Perturbation):
    """A function of the user's, which may do anything with any layer. Equal for the same function, and hashable."""

    function: Mode

    needs = "anything"
    sees_text = True

    def __call__(self, call: LayerCall) -> Any:
        """Call the function."""
        return self.function(call)

    def __str__(self) -> str:
        """Write what was passed."""
        return "the function passed as mode"


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


MODES: dict[str, Perturbation] = {
    mode.name: mode
    for mode in (Residual(), Attention(), Values(), AttentionInput(), FeedForward(), Smoothed(), Shuffled())
}


def find_mode(mode: str | Mode) -> Perturbation:
    """Look up a mode by name; a callable is a mode already.

    Args:
        mode: a name among `MODES`, or a callable that takes a `LayerCall` and returns what the layer should return.

    Returns:
        The mode.

    Raises:
        SettingError: an unknown name, or something that is neither a name nor a callable.
    """
    found: Any = named("mode", mode, MODES)
    if isinstance(found, Perturbation):
        return found
    try:
        hash(found)
    except TypeError:  # its values may change: its bound method is equal only to that of the same object
        found = found.__call__
    return Custom(found)
