"""Every row of docs/coming-from.md: the other tool's numbers beside ours."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import guiders
from diffusers.hooks import LayerSkipConfig
from diffusers.hooks.layer_skip import _apply_layer_skip_hook
from torch import Tensor, nn
from torch.testing import assert_close

import stg_hooks as stg
from tests import stock_pipelines, tiny_models, zoo

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "coming-from.md").read_text(encoding="utf-8")
close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
G = 4.0
STEPS = 28  # 0.2 of them is no whole number
SKIP = LayerSkipConfig([1])
WHOLE = {"skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}

MODEL: nn.Module = zoo.build("plain").requires_grad_(False)
X, TEXT = zoo.inputs().values()
OTHER = zoo.inputs(seed=7)["text"]
C, U = MODEL(X, TEXT), MODEL(X, OTHER)
W, WEAK_UNCOND = (zoo.without(MODEL, ["blocks.1"])(X, text) for text in (TEXT, OTHER))


def ours(index: int = 5, guidance_scale: float = G, count: int = STEPS, **settings: Any) -> Tensor:
    """Guide one step as the column on the right says."""
    guider = stg.Guider(MODEL, **{"layers": [1], **settings}, guidance_scale=guidance_scale)
    guider.step = stg.Step(index, count)
    found: Tensor = guider(X, cond={"text": TEXT}, uncond={"text": OTHER})
    return found


def theirs(guider: Any, *predictions: Tensor | None, index: int = 5, count: int = STEPS) -> Tensor:
    """Combine predictions as a guider of diffusers does in a step; those that it does not ask for are left out."""
    guider.set_state(index, count, torch.tensor(500))
    found: Tensor = guider.forward(*predictions).pred
    return found


def slg(**more: Any) -> Any:
    return guiders.SkipLayerGuidance(
        **{"guidance_scale": G, "skip_layer_guidance_scale": 2.8, "skip_layer_config": SKIP, **WHOLE, **more}
    )


def from_page(marker: str) -> dict[str, Any]:
    """Run the snippet of the page that holds a marker."""
    (code,) = [found for found in re.findall(r"```python\n(.*?)```", PAGE, re.S) if marker in found]
    names: dict[str, Any] = {"stg": stg, "functools": functools}
    exec(compile(code.split("\nwith ")[0], "coming-from.md", "exec"), names)
    return names


def window(start: float, stop: float) -> Callable[[stg.Step], Mapping[str, Any]]:
    found: Callable[[stg.Step], Mapping[str, Any]] = from_page("def window")["window"](start, stop)
    return found


def cfg_window(start: float, stop: float) -> Callable[[stg.Step], Mapping[str, Any]]:
    found: Callable[[stg.Step], Mapping[str, Any]] = from_page("def cfg_window")["cfg_window"](start, stop)
    return found


# --- diffusers' guiders: scales ---


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_the_scale_of_skip_layer_guidance(rescale: float) -> None:
    assert_close(ours(scale=2.8, rescale=rescale), theirs(slg(guidance_rescale=rescale), C, U, W), **close)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_without_cfg_its_scale_counts_from_the_weak_prediction(rescale: float) -> None:
    guider = slg(guidance_scale=1.0, guidance_rescale=rescale)
    expected = theirs(guider, C, None, W)
    assert_close(ours(scale=1.8, guidance_scale=1.0, rescale=rescale), expected, **close)
    assert not torch.allclose(ours(scale=2.8, guidance_scale=1.0, rescale=rescale), expected, rtol=1e-2, atol=1e-2)


def test_the_original_formulation() -> None:
    assert_close(ours(scale=2.8, guidance_scale=G + 1), theirs(slg(use_original_formulation=True), C, U, W), **close)
    no_cfg = slg(use_original_formulation=True, guidance_scale=0.0)
    assert_close(ours(scale=2.8, guidance_scale=1.0), theirs(no_cfg, C, None, W), **close)


def test_perturbed_attention_guidance() -> None:
    guider = guiders.PerturbedAttentionGuidance(
        guidance_scale=G,
        perturbed_guidance_scale=3.0,
        perturbed_guidance_layers=[1],
        perturbed_guidance_start=0.0,
        perturbed_guidance_stop=1.0,
    )
    with stg.skip(MODEL, [1], mode="values"):
        weak = MODEL(X, TEXT)
    assert_close(ours(scale=3.0, mode="values"), theirs(guider, C, U, weak), **close)
    guider.guidance_scale = 1.0
    assert_close(ours(scale=2.0, mode="values", guidance_scale=1.0), theirs(guider, C, None, weak), **close)


# --- diffusers' guiders: windows ---


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("bounds", [(0.01, 0.2), (0.0, 1.0), (0.25, 0.5), (0.1, 0.1)])
def test_the_window_of_skip_layer_guidance(bounds: tuple[float, float], rescale: float) -> None:
    guider = slg(skip_layer_guidance_start=bounds[0], skip_layer_guidance_stop=bounds[1], guidance_rescale=rescale)
    settings = {"scale": 2.8, "rescale": rescale, "schedule": window(*bounds)}
    for count in (20, STEPS):
        for index in range(count):
            expected = theirs(guider, C, U, W, index=index, count=count)
            assert_close(ours(index, count=count, **settings), expected, **close)


def test_the_window_of_cfg() -> None:
    guider = guiders.ClassifierFreeGuidance(guidance_scale=G, start=0.1, stop=0.6)
    for index in range(STEPS):
        expected = theirs(guider, C, U, index=index)
        assert_close(ours(index, scale=0.0, schedule=cfg_window(0.1, 0.6)), expected, **close)


# --- diffusers' guiders: which layers, and what they do instead ---


VALUES = {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False}


@pytest.mark.parametrize(
    ("name", "config", "layers", "mode"),
    [
        ("LTXVideoTransformer3DModel", LayerSkipConfig([0]), [0], "residual"),
        ("WanTransformer3DModel", LayerSkipConfig([1]), [1], "residual"),
        ("CogVideoXTransformer3DModel", LayerSkipConfig([1]), [1], "residual"),
        (
            "HunyuanVideoTransformer3DModel",
            LayerSkipConfig([0], fqn="single_transformer_blocks"),
            ["single_transformer_blocks.0"],
            "residual",
        ),
        ("CogView4Transformer2DModel", LayerSkipConfig([1], **VALUES), [1], "values"),
        ("PixArtTransformer2DModel", LayerSkipConfig([1], **VALUES), [1], "values"),
        ("QwenImageTransformer2DModel", LayerSkipConfig([1], **VALUES), [1], "values"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_the_layers_of_a_configuration(name: str, config: LayerSkipConfig, layers: list[Any], mode: str) -> None:
    model, inputs = tiny(name)
    with stg.skip(model, layers, mode=mode):
        got = model(**inputs)[0]
    plain = model(**inputs)[0]
    _apply_layer_skip_hook(model, config, name="peer")
    expected = model(**inputs)[0]
    assert_close(got, expected, **close)
    assert not torch.allclose(plain, expected, rtol=1e-3, atol=1e-3)


def test_what_raises_in_diffusers() -> None:
    """The page says which of its options cannot be used there."""
    model, inputs = tiny("SD3Transformer2DModel")
    by_number = guiders.SkipLayerGuidance(skip_layer_guidance_layers=[1], **WHOLE)
    by_number.set_state(5, STEPS, torch.tensor(500))
    by_number._count_prepared = 2
    with pytest.raises(TypeError):
        by_number.prepare_models(model)
    with pytest.raises(ValueError, match="Cannot set both"):
        _apply_layer_skip_hook(model, LayerSkipConfig([1], skip_attention_scores=True))
    for name, error in (("LTXVideoTransformer3DModel", AttributeError), ("SD3Transformer2DModel", ValueError)):
        with pytest.raises(error, match=r"is_cross_attention|not registered"):
            _apply_layer_skip_hook(tiny(name)[0], LayerSkipConfig([1], **VALUES))
    _apply_layer_skip_hook(model, LayerSkipConfig([1]))  # blocks that return text first
    with pytest.raises(RuntimeError, match="shape"):
        model(**inputs)


def test_smoothed_energy_guidance_of_diffusers_blurs_nothing() -> None:
    """Its third pass is the plain one, as the page says."""
    model, inputs = tiny("WanTransformer3DModel")
    plain = model(**inputs)[0]
    guider = guiders.SmoothedEnergyGuidance(
        guidance_scale=G, seg_guidance_config=guiders.smoothed_energy_guidance.SmoothedEnergyGuidanceConfig([1])
    )
    guider.set_state(5, STEPS, torch.tensor(500))
    for _ in range(3):
        guider.prepare_models(model)
        assert_close(model(**inputs)[0], plain, rtol=0, atol=0)
        guider.cleanup_models(model)


def test_auto_guidance_skips_in_the_uncond_pass() -> None:
    guider = guiders.AutoGuidance(guidance_scale=G, auto_guidance_config=SKIP)
    assert guider._input_predictions == ["pred_cond", "pred_uncond"]
    guider.set_state(5, STEPS, torch.tensor(500))
    guider._count_prepared = 1  # the cond pass is over
    model, inputs = tiny("WanTransformer3DModel")
    with stg.skip(model, [1]):
        expected = model(**inputs)[0]
    guider.prepare_models(model)
    assert_close(model(**inputs)[0], expected, **close)
    assert_close(ours(on="uncond"), theirs(guider, C, WEAK_UNCOND), **close)


def test_a_smaller_model_as_the_weak_one() -> None:
    """The paper's formula, arXiv 2406.02507, Eq. 3: w + g (c - w)."""
    assert_close(stg.combine(C, W, scale=G - 1), W + G * (C - W), **close)


