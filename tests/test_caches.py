"""Guidance of models with a step cache: the textbook where each kind of pass has a model, and a cache, of its own."""

from __future__ import annotations

import copy
import dataclasses
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from typing import Any

import pytest
import torch
from diffusers import hooks
from torch import Tensor, nn
from torch.testing import assert_close

import stg_hooks as stg
from tests import pipelines, zoo

SCALE, STEPS = 1.5, 6
NOW = [0]
"""The step that is being made, for caches that ask what the time is."""


def timestep() -> int:
    return 900 - 100 * NOW[0]


CACHES: dict[str, Callable[[], Any]] = {
    "first block": lambda: hooks.FirstBlockCacheConfig(threshold=0.2),
    "mag": lambda: hooks.MagCacheConfig(mag_ratios=[1.0] * STEPS, num_inference_steps=STEPS, max_skip_steps=1),
    "pyramid": lambda: hooks.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=timestep
    ),
    "taylor": lambda: hooks.TaylorSeerCacheConfig(
        cache_interval=2,
        disable_cache_before_step=2,
        cache_identifiers=[r"blocks\.\d+\.attn\d"],
        taylor_factors_dtype=torch.float32,
    ),
    "taylor lite": lambda: hooks.TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=2, use_lite_mode=True, taylor_factors_dtype=torch.float32
    ),
    "faster": lambda: hooks.FasterCacheConfig(
        is_guidance_distilled=True,
        spatial_attention_timestep_skip_range=(-1, 850),
        attention_weight_callback=lambda _: 0.5,
        current_timestep_callback=timestep,
    ),
}
FAST = ("first block",)
EVERY = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CACHES]
WITH_ENDS = ("first block", "mag")
"""Those whose first and last block hand something to each other."""


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    NOW[0] = 0
    with torch.no_grad():
        yield


def build(depth: int = 5) -> nn.Module:
    return dataclasses.replace(zoo.FAMILIES["wan"], changes={"num_layers": depth}).build()


def inputs(step: int, batch: int = 2) -> dict[str, Any]:
    """What a run gives to its model: it changes slowly, or else no cache is ever used."""
    first, last = (zoo.FAMILIES["wan"].inputs(batch, seed) for seed in (1, 2))
    first["hidden_states"] = first["hidden_states"] + 0.01 * step * last["hidden_states"]
    return first


def cached(model: nn.Module, cache: str | None, without: int | None = None) -> nn.Module:
    """Copy a model, enable a cache on it, and let one of its blocks hand its input through."""
    model = copy.deepcopy(model)
    if cache is not None:
        model.enable_cache(CACHES[cache]())
    if without is not None:
        model.blocks[without] = zoo.KeepHiddenStates()
    return model


def call(model: nn.Module, arguments: dict[str, Any], context: str = "cond") -> Tensor:
    with model.cache_context(context):
        output: Tensor = model(**arguments)[0]
    return output


def textbook(model: nn.Module, cache: str, layer: int, weak_cache: str | None) -> list[Tensor]:
    cond, weak = cached(model, cache), cached(model, weak_cache, layer)
    results = []
    for NOW[0] in range(STEPS):
        c, w = call(cond, inputs(NOW[0])), call(weak, inputs(NOW[0]))
        results.append(c + SCALE * (c - w))
    return results


def is_used(model: nn.Module, cache: str, without: int | None = None) -> bool:
    one, other = cached(model, cache, without), cached(model, None, without)
    pairs = []
    for NOW[0] in range(STEPS):
        pairs.append((call(one, inputs(NOW[0])), call(other, inputs(NOW[0]))))
    return not all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("layer", [2, *(pytest.param(end, marks=pytest.mark.slow) for end in (0, 4))])
@pytest.mark.parametrize("cache", EVERY)
def test_weak_passes_have_a_cache_of_their_own(cache: str, layer: int) -> None:
    plain = build()
    # Where the first or the last block is bypassed, a cache that rests on these two cannot work.
    weak_cache = None if cache in WITH_ENDS and layer in (0, 4) else cache
    assert is_used(plain, cache)
    if weak_cache is not None:
        assert is_used(plain, cache, layer)
    expected = textbook(plain, cache, layer, weak_cache)
    model = cached(plain, cache)
    with stg.apply(model, [layer], SCALE):
        for NOW[0], wanted in enumerate(expected):
            assert_close(call(model, inputs(NOW[0])), wanted)


