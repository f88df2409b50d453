"""A Guider is a denoiser: two or three passes, the textbook's combination, whatever the denoiser looks like."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import stg_hooks as stg
from stg_hooks.modes.modes import MODES
from stg_hooks.passes.guided_call import is_checking
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


@pytest.fixture
def model() -> nn.Module:
    return zoo.build("plain")


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
        if is_checking():  # made once, to see whether passes can share work
            return output
        self.calls += [name for name, known in self._known.items() if torch.equal(known, output)] or ["unknown"]
        return output


# --- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_guided_prediction(model: nn.Module, rescale: float) -> None:
    p = parts(model)
    guider = stg.Guider(model, layers=[2], scale=1.5, guidance_scale=4.0, rescale=rescale)
    expected = p.uncond + 4.0 * (p.cond - p.uncond) + 1.5 * (p.cond - p.weak)
    if rescale:
        std, std_out = (t.std((1, 2), keepdim=True) for t in (p.cond, expected))
        expected = expected * (rescale * std / std_out + 1 - rescale)
    assert_close(guider(x=X, cond={"text": POSITIVE}, uncond={"text": NEGATIVE}), expected, **close)
    assert_close(guider(X, cond={"text": POSITIVE}, uncond={"text": NEGATIVE}), expected, **close)


@pytest.mark.parametrize("execution", ["auto", "full", "sequential", "batched"])
@pytest.mark.parametrize(
    ("name", "as_function"), [("plain", False), ("wrapped", True), ("unet", True), ("image_text", False)]
)
def test_every_execution_is_the_textbook(name: str, execution: str, as_function: bool) -> None:
    """One prompt or several, two branches, CFG and rescale; over the steps of a loop."""
    model, layer = zoo.build(name), zoo.ZOO[name].numbered[-1]
    first, last = zoo.ZOO[name].numbered[1], zoo.ZOO[name].numbered[-1]
    weak_models = zoo.without(model, [last]), zoo.without(model, [first, last])
    guider = stg.Guider(
        (lambda x, text: model(x, text)) if as_function else model,
        branches=[stg.Branch([layer], 1.5), stg.Branch([first, last], torch.tensor([0.5, 2.0]))],
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


def test_a_sampler_of_k_diffusion(model: nn.Module) -> None:
    """Called as `denoiser(x, sigma, **extra_args)`, with one sigma per sample."""

    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner_model = model

        def forward(self, x: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
            return x - sigma[:, None, None] * self.inner_model(x / (1 + sigma[:, None, None] ** 2) ** 0.5, text)

    def sample_euler(denoiser: Callable[..., Tensor], x: Tensor, sigmas: Tensor, extra_args: dict[str, Any]) -> Tensor:
        for sigma, following in itertools.pairwise(sigmas):
            denoised = denoiser(x, sigma * x.new_ones(len(x)), **extra_args)
            x = x + (x - denoised) / sigma * (following - sigma)
        return x

    denoiser, sigmas = Denoiser().eval(), torch.tensor([5.0, 2.0, 0.5, 0.0])
    weak_model = zoo.without(denoiser, ["inner_model.blocks.2"])

    def textbook(x: Tensor, sigma: Tensor) -> Tensor:
        cond, uncond = denoiser(x, sigma, POSITIVE), denoiser(x, sigma, NEGATIVE)
        return uncond + 3.0 * (cond - uncond) + 1.5 * (cond - weak_model(x, sigma, POSITIVE))

    guider = stg.Guider(denoiser, ["blocks.2"], 1.5, guidance_scale=3.0)
    got = sample_euler(guider, X, sigmas, {"cond": {"text": POSITIVE}, "uncond": {"text": NEGATIVE}})
    assert_close(got, sample_euler(textbook, X, sigmas, {}), rtol=1e-4, atol=1e-4)


def test_without_uncond(model: nn.Module) -> None:
    p = parts(model)
    expected = p.cond + 1.5 * (p.cond - p.weak)
    guider = stg.Guider(model, layers=[2], scale=1.5, guidance_scale=4.0)
    assert_close(guider(X, cond={"text": POSITIVE}), expected, **close)
    assert_close(guider(X, POSITIVE), expected, **close)  # everything may be passed to every call


def test_several_branches(model: nn.Module) -> None:
    p, other = parts(model), parts(model, ("blocks.0", "blocks.1")).weak
    branches = [stg.Branch([2], 1.5), stg.Branch(range(2), 0.5)]
    guider = stg.Guider(model, branches=branches, guidance_scale=4.0)
    expected = p.uncond + 4.0 * (p.cond - p.uncond) + 1.5 * (p.cond - p.weak) + 0.5 * (p.cond - other)
    assert_close(guider(X, cond={"text": POSITIVE}, uncond={"text": NEGATIVE}), expected, **close)


def test_a_callable_mode(model: nn.Module) -> None:
    p = parts(model)
    guider = stg.Guider(model, [2], 1.5, mode=lambda call: call.args[0])
    assert_close(guider(X, POSITIVE), p.cond + 1.5 * (p.cond - p.weak), **close)


def test_half_precision_is_kept(model: nn.Module) -> None:
    half = model.bfloat16()
    out = stg.Guider(half, [2], 1.5)(X.bfloat16(), POSITIVE.bfloat16())
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["expression", "image_text", "unet", "encoder", "two_stacks", "wrapped"])
def test_every_kind_of_model(name: str) -> None:
    model, layer = zoo.build(name), zoo.ZOO[name].numbered[-1]
    p = parts(model, (layer,))
    guider = stg.Guider(model, [-1], 1.5, guidance_scale=4.0)
    expected = p.uncond + 4.0 * (p.cond - p.uncond) + 1.5 * (p.cond - p.weak)
    for _ in range(2):
        assert_close(guider(X, cond={"text": POSITIVE}, uncond={"text": NEGATIVE}), expected, **close)


def test_scales_may_be_tensors(model: nn.Module) -> None:
    p = parts(model)
    scale, g = torch.tensor([1.0, 2.0]).reshape(2, 1, 1), torch.linspace(1.0, 3.0, zoo.TOKENS).reshape(1, -1, 1)
    expected = p.uncond + g * (p.cond - p.uncond) + scale * (p.cond - p.weak)
    guider = stg.Guider(model, [2], scale, guidance_scale=g)
    assert_close(guider(X, cond={"text": POSITIVE}, uncond={"text": NEGATIVE}), expected, **close)


def test_scales_may_be_one_value_per_sample(model: nn.Module) -> None:
    p = parts(model)
    scale, g = torch.tensor([0.0, 2.0]), torch.tensor([4.0, 1.0])
    expected = p.uncond + g[:, None, None] * (p.cond - p.uncond) + scale[:, None, None] * (p.cond - p.weak)
    guider = stg.Guider(model, [2], scale, guidance_scale=g)
    assert_close(guider(X, cond={"text": POSITIVE}, uncond={"text": NEGATIVE}), expected, **close)
    with pytest.raises(
        stg.SettingError, match=r"scale has shape \(3,\), which does not fit predictions of shape \(2, "
    ):
        stg.Guider(model, [2], torch.ones(3))(X, POSITIVE)


# --- which passes it makes --------------------------------------------------------------------------------------------


def test_the_weak_pass_uses_the_positive_prompt(model: nn.Module) -> None:
    """Trap 4; and the passes are exactly three."""
    log = Log(model)
    stg.Guider(log, [2], guidance_scale=4.0, model=model)(x=X, cond={"text": POSITIVE}, uncond={"text": NEGATIVE})
    assert sorted(log.calls) == ["cond", "uncond", "weak"]


def test_guidance_scale_one_makes_no_uncond_call_and_still_skips(model: nn.Module) -> None:
    """Trap 3."""
    log = Log(model)
    guider = stg.Guider(log, [2], 1.5, guidance_scale=1, model=model)
    p = parts(model)
    out = guider(x=X, cond={"text": POSITIVE}, uncond={"text": NEGATIVE})
    assert sorted(log.calls) == ["cond", "weak"]
    assert_close(out, p.cond + 1.5 * (p.cond - p.weak), **close)


def test_scale_zero_makes_no_weak_call_and_is_cfg_bit_for_bit(model: nn.Module) -> None:
    log, p = Log(model), parts(model)
    out = stg.Guider(log, [2], 0.0, guidance_scale=4.0, model=model)(
        x=X, cond={"text": POSITIVE}, uncond={"text": NEGATIVE}
    )
    assert sorted(log.calls) == ["cond", "uncond"]
    assert_close(out, p.uncond + 4.0 * (p.cond - p.uncond), **exact)


def test_a_branch_of_scale_zero_makes_no_weak_call(model: nn.Module) -> None:
    log, p = Log(model), parts(model)
    branches = [stg.Branch([0], 0.0), stg.Branch([2], 1.5)]
    assert_close(
        stg.Guider(log, branches=branches, model=model)(X, POSITIVE), p.cond + 1.5 * (p.cond - p.weak), **close
    )
    assert sorted(log.calls) == ["cond", "weak"]
    with pytest.raises(stg.LayerError, match=r"layers=\[9\]"):
        stg.Guider(model, branches=[stg.Branch([9], 0.0), stg.Branch([2], 1.5)])


def test_scale_zero_without_uncond_is_the_plain_prediction_bit_for_bit(model: nn.Module) -> None:
    log = Log(model)
    assert_close(stg.Guider(log, [2], 0, model=model)(X, POSITIVE), model(X, POSITIVE), **exact)
    assert log.calls == ["cond"]


def test_a_guider_inside_a_skip_guides_the_skipped_model(model: nn.Module) -> None:
    with_skip = zoo.without(model, ["blocks.0"])
    cond, weak = with_skip(X, POSITIVE), zoo.without(with_skip, ["blocks.2"])(X, POSITIVE)
    guider = stg.Guider(model, [2], 1.5)
    with stg.skip(model, [0]):
        assert_close(guider(X, POSITIVE), cond + 1.5 * (cond - weak), **close)


def test_one_guider_in_two_threads(model: nn.Module) -> None:
    p = parts(model)
    expected = p.uncond + 4.0 * (p.cond - p.uncond) + 1.5 * (p.cond - p.weak)
    guider = stg.Guider(model, [2], 1.5, guidance_scale=4.0)
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(guider, X, cond={"text": POSITIVE}, uncond={"text": NEGATIVE}) for _ in range(12)]
        jobs += [pool.submit(model, X, POSITIVE) for _ in range(4)]
    for job in jobs[:12]:
        assert_close(job.result(), expected, **close)
    for job in jobs[12:]:
        assert_close(job.result(), p.cond, **exact)


# --- what denoisers look like -----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Output:
    sample: Tensor
    note: str = "kept by nobody"


class Styled(nn.Module):
    """Returns its prediction in some wrapping."""

    def __init__(self, model: nn.Module, style: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.model, self.style = model, style

    def forward(self, x: Tensor, text: Tensor) -> Any:
        return self.style(self.model(x, text))


STYLES: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda t: t,
    "tuple": lambda t: (t,),
    "list": lambda t: [t],
    "object": Output,
    "with integers": lambda t: (t, torch.arange(3)),
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("as_function", [False, True])
def test_output_types(model: nn.Module, style: str, as_function: bool) -> None:
    p = parts(model)
    denoiser = Styled(model, STYLES[style])
    arguments: dict[str, Any] = {"model": model} if as_function else {}
    guider = stg.Guider(denoiser.forward if as_function else denoiser, ["blocks.2"], 1.5, **arguments)
    output = guider(X, POSITIVE)
    assert type(output) is type(denoiser(X, POSITIVE))
    prediction = output.sample if isinstance(output, Output) else output if isinstance(output, Tensor) else output[0]
    assert_close(prediction, p.cond + 1.5 * (p.cond - p.weak), **close)


def test_diffusers_output_object() -> None:
    family = zoo.FAMILIES["wan"]
    model, inputs = family.build(), {**family.inputs(), "return_dict": True}
    cond, weak = model(**inputs).sample, zoo.without(model, ["blocks.1"], zoo.KeepHiddenStates)(**inputs).sample
    assert_close(stg.Guider(model, [1], 1.5)(**inputs).sample, cond + 1.5 * (cond - weak), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_two_outputs_are_guided_separately(model: nn.Module, rescale: float) -> None:
    """Video and audio, say: each with its own difference and its own standard deviation."""
    guider = stg.Guider(
        Styled(model, lambda t: (t, 3 * t[:, :2])), ["blocks.2"], 1.5, guidance_scale=4.0, rescale=rescale
    )
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


# --- what it reports --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("execution", ["full", "sequential", "batched"])
def test_a_skip_that_changed_nothing_is_reported_once(model: nn.Module, execution: str) -> None:
    for weight in (model.blocks[2].attn.to_out, model.blocks[2].cross.to_out, model.blocks[2].ff):
        nn.init.zeros_(weight.weight)
        nn.init.zeros_(weight.bias)
    guider = stg.Guider(model, [2], 1.5, execution=execution)
    with pytest.warns(stg.StgWarning, match=r"stg\.Guider: skipping 'blocks\.2' changed nothing: the weak") as log:
        _ = [guider(X, POSITIVE) for _ in range(2)]
    assert len(log) == 1
    assert log[0].filename == __file__


@pytest.mark.parametrize("execution", ["full", "sequential", "batched"])
def test_a_layer_that_was_not_called_is_reported_once(model: nn.Module, execution: str) -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.unused = model, zoo.build("plain")

        def forward(self, x: Tensor, text: Tensor) -> Tensor:
            return self.model(x, text)

    guider = stg.Guider(Half(), ["unused.blocks.1", "model.blocks.2"], 1.5, execution=execution)
    p = parts(model)
    with pytest.warns(stg.StgWarning, match=r"the denoiser did not call 'unused\.blocks\.1', so nothing was sk") as log:
        results = [guider(X, POSITIVE) for _ in range(2)]
    for result in results:
        assert_close(result, p.cond + 1.5 * (p.cond - p.weak), **close)
    assert len(log) == 1


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

    model, sigmas = Denoiser(), torch.linspace(1.0, 0.0, 7)

    def flops(schedule: Any) -> list[int]:
        guider, found = stg.Guider(model, [2], guidance_scale=3.0, sigmas=sigmas, schedule=schedule), []
        for sigma in sigmas[:-1]:
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                guider(X, sigma.expand(len(X)), cond={"text": POSITIVE}, uncond={"text": NEGATIVE})
            found.append(counter.get_total_flops())
        return found

    assert flops(lambda step: {"layers": [3] if step.sigma < 0.5 else (1,)}) == flops(
        [(0.5, {"layers": [1]}), (0.0, {"layers": [3]})]
    )


def test_only_the_layers_used_last_are_kept() -> None:
    model = zoo.DiT()
    x = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    guider = stg.Guider(model, [2], schedule=lambda step: {"mode": lambda call: MODES["residual"](call)})
    for index in range(12):
        guider.step = stg.Step(index, 12)
        guider(*x)
    assert len(guider._executions._made) == 1 + 8


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
    assert len(guider._executions._made) == 3
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
