"""Our numbers against recorded results of the published skip guidance pipelines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import stg_hooks as stg
from tests.pipelines import FAMILIES, build, load_case, run, textbook

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")
TOLERANCE = 1e-4
"""Largest difference that we accept, in standard deviations of the expected latents."""


def assert_close_in_std(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=TOLERANCE * expected.std().item())


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_guidance_is_far_from_none(family: str) -> None:
    expected = load_case(family).expected
    difference = (expected["stg"] - expected["base"]).abs().max()
    assert difference > 500 * TOLERANCE * expected["stg"].std()


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_pipeline_gives_the_recorded_base(family: str) -> None:
    pipe, call, case = build(family)
    assert_close_in_std(run(pipe, call, case.info["seed"]), case.expected["base"])


@pytest.mark.parametrize("family", FAMILIES)
def test_apply_gives_what_the_published_pipeline_gave(family: str) -> None:
    pipe, call, case = build(family)
    with stg.apply(pipe, layers=case.layers, scale=case.scale, mode=case.info["mode"], rescale=case.info["rescale"]):
        latents = run(pipe, call, case.info["seed"])
    assert_close_in_std(latents, case.expected["stg"])


@pytest.mark.parametrize("family", FAMILIES)
def test_textbook_of_the_other_tests_gives_what_the_published_pipeline_gave(family: str) -> None:
    pipe, call, case = build(family)
    with textbook(pipe, case, [(case.layers, case.scale)], case.guidance_scale):
        latents = run(pipe, call, case.info["seed"])
    assert_close_in_std(latents, case.expected["stg"])


ATTENTION = ["mochi_attention", "ltx_attention", "svd"]
EXECUTIONS = ["sequential", "batched", "full"]


def load_attention(name: str) -> tuple[nn.Module, dict[str, Any], dict[str, Any], dict[str, Tensor], list[stg.Branch]]:
    """Load a recorded call of a denoiser with the authors' own attention skip."""
    import diffusers

    folder = Path(__file__).parent / "golden" / name
    case = json.loads((folder / "case.json").read_text())
    model = getattr(diffusers, case["model"]).from_config(json.loads((folder / "config.json").read_text()))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    inputs = {**load_file(folder / "inputs.safetensors"), **case.get("arguments", {}), "return_dict": False}
    if name == "svd":
        inputs["timestep"] = torch.tensor(case["timestep"])
        up = "up_blocks.1.attentions.0"  # the first one on the way up: "u0"
        branches = [stg.Branch(up, case[kind]["scale"], "attention", kind=kind) for kind in ("spatial", "temporal")]
    else:
        branches = [stg.Branch(case["layers"], case["scale"], case["mode"])]
    return model.eval(), inputs, case, load_file(folder / "expected.safetensors"), branches


@pytest.mark.filterwarnings("ignore:the calls of UNetSpatio:stg_hooks.StgWarning")
@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("name", ATTENTION)
@torch.no_grad()
def test_apply_gives_what_the_authors_attention_skip_gave(name: str, execution: str) -> None:
    model, inputs, case, expected, branches = load_attention(name)
    assert (expected["stg"] - expected["base"]).abs().max() > 500 * TOLERANCE * expected["stg"].std()
    with stg.apply(model, branches=branches, batched_cfg=True, execution=execution):
        uncond, cond = model(**inputs)[0].chunk(2)
    assert_close_in_std(uncond + case["guidance_scale"] * (cond - uncond), expected["stg"])


@pytest.mark.parametrize("name", ATTENTION)
@torch.no_grad()
def test_guider_gives_what_the_authors_attention_skip_gave(name: str) -> None:
    model, inputs, case, expected, branches = load_attention(name)
    both = {key: value for key, value in inputs.items() if not isinstance(value, Tensor) or not value.ndim}
    halves = {key: value.chunk(2) for key, value in inputs.items() if key not in both}
    uncond, cond = ({key: pair[i] for key, pair in halves.items()} for i in range(2))
    guider = stg.Guider(model, branches=branches, guidance_scale=case["guidance_scale"])
    (guided,) = guider(**both, cond=cond, uncond=uncond)
    assert_close_in_std(guided, expected["stg"])
