"""The modes: what a skipped layer gives instead of its own output, and what each needs of the layer.

A mode is one class. To add one, write it below and put it into `MODES`: errors, checks and tests go through that table.
"""

from __future__ import annotations

import abc
import dataclasses
import math
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from stg_hooks.checks import is_count, is_real
from stg_hooks.errors import BlockError, SettingError
from stg_hooks.model import objects
from stg_hooks.model.objects import copied
from stg_hooks.model.source import bound_arguments
from stg_hooks.modes.attention_calls import AttentionCall
from stg_hooks.modes.blur import gaussian_blur
from stg_hooks.modes.perturbation import LayerCall, Mode, Perturbation
from stg_hooks.modes.sublayer import passed_or_zeros
from stg_hooks.names import named


@dataclasses.dataclass(frozen=True)
class Residual(Perturbation):
    """Bypass a block: every stream leaves it as it entered, `z_{l+1} = z_l` (STG-R).

    The block is not computed, except once where its source does not tell what it returns. It gives its inputs in the
    structure of its output; zeros for a sublayer, to which the model itself adds them.

    Source: STG, arXiv 2411.18664, Eq. 15.
    """

    name = "residual"
    needs = "block"
    is_bypass = True
    verb = "bypasses"

    def __call__(self, call: LayerCall) -> Any:
        """Return the inputs of the block."""
        through = call.streams.passed_through(call.forward, call.args, call.kwargs)
        if not call.streams.may_be_sublayer:
            return through
        return passed_or_zeros(call.layer, call.args, call.kwargs, through, call.memory)


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
    """Blur the queries of self-attention over the video tokens, `softmax(G_sigma(Q) K^T) V`.

    Without a width, by their mean, `softmax(mean(Q) K^T) V`: the limit of an infinite one. `"smoothed(sigma=10)"` blurs
    with a Gaussian of that width, in tokens, within each frame; the tokens are one square frame, unless `height` and
    `width` say how many there are in a frame's column and row: `"smoothed(sigma=10, height=32, width=56)"`.

    Source: SEG, arXiv 2408.00760, Eq. 11; the kernel of its code, cut off at 3 sigma and reflected at the edges.
    """

    name = "smoothed"
    sees_text = True
    sigma: float | None = None
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        if self.sigma is not None and not (is_real(self.sigma) and 0 < self.sigma < math.inf):
            raise SettingError(f"{self}: expected sigma above 0, in tokens; leave it out for the mean of all.")
        sides = self.height, self.width
        if any(side is not None for side in sides) and not (self.sigma and all(map(is_count, sides))):
            raise SettingError(f"{self}: height and width, in tokens, come together, and with a sigma.")

    def change(self, attention: AttentionCall) -> Any:
        """Return the attention of blurred queries."""
        return attention.blurred_queries(self._blurred)

    def _blurred(self, tokens: Tensor) -> Tensor:
        """Blur `(..., tokens, channels)`."""
        if self.sigma is None:
            return tokens.mean(-2, keepdim=True).expand_as(tokens)
        total = tokens.shape[-2]
        height, width = (self.height or math.isqrt(total)), (self.width or math.isqrt(total))
        if total % (height * width) or (self.height is None and height * width != total):
            side = next(n for n in range(math.isqrt(total), 0, -1) if total % n == 0)
            like = dataclasses.replace(self, height=side, width=total // side)
            raise BlockError(
                f"{self} blurs within frames, and {total} tokens are "
                + ("no square" if self.height is None else f"no whole number of frames of {height} x {width}")
                + f". Say how many tokens the columns and rows of a frame have, such as {like}."
            )
        return gaussian_blur(tokens.unflatten(-2, (-1, height, width)), self.sigma).flatten(-4, -2)


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
        through = call.streams.passed_through(call.forward, call.args, call.kwargs)
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
class Isolated(Perturbation):
    """Let a block's streams not attend to each other, video not to audio nor audio to video; text they go on to see.

    Source: LTX-2's modality guidance, `isolate_modalities` of diffusers.
    """

    name = "isolated"
    needs = "streams"
    is_of_model = True
    verb = "isolates the streams of"

    def __call__(self, call: LayerCall) -> Any:
        """Compute the layer with the attention between its streams giving zero."""
        return call.isolation.run(call.streams, call.forward, call.args, call.kwargs)


@dataclasses.dataclass(frozen=True)
class Dropout(Perturbation):
    """Compute a layer, and drop a part of the channels of its tokens, `z -> z * m / (1 - p)` with m 0 at the part p.

    Name a block, or the attention or feed-forward network in it. m depends on the layer's name and on
    `torch.manual_seed`. It is the same for all rows and in every call, and the caller's random state is not used.

    Source: the option `dropout` of diffusers' `LayerSkipConfig`, which draws m anew in each call.
    """

    name = "dropout"
    needs = "layer"
    mixes_tokens = True
    p: float = 0.5

    def __post_init__(self) -> None:
        """Check the value."""
        if not (is_real(self.p) and 0 < self.p < 1):
            raise SettingError(f"{self}: expected a part p between 0 and 1. mode='residual' leaves out whole blocks.")

    def __call__(self, call: LayerCall) -> Any:
        """Compute the layer and drop a part of its output."""
        name = call.name.replace("_orig_mod.", "").removeprefix("module.")  # what torch's wrappers put before it
        seed = (torch.initial_seed() + zlib.crc32(name.encode())) % 2**63
        return objects.map_tensors(lambda leaf: self._dropped(leaf, seed), call.compute())

    def _dropped(self, output: Tensor, seed: int) -> Tensor:
        if not output.is_floating_point() or output.ndim < 2:
            return output
        generator = torch.Generator(output.device).manual_seed(seed)
        kept = torch.rand(output.shape[1:], generator=generator, device=output.device) >= self.p
        return torch.where(kept, output / (1 - self.p), 0.0)


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
    for mode in (
        *(Residual(), Attention(), Values(), AttentionInput(), FeedForward(), Smoothed(), Shuffled(), Isolated()),
        Dropout(),
    )
}


