"""Denoisers that predict several things, video and audio above all: settings for each, and streams kept apart."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import stg_hooks as stg
from stg_hooks.adapters import OUTPUTS, PUBLISHED
from tests import recipes, stock_pipelines, zoo
from tests.installed import from_diffusers
from tests.modular import MODULAR
from tests.tiny_models import MODELS

close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
exact: dict[str, Any] = {"rtol": 0, "atol": 0}
LTX_2 = "LTX2VideoTransformer3DModel"


# --- models of two streams, written by hand ---------------------------------------------------------------------------


class Half(zoo.Block):
    """What a block does to one of its streams by itself."""


class Pair(nn.Module):
    """A block of two streams that attend to each other; nothing in its names says which attention that is."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = Half(), Half()
        self.left, self.right = zoo.Attention(), zoo.Attention()

    def both(self, a: Tensor, b: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.one(a, text), self.other(b, text)
        a = a + 0.5 * self.left(a, b)
        b = b + 0.5 * self.right(b, a)  # which knows of b already
        return a, b

    def forward(self, a: Tensor, b: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.both(a, b, text)
        return a, b


@dataclasses.dataclass(frozen=True)
class Stream:
    x: Tensor
    context: Tensor
    level: Tensor


class PairOfObjects(Pair):
    """Takes and returns a frozen dataclass for each stream, as LTX-2's own blocks do."""

    def forward(self, a: Stream, b: Stream) -> tuple[Stream, Stream]:  # type: ignore[override]
        x, y = self.both(a.x * a.level, b.x * b.level, a.context)
        return dataclasses.replace(a, x=x), dataclasses.replace(b, x=y)


class PairInPlace(Pair):
    """Writes into its streams, which come in a tuple, as ComfyUI's blocks do."""

    def forward(self, streams: tuple[Tensor, Tensor], text: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        a, b = streams
        x, y = self.both(a, b, text)
        a.copy_(x)
        b.copy_(y)
        return a, b


class Duet(nn.Module):
    """Predicts two things."""

    def __init__(self, block: type[Pair] = Pair, form: Callable[[Tensor, Tensor], Any] = lambda a, b: (a, b)) -> None:
        super().__init__()
        self.blocks, self.form = nn.ModuleList(block() for _ in range(3)), form

    def forward(self, a: Tensor, b: Tensor, text: Tensor) -> Any:
        for block in self.blocks:
            if isinstance(block, PairOfObjects):
                level = torch.full((len(a), 1, zoo.DIM), 0.9)
                one, other = block(Stream(a, text, level), Stream(b, text, level))
                a, b = one.x, other.x
            elif isinstance(block, PairInPlace):
                a, b = block((a.clone(), b.clone()), text)
            else:
                a, b = block(a, b, text)
        return self.form(a, b)


class Zero(nn.Module):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return torch.zeros_like(x)


class KeepPair(nn.Module):
    def forward(self, a: Tensor, b: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return a, b


def build(block: type[Pair] = Pair, form: Callable[[Tensor, Tensor], Any] = lambda a, b: (a, b)) -> Duet:
    torch.manual_seed(0)
    return Duet(block, form).eval().requires_grad_(False)


def apart(model: nn.Module, *names: str) -> nn.Module:
    """Copy a model, and let attention in it give nothing."""
    model = copy.deepcopy(model)
    for name, _ in list(model.named_modules()):
        if name.rpartition(".")[2] in names:
            model.set_submodule(name, Zero())
    return model


def without(model: nn.Module, *blocks: int) -> nn.Module:
    model = copy.deepcopy(model)
    for block in blocks:
        model.set_submodule(f"blocks.{block}", KeepPair())
    return model


def inputs(seed: int = 1) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    a, b, c, u = (torch.randn(2, tokens, zoo.DIM, generator=random) for tokens in (5, 4, 3, 3))
    return a, b, {"text": c}, {"text": u}


def guided(
    c: Tensor, u: Tensor | None, weaks: list[tuple[float, Tensor]], g: float = 1.0, rescale: float = 0.0
) -> Tensor:
    """The formula."""
    out = c + sum(scale * (c - weak) for scale, weak in weaks)
    out = out if u is None else out + (g - 1) * (c - u)
    dims = tuple(range(1, c.ndim))
    factor = c.std(dims, keepdim=True) / out.std(dims, keepdim=True)
    return out * (rescale * factor + 1 - rescale)


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OUTPUTS, "Duet", ("video", "audio"))


# --- settings by the name of a prediction -----------------------------------------------------------------------------

SCALE, RESCALE, CFG = {"video": 1.5, "audio": 0.5}, {"video": 0.7, "audio": 0.2}, {"video": 3.0, "audio": 7.0}


@dataclasses.dataclass
class Both:
    video: Tensor
    audio: Tensor


def parts_of(output: Any) -> list[Tensor]:
    if isinstance(output, tuple):
        return [*output]
    return [*(output if isinstance(output, dict) else vars(output)).values()]


@pytest.mark.parametrize(
    ("form", "is_stated"),
    [
        (lambda a, b: (a, b), True),
        (lambda a, b: {"sample": a, "rest": b}, True),
        (lambda a, b: {"video": a, "audio": b}, False),
        (Both, False),
    ],
    ids=["stated", "stated, for a dictionary", "by keys", "by attributes"],
)
def test_each_prediction_has_its_own_weights(form: Any, is_stated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if is_stated:
        monkeypatch.setitem(OUTPUTS, "Duet", ("video", "audio"))
    model, (a, b, cond, uncond) = build(), inputs()
    c, u, w = model(a, b, **cond), model(a, b, **uncond), without(model, 1)(a, b, **cond)
    model.form = form
    guider = stg.Guider(model, [1], SCALE, guidance_scale=CFG, rescale=RESCALE)
    got = parts_of(guider(a, b, cond=cond, uncond=uncond))
    expected = [guided(c[0], u[0], [(1.5, w[0])], 3.0, 0.7), guided(c[1], u[1], [(0.5, w[1])], 7.0, 0.2)]
    assert_close(got, expected, **close)


def test_what_is_not_named_is_off(named: None) -> None:
    model, (a, b, cond, _) = build(), inputs()
    c, w = model(a, b, **cond), without(model, 1)(a, b, **cond)
    with stg.apply(model, [1], {"video": 1.5}, rescale={"video": 0.7}, batched_cfg=False) as applied:
        got = model(a, b, **cond)
    assert_close([*got], [guided(c[0], None, [(1.5, w[0])], rescale=0.7), c[1]], **close)
    assert applied.stats.weak_passes == 1
    with stg.apply(model, [1], {"video": 0.0, "audio": 0.0}, batched_cfg=False) as applied:
        assert_close([*model(a, b, **cond)], [*c], **exact)
    assert applied.stats.weak_passes == 0


def test_a_module_with_rows_for_both(named: None) -> None:
    model, (a, b, cond, uncond) = build(), inputs()
    c, u, w = model(a, b, **cond), model(a, b, **uncond), without(model, 1)(a, b, **cond)
    rows = {"text": torch.cat([uncond["text"], cond["text"]])}
    with stg.apply(model, [1], SCALE, rescale=RESCALE, batched_cfg=True, guidance_scale=CFG):
        got = model(torch.cat([a, a]), torch.cat([b, b]), **rows)
    expected = [guided(c[0], u[0], [(1.5, w[0])], 3.0, 0.7), guided(c[1], u[1], [(0.5, w[1])], 7.0, 0.2)]
    for one, other, g in zip(got, expected, (3.0, 7.0), strict=True):
        first, second = one.chunk(2)
        assert_close(first + g * (second - first), other, **close)


def test_layers_for_each(named: None) -> None:
    model, (a, b, cond, _) = build(), inputs()
    c, first, second = model(a, b, **cond), without(model, 1)(a, b, **cond), without(model, 2)(a, b, **cond)
    guider = stg.Guider(model, {"video": [1], "audio": [2]}, SCALE)
    got = guider(a, b, **cond)
    expected = [guided(c[0], None, [(1.5, first[0])]), guided(c[1], None, [(0.5, second[1])])]
    assert_close([*got], expected, **close)
    assert guider.stats.weak_passes == 2
    shared = stg.Guider(model, {"video": [1], "audio": [1]}, 0.5)
    got = shared(a, b, **cond)
    assert_close([*got], [guided(c[i], None, [(0.5, first[i])]) for i in range(2)], **close)
    assert shared.stats.weak_passes == 1
    only = stg.Guider(model, {"video": [1], "audio": []}, 0.5)
    assert_close([*only(a, b, **cond)], [guided(c[0], None, [(0.5, first[0])]), c[1]], **close)


def test_they_change_during_a_run(named: None) -> None:
    model, (a, b, cond, _) = build(), inputs()
    c, w = model(a, b, **cond), without(model, 1)(a, b, **cond)
    guider = stg.Guider(model, [1], lambda step: {"audio": float(step.index)})
    for index in range(3):
        guider.step = stg.Step(index=index, count=3)
        assert_close([*guider(a, b, **cond)], [c[0], guided(c[1], None, [(index, w[1])])], **close)


def test_they_travel(named: None) -> None:
    branches = [
        stg.Branch({"video": [1], "audio": [2]}, SCALE, "values"),
        stg.Branch(scale={"video": 2.0}, mode="isolated"),
    ]
    model, (a, b, cond, _) = build(), inputs()
    guider = stg.Guider(model, branches=branches, rescale=RESCALE, guidance_scale=CFG)
    saved = json.loads(json.dumps(guider.to_dict()))
    assert saved["branches"][1] == {"layers": None, "scale": {"video": 2.0}, "mode": "isolated", "kind": None}
    again = stg.Guider(model, **saved)
    assert again.to_dict() == guider.to_dict()
    assert_close([*again(a, b, **cond)], [*guider(a, b, **cond)], **exact)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"scale": {"vidio": 1.0}}, r"scale=\{'vidio': 1.0\}: Duet predicts video, audio.*Did you mean 'video'"),
        ({"rescale": {"sound": 0.5}}, r"rescale=\{'sound': 0.5\}: Duet predicts video, audio"),
        ({"guidance_scale": {"sound": 0.5}}, r"guidance_scale=\{'sound': 0.5\}: Duet predicts video, audio"),
        ({"layers": {"sound": [1]}}, r"layers=\{'sound': \[1\]\}: Duet predicts video, audio"),
        ({"scale": {"video": "a"}}, r"scale='a': expected a number"),
        ({"scale": {}}, r"scale=\{\}: expected names of predictions"),
        ({"scale": {0: 1.0}}, r"scale=\{0: 1.0\}: expected names of predictions"),
        ({"rescale": {"video": 2.0}}, r"rescale=2.0: expected a number from 0.0"),
        ({"scale": (1.0, 0.5)}, r"scale=\(1.0, 0.5\): expected a number, not tuple"),
    ],
)
def test_mistakes_are_told_before_a_run(settings: dict[str, Any], told: str, named: None) -> None:
    with pytest.raises(stg.SettingError, match=told):
        stg.Guider(build(), **{"layers": [1], **settings})