def tiny(name: str) -> tuple[nn.Module, dict[str, Any]]:
    found = tiny_models.MODELS[name]
    return found.build(name), {**found.inputs(), "return_dict": False}


def test_several_configurations_are_a_mode_for_each_layer() -> None:
    model, inputs = tiny("PixArtTransformer2DModel")
    with stg.skip(model, {0: "residual", 1: "values"}):
        got = model(**inputs)[0]
    for number, config in enumerate((LayerSkipConfig([0]), LayerSkipConfig([1], **VALUES))):
        _apply_layer_skip_hook(model, config, name=f"peer{number}")
    assert_close(got, model(**inputs)[0], **close)


def test_settings_are_saved() -> None:
    settings = {"layers": {1: "values", 2: "residual"}, "scale": 2.0, "rule": "apg(eta=1.0, norm=15.0)"}
    first = stg.Guider(MODEL, guidance_scale=G, **settings)
    again = stg.Guider(MODEL, **json.loads(json.dumps(first.to_dict())))
    given = {"cond": {"text": TEXT}, "uncond": {"text": OTHER}}
    assert_close(again(X, **given), first(X, **given), rtol=0, atol=0)


# --- diffusers' guiders: rules ---


@pytest.mark.parametrize("zero_init_steps", [0, 1, 3])
def test_zero_star(zero_init_steps: int) -> None:
    guider = guiders.ClassifierFreeZeroStarGuidance(guidance_scale=G, zero_init_steps=zero_init_steps)
    schedule = stg.rules.zero_init(zero_init_steps)
    for index in range(6):
        expected = theirs(guider, C, U, index=index)
        assert bool((expected == 0).all()) is (index < zero_init_steps)
        assert_close(ours(index, scale=0.0, rule="zero_star", schedule=schedule), expected, **close)


