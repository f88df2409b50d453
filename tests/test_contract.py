"""One contract for all faces: the same settings give the same predictions, counts, trace and warnings.

A small video-like model is sampled by one Euler loop through `apply` on a module, `apply` on a pipeline, `Guider` in a
loop of one's own, and `Guider` as a denoiser of k-diffusion. The first column of the comparison is a textbook that
makes each prediction in a pass of its own.
"""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import diffusers
import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor, nn
from torch.testing import assert_close

import stg_hooks as stg
from stg_hooks.guidance import rules
from tests import kdiffusion, zoo

K = kdiffusion.load()
SIGMAS = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.0])
STEPS = len(SIGMAS) - 1
G = 3.0
close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


class Model(nn.Module):
    """Predicts the clean sample from tokens (B, N, D), the noise level and a text."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = zoo.DiT()
        self.bad_below = 0.0
        """Below this noise level it predicts NaN."""

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        level = t.reshape(-1, 1, 1) / 8
        out = self.inner(x / 8 + level, text + level)
        return torch.where(level * 8 < self.bad_below, math.nan, out)


class Denoiser(Model):
    """The same, called as samplers of k-diffusion call it; its errors name it the same."""

    def forward(self, x: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        return super().forward(x, sigma, text)


Denoiser.__name__ = "Model"


class Scheduler(ConfigMixin):
    """Euler's method on predictions of the clean sample."""

    config_name = "scheduler_config.json"

    @register_to_config
    def __init__(self) -> None:
        self.sigmas, self.timesteps = SIGMAS, SIGMAS[:-1]

    def step(self, prediction: Tensor, t: Tensor, sample: Tensor) -> Tensor:
        i = int((t < self.sigmas[:-1]).sum())
        return sample + (sample - prediction) / t * (self.sigmas[i + 1] - t)


class Pipeline(diffusers.DiffusionPipeline):
    def __init__(self, transformer: nn.Module, scheduler: Scheduler) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)


class OneCall(Pipeline):
    def __call__(
        self, latents: Tensor, prompt_embeds: Tensor, negative: Tensor, guidance_scale: float, note: Callable[..., None]
    ) -> None:
        prompt_embeds = torch.cat([negative, prompt_embeds])
        timesteps = self.scheduler.timesteps
        for i, t in enumerate(timesteps):  # noqa: B007 - read by name from the running frame
            latent_model_input = torch.cat([latents] * 2)
            noise_pred = self.transformer(latent_model_input, t.expand(4), prompt_embeds)
            noise_pred_uncond, noise_pred_text = noise_pred.chunk(2)
            noise_pred = noise_pred_uncond + guidance_scale * (noise_pred_text - noise_pred_uncond)
            note(noise_pred)
            latents = self.scheduler.step(noise_pred, t, latents)


class TwoCalls(Pipeline):
    def __call__(
        self, latents: Tensor, prompt_embeds: Tensor, negative: Tensor, guidance_scale: float, note: Callable[..., None]
    ) -> None:
        timesteps = self.scheduler.timesteps
        for i, t in enumerate(timesteps):  # noqa: B007 - read by name from the running frame
            noise_pred = self.transformer(latents, t.expand(2), prompt_embeds)
            noise_uncond = self.transformer(latents, t.expand(2), negative)
            noise_pred = noise_uncond + guidance_scale * (noise_pred - noise_uncond)
            note(noise_pred)
            latents = self.scheduler.step(noise_pred, t, latents)


def latents() -> Tensor:
    return 8 * zoo.inputs(2, seed=1)["x"]


def texts() -> tuple[Tensor, Tensor]:
    return zoo.inputs(2, seed=2)["text"], zoo.inputs(2, seed=3)["text"]


def build(cls: type[Model] = Model, bad_below: float = 0.0) -> Model:
    torch.manual_seed(0)
    model = cls().eval().requires_grad_(False)
    model.bad_below = bad_below
    return model


def step_of(i: int) -> stg.Step:
    return stg.Step(i, STEPS, SIGMAS[i].item(), "karras")


