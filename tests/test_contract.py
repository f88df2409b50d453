"""One contract for all faces: the same settings give the same predictions, counts, trace and warnings.

A small video-like model is sampled by one Euler loop through `apply` on a module, `apply` on a pipeline, `Guider` in a
loop of one's own, and `Guider` as a denoiser of k-diffusion. The first column of the comparison is a textbook that
makes each prediction in a pass of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import diffusers
import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor, nn
from torch.testing import assert_close

import stg_hooks as stg
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
    return text.replace("stg.apply", "stg.Guider").replace("stg.layers(pipe)", "stg.layers(model)")


def _without_what(text: str) -> str:
    """Leave out which predictions a message is about: of a step in two calls, each call is told of by itself."""
    return re.sub(r"the (\w+( and )?)+ prediction", "the prediction", text)


def silence(model: Model) -> None:
    """Let the second block return its input."""
    block: Any = model.inner.blocks[1]
    for layer in (block.attn.to_out, block.cross.to_out, block.ff):
        layer.weight.zero_()
        layer.bias.zero_()


def textbook(combine: Callable[..., Tensor], layers: Callable[[int], Sequence[int]] = lambda i: [1]) -> list[Tensor]:
    """Sample with copies of the model in which blocks are replaced, one pass per prediction.

    `combine` gets the index of the step, cond and uncond, and of each layer its weak cond and weak uncond.
    """
    plain, weak = build(), {}
    cond, uncond = texts()

    def predict(i: int, x: Tensor) -> Tensor:
        t = SIGMAS[i].expand(2)
        for layer in layers(i):
            weak.setdefault(layer, zoo.without(plain, [f"inner.blocks.{layer}"]))
        ws, wus = ([weak[layer](x, t, text) for layer in layers(i)] for text in (cond, uncond))
        return combine(i, plain(x, t, cond), plain(x, t, uncond), ws, wus)

    with torch.no_grad():
        return euler(predict)


def rescaled(out: Tensor, c: Tensor, factor: float) -> Tensor:
    ratio = torch.stack([one.std() / other.std() for one, other in zip(c, out, strict=True)]).reshape(-1, 1, 1)
    return out * (factor * ratio + 1 - factor)


# The model has no positions, so that a shuffle would change nothing, and is refused.
SETTINGS: dict[str, Settings] = {
    **{f"mode {mode}": {"layers": [1], "scale": 1.5, "mode": mode} for mode in zoo.ALL_MODES if mode != "shuffled"},
    "two residual branches": {"branches": [stg.Branch([1], 1.0), stg.Branch([2], -0.5)]},
    "two branches": {"branches": [stg.Branch([1], 1.0), stg.Branch([2], 0.5, "values")]},
    "scale per sample": {"layers": [1], "scale": torch.tensor([0.5, 2.0])},
    "scale 0": {"layers": [1], "scale": 0.0},
    "off": {"layers": [1], "start": 0.4, "stop": 0.4},
    "rescale": {"layers": [1], "scale": 1.5, "rescale": 0.7},
    "rescale alone": {"layers": [1], "scale": 0.0, "rescale": 0.7},
    "zero_star": {"layers": [1], "scale": 1.5, "rule": "zero_star"},
    "apg alone": {"layers": [1], "scale": 0.0, "rule": "apg"},
    "orthogonal, rescaled": {
        "branches": [stg.Branch([1], 1.5), stg.Branch([2], 0.5)],
        "rule": "orthogonal",
        "rescale": 0.3,
    },
    "apg, rescaled": {
        "layers": [1],
        "scale": 1.5,
        "rule": functools.partial(stg.rules.apg, eta=0.5, norm=2.0),
        "rescale": 0.7,
    },
    "a rule from a noise level on": {"layers": [1], "schedule": [(2.0, {}), (0.0, {"rule": "apg"})]},
    "a rule of one's own": {"layers": [1], "rule": lambda c, u, terms, g: c + g * (c - u).tanh() + sum(terms)},
    "function of the step": {"layers": [1], "scale": lambda step: 2.0 * (1 - step.fraction)},
    "window": {"layers": [1], "scale": 1.5, "start": 0.2, "stop": 0.8},
    "window with rescale": {"layers": [1], "scale": 1.5, "start": 0.2, "stop": 0.8, "rescale": 0.7},
    "sigma_range": {"layers": [1], "scale": 1.5, "sigma_range": (0.9, 4.0)},
    "levels": {"layers": [1], "schedule": [(4.0, None), (1.0, {"scale": 2.0, "layers": [2]}), (0.0, {"rescale": 0.5})]},
    "levels with CFG": {"layers": [1], "schedule": [(2.0, {"guidance_scale": 5.0}), (0.0, {"guidance_scale": 1.0})]},
    "levels with CFG, rescaled": {"layers": [1], "schedule": [(0.0, {"guidance_scale": 2.0, "rescale": 0.7})]},
    "schedule that leaves rescale": {"layers": [1], "schedule": lambda step: {"scale": 0.0, "rescale": 0.7}},
    "every": {"layers": [1], "scale": 1.5, "every": 2},
    "every with rescale": {"layers": [1], "scale": 1.5, "every": 3, "rescale": 0.7},
    "on uncond": {"layers": [1], "on": "uncond"},
    "on uncond, values": {"layers": [1], "on": "uncond", "mode": "values"},
    "on uncond in a window": {"layers": [1], "on": "uncond", "start": 0.2, "stop": 0.8},
    "full": {"layers": [1], "scale": 1.5, "execution": "full"},
    "batched": {"layers": [1], "scale": 1.5, "execution": "batched"},
}
# An object with memory, for each face anew.
FRESH: dict[str, Callable[[], Settings]] = {
    "apg with momentum": lambda: {"layers": [1], "scale": 1.5, "rule": stg.rules.AveragedApg(norm=2.0)},
}


def settings_of(name: str) -> Settings:
    return FRESH[name]() if name in FRESH else SETTINGS[name]


@functools.cache
def ran(face: str, name: str, bad_below: float = 0.0) -> Run:
    return run_face(face, settings_of(name), bad_below)


def reference(name: str, bad_below: float = 0.0) -> Run:
    return ran("Guider", name, bad_below)


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
    assert len(reference(name).predictions) == STEPS
    check_same(ran(face, name), reference(name), face)


def cfg(c: Tensor, u: Tensor, g: float = G) -> Tensor:
    return u + g * (c - u)


def window(i: int) -> list[int]:
    return [1] if 1 <= i < 4 else []


def by_level(i: int, c: Tensor, u: Tensor, ws: list[Tensor], _: Any) -> Tensor:
    if i < 2:
        return cfg(c, u)
    return cfg(c, u) + 2.0 * (c - ws[0]) if i < 4 else rescaled(cfg(c, u) + (c - ws[0]), c, 0.5)


PER_SAMPLE = torch.tensor([0.5, 2.0]).reshape(2, 1, 1)
TEXTBOOK: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("mode residual", "full", "batched"), (lambda i, c, u, w, _: cfg(c, u) + 1.5 * (c - w[0]),)),
    "two residual branches": (
        lambda i, c, u, w, _: cfg(c, u) + (c - w[0]) - 0.5 * (c - w[1]),
        lambda i: [1, 2],
    ),
    "scale per sample": (lambda i, c, u, w, _: cfg(c, u) + PER_SAMPLE * (c - w[0]),),
    "scale 0": (lambda i, c, u, w, _: cfg(c, u),),
    "rescale": (lambda i, c, u, w, _: rescaled(cfg(c, u) + 1.5 * (c - w[0]), c, 0.7),),
    **dict.fromkeys(
        ("rescale alone", "schedule that leaves rescale"), (lambda i, c, u, w, _: rescaled(cfg(c, u), c, 0.7),)
    ),
    # Rules are held against their formulas in test_rules.py.
    "zero_star": (lambda i, c, u, w, _: stg.combine(c, w, u, scale=1.5, guidance_scale=G, rule="zero_star"),),
    "apg alone": (lambda i, c, u, w, _: stg.combine(c, [], u, guidance_scale=G, rule="apg"),),
    "orthogonal, rescaled": (
        lambda i, c, u, w, _: rescaled(
            stg.combine(c, w, u, scale=[1.5, 0.5], guidance_scale=G, rule="orthogonal"), c, 0.3
        ),
        lambda i: [1, 2],
    ),
    "apg, rescaled": (
        lambda i, c, u, w, _: rescaled(
            stg.combine(c, w, u, scale=1.5, guidance_scale=G, rule=SETTINGS["apg, rescaled"]["rule"]), c, 0.7
        ),
    ),
    "a rule from a noise level on": (
        lambda i, c, u, w, _: stg.combine(c, w, u, guidance_scale=G, rule="cfg" if i < 3 else "apg"),
    ),
    "a rule of one's own": (lambda i, c, u, w, _: c + G * (c - u).tanh() + (c - w[0]),),
    "function of the step": (lambda i, c, u, w, _: cfg(c, u) + 2.0 * (1 - i / STEPS) * (c - w[0]),),
    **dict.fromkeys(
        ("window", "sigma_range"), (lambda i, c, u, w, _: cfg(c, u) + (1.5 * (c - w[0]) if w else 0), window)
    ),
    "levels": (by_level, lambda i: [1] if i == 4 else [2]),
    "levels with CFG": (lambda i, c, u, w, _: cfg(c, u, 5.0 if i < 3 else 1.0) + (c - w[0]),),
    "levels with CFG, rescaled": (lambda i, c, u, w, _: rescaled(cfg(c, u, 2.0) + (c - w[0]), c, 0.7),),
    "on uncond": (lambda i, c, u, w, wu: cfg(c, wu[0]),),
    "on uncond in a window": (lambda i, c, u, w, wu: cfg(c, wu[0] if wu else u), window),
}


@functools.cache
def in_the_textbook(name: str) -> list[Tensor]:
    return textbook(*TEXTBOOK[name])


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("name", TEXTBOOK)
def test_every_face_does_what_the_textbook_does(name: str, face: str) -> None:
    for found, prediction in zip(ran(face, name).predictions, in_the_textbook(name), strict=True):
        assert_close(found, prediction, **close)


ALL = list(range(STEPS))
COUNTED: dict[str, tuple[int, int, int, list[int]]] = {
    # guided calls, weak passes, blocks (of four) that these have run, and the steps of the trace
    "mode residual": (5, 5, 10, ALL),
    "two branches": (5, 10, 20, ALL),
    "scale 0": (0, 0, 0, []),
    "off": (0, 0, 0, []),
    "rescale alone": (5, 0, 0, ALL),
    "apg alone": (5, 0, 0, ALL),
    "window": (3, 3, 6, [1, 2, 3]),
    "sigma_range": (3, 3, 6, [1, 2, 3]),
    "levels": (3, 3, 1 + 1 + 2, [2, 3, 4]),
    "every": (5, 3, 6, ALL),
    "every with rescale": (5, 2, 4, ALL),
    "on uncond": (5, 0, 0, []),
    "on uncond in a window": (3, 0, 0, []),
    "full": (5, 5, 15, ALL),
    "batched": (5, 5, 10, ALL),
}


@pytest.mark.parametrize("name", COUNTED)
def test_what_was_guided_is_counted(name: str) -> None:
    """By a Guider; the other faces do the same."""
    stats, steps = reference(name).guidance.stats, [row.step.index for row in reference(name).guidance.trace]
    assert stats.calls == STEPS
    assert (stats.guided_calls, stats.weak_passes, stats.blocks_run, steps) == COUNTED[name]
    assert stats.blocks_saved == 4 * stats.weak_passes - stats.blocks_run
    assert (stats.seconds > 0) == (stats.weak_passes > 0)


FIRST_GUIDED = {"scale 0": STEPS, "off": STEPS, "window": 1, "sigma_range": 1, "on uncond in a window": 1}
TWO_ROWS = ("on uncond in a window", "k-diffusion")  # makes one call per prediction, and the plain run one for both


@functools.cache
def without_guidance(face: str) -> list[Tensor]:
    make, cls = FACES[face]
    target, sample = make(build(cls), SETTINGS["scale 0"])
    with torch.no_grad():
        found: list[Tensor] = sample(target)  # without `with`
    return found


@pytest.mark.filterwarnings("ignore:.* was made but never entered:stg_hooks.StgWarning")
@pytest.mark.parametrize(("name", "face"), [(n, f) for n in FIRST_GUIDED for f in FACES if (n, f) != TWO_ROWS])
def test_steps_before_the_first_guided_one_are_bit_equal_to_those_of_a_plain_run(name: str, face: str) -> None:
    found, first = ran(face, name).predictions, FIRST_GUIDED[name]
    assert [torch.equal(one, other) for one, other in zip(found, without_guidance(face), strict=True)][: first + 1] == (
        [True] * first + [False] * (first < STEPS)
    )


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("name", ["window", "every", "every with rescale", "apg with momentum"])
def test_a_second_run_starts_again(name: str, face: str) -> None:
    make, cls = FACES[face]
    target, sample = make(build(cls), settings_of(name))
    with torch.no_grad(), target if isinstance(target, stg.apply) else nullcontext():
        assert_close(sample(target), sample(target), rtol=0, atol=0)


@pytest.mark.parametrize("face", [face for face in FACES if face != "Guider"])
@pytest.mark.parametrize(
    "name", ["mode residual", "rescale alone", "schedule that leaves rescale", "on uncond", "every"]
)
def test_all_faces_tell_of_nan_alike(name: str, face: str) -> None:
    (said,) = reference(name, bad_below=3.0).said
    assert "not finite" in said
    check_same(ran(face, name, bad_below=3.0), reference(name, bad_below=3.0), face)


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("name", ["scale 0"])
def test_no_face_tells_of_what_it_does_not_guide(name: str, face: str) -> None:
    run = ran(face, name, bad_below=3.0)
    assert run.said == []
    assert run.guidance.stats.guided_calls == len(run.guidance.trace) == 0


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("face", [face for face in FACES if face != "Guider"])
@pytest.mark.parametrize("name", ["mode residual", "window", "rescale", "full"])
def test_all_faces_tell_of_a_skip_that_changes_nothing(name: str, face: str, strict: bool) -> None:
    one, other = (run_face(way, {**settings_of(name), "strict": strict}, silent=True) for way in (face, "Guider"))
    (said,) = [other.error] if strict else other.said
    assert "changed nothing" in said
    check_same(one, other, face)


# Settings, and what is said of them before anything is called.
REFUSED: dict[str, tuple[Settings, str]] = {
    "no such layer": ({"layers": [9]}, r"layers=\[9\].* has 4 layers \(0\.\.\.3\)"),
    "no such layer, of scale 0": ({"branches": [stg.Branch([9], 0.0), stg.Branch([2], 1.5)]}, r"layers=\[9\]"),
    "no such mode": ({"layers": [1], "mode": "skip"}, "unknown mode 'skip'; choose from"),
    "no such rule": ({"layers": [1], "rule": "zero-star"}, r"unknown rule 'zero-star'; .*Did you mean 'zero_star'\?"),
    "class for a rule": ({"layers": [1], "rule": stg.rules.AveragedApg}, "rule=AveragedApg is a class: pass an object"),
    "number for a rule": ({"layers": [1], "rule": 3}, "rule=3: expected a name or a callable, not int"),
    "no such execution": (
        {"layers": [1], "execution": "fast"},
        "unknown execution='fast'; choose from 'auto', 'sequential', 'batched'",
    ),
    "a slip of an execution": (
        {"layers": [1], "execution": "sequental"},
        r"execution='sequental'; .* Did you mean 'sequential'",
    ),
    "scale that is not finite": ({"layers": [1], "scale": math.inf}, "scale=inf"),
    "rescale too large": ({"layers": [1], "rescale": 1.5}, r"rescale=1\.5"),
    "equal branches": ({"branches": [stg.Branch([1], 1.0), stg.Branch([1], 0.5)]}, "branches 0 and 1 perturb the same"),
    "window the wrong way": ({"start": 0.6, "stop": 0.4}, r"start=0\.6 lies after stop=0\.4"),
    "start below 0": ({"start": -0.1}, r"start=-0\.1: expected a part of the run, from 0 to 1"),
    "stop above 1": ({"stop": 1.5}, r"stop=1\.5: expected a part of the run, from 0 to 1"),
    "stop at NaN": ({"stop": math.nan}, "stop=nan: expected a part"),
    "start at True": ({"start": True}, "start=True: expected a part"),
    "range the wrong way": ({"sigma_range": (0.9, 0.1)}, "the first one is the lowest"),
    "range of one number": ({"sigma_range": 0.5}, r"sigma_range=0\.5: expected \(lowest, highest\)"),
    "every 0": ({"every": 0}, "every=.*expected a number of steps, 1 or more"),
    "every -1": ({"every": -1}, "every=.*expected a number of steps, 1 or more"),
    "every 1.5": ({"every": 1.5}, "every=.*expected a number of steps, 1 or more"),
    "every in words": ({"every": "2"}, "every=.*expected a number of steps, 1 or more"),
    "every on uncond": ({"every": 2, "on": "uncond"}, "every=2: on='uncond' makes no extra pass"),
    "on the weak": ({"on": "weak"}, "unknown on='weak'; choose from 'cond', 'uncond'"),
    "scale on uncond": ({"on": "uncond", "scale": 1.0}, "scale= has no meaning with on='uncond'.*Leave scale out"),
    "scale of a branch on uncond": ({"on": "uncond", "branches": [stg.Branch([1], 2.0)]}, "scale= has no meaning"),
    "scale on uncond, scheduled": (
        {"on": "uncond", "schedule": [(0.5, {"scale": 2.0})]},
        "scale= has no meaning with on='uncond'",
    ),
    "branches on uncond": (
        {"on": "uncond", "branches": [stg.Branch([1]), stg.Branch([2])]},
        "on='uncond' with 2 branches: there is one uncond prediction",
    ),
    "two functions": (
        {"scale": lambda step: 1.0, "schedule": lambda step: None},
        "give either scale=function or schedule=",
    ),
    **{
        f"schedule of {name}": ({"schedule": schedule}, text)
        for name, schedule, text in (
            ("nothing", [], "expected noise levels from high to low"),
            ("levels the wrong way", [(0.1, {}), (0.9, {})], "expected noise levels from high to low"),
            ("NaN", [(math.nan, {})], "expected noise levels from high to low"),
            ("one level twice", [(0.5, {}), (0.5, {})], "expected noise levels from high to low, each once"),
            ("levels alone", [0.1, 0.9], "expected a function of the step, or a list of"),
            ("numbers", [(0.9, 1.0)], r"gave 1\.0: expected a dict"),
            (
                "branches in dicts",
                [(0.9, {"branches": [{"layers": [1]}]})],
                r"gave branches=.*expected a list of stg\.Branch",
            ),
            ("3 for branches", [(0.9, {"branches": 3})], r"gave branches=3: expected a list of stg\.Branch"),
            ("CFG at NaN", [(0.9, {"guidance_scale": math.nan})], r"guidance_scale=1\.0 to switch it off"),
            (
                "a slip",
                [(0.9, {"scal": 1.0})],
                r"unknown setting 'scal' in a schedule; choose from 'layers', 'scale'.* Did you mean 'scale'",
            ),
            ("scale at inf", [(0.9, {"scale": math.inf})], "scale"),
            ("rescale 2", [(0.9, {"rescale": 2})], "rescale"),
        )
    },
    "schedule of scale for two branches": (
        {"branches": [stg.Branch([1]), stg.Branch([2])], "schedule": [(0.5, {"scale": 1.0})]},
        "gave scale for 2 branches: give branches=",
    ),
}
REFUSED_IN_A_RUN: dict[str, tuple[Settings, str]] = {
    "schedule that gives a slip": (
        {"schedule": lambda step: {"scales": 1.0}},
        "unknown setting 'scales' in a schedule; choose from 'layers', ",
    ),
    "schedule that gives a number": ({"schedule": lambda step: 3.0}, r"gave 3\.0: expected a dict"),
    "scale on uncond, by a function": (
        {"on": "uncond", "schedule": lambda step: {"scale": 2.0}},
        "scale= has no meaning with on='uncond'",
    ),
    "scale that fits no sample": (
        {"scale": torch.ones(3)},
        r"scale has shape \(3,\), which does not fit predictions of shape \(2, ",
    ),
}


@functools.cache
def refused(face: str, name: str) -> Run:
    settings, _ = {**REFUSED, **REFUSED_IN_A_RUN}[name]
    return run_face(face, settings if "branches" in settings else {"layers": [1], **settings})


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("name", [*REFUSED, *REFUSED_IN_A_RUN])
def test_all_faces_refuse_the_same(name: str, face: str) -> None:
    _, text = {**REFUSED, **REFUSED_IN_A_RUN}[name]
    run = refused(face, name)
    assert re.match(rf"(Setting|Layer)Error: (.|\n)*{text}", run.error), run.error
    assert run.error == refused("Guider", name).error
    assert (run.guidance is None) == (name in REFUSED)
