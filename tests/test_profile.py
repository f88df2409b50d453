"""`profile`: what each layer would do for guidance, against the textbook and against measures written by hand."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stg_hooks as stg
from benchmarks import measure
from stg_hooks import demo
from stg_hooks.study import measures
from tests import zoo
from tests.pipelines import BATCHED_CFG, FAMILIES, Case, _half, build, build_wan_2_2, run, weak_copy, with_true_cfg
from tests.test_flops import load
from tests.zoo import snapshot

pytestmark = [
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
    pytest.mark.filterwarnings("error::stg_hooks.StgWarning"),
]
Measured = dict[str, float | None]


# --- measures, in numpy and loops ------------------------------------------------------------------------------------


def by_hand(d: Tensor, cond: Tensor, uncond: Tensor | None, video: Tensor | None) -> Measured:
    """Measure a term; `video` is the term as (B, C, F, H, W)."""
    flat, c = (t.double().numpy().ravel() for t in (d, cond))
    found: Measured = {"norm": math.sqrt((flat**2).sum() / (c**2).sum()), "cosine": None}
    if uncond is not None:
        direction = (cond.double() - uncond.double()).numpy().ravel()
        found["cosine"] = float((flat * direction).sum() / math.sqrt((flat**2).sum() * (direction**2).sum()))
    ratios = [
        np.std((one + two).double().numpy(), ddof=1) / np.std(one.double().numpy(), ddof=1)
        for one, two in zip(cond, d, strict=True)
    ]
    found["std_ratio"] = float(np.mean(ratios))
    found["high_frequency"] = found["temporal"] = None
    if video is not None:
        v = video.double().numpy()
        found["high_frequency"] = high_by_hand(v)
        still = v.mean(axis=2)
        moving = sum(((v[:, :, f] - still) ** 2).sum() for f in range(v.shape[2]))
        found["temporal"] = float(moving / (v**2).sum()) if v.shape[2] > 1 else None
    return found


def high_by_hand(v: Any) -> float:
    """Sum the energy of waves, one by one: exp(-2 pi i (k y / H + l x / W))."""
    height, width = v.shape[-2:]
    y, x = np.mgrid[:height, :width]
    high = total = 0.0
    for k, j in itertools.product(range(height), range(width)):
        wave = np.exp(-2j * np.pi * (k * y / height + j * x / width))
        energy = float((np.abs((v * wave).sum(axis=(-2, -1))) ** 2).sum())
        fy, fx = min(k, height - k) / height, min(j, width - j) / width
        total += energy
        high += energy if math.hypot(fy, fx) > 0.25 + 1e-9 else 0.0
    return high / total


@pytest.mark.parametrize("shape", [(1, 2, 1, 4, 4), (2, 3, 4, 5, 7), (1, 1, 2, 8, 6)])
def test_measures(shape: tuple[int, ...]) -> None:
    d, cond, uncond = torch.randn(3, *shape)
    expected = by_hand(d, cond, uncond, d)
    assert measures.relative_norm(d, cond).item() == pytest.approx(expected["norm"], rel=1e-4)
    assert measures.cosine(d, cond - uncond).item() == pytest.approx(expected["cosine"], abs=1e-5)
    assert measures.std_ratio(d, cond).item() == pytest.approx(expected["std_ratio"], rel=1e-4)
    assert measures.high_frequency(d).item() == pytest.approx(expected["high_frequency"], rel=1e-4)
    if shape[2] > 1:
        assert measures.temporal(d).item() == pytest.approx(expected["temporal"], rel=1e-4)


def test_frequencies_and_frames_of_known_patterns() -> None:
    y = torch.arange(16.0)[:, None].expand(16, 16)
    fine, coarse = torch.cos(2 * math.pi * y * 6 / 16), torch.cos(2 * math.pi * y * 2 / 16)
    assert measures.high_frequency(fine).item() == pytest.approx(1.0)
    assert measures.high_frequency(coarse).item() == pytest.approx(0.0, abs=1e-6)
    assert measures.high_frequency(torch.ones(4, 4)).item() == 0.0
    still = torch.randn(1, 2, 1, 4, 4).expand(1, 2, 6, 4, 4)
    assert measures.temporal(still).item() == pytest.approx(0.0, abs=1e-6)
    signs = torch.tensor([1.0, -1.0] * 3)[None, None, :, None, None]
    assert measures.temporal(still * signs).item() == pytest.approx(1.0)


class WithChannels(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.config = {"in_channels": channels, "out_channels": None}


@pytest.mark.parametrize(
    ("shape", "channels", "expected"),
    [
        ((1, 4, 3, 5, 6), 4, (1, 4, 3, 5, 6)),
        ((1, 3, 4, 5, 6), 4, (1, 4, 3, 5, 6)),
        ((1, 4, 4, 5, 6), 4, None),
        ((1, 3, 2, 5, 6), 4, None),
        ((2, 4, 5, 6), 4, (2, 4, 1, 5, 6)),
        ((2, 30, 4), 4, None),
        ((2, 4), 4, None),
    ],
)
def test_pictures(shape: tuple[int, ...], channels: int, expected: tuple[int, ...] | None) -> None:
    found = measures.as_picture(torch.randn(shape), WithChannels(channels), (), {})
    assert (None if found is None else tuple(found.shape)) == expected


def test_pictures_of_tokens() -> None:
    frames = torch.randn(2, 4, 2, 3, 5)
    tokens = frames.flatten(2).transpose(1, 2)
    ids = torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(5)).float()
    for kwargs in (
        {"num_frames": 2, "height": 3, "width": 5},
        {"img_shapes": [[(2, 3, 5)], [(2, 3, 5)]]},
        {"img_ids": ids},
        {"txt_ids": torch.zeros(7, 3), "img_ids": ids[None]},
    ):
        found = measures.as_picture(tokens, WithChannels(4), (), kwargs)
        assert found is not None
        torch.testing.assert_close(found, frames)


def test_a_layout_of_the_users_own() -> None:
    d = torch.randn(1, 4, 4, 5, 6)
    found = measures.as_picture(d, WithChannels(4), (), {}, "BFCHW")
    torch.testing.assert_close(found, d.transpose(1, 2))
    found = measures.as_picture(d[:, 0], WithChannels(4), (), {}, "BHWC")
    assert found is not None
    assert found.shape == (1, 6, 1, 4, 5)
    for layout in ("BCFH", "BCFHX", "BBCHW", "BCHW"):
        with pytest.raises(stg.SettingError, match=r"layout="):
            measures.as_picture(d, WithChannels(4), (), {}, layout)


# --- stock pipelines -------------------------------------------------------------------------------------------------


@contextmanager
def recorded(*models: nn.Module) -> Iterator[list[tuple[nn.Module, dict[str, Any]]]]:
    """Write down the calls of denoisers."""
    calls: list[tuple[nn.Module, dict[str, Any]]] = []

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        calls.append((module, kwargs))

    handles = [model.register_forward_pre_hook(note, with_kwargs=True) for model in models]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def as_video(d: Tensor, family: str, kwargs: dict[str, Any]) -> Tensor:
    if family == "ltx":
        return d.unflatten(1, [kwargs[name] for name in ("num_frames", "height", "width")]).permute(0, 4, 1, 2, 3)
    return d.transpose(1, 2) if family == "cogvideox" else d


@torch.no_grad()
def textbook(
    model: nn.Module, case: Case, layer: int, calls: list[dict[str, Any]], batched: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return d, cond and uncond of one step, by whole passes of a copy in which the layer is replaced."""
    positive = _half(calls[0], 1) if batched else calls[0]
    negative = _half(calls[0], 0) if batched else calls[1] if len(calls) > 1 else None
    cond = model(**positive)[0]
    weak = weak_copy(model, case.name, [layer])(**positive)[0]
    return cond - weak, cond, None if negative is None else model(**negative)[0]


