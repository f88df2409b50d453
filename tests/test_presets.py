"""Published settings that change with the noise level, as their authors run them."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import stg_hooks as stg
from stg_hooks.adapters import PUBLISHED
from stg_hooks.settings import Published
from tests import stock_pipelines
from tests.pipelines import build, build_pipeline, load_case, run, scheduler_inputs

LTX_13B = "LTX-Video 13B 0.9.8-dev"
# Lightricks' configuration of the 13B model, line by line; its "rescaling" is 1 - rescale.
LEVELS = [1.0, 0.996, 0.9933, 0.9850, 0.9767, 0.9008, 0.6180]
LAYERS: list[list[int]] = [[], [11, 25, 35, 39], [22, 35, 39], [28], [28], [28], [28]]
SCALES = [0, 0, 4, 4, 4, 2, 1]
CFG = [1, 1, 6, 8, 6, 1, 1]
RESCALING = [1, 1, 0.5, 0.5, 1, 1, 1]


def ltx_13b() -> tuple[Any, dict[str, Any]]:
    """Build LTX's pipeline around a narrow model with as many blocks as the published one."""
    _, call, case = build("ltx")
    torch.manual_seed(0)
    model = diffusers.LTXVideoTransformer3DModel.from_config({**case.config, "num_layers": 48}).eval()
    pipe = build_pipeline(load_case("ltx"), model)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=30.0)  # much time at much noise
    return pipe, call | {"num_inference_steps": 8}


def row_of(timestep: float) -> int:
    """Their code: the first level that is not above the timestep, else the last one."""
    return next((i for i, level in enumerate(LEVELS) if level <= timestep), len(LEVELS) - 1)


@pytest.mark.parametrize(
    "timestep", [1.0, 0.9999, 0.996, 0.995, 0.99, 0.9850, 0.98, 0.95, 0.9008, 0.7, 0.618, 0.3, 0.01]
)
def test_what_holds_at_a_noise_level(timestep: float) -> None:
    pipe, _ = ltx_13b()
    i = row_of(timestep)
    settings = stg.apply(pipe, preset=LTX_13B).plan.at(stg.Step(sigma=timestep))
    found = [(branch.layers, branch.scale, branch.mode) for branch in settings.active]
    assert found == ([(LAYERS[i], SCALES[i], "values")] if SCALES[i] else [])
    assert settings.guidance_scale == CFG[i]
    assert settings.rescale == 1 - RESCALING[i]


def test_it_is_recommended_for_its_model() -> None:
    pipe, _ = ltx_13b()
    assert len(stg.apply(pipe).plan.known) == len(LEVELS)


@pytest.mark.slow
def test_a_run() -> None:
    """Step by step: CFG, skip guidance and rescale by hand from the plain pipeline's own predictions."""
    pipe, call = ltx_13b()
    call["guidance_scale"] = 5.0
    model = pipe.transformer
    calls: list[tuple[dict[str, Any], Tensor]] = []
    handle = model.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((kwargs, output[0].clone())), with_kwargs=True
    )
    with scheduler_inputs(pipe) as received, stg.apply(pipe, preset=LTX_13B) as applied:
        run(pipe, call)
    handle.remove()
    levels = [row.step.sigma for row in applied.trace]
    assert all(level is not None for level in levels)
    batched = [kwargs for kwargs, output in calls if output.shape[0] == 2]
    assert len(batched) == len(received) == 8
    rows = []
    for kwargs, got in zip(batched, received, strict=True):
        i = row_of(kwargs["timestep"][0].item() / 1000)
        rows.append(i)
        uncond, cond = model(**kwargs)[0].chunk(2)
        weak = cond
        if LAYERS[i]:
            with stg.skip(model, LAYERS[i], mode="values"):
                weak = model(**kwargs)[0].chunk(2)[1]
        expected = uncond + CFG[i] * (cond - uncond) + SCALES[i] * (cond - weak)
        factor = cond.std() / expected.std()
        expected = expected * (factor * (1 - RESCALING[i]) + RESCALING[i])
        assert_close(got.reshape(expected.shape), expected, rtol=1e-3, atol=1e-3)
    assert rows == [0, 2, 3, 4, 5, 5, 5, 6]
    assert applied.stats.weak_passes == sum(SCALES[i] > 0 for i in rows)


