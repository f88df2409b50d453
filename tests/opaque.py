"""Attention that torch cannot look into, as kernels of flash-attention are: it computes in numpy.

What it computes can be changed from outside, which is how tests make what a perturbed layer has to give.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Change = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
"""Makes the output of `(batch, heads, tokens, channels)` queries, keys, values and a mask."""


def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Compute attention."""
    q, k, v = (tensor.detach().double().numpy() for tensor in (query, key, value))
    logits = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    if mask is not None:
        logits = np.where(mask.numpy(), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return torch.from_numpy(weights / weights.sum(-1, keepdims=True) @ v).to(value.dtype)


@dataclasses.dataclass
class Kernel:
    """What the kernel computes now."""

    change: Change = plain


KERNEL = Kernel()


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return KERNEL.change(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, k_lens: Tensor | None = None, **_: Any) -> Tensor:
    """Compute attention of `(batch, tokens, heads, channels)`."""
    mask = None if k_lens is None else (torch.arange(k.shape[1]) < k_lens[:, None])[:, None, None]
    return _attend(q, k, v, mask)


def attend_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *_: Any, **__: Any
) -> Tensor:
    """Compute attention of sequences that lie one after the other, `(tokens, heads, channels)`."""
    output = torch.empty(len(q), *v.shape[1:], dtype=v.dtype)
    for i in range(len(cu_seqlens_q) - 1):
        rows, columns = (slice(int(ends[i]), int(ends[i + 1])) for ends in (cu_seqlens_q, cu_seqlens_k))
        if rows.start < rows.stop:
            output[rows] = _attend(q[rows][None], k[columns][None], v[columns][None])[0]
    return output
