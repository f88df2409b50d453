"""What a mode can put in place of one computation of self-attention, in its three forms.

The forms are a call of `scaled_dot_product_attention`, a call of `multi_head_attention_forward`, and a softmax over
logits that the layer computes by hand. `attention` finds them and makes these objects.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from stg_hooks.errors import BlockError
from stg_hooks.modes.token_labels import Runs, part_of

Blur: TypeAlias = Callable[[Tensor], Tensor]
"""Puts weighted means over all tokens in the place of tokens, `(..., tokens, channels)`."""

_PART = 2**24
"""Logits of video tokens and text that are held at once."""


@dataclasses.dataclass(frozen=True)
class AttentionCall(abc.ABC):
    """One computation of self-attention.

    `runs` says which tokens of a joint attention are text: pairs `(is_text, how many)` in their order, empty where
    there is no text. `inputs` is what the attention module was given, what is denoised first.
    """

    runs: Runs
    inputs: tuple[Tensor, ...]

    @property
    def sees_text(self) -> bool:
        """Whether there is text among the tokens that are attended to."""
        return bool(self.runs)

    @abc.abstractmethod
    def own_values(self) -> Any:
        """Give every token its own value: the map is the identity, and is not computed."""

    @abc.abstractmethod
    def own_values_and_text(self) -> Any:
        """Let each video token attend to itself and to all text, and text to everything."""

    @abc.abstractmethod
    def blurred_queries(self, blur: Blur) -> Any:
        """Let each video token ask with a mean of the queries of all of them."""

    def own_inputs(self) -> Any:
        """Give every token its own input in place of what attention gives, before the output projection."""
        raise BlockError(
            "mode='attention-input': this layer computes its attention map by hand, which leaves nowhere to put "
            "its input. Use mode='values'."
        )

    def ranges(self, total: int) -> list[tuple[bool, slice]]:
        """Say where the runs are among all tokens."""
        return ranges_of(self.runs or ((False, total),))

    def _input_tokens(self, total: int) -> Tensor:
        """Put what the attention was given in the order of its tokens, `(batch, tokens, channels)`."""
        video, *others = (t.flatten(2).transpose(1, 2) if t.ndim == 4 else t for t in self.inputs)
        if video.shape[1] == total:
            return video
        text = [other for other in others if other.ndim == 3 and other.shape[1] + video.shape[1] == total]
        parts = [text[0] if is_text and text else video for is_text, _ in self.runs]
        if len(parts) != 2 or not text or text[0].shape[-1] != video.shape[-1]:
            raise self._no_input(total)
        return torch.cat(parts, dim=1)

    def _no_input(self, total: int) -> BlockError:
        return BlockError(
            f"mode='attention-input': the attention was given {[tuple(t.shape) for t in self.inputs]} and computes "
            f"{total} tokens of other channels, so the one cannot stand in for the other. Use mode='values'."
        )


@dataclasses.dataclass(frozen=True)
class ScaledDotProduct(AttentionCall):
    """A call of `scaled_dot_product_attention`, the arguments of which are `(..., heads, tokens, channels)`."""

    key_runs: Runs
    """As `runs`, for the keys: there may be text that is attended to, but does not attend itself."""
    query: Tensor
    key: Tensor
    value: Tensor
    options: dict[str, Any]

    @property
    def sees_text(self) -> bool:
        """Whether there is text among the keys."""
        return bool(self.key_runs)

    @property
    def rows_differ(self) -> bool:
        """Whether rows hold text in different places, so that each has to be a call of its own."""
        return any(isinstance(is_text, tuple) for is_text, _ in (*self.runs, *self.key_runs))

    def by_row(self) -> Iterator[ScaledDotProduct]:
        """Make a call of each row."""
        batch = len(self.query)

        def cut(value: Any, row: int) -> Any:
            return value[row : row + 1] if isinstance(value, Tensor) and value.ndim and len(value) == batch else value

        for row in range(batch):
            yield dataclasses.replace(
                self,
                runs=of_row(self.runs, row, batch),
                inputs=tuple(cut(tensor, row) for tensor in self.inputs),
                key_runs=of_row(self.key_runs, row, batch),
                query=self.query[row : row + 1],
                key=self.key[row : row + 1],
                value=self.value[row : row + 1],
                options={name: cut(value, row) for name, value in self.options.items()},
            )

    def compute(self, **changes: Any) -> Tensor:
        """Compute attention, with some of the arguments replaced."""
        given = {"query": self.query, "key": self.key, "value": self.value, **self.options}
        output: Tensor = F.scaled_dot_product_attention(**{**given, **changes})
        return output

    def own_values(self) -> Tensor:
        """`I V`."""
        return self._own(self._for_each_head(self.value))

    def own_values_and_text(self) -> Tensor:
        """No map of all tokens is needed: a softmax over one logit of the token itself and those of the text."""
        query, key, value = self.query, self._for_each_head(self.key), self._for_each_head(self.value)
        own_key, own_value = self._own(key), self._own(value)
        scale = self.options.get("scale") or query.shape[-1] ** -0.5
        mask = _added(self.options.get("attn_mask"), query.dtype)
        text = [rows for is_text, rows in ranges_of(self.key_runs) if is_text]
        text_key = torch.cat([key[..., rows, :] for rows in text], dim=-2).transpose(-1, -2)
        text_value = torch.cat([value[..., rows, :] for rows in text], dim=-2)
        part = max(1, _PART // (text_key.shape[-1] * query[..., 0, 0].numel()))
        output = torch.empty_like(own_value)
        for is_text, rows in self.ranges(query.shape[-2]):
            if is_text:
                of_text = None if mask is None else _rows(mask, rows)
                output[..., rows, :] = self.compute(query=query[..., rows, :], attn_mask=of_text, is_causal=False)
                continue
            for start in range(rows.start, rows.stop, part):
                some = slice(start, min(start + part, rows.stop))
                to_self = (query[..., some, :] * own_key[..., some, :]).sum(-1, keepdim=True).float() * scale
                to_text = (query[..., some, :] @ text_key).float() * scale
                if mask is not None:
                    to_text = to_text + torch.cat([_rows(mask, some)[..., columns] for columns in text], dim=-1)
                weights = torch.cat([to_self, to_text], dim=-1).softmax(-1).to(value.dtype)
                output[..., some, :] = weights[..., :1] * own_value[..., some, :] + weights[..., 1:] @ text_value
        return output

    def blurred_queries(self, blur: Blur) -> Tensor:
        """`softmax(blur(Q) K^T) V`."""
        return self.compute(query=_blurred_video(self.query, self.ranges(self.query.shape[-2]), blur))

    def own_inputs(self) -> Tensor:
        """`x`, split into heads."""
        heads, total, channels = self.query.shape[-3], self.query.shape[-2], self.value.shape[-1]
        given = self._input_tokens(total)
        if self.query.ndim != 4 or given.shape[-1] != heads * channels:
            raise self._no_input(total)
        split: Tensor = given.unflatten(-1, (heads, channels)).transpose(1, 2)
        return split

    def _for_each_head(self, tensor: Tensor) -> Tensor:
        groups = self.query.shape[-3] // tensor.shape[-3] if self.options.get("enable_gqa") else 1
        return tensor.repeat_interleave(groups, -3) if groups > 1 else tensor

    def _own(self, tensor: Tensor) -> Tensor:
        """Choose the keys or values that belong to the queries."""
        if self.key_runs == self.runs:
            return tensor
        return torch.cat([tensor[..., rows, :] for is_text, rows in ranges_of(self.key_runs) if not is_text], dim=-2)


@dataclasses.dataclass(frozen=True)
class Opaque(ScaledDotProduct):
    """A call of an attention function that torch cannot look into; its arguments are put as torch's own takes them."""

    not_understood: tuple[str, ...] = ()
    """Arguments that change which keys count, or by how much, in a way that is not known."""

    def compute(self, **changes: Any) -> Tensor:
        """Compute attention with torch's own function, with some of the arguments replaced."""
        if self.not_understood:
            raise BlockError(
                f"the attention function was given {', '.join(self.not_understood)}, so what it computes cannot be "
                "computed in another way. Use mode='values', or mode='residual' on the block."
            )
        return super().compute(**changes)

    def own_values_and_text(self) -> Tensor:
        """Compute all where there is nothing but text."""
        return self.compute() if all(is_text for is_text, _ in self.runs) else super().own_values_and_text()

    def blurred_queries(self, blur: Blur) -> Tensor:
        """Compute all where there is nothing but text."""
        is_text = bool(self.runs) and all(is_text for is_text, _ in self.runs)
        return self.compute() if is_text else super().blurred_queries(blur)