def test_predictions_without_names() -> None:
    model, (a, b, cond, _) = build(), inputs()
    with pytest.raises(stg.SettingError, match="nothing names the predictions of Duet") as error:
        stg.Guider(model, [1], {"video": 1.0, "audio": 0.5})(a, b, **cond)
    try:
        exec("\n".join(line.strip() for line in str(error.value).splitlines()[1:]), {})
        c, w = model(a, b, **cond), without(model, 1)(a, b, **cond)
        got = stg.Guider(model, [1], {"video": 1.0, "audio": 0.5})(a, b, **cond)
        expected = [guided(c[i], None, [(scale, w[i])]) for i, scale in enumerate((1.0, 0.5))]
        assert_close([*got], expected, **close)
    finally:
        OUTPUTS.pop("Duet", None)


def test_one_prediction_has_no_names() -> None:
    model, (a, b, cond, _) = build(form=lambda a, b: a), inputs()
    with pytest.raises(stg.SettingError, match="nothing names the predictions of Duet"):
        stg.Guider(model, [1], {"video": 1.0})(a, b, **cond)
    with pytest.raises(stg.SettingError, match=r"rescale=\{'a': 0.5\}: expected a number"):
        stg.combine(a, a, rescale={"a": 0.5})  # type: ignore[arg-type]


