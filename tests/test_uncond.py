"""on="uncond": the weak model makes the uncond prediction, `w(u) + g * (c - w(u))`, and no extra pass is paid."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import stg_hooks as stg
from benchmarks import measure
from tests import awkward, zoo
from tests.pipelines import build, run

exact: dict[str, Any] = {"rtol": 0, "atol": 0}
close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
pytestmark = pytest.mark.filterwarnings("error::stg_hooks.StgWarning")
X, POSITIVE = zoo.inputs().values()
NEGATIVE = zoo.inputs(seed=7)["text"]
BOTH: dict[str, Any] = {"cond": {"text": POSITIVE}, "uncond": {"text": NEGATIVE}}
G = 4.0


# --- a loop of one's own ---


def test_two_passes_and_no_more() -> None:
    model = zoo.build("plain")
    guider = stg.Guider(model, [2], on="uncond", guidance_scale=G)
    calls = zoo.calls(model, ["blocks.0", "blocks.3", "out"], lambda: guider(X, **BOTH))
    assert calls == ["blocks.0", "blocks.3", "out"] * 2


def test_rule_and_rescale_take_the_weak_prediction_for_uncond() -> None:
    model = zoo.build("plain")
    c, wu = model(X, POSITIVE), zoo.without(model, ["blocks.2"])(X, NEGATIVE)
    guider = stg.Guider(model, [2], on="uncond", guidance_scale=G, rule="zero_star", rescale=0.7)
    assert_close(guider(X, **BOTH), stg.combine(c, [], wu, guidance_scale=G, rule="zero_star", rescale=0.7), **close)


@pytest.mark.parametrize(("g", "arguments"), [(1.0, BOTH), (G, {"cond": BOTH["cond"]})])
def test_a_guider_without_an_uncond_prediction(g: float, arguments: dict[str, Any]) -> None:
    guider = stg.Guider(zoo.build("plain"), [2], on="uncond", guidance_scale=g)
    with pytest.raises(stg.CallError, match=r"on='uncond' needs an uncond prediction, and there is none in this call"):
        guider(X, **arguments)


# --- rows [uncond, cond] of a module ---


@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize("name", ["plain", "expression", "image_text", "unet", "nones", "two_stacks"])
def test_rows_of_a_module(name: str, pairs: int) -> None:
    model, layer = zoo.build(name), zoo.ZOO[name].numbered[-1]
    inputs = zoo.inputs(2 * pairs)
    plain, weak = model(**inputs), zoo.without(model, [layer])(**inputs)
    with stg.apply(model, [-1], on="uncond", batched_cfg=True) as applied:
        got = model(**inputs)
    assert_close(got, torch.cat([weak[:pairs], plain[pairs:]]), **close)
    assert (applied.stats.guided_calls, applied.stats.weak_passes) == (1, 0)
    assert_close(model(**inputs), plain, **exact)


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_rows_of_every_family(name: str) -> None:
    family = zoo.FAMILIES[name]
    model, layer, inputs = family.build(), family.skips[0], family.inputs(4)
    plain, weak = model(**inputs)[0], family.without(model, layer)(**inputs)[0]
    with stg.apply(model, [layer], on="uncond", batched_cfg=True):
        got = model(**inputs)[0]
    assert_close(got, torch.cat([weak[:2], plain[2:]]), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain[:2], weak[:2], rtol=1e-3, atol=1e-3)


class PartlyInPlaceBlock(zoo.Block):
    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x += self.attn(x)
        x = x + self.cross(x, text)
        return x + F.gelu(self.ff(x))


class KeepThree(nn.Module):
    def forward(self, image: Tensor, text: Tensor, table: Tensor) -> Any:
        return image, text, table


class HandingOnBlock(zoo.TwoStreamBlock):
    """Writes its results into both arguments, and hands on a table that has no rows."""

    identity = KeepThree

    def forward(self, image: Tensor, text: Tensor, table: Tensor) -> Any:
        for stream, result in zip((image, text), self.mix(image + table.mean(), text), strict=True):
            stream.copy_(result)
        return image, text, table


class HandingOn(zoo.TwoStream):
    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x, text, table = x.clone(), text.clone(), torch.linspace(0, 1, 12).reshape(4, 3)
        for block in self.blocks:
            x, text, table = block(x, text, table)
        return self.out(x + text.mean(1, keepdim=True))


IN_PLACE: dict[str, Callable[[], nn.Module]] = {
    **{name: functools.partial(awkward.build, name) for name in awkward._INPLACE_ROOTS if name != "list"},
    "partly": lambda: zoo.DiT(PartlyInPlaceBlock),
    "handing_on": lambda: HandingOn(HandingOnBlock, text_first=False),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", IN_PLACE)
def test_rows_of_blocks_that_write_into_their_arguments(name: str, inference: bool) -> None:
    torch.manual_seed(0)
    model, inputs = IN_PLACE[name]().eval(), zoo.inputs(4)
    with torch.inference_mode() if inference else torch.no_grad():
        plain, weak = model(**inputs), zoo.without(model, ["blocks.2"])(**inputs)
        with stg.apply(model, ["blocks.2"], on="uncond", batched_cfg=True, strict=True):
            for _ in range(2):
                assert_close(model(**inputs), torch.cat([weak[:2], plain[2:]]), **close)
    assert not torch.allclose(plain[:2], weak[:2], rtol=1e-3, atol=1e-3)


class FramesFirst(zoo.DiT):
    """Blocks see every token pair as a frame of its own; the frames come first, then the rows."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        frames = self.embed(x)[:, :4].unflatten(1, (2, 2))
        hidden, text = frames.transpose(0, 1).flatten(0, 1), text.repeat(2, 1, 1)
        for block in self.blocks:
            hidden = block(hidden, text)
        return self.out(hidden.unflatten(0, (2, len(x))).transpose(0, 1).flatten(1, 2))


