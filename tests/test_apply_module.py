"""`stg.apply(module, ...)`: every call of a module guided, whoever makes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import stg_hooks as stg
from tests import zoo

exact: dict[str, Any] = {"rtol": 0, "atol": 0}
close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
pytestmark = pytest.mark.filterwarnings("error::stg_hooks.StgWarning")  # guidance that works says nothing


def weak_of(model: nn.Module, names: tuple[str, ...] = ("blocks.2",)) -> nn.Module:
    return zoo.without(model, names)


def std(t: Tensor) -> Tensor:
    return t.std(list(range(1, t.ndim)), keepdim=True)


# --- which rows get what ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batched_cfg", [False, True])
def test_scale_may_be_a_tensor(model: nn.Module, batched_cfg: bool) -> None:
    inputs = zoo.inputs(4)
    per_token = torch.linspace(0.0, 2.0, zoo.TOKENS).reshape(1, -1, 1)
    cond, weak = model(**inputs), weak_of(model)(**inputs)
    term = per_token * (cond - weak)
    if batched_cfg:
        term = torch.cat([term[2:], term[2:]])
    with stg.apply(model, [2], per_token, batched_cfg=batched_cfg):
        assert_close(model(**inputs), cond + term, **close)


# --- rescale ----------------------------------------------------------------------------------------------------------


def test_rescale_without_cfg(model: nn.Module) -> None:
    inputs = zoo.inputs()
    cond, weak = model(**inputs), weak_of(model)(**inputs)
    out = cond + 1.5 * (cond - weak)
    with stg.apply(model, [2], 1.5, rescale=0.7):
        assert_close(model(**inputs), out * (0.7 * std(cond) / std(out) + 0.3), **close)


@pytest.mark.parametrize("guidance_scale", [1.0, 6.0, torch.linspace(1.0, 3.0, zoo.TOKENS).reshape(1, -1, 1)])
def test_rescale_returns_the_final_prediction_in_every_row(model: nn.Module, guidance_scale: Any) -> None:
    """So that the caller's own combination, with whatever weight, leaves it alone."""
    inputs = zoo.inputs(4)
    uncond, cond = model(**inputs).chunk(2)
    weak = weak_of(model)(**inputs)[2:]
    out = uncond + guidance_scale * (cond - uncond) + 1.5 * (cond - weak)
    out = out * (0.7 * std(cond) / std(out) + 0.3)
    with stg.apply(model, [2], 1.5, rescale=0.7, batched_cfg=True, guidance_scale=guidance_scale):
        got = model(**inputs)
    assert_close(got, torch.cat([out, out]), rtol=1e-4, atol=1e-4)


def test_rescale_without_the_guidance_scale_is_an_error(model: nn.Module) -> None:
    before = zoo.snapshot(model)
    with pytest.raises(stg.SettingError, match=r"rescale=0\.7 needs the final prediction.*pass guidance_scale="):
        stg.apply(model, [2], 1.5, rescale=0.7, batched_cfg=True)
    stg.apply(model, [2], 1.5, rescale=0.0, batched_cfg=True).not_to_be_entered()
    assert zoo.snapshot(model) == before


# --- arguments that are cut to the cond rows --------------------------------------------------------------------------