# --- streams kept apart -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [Pair, PairOfObjects, PairInPlace])
def test_isolated_streams_do_not_attend_to_each_other(block: type[Pair]) -> None:
    model, (a, b, cond, _) = build(block), inputs()
    plain, before = model(a, b, **cond), zoo.snapshot(model)
    expected = apart(model, "left", "right")(a, b, **cond)
    for _ in range(2):  # found, and known
        with stg.skip(model, mode="isolated") as skipped:
            assert_close([*model(a, b, **cond)], [*expected], **exact)
            other = model(a, torch.randn_like(b), **cond)
            assert_close(other[0], expected[0], **exact)
    assert len(skipped.layers) == 3
    assert zoo.snapshot(model) == before
    assert not torch.allclose(plain[0], expected[0], atol=1e-2)
    assert_close([*model(a, b, **cond)], [*plain], **exact)


@pytest.mark.parametrize("execution", ["full", "sequential", "batched"])
def test_isolation_as_a_branch(execution: str, named: None) -> None:
    model, (a, b, cond, _) = build(), inputs()
    c, w = model(a, b, **cond), without(model, 1)(a, b, **cond)
    alone = apart(model, "left", "right")
    partly = copy.deepcopy(model)
    partly.set_submodule("blocks.2", alone.get_submodule("blocks.2"))
    for layers, weak in ((None, alone(a, b, **cond)), ([2], partly(a, b, **cond))):
        branches = [stg.Branch([1], SCALE), stg.Branch(layers, {"video": 2.0, "audio": 1.0}, "isolated")]
        with stg.apply(model, branches=branches, batched_cfg=False, execution=execution):
            got = model(a, b, **cond)
        expected = [
            guided(c[i], None, [(one, w[i]), (other, weak[i])]) for i, one, other in ((0, 1.5, 2.0), (1, 0.5, 1.0))
        ]
        assert_close([*got], expected, **close)


