"""`apply` on stock diffusers pipelines: exact, local, loud, and gone without a trace."""

from __future__ import annotations

import asyncio
import functools
import json
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import stg_hooks as stg
from tests.pipelines import (
    FAMILIES,
    Case,
    build,
    build_pipeline,
    build_wan_2_2,
    noise_like,
    run,
    scheduler_inputs,
    textbook,
    with_true_cfg,
    without_cfg,
)
from tests.zoo import snapshot

pytestmark = [
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
    pytest.mark.filterwarnings("error::stg_hooks.StgWarning"),  # no way of execution may give up unnoticed
]
all_families = pytest.mark.parametrize("family", FAMILIES)
Built = tuple[Any, dict[str, Any], Case]
SHORT = {"num_inference_steps": 2}
"""The shortest run that every pipeline can make: Mochi's schedule needs two steps."""


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Compare up to float rounding, which is measured in standard deviations of what is expected."""
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=tolerance * expected.std().item())


def assert_far(one: Tensor, other: Tensor) -> None:
    assert (one - other).abs().max() > 0.02 * other.std()


def first_prediction(pipe: Any, call: dict[str, Any], **settings: Any) -> Tensor:
    """Return what the scheduler receives first: a prediction for latents that no guidance has touched."""
    with scheduler_inputs(pipe) as received, stg.apply(pipe, **settings):
        run(pipe, call, **SHORT)
    return received[0]


def built(kind: str) -> Built:
    """Build a family as recorded, or one of its other ways of calling the denoiser."""
    if kind == "wan 2.2":
        return build_wan_2_2()
    if kind == "hunyuan_video true cfg":
        pipe, call, case = build("hunyuan_video")
        return pipe, with_true_cfg(call), case
    family, _, cfg = kind.partition(" ")
    pipe, call, case = build(family)
    return pipe, without_cfg(call, case) if cfg == "no cfg" else call, case


def cfg_weights(kind: str, case: Case) -> list[float]:
    special = {"wan 2.2": [5.0, 3.0], "hunyuan_video true cfg": [3.0]}
    return special.get(kind, [1.0 if kind.endswith("no cfg") else case.guidance_scale])


KINDS = [
    *FAMILIES,
    "mochi no cfg",
    "ltx no cfg",
    "cogvideox no cfg",
    "wan no cfg",
    "wan 2.2",
    "hunyuan_video true cfg",
]
all_kinds = pytest.mark.parametrize("kind", KINDS)
TWO_CALLS = ("wan", "wan 2.2", "hunyuan_video true cfg")
"""Those that call for cond and for uncond, one after the other."""


# --- what is computed ---


@functools.cache
def by_the_textbook(kind: str, scale: float) -> tuple[Tensor, list[Tensor], Tensor]:
    """Return the latents without guidance, and with it the prediction of every step and the latents."""
    pipe, call, case = built(kind)
    plain = run(pipe, call)
    with textbook(pipe, case, [(case.layers, scale)], cfg_weights(kind, case)) as expected:
        return plain, expected, run(pipe, call)


@all_kinds
@pytest.mark.parametrize(("execution", "scale"), [("auto", 1.0), ("auto", 2.5), ("batched", 1.0), ("full", 1.0)])
def test_every_step_gets_the_textbook_prediction(kind: str, execution: str, scale: float) -> None:
    pipe, call, case = built(kind)
    plain, expected, expected_latents = by_the_textbook(kind, scale)
    settings = {"layers": case.layers, "scale": scale, "execution": execution}
    with scheduler_inputs(pipe) as received, stg.apply(pipe, **settings) as applied:
        latents = run(pipe, call)
    assert len(received) == applied.stats.weak_passes == case.steps
    assert applied.stats.calls == applied.stats.guided_calls == case.steps * (1 + (kind in TWO_CALLS))
    for actual, prediction in zip(received, expected, strict=True):
        assert_same(actual, prediction)
    assert_same(latents, expected_latents)
    assert_far(latents, plain)


@pytest.mark.parametrize(
    ("family", "branches"),
    [
        ("mochi", [([1, 4], 1.0)]),
        ("hunyuan_video", [([5], 1.0)]),  # the second single-stream block
        ("hunyuan_video", [([3, 4], 1.0)]),  # one of each stack
        ("wan", [([1], 0.5), ([3, 4], 1.5)]),
        ("ltx", [([0], 1.0), ([5], -0.5)]),
    ],
)
def test_several_layers_and_branches(family: str, branches: list[tuple[list[int], float]]) -> None:
    pipe, call, case = build(family)
    with textbook(pipe, case, branches, case.guidance_scale):
        expected = run(pipe, call)
    with stg.apply(pipe, branches=[stg.Branch(layers, scale) for layers, scale in branches]) as session:
        assert_same(run(pipe, call), expected)
    assert session.stats.weak_passes == case.steps * len(branches)


@all_families
def test_pipeline_outputs_of_either_form(family: str) -> None:
    pipe, call, case = build(family)
    with stg.apply(pipe, layers=case.layers):
        as_tuple = run(pipe, call, **SHORT)
        generator = torch.Generator().manual_seed(7)
        frames = pipe(**{**call, **SHORT, "return_dict": True}, generator=generator).frames
    assert torch.equal(as_tuple, frames)


# --- which rows, which prompt ---


def tensors_of(call: dict[str, Any]) -> list[str]:
    return [name for name, value in call.items() if isinstance(value, Tensor)]


def another_prompt(call: dict[str, Any]) -> dict[str, Any]:
    return {**call, **{n: noise_like(call[n], seed=9) for n in tensors_of(call) if n.endswith("_embeds")}}


def batch_of(calls: list[dict[str, Any]]) -> dict[str, Any]:
    return {**calls[0], **{name: torch.cat([call[name] for call in calls]) for name in tensors_of(calls[0])}}


def assert_each_is_what_it_would_be_alone(
    pipe: Any, case: Case, batch: dict[str, Any], calls: list[dict[str, Any]], **settings: Any
) -> None:
    noise = [noise_like(case.expected["base"], seed) for seed in range(len(calls))]
    plain = run(pipe, batch, latents=torch.cat(noise))
    with stg.apply(pipe, layers=case.layers, scale=2.0, **settings):
        together = run(pipe, batch, latents=torch.cat(noise))
    with stg.apply(pipe, layers=case.layers, scale=2.0, **settings):
        alone = [run(pipe, call, latents=latents) for call, latents in zip(calls, noise, strict=True)]
    assert_far(alone[0], alone[1])
    for latents, unguided, expected in zip(together.split(1), plain.split(1), alone, strict=True):
        assert_same(latents, expected)
        assert_far(latents, unguided)


@pytest.mark.parametrize("execution", ["sequential", "batched", "full"])
@all_kinds
def test_each_video_of_a_batch_is_what_it_would_be_alone(kind: str, execution: str) -> None:
    pipe, call, case = built(kind)
    calls = [{**call, **SHORT}, another_prompt({**call, **SHORT}), {**call, **SHORT}]
    assert_each_is_what_it_would_be_alone(pipe, case, batch_of(calls), calls, execution=execution)


# The other pipelines do not repeat embeddings that they are given, and fail, with or without guidance.
@pytest.mark.parametrize("kind", ["hunyuan_video", "hunyuan_video true cfg", "wan", "wan no cfg", "wan 2.2"])
def test_each_video_of_a_prompt_is_what_it_would_be_alone(kind: str) -> None:
    pipe, call, case = built(kind)
    assert_each_is_what_it_would_be_alone(pipe, case, {**call, "num_videos_per_prompt": 2}, [call, call])


@pytest.mark.parametrize("execution", ["sequential", "batched", "full"])
def test_tables_of_positions_are_not_taken_for_rows(execution: str) -> None:
    """Mochi's rotary table has eight tokens here, a multiple of the two rows; the model has three heads."""
    _, call, case = build("mochi")
    torch.manual_seed(0)
    config = {**case.config, "num_attention_heads": 3}
    pipe = build_pipeline(case, diffusers.MochiTransformer3DModel.from_config(config).eval())
    with textbook(pipe, case, [(case.layers, 1.0)], case.guidance_scale):
        expected = run(pipe, call)
    with stg.apply(pipe, layers=case.layers, execution=execution):
        assert_same(run(pipe, call), expected)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "hunyuan_video"])
