"""Published settings that change with the noise level, as their authors run them."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import stg_hooks as stg
from stg_hooks.adapters import PUBLISHED
from stg_hooks.guidance.published import Published
from stg_hooks.guidance.request import Request, plan_from
from tests import stock_pipelines
from tests.pipelines import build, build_pipeline, load_case, run, scheduler_inputs

LTX_13B = "LTX-Video 13B 0.9.8-dev"
# Lightricks' configuration of the 13B model, line by line; a "rescaling" of 1 switches it off there.
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


def test_it_is_recommended_for_its_model() -> None:
    pipe, _ = ltx_13b()
    assert len(stg.apply(pipe).plan.possible) == len(LEVELS)


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
        if CFG[i] > 1:
            uncond = uncond * (cond * uncond).sum() / uncond.square().sum()
        expected = uncond + CFG[i] * (cond - uncond) + SCALES[i] * (cond - weak)
        if RESCALING[i] != 1:
            expected = expected * (cond.std() / expected.std() * RESCALING[i] + 1 - RESCALING[i])
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


def sd35_pipeline() -> tuple[Any, dict[str, Any]]:
    """Build the pipeline of Stable Diffusion 3.5 medium, as deep as the published model and narrow."""
    stock = stock_pipelines.STOCK["StableDiffusion3Pipeline"]
    pipe = dataclasses.replace(stock, config={**stock.config, "num_layers": 24, "qk_norm": "rms_norm"}).build()
    return pipe, stock.call() | {"num_inference_steps": 10, "guidance_scale": 4.5}


def test_stable_diffusion_35_is_what_its_own_pipeline_does() -> None:
    """That pipeline can skip layers itself, with the published layers, scale and steps as its defaults."""
    pipe, call = sd35_pipeline()
    plain = stock_pipelines.run(pipe, call)
    expected = stock_pipelines.run(pipe, call | {"skip_guidance_layers": [7, 8, 9]})
    with stg.apply(pipe) as applied:
        got = stock_pipelines.run(pipe, call)
    assert [row.step.index for row in applied.trace] == [1]  # step 0 lies before 1 %, step 2 is 20 %
    assert applied.plan.base.active == (stg.Branch([7, 8, 9], 2.8),)
    assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(got, plain, rtol=1e-2, atol=1e-2)


def test_a_window_of_ones_own_replaces_the_published_one() -> None:
    pipe, _ = sd35_pipeline()
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


# --- every setting against its source's formula ---

WeakOf = Callable[..., Tensor]
"""Gives the weak prediction for layers, a mode and a kind of attention."""
Source = Callable[[Tensor, Tensor, WeakOf, int, int, float], Tensor]
"""The source's own code for one step: cond, uncond, weak, index, count and noise level."""


def plain(g: float, scale: float, layers: list[int], mode: str, rescale: float = 0.0) -> Source:
    """STGuidance (df04da0, 9cdd383), diffusers' community pipelines, Lightricks' 2B: the same in every step."""

    def step(c: Tensor, u: Tensor, weak: WeakOf, index: int, count: int, sigma: float) -> Tensor:
        out = u + g * (c - u) + scale * (c - weak(layers, mode))
        return out * (rescale * c.std() / out.std() + 1 - rescale) if rescale else out

    return step


def hunyuan_video(c: Tensor, u: Tensor, weak: WeakOf, index: int, count: int, sigma: float) -> Tensor:
    """STGuidance, HunyuanVideo/pipeline_stg_hunyuan_video.py: no CFG pass."""
    return c + 1.0 * (c - weak([2], "residual"))


def svd(c: Tensor, u: Tensor, weak: WeakOf, index: int, count: int, sigma: float) -> Tensor:
    """STGuidance 9cdd383, diffusers/stablevideodiffusion."""
    spatial, temporal = (weak([7], "attention", kind) for kind in ("spatial", "temporal"))
    out = u + 3.0 * (c - u) + 2.0 * (c - spatial) + 0.5 * (c - temporal)
    return out * (0.7 * c.std() / out.std() + 1 - 0.7)


def ltx_13b_first(c: Tensor, u: Tensor, weak: WeakOf, index: int, count: int, sigma: float) -> Tensor:
    """Lightricks/LTX-Video 5260738, pipeline_ltx_video.py: CFG with `cfg_star_rescale`, skip guidance, rescale."""
    i = row_of(sigma)
    out = c
    if CFG[i] > 1:
        star = u * ((c * u).sum() / (u.square().sum() + 1e-8))
        out = star + CFG[i] * (c - star)
    if SCALES[i] > 0:
        out = out + SCALES[i] * (c - weak(LAYERS[i], "values"))
        if RESCALING[i] != 1:
            out = out * (RESCALING[i] * c.std() / out.std() + 1 - RESCALING[i])
    return out