def test_layers_may_be_left_out_for_it_alone() -> None:
    model, (a, b, cond, _) = build(), inputs()
    c, w = model(a, b, **cond), apart(model, "left", "right")(a, b, **cond)
    got = stg.Guider(model, mode="isolated", scale=2.0)(a, b, **cond)
    assert_close([*got], [guided(c[i], None, [(2.0, w[i])]) for i in range(2)], **close)
    assert [layer.index for layer in stg.check(model, mode="isolated")] == [0, 1, 2]
    with pytest.raises(stg.SettingError, match="mode='residual' needs layers"):
        stg.Branch(scale=1.0)
    with pytest.raises(stg.SettingError, match="mode='values' needs layers"):
        stg.skip(model, mode="values")


def test_what_has_no_streams_is_refused() -> None:
    wan = MODELS["WanTransformer3DModel"].build("WanTransformer3DModel")
    with pytest.raises(stg.LayerError, match=r"mode='isolated' .*WanTransformer3DModel has none"):
        stg.skip(wan, mode="isolated")
    with pytest.raises(stg.LayerError, match=r"WanTransformerBlock has no two streams"):
        stg.skip(wan, [1], "isolated")
    model, (a, b, cond, _) = build(), inputs()
    for block in model.blocks:
        block.left = block.right = nn.Identity()
        block.both = lambda a, b, text, block=block: (block.one(a, text) + b.mean(1, True), block.other(b, text))
    with stg.skip(model, mode="isolated"), pytest.raises(stg.BlockError, match="has no attention that takes keys of"):
        model(a, b, **cond)


@pytest.mark.parametrize("name", [LTX_2, "Kandinsky6Transformer3DModel"])
def test_models_of_diffusers(name: str) -> None:
    model, given = MODELS[name].build(name), MODELS[name].inputs()
    if name == LTX_2:
        expected = model(**given, isolate_modalities=True)
    else:
        expected = apart(model, "va_cross_attention", "av_cross_attention")
        for block in expected.visual_transformer_blocks:
            block.va_cross_attention = block.av_cross_attention = AsQueries()
        expected = expected(**given)
    with stg.skip(model, mode="isolated"):
        assert_close(model(**given), expected, **exact)
    assert not torch.allclose(model(**given)[0], expected[0], atol=1e-2)


class AsQueries(nn.Module):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros_like(hidden_states)


class X0Model(nn.Module):
    """Called as LTX-2's own is; text is in what is predicted, there."""

    def __init__(self) -> None:
        super().__init__()
        self.velocity_model = build()

    def forward(self, video: Any, audio: Any, perturbations: Any) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.velocity_model(video[0], audio[0], video[1])
        return found


def test_the_code_for_ltx_core() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "coming-from.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```text\n(guider = .*?)```", page, re.S)
    model, (a, b, cond, uncond) = X0Model(), inputs()
    names: dict[str, Any] = {"stg": stg, "x0_model": model}
    names |= {"video": (a, cond["text"]), "audio": (b,), "video_uncond": (a, uncond["text"]), "audio_uncond": (b,)}
    exec(code.replace("[29]", '["blocks.1"]'), names)
    duet = model.velocity_model
    c, u = duet(a, b, **cond), duet(a, b, **uncond)
    weak = copy.deepcopy(duet)
    weak.blocks[1].one.attn = Values(duet.blocks[1].one.attn)
    weak.blocks[1].other.attn = Values(duet.blocks[1].other.attn)
    first, second = weak(a, b, **cond), apart(duet, "left", "right")(a, b, **cond)
    terms = [[(1.0, first[i]), (2.0, second[i])] for i in range(2)]
    expected = [guided(c[i], u[i], terms[i], g, 0.7) for i, g in enumerate((3.0, 7.0))]
    assert_close([names["clean_video"], names["clean_audio"]], expected, **close)