def test_negative_prompt_is_not_looked_at_when_cfg_is_off(family: str) -> None:
    pipe, call, case = built(f"{family} no cfg")
    other = {**call, "negative_prompt_embeds": noise_like(call["negative_prompt_embeds"], seed=5)}
    with stg.apply(pipe, layers=case.layers):
        assert torch.equal(run(pipe, call), run(pipe, other))
        assert_far(run(pipe, {**call, "prompt_embeds": other["negative_prompt_embeds"]}), run(pipe, call))


@pytest.mark.parametrize("images", [1, 2])
def test_distilled_pipeline_that_does_not_name_its_calls(images: int) -> None:
    """FluxKontext hands `guidance_scale` to the model, makes no CFG pass, and has no `cache_context`."""
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=True,
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), latent_channels=1, norm_num_groups=1)
    absent = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.FluxKontextPipeline(scheduler, vae, transformer=transformer.eval(), **absent)
    pipe.set_progress_bar_config(disable=True)
    call = {
        "prompt_embeds": torch.randn(images, 8, 32),
        "pooled_prompt_embeds": torch.randn(images, 32),
        "latents": torch.randn(images, 16, 4),
        "height": 8,
        "width": 8,
        "max_area": 64,
        "_auto_resize": False,
        "guidance_scale": 3.5,
        "num_inference_steps": 1,
        "output_type": "latent",
        "return_dict": False,
    }
    plain = run(pipe, call)
    with stg.apply(transformer, layers=[1]):  # as a module whose rows are all conditional
        expected = run(pipe, call)
    assert_far(expected, plain)
    with stg.apply(pipe, layers=[1]):
        assert_same(run(pipe, call), expected)