@pytest.mark.parametrize("make", [FramesFirst, functools.partial(awkward.build, "list")])
def test_rows_that_blocks_do_not_keep_apart(make: Callable[[], nn.Module]) -> None:
    """Each half is a call of its own, so it does not matter."""
    torch.manual_seed(0)
    model = make().eval().requires_grad_(False)
    plain_model, weak_model = copy.deepcopy(model), zoo.without(model, ["blocks.2"])
    with stg.apply(model, ["blocks.2"], on="uncond", batched_cfg=True) as applied:
        for seed in range(3):
            inputs = zoo.inputs(4, seed)
            plain, weak = plain_model(**inputs), weak_model(**inputs)
            assert_close(model(**inputs), torch.cat([weak[:2], plain[2:]]), **close)
            assert not torch.allclose(plain[:2], weak[:2], rtol=1e-3, atol=1e-3)
    assert (applied.stats.guided_calls, applied.stats.weak_passes) == (3, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["in_place", "silent"])
def test_rows_of_a_compiled_model_whose_blocks_write_into_their_arguments(name: str) -> None:
    model, inputs = awkward.build(name), zoo.inputs(4)
    plain, weak = model(**inputs), zoo.without(model, ["blocks.2"])(**inputs)
    model.compile(backend="eager")
    with stg.apply(model, ["blocks.2"], on="uncond", batched_cfg=True):
        for _ in range(2):
            assert_close(model(**inputs), torch.cat([weak[:2], plain[2:]]), **close)


def test_halves_are_compared_once_for_each_layout() -> None:
    model = zoo.build("plain")
    with stg.apply(model, [2], on="uncond", batched_cfg=True) as applied:
        for batch, passes in ((2, 4), (2, 2), (4, 4), (2, 2)):
            inputs = zoo.inputs(batch)
            assert zoo.calls(model, ["out"], functools.partial(model, **inputs)) == ["out"] * passes
    assert (applied.stats.guided_calls, applied.stats.weak_passes) == (4, 0)


