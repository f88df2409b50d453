"""Guidance of stock diffusers pipelines, against a reference that knows by hand which rows of which call are cond."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import stg_hooks as stg
from tests import pipeline_table, zoo
from tests.installed import from_diffusers
from tests.stock_pipelines import STOCK, Stock, StopHereError, received, run
from tests.test_pipelines import assert_far, assert_same

pytestmark = [
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
    pytest.mark.filterwarnings("error::stg_hooks.StgWarning"),
    # Of one whose own guidance is on by default, where it is asked for beside ours.
    pytest.mark.filterwarnings("ignore:LTX2Pipeline skips layers by itself"),
]


@dataclasses.dataclass
class Call:
    """One call of a denoiser, and what it returned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: list[Tensor]


def tensors(output: Any) -> list[Tensor]:
    """Return the predictions in what a denoiser of diffusers returns."""
    if isinstance(output, Tensor):
        return [output]
    values = output if isinstance(output, tuple) else output.to_tuple()
    return list(values[0]) if isinstance(values[0], list) else list(values)


class Run:
    """A pipeline with one of its calls: with CFG, or without."""

    def __init__(self, stock: Stock, pipe: Any, cfg: bool) -> None:
        self.stock, self.pipe, self.cfg = stock, pipe, cfg
        self.call = {**stock.call(), **({} if cfg else stock.off or {})}
        self.denoiser: nn.Module = getattr(pipe, stock.denoiser)
        if not cfg:
            for name, part in stock.off_parts.items():
                setattr(pipe, name, part)

    def whole(self) -> Tensor:
        return run(self.pipe, self.call)

    def prediction(self) -> Tensor:
        """Return what the scheduler is given in the first step."""
        with received(self.pipe, self.stock.received) as inputs, suppress(StopHereError):
            self.whole()
        return inputs[self.stock.received]

    def observed(self) -> tuple[Tensor, list[Call]]:
        """Return what the scheduler is given in the first step, and the calls of the denoiser before it."""
        calls: list[Call] = []

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls.append(Call(args, kwargs, tensors(output)))

        with self.denoiser.register_forward_hook(note, with_kwargs=True):
            return self.prediction(), calls

    def term(self, calls: list[Call], weak: nn.Module) -> list[Tensor]:
        """Compute `cond - weak` of the first step, of the rows that the table names, without cutting the call."""
        with torch.no_grad():
            weaks = tensors(weak(*calls[0].args, **calls[0].kwargs))
        terms = [cond - weak for cond, weak in zip(calls[0].output, weaks, strict=True)]
        if self.cfg and self.stock.rows == "uncond+cond":
            terms = [term.chunk(2)[1] for term in terms]
        if self.cfg and self.stock.rows == "cond+uncond":
            terms = terms[: len(terms) // 2]
        if self.stock.channels is not None:
            for term in terms:
                term[:, self.stock.channels :] = 0.0
        return terms

    def with_added(self, terms: list[Tensor]) -> Tensor:
        """Return the scheduler's input, had the denoiser predicted so much more. For runs without CFG."""

        def add(_: nn.Module, args: Any, output: Any) -> Any:
            values = [value + term for value, term in zip(tensors(output), terms, strict=True)]
            if isinstance(output, Tensor):
                return values[0]
            if isinstance(output, tuple):
                return (values,) if isinstance(output[0], list) else tuple(values)
            return type(output)(*values)

        with self.denoiser.register_forward_hook(add):
            return self.prediction()

    def guided(self, scale: float, result: Callable[[], Tensor]) -> Tensor:
        with stg.apply(self.pipe, layers=[self.stock.layer], scale=scale):
            return result()


all_stock = pytest.mark.parametrize("name", STOCK)


@all_stock
def test_pipeline_is_guided_as_by_hand(name: str) -> None:
    stock = STOCK[name]
    pipe = stock.build()
    on = Run(stock, pipe, cfg=True)
    weak = zoo.without(on.denoiser, [stock.layer], stock.identity)
    latents = on.whole()
    before = zoo.snapshot(on.denoiser), set(vars(pipe))

    plain, calls = on.observed()
    assert len(calls) == (2 if stock.rows == "cond, uncond" else 1) + stock.own_calls
    terms = on.term(calls, weak)
    once = on.guided(1.0, on.prediction)
    assert_far(once, plain)
    if stock.normalised is None:
        assert_same(on.guided(2.0, on.prediction) - plain, 2 * (once - plain))
    assert torch.equal(on.guided(0.0, on.whole), latents)
    assert (zoo.snapshot(on.denoiser), set(vars(pipe))) == before

    off = Run(stock, pipe, cfg=False)
    plain_off, calls_off = off.observed()
    assert len(calls_off) == 1
    if stock.rows == "uncond+cond":
        assert calls[0].output[0].shape[0] == 2 * calls_off[0].output[0].shape[0]
    if stock.rows == "cond+uncond":
        assert len(calls[0].output) == 2 * len(calls_off[0].output)
    assert_same(off.guided(1.0, off.prediction), off.with_added(off.term(calls_off, weak)))

    if stock.normalised is not None:
        cond, uncond = (call.output[0] for call in calls)
        combined = uncond + 3.0 * (cond - uncond)
        expected = stock.normalised(cond + terms[0], combined + terms[0])
        assert_same(once.abs(), expected.abs())  # Lumina2 changes the sign
    else:
        # Without CFG, what the pipeline does to a prediction before the scheduler gets it is affine.
        assert_same(once, plain + off.with_added(terms) - plain_off)


REFUSED = {
    "StableDiffusionSAGPipeline": "it makes 3 different calls",
    "StableDiffusionAttendAndExcitePipeline": "it looks into its denoiser after a call",
    "StableDiffusionPix2PixZeroPipeline": "does not say which half is which",
}


@pytest.mark.parametrize("name", REFUSED)
def test_pipeline_whose_rows_are_others_is_refused(name: str) -> None:
    cls = from_diffusers(name)
    pipe = cls.__new__(cls)  # of its parts, only the denoiser is looked at
    denoiser = zoo.build("plain")
    vars(pipe).update(dict.fromkeys(pipeline_table.denoisers(cls), denoiser))
    with pytest.raises(stg.TargetError, match=REFUSED[name]):
        stg.apply(pipe, layers=[1])


@pytest.mark.parametrize("cfg", [True, False])
def test_lists_of_samples_are_rescaled_each_by_itself(cfg: bool) -> None:
    stock = STOCK["ZImagePipeline"]
    one = Run(stock, stock.build(), cfg)
    _, calls = one.observed()
    terms = one.term(calls, zoo.without(one.denoiser, [stock.layer], stock.identity))
    conds, unconds = calls[0].output[: len(terms)], calls[0].output[len(terms) :]
    expected = []
    for i, (cond, term) in enumerate(zip(conds, terms, strict=True)):
        # Z-Image's weight counts from cond: cond + 3 * (cond - uncond).
        out = cond + term + (3.0 * (cond - unconds[i]) if cfg else 0.0)
        expected.append(-out * (0.7 * cond.std() / out.std() + 0.3))
    with stg.apply(one.pipe, layers=[stock.layer], rescale=0.7):
        assert_same(one.prediction(), torch.stack(expected).squeeze(2))


def test_a_guider_that_asks_for_one_call_only_has_no_weight_to_tell() -> None:
    """HunyuanVideo 1.5, MotifVideo: a guider names calls at run time, and its weight is not read."""
    (name,) = (name for name, stock in STOCK.items() if stock.pipeline == "HunyuanVideo15Pipeline")
    stock = STOCK[name]
    pipe = stock.build()
    one = Run(stock, pipe, cfg=False)
    for guider in (diffusers.ClassifierFreeGuidance(enabled=False), diffusers.ClassifierFreeGuidance(1.0)):
        pipe.guider = guider
        plain, calls = one.observed()
        assert len(calls) == 1
        (term,) = one.term(calls, zoo.without(one.denoiser, [stock.layer], stock.identity))
        cond = calls[0].output[0]
        out = cond + 2.0 * term
        final = out * (0.7 * cond.std() / out.std() + 0.3)
        expected = one.with_added([final - cond])
        assert_far(expected, plain)
        with stg.apply(pipe, layers=[stock.layer], scale=2.0, rescale=0.7):
            assert_same(one.prediction(), expected)
    pipe.guider = diffusers.ClassifierFreeGuidance(3.0)
    with (
        pytest.raises(stg.CallError, match="needs the CFG weight"),
        stg.apply(pipe, layers=[stock.layer], rescale=0.7),
    ):
        one.whole()


def test_lists_of_samples_are_not_cut_for_uncond_alone() -> None:
    stock = STOCK["ZImagePipeline"]
    one = Run(stock, stock.build(), cfg=True)
    with (
        pytest.raises(stg.CallError, match="on='uncond' cannot be used where cond and uncond"),
        stg.apply(one.pipe, layers=[stock.layer], on="uncond"),
    ):
        one.whole()