def test_another_model_is_refused() -> None:
    pipe, _, _ = build("ltx")
    blocks = len(pipe.transformer.transformer_blocks)
    with pytest.raises(
        stg.SettingError,
        match=rf"preset='{LTX_13B}' is for a LTXVideoTransformer3DModel with \{{'num_layers': 48\}}, but this is a "
        rf"LTXVideoTransformer3DModel with \{{'num_layers': {blocks}\}}\.",
    ):
        stg.apply(pipe, preset=LTX_13B)
    with pytest.raises(stg.SettingError, match=rf"Did you mean '{LTX_13B}'"):
        stg.apply(pipe, preset="LTX-Video 13B")


def test_a_distilled_model_says_that_there_is_no_cfg() -> None:
    pipe, call = ltx_13b()
    with pytest.raises(stg.CallError, match="makes no uncond prediction in this step"), stg.apply(pipe, preset=LTX_13B):
        run(pipe, call, guidance_scale=1.0)


def sd35() -> tuple[Any, dict[str, Any]]:
    """Build the pipeline of Stable Diffusion 3.5 medium, as deep as the published model and narrow."""
    stock = stock_pipelines.STOCK["StableDiffusion3Pipeline"]
    pipe = dataclasses.replace(stock, config={**stock.config, "num_layers": 24, "qk_norm": "rms_norm"}).build()
    return pipe, stock.call() | {"num_inference_steps": 10, "guidance_scale": 4.5}


def test_stable_diffusion_35_is_what_its_own_pipeline_does() -> None:
    """That pipeline can skip layers itself, with the published layers, scale and steps as its defaults."""
    pipe, call = sd35()
    plain = stock_pipelines.run(pipe, call)
    expected = stock_pipelines.run(pipe, call | {"skip_guidance_layers": [7, 8, 9]})
    with stg.apply(pipe) as applied:
        got = stock_pipelines.run(pipe, call)
    assert [row.step.index for row in applied.trace] == [1]  # step 0 lies before 1 %, step 2 is 20 %
    assert applied.plan.base.active == (stg.Branch([7, 8, 9], 2.8),)
    assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(got, plain, rtol=1e-2, atol=1e-2)


def test_a_window_of_ones_own_replaces_the_published_one() -> None:
    pipe, _ = sd35()
    assert "start=0.01, stop=0.2" in repr(stg.layers(pipe))
    for own, steps in (
        ({}, [1]),
        ({"stop": 0.5}, [0, 1, 2, 3, 4]),
        ({"start": 0.9}, [9]),
        ({"schedule": [(0, {})]}, list(range(10))),
    ):
        plan = stg.apply(pipe, preset="Stable Diffusion 3.5 medium", **own).plan
        guided = [index for index in range(10) if plan.at(stg.Step(index, 10, 0.5)).active]
        assert guided == steps
    pipe = dataclasses.replace(stock_pipelines.STOCK["StableDiffusion3Pipeline"]).build()
    with pytest.raises(stg.SettingError, match=r"is for a SD3Transformer2DModel with \{'num_layers': 24, 'qk_norm'"):
        stg.apply(pipe, preset="Stable Diffusion 3.5 medium")


def test_a_window_of_ones_own_keeps_what_changes_with_the_noise_level() -> None:
    pipe, _ = ltx_13b()
    plan = stg.apply(pipe, preset=LTX_13B, stop=0.5).plan
    assert plan.at(stg.Step(0, 10, 0.985)).guidance_scale == 8
    assert plan.at(stg.Step(5, 10, 0.985)).guidance_scale is None


@pytest.mark.parametrize("setting", PUBLISHED, ids=lambda setting: setting.name)
def test_every_published_setting_is_for_a_class_and_a_configuration_that_exist(setting: Published) -> None:
    cls = getattr(diffusers, setting.model)
    assert set(setting.where) <= set(inspect.signature(cls.__init__).parameters)
    assert setting.source