def test_its_zeroed_steps_by_default() -> None:
    assert guiders.ClassifierFreeZeroStarGuidance().zero_init_steps == 1


def test_zeroed_steps_need_the_step() -> None:
    guider = stg.Guider(MODEL, [1], guidance_scale=G, rule="zero_star", schedule=stg.rules.zero_init())
    with pytest.raises(stg.CallError, match=r"zero_init is about the first steps of a run.*guider\.step = stg\.Step"):
        guider(X, cond={"text": TEXT}, uncond={"text": OTHER})
    for bad in (-1, 1.0, True, "1"):
        with pytest.raises(stg.SettingError, match=r"steps=.*expected a number of steps"):
            stg.rules.zero_init(bad)  # type: ignore[arg-type]


def test_adaptive_projected_guidance() -> None:
    """Predictions far from each other, so that the threshold of 15 counts."""
    c, u = 9 * C, 9 * U
    for own, rule in (
        ({}, "apg(eta=1.0, norm=15.0)"),
        ({"adaptive_projected_guidance_norm_dim": (-1,)}, "apg(eta=1.0, norm=15.0, norm_dim=(-1,))"),
        ({"eta": 0.0, "adaptive_projected_guidance_rescale": 0.0}, "apg"),
    ):
        expected = theirs(guiders.AdaptiveProjectedGuidance(guidance_scale=G, **own), c, u)
        assert_close(stg.combine(c, [], u, scale=[], guidance_scale=G, rule=rule), expected, **close)


def test_its_momentum() -> None:
    guider = guiders.AdaptiveProjectedGuidance(guidance_scale=G, adaptive_projected_guidance_momentum=-0.5)
    rule = stg.rules.AveragedApg(-0.5, eta=1.0, norm=15.0)
    for index in range(4):
        c, u = (1 + index) * C, U
        guider.set_state(index, 4, torch.tensor(500))
        guider.prepare_inputs({"x": (c, u)})  # which starts its average
        expected = guider.forward(c, u).pred
        got = rule.at(stg.Step(index, 4), 0)(c, u, [], G)
        assert_close(got, expected, **close)


def test_adaptive_projected_mix() -> None:
    guider = guiders.AdaptiveProjectedMixGuidance(guidance_scale=G, adaptive_projected_guidance_momentum=None)
    mix = from_page("def mix")["mix"]
    for index in (0, 5, 6, 20):
        expected = theirs(guider, C, U, index=index)
        assert_close(ours(index, scale=0.0, schedule=mix), expected, **close)