@pytest.mark.parametrize("cache", EVERY)
def test_cond_passes_are_what_they_are_without_guidance(cache: str) -> None:
    plain = build()
    alone, model, seen = cached(plain, cache), cached(plain, cache), []
    handle = model.register_forward_hook(lambda module, args, output: seen.append(output[0].clone()))
    with handle, stg.apply(model, [2], SCALE):
        for NOW[0] in range(STEPS):
            call(model, inputs(NOW[0]))
            cond, *_weak = seen
            assert torch.equal(cond, call(alone, inputs(NOW[0])))
            seen.clear()
    state = model._diffusers_hook
    for NOW[0] in range(2):  # and after the `with`
        assert torch.equal(call(model, inputs(NOW[0])), call(alone, inputs(NOW[0])))
    assert model._diffusers_hook is state


@pytest.mark.parametrize("cache", EVERY)
def test_a_second_run_starts_afresh(cache: str) -> None:
    plain = build()
    expected = textbook(plain, cache, 2, cache)
    model = cached(plain, cache)
    with stg.apply(model, [2], SCALE):
        for _ in range(2):
            for NOW[0], wanted in enumerate(expected):
                assert_close(call(model, inputs(NOW[0])), wanted)
            model._reset_stateful_cache()  # as pipelines do at the end


@pytest.mark.parametrize("cache", EVERY)
def test_guidance_in_a_part_of_the_run_computes_weak_passes_in_full(cache: str) -> None:
    """A cache that has not seen all steps counts them wrongly, and compares with steps long gone."""
    plain = build()
    cond, weak, model = cached(plain, cache), cached(plain, None, 2), cached(plain, cache)
    with stg.apply(model, [2], schedule=lambda step: {"scale": SCALE} if step.index else None) as handle:
        for NOW[0] in range(STEPS):
            handle.step = stg.Step(NOW[0], STEPS)
            got, c = call(model, inputs(NOW[0])), call(cond, inputs(NOW[0]))
            w = call(weak, inputs(NOW[0]))
            assert_close(got, c + SCALE * (c - w) if NOW[0] else c)


@pytest.mark.parametrize(
    "mode", ["attention", *(pytest.param(m, marks=pytest.mark.slow) for m in ("values", "feed-forward"))]
)
@pytest.mark.parametrize("cache", EVERY)
def test_perturbed_layers_are_computed(cache: str, mode: str) -> None:
    plain = build()
    cond, model = cached(plain, cache), cached(plain, cache)
    with stg.apply(model, [2], SCALE, mode=mode):
        for NOW[0] in range(STEPS):
            c = call(cond, inputs(NOW[0]))
            with stg.skip(plain, [2], mode=mode):
                w = plain(**inputs(NOW[0]))[0]
            assert_close(call(model, inputs(NOW[0])), c + SCALE * (c - w))


@pytest.mark.parametrize("cache", ["pyramid", pytest.param("first block", marks=pytest.mark.slow)])
def test_each_branch_has_a_cache_of_its_own(cache: str) -> None:
    plain = build()
    cond, model = cached(plain, cache), cached(plain, cache)
    weaks = [cached(plain, cache, layer) for layer in (1, 3)]
    with stg.apply(model, branches=[stg.Branch([1], 1.0), stg.Branch([3], 0.5)]):
        for NOW[0] in range(STEPS):
            c = call(cond, inputs(NOW[0]))
            one, other = (call(weak, inputs(NOW[0])) for weak in weaks)
            assert_close(call(model, inputs(NOW[0])), c + (c - one) + 0.5 * (c - other))


@pytest.mark.parametrize("cache", EVERY)
def test_rows_of_a_weak_pass_are_those_of_cond(cache: str) -> None:
    plain = build()
    cond, weak, model = cached(plain, cache), cached(plain, cache, 2), cached(plain, cache)
    with stg.apply(model, [2], SCALE, batched_cfg=True):
        for NOW[0] in range(STEPS):
            both = inputs(NOW[0], 4)
            half = {name: value[2:] if isinstance(value, Tensor) else value for name, value in both.items()}
            pair = call(cond, both)
            term = SCALE * (pair[2:] - call(weak, half))
            assert_close(call(model, both), pair + torch.cat([term, term]))