def agree(row: Any, expected: Measured) -> None:
    for name, value in expected.items():
        found = getattr(row, name)
        if value is None:
            assert found is None, name
        else:
            assert found == pytest.approx(value, rel=2e-3, abs=2e-4), name


ALL = [*FAMILIES, "hunyuan_video with CFG"]


@pytest.mark.parametrize(
    "family", ["ltx", *(pytest.param(name, marks=pytest.mark.slow) for name in ALL if name != "ltx")]
)
def test_stock_pipelines(family: str) -> None:
    """Every measure of every layer at two of the four steps; and the run itself is not changed by a bit."""
    pipe, call, case = build(family.split()[0])
    call = with_true_cfg(call) if "CFG" in family else call
    model = pipe.transformer
    with recorded(model) as calls:
        plain = run(pipe, call)
    before = snapshot(model)
    per_step = len(calls) // case.steps
    assert per_step == (1 if case.name in BATCHED_CFG or family == "hunyuan_video" else 2)
    results: list[Tensor] = []
    found = stg.profile(pipe, noise_levels=2, sample=lambda prompt, generator: results.append(run(pipe, call)))
    assert torch.equal(results[0], plain)
    assert snapshot(model) == before
    count = sum(layer.index is not None for layer in stg.layers(model))
    assert [(row.layer, row.step) for row in found.rows] == list(itertools.product(range(count), (1, 3)))
    for row in found.rows:
        kwargs = [kwargs for _, kwargs in calls[row.step * per_step : (row.step + 1) * per_step]]
        d, cond, uncond = textbook(model, case, row.layer, kwargs, case.name in BATCHED_CFG)
        agree(row, by_hand(d, cond, uncond, as_video(d, case.name, kwargs[0])))
    if case.name != "cogvideox":  # a diffusion schedule, whose noise levels come from elsewhere
        sigmas = [float(pipe.scheduler.sigmas[i]) for i in (1, 3)]
        assert found.noise_levels == pytest.approx([1 - s for s in sigmas] if case.name == "mochi" else sigmas)
    assert found.noise_kind == ("ddpm" if case.name == "cogvideox" else "flow")
    assert found.guidance_scale == (
        None if family == "hunyuan_video" else 3.0 if "CFG" in family else case.guidance_scale
    )