def euler(predict: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
    """Sample, and return what was predicted in each step."""
    x, found, scheduler = latents(), [], Scheduler()
    for i, t in enumerate(scheduler.timesteps):
        found.append(predict(i, x))
        x = scheduler.step(found[-1], t, x)
    return found


@dataclasses.dataclass
class Run:
    """What a face did and said."""

    predictions: list[Tensor]
    guidance: Any = None
    said: list[str] = dataclasses.field(default_factory=list)
    error: str = ""


Settings = Mapping[str, Any]


def module_face(model: Model, settings: Settings) -> tuple[Any, Callable[[Any], list[Tensor]]]:
    cond, uncond = texts()
    target = stg.apply(model, **settings, batched_cfg=True, guidance_scale=G)

    def run(applied: Any) -> list[Tensor]:
        def predict(i: int, x: Tensor) -> Tensor:
            applied.step = step_of(i)
            out = model(torch.cat([x, x]), SIGMAS[i].expand(4), torch.cat([uncond, cond]))
            u, c = out.chunk(2)
            return u + G * (c - u)

        return euler(predict)

    return target, run


def pipeline_face(model: Model, settings: Settings, cls: type[Pipeline] = OneCall) -> tuple[Any, Callable[..., Any]]:
    cond, uncond = texts()
    pipe = cls(model, Scheduler())

    def run(_: Any) -> list[Tensor]:
        found: list[Tensor] = []
        pipe(latents(), cond, uncond, G, found.append)
        return found

    return stg.apply(pipe, **settings), run


def guider_face(model: Model, settings: Settings) -> tuple[Any, Callable[..., Any]]:
    cond, uncond = ({"text": text} for text in texts())

    def run(guider: Any) -> list[Tensor]:
        def predict(i: int, x: Tensor) -> Tensor:
            guider.step = step_of(i)
            prediction: Tensor = guider(x, SIGMAS[i].expand(2), cond=cond, uncond=uncond)
            return prediction

        return euler(predict)

    return stg.Guider(model, **settings, guidance_scale=G), run


def k_diffusion_face(model: Model, settings: Settings) -> tuple[Any, Callable[..., Any]]:
    cond, uncond = ({"text": text} for text in texts())

    def run(guider: Any) -> list[Tensor]:
        found: list[Tensor] = []
        K.sampling.sample_euler(
            guider,
            latents(),
            SIGMAS,
            extra_args={"cond": cond, "uncond": uncond},
            callback=lambda info: found.append(info["denoised"]),
            disable=True,
        )
        return found

    return stg.Guider(model, **settings, guidance_scale=G, sigmas=SIGMAS), run


TWO_CALLS = "apply(pipeline with two calls)"
FACES: dict[str, tuple[Callable[..., Any], type[Model]]] = {
    "apply(module)": (module_face, Model),
    "apply(pipeline)": (pipeline_face, Model),
    TWO_CALLS: (lambda model, s: pipeline_face(model, s, TwoCalls), Model),
    "Guider": (guider_face, Model),
    "k-diffusion": (k_diffusion_face, Denoiser),
}


def run_face(face: str, settings: Settings, bad_below: float = 0.0, silent: bool = False) -> Run:
    make, cls = FACES[face]
    model = build(cls, bad_below)
    if silent:  # what a skip of this layer changes: nothing
        silence(model)
    run = Run([])
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        try:
            target, sample = make(model, settings)
            run.guidance = target
            if isinstance(target, stg.apply):
                with target:
                    run.predictions = sample(target)
            else:
                run.predictions = sample(target)
        except stg.StgError as error:
            run.error = f"{type(error).__name__}: {_without_names(str(error))}"
    run.said = [_without_names(str(w.message)) for w in caught if issubclass(w.category, stg.StgWarning)]
    return run


def _without_names(text: str) -> str:
    return text.replace("stg.apply", "stg.Guider")


def _without_what(text: str) -> str:
    """Leave out which predictions a message is about: of a step in two calls, each call is told of by itself."""
    return re.sub(r"the (\w+( and )?)+ prediction", "the prediction", text)


def silence(model: Model) -> None:
    """Let the second block return its input."""
    block: Any = model.inner.blocks[1]
    for layer in (block.attn.to_out, block.cross.to_out, block.ff):
        layer.weight.zero_()
        layer.bias.zero_()


def textbook(combine: Callable[..., Tensor], layers: Callable[[int], Sequence[int]]) -> list[Tensor]:
    """Sample with copies of the model in which blocks are replaced, one pass per prediction."""
    plain, weak = build(), {}
    cond, uncond = texts()

    def predict(i: int, x: Tensor) -> Tensor:
        t = SIGMAS[i].expand(2)
        for layer in layers(i):
            weak.setdefault(layer, zoo.without(plain, [f"inner.blocks.{layer}"]))
        ws = [weak[layer](x, t, cond) for layer in layers(i)]
        return combine(i, plain(x, t, cond), plain(x, t, uncond), ws)

    with torch.no_grad():
        return euler(predict)


def rescaled(out: Tensor, c: Tensor, factor: float) -> Tensor:
    ratio = torch.stack([one.std() / other.std() for one, other in zip(c, out, strict=True)]).reshape(-1, 1, 1)
    return out * (factor * ratio + 1 - factor)


MODES = ("residual", "attention", "values", "attention-input", "feed-forward", "smoothed")
SETTINGS: dict[str, Settings] = {
    **{f"mode {mode}": {"layers": [1], "scale": 1.5, "mode": mode} for mode in MODES},
    "two branches": {"branches": [stg.Branch([1], 1.0), stg.Branch([2], 0.5, "values")]},
    "scale per sample": {"layers": [1], "scale": torch.tensor([0.5, 2.0])},
    "scale 0": {"layers": [1], "scale": 0.0},
    "rescale": {"layers": [1], "scale": 1.5, "rescale": 0.7},
    "rescale alone": {"layers": [1], "scale": 0.0, "rescale": 0.7},
    "zero_star": {"layers": [1], "scale": 1.5, "rule": "zero_star"},
    "apg alone": {"layers": [1], "scale": 0.0, "rule": "apg"},
    "orthogonal, rescaled": {"layers": [1], "scale": 1.5, "rule": "orthogonal", "rescale": 0.3},
    "a rule of one's own": {"layers": [1], "rule": lambda c, u, terms, g: c + g * (c - u).tanh() + sum(terms)},
    "function of the step": {"layers": [1], "scale": lambda step: 2.0 * (1 - step.fraction)},
    "window": {"layers": [1], "scale": 1.5, "start": 0.2, "stop": 0.8},
    "window with rescale": {"layers": [1], "scale": 1.5, "start": 0.2, "stop": 0.8, "rescale": 0.7},
    "sigma_range": {"layers": [1], "scale": 1.5, "sigma_range": (0.9, 4.0)},
    "levels": {"layers": [1], "schedule": [(4.0, None), (1.0, {"scale": 2.0, "layers": [2]}), (0.0, {"rescale": 0.5})]},
    "levels with CFG": {"layers": [1], "schedule": [(2.0, {"guidance_scale": 5.0}), (0.0, {"guidance_scale": 1.0})]},
    "schedule that leaves rescale": {"layers": [1], "schedule": lambda step: {"scale": 0.0, "rescale": 0.7}},
    "every": {"layers": [1], "scale": 1.5, "every": 2},
    "every with rescale": {"layers": [1], "scale": 1.5, "every": 3, "rescale": 0.7},
    "on uncond": {"layers": [1], "on": "uncond"},
    "on uncond in a window": {"layers": [1], "on": "uncond", "start": 0.2, "stop": 0.8},
    "full": {"layers": [1], "scale": 1.5, "execution": "full"},
    "batched": {"layers": [1], "scale": 1.5, "execution": "batched"},
}
# An object with memory, for each face anew.
FRESH: dict[str, Callable[[], Settings]] = {
    "apg with momentum": lambda: {"layers": [1], "scale": 1.5, "rule": rules.AveragedApg(norm=2.0)},
}


def settings_of(name: str) -> Settings:
    return FRESH[name]() if name in FRESH else SETTINGS[name]


def check_same(run: Run, other: Run, face: str) -> None:
    """Hold what a face did against what another one did."""
    apart = face == TWO_CALLS
    assert run.error == other.error
    assert [_without_what(said) if apart else said for said in run.said] == [
        _without_what(said) if apart else said for said in other.said
    ]
    assert len(run.predictions) == len(other.predictions)
    for found, expected in zip(run.predictions, other.predictions, strict=True):
        assert_close(found, expected, equal_nan=True, **close)
    stats, others = (dataclasses.asdict(r.guidance.stats) for r in (run, other))
    # Where a step is two calls of the denoiser, both are counted.
    uncounted = ("seconds", "calls", "guided_calls") if apart else ("seconds",)
    assert {k: v for k, v in stats.items() if k not in uncounted} == {
        k: v for k, v in others.items() if k not in uncounted
    }
    assert bool(stats["guided_calls"]) == bool(others["guided_calls"])
    assert len(run.guidance.trace) == len(other.guidance.trace)
    for row, expected_row in zip(run.guidance.trace, other.guidance.trace, strict=True):
        assert (row.step.index, row.step.count, row.step.sigma) == (
            expected_row.step.index,
            expected_row.step.count,
            expected_row.step.sigma,
        )
        assert [torch.as_tensor(s).tolist() for s in row.scales] == [
            torch.as_tensor(s).tolist() for s in expected_row.scales
        ]
        assert row.size == pytest.approx(expected_row.size, rel=1e-3, abs=1e-6, nan_ok=True)
        if row.size > 1e-4:  # of less than that, rounding decides where it points
            assert row.cosine == pytest.approx(expected_row.cosine, abs=1e-3, nan_ok=True)
        assert (row.cosine is None) == (expected_row.cosine is None)


@pytest.mark.parametrize("face", [face for face in FACES if face != "Guider"])
@pytest.mark.parametrize("name", [*SETTINGS, *FRESH])
def test_all_faces_do_the_same(name: str, face: str) -> None:
    reference = run_face("Guider", settings_of(name))
    assert len(reference.predictions) == STEPS
    check_same(run_face(face, settings_of(name)), reference, face)


TEXTBOOK: dict[str, tuple[Callable[..., Tensor], Callable[[int], Sequence[int]]]] = {
    "mode residual": (lambda i, c, u, ws: u + G * (c - u) + 1.5 * (c - ws[0]), lambda i: [1]),
    "scale per sample": (
        lambda i, c, u, ws: u + G * (c - u) + torch.tensor([0.5, 2.0]).reshape(2, 1, 1) * (c - ws[0]),
        lambda i: [1],
    ),
    "rescale": (lambda i, c, u, ws: rescaled(u + G * (c - u) + 1.5 * (c - ws[0]), c, 0.7), lambda i: [1]),
    "rescale alone": (lambda i, c, u, ws: rescaled(u + G * (c - u), c, 0.7), lambda i: []),
    "window": (lambda i, c, u, ws: u + G * (c - u) + (1.5 * (c - ws[0]) if ws else 0), lambda i: [[], [1]][1 <= i < 4]),
    "levels with CFG": (
        lambda i, c, u, ws: u + (5.0 if i < 3 else 1.0) * (c - u) + (c - ws[0]),
        lambda i: [1],
    ),
}


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("name", TEXTBOOK)
def test_every_face_does_what_the_textbook_does(name: str, face: str) -> None:
    expected = textbook(*TEXTBOOK[name])
    for found, prediction in zip(run_face(face, SETTINGS[name]).predictions, expected, strict=True):
        assert_close(found, prediction, **close)


@pytest.mark.parametrize("face", [face for face in FACES if face != "Guider"])
@pytest.mark.parametrize(
    "name", ["mode residual", "rescale alone", "schedule that leaves rescale", "on uncond", "every"]
)
def test_all_faces_tell_of_nan_alike(name: str, face: str) -> None:
    reference = run_face("Guider", settings_of(name), bad_below=3.0)
    assert len(reference.said) == 1
    assert "not finite" in reference.said[0]
    check_same(run_face(face, settings_of(name), bad_below=3.0), reference, face)


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("name", ["scale 0"])
def test_no_face_tells_of_what_it_does_not_guide(name: str, face: str) -> None:
    run = run_face(face, settings_of(name), bad_below=3.0)
    assert run.said == []
    assert run.guidance.stats.guided_calls == len(run.guidance.trace) == 0


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("face", [face for face in FACES if face != "Guider"])
@pytest.mark.parametrize("name", ["mode residual", "window", "rescale", "full"])
def test_all_faces_tell_of_a_skip_that_changes_nothing(name: str, face: str, strict: bool) -> None:
    reference = run_face("Guider", {**settings_of(name), "strict": strict}, silent=True)
    run = run_face(face, {**settings_of(name), "strict": strict}, silent=True)
    said = [reference.error] if strict else reference.said
    assert len(said) == 1
    assert "changed nothing" in said[0]
    check_same(run, reference, face)


BAD: dict[str, Settings] = {
    "no such layer": {"layers": [9]},
    "no such mode": {"layers": [1], "mode": "skip"},
    "no such rule": {"layers": [1], "rule": "cgf"},
    "no such execution": {"layers": [1], "execution": "fast"},
    "scale that is not finite": {"layers": [1], "scale": math.inf},
    "rescale too large": {"layers": [1], "rescale": 1.5},
    "window the wrong way": {"layers": [1], "start": 0.8, "stop": 0.2},
    "every 0": {"layers": [1], "every": 0},
    "on cond and uncond": {"layers": [1], "on": "both"},
    "scale on uncond": {"layers": [1], "on": "uncond", "scale": 1.0},
    "equal branches": {"branches": [stg.Branch([1], 1.0), stg.Branch([1], 0.5)]},
    "schedule that gives nonsense": {"layers": [1], "schedule": lambda step: {"scales": 1.0}},
    "scale that fits no sample": {"layers": [1], "scale": torch.ones(3)},
}


@pytest.mark.parametrize("face", [face for face in FACES if face != "Guider"])
@pytest.mark.parametrize("name", BAD)
def test_all_faces_refuse_the_same(name: str, face: str) -> None:
    reference = run_face("Guider", BAD[name])
    assert reference.error
    run = run_face(face, BAD[name])
    assert run.error == reference.error