def test_one_denoiser_in_both_places_is_guided_once() -> None:
    pipe, call, case = build("wan")
    pipe = build_pipeline(case, pipe.transformer, transformer_2=pipe.transformer, boundary_ratio=0.9)
    with stg.apply(pipe, layers=case.layers, scale=case.scale):
        assert_same(run(pipe, call), case.expected["stg"])


# --- rescale ---


@pytest.mark.parametrize("kind", ["ltx", "ltx no cfg", "wan", "wan 2.2", "hunyuan_video", "hunyuan_video true cfg"])
@pytest.mark.parametrize("rescale", [0.7, 1.0])
def test_rescale_is_the_one_of_the_paper(kind: str, rescale: float) -> None:
    pipe, call, case = built(kind)
    with scheduler_inputs(pipe) as without, stg.apply(pipe, layers=case.layers, scale=2.0):
        run(pipe, call)
    with textbook(pipe, case, [(case.layers, 2.0)], cfg_weights(kind, case), rescale) as expected:
        run(pipe, call)
    with scheduler_inputs(pipe) as received, stg.apply(pipe, layers=case.layers, scale=2.0, rescale=rescale):
        run(pipe, call)
    for actual, prediction in zip(received, expected, strict=True):
        assert_same(actual, prediction)
    assert_far(received[0], without[0])


def test_rescale_with_a_cfg_weight_of_one_in_two_calls() -> None:
    """Wan 2.2 decides by `guidance_scale` whether to call for uncond, and combines with `guidance_scale_2`."""
    pipe, call, case = build_wan_2_2()
    call["guidance_scale_2"] = 1.0
    with textbook(pipe, case, [(case.layers, 1.0)], [5.0, 1.0], 0.7):
        expected = run(pipe, call)
    with stg.apply(pipe, layers=case.layers, rescale=0.7):
        assert_same(run(pipe, call), expected)


def test_true_cfg_needs_both_negative_embeddings() -> None:
    """HunyuanVideo makes no uncond call without the pooled ones; what we return must not count on it."""
    pipe, call, case = build("hunyuan_video")
    call |= {"negative_prompt_embeds": noise_like(call["prompt_embeds"], 3), "true_cfg_scale": 3.0}
    with textbook(pipe, case, [(case.layers, 1.0)], 1.0, 0.7):
        expected = run(pipe, call)
    with stg.apply(pipe, layers=case.layers, rescale=0.7):
        assert_same(run(pipe, call), expected)


