"""`stg.modular.SkipGuidance`, the guider of modular pipelines, against a guider that makes every pass by hand."""

from __future__ import annotations

import copy
import json
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.modular_pipelines.flux.denoise import FluxDenoiseStep
from torch import Tensor, nn
from torch.testing import assert_close

import stg_hooks as stg
from benchmarks import measure
from tests.installed import from_diffusers
from tests.modular import MODULAR, STEPS, ByHand, without
from tests.stock_pipelines import STOCK
from tests.tiny_models import MODELS

close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
exact: dict[str, Any] = {"rtol": 0, "atol": 0}
pytestmark = pytest.mark.filterwarnings("error::stg_hooks.StgWarning")
WAN = MODULAR["wan"]


def guider(*args: Any, **kwargs: Any) -> Any:
    return stg.modular.SkipGuidance(*args, **kwargs)


def run_with(*args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
    pipe = WAN.build(lambda: guider(*args, **kwargs))
    return WAN.run(pipe), pipe.guider


def run_by_hand(*args: Any, on: Callable[[int], bool] = lambda step: True, **kwargs: Any) -> Tensor:
    pipe = WAN.build(lambda: ByHand(*args, **kwargs))
    pipe.guider.on = on
    return WAN.run(pipe)


# --- each family ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULAR)
def test_a_run_is_what_it_is_by_hand(name: str) -> None:
    case = MODULAR[name]
    pipe = case.build(lambda: guider([case.layer], 1.5, 3.0, strict=True))
    expected = case.run(case.build(lambda: ByHand([case.layer], [1.5], 3.0)))
    assert_close(case.run(pipe), expected, **close)
    assert not torch.allclose(expected, case.run(case.build(lambda: ByHand([], [], 3.0))), rtol=1e-2, atol=1e-2)
    guiders = [getattr(pipe, each) for each in case.guiders]
    assert sum(each.stats.guided_calls for each in guiders) == STEPS * (1 + ("audio_guider" in case.guiders))
    assert sum(each.stats.weak_passes for each in guiders) == STEPS
    assert sum(each.stats.blocks_saved for each in guiders) > 0
    # No uncond pass, no uncond inputs.
    negative = [key for key in case.call() if key.startswith("negative")]
    for each in guiders:
        each.guidance_scale = 1.0
        assert each.num_conditions == 1
    changes = {key: None for key in negative if name not in ("wan", "wan22", "ltx", "ltx2")}  # which require them
    assert_close(case.run(pipe, **changes), case.run(case.build(lambda: ByHand([case.layer], [1.5], 1.0))), **close)


def test_one_guider_for_two_denoisers() -> None:
    case, both = MODULAR["wan22"], guider([1], 1.5, 3.0)
    pipe = case.build(lambda: both)
    expected = case.run(case.build(lambda: ByHand(["blocks.1"], [1.5], 3.0)))
    for _ in range(2):
        assert_close(case.run(pipe), expected, **close)
    assert both.stats.weak_passes == 2 * STEPS


def test_a_stock_pipeline_with_a_guider() -> None:
    (stock,) = (stock for stock in STOCK.values() if stock.pipeline == "HunyuanVideo15Pipeline")
    pipe, call = stock.build(), {**stock.call(), "num_inference_steps": 2, "output_type": "latent"}

    def run(one: Any) -> Tensor:
        pipe.register_modules(guider=one)
        pipe.guider = one
        frames: Tensor = pipe(**call, generator=torch.Generator().manual_seed(0)).frames
        return frames

    assert_close(run(guider([1], 1.5, 3.0)), run(ByHand(["transformer_blocks.1"], [1.5], 3.0)), **close)


# --- video and audio --------------------------------------------------------------------------------------------------

FIRST, SECOND = "transformer_blocks.0", "transformer_blocks.1"


def ltx2_guidance(*args: Any, **kwargs: Any) -> Any:
    return from_diffusers("LTX2Guidance")(*args, **kwargs)


def video_and_audio(video: Any, audio: Any) -> tuple[Tensor, Tensor]:
    pipe = MODULAR["ltx2"].build()
    pipe.update_components(guider=video, audio_guider=audio)
    return tuple(MODULAR["ltx2"].run(pipe, output=name) for name in ("latents", "audio_latents"))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("video", "audio", "by_hand"),
    [
        (([1], 1.5, 3.0), ([1], 0.5, 7.0), ([1.5, 0], [0.5, 0])),
        (([1], 1.5, 3.0), ([0], 0.5, 7.0), ([1.5, 0], [0, 0.5])),
        (([1], 0.0, 3.0), ([0], 0.5, 7.0), ([0, 0], [0, 0.5])),
        (([1], 1.5, 1.0), ([1], 0.0, 7.0), ([1.5, 0], [0, 0])),
    ],
)
def test_settings_of_their_own_for_video_and_audio(video: Any, audio: Any, by_hand: Any) -> None:
    got = video_and_audio(guider(*video), guider(*audio))
    hands = (ByHand([SECOND, FIRST], scales, given[2]) for scales, given in zip(by_hand, (video, audio), strict=True))
    assert_close(got, video_and_audio(*hands), **close)


