"""A Guider is a denoiser: two or three passes, the textbook's combination, whatever the denoiser looks like."""

from __future__ import annotations

import copy
import dataclasses
import gc
import warnings
import weakref
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import stg_hooks as stg
from benchmarks import measure
from tests import zoo

exact: dict[str, Any] = {"rtol": 0, "atol": 0}
close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
X, POSITIVE = zoo.inputs().values()
NEGATIVE = zoo.inputs(seed=7)["text"]


@dataclasses.dataclass
class Parts:
    """The predictions that the textbook needs, computed with blocks replaced by hand."""

    cond: Tensor
    weak: Tensor
    uncond: Tensor


def parts(model: nn.Module, names: tuple[str, ...] = ("blocks.2",)) -> Parts:
    weak_model = zoo.without(model, names)
    return Parts(model(X, POSITIVE), weak_model(X, POSITIVE), model(X, NEGATIVE))


class Log:
    """A denoiser that is no module, and notes with which prompt and on which model (plain or weak) it was called."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.calls: list[str] = []
        weak_model = zoo.without(model, ["blocks.2"])
        self._known = {
            "cond": model(X, POSITIVE),
            "weak": weak_model(X, POSITIVE),
            "uncond": model(X, NEGATIVE),
            "weak uncond": weak_model(X, NEGATIVE),
        }

    def __call__(self, x: Tensor, text: Tensor) -> Tensor:
        output = self.model(x, text)
        self.calls += [name for name, known in self._known.items() if torch.equal(known, output)] or ["unknown"]
        return output


# --- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("execution", ["auto", "full", "sequential", "batched"])
@pytest.mark.parametrize(
    ("name", "as_function"),
    [
        *((name, False) for name in ("plain", "expression", "image_text", "encoder", "two_stacks")),
        *((name, True) for name in ("wrapped", "unet")),
    ],
)
def test_every_execution_is_the_textbook(name: str, execution: str, as_function: bool) -> None:
    """One prompt or several, two branches, CFG and rescale; over the steps of a loop."""
    model, (_, first, *_, last) = zoo.build(name), zoo.ZOO[name].numbered
    weak_models = zoo.without(model, [last]), zoo.without(model, [first, last])
    guider = stg.Guider(
        (lambda x, text: model(x, text)) if as_function else model,
        branches=[stg.Branch([-1], 1.5), stg.Branch([first, last], torch.tensor([0.5, 2.0]))],
        guidance_scale=4.0,
        rescale=0.7,
        model=model,
        execution=execution,
    )
    for step in range(3):
        x = X + step
        cond, uncond = model(x, POSITIVE), model(x, NEGATIVE)
        one, two = (weak(x, POSITIVE) for weak in weak_models)
        out = uncond + 4.0 * (cond - uncond) + 1.5 * (cond - one)
        out = out + torch.tensor([0.5, 2.0]).reshape(2, 1, 1) * (cond - two)
        std, std_out = (t.std((1, 2), keepdim=True) for t in (cond, out))
        expected = out * (0.7 * std / std_out + 0.3)
        assert_close(guider(x, cond={"text": POSITIVE}, uncond={"text": NEGATIVE}), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("execution", ["full", "sequential", "batched"])
def test_nan_is_handed_on_where_it_is_and_forgotten_in_the_next_call(model: nn.Module, execution: str) -> None:
    guider = stg.Guider(model, [2], 1.5, execution=execution)
    p = parts(model)
    broken = X.clone()
    broken[0, 0, 0] = torch.nan
    for _ in range(2):
        out = guider(broken, POSITIVE)
        assert out[0].isnan().all()
        assert_close(out[1], (p.cond + 1.5 * (p.cond - p.weak))[1], **close)
        assert_close(guider(X, POSITIVE), p.cond + 1.5 * (p.cond - p.weak), **close)


@pytest.mark.parametrize("execution", ["full", "sequential", "batched"])
def test_a_weak_pass_of_nan_is_not_hidden(model: nn.Module, execution: str) -> None:
    guider = stg.Guider(model, [2], 1.5, mode=lambda call: call.args[0] * torch.nan, execution=execution)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stg.StgWarning)  # batched execution may take it for rows cut wrongly
        assert guider(X, POSITIVE).isnan().all()


@pytest.mark.parametrize("training", [False, True])
def test_training_modes_make_no_difference_to_what_is_run(model: nn.Module, training: bool) -> None:
    """A block in training mode stays in it, in all passes."""
    seen: list[bool] = []
    model.train(training)
    handle = model.blocks[3].register_forward_pre_hook(lambda block, _: seen.append(block.training))
    p = parts(model)
    seen.clear()
    out = stg.Guider(model, [2], 1.5, guidance_scale=4.0)(X, cond={"text": POSITIVE}, uncond={"text": NEGATIVE})
    handle.remove()
    assert_close(out, p.uncond + 4.0 * (p.cond - p.uncond) + 1.5 * (p.cond - p.weak), **close)
    assert seen == [training] * 4  # one of them is made once, to see whether passes can share work


# --- which passes it makes --------------------------------------------------------------------------------------------

PASSES: dict[str, tuple[dict[str, Any], bool, str, Callable[[Parts], Tensor]]] = {
    # settings, whether there is an uncond, the calls, and the prediction
    "with CFG": (
        {"scale": 1.5, "guidance_scale": 4.0},
        True,
        "cond uncond weak",
        lambda p: p.uncond + 4.0 * (p.cond - p.uncond) + 1.5 * (p.cond - p.weak),
    ),
    "without uncond": (
        {"scale": 1.5, "guidance_scale": 4.0},
        False,
        "cond weak",
        lambda p: p.cond + 1.5 * (p.cond - p.weak),
    ),
    "guidance_scale 1": (
        {"scale": 1.5, "guidance_scale": 1},
        True,
        "cond weak",
        lambda p: p.cond + 1.5 * (p.cond - p.weak),
    ),
    "one branch of scale 0": (
        {"layers": None, "branches": [stg.Branch([0], 0.0), stg.Branch([2], 1.5)]},
        False,
        "cond weak",
        lambda p: p.cond + 1.5 * (p.cond - p.weak),
    ),
    "scale 0": (
        {"scale": 0.0, "guidance_scale": 4.0},
        True,
        "cond uncond",
        lambda p: p.uncond + 4.0 * (p.cond - p.uncond),
    ),
    "scale 0 without uncond": ({"scale": 0}, False, "cond", lambda p: p.cond),
}


@pytest.mark.parametrize("name", PASSES)
def test_the_passes_are_those_that_the_prediction_needs(model: nn.Module, name: str) -> None:
    """Traps 3 and 4: weak passes use the positive prompt, also where there is no uncond; scale 0 changes no bit."""
    settings, uncond, calls, expected = PASSES[name]
    log = Log(model)
    guider = stg.Guider(log, **{"layers": [2], **settings}, model=model)
    for _ in range(2):  # in the first call, a pass is made to see whether passes can share work
        log.calls.clear()
        got = guider(x=X, cond={"text": POSITIVE}, **({"uncond": {"text": NEGATIVE}} if uncond else {}))
    assert " ".join(sorted(log.calls)) == calls
    assert_close(got, expected(parts(model)), **(close if "weak" in calls else exact))


# --- what denoisers look like -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_two_outputs_are_guided_separately(model: nn.Module, rescale: float) -> None:
    """Video and audio, say: each with its own difference and its own standard deviation."""
    guider = stg.Guider(zoo.Styled(lambda t: (t, 3 * t[:, :2])), ["blocks.2"], 1.5, guidance_scale=4.0, rescale=rescale)
    video, audio = guider(X, cond={"text": POSITIVE}, uncond={"text": NEGATIVE})
    p = parts(model)
    for got, pick in ((video, lambda t: t), (audio, lambda t: 3 * t[:, :2])):
        cond, weak, uncond = pick(p.cond), pick(p.weak), pick(p.uncond)
        expected = uncond + 4.0 * (cond - uncond) + 1.5 * (cond - weak)
        if rescale:
            factor = cond.std((1, 2), keepdim=True) / expected.std((1, 2), keepdim=True)
            expected = expected * (rescale * factor + 1 - rescale)
        assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::stg_hooks.StgWarning")  # that these denoisers do not call the model
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_the_result_is_a_fresh_tensor(model: nn.Module, scale: float) -> None:
    """A loop may write into what it gets, also where the denoiser returns a tensor it keeps, or its own input."""
    kept = torch.ones(2, 3)
    guider = stg.Guider(lambda x: kept, [2], scale, model=model)
    guider(X).mul_(7.0)
    assert_close(kept, torch.ones(2, 3), **exact)
    echo = X.clone()
    stg.Guider(lambda x: x, [2], scale, model=model)(echo).mul_(7.0)
    assert_close(echo, X, **exact)


def test_any_mapping_will_do(model: nn.Module) -> None:
    p = parts(model)
    guider = stg.Guider(model, [2], 1.5, guidance_scale=4.0)
    got = guider(X, cond=MappingProxyType({"text": POSITIVE}), uncond=MappingProxyType({"text": NEGATIVE}))
    assert_close(got, p.uncond + 4.0 * (p.cond - p.uncond) + 1.5 * (p.cond - p.weak), **close)


def test_an_empty_uncond_is_not_a_missing_one() -> None:
    """`uncond={}`: a prediction without the prompt whose arguments have defaults."""
    model = zoo.build("plain")
    guider = stg.Guider(lambda x, text=NEGATIVE: model(x, text), [2], 0.0, guidance_scale=4.0, model=model)
    p = parts(model)
    assert_close(guider(X, cond={"text": POSITIVE}, uncond={}), p.uncond + 4.0 * (p.cond - p.uncond), **exact)


# --- what it refuses --------------------------------------------------------------------------------------------------


def test_an_argument_given_twice(model: nn.Module) -> None:
    guider = stg.Guider(model, [2], guidance_scale=4.0)
    with pytest.raises(stg.SettingError, match=r"^text: given both as an argument and in cond\. Leave one out\.$"):
        guider(X, text=POSITIVE, cond={"text": POSITIVE})
    with pytest.raises(stg.SettingError, match="text, x: given both as an argument and in uncond"):
        guider(x=X, text=POSITIVE, uncond={"text": NEGATIVE, "x": X})


@pytest.mark.parametrize("bad", [POSITIVE, [("text", POSITIVE)], "prompt"], ids=["tensor", "list", "string"])
@pytest.mark.parametrize("name", ["cond", "uncond"])
def test_conditions_that_are_no_mapping(model: nn.Module, name: str, bad: Any) -> None:
    guider = stg.Guider(model, [2], guidance_scale=4.0)
    with pytest.raises(
        stg.TargetError, match=rf"{name} must be a mapping of keyword arguments.* not {type(bad).__name__}"
    ):
        guider(X, **{"text": POSITIVE, name: bad} if name == "uncond" else {name: bad})


def test_an_output_without_a_prediction(model: nn.Module) -> None:
    with pytest.raises(stg.CallError, match="the denoiser returned a str without a floating-point tensor"):
        stg.Guider(lambda x: "video", [2], model=model)(X)


def test_an_error_of_the_denoiser_is_passed_on(model: nn.Module) -> None:
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'text'"):
        stg.Guider(model, [2])(X)


# --- what a schedule asks for ---


def test_layers_of_a_function_cost_as_much_as_those_of_a_list() -> None:
    """What was found out about layers is kept from one call to the next: rows are checked once."""

    class Denoiser(zoo.DiT):
        def forward(self, x: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
            return super().forward(x, text)

    sigmas = torch.linspace(1.0, 0.0, 7)

    def flops(schedule: Any) -> list[int]:
        model = Denoiser()  # of which nothing is known yet
        guider, found = stg.Guider(model, [2], guidance_scale=3.0, sigmas=sigmas, schedule=schedule), []
        for sigma in sigmas[:-1]:
            conditions: dict[str, Any] = {"cond": {"text": POSITIVE}, "uncond": {"text": NEGATIVE}}
            with torch.no_grad():
                found.append(measure.flops(lambda: guider(X, sigma.expand(len(X)), **conditions)))  # noqa: B023
        return found

    assert flops(lambda step: {"layers": [3] if step.sigma < 0.5 else (1,)}) == flops(
        [(0.5, {"layers": [1]}), (0.0, {"layers": [3]})]
    )


def test_only_the_layers_used_last_are_kept() -> None:
    model = zoo.DiT()
    x = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    guider = stg.Guider(model, [2], schedule=lambda step: {"mode": lambda call: call.args[0]})
    for index in range(12):
        guider.step = stg.Step(index, 12)
        guider(*x)
    assert len(guider._predictor._made) == 1 + 8


def test_nothing_of_a_call_is_kept_with_its_layers() -> None:
    class Watched(zoo.DiT):
        def forward(self, x: Tensor, text: Tensor) -> Tensor:
            seen.append(weakref.ref(x))
            for block in self.blocks:
                x = block(x, text)
                seen.append(weakref.ref(x))
            return x

    seen: list[weakref.ref[Tensor]] = []
    guider = stg.Guider(Watched(), [2], schedule=lambda step: {"layers": [step.index]})
    for index in range(1, 4):
        guider.step = stg.Step(index, 4)
        guider(torch.randn(2, 5, 8), torch.randn(2, 5, 8)).sum().backward()
    gc.collect()
    assert len(guider._predictor._made) == 3
    assert len(seen) > 12
    assert not any(ref() is not None for ref in seen)


@dataclasses.dataclass
class Weakened:
    """A mode that cannot be hashed."""

    by: float

    def __call__(self, call: Any) -> Any:
        return call.args[0] + (1 - self.by) * (call.compute() - call.args[0])


def test_a_mode_need_not_be_hashable() -> None:
    model = zoo.DiT()
    x = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    mode = Weakened(1.0)
    with torch.no_grad():
        expected = stg.Guider(model, [2])(*x)
        guider = stg.Guider(model, [2], mode=mode)
        assert_close(guider(*x), expected)
        with stg.apply(model, [2], mode=mode):
            assert_close(model(*x), expected)
        mode.by = 0.0  # looked at in every call
        assert_close(guider(*x), model(*x))


def test_a_guider_that_is_entered_prepares_the_model_once(model: nn.Module) -> None:
    both: dict[str, Any] = {"cond": {"text": POSITIVE}, "uncond": {"text": NEGATIVE}}
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    plain, expected = model(X, POSITIVE), stg.Guider(model, [2], guidance_scale=3.0)(X, **both)
    guider = stg.Guider(model, [2], guidance_scale=3.0)
    with guider as entered:
        assert entered is guider
        forwards = [block.forward for block in model.blocks]
        for _ in range(3):
            assert_close(guider(X, **both), expected, rtol=0, atol=0)
            assert [block.forward for block in model.blocks] == forwards
        assert_close(model(X, POSITIVE), plain, rtol=0, atol=0)
        assert_close(copy.deepcopy(model)(X, POSITIVE), plain, rtol=0, atol=0)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert_close(guider(X, **both), expected, rtol=0, atol=0)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    with pytest.raises(stg.CallError, match="without having been entered"):
        guider.__exit__(None, None, None)
