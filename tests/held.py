"""A kernel that torch cannot look into, held in the ways in which published models hold theirs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests import opaque
from tests.zoo import DIM

Compute = Callable[..., Tensor]


def kernel(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, softmax_scale: float | None = None) -> Tensor:
    """Compute attention of `(batch, tokens, heads, channels)`, as flash-attention does."""
    return opaque.attend(q, k, v).contiguous()


def packed(qkv: Tensor, softmax_scale: float | None = None) -> Tensor:
    """Take queries, keys and values in one tensor, `(batch, tokens, 3, heads, channels)`."""
    return opaque.attend(*qkv.unbind(2)).contiguous()


def packed_varlen(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Do so for sequences that lie one after the other, `(tokens, 3, heads, channels)`."""
    return opaque.attend_varlen(*qkv.unbind(1), cu_seqlens, cu_seqlens)


class Block(nn.Module):
    """A block that computes attention by something that it holds, or finds."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(DIM), nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, DIM // 2)).unbind(2)
        return x + self.proj(self.attention(q, k, v).flatten(-2))


class OfAttribute(Block):
    """`self.attn_func = flash_attn_func`, as PoPEAttention has it."""

    def __init__(self) -> None:
        super().__init__()
        self.attn_func = kernel

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attn_func(q, k, v)


BACKENDS: dict[str, Compute] = {"other": torch.add, "flash": kernel}


class OfDictionary(Block):
    """`ATTN_TYPES = {"flash": flash_attn_func, ...}`: hepattn."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return BACKENDS["flash"](q, k, v)


class OfOwnDictionary(Block):
    """The same, where each module keeps the dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.backends = {"flash": {"attention": kernel}}

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.backends["flash"]["attention"](q, k, v)


CANDIDATES = [("plain", torch.add), ("flash", kernel)]


class OfList(Block):
    """A list of pairs, of which the first that is there is taken."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dict(CANDIDATES)["flash"](q, k, v)


class OfPartial(Block):
    """`self.flash_attn_varlen_func = partial(flash_attn_varlen_func, fa_version=...)`: vLLM; MPT's `attn_fn`."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = functools.partial(functools.partial(kernel, causal=False), softmax_scale=None)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.inner(q, k, v)


flash_kernel = functools.partial(kernel, causal=False)


class OfNamedPartial(Block):
    """`flash_attn_varlen_func = partial(flash_attn_varlen_func, ver=4)` among the globals of a module: sglang."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_kernel(q, k, v)


class OfClass(Block):
    """`MultiHeadAttention.flash_attn_func = flash_attn_func`: set once, for all modules of a class."""

    function = staticmethod(kernel)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.function(q, k, v)


def by_default(q: Tensor, k: Tensor, v: Tensor, function: Compute = kernel) -> Tensor:
    return function(q, k, v)


class OfDefault(Block):
    """A default argument of a function beside it."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return by_default(q, k, v)


class OfOwnDefault(Block):
    """A default argument of a method, by keyword only."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor, *, function: Compute = kernel) -> Tensor:
        return function(q, k, v)


def closing_over(function: Compute) -> Compute:
    @functools.wraps(function)
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return function(q, k, v)

    return run


closed = closing_over(kernel)


class OfClosure(Block):
    """A decorated function: wrappers that gather heads from other devices."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return closed(q, k, v)


class Processor:
    """An object, not a module, as the processors of diffusers are, that is handed the function."""

    def __init__(self, function: Compute) -> None:
        self.flash_attn_func = function

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.flash_attn_func(q, k, v)


class OfProcessor(Block):
    """A processor that holds the function."""

    def __init__(self) -> None:
        super().__init__()
        self.processor = Processor(kernel)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.processor(q, k, v)


class Packed(Block):
    """`flash_attn_qkvpacked_func(qkv)`: k-diffusion."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed(torch.stack([q, k, v], dim=2))


class PackedVarlen(Block):
    """`flash_attn_varlen_qkvpacked_func(qkv, ends, ...)`: HunyuanVideo 1.5."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        qkv = torch.stack([q, k, v], dim=2)
        ends = torch.arange(len(q) + 1, dtype=torch.int32) * q.shape[1]
        return packed_varlen(qkv.flatten(0, 1), ends, q.shape[1]).unflatten(0, q.shape[:2])


HELD: tuple[type[Block], ...] = (
    OfAttribute, OfDictionary, OfOwnDictionary, OfList, OfPartial, OfNamedPartial, OfClass, OfDefault, OfOwnDefault,
    OfClosure, OfProcessor,
)  # fmt: skip


class Stack(nn.Module):
    """A model of such blocks."""

    def __init__(self, block: type[Block]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(3))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = x + text.mean(1, keepdim=True)
        for block in self.blocks:
            x = block(x)
        return x


def held_now() -> list[Any]:
    """List what holds the kernel in this module, to see that it is put back."""
    return [
        BACKENDS["flash"], CANDIDATES[1], flash_kernel, vars(OfClass)["function"], by_default.__defaults__,
        OfOwnDefault.attention.__kwdefaults__["function"], closed.__closure__[0].cell_contents,  # type: ignore[index]
        kernel, packed, packed_varlen,
    ]  # fmt: skip