class Picky(nn.Module):
    """A denoiser with arguments of all kinds; checks that they belong together, row by row.

    `x` is (B, tokens, dim). `pixels` has frames folded into the batch, `sizes` too; `grid` has one entry per
    token, and so have the two tables in `freqs`, known by their name only; `extra` nests tensors with and without rows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.model = zoo.DiT()

    seen = zoo.Log()

    def forward(
        self,
        x: Tensor,
        grid: Tensor,
        freqs: tuple[Tensor, Tensor],
        *,
        pixels: Tensor,
        sizes: Tensor,
        extra: dict[str, Any],
        sigma: Tensor,
        flag: bool = True,
    ) -> Tensor:
        self.seen.append({key: value for key, value in locals().items() if key != "self"})
        batch = x.shape[0]
        text = extra["text"][0] + pixels.reshape(batch, -1, zoo.DIM).mean(1, keepdim=True)
        text = text + extra["table"]["scales"][:, None, None] + sizes.reshape(batch, -1).mean(1)[:, None, None] + sigma
        return self.model(x + grid[:, :1] + freqs[0][None, :, 0, :1], text)


def picky_call(batch: int = 4) -> tuple[tuple[Any, ...], dict[str, Any]]:
    inputs = zoo.inputs(batch)
    frames = 3
    # `x` has as many tokens as the call has rows times two: a table with an entry per token looks like folded rows.
    x = torch.cat([inputs["x"], inputs["x"]], dim=1)[:, : 2 * batch]
    tokens = x.shape[1]
    kwargs = {
        "pixels": torch.randn(batch * frames, 2, zoo.DIM),
        "sizes": torch.randn(batch * frames),
        "extra": {"text": [inputs["text"]], "table": {"scales": torch.randn(batch)}, "nothing": None, "name": "wan"},
        "sigma": torch.tensor(0.5),
    }
    freqs = torch.randn(tokens, 3, 6), torch.randn(tokens, 3, 6)
    return (x, torch.randn(tokens, 3), freqs), kwargs


def test_arguments_are_cut_to_the_cond_rows() -> None:
    torch.manual_seed(0)
    model = Picky().eval().requires_grad_(False)
    args, kwargs = picky_call(4)
    assert args[0].shape[1] == 8  # a multiple of the batch
    plain = model(*args, **kwargs)
    weak = weak_of(model, ("model.blocks.2",))(*args, **kwargs)
    model.seen.taken()
    with stg.apply(model, ["blocks.2"], 1.0, batched_cfg=True):
        got = model(*args, **kwargs)
        assert len(model.seen) == 3  # the first time, cut rows are tried with nothing skipped
        model.seen.taken()
        model(*args, **kwargs)
    term = (plain - weak)[2:]
    assert_close(got, plain + torch.cat([term, term]), **close)

    _, seen = model.seen.taken()
    assert_close(seen["x"], args[0][2:], **exact)
    assert_close(seen["pixels"], kwargs["pixels"][6:], **exact)
    assert_close(seen["sizes"], kwargs["sizes"][6:], **exact)
    assert_close(seen["extra"]["text"][0], kwargs["extra"]["text"][0][2:], **exact)
    assert_close(seen["extra"]["table"]["scales"], kwargs["extra"]["table"]["scales"][2:], **exact)
    assert (seen["extra"]["nothing"], seen["extra"]["name"], seen["flag"]) == (None, "wan", True)
    assert seen["grid"].shape == (8, 3)
    assert [table.shape for table in seen["freqs"]] == [(8, 3, 6), (8, 3, 6)]
    assert seen["sigma"].shape == ()


def test_arguments_are_not_cut_where_all_rows_are_conditional() -> None:
    torch.manual_seed(0)
    model = Picky().eval().requires_grad_(False)
    args, kwargs = picky_call(3)
    cond, weak = model(*args, **kwargs), weak_of(model, ("model.blocks.2",))(*args, **kwargs)
    with stg.apply(model, ["blocks.2"], 1.0):
        assert_close(model(*args, **kwargs), 2 * cond - weak, **close)


def test_arguments_are_left_alone(model: nn.Module) -> None:
    inputs = zoo.inputs(4)
    before = {name: value.clone() for name, value in inputs.items()}
    with stg.apply(model, [2], 1.0, batched_cfg=True):
        model(**inputs).mul_(0.0)
    assert_close(inputs, before, **exact)


def test_an_odd_number_of_rows_is_an_error(model: nn.Module) -> None:
    plain = model(**zoo.inputs(3))
    before = zoo.snapshot(model)
    with (
        pytest.raises(stg.CallError, match=r"3 rows cannot be \[uncond, cond\].*use batched_cfg=False"),
        stg.apply(model, [2], 1.0, batched_cfg=True),
    ):
        model(**zoo.inputs(3))
    assert zoo.snapshot(model) == before
    assert_close(model(**zoo.inputs(3)), plain, **exact)


# --- outputs ----------------------------------------------------------------------------------------------------------


class Output:
    """An object with `.sample` that nothing is known about."""

    def __init__(self, sample: Tensor, note: str) -> None:
        self.sample, self.note = sample, note


def test_an_output_object_that_the_model_keeps_is_not_written_into() -> None:
    kept: list[Output] = []

    def keep(t: Tensor) -> Output:
        kept.append(Output(t, "note"))
        return kept[-1]

    model, inputs = zoo.Styled(keep).eval(), zoo.inputs()
    plain = model(**inputs).sample
    with stg.apply(model, ["blocks.2"], 1.0):
        got = model(**inputs)
    assert got is not kept[1]
    assert_close(kept[1].sample, plain, **exact)


def test_diffusers_output_object_is_kept() -> None:
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    family = zoo.FAMILIES["wan"]
    model, inputs = family.build(), {**family.inputs(), "return_dict": True}
    cond, weak = model(**inputs).sample, zoo.without(model, ["blocks.1"], zoo.KeepHiddenStates)(**inputs).sample
    with stg.apply(model, [1], 1.0):
        got = model(**inputs)
    assert type(got) is Transformer2DModelOutput
    assert_close(got.sample, 2 * cond - weak, rtol=1e-4, atol=1e-4)
    assert_close(got[0], got.sample, **exact)


# --- whose calls ------------------------------------------------------------------------------------------------------


def test_the_weak_pass_of_a_guider_is_not_guided(model: nn.Module) -> None:
    """Its cond pass is a call of the module like any other."""
    inputs = zoo.inputs()
    cond, weak = model(**inputs), weak_of(model)(**inputs)
    guided = 2 * cond - weak  # what apply makes of the cond pass
    with stg.apply(model, [2], 1.0):
        got = stg.Guider(model, [2], 1.0)(**inputs)
    assert_close(got, guided + (guided - weak), **close)


def test_every_with_reports_that_it_guided_nothing() -> None:
    """Also the second one of the same object; only the outermost one where they are nested."""
    model: nn.Module = zoo.DiT()
    x = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    applied = stg.apply(model, [2])
    with torch.no_grad(), applied, applied:
        model(*x)
    with (
        pytest.warns(stg.StgWarning, match=r"guided nothing: the module made no call inside this `with`") as caught,
        applied,
    ):
        pass
    assert caught[0].filename == __file__
    with pytest.warns(stg.StgWarning, match="guided nothing"), stg.apply(model, [2], 1.0):
        model.forward(*x)  # past `__call__`, hence past all hooks
    with pytest.raises(stg.CallError, match="guided nothing"), stg.apply(model, [2], strict=True):
        pass


@pytest.mark.parametrize(
    "when",
    [
        {"sigma_range": (200, 800)},
        {"schedule": [(200, {}), (0, None)]},
        {"start": 0.35, "stop": 0.38},
        {"scale": lambda step: float(step.sigma > 500)},
    ],
)
def test_a_run_outside_all_windows_is_reported(when: dict[str, Any]) -> None:
    model: nn.Module = zoo.DiT()
    x = torch.randn(2, 5, 8), torch.randn(2, 5, 8)

    def run(steps: Sequence[int], **settings: Any) -> None:
        with torch.no_grad(), stg.apply(model, [2], strict=True, **settings) as applied:
            for index in steps:
                applied.step = stg.Step(index, 10, 1 - index / 10, "flow")
                model(*x)

    with pytest.raises(stg.CallError, match=r"guided nothing: the module made a whole run.*went from 1 to 0\.1\."):
        run(range(10), **when)
    run(range(5), **when)  # half a run
    run(range(10), start=0.5, stop=0.5)  # switched off
