"""Every example runs, and its guidance is what made its result."""

from __future__ import annotations

import itertools
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import stg_hooks as stg
from stg_hooks import demo
from tests import kdiffusion

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
pytestmark = pytest.mark.filterwarnings("error::stg_hooks.StgWarning")


def main_of(name: str) -> Callable[[], Any]:
    (file,) = (file for file in EXAMPLES if file.stem == name)
    main: Callable[[], Any] = runpy.run_path(str(file))["main"]
    return main


def tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


@pytest.mark.parametrize("name", [file.stem for file in EXAMPLES if "stg.Guider(" in file.read_text(encoding="utf-8")])
def test_an_example_runs_and_is_guided(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kdiffusion.load()  # `import k_diffusion` finds it without its torchvision
    guiders: list[stg.Guider] = []
    make = stg.Guider

    def noted(*args: Any, **kwargs: Any) -> stg.Guider:
        guiders.append(make(*args, **kwargs))
        return guiders[-1]

    monkeypatch.setattr(stg, "Guider", noted)
    guided = tensors(main_of(name)())
    assert all(result.isfinite().all() for result in guided)
    assert guiders
    for guider in guiders:
        assert guider.stats.guided_calls == guider.stats.weak_passes == len(guider.trace) > 0
        whole = guider.plan.is_constant
        assert whole or guider.stats.guided_calls < guider.stats.calls  # a window that leaves steps out

    off = [stg.Branch([0], 0.0)]
    keep = ("guidance_scale", "model", "sigmas")
    monkeypatch.setattr(
        stg,
        "Guider",
        lambda denoiser, *_, **kwargs: make(
            denoiser, branches=off, **{key: value for key, value in kwargs.items() if key in keep}
        ),
    )
    for one, other in zip(guided, tensors(main_of(name)()), strict=True):
        assert not torch.allclose(one, other, rtol=1e-2, atol=1e-2)


def test_the_scheduler_loop_is_what_the_pipeline_does() -> None:
    pipe = demo.load()
    latents = torch.randn(1, 48, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    with stg.apply(pipe, [6], 0.5, stop=0.8):
        expected = pipe(**demo.inputs(["red 3 blue 7"]), guidance_scale=2.0, latents=latents).frames
    assert_close(main_of("diffusers_loop")(), expected, rtol=1e-4, atol=1e-4)


def test_a_host_of_ones_own_gives_what_a_guider_gives() -> None:
    """Its rows are in the other order, and `stg.Predictor` makes the weak prediction."""
    model = demo.load().transformer
    guider = stg.Guider(model, layers=[2], scale=0.5, guidance_scale=2.0)
    torch.manual_seed(0)
    x = torch.randn(1, 48, 6, 4, 4)
    cond = {"encoder_hidden_states": demo.embed(demo.labels(["red 3 blue 7"]))}
    uncond = {"encoder_hidden_states": demo.embed(None)}
    with torch.no_grad():
        for level, lower in itertools.pairwise(torch.linspace(1, 0, 9).tolist()):
            timestep = torch.full((1,), 1000 * level)
            x = x + (lower - level) * guider(hidden_states=x, timestep=timestep, cond=cond, uncond=uncond).sample
    assert_close(main_of("own_host")(), x, rtol=1e-4, atol=1e-4)


def test_the_modular_pipeline_is_guided(monkeypatch: pytest.MonkeyPatch) -> None:
    guided, make = main_of("modular_pipeline")(), stg.modular.SkipGuidance
    made: list[Any] = []

    class Without(make):  # type: ignore[misc, valid-type]
        def __init__(self, **settings: Any) -> None:
            super().__init__(**{**settings, "scale": 0.0})
            made.append(self)

    monkeypatch.setattr(stg.modular, "SkipGuidance", Without)
    plain = main_of("modular_pipeline")()
    assert guided.isfinite().all()
    assert not torch.allclose(guided, plain, rtol=1e-2, atol=1e-2)
    assert (made[0].stats.calls, made[0].stats.weak_passes) == (10, 0)