def test_both_denoisers_of_a_pipeline_are_looked_at() -> None:
    pipe, call, case = build_wan_2_2()
    with recorded(pipe.transformer, pipe.transformer_2) as calls:
        run(pipe, call)
    found = stg.profile(pipe, [1], noise_levels=4, sample=lambda prompt, generator: run(pipe, call))
    assert [row.step for row in found.rows] == [0, 1, 2, 3]
    assert [calls[2 * i][0] is pipe.transformer for i in range(4)] == [True, True, False, False]
    for row in found.rows:
        model = calls[2 * row.step][0]
        kwargs = [kwargs for _, kwargs in calls[2 * row.step : 2 * row.step + 2]]
        d, cond, uncond = textbook(model, case, 1, kwargs, batched=False)
        agree(row, by_hand(d, cond, uncond, d))


def test_groups_of_layers_give_the_same() -> None:
    pipe, call, _ = build("ltx")

    def sample(prompt: str, generator: torch.Generator) -> Tensor:
        return run(pipe, call)

    whole = stg.profile(pipe, noise_levels=1, modes=("residual", "attention"), sample=sample)
    parts = stg.profile(pipe, noise_levels=1, modes=("residual", "attention"), sample=sample, layers_at_once=3)
    for one, other in zip(whole.rows, parts.rows, strict=True):
        assert (one.layer, one.mode, one.cost) == (other.layer, other.mode, other.cost)
        agree(one, {name: getattr(other, name) for name in ("norm", "cosine", "high_frequency", "std_ratio")})


def test_noise_levels_are_the_first_steps_not_above_what_was_asked_for() -> None:
    pipe, call, _ = build("wan")
    run(pipe, call)
    sigmas = pipe.scheduler.sigmas.tolist()
    asked = [(sigmas[0] + sigmas[1]) / 2, sigmas[2]]
    found = stg.profile(pipe, [0], noise_levels=asked, sample=lambda prompt, generator: run(pipe, call))
    assert [row.step for row in found.rows] == [1, 2]
    assert found.noise_levels == pytest.approx(sigmas[1:3])
    with pytest.warns(stg.StgWarning, match=r"the run ends at the noise level .*, above \[0\.01\]"):
        stg.profile(pipe, [0], noise_levels=[asked[0], 0.01], sample=lambda prompt, generator: run(pipe, call))
    with pytest.raises(stg.SettingError, match=r"noise_levels=\[0\.01\]: the run made 4 calls with the prompt"):
        stg.profile(pipe, [0], noise_levels=[0.01], sample=lambda prompt, generator: run(pipe, call))


def test_more_levels_than_steps_are_all_steps() -> None:
    pipe, call, case = build("wan")
    found = stg.profile(pipe, [0], noise_levels=50, sample=lambda prompt, generator: run(pipe, call))
    assert [row.step for row in found.rows] == list(range(case.steps))