class Centred(nn.Module):
    """Lets rows influence each other: only all of them together give the prediction."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **arguments: Any) -> Tensor:
        out = call(self.model, arguments)
        return out - out.mean(0, keepdim=True)


def test_rows_that_influence_each_other() -> None:
    plain = build()
    cond, weak = Centred(cached(plain, "pyramid")), Centred(cached(plain, "pyramid", 2))
    model = Centred(cached(plain, "pyramid"))
    with stg.apply(model, ["model.blocks.2"], SCALE, batched_cfg=True):
        for NOW[0] in range(STEPS):
            both = inputs(NOW[0], 4)
            c = cond(**both)
            term = SCALE * (c - weak(**both))[2:]
            with pytest.warns(stg.StgWarning, match="cannot be cut down") if NOW[0] == 0 else nullcontext():
                got = model(**both)
            assert_close(got, c + torch.cat([term, term]))


@pytest.mark.parametrize("cache", EVERY)
def test_a_skip_does_without_the_cache(cache: str) -> None:
    plain = build()
    alone, model, weak = cached(plain, cache), cached(plain, cache), cached(plain, None, 0)
    for NOW[0] in range(STEPS):
        assert torch.equal(call(model, inputs(NOW[0])), call(alone, inputs(NOW[0])))
        with stg.skip(model, [0]):
            assert_close(call(model, inputs(NOW[0])), call(weak, inputs(NOW[0])))


@pytest.mark.parametrize("cache", EVERY)
def test_guider(cache: str) -> None:
    """It makes the uncond prediction itself: that has a cache of its own as well."""
    plain = build()
    prompts = [
        {"encoder_hidden_states": torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(s))} for s in (5, 6)
    ]
    models = [cached(plain, cache), cached(plain, cache), cached(plain, cache, 2)]
    model = cached(plain, cache)
    guider = stg.Guider(lambda **kw: call(model, kw), [2], SCALE, guidance_scale=3.0, model=model)
    for NOW[0] in range(STEPS):
        rest = {name: value for name, value in inputs(NOW[0]).items() if name != "encoder_hidden_states"}
        conditions = (prompts[0], prompts[1], prompts[0])
        c, u, w = (call(m, {**rest, **p}) for m, p in zip(models, conditions, strict=True))
        assert_close(guider(**rest, cond=prompts[0], uncond=prompts[1]), u + 3.0 * (c - u) + SCALE * (c - w))


@pytest.mark.parametrize("cache", ["first block", pytest.param("taylor", marks=pytest.mark.slow)])
def test_a_stock_pipeline_with_cond_and_uncond_calls(cache: str) -> None:
    pipe, inputs_of_call, case = pipelines.build("wan")
    layer = case.layers[0]
    depth = len(pipe.transformer.blocks)
    assert 0 < layer < depth - 1
    cond, weak = copy.deepcopy(pipe.transformer), copy.deepcopy(pipe.transformer)
    for model in (cond, weak, pipe.transformer):
        model.enable_cache(CACHES[cache]())
    weak.blocks[layer] = zoo.KeepHiddenStates()
    calls: list[tuple[str, dict[str, Any], Tensor]] = []

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not stg.Predictor.in_weak_pass():
            calls.append((context_of(module), dict(kwargs), output[0].clone()))

    for _ in range(2):
        calls.clear()
        with stg.apply(pipe, layers=[layer], scale=SCALE), ExitStack() as stack:
            # After ours, so that it sees what is guided.
            stack.enter_context(pipe.transformer.register_forward_hook(note, with_kwargs=True))
            pipelines.run(pipe, inputs_of_call, num_inference_steps=STEPS)
        assert [name for name, _, _ in calls] == ["cond", "uncond"] * STEPS
        term: Any = 0
        for name, kwargs, got in calls:
            c = call(cond, kwargs, name)
            if name == "cond":
                term = SCALE * (c - call(weak, kwargs, name))
            assert_close(got, c + term, rtol=1e-4, atol=1e-4)
        for model in (cond, weak):
            model._reset_stateful_cache()


def context_of(model: nn.Module) -> str:
    registries = (getattr(module, "_diffusers_hook", None) for module in model.modules())
    found = [hook for registry in registries if registry is not None for hook in registry.hooks.values()]
    manager = found[0].state_manager
    return str(manager.context.name if hasattr(manager, "context") else manager._current_context)  # before 0.37


# --- what cannot be combined ------------------------------------------------------------------------------------------


def test_faster_cache_that_makes_up_uncond_rows() -> None:
    model = build()
    config = CACHES["faster"]()
    config.is_guidance_distilled = False
    model.enable_cache(config)
    before = zoo.snapshot(model)
    with pytest.raises(
        stg.TargetError, match=r"uncond rows from the cond rows.*disable_cache\(\).*is_guidance_distilled"
    ):
        stg.apply(model, [2], SCALE, batched_cfg=True)
    with pytest.raises(stg.TargetError, match="FasterCache"):
        stg.skip(model, [2])
    assert zoo.snapshot(model) == before


def test_a_cache_that_nobody_knows() -> None:
    class OwnHook(hooks.ModelHook):
        _is_stateful = True

        def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self.fn_ref.original_forward(*args, **kwargs)

    model = build()
    hooks.HookRegistry.check_if_exists_or_initialize(model.blocks[1]).register_hook(OwnHook(), "own")
    with pytest.raises(stg.TargetError, match=r"OwnHook on WanTransformerBlock.*model\.disable_cache\(\)"):
        stg.Guider(model, [2], SCALE)


def test_work_is_shared_again_in_a_with_after_the_cache_is_gone() -> None:
    model = build()
    handle = stg.apply(model, [2], SCALE)
    model.enable_cache(CACHES["first block"]())
    with handle:
        call(model, inputs(0))
    saved = handle.stats.blocks_saved
    model.disable_cache()
    with handle:
        call(model, inputs(0))
    assert handle.stats.blocks_saved == saved + 3, "blocks 0 to 2"


def test_a_cache_enabled_after_apply_was_made() -> None:
    plain = build()
    model = copy.deepcopy(plain)
    handle = stg.apply(model, [2], SCALE)
    model.enable_cache(CACHES["pyramid"]())
    expected = textbook(plain, "pyramid", 2, "pyramid")
    with handle:
        for NOW[0], wanted in enumerate(expected):
            assert_close(call(model, inputs(NOW[0])), wanted)


@pytest.mark.parametrize("use", ["apply", "on uncond", "skip"])
def test_a_cache_enabled_or_disabled_inside_the_with(use: str) -> None:
    model = build()

    def session() -> Any:
        if use == "skip":
            return stg.skip(model, [2])
        return stg.apply(model, [2], **({"on": "uncond", "batched_cfg": True} if use == "on uncond" else {}))

    with session():
        call(model, inputs(0))
        model.enable_cache(CACHES["pyramid"]())
        with pytest.raises(
            stg.CallError, match=r"PyramidAttentionBroadcast on Wan.*was enabled inside the `with`.*before stg\.apply"
        ):
            call(model, inputs(1))
    if use != "on uncond":
        with session():
            call(model, inputs(0))
            model.disable_cache()
            with pytest.raises(stg.CallError, match="was disabled inside the `with`"):
                call(model, inputs(1))


def test_the_weak_model_makes_the_uncond_prediction() -> None:
    model = cached(build(), "first block")
    with pytest.raises(
        stg.SettingError, match=r"on='uncond' cannot be combined with FirstBlockCache on Wan.*on='cond'"
    ):
        stg.apply(model, [2], on="uncond", batched_cfg=True)


@pytest.mark.parametrize("execution", ["sequential", "batched"])
def test_a_way_that_caches_do_not_allow_is_told(execution: str) -> None:
    plain = build()
    expected, model = textbook(plain, "pyramid", 2, "pyramid"), cached(plain, "pyramid")
    got = []
    with warnings.catch_warnings(record=True) as told, stg.apply(model, [2], SCALE, execution=execution):
        warnings.simplefilter("always")
        for NOW[0] in range(STEPS):
            got.append(call(model, inputs(NOW[0])))
    for one, wanted in zip(got, expected, strict=True):
        assert_close(one, wanted)
    (warning,) = told
    assert re.search(rf"'{execution}': what a step cache keeps .* execution='full'", str(warning.message))