@pytest.mark.parametrize("scale", [1.5, 0.0])
def test_the_audio_guider_of_diffusers_has_the_layers_of_the_video(scale: float) -> None:
    got = video_and_audio(guider([1], scale, 3.0), ltx2_guidance(guidance_scale=7.0, stg_scale=0.5))
    assert_close(got, video_and_audio(ByHand([SECOND], [scale], 3.0), ByHand([SECOND], [0.5], 7.0)), **close)


def test_it_is_what_diffusers_builds_in() -> None:
    audio = {"guidance_scale": 7.0, "stg_scale": 1.0, "modality_scale": 3.0, "guidance_rescale": 0.7}
    expected = video_and_audio(
        ltx2_guidance(3.0, 1.0, guidance_rescale=0.7, spatio_temporal_guidance_blocks=[1]),
        ltx2_guidance(**audio),
    )
    got = video_and_audio(guider([1], 1.0, 3.0, mode="values", rescale=0.7), ltx2_guidance(**audio))
    for one, other in zip(got, expected, strict=True):
        assert (one - other).std() < 1e-4 * other.std()


def test_the_audio_alone_is_refused() -> None:
    with pytest.raises(stg.CallError, match=r"was given no pass of its own: .*guider=stg\.modular\.SkipGuidance"):
        video_and_audio(ltx2_guidance(3.0), guider([1], 1.0, 7.0))


# --- settings ---------------------------------------------------------------------------------------------------------


def half(step: stg.Step) -> float:
    return 0.5 if step.index == 1 else 0.0


def only_last(step: stg.Step) -> dict[str, Any] | None:
    return {"scale": 2.0} if step.index == STEPS - 1 else None


def zero(call: stg.LayerCall) -> Any:
    return call.compute() * 0


@pytest.mark.parametrize(
    ("settings", "by_hand"),
    [
        ({"rescale": 0.7}, {"rescale": 0.7}),
        ({"branches": [stg.Branch([1], 1.5), stg.Branch([2], -0.5)]}, {"layers": [1, 2], "scales": [1.5, -0.5]}),
        ({"branches": [{"layers": [1]}, {"layers": [0], "scale": 0.5}]}, {"layers": [1, 0], "scales": [1.0, 0.5]}),
        ({"start": 0.5}, {"on": lambda step: step >= 2}),
        ({"stop": 0.5}, {"on": lambda step: step < 2}),
        ({"sigma_range": (0.5, 0.8)}, {"on": lambda step: step == 1}),
        ({"schedule": [(0.9, None), (0.5, {"scale": 2.0}), (0.0, None)]}, {"scales": [2.0], "on": lambda s: s == 1}),
        ({"scale": half}, {"scales": [0.5], "on": lambda step: step == 1}),
        ({"schedule": only_last}, {"scales": [2.0], "on": lambda step: step == 2}),
        ({"schedule": f"{__name__}:only_last"}, {"scales": [2.0], "on": lambda step: step == 2}),
        ({"execution": "batched"}, {}),
        ({"execution": "full", "layers": "blocks.1"}, {}),
        ({"layers": np.int64(1), "scale": np.float32(1.0)}, {}),
        ({"layers": range(1, 2)}, {}),
    ],
)
def test_settings(settings: dict[str, Any], by_hand: dict[str, Any]) -> None:
    settings = settings if "branches" in settings else {"layers": [1], **settings}
    got, one = run_with(guidance_scale=3.0, **settings)
    layers = [f"blocks.{layer}" for layer in by_hand.pop("layers", [1])]
    expected = run_by_hand(layers, g=3.0, **by_hand)
    assert_close(got, expected, **close)
    assert json.loads(one.to_json_string())["guidance_scale"] == 3.0
    assert_close(run_with(**{k: v for k, v in one.config.items() if not k.startswith("_")})[0], got, **exact)