def of_sequences(runs: Runs, query: Tensor, ends: Tensor | None) -> list[tuple[slice, Runs, Runs]]:
    """Say where sequences are that lie one after the other, and which of their tokens are text.

    Args:
        runs: the text among all tokens.
        query: `(..., tokens, channels)`.
        ends: where sequences begin and end.

    Returns:
        The tokens of each sequence, and its runs twice: for queries and keys.
    """
    stops = [0, query.shape[-2]] if ends is None else [*map(int, ends.tolist())]
    found = []
    for start, stop in itertools.pairwise(stops):
        part = part_of(runs, start, stop) if runs else ()
        part = part if any(is_text for is_text, _ in part) else ()
        if stop > start:
            found.append((slice(start, stop), part, part))
    return found


@dataclasses.dataclass(frozen=True)
class MultiHead(AttentionCall):
    """A call of `multi_head_attention_forward`, projections included; its arguments are `(tokens, batch, channels)`."""

    query: Tensor
    options: dict[str, Any]

    def compute(self, query: Tensor, **changes: Any) -> tuple[Tensor, None]:
        """Compute attention, with the queries and some of the options replaced."""
        given = {"query": query, "key": self.query, "value": self.query, **self.options, "need_weights": False}
        output, _ = F.multi_head_attention_forward(**{**given, **changes})
        return output, None

    def own_values(self) -> tuple[Tensor, None]:
        """Make each token a sequence of its own."""
        alone = self.query.flatten(0, -2).unsqueeze(0)
        unmasked = {"key_padding_mask": None, "attn_mask": None, "is_causal": False}
        extra = {"bias_k": None, "bias_v": None, "add_zero_attn": False}
        output, _ = self.compute(alone, key=alone, value=alone, **unmasked, **extra)
        return output.reshape(self.query.shape), None

    def own_values_and_text(self) -> tuple[Tensor, None]:
        """Mask what a video token may not attend to; the call includes the projections, so the whole map is needed."""
        mask = _between_videos(self.ranges(len(self.query)), self.query)
        given = _added(self.options.get("attn_mask"), self.query.dtype)
        return self.compute(self.query, attn_mask=mask if given is None else mask + given, is_causal=False)

    def blurred_queries(self, blur: Blur) -> tuple[Tensor, None]:
        """A mean commutes with the projection."""
        tokens = self.query.movedim(0, -2)
        return self.compute(_blurred_video(tokens, self.ranges(len(self.query)), blur).movedim(-2, 0))

    def own_inputs(self) -> tuple[Tensor, None]:
        """`x`, through the output projection."""
        return F.linear(self.query, self.options["out_proj_weight"], self.options["out_proj_bias"]), None


