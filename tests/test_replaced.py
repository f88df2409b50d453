"""What is replaced after guidance was set up, and calls that others make: an error, or the right numbers."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import stg_hooks as stg
from tests import pipelines, zoo
from tests.modular import ByHand, noise, text

close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


# --- denoisers --------------------------------------------------------------------------------------------------------


def other_transformer(case: Any) -> nn.Module:
    other = pipelines.build_transformer(case)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    return other


@pytest.mark.parametrize("runs", [0, 1])
@pytest.mark.parametrize("strict", [False, True])
def test_a_denoiser_that_is_replaced_inside(runs: int, strict: bool) -> None:
    pipe, call, case = pipelines.build("wan")
    first, other = pipe.transformer, other_transformer(case)
    with stg.apply(pipe, layers=[1], strict=strict):
        if not runs:
            pipe.transformer = other
            with pytest.raises(stg.CallError, match=r"the transformer of WanPipeline was replaced .*set pipe\.transf"):
                pipelines.run(pipe, call)
            pipe.transformer = first
        guided = pipelines.run(pipe, call)
        pipe.transformer = other
        with pytest.raises(stg.CallError, match="was replaced"):
            pipelines.run(pipe, call)
        pipe.transformer = first
        assert torch.equal(pipelines.run(pipe, call), guided)
    assert "progress_bar" not in vars(pipe)


def test_a_denoiser_that_is_replaced_by_a_callback() -> None:
    pipe, call, case = pipelines.build("wan")
    other, steps = other_transformer(case), []

    def on_step_end(pipe: Any, i: int, t: Tensor, kwargs: dict[str, Tensor]) -> dict[str, Tensor]:
        steps.append(i)
        pipe.transformer = other
        return kwargs

    with stg.apply(pipe, layers=[1]), pytest.raises(stg.CallError, match="the transformer of WanPipeline was replaced"):
        pipelines.run(pipe, call, callback_on_step_end=on_step_end)
    assert steps == [0]


@pytest.mark.parametrize("name", ["transformer", "transformer_2"])
def test_one_of_two_denoisers(name: str) -> None:
    pipe, call, case = pipelines.build_wan_2_2()
    with stg.apply(pipe, layers=[1]), pytest.raises(stg.CallError, match=rf"the {name} of WanPipeline was replaced"):  # noqa: PT012
        setattr(pipe, name, other_transformer(case))
        pipelines.run(pipe, call)


def test_a_denoiser_that_is_replaced_before_the_with() -> None:
    pipe, _, case = pipelines.build("wan")
    handle = stg.apply(pipe, layers=[1])
    pipe.transformer = other_transformer(case)
    with pytest.raises(stg.CallError, match=r"replaced after stg\.apply"), handle:
        pass
    assert "progress_bar" not in vars(pipe)


def test_a_denoiser_inside_another_module_is_guided_still() -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

        def __getattr__(self, name: str) -> Any:
            return self._modules["inner"] if name == "inner" else getattr(self._modules["inner"], name)

    pipe, call, _ = pipelines.build("wan")
    with stg.apply(pipe, layers=[1]):
        guided = pipelines.run(pipe, call)
        pipe.transformer = Wrapper(pipe.transformer)
        assert torch.equal(pipelines.run(pipe, call), guided)


def test_copies_of_a_pipeline_have_a_progress_bar_of_their_own() -> None:
    pipe, call, _ = pipelines.build("wan")
    plain = pipelines.run(pipe, call)
    with stg.apply(pipe, layers=[1]):
        copied = copy.deepcopy(pipe)
        again = pickle.loads(pickle.dumps(pipe.progress_bar))
    assert vars(copied)["progress_bar"].args == (copied,)
    assert type(again.args[0]) is type(pipe)
    assert torch.equal(pipelines.run(copied, call), plain)


# --- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [stg.apply, stg.skip])
def test_layers_that_are_replaced(make: Any) -> None:
    model = zoo.build("plain")
    first, message = model.blocks[2], "layer 'blocks.2' of .* was replaced after it had been chosen"
    handle = make(model, [2])
    model.blocks[2] = copy.deepcopy(first)
    before = zoo.snapshot(model)
    with pytest.raises(stg.LayerError, match=message), handle:
        pass
    assert zoo.snapshot(model) == before
    model.blocks[2] = first
    with handle:
        model(**zoo.inputs())
        model.blocks[2] = copy.deepcopy(first)
        with pytest.raises(stg.LayerError, match=message):
            model(**zoo.inputs())


def test_a_guider_whose_layer_is_replaced() -> None:
    model = zoo.build("plain")
    guider = stg.Guider(model, [2])
    guider(**zoo.inputs())
    model.blocks[2] = copy.deepcopy(model.blocks[2])
    with pytest.raises(stg.LayerError, match="was replaced after it had been chosen"):
        guider(**zoo.inputs())


# --- calls of others --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of_module", [False, True])
def test_a_denoiser_that_a_callback_calls(of_module: bool) -> None:
    pipe, call, _ = pipelines.build("wan")

    def peek(pipe: Any, i: int, t: Tensor, kwargs: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe.transformer(kwargs["latents"], t.expand(1), call["prompt_embeds"][:1])
        return kwargs

    target = pipe.transformer if of_module else pipe
    message = re.compile(
        r"peek \(line \d+ of .*test_replaced\.py\), which WanPipeline calls as its callback_on_step_end"
    )
    with stg.apply(target, layers=[1]), pytest.raises(stg.CallError, match=message):
        pipelines.run(pipe, call, callback_on_step_end=peek)


@pytest.mark.parametrize("family", ["wan", "ltx"])
def test_a_module_is_guided_as_the_pipeline_that_calls_it(family: str) -> None:
    pipe, call, case = pipelines.build(family)
    with stg.apply(pipe, layers=case.layers, stop=0.5):
        guided = pipelines.run(pipe, call)
    assert not torch.equal(guided, pipelines.run(pipe, call))
    with stg.apply(pipe.transformer, layers=case.layers, stop=0.5):
        assert torch.equal(pipelines.run(pipe, call), guided)
    for wrong in (family == "wan", family != "wan"):
        handle = stg.apply(pipe.transformer, layers=case.layers, batched_cfg=wrong, guidance_scale=2.0)
        if wrong == (family != "wan"):
            handle.not_to_be_entered()
            continue
        with pytest.raises(stg.CallError, match=rf"batched_cfg={wrong} says .*Pass the pipeline"), handle:
            pipelines.run(pipe, call)


# --- modular pipelines ------------------------------------------------------------------------------------------------


def modular_wan(guider: Any = None, depth: int = 3) -> tuple[Any, dict[str, Any]]:
    """Build all of its denoising, timesteps included."""
    from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep

    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=8, ffn_dim=16, num_layers=depth, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    ).eval().requires_grad_(False)  # fmt: skip
    pipe = WanCoreDenoiseStep().init_pipeline()
    pipe.update_components(transformer=model, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    if guider is not None:
        pipe.update_components(guider=guider)
    call = {**text(6, 8), "latents": noise(1, 4, 3, 4, 4), "height": 32, "width": 32, "num_frames": 9}
    return pipe, {**call, "num_inference_steps": 3}


def by_hand(g: float, rescale: float = 0.0) -> Tensor:
    pipe, call = modular_wan(ByHand(["blocks.1"], [1.0], g, rescale))
    return pipe(**call, output="latents")


@pytest.mark.parametrize("of_module", [False, True])
@pytest.mark.parametrize(
    ("guider", "weight"),
    [({}, 5.0), ({"guidance_scale": 2.0, "use_original_formulation": True}, 3.0), ({"guidance_scale": 1.0}, 1.0)],
)
def test_modular_pipelines(guider: dict[str, Any], weight: float, of_module: bool) -> None:
    pipe, call = modular_wan(diffusers.ClassifierFreeGuidance(**guider) if guider else None)
    with stg.apply(pipe.transformer if of_module else pipe, layers=[1], strict=True) as session:
        got = pipe(**call, output="latents")
    assert_close(got, by_hand(weight), rtol=1e-4, atol=1e-4)
    assert session.stats.weak_passes == 3


def test_rescale_in_a_modular_pipeline() -> None:
    pipe, call = modular_wan()
    with stg.apply(pipe, layers=[1], rescale=0.7):
        got = pipe(**call, output="latents")
    assert_close(got, by_hand(5.0, 0.7), rtol=1e-4, atol=1e-4)


def test_what_modular_pipelines_are_refused_for() -> None:
    pipe, call = modular_wan()
    with pytest.raises(stg.CallError, match="batched_cfg=False says"):  # noqa: SIM117 - the `with` is what fails
        with stg.apply(pipe.transformer, layers=[1], batched_cfg=False):
            pipe(**call, output="latents")
    pipe.update_components(guider=diffusers.ClassifierFreeGuidance(guidance_rescale=0.5))
    with pytest.raises(stg.TargetError, match=r"guidance_rescale=0\.5.*stg\.apply\(\.\.\., rescale=0\.5\)"):
        stg.apply(pipe, layers=[1])
    pipe.update_components(guider=diffusers.TangentialClassifierFreeGuidance())
    with pytest.raises(stg.TargetError, match=r"its guider is TangentialClassifierFreeGuidance.*update_components"):
        stg.apply(pipe, layers=[1])
    with stg.apply(pipe.transformer, layers=[1]), pytest.raises(stg.CallError, match="its guider is Tangential"):
        pipe(**call, output="latents")


def test_a_denoiser_of_a_modular_pipeline_that_is_replaced() -> None:
    pipe, call = modular_wan()
    with pytest.warns(stg.StgWarning, match="the transformer of WanModularPipeline was replaced"):  # noqa: PT031, SIM117
        with stg.apply(pipe, layers=[1]):
            pipe(**call, output="latents")
            pipe.update_components(transformer=copy.deepcopy(pipe.transformer))
            pipe(**call, output="latents")