def test_the_modes_of_stg_skip() -> None:
    for mode in ("attention", "values", "feed-forward", zero):
        got, _ = run_with([1], 1.0, 1.0, mode=mode)
        pipe = WAN.build(lambda: ByHand([], [], 1.0))
        model, x = pipe.transformer, WAN.call()["latents"]
        pipe.scheduler.set_timesteps(STEPS)
        for t in pipe.scheduler.timesteps:
            given = {"timestep": t.expand(1), "encoder_hidden_states": WAN.call()["prompt_embeds"]}
            cond = model(x, **given, return_dict=False)[0]
            with stg.skip(model, [1], mode=mode):
                weak = model(x, **given, return_dict=False)[0]
            x = pipe.scheduler.step(2 * cond - weak, t, x, return_dict=False)[0]
        assert_close(got, x, **close)


def test_a_schedule_may_change_classifier_free_guidance() -> None:
    schedule = [(0.9, {"guidance_scale": 2.0}), (0.0, {"guidance_scale": 1.0})]
    got, one = run_with([1], guidance_scale=1.0, schedule=schedule)
    pipe = WAN.build(lambda: ByHand(["blocks.1"], [1.0], 2.0))
    hand = pipe.guider
    by_step = lambda step, *_, **__: setattr(hand, "g", 2.0 if step == 0 else 1.0)  # noqa: E731
    set_state = hand.set_state
    hand.set_state = lambda step, *args, **kwargs: (by_step(step), set_state(step, *args, **kwargs))
    assert_close(got, WAN.run(pipe), **close)
    assert one.num_conditions == 2  # so that pipelines encode a negative prompt


def test_every_and_a_rule() -> None:
    got, one = run_with([1], 1.0, 3.0, every=2, rule="zero_star")
    assert (one.stats.weak_passes, one.stats.guided_calls) == (2, 3)
    assert not torch.allclose(got, run_with([1], 1.0, 3.0)[0], rtol=1e-3, atol=1e-3)


def test_what_is_published_for_the_model() -> None:
    pipe = MODULAR["ltx2"].build(lambda: guider(guidance_scale=3.0))
    with pytest.raises(stg.SettingError, match=r"no setting is published for this LTX2VideoTransformer3DModel"):
        MODULAR["ltx2"].run(pipe)
    with pytest.raises(stg.SettingError, match="preset='Mochi 1' is for a MochiTransformer3DModel"):
        run_with(preset="Mochi 1")


def test_settings_can_be_set_and_read() -> None:
    pipe = WAN.build(lambda: guider([1], 1.0, 3.0))
    one = pipe.guider
    WAN.run(pipe)
    one.scale, one.layers = 0.5, [2]
    assert (one.scale, one.config.scale, one.config.layers) == (0.5, 0.5, [2])
    assert_close(WAN.run(pipe), run_by_hand(["blocks.2"], [0.5], 3.0), **close)
    with pytest.raises(stg.SettingError, match=r"rescale=2: expected"):
        one.rescale = 2
    assert one.rescale is None
    one.disable()
    assert one.num_conditions == 1
    assert_close(WAN.run(pipe), run_by_hand([], [], 1.0), **close)


def test_saving(tmp_path: Path) -> None:
    settings = {
        "branches": [stg.Branch([1], 1.5, "values"), stg.Branch(["blocks.2"], 0.5)],
        "schedule": [(0.5, {"rescale": 0.5}), (0.0, None)],
        "sigma_range": (0.1, 0.9), "rule": "apg", "every": 2, "start": 0.1, "guidance_scale": 2.0, "strict": True,
    }  # fmt: skip
    one = guider(**settings)
    one.save_pretrained(tmp_path)
    again = stg.modular.SkipGuidance.from_pretrained(tmp_path)
    for other in (again, one.new(), copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert other.config == one.config
        assert other.branches == settings["branches"]
        assert other._guidance.plan.possible == one._guidance.plan.possible
    assert one.new(guidance_scale=1.0, rule="cfg").config.rule == "cfg"
    assert one.config.rule == "apg"
    assert '"rule": "apg"' in repr(one)
    guider([1], scale=half, schedule=None).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "guider_config.json").read_text())["scale"] == f"{__name__}:half"
    assert stg.modular.SkipGuidance.from_pretrained(tmp_path).scale is half


