"""Calls with rows `[uncond, cond]` in which the weak model makes the uncond prediction."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from stg_hooks.errors import CallError
from stg_hooks.guidance.samples import are_samples, check_told, takes_samples
from stg_hooks.model.objects import copied
from stg_hooks.passes.execution import Execution
from stg_hooks.passes.guided_call import layout_of
from stg_hooks.passes.returned import own_predictions, replace_predictions
from stg_hooks.passes.rows import Rows, first_batch, halves, take_rows


def weak_halves(
    execution: Execution, denoiser: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Make a call in which the weak model of the first branch predicts the uncond rows.

    Each half is a call of its own. That they give what the whole call does is found out once for each layout; where
    they do not, or the model keeps something, both models make whole calls.

    Args:
        execution: computes the predictions of the denoiser.
        denoiser: makes the call.
        args: its positional arguments.
        kwargs: its keyword arguments.

    Returns:
        What the denoiser returns for the whole call, with these predictions.

    Raises:
        CallError: the call does not have two halves.
    """
    if takes_samples(args, kwargs):
        return _of_samples(execution, denoiser, args, kwargs)
    batch, context = first_batch(args, kwargs), execution.context
    if batch is None or batch % 2:
        raise CallError(f"a call with {batch or 'no'} rows cannot be [uncond, cond], which batched_cfg=True says.")
    unconds, conds = (Rows.chosen(half, batch) for half in (slice(batch // 2), slice(batch // 2, None)))
    layout, before = layout_of(args, kwargs, conds), execution.look()
    halved = {layout, layout_of(args, kwargs, unconds)}
    if halved <= context.found.can_be_cut and not context.transactions.keeps_state:
        inputs, found = execution.inputs(args, kwargs), []
        for rows in (unconds, conds):
            assert rows is not None
            own_args, own_kwargs = take_rows(*inputs.again(), context.names, batch, rows.of(batch))
            with execution.switches[0].switched_on() if rows is unconds else nullcontext():
                output = denoiser(*own_args, **own_kwargs)
            found.append(own_predictions(output))
        if not before.differs():
            return replace_predictions(output, [torch.cat(pair) for pair in zip(*found, strict=True)])
        before.put_back()  # and go the long way, from now on
        args, kwargs = inputs.again()
    output, call = execution.cond_pass(denoiser, args, kwargs, unconds)
    own = own_predictions(output)
    counted = context.stats_so_far()
    (weak,) = execution.weak_predictions(call, [halves(tensor)[0] for tensor in own])
    context.restore_stats(counted)  # a weak pass takes the place of an uncond one
    if halved - context.found.can_be_cut == {layout}:
        other = dataclasses.replace(call, rows=conds, layout=layout, cond=[halves(tensor)[1] for tensor in own])
        if not execution.full.can_cut(other) and other.conclude is not None:
            other.conclude()
    joined = [torch.cat([uncond, halves(tensor)[1]]) for uncond, tensor in zip(weak, own, strict=True)]
    return replace_predictions(output, joined)


def _of_samples(
    execution: Execution, denoiser: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Make a call on a list of samples, which is not cut: both models predict all of them."""
    again = copied(args, kwargs)
    output, call = execution.cond_pass(denoiser, args, kwargs)
    own = own_predictions(output)
    (weak,) = execution.weak_predictions(call, own)
    if not isinstance(output, Tensor) and check_told(are_samples(own, *again), len(own), "on='uncond'"):
        half, rest = divmod(len(own), 2)
        if rest:
            raise CallError(f"a list of {len(own)} samples cannot be [uncond, cond], which batched_cfg=True says.")
        return replace_predictions(output, [*weak[:half], *own[half:]])
    pairs = zip(weak, own, strict=True)
    return replace_predictions(output, [torch.cat([halves(w)[0], halves(o)[1]]) for w, o in pairs])