class Values(nn.Module):
    """Attention in which every token has its own value."""

    def __init__(self, attention: zoo.Attention) -> None:
        super().__init__()
        self.to_v, self.to_out = attention.to_v, attention.to_out

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.to_out(self.to_v(x))


# --- the stock pipelines of LTX-2 -------------------------------------------------------------------------------------

OWN = {
    "guidance_scale": 3.0, "stg_scale": 1.0, "modality_scale": 3.0, "guidance_rescale": 0.7,
    "audio_guidance_scale": 7.0, "audio_stg_scale": 0.5, "audio_modality_scale": 2.0, "audio_guidance_rescale": 0.4,
    "spatio_temporal_guidance_blocks": [2],
}  # fmt: skip
STG_OFF, ISOLATION_OFF = (
    {"stg_scale": 0.0, "audio_stg_scale": 0.0},
    {"modality_scale": 1.0, "audio_modality_scale": 1.0},
)
OFF = STG_OFF | ISOLATION_OFF
NO_RESCALE = {"guidance_rescale": 0.0, "audio_guidance_rescale": 0.0}
SKIPPED = stg.Branch([2], {"video": 1.0, "audio": 0.5}, "values")
ISOLATED = stg.Branch(scale={"video": 2.0, "audio": 1.0}, mode="isolated")


@pytest.fixture(scope="module")
def pipe() -> Any:
    return stock_pipelines.STOCK["LTX2Pipeline"].build()


def run(pipe: Any, **changes: Any) -> list[Tensor]:
    call = {**stock_pipelines.STOCK["LTX2Pipeline"].call(), **OWN, "num_inference_steps": 2, "output_type": "latent"}
    found = pipe(**{**call, **changes}, generator=torch.Generator().manual_seed(7), return_dict=False)
    return [torch.as_tensor(one) for one in found[:2]]


def agree(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(bool((a - b).std() < 1e-4 * b.std()) for a, b in zip(found, expected, strict=True))


@pytest.fixture(autouse=True)
def strictly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", stg.StgWarning)
        yield


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (ISOLATION_OFF | NO_RESCALE, {"branches": [SKIPPED]}),
        (STG_OFF | NO_RESCALE, {"branches": [ISOLATED]}),
        (OFF, {"branches": [dataclasses.replace(SKIPPED, scale=0.0)], "rescale": {"video": 0.7, "audio": 0.4}}),
        ({}, {"branches": [SKIPPED, ISOLATED], "rescale": {"video": 0.7, "audio": 0.4}}),
        (
            {"guidance_scale": 1.0, "audio_guidance_scale": 1.0},
            {"branches": [SKIPPED, ISOLATED], "rescale": {"video": 0.7, "audio": 0.4}},
        ),
        ({"audio_guidance_scale": 3.0, "guidance_rescale": 0.4}, {"branches": [SKIPPED, ISOLATED], "rescale": 0.4}),
    ],
    ids=["skipped", "isolated", "rescaled", "all", "all without CFG", "one rescale"],
)
def test_it_is_what_the_pipeline_builds_in(theirs: dict[str, Any], ours: dict[str, Any], pipe: Any) -> None:
    expected, plain = run(pipe, **theirs), run(pipe, **{**theirs, **OFF, **NO_RESCALE})
    assert not agree(plain, expected)
    with stg.apply(pipe, **ours, strict=True):
        found = run(pipe, **{**theirs, **OFF, **NO_RESCALE})
    assert agree(found, expected)


def test_a_rescale_of_the_pipeline_leaves_ours_alone(pipe: Any) -> None:
    expected = run(pipe)
    with stg.apply(pipe, branches=[SKIPPED, ISOLATED], rescale={"video": 0.7, "audio": 0.4}):
        assert agree(run(pipe, **OFF), expected)


def test_a_denoiser_in_its_pipeline(pipe: Any) -> None:
    expected = run(pipe)
    with stg.apply(pipe.transformer, branches=[SKIPPED, ISOLATED], rescale={"video": 0.7, "audio": 0.4}):
        assert agree(run(pipe, **OFF), expected)


