"""Guidance that changes during a run: by step, by noise level, by any function of both."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import stg_hooks as stg
from tests import zoo
from tests.pipelines import build, run, scheduler_inputs

WHEN: dict[str, tuple[dict[str, Any], list[float]]] = {
    "always": ({}, [0.5, 0.5, 0.5, 0.5]),
    "first half": ({"start": 0.0, "stop": 0.5}, [0.5, 0.5, 0, 0]),
    "the middle": ({"start": 0.25, "stop": 0.75}, [0, 0.5, 0.5, 0]),
    "start between steps": ({"start": 0.26}, [0, 0, 0.5, 0.5]),
    "last step": ({"stop": 1.0, "start": 0.75}, [0, 0, 0, 0.5]),
    "never": ({"start": 0.5, "stop": 0.5}, [0, 0, 0, 0]),
    "range of noise": ({"sigma_range": (0.5, 0.75)}, [0, 0.5, 0.5, 0]),
    "range and window": ({"sigma_range": (0.5, 0.75), "stop": 0.5}, [0, 0.5, 0, 0]),
    "function": ({"schedule": lambda step: {"scale": step.index}}, [0, 1, 2, 3]),
    "function that gives None": ({"schedule": lambda step: None if step.sigma > 0.6 else {}}, [0, 0, 0.5, 0.5]),
    "list": ({"schedule": [(1.0, None), (0.7, {"scale": 2.0}), (0.3, {"scale": 1.0})]}, [0, 2, 1, 1]),
    "list without layers": ({"schedule": [(0.5, {"layers": []}), (0.0, {})]}, [0, 0, 0, 0.5]),
}


@pytest.mark.parametrize("name", WHEN)
def test_what_holds_when(name: str, model: nn.Module) -> None:
    when, expected = WHEN[name]
    guider = stg.Guider(model, [1], 0.5, **when)
    for index in range(4):
        guider.step = stg.Step(index, 4, 1.0 - index / 4, "flow")
        guider(torch.randn(2, 5, 8), torch.randn(2, 5, 8))
    scales = {row.step.index: sum(row.scales) for row in guider.trace}
    assert [scales.get(index, 0) for index in range(4)] == expected


@pytest.mark.parametrize(
    ("when", "missing"),
    [
        ({"stop": 0.5}, "index and count"),
        ({"sigma_range": (0.1, 0.2)}, "sigma"),
        ({"schedule": [(0.5, {})]}, "sigma"),
    ],
)
def test_what_is_not_known_of_a_step_is_asked_for(when: dict[str, Any], missing: str) -> None:
    model = zoo.DiT()
    x = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    guider = stg.Guider(model, [2], **when)
    with pytest.raises(stg.CallError, match=rf"the step's {missing} is not known.*guider\.step = stg\.Step\("):
        guider(*x)
    asked = rf"{missing} is not known.*applied\.step = stg\.Step"
    with pytest.raises(stg.CallError, match=asked), stg.apply(model, [2], **when):
        model(*x)


def test_a_function_that_needs_what_is_not_known_of_a_step(model: nn.Module) -> None:
    x = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    with pytest.raises(stg.CallError, match=r"function of the step failed .*'NoneType'.*count, sigma, fraction is not"):
        stg.Guider(model, [2], scale=lambda step: 1.0 - step.fraction)(*x)

    def nothing() -> dict[str, Any]:
        return {}

    with pytest.raises(TypeError, match="argument"):  # a mistake of its own stays one
        stg.Guider(model, [2], schedule=nothing)(*x)  # type: ignore[arg-type]


@pytest.mark.parametrize("on", ["cond", "uncond"])
@pytest.mark.parametrize("bad", [3, (0, 4), stg.Step(4, 4), stg.Step(-1, 4)])
def test_steps_that_are_none(bad: Any, on: str, model: nn.Module) -> None:
    x = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    guider = stg.Guider(model, [2], on=on, guidance_scale=2.0)
    guider.step = bad
    with pytest.raises(stg.SettingError, match=r"^step=.*(expected stg\.Step\(index|count from 0 to count - 1)"):
        guider(x[0], cond={"text": x[1]}, uncond={"text": x[1]})
    with stg.apply(model, [2], on=on, batched_cfg=True) as applied:
        applied.step = bad
        with pytest.raises(stg.SettingError, match=r"^step="):
            model(*x)
        applied.step = None
        model(*x)


# --- in pipelines ---


@pytest.mark.parametrize("family", ["ltx", "wan", "hunyuan_video", "mochi", "cogvideox"])
def test_every_pipeline_tells_its_steps(family: str) -> None:
    pipe, call, case = build(family)
    seen: list[stg.Step] = []
    with stg.apply(pipe, case.layers, schedule=lambda step: seen.append(step)) as session:
        run(pipe, call)
    assert [step.index for step in seen] == list(range(case.steps))
    assert {step.count for step in seen} == {case.steps}
    levels = [step.sigma for step in seen]
    assert all(high > low for high, low in itertools.pairwise(levels))
    if family == "cogvideox":
        assert {step.kind for step in seen} == {"ddpm"}
        assert levels[0] > 1
    else:
        assert {step.kind for step in seen} == {"flow"}
        assert 0.9 < levels[0] <= 1
    assert session.stats.weak_passes == 0
    assert session.stats.calls == case.steps * (2 if family == "wan" else 1)


@pytest.mark.parametrize("execution", ["sequential", "batched", "full"])
def test_another_layer_and_scale_in_each_step(execution: str, model: nn.Module) -> None:
    layers, scale = [[1], [3], [0, 2], [1]], [0.5, 2.0, 1.0, 0.25]
    schedule = lambda step: {"layers": layers[step.index], "scale": scale[step.index]}  # noqa: E731
    x = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    with torch.no_grad():
        plain = model(*x)
        with stg.apply(model, [0], schedule=schedule, execution=execution) as session:
            for index in range(4):
                session.step = stg.Step(index, 4)
                weak = zoo.without(model, [f"blocks.{i}" for i in layers[index]], zoo.Keep)(*x)
                assert_close(model(*x), stg.combine(plain, weak, scale=scale[index]), rtol=1e-5, atol=1e-5)
            assert session.stats.weak_passes == 4
            with session:  # entered once more: what the schedule asked for in there goes with it
                session.step = stg.Step(1, 4)
                inside = model(*x)
            assert torch.equal(model(*x), inside)
        assert torch.equal(model(*x), plain)


# --- every ---


def test_a_guider_uses_differences_again(model: nn.Module) -> None:
    """What is added in a step is `scale * (cond - weak)` of the step that was evaluated; a new run evaluates."""
    inputs = [torch.randn(2, 2, 5, 8).unbind(0) for _ in range(5)]
    weak_model = zoo.without(model, ["blocks.2"])
    guider = stg.Guider(model, [2], scale=lambda step: 1.0 + step.index, every=2)
    for run_of in (inputs, inputs[:1], inputs[:3]):  # the second one ends right after an evaluation
        for index, x in enumerate(run_of):
            guider.step = stg.Step(index, 5)
            evaluated = inputs[index - index % 2]
            difference = model(*evaluated) - weak_model(*evaluated)
            assert_close(guider(*x), model(*x) + (1.0 + index) * difference, rtol=1e-4, atol=1e-4)
    assert guider.stats.weak_passes == 3 + 1 + 2
    assert guider.stats.guided_calls == len(guider.trace) == 9
    guider.step = None
    with pytest.raises(stg.CallError, match=r"every=2 counts steps, but the step's index is not known here"):
        stg.Guider(model, [2], every=2)(*inputs[0])
    with pytest.raises(stg.CallError, match="every=2 counts steps"), stg.apply(model, [2], every=2):
        model(*inputs[0])


@pytest.mark.parametrize("make", [stg.Guider, stg.apply])
def test_windows_of_one_step_are_not_mixed_up(make: Any, model: nn.Module) -> None:
    """A second call at the same step cannot be told from the first; windows of other shapes neither."""
    one, other, longer = (torch.randn(2, 1, n, 8).unbind(0) for n in (5, 5, 7))

    def steps(*windows: Any) -> list[list[Tensor]]:
        session = make(model, [2], every=2)
        made = []
        with session if make is stg.apply else nullcontext():
            for index in range(3):
                session.step = stg.Step(index, 3)
                made.append([(session if make is stg.Guider else model)(*window) for window in windows])
        return made

    with torch.no_grad():
        assert len(steps(one)) == 3
        with pytest.raises(
            stg.CallError, match=r"every=2 remembers one call .* is the second one at step 1\. For windows"
        ):
            steps(one, other)
        with pytest.raises(stg.CallError, match=r"differences of step 0 again, of the shapes .*\(1, 7, 8\).* predicts"):
            steps(one, longer)


def test_evaluations_of_one_step_are_told_apart_by_their_noise_levels(model: nn.Module) -> None:
    x = torch.randn(2, 2, 5, 8).unbind(0)
    guider = stg.Guider(model, [2], every=3)
    with torch.no_grad():
        for index in range(3):
            for sigma in (3.0 - index, 2.5 - index):
                guider.step = stg.Step(index, 3, sigma)
                guider(*x)
    assert guider.stats.guided_calls == 6
    assert guider.stats.weak_passes == 4  # both of the first step, and of the third


def test_differences_of_another_run_are_not_used(model: nn.Module) -> None:
    """A run that ended early leaves differences of step 2; the next one is first guided later than that."""
    x, other = torch.randn(2, 2, 2, 5, 8).unbind(0)
    guider = stg.Guider(model, [2], every=5, schedule=lambda step: {} if step.index in (2, 3) else None)
    with torch.no_grad():
        for indices, inputs in ((range(3), x), ((0, 1, 3), other)):
            for index in indices:
                guider.step = stg.Step(index, 5)
                guided = guider(*inputs)
        with stg.skip(model, [2]):
            weak = model(*other)
        assert_close(guided, 2 * model(*other) - weak)


def test_the_same_layers_written_otherwise_are_the_same(model: nn.Module) -> None:
    x = torch.randn(2, 2, 5, 8).unbind(0)
    layers: list[Any] = [[2], (2,), 2, [[2]]]
    guider = stg.Guider(model, [2], every=4, schedule=lambda step: {"layers": layers[step.index], "mode": "residual"})
    with torch.no_grad():
        for index in range(4):
            guider.step = stg.Step(index, 4)
            guider(*x)
    assert guider.stats.weak_passes == 1


def test_gradients_stay_in_their_step(model: nn.Module) -> None:
    x = torch.randn(2, 2, 5, 8).unbind(0)
    guider = stg.Guider(model, [2], every=2)
    found = []
    for index in range(2):
        guider.step = stg.Step(index, 2)
        found.append(torch.autograd.grad(guider(*x).square().sum(), model.parameters()))
    with torch.no_grad():
        difference = model(*x) - zoo.without(model, ["blocks.2"])(*x)
    expected = torch.autograd.grad((model(*x) + difference).square().sum(), model.parameters())
    assert_close(found[1], expected, rtol=1e-4, atol=1e-4)


# --- trace ---


@pytest.mark.parametrize("cfg", [True, False])
def test_the_trace_of_a_pipeline(cfg: bool) -> None:
    pipe, call, case = build("wan")
    rows: list[float] = []

    def look(*_: Any) -> dict[str, Any]:
        rows.append(session.trace[-1].size)
        return {}

    with stg.apply(pipe, case.layers, 0.5) as session:
        run(pipe, call, callback_on_step_end=look, **({} if cfg else {"guidance_scale": 1.0}))
    assert [row.step.index for row in session.trace] == list(range(case.steps))
    assert rows == [row.size for row in session.trace[:]]
    assert all(row.scales == (0.5,) and row.size > 0 for row in session.trace)
    assert all((row.cosine is not None) == cfg for row in session.trace)
    if cfg:
        assert all(-1 <= row.cosine <= 1 for row in session.trace)


def test_the_trace_measures_what_it_says(model: nn.Module) -> None:
    x, cond, uncond = torch.randn(3, 2, 5, 8).unbind(0)
    guider = stg.Guider(model, [2], 0.7, guidance_scale=3.0)
    guider(x, cond={"text": cond}, uncond={"text": uncond})
    c, u = model(x, cond), model(x, uncond)
    with stg.skip(model, [2]):
        term = 0.7 * (c - model(x, cond))
    assert guider.trace[0].size == pytest.approx((term.norm() / c.norm()).item(), rel=1e-4)
    cosine = (term * (c - u)).sum() / term.norm() / (c - u).norm()
    assert guider.trace[0].cosine == pytest.approx(cosine.item(), abs=1e-4)


@pytest.fixture
def model() -> nn.Module:
    return zoo.DiT()


# --- a module, and a loop of one's own ---


def test_numbers_of_numpy_are_numbers(model: nn.Module) -> None:
    np = pytest.importorskip("numpy")
    x, cond, uncond = torch.randn(3, 2, 5, 8).unbind(0)

    class Denoiser(nn.Module):
        def forward(self, x: Tensor, sigma: Any, text: Tensor) -> Tensor:
            return inner(x, text)

    inner = model
    with torch.no_grad():
        weak = zoo.without(model, ["blocks.1", "blocks.2"])(x, cond)
        expected = stg.combine(model(x, cond), weak, model(x, uncond), scale=1.5, guidance_scale=3.0, rescale=0.5)
        for layers in (np.arange(1, 3), [np.int64(1), np.int64(2)], map(int, "12"), (i for i in (2, 1)), {1, 2}):
            numbers = {"guidance_scale": np.float32(3), "rescale": np.float16(0.5)}
            guider = stg.Guider(
                Denoiser(), layers, np.float32(1.5), **numbers, model=model, sigma_range=(np.float32(1), np.float32(2))
            )
            got = guider(x, np.float32(1.5), cond={"text": cond}, uncond={"text": uncond})
            assert_close(got, expected, rtol=1e-4, atol=1e-4)
            assert guider.stats.guided_calls == 1
    for endless in (itertools.count(), itertools.repeat(1)):
        with pytest.raises(stg.TargetError, match="more than 10000 layers"):
            stg.apply(model, endless)


# --- weights that are tensors ---


@pytest.mark.parametrize("family", ["ltx", "wan"])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_pipeline_may_be_called_with_a_weight_in_a_tensor(family: str, shape: tuple[int, ...]) -> None:
    pipe, call, case = build(family)
    received = []
    for g in (3.0, torch.full(shape, 3.0)):
        with scheduler_inputs(pipe) as inputs, stg.apply(pipe, case.layers, 1.5, rescale=0.7) as applied:
            run(pipe, call, guidance_scale=g)
        assert applied.stats.weak_passes == case.steps
        received.append(inputs)
    assert_close(received[1], received[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["ltx", "wan"])
def test_a_weight_for_each_video(family: str) -> None:
    """Scale and CFG weight of a schedule, one value per video: as if each had been sampled alone."""
    pipe, call, case = build(family)
    call |= {"num_inference_steps": 2}
    both = {name: torch.cat([value, value]) for name, value in call.items() if isinstance(value, Tensor)}
    scale, g = torch.tensor([0.5, 2.0]), torch.tensor([2.0, 5.0])
    values = {"scale": scale, "guidance_scale": g, "rescale": 0.5}
    latents = torch.randn(2, *case.expected["base"].shape[1:], generator=torch.Generator().manual_seed(0))
    with stg.apply(pipe, case.layers, schedule=lambda step: values):
        together = run(pipe, call | both, latents=latents)
    for i in range(2):
        one = {"scale": scale[i].item(), "guidance_scale": g[i].item(), "rescale": 0.5}
        with stg.apply(pipe, case.layers, schedule=lambda step, one=one: one):
            alone = run(pipe, call, latents=latents[i : i + 1])
        assert_close(together[i : i + 1], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("g", [0.0, 2.5, torch.tensor([2.5]), torch.tensor([2.5, 1.0])])
def test_any_weight_without_an_uncond_prediction_is_refused(g: Any) -> None:
    pipe, call, case = build("ltx")
    with (
        pytest.raises(stg.CallError, match=r"guidance_scale=.*: LTXPipeline makes no uncond prediction"),
        stg.apply(pipe, case.layers, schedule=lambda step: {"guidance_scale": g}),
    ):
        run(pipe, call, guidance_scale=1.0)