def test_rows_are_means_over_prompts() -> None:
    pipe, call, _ = build("wan")

    def sample(prompt: str, generator: torch.Generator) -> Tensor:
        return run(pipe, {**call, "prompt_embeds": call["prompt_embeds"] * len(prompt)})

    one, two, both = (
        stg.profile(pipe, [1], noise_levels=2, prompts=prompts, sample=sample) for prompts in ("a", "ab", ["a", "ab"])
    )
    assert both.prompts == ("a", "ab")
    for first, second, row in zip(one.rows, two.rows, both.rows, strict=True):
        assert first.norm != second.norm
        assert row.norm == pytest.approx((first.norm + second.norm) / 2)


def test_the_embedded_model() -> None:
    found = stg.profile(
        demo.load(), [2, 6], ("residual", "attention"), 1, prompts="red 3 blue 7", num_inference_steps=3
    )
    assert found.guidance_scale == demo.GUIDANCE_SCALE
    assert len(found.rows) == 4
    assert all(0 < row.norm < 1 and row.temporal and row.high_frequency for row in found.rows)
    text = repr(found)
    assert text.startswith("WanTransformer3DModel: 2 layers, mean over noise levels ")
    assert all(
        word in text for word in ("norm", "cosine", "high_frequency", "temporal", "std_ratio", "cost", "attention")
    )


# --- modules and loops of one's own ----------------------------------------------------------------------------------


def euler(call: Callable[[Tensor], Tensor], steps: int = 4) -> Tensor:
    x = zoo.inputs(batch=1)["x"]
    for _ in range(steps):
        x = x - 0.1 * call(x)
    return x


def by_a_loop(model: nn.Module, layer: int, steps: list[int], g: float) -> list[Measured]:
    """Measure a layer along Euler steps with CFG, with a copy in which it is replaced."""
    text, other = (zoo.inputs(batch=1, seed=seed)["text"] for seed in (1, 2))
    weak = zoo.without(model, [f"blocks.{layer}"])
    found = []
    x = zoo.inputs(batch=1)["x"]
    for i in range(4):
        cond, uncond = model(x, text), model(x, other)
        if i in steps:
            found.append(by_hand(cond - weak(x, text), cond, uncond, None))
        x = x - 0.1 * (uncond + g * (cond - uncond))
    return found


@pytest.mark.parametrize("on", ["cond", "uncond"])
def test_a_guider(on: str) -> None:
    model = zoo.build("plain")
    text, other = (zoo.inputs(batch=1, seed=seed)["text"] for seed in (1, 2))
    guider = stg.Guider(model, layers=[0], guidance_scale=3.0, on=on)
    before, model_before = dict(vars(guider)), snapshot(model)
    plain = stg.Guider(model, layers=[0], scale=0.0, guidance_scale=3.0)
    results = []

    def sample(prompt: str, generator: torch.Generator) -> None:
        results.append(euler(lambda x: guider(x, cond={"text": text}, uncond={"text": other})))

    found = stg.profile(guider, noise_levels=2, sample=sample, steps=4)
    assert torch.equal(results[0], euler(lambda x: plain(x, cond={"text": text}, uncond={"text": other})))
    assert vars(guider) == before
    assert snapshot(model) == model_before
    assert (found.noise_kind, found.noise_levels) == ("run", (0.75, 0.25))
    assert found.guidance_scale == 3.0
    for layer in range(4):
        rows = [row for row in found.rows if row.layer == layer]
        for row, expected in zip(rows, by_a_loop(model, layer, [1, 3], 3.0), strict=True):
            agree(row, expected)


class WithoutFeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = zoo.Attention()

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x  # noqa: RET504 - a name, to be read from the source