def ltx_13b_second(c: Tensor, u: Tensor, weak: WeakOf, index: int, count: int, sigma: float) -> Tensor:
    """The same code with `guidance_scale: [1]`, `stg_scale: [1]`, `skip_block_list: [27]`, `rescaling_scale: [1]`."""
    return c + 1.0 * (c - weak([27], "values"))


def sd35(c: Tensor, u: Tensor, weak: WeakOf, index: int, count: int, sigma: float) -> Tensor:
    """diffusers, pipeline_stable_diffusion_3.py: both ends of the window are left out."""
    out = u + 4.5 * (c - u)
    return out + 2.8 * (c - weak([7, 8, 9], "residual")) if count * 0.01 < index < count * 0.2 else out


SOURCES: dict[str, Source] = {
    "Mochi 1": plain(4.5, 1.0, [34], "residual"),
    "LTX-Video 2B (0.9 to 0.9.6-dev)": plain(3.0, 1.0, [19], "residual"),
    "LTX-Video 2B (0.9 to 0.9.6-dev), Lightricks": plain(3.0, 1.0, [19], "values", 0.7),
    LTX_13B: ltx_13b_first,
    f"{LTX_13B}, second pass": ltx_13b_second,
    "CogVideoX-2B": plain(6.0, 1.0, [11], "residual"),
    "CogVideoX-5B": plain(6.0, 4.0, [30], "attention", 0.7),
    "HunyuanVideo": hunyuan_video,
    "Wan 2.1 1.3B": plain(5.0, 2.0, [2], "residual"),
    "Wan 2.1 14B": plain(5.0, 1.0, [8], "residual"),
    "Stable Video Diffusion": svd,
    # What LTX2Pipeline's modality guidance and its rescale of clean samples leave to it.
    "LTX-2": plain(3.0, 1.0, [29], "values"),
    "LTX-2.3": plain(3.0, 1.0, [28], "values"),
    "Stable Diffusion 3.5 medium": sd35,
}


def a_weak_prediction(cond: Tensor, layers: list[int], mode: str, kind: str | None = None) -> Tensor:
    """Return another one for each choice of layers, mode and kind."""
    generator = torch.Generator().manual_seed(sum(map(ord, f"{layers}{mode}{kind}")))
    return cond + 0.3 * torch.randn(cond.shape, generator=generator)


@pytest.mark.parametrize("count", [30, 100])
@pytest.mark.parametrize("setting", PUBLISHED, ids=lambda setting: setting.name)
def test_every_published_setting_is_its_sources_formula(setting: Published, count: int) -> None:
    model = type(setting.model, (torch.nn.Module,), {"config": dict(setting.where)})()
    c, u = torch.randn(2, 1, 4, 3, 6, generator=torch.Generator().manual_seed(0))
    weak = functools.partial(a_weak_prediction, c)
    plan = plan_from(model, Request(preset=setting.name))
    levels = [1 - (index / count) ** 3 for index in range(count)]  # many steps at much noise
    for index, sigma in [*enumerate(levels), *((count - 1, level) for level in LEVELS)]:
        now = plan.at(stg.Step(index, count, sigma, "flow"))
        got = stg.combine(
            c,
            [weak(branch.layers, branch.mode, branch.kind) for branch in now.active],
            None if setting.name == "HunyuanVideo" else u,
            scale=[branch.scale for branch in now.active],
            guidance_scale=setting.guidance_scale if now.guidance_scale is None else now.guidance_scale,  # type: ignore[arg-type]
            rescale=now.rescale,
            rule=now.rule,
        )
        expected = SOURCES[setting.name](c, u, weak, index, count, sigma)
        assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_rule_of_ones_own_replaces_the_published_one() -> None:
    pipe, _ = ltx_13b()
    for rule, expected in ((None, "zero_star"), ("apg", "apg"), ("cfg", "cfg")):
        given = {} if rule is None else {"rule": rule}
        assert {now.rule for now in stg.apply(pipe, preset=LTX_13B, **given).plan.possible} == {expected}


@pytest.mark.parametrize("setting", PUBLISHED, ids=lambda setting: setting.name)
def test_every_published_setting_is_for_a_class_and_a_configuration_that_exist(setting: Published) -> None:
    cls = getattr(diffusers, setting.model)
    assert set(setting.where) <= set(inspect.signature(cls.__init__).parameters)
    assert setting.source