def test_a_component_spec_makes_one() -> None:
    from diffusers.configuration_utils import FrozenDict
    from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec

    config = FrozenDict({"layers": [1], "scale": 0.5})
    made = ComponentSpec("guider", stg.modular.SkipGuidance, config=config, default_creation_method="from_config")
    assert made.create().config.scale == 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [nn.Linear(1, 1)]}, r"layers=\[Linear.*cannot be saved as JSON"),
        ({"layers": [1], "scale": torch.tensor(1.0)}, r"scale=tensor\(1\.\) cannot be saved"),
        ({"layers": [1], "scale": lambda step: 1.0}, "scale=<function .*a lambda has none"),
        ({"layers": [1], "schedule": lambda step: {}}, "schedule=<function .*a lambda has none"),
        ({"layers": [1], "schedule": [(0.5, {"scale": torch.ones(2)})]}, "schedule=.* cannot be saved"),
        ({"layers": [1], "mode": lambda call: call.output}, "mode=<function"),
        ({"layers": [1], "rule": stg.rules.AveragedApg()}, "rule=.* cannot be saved"),
        ({"layers": [1], "guidance_scale": torch.ones(2)}, "guidance_scale=tensor"),
        ({"branches": [stg.Branch([1], torch.ones(2))]}, "branches=.* cannot be saved"),
        ({"branches": [{"layer": [1]}]}, "branches= holds .*expected layers, scale, mode, kind"),
        ({"layers": [1], "schedule": "not_there:f"}, "module not_there, which is not imported: import not_there first"),
        ({"layers": [1], "schedule": "tests.modular:f"}, "has nothing of this name"),
        ({"layers": [1], "schedule": "linear"}, "schedule='linear': expected a function"),
        ({"layers": [1], "every": 0}, "every=0"),  # as all faces: test_contract.py
        ({"layers": [1], "guidance_scale": math.nan}, "guidance_scale=nan"),
        ({"layers": [1], "preset": "Mochi 1"}, "either preset=, or layers"),
        ({"layers": [1], "branches": [stg.Branch([1])]}, "either branches="),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(stg.SettingError, match=message):
        guider(**settings)


def test_a_layer_that_does_not_exist_is_refused_before_the_first_call() -> None:
    pipe = WAN.build(lambda: guider([99], start=0.5))
    calls: list[Any] = []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(stg.LayerError, match=r"layers=\[99\]: WanTransformer3DModel has 3 layers"):
        WAN.run(pipe)
    assert not calls


# --- what it costs, leaves, and says ----------------------------------------------------------------------------------


def test_a_weak_pass_costs_the_layers_after_the_skipped_one() -> None:
    off, on = (WAN.build(lambda scale=scale: guider([1], scale, 3.0)) for scale in (0.0, 1.0))
    names = [f"blocks.{i}" for i in range(3)]
    layers = [on.transformer.get_submodule(name) for name in names]
    t = torch.tensor([500.0])
    given = {"hidden_states": WAN.call()["latents"], "encoder_hidden_states": WAN.call()["prompt_embeds"]}
    plain, own, _ = measure.flops_of(layers, lambda: on.transformer(**given, timestep=t))
    WAN.run(on)  # in the first call of a layout, passes are compared
    extra = measure.flops(lambda: WAN.run(on)) - measure.flops(lambda: WAN.run(off))
    assert extra == STEPS * (plain - own[0] - own[1])  # embeddings of tokens, text and time are not shared
    assert (on.guider.stats.blocks_run, on.guider.stats.blocks_saved) == (2 * STEPS, 2 * 2 * STEPS)


@contextmanager
def nothing_is_left_on(model: nn.Module) -> Iterator[None]:
    def state() -> dict[str, dict[str, Any]]:
        hooks = ("_forward_hooks", "_forward_pre_hooks")
        return {
            name: {key: dict(value) if key in hooks else value for key, value in vars(module).items()}
            for name, module in model.named_modules()
        }

    before = state()
    yield
    assert state() == before


class StopError(BaseException):
    """An interrupt."""


@pytest.mark.parametrize("error", [ZeroDivisionError, StopError])
@pytest.mark.parametrize("call", range(4))
def test_nothing_is_left_on_the_model(error: type[BaseException], call: int) -> None:
    pipe, calls = WAN.build(lambda: guider([1], 1.0, 3.0)), 0
    expected = WAN.run(pipe)

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call + 1:
            raise error

    with nothing_is_left_on(pipe.transformer):
        WAN.run(pipe)
    hook = pipe.transformer.blocks[2].register_forward_hook(fail)  # runs in cond, weak and uncond passes
    with nothing_is_left_on(pipe.transformer), pytest.raises(error):
        WAN.run(pipe)
    hook.remove()
    assert_close(WAN.run(pipe), expected, **exact)