@dataclasses.dataclass(frozen=True)
class HandMade(AttentionCall):
    """A softmax over logits `(..., tokens, tokens)` that the layer computes by hand, and multiplies with its values."""

    logits: Tensor
    softmax: Callable[[Tensor], Tensor]

    def own_values(self) -> Tensor:
        """The identity."""
        some = self.softmax(self.logits[..., :1, :1])  # for its dtype
        return torch.eye(self.logits.shape[-1], dtype=some.dtype, device=some.device).expand(self.logits.shape)

    def own_values_and_text(self) -> Tensor:
        """Mask what a video token may not attend to."""
        return self.softmax(self.logits + _between_videos(self.ranges(self.logits.shape[-1]), self.logits))

    def blurred_queries(self, blur: Blur) -> Tensor:
        """A mean commutes with the product."""
        return self.softmax(_blurred_video(self.logits, self.ranges(self.logits.shape[-1]), blur))


def ranges_of(runs: Runs) -> list[tuple[bool, slice]]:
    """Say where runs are."""
    stops = list(itertools.accumulate(count for _, count in runs))
    return [(bool(is_text), slice(stop - count, stop)) for (is_text, count), stop in zip(runs, stops, strict=True)]


def of_row(runs: Runs, row: int, batch: int) -> Runs:
    """Return the runs of one row out of `batch`; empty where all its tokens are of one kind."""
    # A weak prediction's rows may ride along in a call of more rows: they come last.
    kinds = [(is_text[row - batch] if isinstance(is_text, tuple) else is_text, count) for is_text, count in runs]
    merged = [(kind, sum(n for _, n in group)) for kind, group in itertools.groupby(kinds, key=lambda run: run[0])]
    return tuple(merged) if len(merged) > 1 else ()


def _added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a mask as something to be added to logits."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)


def _rows(mask: Tensor, rows: slice) -> Tensor:
    return mask[..., rows, :] if mask.shape[-2] > 1 else mask


def _blurred_video(tokens: Tensor, ranges: list[tuple[bool, slice]], blur: Blur) -> Tensor:
    """Blur the video tokens, in the last dimension but one, and leave the text as it is."""
    parts = [tokens[..., rows, :] for _, rows in ranges]
    video = [part for (is_text, _), part in zip(ranges, parts, strict=True) if not is_text]
    blurred = iter(blur(torch.cat(video, -2)).split([part.shape[-2] for part in video], -2))
    return torch.cat(
        [part if is_text else next(blurred) for (is_text, _), part in zip(ranges, parts, strict=True)], dim=-2
    )


def _between_videos(ranges: list[tuple[bool, slice]], like: Tensor) -> Tensor:
    """Return what to add to the logits so that a video token sees no other one."""
    text = torch.cat([torch.full((rows.stop - rows.start,), is_text, device=like.device) for is_text, rows in ranges])
    seen = text | text[:, None] | torch.eye(len(text), dtype=torch.bool, device=like.device)
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill(~seen, -torch.inf)