def test_two_halves_cost_what_the_plain_call_costs_less_the_skipped_block() -> None:
    model, inputs = zoo.build("plain"), zoo.inputs(4)
    plain = measure.flops(lambda: model(**inputs))
    block = plain - measure.flops(lambda: zoo.without(model, ["blocks.2"])(**inputs))
    with stg.apply(model, [2], on="uncond", batched_cfg=True):
        model(**inputs)
        assert measure.flops(lambda: model(**inputs)) == plain - block // 2


def test_rows_of_a_model_that_counts_its_calls() -> None:
    """Both predictions begin with what was kept, and the weak one leaves nothing behind."""
    model, kept = awkward.build("counting"), awkward.build("counting")
    with stg.apply(model, [2], on="uncond", batched_cfg=True):
        for seed in range(4):
            inputs = zoo.inputs(2, seed)
            weak = zoo.without(kept, ["blocks.2"])(**inputs)
            plain = kept(**inputs)
            assert_close(model(**inputs), torch.cat([weak[:1], plain[1:]]), **close)


def test_rows_that_influence_each_other() -> None:
    """Two samples of five tokens, in a model that takes the samples for tokens: both models predict all rows."""

    class SequenceFirst(zoo.DiT):
        def forward(self, x: Tensor, text: Tensor) -> Tensor:
            return super().forward(x.transpose(0, 1), text.transpose(0, 1)).transpose(0, 1)

    torch.manual_seed(0)
    model, x = SequenceFirst().eval().requires_grad_(False), torch.randn(2, 5, 8)
    plain, weak = model(x, x), zoo.without(model, ["blocks.2"])(x, x)
    with stg.apply(model, [2], on="uncond", batched_cfg=True):
        with pytest.warns(stg.StgWarning, match="cannot be cut down"):
            first = model(x, x)
        for got in (first, model(x, x)):
            assert_close(got, torch.cat([weak[:1], plain[1:]]), **close)


# --- pipelines ---


def test_a_pipeline_without_cfg_says_so() -> None:
    pipe, call, case = build("ltx")
    with pytest.warns(stg.StgWarning, match="guided nothing"), stg.apply(pipe, case.layers, on="uncond"):
        run(pipe, call, guidance_scale=1.0)


# --- what it refuses ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"on": "uncond", "rescale": 0.7}, r"rescale=0\.7 cannot be combined with on='uncond' here: use stg\.Guider"),
        ({"on": "uncond", "rule": "apg"}, r"rule='apg' cannot be combined with on='uncond' here"),
        ({"on": "uncond", "batched_cfg": False}, "needs to know which rows are unconditional: pass batched_cfg=True"),
    ],
)
def test_settings_without_a_meaning(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(stg.SettingError, match=message):
        stg.apply(zoo.DiT(), [2], **{"batched_cfg": True, **arguments})


# --- what skipped layers do instead ---


@pytest.mark.parametrize("mode", ["attention", "values", "feed-forward", "smoothed"])
@pytest.mark.parametrize("family", ["ltx", "cogvideox", "mochi"])
def test_modes_on_rows(family: str, mode: str) -> None:
    model, inputs = zoo.FAMILIES[family].build(), zoo.FAMILIES[family].inputs(4)
    plain = model(**inputs)[0]
    with stg.skip(model, [1], mode=mode):
        weak = model(**inputs)[0]
    with stg.apply(model, [1], mode=mode, on="uncond", batched_cfg=True) as applied:
        got = model(**inputs)[0]
    assert_close(got, torch.cat([weak[:2], plain[2:]]), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain[:2], weak[:2], rtol=1e-3, atol=1e-3)
    assert applied.stats.guided_calls == 1
    assert_close(model(**inputs)[0], plain, **exact)
