"""What is read in the code of pipelines: what their denoiser calls are for, and with which weight they are combined."""

from __future__ import annotations

import ast
from contextlib import nullcontext
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import stg_hooks as stg
from stg_hooks.integrations.diffusers.expressions import evaluate
from tests import pipeline_table


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + torch.tanh(self.linear(hidden_states))


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(8) for _ in range(3))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = x + emb
        for block in self.blocks:
            x = block(x)
        return x


class Pipeline(diffusers.DiffusionPipeline):
    """A pipeline of one step; what it returns is the prediction that it would hand to its scheduler."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.register_modules(transformer=transformer)
        self.guidance_scale = 4.0

    @property
    def do_cfg(self) -> bool:
        return self.guidance_scale > 1


class Halves(Pipeline):
    def __call__(self, x: Tensor, cond: Tensor, neg: Tensor) -> Tensor:
        both = torch.cat([x, x]) if self.do_cfg else x
        pred = self.transformer(both, torch.cat([neg, cond]) if self.do_cfg else cond)
        if self.do_cfg:
            pred_uncond, pred_text = pred.chunk(2)
            pred = pred_uncond + self.guidance_scale * (pred_text - pred_uncond)
        return pred


class Pair(Pipeline):
    """One call each, neither named, in a method of its own, with the other usual formula."""

    def __call__(self, x: Tensor, cond: Tensor, neg: Tensor) -> Tensor:
        return self.predict(x, cond, neg)

    def predict(self, x: Tensor, cond: Tensor, negative_emb: Tensor) -> Tensor:
        pred = self.transformer(
            x,
            cond,
        )
        if self.do_cfg:
            pred_neg = self.transformer(x, negative_emb)
            pred = pred + (self.guidance_scale - 1) * (pred - pred_neg)
        return pred


class Derived(Pair):
    def predict(self, *args: Any) -> Tensor:
        return super().predict(*args)


class Distilled(Pipeline):
    def __call__(self, x: Tensor, cond: Tensor, neg: Tensor) -> Tensor:
        return self.transformer(x, cond + self.guidance_scale)


class FillsACache(Pair):
    """Makes a call whose prediction it throws away."""

    def predict(self, x: Tensor, cond: Tensor, negative_emb: Tensor) -> Tensor:
        _ = self.transformer(x, torch.zeros_like(cond))
        pred = self.transformer(x, cond)
        if self.do_cfg:
            pred_neg = self.transformer(x, negative_emb)
            pred = pred + (self.guidance_scale - 1) * (pred - pred_neg)
        return pred


class Embedded(Pipeline):
    """Prepares for guidance, which is then embedded: in the loop there is none."""

    def __call__(self, x: Tensor, cond: Tensor, neg: Tensor) -> Tensor:
        embedding = cond + self.guidance_scale
        if self.do_classifier_free_guidance:
            raise AssertionError
        for _ in range(1):
            pred = self.transformer(x, embedding)
        return pred

    @property
    def do_classifier_free_guidance(self) -> bool:
        return False


def expected(pipe: Pipeline, x: Tensor, cond: Tensor, neg: Tensor, rescale: float = 0.0) -> Tensor:
    """Compute what the guided pipeline must return, by the textbook."""
    if isinstance(pipe, (Distilled, Embedded)):
        cond = cond + pipe.guidance_scale
    g = pipe.guidance_scale if pipe.do_cfg and not isinstance(pipe, (Distilled, Embedded)) else 1.0
    c, u = pipe.transformer(x, cond), pipe.transformer(x, neg)
    with stg.skip(pipe.transformer, ["blocks.1"]):
        weak = pipe.transformer(x, cond)
    return stg.combine(c, weak, u, scale=0.7, guidance_scale=g, rescale=rescale)


@pytest.fixture
def arguments() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8)


@pytest.mark.parametrize("rescale", [0.0, 0.6])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("cls", [Halves, Pair, Derived, Distilled, FillsACache, Embedded])
def test_every_way_of_guiding_is_understood(
    cls: type[Pipeline], guidance_scale: float, rescale: float, arguments: tuple[Tensor, Tensor, Tensor]
) -> None:
    pipe = cls(Denoiser())
    pipe.guidance_scale = guidance_scale
    with torch.no_grad():
        plain, right = pipe(*arguments), expected(pipe, *arguments, rescale)
        with stg.apply(pipe, layers=["blocks.1"], scale=0.7, rescale=rescale) as handle:
            guided = pipe(*arguments)
    assert handle.stats.weak_passes == 1
    assert (guided - plain).abs().max() > 1e-2
    assert_close(guided, right, rtol=1e-5, atol=1e-5)


class Thirds(Pipeline):
    """InstructPix2Pix: the prompt and an image, each with a weight."""

    image_guidance_scale = 1.5

    def __call__(self, x: Tensor, cond: Tensor, neg: Tensor) -> Tensor:
        pred = self.transformer(torch.cat([x] * 3), torch.cat([neg, cond + neg, cond]))
        pred_uncond, pred_image, pred_text = pred.chunk(3)
        return (
            pred_uncond
            + self.guidance_scale * (pred_text - pred_image)
            + self.image_guidance_scale * (pred_image - pred_uncond)
        )


class BlendedHere(Pipeline):
    image_guidance_scale = 0.6

    def __call__(self, x: Tensor, cond: Tensor, neg: Tensor) -> Tensor:
        pred = self.transformer(torch.cat([x, x]), torch.cat([neg, cond]))
        pred_uncond, pred_text = pred.chunk(2)
        pred = pred_uncond + self.guidance_scale * (pred_text - pred_uncond)
        output = self.transformer(x, cond + x)
        other = 1.0 * output
        pred = self.image_guidance_scale * pred + (1.0 - self.image_guidance_scale) * other
        return 1.0 * pred


@pytest.mark.parametrize("cls", [Thirds, BlendedHere])
def test_what_sums_to_one_comes_through(cls: type[Pipeline], arguments: tuple[Tensor, Tensor, Tensor]) -> None:
    pipe = cls(Denoiser())
    x, cond, _ = arguments
    with torch.no_grad():
        with stg.skip(pipe.transformer, ["blocks.1"]):
            weak = pipe.transformer(x, cond)
        right = pipe(*arguments) + 0.7 * (pipe.transformer(x, cond) - weak)
        with stg.apply(pipe, layers=["blocks.1"], scale=0.7) as handle:
            assert_close(pipe(*arguments), right, rtol=1e-5, atol=1e-5)
        assert handle.stats.weak_passes == 1
        told = r"(more than one cond and one uncond|a guidance of its own).*rescale=0\.0"
        with pytest.raises(stg.CallError, match=told), stg.apply(pipe, layers=["blocks.1"], rescale=0.5):
            pipe(*arguments)


def test_on_uncond_needs_halves(arguments: tuple[Tensor, Tensor, Tensor]) -> None:
    pipe = Thirds(Denoiser())
    told = pytest.raises(stg.CallError, match=r"on='uncond' cannot be used where the rows of a call are \[")
    with told, stg.apply(pipe, layers=["blocks.1"], on="uncond"):
        pipe(*arguments)


class Blended(Pipeline):
    """ACE-Step: a call of its own for another prompt, and the two are mixed by a method."""

    def __call__(self, x: Tensor, cond: Tensor, neg: Tensor) -> Tensor:
        pred = self.transformer(torch.cat([x, x]), torch.cat([neg, cond]))
        pred_uncond, pred_text = pred.chunk(2)
        pred = pred_uncond + self.guidance_scale * (pred_text - pred_uncond)
        output = self.transformer(x, cond + x)
        other = 1.0 * output
        return self.mixed(pred, other)

    def mixed(self, pred: Tensor, other: Tensor) -> Tensor:
        return 0.6 * pred + 0.4 * other


class ThreeCalls(Pipeline):
    def __call__(self, x: Tensor, cond: Tensor, neg: Tensor) -> Tensor:
        first = self.transformer(x, cond)
        pred = self.transformer(first, cond)
        pred_neg = self.transformer(x, neg)
        return pred_neg + self.guidance_scale * (pred - pred_neg)


class Elsewhere(Pipeline):
    def __call__(self, x: Tensor, cond: Tensor, neg: Tensor) -> Tensor:
        return run_elsewhere(self, x, cond)


def run_elsewhere(pipe: Pipeline, x: Tensor, cond: Tensor) -> Tensor:
    return pipe.transformer(x, cond)


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (Blended, "does not say which half is which"),
        (ThreeCalls, "it makes 3 different calls"),
        (Elsewhere, "Elsewhere does not call its transformer itself"),
    ],
)
def test_what_is_not_understood_is_refused_before_anything_is_touched(cls: type[Pipeline], why: str) -> None:
    """More of them in test_cfg_spellings.py."""
    with pytest.raises(stg.TargetError, match=rf"(?s){why}.*stg\.apply\(pipe\.transformer, \.\.\., batched_cfg=True\)"):
        stg.apply(cls(Denoiser()), layers=["blocks.1"])


class OwnGuidance(Pipeline):
    perturbs = False

    def __call__(self, x: Tensor, cond: Tensor, neg: Tensor) -> Tensor:
        pred = self.transformer(torch.cat([x, x]), torch.cat([neg, cond]))
        if self.perturbs:
            return self.own(pred)
        else:
            pred_uncond, pred_text = pred.chunk(2)
        return pred_uncond + self.guidance_scale * (pred_text - pred_uncond)

    def own(self, pred: Tensor) -> Tensor:
        return pred


def test_rows_of_a_guidance_of_the_pipelines_own_are_refused(arguments: tuple[Tensor, Tensor, Tensor]) -> None:
    pipe = OwnGuidance(Denoiser())
    with torch.no_grad(), stg.apply(pipe, layers=["blocks.1"], scale=0.7):
        assert_close(pipe(*arguments), expected(pipe, *arguments), rtol=1e-5, atol=1e-5)
        pipe.perturbs = True
        with pytest.raises(stg.CallError, match=r"perturbed rows of its own, as not self\.perturbs is false"):
            pipe(*arguments)


class OwnCalls(Pipeline):
    """Makes weak predictions itself, and compares the cond one with them: SD3's skipped layers, LTX-2."""

    def __call__(self, x: Tensor, cond: Tensor, neg: Tensor) -> Tensor:
        pred = self.transformer(torch.cat([x, x]), torch.cat([neg, cond]))
        pred_uncond, pred_text = pred.chunk(2)
        pred = pred_uncond + self.guidance_scale * (pred_text - pred_uncond)
        with self.cache_context("stg"):
            weak = self.transformer(x + 1, cond)
        with self.cache_context("modality"):
            other = self.transformer(x + 2, cond)
        return pred + 2.0 * (pred_text - weak) + 3.0 * (pred_text - other)

    def cache_context(self, name: str) -> Any:
        return nullcontext()