def test_nothing_is_left_where_a_pipeline_fails_around_its_call() -> None:
    pipe = WAN.build(lambda: guider([1], 1.0, 3.0))
    pipe.transformer.register_forward_pre_hook(lambda *_: 1 / 0)  # before what was put in the way of the call
    with nothing_is_left_on(pipe.transformer):
        try:
            WAN.run(pipe)
        except ZeroDivisionError:
            failed = True
    assert failed


def test_a_skip_that_changes_nothing() -> None:
    def run(**settings: Any) -> Any:
        pipe = WAN.build(lambda: guider([1], **settings))
        block = pipe.transformer.blocks[1]
        block.forward = lambda hidden_states, *_, **__: hidden_states * 1
        return WAN.run(pipe)

    with pytest.warns(stg.StgWarning, match=r"stg\.modular\.SkipGuidance: .*nothing") as told:
        run()
    assert len(told) == 1
    with pytest.raises(stg.LayerError, match="nothing"):
        run(strict=True)


def test_what_is_not_finite() -> None:
    pipe = WAN.build(lambda: guider([1]))
    next(pipe.transformer.proj_out.parameters()).fill_(math.nan)
    with pytest.warns(stg.StgWarning, match="the cond and uncond and weak prediction in step 0 of 3") as told:
        WAN.run(pipe)
    assert sum("not finite" in str(one.message) for one in told) == 1


def test_a_run_without_guidance() -> None:
    with pytest.warns(stg.StgWarning, match=r"guided nothing.*Its noise levels went from 1 to"):
        run_with([1], sigma_range=(2.0, 3.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_with([1], scale=0.0)


def test_trace_and_stats() -> None:
    _, one = run_with([1], 1.0, 3.0)
    assert [row.step.index for row in one.trace] == [0, 1, 2]
    assert [row.step.sigma for row in one.trace] == sorted((row.step.sigma for row in one.trace), reverse=True)
    assert all(row.size > 0 and row.cosine is not None for row in one.trace)
    assert (one.stats.calls, one.stats.guided_calls, one.stats.weak_passes) == (3, 3, 3)


def test_pipelines_that_apply_guides_itself_are_told_apart() -> None:
    pipe = WAN.build(lambda: guider([1]))
    with pytest.raises(stg.TargetError, match="its guider is SkipGuidance"):
        stg.apply(pipe, layers=[1])


def test_a_pipeline_without_a_guider() -> None:
    tiny = MODELS["FluxTransformer2DModel"]
    model, given = tiny.build("FluxTransformer2DModel"), tiny.inputs(1)
    pipe = FluxDenoiseStep().init_pipeline()
    pipe.update_components(transformer=model, scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
    pipe.scheduler.set_timesteps(STEPS)
    call = {
        "timesteps": pipe.scheduler.timesteps, "num_inference_steps": STEPS, "latents": given["hidden_states"],
        "prompt_embeds": given["encoder_hidden_states"], "pooled_prompt_embeds": given["pooled_projections"],
        "txt_ids": given["txt_ids"], "img_ids": given["img_ids"],
    }  # fmt: skip
    with pytest.raises(stg.TargetError, match=r"no guider.*stg\.apply\(pipe\.transformer, \.\.\., batched_cfg=False"):
        stg.apply(pipe, layers=[1])
    with stg.apply(pipe.transformer, layers=[1], batched_cfg=False, start=0.5) as applied:
        got = pipe(**call, output="latents")
    assert applied.stats.weak_passes == 1

    weak, x = without(model, "transformer_blocks.1"), given["hidden_states"]
    fixed = {key: given[key] for key in ("encoder_hidden_states", "pooled_projections", "txt_ids", "img_ids")}
    pipe.scheduler.set_timesteps(STEPS)
    for i, t in enumerate(pipe.scheduler.timesteps):
        cond, bad = (m(x, timestep=t.flatten() / 1000, **fixed, return_dict=False)[0] for m in (model, weak))
        x = pipe.scheduler.step(2 * cond - bad if i == 2 else cond, t, x, return_dict=False)[0]
    assert_close(got, x, **close)
