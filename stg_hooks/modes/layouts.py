"""How an attention function takes its tensors: what an adapter states of it, and how that is read."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Layout:
    """What `ATTENTION_FUNCTIONS` states of a function that computes `softmax(q k^T) v`.

    Shapes are written with `b` (batch), `s` (tokens), `h` (heads) and `d` (channels of a head): `"b s h d"`,
    `"b h s d"`, `"b s (h d)"`, or `"(b s) h d"` for sequences that lie one after the other. Arguments are given by
    position or by name.
    """

    tensors: str | Mapping[Any, str]
    """The shape of queries, keys and values; or a shape for each value of the argument `by`, its default first."""
    q: int | str | tuple[int | str, int] = 0
    k: int | str | tuple[int | str, int] = 1
    v: int | str | tuple[int | str, int] = 2
    """The arguments that hold them. In one tensor: with their number in its dimension before heads, `("qkv", 0)`."""
    output: str | Mapping[Any, str] | None = None
    """The shape of the output, where it is another one; or a shape for each value of the argument `output_by`."""
    by: str | None = None
    output_by: str | None = None
    heads: int | str | None = None
    """The argument that holds the number of heads, where they are not a dimension of their own."""
    lengths: int | str | None = None
    """The argument that holds how many keys of each row count, `(b,)`; the others are padding."""
    ends: int | str | None = None
    """The argument that holds where sequences begin and end, `(sequences + 1,)`, for `"(b s) h d"`."""
    mask: int | str | None = None
    """The argument that holds a mask as `scaled_dot_product_attention` takes it."""
    scale: int | str | None = None
    """The argument that holds the factor of the logits."""


class Arguments:
    """The arguments of one call of an attention function."""

    def __init__(
        self, layout: Layout, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Bind arguments to parameters, as far as the function has a signature."""
        self._layout = layout
        self._args, self._kwargs = args, kwargs
        self._names, self._defaults = _parameters(function)

    def __getitem__(self, which: int | str) -> Any:
        """Return an argument by position or name; `None` where it was left out and has no default."""
        name = self._names[which] if isinstance(which, int) and which < len(self._names) else which
        position = self._names.index(name) if name in self._names else which
        if name in self._kwargs:
            return self._kwargs[str(name)]
        if isinstance(position, int) and position < len(self._args):
            return self._args[position]
        return self._defaults.get(str(name))

    def tensor(self, which: int | str | tuple[int | str, int]) -> Tensor:
        """Return queries, keys or values, alone or out of the tensor that holds several."""
        if isinstance(which, tuple):
            found: Tensor = self[which[0]].select(-3, which[1])
            return found
        alone: Tensor = self[which]
        return alone

    def get(self, which: int | str | None) -> Any:
        """Return an argument that may not be stated."""
        return None if which is None else self[which]

    @property
    def tensors(self) -> str:
        """The shape of queries, keys and values in this call."""
        return self._chosen(self._layout.tensors, self._layout.by)

    @property
    def output(self) -> str:
        """The shape of the output of this call."""
        stated = self._layout.output
        return self.tensors if stated is None else self._chosen(stated, self._layout.output_by)

    def _chosen(self, stated: str | Mapping[Any, str], by: str | None) -> str:
        if isinstance(stated, str):
            return stated
        value = self.get(by)
        return stated.get(value, next(iter(stated.values())))

    def not_understood(self) -> list[str]:
        """Name arguments that change what is computed in a way that no layout states."""
        found = [(name, self[name]) for name in _CHANGES]
        return [name for name, value in found if value is not None and value is not False and value not in _NO_CHANGE]

    def in_heads(self, tensor: Tensor) -> Tensor:
        """Return queries, keys or values as `(..., heads, tokens, channels)`."""
        shape = self.tensors
        if "(h d)" in shape:
            heads = self.get(self._layout.heads)
            tensor, shape = tensor.unflatten(-1, (int(heads), -1)), shape.replace("(h d)", "h d")
        return tensor if shape == "b h s d" else tensor.transpose(-3, -2)

    def as_output(self, computed: Tensor) -> Tensor:
        """Return `(..., heads, tokens, channels)` as the function would."""
        shape = self.output
        if shape == "b h s d":
            return computed
        computed = computed.transpose(-3, -2)
        return computed.flatten(-2) if "(h d)" in shape else computed.contiguous()


# Arguments of well-known kernels that change which keys count, or by how much, and values that change nothing.
_CHANGES = ("window_size", "alibi_slopes", "softcap", "block_mask", "score_mod", "block_table", "causal", "is_causal")
_NO_CHANGE: tuple[Any, ...] = ((-1, -1), [-1, -1], 0, 0.0)


def _parameters(function: Callable[..., Any]) -> tuple[list[str], dict[str, Any]]:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a function of an extension
        return [], {}
    defaults = {n: p.default for n, p in parameters.items() if p.default is not inspect.Parameter.empty}
    return list(parameters), defaults


# What the arguments that a layout may state are called.
_USUAL = {
    "heads": ("heads", "num_heads"),
    "lengths": ("k_lens", "kv_lens"),
    "ends": ("cu_seqlens_k", "cu_seqlens_kv"),
    "mask": ("attn_mask", "mask", "attn_bias", "attention_mask"),
    "scale": ("softmax_scale", "sm_scale", "scale"),
}


def guessed(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> str | None:
    """Write the layout that a function most likely has, from one call of it; `None` where that cannot be told."""
    names, _ = _parameters(function)
    given: dict[int | str, Any] = {(names[i] if i < len(names) else i): value for i, value in enumerate(args)}
    given.update(kwargs)
    tensors = [(name, t) for name, t in given.items() if isinstance(t, Tensor) and t.is_floating_point() and t.ndim > 2]
    if len(tensors) < 3 or len({t.ndim for _, t in tensors[:3]}) > 1:
        return None
    query = tensors[0][1]
    stated = {what: name for what, usual in _USUAL.items() for name in usual if name in names or name in kwargs}
    if query.ndim == 4:
        shape = "b s h d" if query.shape[1] >= query.shape[2] else "b h s d"
    else:
        shape = "b s (h d)" if "heads" in stated else "(b s) h d"
    parts = [f'"{shape}"']
    if [name for name, _ in tensors[:3]] not in (names[:3], [0, 1, 2]):
        parts += [f"{what}={name!r}" for what, (name, _) in zip(("q", "k", "v"), tensors, strict=False)]
    output = output[0] if isinstance(output, tuple) else output
    if isinstance(output, Tensor) and output.ndim != query.ndim:
        parts.append('output="b s (h d)"' if output.ndim == 3 else 'output="b s h d"')
    needed = {"heads": "(h d)", "ends": "(b s)"}
    parts += [f"{what}={name!r}" for what, name in stated.items() if needed.get(what, "") in shape]
    return f"Layout({', '.join(parts)})".replace("'", '"')