def test_guidance_of_the_pipelines_own_keeps_its_weight(arguments: tuple[Tensor, Tensor, Tensor]) -> None:
    pipe = OwnCalls(Denoiser())
    x, cond, _ = arguments
    with torch.no_grad():
        plain = pipe(*arguments)
        with stg.skip(pipe.transformer, ["blocks.1"]):
            weak = pipe.transformer(x, cond)
        with stg.apply(pipe, layers=["blocks.1"], scale=0.7) as session:
            assert_close(pipe(*arguments), plain + 0.7 * (pipe.transformer(x, cond) - weak), rtol=1e-5, atol=1e-5)
        assert session.stats.weak_passes == 1
        with (
            pytest.raises(stg.CallError, match=r"adds a guidance of its own in this step.*or use rescale=0\.0"),
            stg.apply(pipe, layers=["blocks.1"], rescale=0.5),
        ):
            pipe(*arguments)


class OnlyPerturbed(OwnCalls):
    def __call__(self, x: Tensor, cond: Tensor, neg: Tensor) -> Tensor:
        with self.cache_context("stg"):
            return self.transformer(x, cond)


def test_a_perturbed_call_needs_a_cond_call_before_it(arguments: tuple[Tensor, Tensor, Tensor]) -> None:
    pipe = OnlyPerturbed(Denoiser())
    with (
        pytest.raises(stg.CallError, match=r"made a call for perturbed rows without a matching cond call"),
        stg.apply(pipe, layers=["blocks.1"]),
    ):
        pipe(*arguments)