class TakesSigma(nn.Module):
    """A denoiser of the kind denoiser(x, sigma, text)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = zoo.build("plain")

    def forward(self, x: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        return x - sigma[:, None, None] * self.inner(x, text)


def test_a_guider_that_makes_both_predictions_in_one_call() -> None:
    model = TakesSigma()
    text, other = (zoo.inputs(batch=1, seed=seed)["text"] for seed in (1, 2))
    x, sigmas = zoo.inputs(batch=1)["x"], torch.tensor([4.0, 2.0, 1.0, 0.0])
    guider = stg.Guider(model, layers=[0], guidance_scale=3.0, sigmas=sigmas)

    def sample(prompt: str, generator: torch.Generator) -> None:
        for sigma in sigmas[:-1]:
            guider(x, sigma[None], cond={"text": text}, uncond={"text": other})

    found = stg.profile(guider, [2], noise_levels=[2.0], sample=sample)
    assert (found.noise_kind, found.noise_levels) == ("karras", (2.0,))
    weak = copy.deepcopy(model)
    weak.inner = zoo.without(model.inner, ["blocks.2"])
    cond, uncond, w = (m(x, torch.tensor([2.0]), t) for m, t in ((model, text), (model, other), (weak, text)))
    agree(found.rows[0], by_hand(cond - w, cond, uncond, None))


@pytest.mark.parametrize("batched_cfg", [False, True])
def test_a_module(batched_cfg: bool) -> None:
    model = zoo.build("plain")
    inputs = zoo.inputs(batch=2)
    before = snapshot(model)
    found = stg.profile(
        model, noise_levels=1, sample=lambda prompt, generator: model(**inputs), steps=1, batched_cfg=batched_cfg
    )
    assert snapshot(model) == before
    output = model(**inputs)
    for row in found.rows:
        d = output - zoo.without(model, [f"blocks.{row.layer}"])(**inputs)
        rows = slice(1, None) if batched_cfg else slice(None)
        agree(row, by_hand(d[rows], output[rows], output[:1] if batched_cfg else None, None))


def test_a_layer_that_does_nothing_measures_zero() -> None:
    """Its term has no direction and no frequencies: they are NaN, and become null on disk."""
    model = zoo.build("plain")
    for parameter in model.blocks[1].parameters():
        parameter.data.zero_()
    inputs = zoo.inputs(batch=2)
    found = stg.profile(model, noise_levels=1, sample=lambda *_: model(**inputs), steps=1, batched_cfg=True)
    assert found.rows[1].norm < 1e-6  # rounding of calls of another size
    assert found.rows[0].cosine is not None


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", ["module", "guider"])
def test_a_failing_run_leaves_nothing_behind(error: type[BaseException], kind: str) -> None:
    model = zoo.build("plain")
    target = stg.Guider(model, layers=[0]) if kind == "guider" else model
    before, own = snapshot(model), dict(vars(target))

    def sample(prompt: str, generator: torch.Generator) -> None:
        target(**zoo.inputs())
        raise error

    with pytest.raises(error):
        stg.profile(target, noise_levels=1, sample=sample, steps=1)
    assert snapshot(model) == before
    assert vars(target).keys() == own.keys()


# --- cost ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_all_layers_cost_about_half_of_as_many_passes() -> None:
    """Twelve blocks: after layers 0 to 11 run 11 to 0 of them, and what surrounds them."""
    model, inputs = zoo.build("twelve"), zoo.inputs(batch=2)
    layers = [layer.module for layer in stg.layers(model)]
    plain, own, after = measure.flops_of(layers, lambda: model(**inputs))
    before_blocks = plain - own[0] - after[0]

    def extra(**more: Any) -> int:
        settings: dict[str, Any] = {"noise_levels": 1, "steps": 1, "batched_cfg": False, **more}
        return measure.flops(lambda: stg.profile(model, sample=lambda *_: model(**inputs), **settings)) - plain

    def check(*ends: int) -> int:  # a pass with nothing skipped, after the shortest and the longest prefix
        return sum(before_blocks + own[end] + after[end] for end in ends)

    shared = sum(before_blocks + one for one in after)
    assert extra() == shared + check(0, 11)
    naive = sum(plain - one for one in own)  # a pass for each layer, without the layer itself
    assert shared / naive == pytest.approx(0.5, abs=0.02)
    assert shared / (len(own) * plain) == pytest.approx((len(own) - 1) / (2 * len(own)), abs=0.02)
    # Each group of layers but the first costs one more pass.
    assert extra(layers_at_once=4) == shared + 2 * plain + check(0, 3, 4, 7, 8, 11)


@torch.no_grad()
@pytest.mark.parametrize("name", [pytest.param("mochi", marks=pytest.mark.slow), "ltx"])
def test_the_cost_of_a_layer_is_what_guidance_with_it_costs(name: str) -> None:
    case = load(name)
    layer = case.shape.skipped
    found = stg.profile(
        case.model, [layer], noise_levels=1, sample=lambda *_: case.model(**case.inputs), steps=1, batched_cfg=True
    )
    assert found.rows[0].cost == pytest.approx(case.guided() / case.plain - 1, rel=1e-6)
    assert found.rows[0].cost == pytest.approx(case.shape.formula() - 1, abs=0.01)
    if name == "mochi":
        assert found.rows[0].cost == pytest.approx(0.135, abs=0.005)


def test_separate_uncond_calls_count_as_part_of_the_plain_step() -> None:
    pipe, call, _ = build("wan")
    found = stg.profile(pipe, [1], noise_levels=1, sample=lambda *_: run(pipe, call))
    with recorded(pipe.transformer) as calls:
        run(pipe, call)
    kwargs = calls[0][1]
    plain = measure.flops(lambda: pipe.transformer(**kwargs))
    with stg.apply(pipe.transformer, layers=[1]):
        pipe.transformer(**kwargs)  # the first call finds out what can be shared
        guided = measure.flops(lambda: pipe.transformer(**kwargs))
    assert found.rows[0].cost == pytest.approx((guided - plain) / (2 * plain), rel=1e-6)


# --- refused ---------------------------------------------------------------------------------------------------------


def quiet(*_: Any) -> None:
    raise AssertionError("nothing may run")


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"layers": [9]}, stg.LayerError, r"DiT has 4 layers"),
        ({"layers": ["out"]}, stg.LayerError, r"a profile is of numbered layers"),
        ({"modes": ["rezidual"]}, stg.SettingError, r"Did you mean 'residual'"),
        ({"modes": []}, stg.SettingError, r"modes=\(\)"),
        ({"modes": ["residual", "residual"]}, stg.SettingError, r"each once"),
        ({"noise_levels": 0}, stg.SettingError, r"noise_levels=0"),
        ({"noise_levels": []}, stg.SettingError, r"noise_levels=\[\]"),
        ({"noise_levels": [-1.0]}, stg.SettingError, r"noise_levels=\[-1\.0\]"),
        ({"steps": 0}, stg.SettingError, r"steps=0"),
        ({"prompts": []}, stg.SettingError, r"prompts=\[\]"),
        ({"layers_at_once": 0}, stg.SettingError, r"layers_at_once=0"),
        ({"sample": None}, stg.TargetError, r"DiT makes no samples by itself"),
        ({"sample": 3}, stg.TargetError, r"sample=3"),
        ({"height": 3}, stg.SettingError, r"height: arguments of the pipeline, but sample= makes the calls"),
    ],
)
def test_refused_before_anything_runs(settings: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        stg.profile(zoo.build("plain"), **{"sample": quiet, "steps": 1, **settings})


def test_refused_for_pipelines() -> None:
    pipe, _, _ = build("wan")
    with pytest.raises(stg.SettingError, match=r"heigth: WanPipeline has no such argument"):
        stg.profile(pipe, heigth=3)
    with pytest.raises(stg.SettingError, match=r"a pipeline tells its steps.*num_inference_steps="):
        stg.profile(pipe, steps=2)
    with pytest.raises(stg.SettingError, match=r"batched_cfg= describes the calls of a module"):
        stg.profile(pipe, batched_cfg=True)
    with pytest.raises(stg.TargetError):
        stg.profile("wan")


def test_steps_that_are_not_known_are_asked_for() -> None:
    model = zoo.build("plain")
    with pytest.raises(stg.CallError, match=r"pass steps=, the calls of a run"):
        stg.profile(model, sample=lambda *_: model(**zoo.inputs()))
    with pytest.raises(stg.CallError, match=r"the noise level of this call is not known"):
        stg.profile(model, noise_levels=[0.5], sample=lambda *_: model(**zoo.inputs()), steps=1)


def test_a_run_without_calls_is_an_error() -> None:
    with pytest.raises(stg.SettingError, match=r"the run made 0 calls with the prompt"):
        stg.profile(zoo.build("plain"), sample=lambda *_: None, steps=1)


def test_layers_that_cannot_be_skipped_in_a_mode_are_left_out_of_all_but_refused_by_name() -> None:
    model = zoo.build("plain")
    model.blocks[1] = WithoutFeedForward()
    inputs = zoo.inputs(batch=2)
    settings: dict[str, Any] = {"noise_levels": 1, "steps": 1, "sample": lambda *_: model(**inputs)}
    with pytest.warns(stg.StgWarning, match=r"stg\.profile leaves out layers 1 \(feed-forward\)"):
        found = stg.profile(model, modes=("residual", "feed-forward"), **settings)
    assert {row.layer for row in found.rows if row.mode == "residual"} == {0, 1, 2, 3}
    assert {row.layer for row in found.rows if row.mode == "feed-forward"} == {0, 2, 3}
    with pytest.raises(stg.LayerError):
        stg.profile(model, [1], "feed-forward", **settings)
