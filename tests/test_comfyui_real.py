"""The nodes in a real ComfyUI, headless, on tiny random models, compared with guidance that is written by hand.

By hand means: a guider that asks ComfyUI for cond, uncond and, with the block replaced by an identity, weak.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import stg_hooks as stg
from stg_hooks.integrations.comfyui import comfy_entrypoint, nodes
from stg_hooks.integrations.comfyui.__main__ import install
from tests import comfy_models
from tests.comfy_models import Counting, build, conditioning, flat, latents, needs_comfyui, nothing_of, sample

pytestmark = [
    needs_comfyui,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("error::stg_hooks.StgWarning"),
]
close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
exact: dict[str, Any] = {"rtol": 0, "atol": 0}


@pytest.fixture(scope="module", autouse=True)
def _comfyui() -> None:
    comfy_models.load()


class Through(nn.Module):
    """Hands through what a block is given; several streams leave as they come."""

    def __init__(self, returns: str = "x", takes: str = "") -> None:
        super().__init__()
        self.returns, self.takes = returns.split(), (takes or returns).split()

    def forward(self, *args: Any, **given: Any) -> Any:
        given = {**dict(zip(self.takes, args, strict=False)), **given}
        found = tuple(given[name] for name in self.returns)
        return found if len(found) > 1 else found[0]


# Model: what is typed into the node, list of blocks, place in it, and what an identity is there.
SKIPS = {
    "LTXV": ("3", "transformer_blocks", 3, Through()),
    "Wan": ("3", "blocks", 3, Through()),
    "HunyuanVideo": ("2", "double_blocks", 2, Through("img txt")),
    "HunyuanVideo single": ("single_blocks.1", "single_blocks", 1, Through()),
    "Flux": ("1", "double_blocks", 1, Through("img txt")),
    "Flux single": ("5", "single_blocks", 2, Through()),
    "SD3": ("2", "joint_blocks", 2, Through("context x")),
    "SD15": ("2", "middle_block", 1, Through()),
    "SDXL": ("1", "middle_block", 1, Through()),
    "Mochi": ("2", "blocks", 2, Through("x y", "x c y")),
    "Predict2": ("2", "blocks", 2, Through()),
    "Qwen": ("2", "transformer_blocks", 2, Through("encoder_hidden_states hidden_states")),
    "Chroma": ("2", "double_blocks", 2, Through("img txt")),
    "Z-Image": ("1", "layers", 1, Through()),
    "LTX-2": ("3", "transformer_blocks", 3, Through()),
}
STACKS = {"HunyuanVideo": ("double_blocks", "single_blocks")} | dict.fromkeys(
    ("Flux", "Chroma"), ("double_blocks", "single_blocks")
)
"""Where there is more than one list of blocks."""
U_NETS = ("SD15", "SDXL")


@contextmanager
def without(model: nn.Module, case: str) -> Iterator[None]:
    """Replace a block by an identity within a `with`."""
    _, name, place, identity = SKIPS[case]
    blocks: Any = model.get_submodule(name)
    before, blocks[place] = blocks[place], identity
    try:
        yield
    finally:
        blocks[place] = before


def node(kind: str = "STGGuidanceAdvanced") -> Callable[..., Any]:
    return lambda *args, **fields: nodes.NODE_CLASS_MAPPINGS[kind]().guide(*args, **fields)[0]


Combine = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def by_hand(
    patcher: Any,
    name: str,
    weak_model: Callable[[nn.Module], Any],
    combine: Combine,
    cfg: float = 3.0,
    steps: int = 3,
    rows: int = 1,
    positive: Any = None,
    negative: Any = None,
) -> Tensor:
    """Sample with a guider that makes three predictions one after the other."""
    import comfy.samplers

    class ByHand(comfy.samplers.CFGGuider):  # type: ignore[misc]
        def predict_noise(self, x: Any, timestep: Any, model_options: Any = None, seed: Any = None) -> Any:
            def predicted(which: str) -> Any:
                given = [self.conds[which]]
                return comfy.samplers.calc_cond_batch(self.inner_model, given, x, timestep, model_options)[0]

            c, u = predicted("positive"), predicted("negative")
            with weak_model(self.inner_model.diffusion_model):
                w = predicted("positive")
            return combine(c, u, w, float(timestep.max()))

    guider = ByHand(patcher)
    guider.set_conds(positive or conditioning(name, 1), negative or conditioning(name, 2))
    guider.set_cfg(cfg)
    noise = latents(name, rows=rows)
    sigmas = comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), "simple", steps)
    with torch.inference_mode():
        found = guider.sample(
            noise, nothing_of(noise), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=0
        )
    return flat(found)


def stg_with(cfg: float, scale: float, rescale: float = 0.0) -> Combine:
    def combine(c: Tensor, u: Tensor, w: Tensor, sigma: float) -> Tensor:
        out = u + cfg * (c - u) + scale * (c - w)
        dims = list(range(1, c.ndim))
        return out * (rescale * c.std(dims, keepdim=True) / out.std(dims, keepdim=True) + 1 - rescale)

    return combine


def state_of(model: nn.Module) -> dict[str, Any]:
    """List what modules hold: names of all, and hooks and weights; models set other attributes in each call."""
    found = {name: dict(vars(module)) for name, module in model.named_modules()}
    return {name: {k: v if k.startswith("_") else k for k, v in of_one.items()} for name, of_one in found.items()}


@pytest.mark.parametrize("cfg", [3.0, 1.0])
@pytest.mark.parametrize("case", SKIPS)
def test_a_block_replaced_by_an_identity(case: str, cfg: float) -> None:
    name = case.split()[0]
    patcher = build(name)
    module = patcher.model.diffusion_model
    plain, before = sample(patcher, name, cfg), state_of(module)
    guided = node("STGGuidance")(patcher, SKIPS[case][0], "residual", 1.5, 0.4)
    expected = by_hand(patcher, name, lambda model: without(model, case), stg_with(cfg, 1.5, 0.4), cfg)
    got = sample(guided, name, cfg)
    assert_close(got, expected, **close)
    assert float((got - plain).abs().max()) > 0.01
    assert state_of(module) == before
    assert_close(sample(patcher, name, cfg), plain, **exact)


@pytest.mark.parametrize("case", [case for case in SKIPS if case not in U_NETS])
def test_a_weak_pass_starts_at_the_skipped_block(case: str) -> None:
    name = case.split()[0]
    patcher, steps = build(name), 4
    module = patcher.model.diffusion_model
    blocks = [block for stack in STACKS.get(name, (SKIPS[case][1],)) for block in getattr(module, stack)]
    place = next(i for i, block in enumerate(blocks) if block is getattr(module, SKIPS[case][1])[SKIPS[case][2]])
    guided = node()(patcher, SKIPS[case][0], "residual")
    with Counting(*blocks) as plain:
        sample(patcher, name, steps=steps)
    with Counting(*blocks) as first:
        sample(guided, name, steps=steps)
    with Counting(*blocks) as second:
        sample(guided, name, steps=steps)
    assert plain.calls == steps * len(blocks)
    behind = len(blocks) - place - 1
    # A module is called, and counted, also where it answers with what is known: count what it computes.
    assert first.calls >= second.calls >= plain.calls + steps * behind
    (made,) = guided_state(guided)._made[1].values()
    assert made.stats.blocks_run == 2 * steps * behind
    assert made.stats.blocks_saved == 2 * steps * (place + 1)


@pytest.mark.parametrize("name", U_NETS)
def test_a_weak_pass_of_a_u_net_starts_at_the_skipped_block(name: str) -> None:
    """Its blocks number themselves in a dictionary, and the model calls what is in its Sequentials."""
    patcher, steps = build(name), 4
    layers = [layer for layer in stg.layers(patcher.model.diffusion_model) if layer.index is not None]
    place = len(layers) // 2
    guided = node()(patcher, str(place), "residual")
    sample(guided, name, steps=steps)
    (made,) = guided_state(guided)._made[1].values()
    assert made.stats.blocks_run == steps * (len(layers) - place - 1)
    assert made.stats.blocks_saved == steps * (place + 1)


def guided_state(patcher: Any) -> Any:
    return patcher.model_options["sampler_post_cfg_function"][-1].__self__


def values_by_hand(name: str) -> Callable[[nn.Module], Any]:
    @contextmanager
    def weak(model: nn.Module) -> Iterator[None]:
        block: Any = model.get_submodule(SKIPS[name][1])[SKIPS[name][2]]
        if name == "LTXV":
            attention, given = block.attn1, lambda x, *_, **__: attention.to_out(attention.to_v(x))
        else:
            attention, given = block.self_attn, lambda x, *_, **__: attention.o(attention.v(x))
        attention.forward = given
        try:
            yield
        finally:
            del attention.forward

    return weak


@contextmanager
def video_and_audio_apart(model: Any) -> Iterator[None]:
    attention = [
        a for block in model.transformer_blocks for a in (block.audio_to_video_attn, block.video_to_audio_attn)
    ]
    for one in attention:
        one.forward = lambda x, *_, **__: torch.zeros_like(x)
    try:
        yield
    finally:
        for one in attention:
            del one.forward


def test_video_and_audio_apart() -> None:
    patcher = build("LTX-2")
    got = sample(node()(patcher, "", "isolated", 2.0), "LTX-2")
    assert_close(got, by_hand(patcher, "LTX-2", video_and_audio_apart, stg_with(3.0, 2.0)), **close)
    assert float((got - sample(patcher, "LTX-2")).abs().max()) > 0.01


@pytest.mark.parametrize("name", ["LTXV", "Wan"])
def test_values_are_the_published_stg_of_ltx(name: str) -> None:
    patcher = build(name)
    got = sample(node()(patcher, "3", "values", 2.0), name)
    assert_close(got, by_hand(patcher, name, values_by_hand(name), stg_with(3.0, 2.0)), **close)


@pytest.mark.parametrize("name", ["LTXV", "Wan", "Flux"])
def test_attention_of_any_backend_is_seen(name: str) -> None:
    """Of a backend that torch does not show, only the skipped layers use another one."""
    from comfy.ldm.modules.attention import attention_pytorch

    calls = []

    def hidden(function: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        with torch._C.DisableTorchFunction():
            return attention_pytorch(*args, **kwargs)

    patcher = build(name)
    expected = sample(node()(patcher, "2", "values"), name)
    theirs = patcher.clone()
    theirs.model_options["transformer_options"]["optimized_attention_override"] = hidden
    assert_close(sample(node()(theirs, "2", "values"), name), expected, **close)
    guided = len(calls)
    calls.clear()
    sample(theirs, name)
    assert guided > len(calls) > 0  # their backend computes the other layers of the weak pass, too


@pytest.mark.parametrize("case", ["LTXV", "Flux"])
def test_areas_masks_and_several_prompts(case: str) -> None:
    shape = (2, 4, 4) if case == "Flux" else (2, 2, 2)
    areas: dict[str, Any] = {"area": (2, 4, 0, 0) if case == "Flux" else (3, 2, 1, 0, 0, 0), "strength": 0.7}
    mask = {"mask": torch.ones(1, *shape[1:]) * 0.5, "mask_strength": 0.8}
    positive = conditioning(case, 1, **mask) + conditioning(case, 3, **areas) + conditioning(case, 4)
    patcher = build(case)
    expected = by_hand(patcher, case, lambda model: without(model, case), stg_with(3.0, 1.0), positive=positive, rows=2)
    got = sample(node()(patcher, SKIPS[case][0]), case, positive=positive, rows=2)
    assert_close(got, expected, **close)


def test_context_windows() -> None:
    from comfy import context_windows

    patcher = build("Wan").clone()
    patcher.model_options["context_handler"] = context_windows.IndexListContextHandler(
        context_schedule=context_windows.get_matching_context_schedule("standard_static"),
        fuse_method=context_windows.get_matching_fuse_method("pyramid"),
        context_length=2,
        context_overlap=1,
        dim=2,
    )
    expected = by_hand(patcher, "Wan", lambda model: without(model, "Wan"), stg_with(3.0, 1.0))
    guided = node()(patcher, "3", "residual")
    assert_close(sample(guided, "Wan"), expected, **close)
    (made,) = guided_state(guided)._made[1].values()
    assert made.stats.weak_passes == 3 * 2  # one per window and step


def test_control_acts_on_weak_predictions_and_runs_once() -> None:
    controlnet = comfy_models.extra("comfy.controlnet")

    calls = []

    class Control(controlnet.ControlBase):  # type: ignore[misc]
        def get_control(self, x: Tensor, *_: Any) -> Any:
            calls.append(1)
            extra = torch.linspace(-1, 1, 64 * 16).reshape(1, 64, 4, 4)
            return {"middle": [extra.expand(len(x), -1, -1, -1)], "output": [None, extra], "input": []}  # popped from

        def get_models(self) -> list[Any]:
            return []

    patcher = build("SD15")
    positive = conditioning("SD15", 1, control=Control(), control_apply_to_uncond=False)
    expected = by_hand(patcher, "SD15", lambda model: without(model, "SD15"), stg_with(3.0, 1.0), positive=positive)
    assert float((expected - sample(patcher, "SD15", positive=positive)).abs().max()) > 0.01
    calls.clear()
    assert_close(sample(node()(patcher, "2", "residual"), "SD15", positive=positive), expected, **close)
    assert len(calls) == 3


def test_published_settings_are_found_for_comfyuis_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, change, layers in (
        ("LTXV", {"num_layers": 28}, "transformer_blocks.19"),
        ("Wan", {"num_layers": 40}, "blocks.8"),
        ("HunyuanVideo", {"depth": 20, "depth_single_blocks": 40}, "double_blocks.2"),
    ):
        kind, given, *rest = comfy_models.MODELS[name]
        monkeypatch.setitem(comfy_models.MODELS, name, (kind, {**given, **change}, *rest))
        patcher = build(name)
        guided, info = nodes.STGGuidance().guide(patcher)
        assert f"skipped: {layers} (mode residual" in info
        assert float((sample(guided, name, steps=1) - sample(patcher, name, steps=1)).abs().max()) > 0


def test_two_nodes_add_their_terms_and_clones_do_not_meet() -> None:
    patcher = build("LTXV")
    one = node()(patcher, "2", "residual", 1.0)
    both = node()(one, "4", "values", 0.5)
    alone, before = sample(one, "LTXV"), sample(patcher, "LTXV")
    got = sample(both, "LTXV", steps=1)
    terms = [sample(m, "LTXV", steps=1) for m in (one, node()(patcher, "4", "values", 0.5), patcher)]
    assert_close(got, terms[0] + terms[1] - terms[2], **close)
    sample(both, "LTXV")
    assert_close(sample(one, "LTXV"), alone, **exact)
    assert_close(sample(one.clone(), "LTXV"), alone, **exact)
    assert_close(sample(patcher, "LTXV"), before, **exact)


@pytest.mark.parametrize("in_weak_pass", [False, True])
def test_an_interrupt_leaves_nothing(in_weak_pass: bool) -> None:
    patcher = build("Flux")
    module = patcher.model.diffusion_model
    guided = node()(patcher, "1", "values")
    expected, plain, before = sample(guided, "Flux"), sample(patcher, "Flux"), state_of(module)

    def interrupt(block: nn.Module, given: Any) -> None:
        if stg.Predictor.in_weak_pass() == in_weak_pass:
            raise KeyboardInterrupt

    handle = module.double_blocks[2].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        sample(guided, "Flux")
    handle.remove()
    del before[""]["_forward_pre_hooks"], before["double_blocks.2"]["_forward_pre_hooks"]
    after = state_of(module)
    del after[""]["_forward_pre_hooks"], after["double_blocks.2"]["_forward_pre_hooks"]
    assert after == before
    assert_close(sample(patcher, "Flux"), plain, **exact)
    assert_close(sample(guided, "Flux"), expected, **exact)


def test_a_guider_with_three_conditionings() -> None:
    """Which of them is cond is known afterwards only, so a full weak pass is made."""
    custom = comfy_models.extra("comfy_extras.nodes_custom_sampler")
    import comfy.samplers

    patcher = build("Wan")
    noise = latents("Wan")
    sigmas = comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), "simple", 3)

    def run(model: Any, kind: Any) -> Tensor:
        guider = kind(model)
        guider.set_cfg(3.0, 2.0)
        guider.set_conds(conditioning("Wan", 1), conditioning("Wan", 3), conditioning("Wan", 2))
        euler = comfy.samplers.sampler_object("euler")
        with torch.inference_mode():
            found: Tensor = guider.sample(noise, torch.zeros_like(noise), euler, sigmas, disable_pbar=True, seed=0)
        return found

    class ByHand(custom.Guider_DualCFG):  # type: ignore[misc]
        def predict_noise(self, x: Any, timestep: Any, model_options: Any = None, seed: Any = None) -> Any:
            plain = super().predict_noise(x, timestep, model_options, seed)
            ask = comfy.samplers.calc_cond_batch
            (c,) = ask(self.inner_model, [self.conds["middle"]], x, timestep, model_options)
            with without(self.inner_model.diffusion_model, "Wan"):
                (w,) = ask(self.inner_model, [self.conds["middle"]], x, timestep, model_options)
            return plain + 1.5 * (c - w)

    got = run(node()(patcher, "3", "residual", 1.5), custom.Guider_DualCFG)
    assert_close(got, run(patcher, ByHand), **close)


def test_lists_by_noise_level_as_ltxvideo_counts_them() -> None:
    sigmas, cfgs, scales, rescales = [1.0, 0.9, 0.6], [6.0, 3.0, 1.0], [4.0, 2.0, 0.0], [0.5, 0.7, 1.0]

    def combine(c: Tensor, u: Tensor, w: Tensor, sigma: float) -> Tensor:
        level = max(i for i in range(3) if sigmas[i] >= sigma * (1 - 1e-6))
        return stg_with(cfgs[level], scales[level], rescales[level])(c, u, w, sigma)

    patcher = build("LTXV")
    guided = node()(
        patcher,
        "3",
        "values",
        sigmas="1.0, 0.9, 0.6",
        cfg_by_sigma="6, 3, 1",
        scale_by_sigma="4, 2, 0",
        rescale_by_sigma="0.5, 0.7, 1.0",
        layers_by_sigma="[3], [3], [3]",
    )
    expected = by_hand(patcher, "LTXV", values_by_hand("LTXV"), combine, steps=6)
    for cfg in (2.0, 1.0):
        assert_close(sample(guided, "LTXV", cfg, steps=6), expected, **close)


@pytest.mark.parametrize("window", [{"start_percent": 0.3, "end_percent": 0.7}, {"sigma_min": 0.4, "sigma_max": 0.9}])
def test_steps_outside_of_a_window_cost_nothing(window: dict[str, float]) -> None:
    patcher = build("Flux")
    guided = node()(patcher, "1", "residual", 2.0, **window)
    to_sigma = patcher.get_model_object("model_sampling").percent_to_sigma
    high = window.get("sigma_max") or to_sigma(window["start_percent"])
    low = window.get("sigma_min") or to_sigma(window["end_percent"])
    inside = []

    def combine(c: Tensor, u: Tensor, w: Tensor, sigma: float) -> Tensor:
        inside.append(low <= sigma <= high)
        return stg_with(3.0, 2.0 * inside[-1])(c, u, w, sigma)

    expected = by_hand(patcher, "Flux", lambda model: without(model, "Flux"), combine, steps=8)
    assert_close(sample(guided, "Flux", steps=8), expected, **close)
    (made,) = guided_state(guided)._made[1].values()
    assert made.stats.weak_passes == sum(inside)
    assert 0 < sum(inside) < 8


def test_the_weak_model_makes_the_uncond_prediction() -> None:
    patcher = build("LTXV")
    import comfy.samplers

    class ByHand(comfy.samplers.CFGGuider):  # type: ignore[misc]
        def predict_noise(self, x: Any, timestep: Any, model_options: Any = None, seed: Any = None) -> Any:
            ask = comfy.samplers.calc_cond_batch
            (c,) = ask(self.inner_model, [self.conds["positive"]], x, timestep, model_options)
            with without(self.inner_model.diffusion_model, "LTXV"):
                (u,) = ask(self.inner_model, [self.conds["negative"]], x, timestep, model_options)
            return u + 3.0 * (c - u)

    guider = ByHand(patcher)
    guider.set_conds(conditioning("LTXV", 1), conditioning("LTXV", 2))
    noise = latents("LTXV")
    sigmas = comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), "simple", 3)
    with torch.inference_mode():
        euler = comfy.samplers.sampler_object("euler")
        expected = guider.sample(noise, torch.zeros_like(noise), euler, sigmas, disable_pbar=True, seed=0)
    guided = node()(patcher, "3", "residual", on="uncond")
    assert_close(sample(guided, "LTXV"), expected, **close)
    with pytest.raises(stg.CallError, match="set its CFG above 1"):
        sample(guided, "LTXV", cfg=1.0)


@pytest.mark.parametrize("rule", ["zero_star", "apg", "orthogonal"])
def test_rules(rule: str) -> None:
    patcher = build("Wan")

    def combine(c: Tensor, u: Tensor, w: Tensor, sigma: float) -> Tensor:
        return stg.combine(c, w, u, scale=1.0, guidance_scale=3.0, rule=rule)

    expected = by_hand(patcher, "Wan", lambda model: without(model, "Wan"), combine)
    assert_close(sample(node()(patcher, "3", "residual", rule=rule), "Wan"), expected, **close)


def test_what_a_model_does_not_have_is_an_error_of_the_node() -> None:
    for name in ("SD15", "LTXV"):
        with pytest.raises(stg.LayerError, match=r"layers=\[99\]"):
            node("STGGuidance")(build(name), "99")
    with pytest.raises(stg.SettingError, match="no setting is published for this LTXVModel"):
        node("STGGuidance")(build("LTXV"), "")
    with pytest.raises(stg.LayerError, match="has no attention"):
        node("STGGuidance")(build("SD15"), "input_blocks.1.0", "values")


def test_layers_have_comfyuis_names() -> None:
    (text,) = nodes.STGLayers().show(build("HunyuanVideo"))["result"]
    assert "double_blocks.2" in text
    assert "single_blocks.3" in text


def test_a_step_cache_keeps_weak_predictions_apart() -> None:
    cache = comfy_models.extra("comfy_extras.nodes_easycache")
    if not hasattr(cache.EasyCacheHolder, "can_apply_cache_diff"):
        pytest.skip("this version applies what it never kept")
    patcher = build("Wan")
    cached = cache.EasyCacheNode.execute(patcher, 1e9, 0.0, 1.0, False).args[0]
    few, all_of_them = sample(cached, "Wan", steps=6), sample(patcher, "Wan", steps=6)
    assert float((few - all_of_them).abs().max()) > 0
    with Counting(*patcher.model.diffusion_model.blocks) as counted:
        got = sample(node()(cached, "3", "residual"), "Wan", steps=6)
    assert counted.calls < 6 * 2 * 6  # it leaves passes out, weak ones too
    full = sample(node()(patcher, "3", "residual"), "Wan", steps=6)
    assert torch.isfinite(got).all()
    assert float((got - full).abs().max()) < 10 * float((few - all_of_them).abs().max())


def test_comfyui_loads_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "__init__.py").write_text('"""STG."""\nfrom stg_hooks.integrations.comfyui import *\n')
    for name, folder in (("two_lines", tmp_path), ("whole", Path(nodes.__file__).parent)):
        spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")  # as ComfyUI loads custom nodes
        assert spec is not None
        assert spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, loaded)
        spec.loader.exec_module(loaded)
        assert set(loaded.NODE_CLASS_MAPPINGS) == {"STGGuidance", "STGGuidanceAdvanced", "STGLayers"}
        assert callable(loaded.comfy_entrypoint)


def test_comfyui_loads_what_the_installation_writes(tmp_path: Path) -> None:
    theirs = comfy_models.extra("nodes")
    (tmp_path / "custom_nodes").mkdir()
    with comfy_models.torchvision():
        assert asyncio.run(theirs.load_custom_node(str(install(tmp_path))))
    assert theirs.NODE_CLASS_MAPPINGS["STGGuidance"] is nodes.STGGuidance
    assert theirs.NODE_DISPLAY_NAME_MAPPINGS["STGGuidanceAdvanced"] == "STG Guidance (Advanced)"


def test_comfyuis_nodes_have_the_fields_of_the_example_workflow() -> None:
    known = dict(comfy_models.extra("nodes").NODE_CLASS_MAPPINGS)
    for name in ("nodes_lt", "nodes_preview_any"):
        module = comfy_models.extra(f"comfy_extras.{name}")
        known.update(getattr(module, "NODE_CLASS_MAPPINGS", {}))
        if hasattr(module, "comfy_entrypoint"):
            extension = asyncio.run(module.comfy_entrypoint())
            known.update({node.GET_SCHEMA().node_id: node for node in asyncio.run(extension.get_node_list())})
    known.update(nodes.NODE_CLASS_MAPPINGS)
    file = Path(nodes.__file__).parent / "example_workflows" / "stg_ltx_video.json"
    for node in json.loads(file.read_text(encoding="utf-8"))["nodes"]:
        if node["type"] == "SaveAnimatedWEBP":  # its module does not load outside of ComfyUI's own process
            continue
        given = known[node["type"]].INPUT_TYPES()
        inputs = {name: kind for group in ("required", "optional") for name, kind in given.get(group, {}).items()}
        slots = [name for name, kind in inputs.items() if not _is_widget(kind)]
        assert [slot["name"] for slot in node["inputs"]] == slots, node["type"]
        widgets = [name for name, kind in inputs.items() if _is_widget(kind)]
        values = [value for value in node["widgets_values"] if value != "randomize"]
        assert len(values) == len(widgets), node["type"]
        for name, value in zip(widgets, values, strict=True):
            kind = inputs[name][0]
            python = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}.get(
                kind if isinstance(kind, str) else "", str
            )
            assert isinstance(value, python), (node["type"], name)


def _is_widget(given: Any) -> bool:
    return isinstance(given[0], list) or str(given[0]) in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def test_the_nodes_in_the_v3_schema() -> None:
    latest = comfy_models.extra("comfy_api.latest")
    extension = asyncio.run(comfy_entrypoint())
    assert isinstance(extension, latest.ComfyExtension)
    found = {node.GET_SCHEMA().node_id: node for node in asyncio.run(extension.get_node_list())}
    assert set(found) == set(nodes.NODE_CLASS_MAPPINGS)
    for name, old in nodes.NODE_CLASS_MAPPINGS.items():
        given = found[name].INPUT_TYPES()
        for group, fields in old.INPUT_TYPES().items():
            assert set(given[group]) == set(fields)
            for field, (kind, details) in fields.items():
                theirs = given[group][field]
                assert theirs[0] == ("COMBO" if isinstance(kind, list) else kind)
                assert details.items() - {("round", False)} <= theirs[1].items()
        assert found[name].GET_SCHEMA().display_name == old.DISPLAY_NAME
    patcher = build("LTXV")
    fields = {
        name: given[1]["default"]
        for name, given in nodes.STGGuidance.INPUT_TYPES()["required"].items()
        if name != "model"
    }
    guided, info = found["STGGuidance"].execute(model=patcher, **{**fields, "layers": "3"}).args
    assert_close(sample(guided, "LTXV"), sample(node()(patcher, "3"), "LTXV"), **exact)
    assert "transformer_blocks.3" in info
    (text,) = found["STGLayers"].execute(model=patcher).args
    assert "transformer_blocks.5" in text