@pytest.mark.parametrize("scale", [1.0, G])
def test_tangential_guidance(scale: float) -> None:
    guider = guiders.TangentialClassifierFreeGuidance(guidance_scale=scale if scale != 1 else 1.5)
    expected = theirs(guider, C, U)
    got = stg.combine(C, [], U, scale=[], guidance_scale=guider.guidance_scale, rule="tangential")
    assert_close(got, expected, **close)
    assert not torch.allclose(got, U + guider.guidance_scale * (C - U), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("alpha", [8.0, 0.5])
def test_magnitude_aware_guidance(alpha: float) -> None:
    rule = "magnitude_aware" if alpha == 8 else f"magnitude_aware(alpha={alpha})"
    expected = theirs(guiders.MagnitudeAwareGuidance(guidance_scale=G, alpha=alpha), C, U)
    assert_close(stg.combine(C, [], U, scale=[], guidance_scale=G, rule=rule), expected, **close)


def test_these_rules_where_a_prediction_is_zero() -> None:
    zero = torch.zeros_like(C)
    for rule in ("tangential", "magnitude_aware"):
        assert_close(stg.combine(C, [W], None, scale=1.5, rule=rule), C + 1.5 * (C - W), **close)
        for c, u in ((C, zero), (zero, zero), (zero, U)):
            assert stg.combine(c, [], u, scale=[], guidance_scale=G, rule=rule).isfinite().all()


def test_a_rule_of_ones_own_is_a_function_of_the_predictions() -> None:
    """As the row on frequency-decoupled guidance says; here with the means apart from the rest."""

    def two_scales(c: Tensor, u: Tensor | None, terms: Any, g: Any) -> Tensor:
        assert u is not None
        low, d = (c - u).mean(dim=1, keepdim=True), c - u
        return u + 2 * g * low + g * (d - low)

    d = C - U
    expected = U + 2 * G * d.mean(dim=1, keepdim=True) + G * (d - d.mean(dim=1, keepdim=True))
    assert_close(ours(scale=0.0, rule=two_scales), expected, **close)


# --- options of stock pipelines ---


def sd3(**call: Any) -> Tensor:
    stock = stock_pipelines.STOCK["StableDiffusion3Pipeline"]
    pipe = dataclasses.replace(stock, config={**stock.config, "num_layers": 4}).build()
    whole = stock.call() | {"num_inference_steps": 10, "guidance_scale": G}
    session = call.pop("session", None)
    if session is None:
        return stock_pipelines.run(pipe, whole | call)
    with stg.apply(pipe, **session):
        return stock_pipelines.run(pipe, whole)


@pytest.mark.parametrize("bounds", [(0.01, 0.2), (0.2, 0.5), (0.25, 0.55)])
def test_the_layers_that_stable_diffusion_3_skips_itself(bounds: tuple[float, float]) -> None:
    start, stop = bounds
    expected = sd3(skip_guidance_layers=[1, 2], skip_layer_guidance_start=start, skip_layer_guidance_stop=stop)
    inside = from_page("def pipeline_window")["pipeline_window"](start, stop)
    got = sd3(session={"layers": [1, 2], "scale": 2.8, "schedule": inside})
    assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(got, sd3(), rtol=1e-2, atol=1e-2)


def test_the_guidance_of_ltx_2() -> None:
    stock = stock_pipelines.STOCK["LTX2Pipeline"]
    pipe = stock.build()
    off = stock.call() | {"guidance_rescale": 0.0, "modality_scale": 1.0, "audio_modality_scale": 1.0}
    own = {"stg_scale": 1.0, "audio_stg_scale": 1.0, "spatio_temporal_guidance_blocks": [2]}
    expected = stock_pipelines.run(pipe, off | own)
    with stg.apply(pipe, layers=[2], mode="values", scale=1.0):
        got = stock_pipelines.run(pipe, off | {"stg_scale": 0.0, "audio_stg_scale": 0.0})
    assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(stock_pipelines.run(pipe, off), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("own", [{"guidance_rescale": 0.7}, {"modality_scale": 3.0, "audio_modality_scale": 3.0}])
def test_what_ltx_2_goes_on_doing_itself(own: dict[str, float]) -> None:
    """Without guidance of ours nothing changes; with it, what the pipeline does comes on top."""
    stock = stock_pipelines.STOCK["LTX2Pipeline"]
    pipe = stock.build()
    off = {"guidance_rescale": 0.0, "modality_scale": 1.0, "audio_modality_scale": 1.0}
    call = stock.call() | off | {"stg_scale": 0.0, "audio_stg_scale": 0.0}
    plain, theirs = stock_pipelines.run(pipe, call), stock_pipelines.run(pipe, call | own)
    with stg.apply(pipe, layers=[2], mode="values", scale=0.0):
        assert_close(stock_pipelines.run(pipe, call | own), theirs, rtol=0, atol=0)
    with stg.apply(pipe, layers=[2], mode="values", scale=1.0):
        both = stock_pipelines.run(pipe, call | own)
    assert not torch.allclose(both, theirs, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(theirs, plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("adaptive", [0.0, 0.003])
def test_perturbed_attention_of_pipelines(adaptive: float) -> None:
    stock = stock_pipelines.STOCK["StableDiffusionPipeline"]
    pipe, call = stock.build(), stock.call() | {"guidance_scale": G}
    theirs = diffusers.StableDiffusionPAGPipeline(**stock.build().components, pag_applied_layers=["mid"])
    expected = stock_pipelines.run(theirs, call | {"pag_scale": 3.0, "pag_adaptive_scale": adaptive})
    scale = stg.rules.adaptive_scale(3.0, adaptive) if adaptive else 3.0
    with stg.apply(pipe, layers=["mid_block.attentions.0"], mode="values", scale=scale):
        got = stock_pipelines.run(pipe, call)
    assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(stock_pipelines.run(pipe, call), expected, rtol=1e-2, atol=1e-2)


def test_the_layers_of_a_regular_expression() -> None:
    model, _ = tiny("PixArtTransformer2DModel")
    named = [name for name, module in model.named_modules() if re.search(r"blocks\.[13]$", name)]
    for layers in (re.compile(r"blocks\.[13]$"), r"re:blocks\.[13]$"):
        assert [layer.name for layer in stg.check(model, layers, "values")] == named != []


# --- STGuidance, commit df04da0, Mochi/pipeline_stg_mochi.py ---


@pytest.mark.parametrize("do_rescaling", [False, True])
def test_the_formula_of_stguidance(do_rescaling: bool) -> None:
    for row in range(len(C)):  # one video, as they run it: their standard deviation is that of the whole batch
        c, u, w = (t[row : row + 1] for t in (C, U, W))
        expected = u + 4.5 * (c - u) + 1.5 * (c - w)
        if do_rescaling:
            expected = expected * (0.7 * c.std() / expected.std() + 1 - 0.7)
        got = stg.combine(c, w, u, scale=1.5, guidance_scale=4.5, rescale=0.7 * do_rescaling)
        assert_close(got, expected, **close)


def test_scale_zero_is_the_plain_pipeline() -> None:
    assert_close(ours(scale=0.0), U + G * (C - U), **close)


def test_the_script_for_wan_has_no_equal() -> None:
    """Wan2.1/pipeline.py: its weak prediction has the negative prompt, and is taken from the prediction with CFG."""
    guided = U + G * (C - U)
    theirs = guided + 0.9 * (guided - WEAK_UNCOND)
    for scale in (0.9, 0.9 * G):
        assert not torch.allclose(ours(scale=scale), theirs, rtol=1e-2, atol=1e-2)


# --- ComfyUI, commit 0c853f3, comfy_extras/nodes_slg.py; it combines predictions of the clean sample ---


@pytest.mark.parametrize("sigma", [0.95, 0.6, 0.59, 0.8, 0.96])
def test_the_nodes_of_comfyui(sigma: float) -> None:
    x = X
    clean_c, clean_u, clean_w = (x - sigma * v for v in (C, U, W))
    clean = clean_u + G * (clean_c - clean_u)
    if 0.6 <= sigma <= 0.95:  # both ends included
        clean = clean + 3.0 * (clean_c - clean_w)
    guider = stg.Guider(MODEL, [1], 3.0, guidance_scale=G, sigma_range=(0.6, 0.95))
    guider.step = stg.Step(sigma=sigma)
    velocity = guider(x, cond={"text": TEXT}, uncond={"text": OTHER})
    assert_close(x - sigma * velocity, clean, **close)


def test_the_simple_node_of_comfyui() -> None:
    """Its weak model takes the place of the uncond one; CFG is linear, so clean samples need not be formed."""
    x, sigma = X, 0.8
    clean_c, clean_weak = (x - sigma * v for v in (C, WEAK_UNCOND))
    clean = clean_weak + G * (clean_c - clean_weak)
    assert_close(x - sigma * ours(on="uncond"), clean, **close)


@pytest.mark.parametrize("shift", [1.0, 3.0, 8.0])
def test_a_percentage_of_comfyui_is_a_noise_level(shift: float) -> None:
    """comfy/model_sampling.py: the level of time 1 - p, shifted; here with the scheduler that diffusers shifts."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    levels = scheduler.sigmas  # of the training times 1, 0.999, ...
    for percent in (0.0, 0.1, 0.25, 0.5, 0.9):
        expected = levels[round(percent * 1000)].item()
        assert shift * (1 - percent) / (1 + (shift - 1) * (1 - percent)) == pytest.approx(expected, abs=1e-4)


def test_the_rescale_of_comfyui_is_about_clean_samples() -> None:
    x, sigma = X[:1], 0.8
    c, u, w = (x - sigma * v[:1] for v in (C, U, W))
    clean = u + G * (c - u) + 3.0 * (c - w)
    clean = clean * (0.5 * c.std() / clean.std() + 1 - 0.5)
    assert_close(stg.combine(c, w, u, scale=3.0, guidance_scale=G, rescale=0.5), clean, **close)
    velocity = stg.combine(*(v[:1] for v in (C, W, U)), scale=3.0, guidance_scale=G, rescale=0.5)
    assert not torch.allclose(x - sigma * velocity, clean, rtol=1e-2, atol=1e-2)


def test_a_schedule_as_a_list_of_noise_levels() -> None:
    found = from_row("`STGGuiderAdvanced`: lists", "schedule")
    guider = stg.Guider(MODEL, [1], 1.0, guidance_scale=G, schedule=found)
    for sigma, scale, g in ((1.0, 4.0, 8.0), (0.99, 4.0, 8.0), (0.98, 1.0, G), (0.1, 1.0, G)):
        guider.step = stg.Step(sigma=sigma)
        got = guider(X, cond={"text": TEXT}, uncond={"text": OTHER})
        assert_close(got, U + g * (C - U) + scale * (C - W), **close)


def test_windows_predicted_apart_are_a_weak_prediction() -> None:
    """Sliding window guidance, arXiv 2411.10257: c + s (c - w), where no layer is skipped."""
    windows = torch.cat([MODEL(x, TEXT) for x in X.chunk(2, dim=1)], dim=1)
    assert_close(stg.combine(C, windows, scale=5.0), C + 5.0 * (C - windows), **close)


# --- the page ---


def from_row(marker: str, setting: str) -> Any:
    """Evaluate a setting of the right column of a row."""
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| {marker}")]
    (code,) = re.findall(rf"`{setting}=(.*?)`", row)
    return eval(code, {"stg": stg, "re": re})


# By the first cell of a row: the tests that run it, here or in another file.
GOLDEN, AUDIO = "test_golden.py", "test_audio_and_video.py"
TESTS: dict[str, tuple[str, ...]] = {
    "a pipeline class of its own (`MochiSTGPipeline` and the like)": (GOLDEN,),
    "`stg_applied_layers_idx=[34]`": (GOLDEN,),
    "`stg_scale=1.0`": (GOLDEN, "test_the_formula_of_stguidance"),
    '`stg_mode="STG-R"`': (GOLDEN,),
    '`stg_mode="STG-A"`': (GOLDEN,),
    "`do_rescaling=True`": ("test_the_formula_of_stguidance",),
    "`stg_scale=0.0`": ("test_scale_zero_is_the_plain_pipeline",),
    "`skip_guidance_scale` of `Wan2.1/pipeline.py`": ("test_the_script_for_wan_has_no_equal",),
    "`SkipLayerGuidance(skip_layer_config=LayerSkipConfig([7, 8, 9]))`": ("test_the_layers_of_a_configuration",),
    "`skip_layer_guidance_layers=[7, 8, 9]`": ("test_what_raises_in_diffusers",),
    "`skip_layer_guidance_scale=2.8` with CFG": ("test_the_scale_of_skip_layer_guidance",),
    "the same without CFG (`guidance_scale=1.0`)": ("test_without_cfg_its_scale_counts_from_the_weak_prediction",),
    "`skip_layer_guidance_start=0.01`, `skip_layer_guidance_stop=0.2`": (
        "test_the_window_of_skip_layer_guidance",
        "test_the_layers_that_stable_diffusion_3_skips_itself",
    ),
    "`guidance_scale=4.0` of the guider": ("test_the_scale_of_skip_layer_guidance",),
    "`use_original_formulation=True` with CFG": ("test_the_original_formulation",),
    "the same without CFG (`guidance_scale=0.0` there)": ("test_the_original_formulation",),
    "`start=0.1`, `stop=0.6` of the guider, which are about CFG": ("test_the_window_of_cfg",),
    "`guidance_rescale=0.7`": ("test_the_scale_of_skip_layer_guidance",),
    '`LayerSkipConfig([7], fqn="single_transformer_blocks")`': ("test_the_layers_of_a_configuration",),
    "`LayerSkipConfig([7], skip_attention=False, skip_attention_scores=True, skip_ff=False)`": (
        "test_the_layers_of_a_configuration",
    ),
    "`LayerSkipConfig([7], skip_attention_scores=True)`": ("test_what_raises_in_diffusers",),
    "`PerturbedAttentionGuidance(perturbed_guidance_layers=[7], perturbed_guidance_scale=3.0)`": (
        "test_perturbed_attention_guidance",
    ),
    "`SmoothedEnergyGuidance(...)`": ("test_smoothed_energy_guidance_of_diffusers_blurs_nothing",),
    "`ClassifierFreeZeroStarGuidance()`": ("test_zero_star", "test_its_zeroed_steps_by_default"),
    "`zero_init_steps=0`": ("test_zero_star",),
    "`AdaptiveProjectedGuidance()`": ("test_adaptive_projected_guidance",),
    "`eta=0.0`, `adaptive_projected_guidance_rescale=0.0`": ("test_adaptive_projected_guidance",),
    "`adaptive_projected_guidance_momentum=-0.5`": ("test_its_momentum",),
    "`TangentialClassifierFreeGuidance()`": ("test_tangential_guidance",),
    "`MagnitudeAwareGuidance(alpha=8.0)`": ("test_magnitude_aware_guidance",),
    "`[LayerSkipConfig([7]), LayerSkipConfig([8], skip_attention=False, skip_attention_scores=True, skip_ff=False)]`, "
    "several configurations": ("test_several_configurations_are_a_mode_for_each_layer", "test_mode_per_layer.py"),
    "`LayerSkipConfig([7], skip_attention=False, dropout=0.3)`": ("test_mode_values.py",),
    "`seg_blur_sigma=10.0`, `seg_blur_threshold_inf`": ("test_mode_values.py",),
    "`adaptive_projected_guidance_norm_dim=(-1, -2)`": ("test_adaptive_projected_guidance", "test_rules.py"),
    "`AdaptiveProjectedMixGuidance(adaptive_projected_guidance_momentum=None)`": ("test_adaptive_projected_mix",),
    "`FrequencyDecoupledGuidance(guidance_scales=[10.0, 5.0])`": ("test_rules.py",),
    "`parallel_weights=0.5`": ("test_rules.py",),
    '`guidance_rescale_space="freq"`, a `start` and `stop` for each band': (
        "test_a_rule_of_ones_own_is_a_function_of_the_predictions",
    ),
    "`save_pretrained(...)`, `from_pretrained(...)`, `new(...)` of a guider": (
        "test_settings_are_saved",
        "test_settings_that_travel.py",
        "test_skip_guidance.py",
    ),
    '`pag_applied_layers=["blocks.[13]"]`, a regular expression': (
        "test_the_layers_of_a_regular_expression",
        "test_layers.py",
    ),
    "`pag_adaptive_scale=0.003`": ("test_perturbed_attention_of_pipelines", "test_rules.py"),
    "sd-perturbed-attention: `adaptive_scale=0.1`": ("test_rules.py",),
    "`rescale=0.7`, `rescale_mode` full": ("test_rules.py",),
    "`rescale_mode` partial": ("test_rules.py",),
    "`rescale_mode` snf": ("test_rules.py",),
    "`blur_sigma=10.0` of its SEG node; `-1`": ("test_mode_values.py", "test_modes.py"),
    "its Token Perturbation Guidance": ("test_modes.py",),
    "its Sliding Window Guidance": ("test_windows_predicted_apart_are_a_weak_prediction",),
    "its Frequency-Decoupled Guidance, `strength_high=12.0`": ("test_rules.py",),
    "its NAG, PLADIS": ("test_the_scale_of_skip_layer_guidance",),
    'KJNodes\' `SkipLayerGuidanceWanVideo`: `blocks="10"`, and SLG of WanVideoWrapper': (
        "test_the_simple_node_of_comfyui",
        "test_the_nodes_of_comfyui",
    ),
    'ComfyUI-LTXVideo\'s `STGGuider`, and its `Apply` with `block_indices="14, 19"`': ("test_comfyui_real.py",),
    "`STGGuiderAdvanced`: lists of `sigmas`, `cfg`, `stg`, `rescale`, `layers`": (
        "test_a_schedule_as_a_list_of_noise_levels",
        "test_comfyui.py",
    ),
    "`skip_steps_sigma_threshold=0.998`": ("test_comfyui.py", "test_zero_star"),
    'LTX-Video: `stg_mode="attention_values"`, `"attention_skip"`, `"transformer_block"`': ("test_modes.py",),
    "`stg_scale`, `rescaling_scale`, `skip_block_list`, `guidance_scale` as lists over `guidance_timesteps`": (
        "test_presets.py",
    ),
    "`cfg_star_rescale=True`": ("test_zero_star", "test_presets.py"),
    "`skip_initial_inference_steps`, `skip_final_inference_steps`": ("test_presets.py",),
    "ltx-core: `stg_scale`, `stg_blocks=[28]`, `rescale_scale`": ("test_the_guidance_of_ltx_2",),
    "`skip_step=1`": ("test_traces.py",),
    "`CFGStarRescalingGuider`, `LtxAPGGuider(eta=1.0, norm_threshold=15.0)`, its stateful one with `momentum`": (
        "test_zero_star",
        "test_adaptive_projected_guidance",
        "test_its_momentum",
    ),
    "SGLang-diffusion and vllm-omni, LTX-2: `stg_scale=1.0`, `stg_blocks=[28]`, `rescale_scale=0.7`": (
        "test_the_guidance_of_ltx_2",
    ),
    "vllm-omni: passes spread over devices": ("test_parallel.py",),
    "musubi-tuner: `--slg_layers 9,10`, `--slg_scale 3.0`, `--slg_start 0.0`, `--slg_end 0.3`": (
        "test_the_scale_of_skip_layer_guidance",
        "test_auto_guidance_skips_in_the_uncond_pass",
    ),
    "stable-diffusion.cpp: `--skip-layers 7,8,9`, `--slg-scale 2.5`, `--skip-layer-start 0.01`, "
    "`--skip-layer-end 0.2`": ("test_the_scale_of_skip_layer_guidance", "test_schedule.py"),
    "any of them: settings in a file": ("test_cli.py",),
    "`AutoGuidance(auto_guidance_config=LayerSkipConfig([7]))`": ("test_auto_guidance_skips_in_the_uncond_pass",),
    "a smaller model as the weak one, `guidance_scale=4.0`": ("test_a_smaller_model_as_the_weak_one",),
    "`StableDiffusion3Pipeline`: `skip_guidance_layers=[7, 8, 9]`": (
        "test_the_layers_that_stable_diffusion_3_skips_itself",
    ),
    "`skip_layer_guidance_scale=2.8`": ("test_the_layers_that_stable_diffusion_3_skips_itself",),
    "`LTX2Pipeline`: `stg_scale=1.0`, `audio_stg_scale=1.0`, `spatio_temporal_guidance_blocks=[29]`": (
        "test_the_guidance_of_ltx_2",
    ),
    "`LTX2Pipeline`: `stg_scale=1.0`, `audio_stg_scale=0.5`": (AUDIO,),
    "`LTX2Pipeline`: `modality_scale=3.0`, `audio_modality_scale=2.0`": (AUDIO,),
    "`LTX2Pipeline`: `guidance_rescale=0.7`, `audio_guidance_rescale=0.4`": (AUDIO,),
    "`LTX2Guidance(3.0, stg_scale=1.0, spatio_temporal_guidance_blocks=[28])` of modular pipelines": (
        "test_skip_guidance.py",
    ),
    "its `modality_scale=3.0`": (AUDIO,),
    "ltx-core: `MultiModalGuiderParams(cfg_scale=3.0, stg_scale=1.0, stg_blocks=[29])` for video and audio": (AUDIO,),
    "ltx-core: `rescale_scale=0.7`": (AUDIO,),
    "ltx-core: `modality_scale=3.0`": (AUDIO,),
    "ltx-core: other `stg_blocks` for video than for audio, in one weak pass": (AUDIO,),
    '`StableDiffusionPAGPipeline(..., pag_applied_layers=["mid"])` and the other PAG pipelines: `pag_scale=3.0`': (
        "test_perturbed_attention_of_pipelines",
    ),
    "`SkipLayerGuidanceDiT`: `double_layers`, `single_layers`": ("test_the_layers_of_a_configuration",),
    "`scale`": ("test_the_nodes_of_comfyui",),
    "`rescaling_scale`": ("test_the_rescale_of_comfyui_is_about_clean_samples",),
    "`start_percent`, `end_percent`": (
        "test_the_nodes_of_comfyui",
        "test_a_percentage_of_comfyui_is_a_noise_level",
    ),
    "`SkipLayerGuidanceDiTSimple`": ("test_the_simple_node_of_comfyui",),
    "`PerturbedAttentionGuidance`: `scale`": ("test_the_nodes_of_comfyui", "test_comfyui.py"),
}


def test_every_row_of_the_page_is_run() -> None:
    rows = re.findall(r"^\| (?!there|---|node)(.*?) \| .* \|$", PAGE, re.M)
    assert set(rows) == set(TESTS)
    here = Path(__file__)
    for test in {test for tests in TESTS.values() for test in tests}:
        assert test in globals() or (here.parent / test).is_file(), test