class Lists(Pipeline):
    """As Z-Image: samples in lists, taken apart in a way that is not understood, but only while a flag says so."""

    def __call__(self, x: Tensor, cond: Tensor, neg: Tensor) -> Tensor:
        for _ in range(1):
            apply_cfg = self.guidance_scale > 1
            if apply_cfg:
                x, cond = torch.cat([x, x]), torch.cat([cond, neg])
            pred = self.transformer(x, cond)
            if apply_cfg:
                pos, pred_uncond = pred[: len(pred) // 2], pred[len(pred) // 2 :]
                pred = pred_uncond + self.guidance_scale * (pos - pred_uncond)
        return pred


def test_a_flag_under_which_guidance_is_not_understood(arguments: tuple[Tensor, Tensor, Tensor]) -> None:
    pipe = Lists(Denoiser())
    with stg.apply(pipe, layers=["blocks.1"], scale=0.7), torch.no_grad():
        with pytest.raises(stg.CallError, match=r"guides its predictions by itself, as apply_cfg is true"):
            pipe(*arguments)
        pipe.guidance_scale = 1.0
        assert_close(pipe(*arguments), expected(pipe, *arguments), rtol=1e-5, atol=1e-5)


class Sliced(Lists):
    """The same, and understood; but what its denoiser returns is one tensor."""

    def __call__(self, x: Tensor, cond: Tensor, neg: Tensor) -> Tensor:
        apply_cfg = self.guidance_scale > 1
        both, prompts = torch.cat([x, x]), torch.cat([cond, neg])
        out = self.transformer(both, prompts)
        if apply_cfg:
            pos_out = out[: len(x)]
            neg_out = out[len(x) :]
            preds = []
            for j in range(len(x)):
                pos = pos_out[j].float()
                neg = neg_out[j].float()
                pred = pos + self.guidance_scale * (pos - neg)
                preds.append(pred)
            return torch.stack(preds)
        pred = torch.stack([one.float() for one in out])
        return 1.0 * pred


def test_what_is_sliced_as_a_list_and_is_none_is_an_error(arguments: tuple[Tensor, Tensor, Tensor]) -> None:
    pipe = Sliced(Denoiser())
    told = r"a list of predictions of the shapes \[.*\] cannot be \[cond, uncond\] samples"
    with pytest.raises(stg.CallError, match=told), torch.no_grad(), stg.apply(pipe, layers=["blocks.1"]):
        pipe(*arguments)


class ChangesItsWeight(Pipeline):
    changes = True

    def __call__(self, x: Tensor, cond: Tensor, neg: Tensor) -> Tensor:
        pred = self.transformer(torch.cat([x, x]), torch.cat([neg, cond]))
        if self.changes:
            self.guidance_scale = 2.0
        pred_uncond, pred_text = pred.chunk(2)
        return pred_uncond + self.guidance_scale * (pred_text - pred_uncond)


def test_rescale_needs_a_weight_that_is_known(arguments: tuple[Tensor, Tensor, Tensor]) -> None:
    pipe = ChangesItsWeight(Denoiser())
    with (
        pytest.raises(stg.CallError, match=r"needs the CFG weight.*Use rescale=0\.0 and rule=.cfg., or stg\.Guider"),
        stg.apply(pipe, layers=["blocks.1"], rescale=0.5),
    ):
        pipe(*arguments)


class ZeroStar(Pipeline):
    """Two formulas, of which only the second one is understood: CFG-Zero*, as in Helios."""

    zero_star = True

    def __call__(self, x: Tensor, cond: Tensor, neg: Tensor) -> Tensor:
        pred = self.transformer(x, cond)
        if self.do_cfg:
            pred_uncond = self.transformer(x, neg)
            if self.zero_star:
                text = pred
                alpha = (text * pred_uncond).mean() / pred_uncond.square().mean()
                pred = pred_uncond * alpha + self.guidance_scale * (text - pred_uncond * alpha)
            else:
                pred = pred_uncond + self.guidance_scale * (pred - pred_uncond)
        return pred


def test_a_combination_that_would_change_the_weight_of_guidance_is_an_error(
    arguments: tuple[Tensor, Tensor, Tensor],
) -> None:
    pipe = ZeroStar(Denoiser())
    told = "it combines its predictions in another way, as not self.zero_star is false"
    with pytest.raises(stg.CallError, match=told), stg.apply(pipe, layers=["blocks.1"]):
        pipe(*arguments)
    pipe.zero_star = False
    with stg.apply(pipe, layers=["blocks.1"], scale=0.7), torch.no_grad():
        assert_close(pipe(*arguments), expected(pipe, *arguments), rtol=1e-5, atol=1e-5)


def test_a_weight_that_does_not_change_now_is_known(arguments: tuple[Tensor, Tensor, Tensor]) -> None:
    pipe = ChangesItsWeight(Denoiser())
    pipe.changes = False
    with torch.no_grad(), stg.apply(pipe, layers=["blocks.1"], scale=0.7, rescale=0.5):
        assert_close(pipe(*arguments), expected(pipe, *arguments, 0.5), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a + 2 * b.real - c[1]", 3 + 8 - 5),
        ("not a or b > 3 and c is not None", True),
        ("-a <= b != a", True),
        ("a in c", False),
        ("a and d", None),
        ("1 < a < 2", False),
    ],
)
def test_expressions(text: str, value: object) -> None:
    names = {"a": 3, "b": 4, "c": [1, 5], "d": None}
    assert evaluate(ast.parse(text, mode="eval").body, names) == value


