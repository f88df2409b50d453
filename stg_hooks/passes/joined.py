"""Cond and uncond in one call, where a denoiser has one row per sample in all that it is given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from stg_hooks.guidance.samples import takes_samples
from stg_hooks.passes.returned import predictions
from stg_hooks.passes.rows import halves


def joined_call(
    args: tuple[Any, ...], positive: dict[str, Any], negative: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Put the calls for uncond and cond together, rows `[uncond, cond]`.

    Args:
        args: positional arguments of both calls; their dimension 0 is the sample.
        positive: keyword arguments of the cond call.
        negative: keyword arguments of the uncond call.

    Returns:
        The arguments of one call, or `None` where they do not allow it.
    """
    if takes_samples(args, positive):
        return None
    (one, spec), (other, other_spec) = pytree.tree_flatten((args, negative)), pytree.tree_flatten((args, positive))
    tensors = [leaf for leaf in other if isinstance(leaf, Tensor)]
    if spec != other_spec or not tensors or tensors[0].ndim == 0:
        return None
    batch, leaves = tensors[0].shape[0], []
    for u, c in zip(one, other, strict=True):
        if isinstance(u, Tensor) and isinstance(c, Tensor):
            if u.shape != c.shape or u.ndim == 0 or u.shape[0] != batch:
                return None
            leaves.append(torch.cat([u, c]))
        elif u is c or (isinstance(u, (int, float, str)) and u == c):
            leaves.append(c)
        else:
            return None
    joined: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(leaves, spec)
    return joined


def halved_output(output: Any) -> tuple[Any, list[Tensor], list[Tensor | None]]:
    """Take what a denoiser returned for rows `[uncond, cond]` apart.

    Args:
        output: what it returned.

    Returns:
        What it would have returned for cond alone, and the cond and the uncond predictions.
    """
    outputs = predictions(output)
    rows = outputs[0].shape[0]

    def cond_half(leaf: Any) -> Any:
        is_of_rows = isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == rows
        return halves(leaf)[1] if is_of_rows else leaf

    return pytree.tree_map(cond_half, output), [halves(t)[1] for t in outputs], [halves(t)[0] for t in outputs]
