"""The contestants: one guided step each, from the arguments of a call to the prediction that a scheduler gets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

import stg_hooks as stg
from benchmarks.shapes import Inputs, Shape, take

GUIDANCE_SCALE, SCALE = 4.5, 1.0


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A way to make a step: `step` is what is timed, `session` what is installed around it."""

    name: str
    step: Callable[[], Tensor]
    session: Callable[[], AbstractContextManager[Any]] = nullcontext


TITLES = {
    "plain": "plain call",
    "idle": "ours, scale 0",
    "three": "one row more (published pipelines)",
    "full": "full extra pass (guiders)",
    "sequential": "ours, sequential",
    "batched": "ours, batched",
}
_EXECUTIONS = ("full", "sequential", "batched")


def build(name: str, shape: Shape, model: nn.Module, inputs: Inputs, skipped: int) -> Contestant:
    """Prepare a contestant.

    Args:
        name: one of `TITLES`.
        shape: what is measured.
        model: the model.
        inputs: arguments for rows `[uncond, cond]`.
        skipped: number of the layer to skip.
    """
    rows = [0, 1] if shape.cfg else [1]
    if name == "three":
        layer = next(layer.module for layer in stg.layers(model) if layer.index == skipped)
        more = take(inputs, [*rows, 1])
        return Contestant(name, lambda: _by_hand(model, more, shape.cfg), lambda: _overwritten(layer, len(rows) + 1))
    usual = take(inputs, rows)
    if name == "plain":
        return Contestant(name, lambda: _combined(model, usual, shape.cfg))
    execution = name if name in _EXECUTIONS else "auto"
    # One session for all runs, as a pipeline has one for all steps: what a guide learns in the first step it keeps.
    guide = stg.apply(
        model, layers=[skipped], scale=0.0 if name == "idle" else SCALE, batched_cfg=shape.cfg, execution=execution
    )
    return Contestant(name, lambda: _combined(model, usual, shape.cfg), lambda: guide)


def _combined(model: nn.Module, arguments: Inputs, cfg: bool) -> Tensor:
    """Do what a pipeline does: one call, and classifier-free guidance of what it returns."""
    prediction = model(**arguments, return_dict=False)[0]
    if not cfg:
        return prediction
    uncond, cond = prediction.chunk(2)
    return uncond + GUIDANCE_SCALE * (cond - uncond)


def _by_hand(model: nn.Module, arguments: Inputs, cfg: bool) -> Tensor:
    """Do what the published pipelines do: the perturbed row is one more row of the batch."""
    rows = model(**arguments, return_dict=False)[0].chunk(3 if cfg else 2)
    cond, weak = rows[-2:]
    guided = rows[0] + GUIDANCE_SCALE * (cond - rows[0]) if cfg else cond
    return guided + SCALE * (cond - weak)


@contextmanager
def _overwritten(layer: nn.Module, rows: int) -> Iterator[None]:
    """Let a layer compute all rows, and overwrite the last one with what went in, as the published code does."""

    def overwrite(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = dict(zip(("hidden_states", "encoder_hidden_states"), args, strict=False)) | kwargs
        streams = output if isinstance(output, tuple) else (output,)
        for new, name in zip(streams, ("hidden_states", "encoder_hidden_states"), strict=False):
            last = new.shape[0] // rows  # more than one where frames are folded into the batch
            new[-last:] = given[name][-last:]

    handle = layer.register_forward_hook(overwrite, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