@pytest.mark.parametrize(
    "text", ["print(1)", "[x for x in c]", "lambda: 0", "missing", "d.missing", "f'{a}'", "a := 1"]
)
def test_expressions_that_do_anything_are_refused(text: str) -> None:
    with pytest.raises(LookupError):
        evaluate(ast.parse(f"({text})", mode="eval").body, {"a": 3, "c": [1], "d": None, "print": print})


def test_every_pipeline_of_diffusers_is_classified() -> None:
    """A new release may bring new ones: look at what is read, and write the page again."""
    told = "run: python -m tests.pipeline_table, and review the difference"
    page = pipeline_table.FILE.read_text(encoding="utf-8")
    assert not pipeline_table.unclassified(page), told
    if f"diffusers {diffusers.__version__} " in page:
        # What is installed here may be more or less than where the page was written: each class that both have counts.
        known = pipeline_table.rows_in(page)
        read = {name: row for name, row in pipeline_table.rows().items() if name in known}
        assert pipeline_table.document({**known, **read}, pipeline_table.unread_in(page)) == page, told


def test_the_page_does_not_depend_on_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    unread = pipeline_table.unread_in(pipeline_table.FILE.read_text(encoding="utf-8"))
    for name in ("DiTPipeline", unread[0]):  # all others are missing; one is there that was not
        found = {name: diffusers.DiTPipeline}
        monkeypatch.setattr(pipeline_table, "classes", lambda found=found: found)
        test_every_pipeline_of_diffusers_is_classified()


def test_a_pipeline_that_nobody_has_classified_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class BrandNewPipeline(diffusers.DiffusionPipeline):
        def __init__(self, transformer: nn.Module) -> None:
            super().__init__()

    monkeypatch.setattr(diffusers, "BrandNewPipeline", BrandNewPipeline, raising=False)
    page = pipeline_table.FILE.read_text(encoding="utf-8")
    assert pipeline_table.unclassified(page) == {"BrandNewPipeline"}