ELSEWHERE = {
    **dict.fromkeys(("stg-r", "slg", "skip", "skip-layer", "bypass"), "residual"),
    **dict.fromkeys(("stg-a", "identity"), "attention"),
    **dict.fromkeys(("pag", "stg-v", "value"), "values"),
    "seg": "smoothed",
    "tpg": "shuffled",
    **dict.fromkeys(("ff", "ffn", "mlp"), "feed-forward"),
}
"""What papers and other tools call the modes."""


def find_mode(mode: str | Mode) -> Perturbation:
    """Look up a mode by name; a callable is a mode already.

    Args:
        mode: a name among `MODES`, with values such as `"smoothed(sigma=10)"`, or a callable that takes a `LayerCall`
            and returns what the layer should return.

    Returns:
        The mode.

    Raises:
        SettingError: an unknown name or value, or something that is neither a name nor a callable.
    """
    found: Any = named("mode", mode, MODES, ELSEWHERE)
    if isinstance(found, Perturbation):
        return found
    try:
        hash(found)
    except TypeError:  # its values may change: its bound method is equal only to that of the same object
        found = found.__call__
    return Custom(found)


def check_one_mode(layers: object, mode: str | Mode) -> None:
    """Raise where a mode is given beside layers that have one each."""
    if isinstance(layers, Mapping) and find_mode(mode) != MODES["residual"]:
        raise SettingError(
            f"layers={{...}} gives each layer its mode, and {find_mode(mode)} is another one. Leave mode out."
        )


def check_layers_given(layers: object, mode: Perturbation) -> None:
    """Raise `SettingError` where layers are left out with a mode that is not meant for a whole model."""
    if layers is None and not mode.is_of_model:
        raise SettingError(
            f"{mode} needs layers= to say where. stg.layers(model) lists them; stg.profile measures which do damage."
        )
