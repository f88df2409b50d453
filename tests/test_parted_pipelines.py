"""Guidance of pipelines whose calls have other rows than [uncond, cond], against weak predictions made by hand."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

import stg_hooks as stg
from tests import zoo
from tests.parted_pipelines import PARTED, SLOW, Parted
from tests.stock_pipelines import StopHereError, received, run
from tests.test_pipelines import assert_far, assert_same
from tests.test_stock_pipelines import tensors

pytestmark = [pytest.mark.filterwarnings("error::stg_hooks.StgWarning")]


def prediction(pipe: Any, call: dict[str, Any]) -> Tensor:
    """Return what the scheduler is given in the first step; leave the attention processors as they were."""
    modules = [module for part in pipe.components.values() if isinstance(part, nn.Module) for module in part.modules()]
    processors = [(module, module.processor) for module in modules if hasattr(module, "processor")]
    with received(pipe, 0) as inputs, suppress(StopHereError):
        run(pipe, call)
    for module, processor in processors:
        module.processor = processor
    return inputs[0]


def observed(
    pipe: Any, denoiser: nn.Module, call: dict[str, Any], weak: nn.Module
) -> tuple[Tensor, list[list[Tensor]]]:
    """Return what the scheduler is given, and `cond - weak` of all rows of each call before it, without cutting it."""
    terms: list[list[Tensor]] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        names = dict(denoiser.named_modules())
        for name, module in weak.named_modules():  # processors that the pipeline has installed
            if hasattr(module, "processor"):
                module.processor = names[name].processor
        pairs = zip(tensors(output), tensors(weak(*args, **kwargs)), strict=True)
        terms.append([one - other for one, other in pairs])

    with denoiser.register_forward_hook(note, with_kwargs=True):
        return prediction(pipe, call), terms


def of_cond(term: Tensor, rows: str) -> Tensor:
    """Return the rows that are cond; the last ones, which the scheduler gets, if there are several."""
    parts = rows.split("+")
    return term.chunk(len(parts))[len(parts) - 1 - parts[::-1].index("cond")]


def check(parted: Parted, pipe: Any, call: dict[str, Any], rows: tuple[str, ...]) -> None:
    denoiser = getattr(pipe, parted.denoiser)
    weak = zoo.without(denoiser, [parted.layer], parted.identity)
    latents, before = run(pipe, call), zoo.snapshot(denoiser)
    plain, terms = observed(pipe, denoiser, call, weak)
    assert len(terms) == len(rows)
    term = parted.received(of_cond(terms[0][0], rows[0]))
    with stg.apply(pipe, layers=[parted.layer], scale=0.7) as applied:
        guided = prediction(pipe, call)
    assert applied.stats.weak_passes == 1
    assert_far(guided, plain)
    assert_same(guided, plain + 0.7 * torch.cat([term] * (len(plain) // len(term))))
    with stg.apply(pipe, layers=[parted.layer], scale=0.0):
        assert torch.equal(run(pipe, call), latents)
    assert zoo.snapshot(denoiser) == before


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in PARTED])
def test_pipeline_is_guided_as_by_hand(name: str) -> None:
    parted = PARTED[name]
    pipe = parted.build()
    check(parted, pipe, parted.call, parted.rows)
    if parted.off is not None:
        check(parted, pipe, {**parted.call, **parted.off}, parted.off_rows)


class OursError(Exception):
    pass


def failing(step: stg.Step) -> Any:
    raise OursError


@pytest.mark.parametrize("of_module", [False, True])
def test_an_error_of_ours_puts_attention_processors_back(of_module: bool) -> None:
    parted = PARTED["StableDiffusionPAGPipeline"]
    pipe = parted.build()
    off = {**parted.call, "pag_scale": 0.0}
    plain, before = run(pipe, off), dict(pipe.unet.attn_processors)
    target = pipe.unet if of_module else pipe
    with stg.apply(target, layers=[parted.layer], schedule=failing), pytest.raises(OursError):
        run(pipe, parted.call)
    assert pipe.unet.attn_processors == before
    assert torch.equal(run(pipe, off), plain)


def test_processors_that_were_set_inside_the_with_stay() -> None:
    parted = PARTED["StableDiffusionPAGPipeline"]
    pipe = parted.build()
    with stg.apply(pipe, layers=[parted.layer], schedule=failing):
        pipe.unet.set_attn_processor(AttnProcessor())
        before = dict(pipe.unet.attn_processors)
        with pytest.raises(OursError):
            run(pipe, parted.call)
        assert pipe.unet.attn_processors == before


class Combined(diffusers.DiffusionPipeline):
    """Leaves all calls to a pipeline inside it, as Kandinsky's combined ones do."""

    def __init__(self, unet: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.decoder_pipe = PARTED["StableDiffusionPAGPipeline"].build()
        self.decoder_pipe.unet = unet
        self.decoder_pipe.scheduler = scheduler

    def __call__(self, **kwargs: Any) -> Any:
        return self.decoder_pipe(**kwargs)


def test_a_pipeline_that_only_calls_another_is_guided() -> None:
    parted = PARTED["StableDiffusionPAGPipeline"]
    inner = parted.build()
    pipe = Combined(inner.unet, inner.scheduler)
    with stg.apply(inner, layers=[parted.layer], scale=0.7):
        expected = run(inner, parted.call)
    with stg.apply(pipe, layers=[parted.layer], scale=0.7) as applied:
        assert torch.equal(run(pipe, parted.call), expected)
    assert applied.stats.weak_passes == 2
    assert_far(expected, run(inner, parted.call))


@pytest.mark.parametrize(
    ("said", "is_right"),
    [
        ({"rows": "cond+uncond"}, True),
        ({"rows": "uncond+cond"}, False),
        ({"batched_cfg": True}, False),
        ({"rows": [0]}, False),
        ({}, True),
    ],
    ids=str,
)
def test_what_is_said_of_a_module_agrees_with_the_pipeline_that_calls_it(said: dict[str, Any], is_right: bool) -> None:
    parted = PARTED["LuminaPipeline"]
    pipe = parted.build()
    plain = run(pipe, parted.call)
    if not is_right:
        guidance = stg.apply(pipe.transformer, layers=[parted.layer], scale=0.7, **said)
        with pytest.raises(stg.CallError, match=r"says .*, but LuminaPipeline, which makes it, predicts"), guidance:
            run(pipe, parted.call)
        assert torch.equal(run(pipe, parted.call), plain)
        return
    with stg.apply(pipe, layers=[parted.layer], scale=0.7):
        expected = run(pipe, parted.call)
    with stg.apply(pipe.transformer, layers=[parted.layer], scale=0.7, **said):
        assert torch.equal(run(pipe, parted.call), expected)
