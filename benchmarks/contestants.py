"""The contestants: one guided step each, from the arguments of a call to the prediction that a scheduler gets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import diffusers
import torch
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
    "three": "one row more (published pipelines)",
    "full": "full extra pass (guiders)",
    "sequential": "ours, sequential",
    "batched": "ours, batched",
    "own": "the pipeline's own STG",
    "slg": "SkipLayerGuidance of diffusers",
    "modular": "ours, stg.modular.SkipGuidance",
}
USUAL = ("plain", "three", "full", "sequential", "batched")
GUIDED = tuple(name for name in TITLES if name != "plain")
OURS = ("sequential", "batched", "modular")
_EXECUTIONS = ("full", "sequential", "batched")


def of(shape: Shape) -> tuple[str, ...]:
    """Return the contestants that there are for a model."""
    if shape.guiders:
        return "plain", "slg", "modular"
    # Its own STG takes the place of the published pipelines, none of which is for it.
    return tuple("own" if name == "three" and shape.own_stg else name for name in USUAL)


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
    if shape.guiders:
        guider = guider_of(name, skipped)
        return Contestant(name, lambda: with_guider(guider, model, take(inputs, [1]), take(inputs, [0])))
    if name == "own":
        alone = take(inputs, [1])
        return Contestant(name, lambda: _own(model, take(inputs, rows), alone, skipped))
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
        model,
        layers=[skipped],
        scale=SCALE,
        mode=shape.mode,
        batched_cfg=shape.cfg,
        execution=execution,
    )
    return Contestant(name, lambda: _combined(model, usual, shape.cfg), lambda: guide)


def _combined(model: nn.Module, arguments: Inputs, cfg: bool) -> Tensor:
    """Do what a pipeline does: one call, and classifier-free guidance of what it returns."""
    prediction = model(**arguments, return_dict=False)[0]
    if not cfg:
        return prediction
    uncond, cond = prediction.chunk(2)
    return uncond + GUIDANCE_SCALE * (cond - uncond)


def _own(model: nn.Module, arguments: Inputs, alone: Inputs, skipped: int) -> Tensor:
    """Do what LTX2Pipeline does: a whole call more, in which the model itself perturbs a block."""
    uncond, cond = model(**arguments, return_dict=False)[0].chunk(2)
    weak = model(**alone, spatio_temporal_guidance_blocks=[skipped], return_dict=False)[0]
    return uncond + GUIDANCE_SCALE * (cond - uncond) + SCALE * (cond - weak)


def guider_of(name: str, skipped: int) -> Any:
    """Make the guider of a modular pipeline."""
    if name == "plain":
        return diffusers.ClassifierFreeGuidance(guidance_scale=GUIDANCE_SCALE)
    if name == "modular":
        return stg.modular.SkipGuidance(layers=[skipped], scale=SCALE, guidance_scale=GUIDANCE_SCALE)
    return diffusers.SkipLayerGuidance(
        guidance_scale=GUIDANCE_SCALE,
        skip_layer_guidance_scale=SCALE,
        skip_layer_guidance_start=0.0,
        skip_layer_guidance_stop=1.0,
        skip_layer_config=diffusers.LayerSkipConfig(indices=[skipped], fqn="blocks"),
    )


def with_guider(guider: Any, model: nn.Module, cond: Inputs, uncond: Inputs) -> Tensor:
    """Do what the loop of a modular pipeline does: a call for each prediction that the guider asks for."""
    guider.set_state(step=5, num_inference_steps=10, timestep=torch.tensor(500.0))  # in the middle, where all guide
    batches = guider.prepare_inputs({name: (cond[name], uncond[name]) for name in cond})
    for batch in batches:
        guider.prepare_models(model)
        arguments = {name: value for name, value in batch.as_dict().items() if name in cond}
        batch.noise_pred = model(**arguments, return_dict=False)[0]
        guider.cleanup_models(model)
    return guider(batches)[0]


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