def test_cfg_weight_that_changes_during_the_run() -> None:
    pipe, call, case = build("cogvideox")
    call["use_dynamic_cfg"] = True
    with textbook(pipe, case, [(case.layers, 1.0)], lambda: pipe.guidance_scale) as expected:
        run(pipe, call, **SHORT)
    received = first_prediction(pipe, call, layers=case.layers)
    assert_same(received, expected[0])
    with (
        pytest.raises(stg.CallError, match=r"needs the CFG weight.*Use rescale=0\.0 and rule=.cfg., or stg\.Guider"),
        stg.apply(pipe, layers=case.layers, rescale=0.7),
    ):
        run(pipe, call)


# --- who is guided ---


def in_thread(work: Callable[[], Tensor]) -> Tensor:
    results: list[Tensor] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results[0]


@pytest.mark.parametrize(
    "where",
    [
        "same thread",
        "other thread",
    ],
)
@all_families
def test_another_pipeline_in_the_middle_of_a_guided_run_is_not_guided(family: str, where: str) -> None:
    """A callback runs it; the guided run does not notice."""
    pipe, call, case = build(family)
    other = build_pipeline(case, pipe.transformer)
    plain = run(other, call)
    with stg.apply(pipe, layers=case.layers):
        guided = run(pipe, call)
    seen: list[Tensor] = []

    def run_other(*_: Any) -> dict[str, Any]:
        seen.append(run(other, call) if where == "same thread" else in_thread(lambda: run(other, call)))
        return {}

    with stg.apply(pipe, layers=case.layers):
        assert torch.equal(run(pipe, call, callback_on_step_end=run_other), guided)
    assert len(seen) == case.steps
    for latents in seen:
        assert torch.equal(latents, plain)


@pytest.mark.parametrize("family", ["ltx", "wan"])
def test_asyncio_to_thread_inside_the_with_is_guided(family: str) -> None:
    pipe, call, case = build(family)
    with stg.apply(pipe, layers=case.layers):
        guided = run(pipe, call)

    async def main() -> Tensor:
        with stg.apply(pipe, layers=case.layers):
            return await asyncio.to_thread(run, pipe, call)

    assert torch.equal(asyncio.run(main()), guided)


def test_asyncio_task_started_before_the_with_is_not_guided() -> None:
    pipe, call, case = build("wan")
    other = build_pipeline(case, pipe.transformer)
    plain = run(other, call)

    async def main() -> Tensor:
        entered, done = asyncio.Event(), asyncio.Event()

        async def bystander() -> Tensor:
            await entered.wait()
            latents = run(pipe, call)
            done.set()
            return latents

        task = asyncio.create_task(bystander())
        with stg.apply(pipe, layers=case.layers):
            entered.set()
            with pytest.warns(stg.StgWarning, match="called in another thread, task"):
                await done.wait()
            run(pipe, call)
        return await task

    assert torch.equal(asyncio.run(main()), plain)


# --- restored ---


def state_of(pipe: Any) -> tuple[Any, ...]:
    """All that guiding a pipeline could leave behind."""
    models = [getattr(pipe, name, None) for name in ("transformer", "transformer_2")]
    return type(pipe), set(vars(pipe)), [snapshot(model) for model in models if model is not None]


@contextmanager
def left_no_trace(pipe: Any, call: dict[str, Any]) -> Iterator[None]:
    plain = run(pipe, call)  # the first run leaves attributes of its own
    before = state_of(pipe)
    yield
    assert state_of(pipe) == before
    assert torch.equal(run(pipe, call), plain)


RESTORED = ["mochi", "ltx", "cogvideox", "hunyuan_video", "wan", "wan 2.2"]


