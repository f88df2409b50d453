"""Our numbers against recorded results of the published skip guidance pipelines."""

from __future__ import annotations

import pytest
import torch

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