@pytest.mark.parametrize(
    ("ours", "theirs", "told"),
    [
        ({"layers": [2]}, {}, "skips layers by itself .*call it with stg_scale=0.0, audio_stg_scale=0.0"),
        ({"layers": [2]}, {"stg_scale": 0.0}, "call it with stg_scale=0.0, audio_stg_scale=0.0"),
        ({"mode": "isolated"}, {}, "isolates streams by itself .*modality_scale=1.0, audio_modality_scale=1.0"),
    ],
)
def test_guidance_of_its_own_is_noticed(ours: Any, theirs: Any, told: str, pipe: Any) -> None:
    with pytest.warns(stg.StgWarning, match=told) as told_of, stg.apply(pipe, **ours):
        run(pipe, **theirs)
    assert len(told_of) == 1
    with pytest.raises(stg.CallError, match=told), stg.apply(pipe, **ours, strict=True):
        run(pipe, **theirs)
    with pytest.warns(stg.StgWarning, match=told), stg.apply(pipe.transformer, **ours):
        run(pipe, **theirs)


@pytest.mark.parametrize("name", ["LTX-2", "LTX-2.3"])
def test_the_recipe(name: str, pipe: Any) -> None:
    published = next(setting for setting in PUBLISHED if setting.name == name)
    code = re.sub(r"steps=\d+", "steps=2", recipes.whole(dataclasses.replace(published, layers=(2,))))
    call = stock_pipelines.STOCK["LTX2Pipeline"].call() | {"output_type": "latent"}
    dropped = {*OWN, *stock_pipelines.LTX2_OFF}
    given = {key: value for key, value in call.items() if key not in dropped}
    names: dict[str, Any] = {"stg": stg, "pipe": pipe}
    exec(code, names | {"inputs": given | {"generator": torch.Generator().manual_seed(7)}}, names)
    theirs = {"audio_stg_scale": 1.0, "audio_modality_scale": 3.0, "audio_guidance_rescale": 0.7}
    assert agree([torch.as_tensor(names[one]) for one in ("video", "audio")], run(pipe, **theirs))


def test_guidance_of_another_kind_stays_with_it(pipe: Any) -> None:
    expected = run(pipe, **NO_RESCALE)
    with stg.apply(pipe, branches=[SKIPPED], strict=True):
        assert agree(run(pipe, **STG_OFF, **NO_RESCALE), expected)
    with stg.apply(pipe, branches=[ISOLATED], strict=True):
        assert agree(run(pipe, **ISOLATION_OFF, **NO_RESCALE), expected)
    with stg.apply(pipe, [2], 0.0, strict=True):  # nothing is added
        assert_close(run(pipe), run(pipe), **exact)


def test_a_rescale_cannot_be_had_beside_it(pipe: Any) -> None:
    told = r"adds a guidance of its own.*stg_scale=0.0, audio_stg_scale=0.0, modality_scale=1.0, audio_modality_scale=1"
    with pytest.raises(stg.CallError, match=told), stg.apply(pipe, [2], rescale=0.7):
        run(pipe)


# --- the modular pipeline ---------------------------------------------------------------------------------------------


def test_isolation_in_a_modular_pipeline() -> None:
    case, skip = MODULAR["ltx2"], stg.modular.SkipGuidance

    def both(video: Any, audio: Any) -> list[Tensor]:
        pipe = case.build()
        pipe.update_components(guider=video, audio_guider=audio)
        return [case.run(pipe, output=name) for name in ("latents", "audio_latents")]

    LTX2Guidance = from_diffusers("LTX2Guidance")
    theirs = LTX2Guidance(3.0, 1.0, 3.0, 0.7, [1]), LTX2Guidance(7.0, 0.5, 2.0, 0.4)
    ours = [
        skip(
            branches=[stg.Branch([1], one, "values"), stg.Branch(scale=other, mode="isolated")],
            guidance_scale=cfg,
            rescale=rescale,
        )
        for one, other, cfg, rescale in ((1.0, 2.0, 3.0, 0.7), (0.5, 1.0, 7.0, 0.4))
    ]
    assert agree(both(*ours), both(*theirs))
    assert sum(guider.stats.weak_passes for guider in ours) == 2 * ours[0].stats.calls
    with pytest.raises(stg.SettingError, match="each prediction has a guider of its own"):
        skip([1], {"video": 1.0})