@pytest.mark.parametrize("kind", RESTORED)
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_after_a_run_or_an_exception_in_a_callback(
    kind: str, error: type[BaseException] | None
) -> None:
    pipe, call, case = built(kind)
    pipe.transformer.get_submodule("norm_out").train()  # flags are nobody's business, and stay as they are

    def interrupt(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == 1 and error is not None:
            raise error("stop")
        return {}

    ends = nullcontext() if error is None else pytest.raises(error, match="stop")
    with left_no_trace(pipe, call), ends, stg.apply(pipe, layers=case.layers):
        run(pipe, call, callback_on_step_end=interrupt)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_left_after_an_exception_in_the_denoiser(family: str, nth: int, error: type[BaseException]) -> None:
    """The last block runs once per pass: first for the pipeline's call, then for the weak prediction."""
    pipe, call, case = build(family)
    passes = 0

    def interrupt(*_: Any) -> None:
        nonlocal passes
        passes += 1
        if passes >= nth:
            raise error("stop")

    stacks = [child for child in pipe.transformer.children() if isinstance(child, nn.ModuleList)]
    plain = run(pipe, call)
    with stacks[-1][-1].register_forward_pre_hook(interrupt):
        before = state_of(pipe)
        with pytest.raises(error, match="stop"), stg.apply(pipe, layers=case.layers):
            run(pipe, call)
        assert state_of(pipe) == before
    assert passes >= nth
    assert torch.equal(run(pipe, call), plain)


def test_a_run_that_stopped_between_cond_and_uncond_can_be_repeated_inside_the_with() -> None:
    pipe, call, case = build("wan")
    with stg.apply(pipe, layers=case.layers, rescale=0.7):
        expected = run(pipe, call)
    embeds = call["negative_prompt_embeds"]

    def interrupt(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.equal(kwargs["encoder_hidden_states"], embeds):
            raise RuntimeError("stop")

    with stg.apply(pipe, layers=case.layers, rescale=0.7):
        with (
            pipe.transformer.register_forward_pre_hook(interrupt, with_kwargs=True),
            pytest.raises(RuntimeError, match="stop"),
        ):
            run(pipe, call)
        assert torch.equal(run(pipe, call), expected)


def test_nothing_is_left_when_the_second_denoiser_cannot_be_entered(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, call, case = build_wan_2_2()
    register = nn.Module.register_forward_hook

    def refuse(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if module is pipe.transformer_2:
            raise RuntimeError("no hooks here")
        return register(module, *args, **kwargs)

    with left_no_trace(pipe, call), monkeypatch.context() as patch:
        patch.setattr(nn.Module, "register_forward_hook", refuse)
        with pytest.raises(RuntimeError, match="no hooks here"), stg.apply(pipe, layers=case.layers):
            pytest.fail("entered")


@pytest.mark.parametrize("kind", ["ltx", "wan", "wan 2.2"])
def test_nothing_is_left_after_nesting_in_any_order(kind: str) -> None:
    pipe, call, case = built(kind)
    with stg.apply(pipe, layers=case.layers):
        expected = run(pipe, call)
    with left_no_trace(pipe, call):
        outer, inner = stg.apply(pipe, layers=[1]), stg.apply(pipe, layers=case.layers)
        outer.__enter__()
        inner.__enter__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stg.StgWarning)  # the outer one guides nothing
            outer.__exit__(None, None, None)
        try:
            assert torch.equal(run(pipe, call), expected)
        finally:
            inner.__exit__(None, None, None)


@pytest.mark.parametrize("kind", ["ltx", "wan"])
def test_two_sessions_on_one_pipeline_both_guide(kind: str) -> None:
    pipe, call, case = built(kind)
    with stg.apply(pipe, layers=[1]) as outer, stg.apply(pipe, layers=case.layers) as inner:
        run(pipe, call)
    assert outer.stats.weak_passes == inner.stats.weak_passes == case.steps


def test_refused_layers_leave_nothing() -> None:
    pipe, call, _ = build("wan")
    with left_no_trace(pipe, call), pytest.raises(stg.LayerError, match=r"has 6 layers \(0\.\.\.5\)"):
        stg.apply(pipe, layers=[3, 99])


# --- settings ---


@all_families
def test_no_layers_and_nothing_published(family: str) -> None:
    pipe, _, case = build(family)
    with pytest.raises(stg.SettingError) as caught:
        stg.apply(pipe)
    text = str(caught.value)
    assert text.startswith(f"no layers given, and no setting is published for this {case.info['model']}")
    count = sum(layer.index is not None for layer in stg.layers(pipe))
    assert all(
        int(number) < count for given in re.findall(r"layers=\[([\d, ]+)\]", text) for number in given.split(",")
    )
    assert "stg.layers(pipe) lists what can be skipped" in text


def published_mochi() -> Built:
    """Build a Mochi that is as deep as the published one, and still tiny."""
    _, call, case = build("mochi")
    torch.manual_seed(0)
    transformer = diffusers.MochiTransformer3DModel.from_config({**case.config, "num_layers": 48}).eval()
    return build_pipeline(case, transformer), {**call, **SHORT}, case


def test_no_layers_means_the_published_setting() -> None:
    pipe, call, case = published_mochi()
    with textbook(pipe, case, [([34], 1.0)], case.guidance_scale) as expected:
        run(pipe, call)
    with scheduler_inputs(pipe) as received, stg.apply(pipe) as session:
        run(pipe, call)
    assert session.plan.base.branches == (stg.Branch([34], 1.0, "residual"),)
    assert session.plan.base.rescale == 0.0
    assert_same(received[0], expected[0])
    other = stg.apply(pipe, scale=0.5)
    other.not_to_be_entered()
    assert other.plan.base.branches == (stg.Branch([34], 0.5, "residual"),)


@all_families
def test_layers_of_a_pipeline(family: str) -> None:
    pipe, _, case = build(family)
    table = stg.layers(pipe)
    assert all(pipe.transformer.get_submodule(layer.name) is layer.module for layer in table)
    data = table.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert list(data) == ["transformer"]
    assert data["transformer"]["model"] == case.info["model"]
    assert [row["name"] for row in data["transformer"]["layers"]] == [layer.name for layer in table]
    assert "<- published" not in repr(table)


def test_layers_of_a_pipeline_with_two_denoisers() -> None:
    pipe, _, _ = build_wan_2_2()
    data = stg.layers(pipe).to_dict()
    assert list(data) == ["transformer", "transformer_2"]
    assert len(stg.layers(pipe)) == 12
    assert "transformer_2 (WanTransformer3DModel): 6 layers" in repr(stg.layers(pipe))


# --- told ---


def test_guiding_nothing_is_reported() -> None:
    pipe, call, case = build("wan")
    other = build_pipeline(case, pipe.transformer)
    with (
        pytest.warns(stg.StgWarning, match="WanPipeline made no call") as caught,
        stg.apply(pipe, layers=case.layers),
    ):
        run(other, call)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("arguments", [{"batched_cfg": True}, {"batched_cfg": False}, {"guidance_scale": 4.5}])
def test_a_pipeline_needs_no_description_of_its_calls(arguments: dict[str, Any]) -> None:
    pipe, _, case = build("ltx")
    with pytest.raises(stg.SettingError, match="describe the calls of a module"):
        stg.apply(pipe, layers=case.layers, **arguments)


class NoDenoiser(diffusers.DiffusionPipeline):
    def __call__(self) -> None: ...


class FunctionDenoiser(NoDenoiser):
    def __init__(self) -> None:
        super().__init__()
        self.transformer = lambda x: x


@pytest.mark.parametrize("cls", [NoDenoiser, FunctionDenoiser])
def test_a_pipeline_without_a_denoiser_is_refused(cls: type) -> None:
    with pytest.raises(
        stg.TargetError, match=rf"{cls.__name__} has no transformer, transformer_2 or unet.*apply\(module"
    ):
        stg.apply(cls(), layers=[0])


@pytest.mark.parametrize("target", [None, "wan", lambda x: x, diffusers.WanPipeline])
def test_what_is_no_pipeline_is_refused(target: object) -> None:
    with pytest.raises(stg.TargetError, match=r"expected a diffusers pipeline or a torch\.nn\.Module"):
        stg.apply(target, layers=[0])
