"""The arithmetic, against the textbook in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import stg_hooks as stg

exact: dict[str, Any] = {"rtol": 0, "atol": 0}
close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
SHAPE = (2, 3, 4, 5, 5)  # (B, C, F, H, W)


def predictions(count: int, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    # Far from mean 0 and standard deviation 1, and different per sample.
    spread = torch.tensor([0.5, 3.0]).reshape(2, 1, 1, 1, 1)
    return [(spread * torch.randn(SHAPE, generator=random) + 0.3).to(dtype) for _ in range(count)]


def textbook(
    cond: Tensor,
    weaks: list[Tensor],
    uncond: Tensor | None,
    scales: list[Any],
    guidance_scale: Any = 1.0,
    rescale: float = 0.0,
) -> Tensor:
    """STG Eq. 13 and 20 on top of Eq. 6, then Alg. 4 per sample: in numpy and float64."""

    def wide(value: Any) -> Any:
        return value.double().numpy() if isinstance(value, Tensor) else value

    c, g = wide(cond), wide(guidance_scale)
    out = c if uncond is None else wide(uncond) + g * (c - wide(uncond))
    for scale, weak in zip(scales, weaks, strict=True):
        out = out + wide(scale) * (c - wide(weak))
    if rescale:
        out = np.stack(
            [
                sample * (rescale * np.std(reference, ddof=1) / np.std(sample, ddof=1) + (1 - rescale))
                for sample, reference in zip(out, c, strict=True)
            ]
        )
    return torch.from_numpy(np.ascontiguousarray(out)).to(cond.dtype)


# --- the formula ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(("scale", "guidance_scale"), [(1.0, 4.5), (0.0, 7), (2.5, 1.0), (-1.0, 0.0), (1, 1)])
def test_one_branch(scale: float, guidance_scale: float, rescale: float) -> None:
    cond, weak, uncond = predictions(3)
    got = stg.combine(cond, weak, uncond, scale=scale, guidance_scale=guidance_scale, rescale=rescale)
    assert_close(got, textbook(cond, [weak], uncond, [scale], guidance_scale, rescale), **close)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_without_uncond_there_is_no_cfg(rescale: float) -> None:
    cond, weak = predictions(2)
    got = stg.combine(cond, weak, scale=1.5, guidance_scale=9.0, rescale=rescale)
    assert_close(got, textbook(cond, [weak], None, [1.5], rescale=rescale), **close)


def test_defaults_are_scale_one_and_nothing_else() -> None:
    cond, weak, uncond = predictions(3)
    assert_close(stg.combine(cond, weak), 2 * cond - weak, **close)
    assert_close(stg.combine(cond, weak, uncond), 2 * cond - weak, **close)  # guidance_scale 1 is CFG off


def test_several_branches_have_a_scale_each_or_share_one() -> None:
    cond, uncond, spatial, temporal = predictions(4)
    got = stg.combine(cond, [spatial, temporal], uncond, scale=[2.0, 0.5], guidance_scale=3.0, rescale=0.7)
    assert_close(got, textbook(cond, [spatial, temporal], uncond, [2.0, 0.5], 3.0, 0.7), **close)
    shared = stg.combine(cond, (spatial, temporal), uncond, scale=0.5, guidance_scale=3.0)
    assert_close(shared, textbook(cond, [spatial, temporal], uncond, [0.5, 0.5], 3.0), **close)


def test_no_branches_is_plain_cfg() -> None:
    cond, uncond = predictions(2)
    assert_close(stg.combine(cond, [], uncond, guidance_scale=3.0), textbook(cond, [], uncond, [], 3.0), **close)


def test_guidance_scale_may_be_a_value_per_frame() -> None:
    """As Stable Video Diffusion has it."""
    cond, weak, uncond = predictions(3)
    per_frame = torch.linspace(1.0, 3.0, SHAPE[2]).reshape(1, 1, -1, 1, 1)
    got = stg.combine(cond, weak, uncond, scale=2.0, guidance_scale=per_frame, rescale=0.7)
    assert_close(got, textbook(cond, [weak], uncond, [2.0], per_frame, 0.7), **close)
    for frame, g in enumerate(per_frame.flatten().tolist()):
        alone = stg.combine(cond, weak, uncond, scale=2.0, guidance_scale=g)
        whole = stg.combine(cond, weak, uncond, scale=2.0, guidance_scale=per_frame)
        assert_close(whole[:, :, frame], alone[:, :, frame], **close)


def test_scale_may_be_a_tensor() -> None:
    cond, first, second = predictions(3)
    per_sample = torch.tensor([0.5, 2.0]).reshape(2, 1, 1, 1, 1)
    got = stg.combine(cond, [first, second], scale=[per_sample, torch.tensor(1.5)])
    assert_close(got, textbook(cond, [first, second], None, [per_sample, torch.tensor(1.5)]), **close)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("shape", [SHAPE, (2, 4, 2), (2, 3)], ids=str)
def test_scales_may_be_one_value_per_sample(shape: tuple[int, ...], rescale: float) -> None:
    """Also where the last dimension has as many entries as there are samples."""
    cond, weak, uncond = (torch.randn(shape) for _ in range(3))
    scale, g = torch.tensor([0.0, 2.0], dtype=torch.float64), torch.tensor([4.5, 1.5])
    got = stg.combine(cond, weak, uncond, scale=scale, guidance_scale=g, rescale=rescale)
    for i in range(2):
        one = [t[i, None] for t in (cond, weak, uncond)]
        alone = stg.combine(*one, scale=float(scale[i]), guidance_scale=float(g[i]), rescale=rescale)
        assert_close(got[i, None], alone, **close)


# --- identities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
def test_scale_zero_is_cfg_whatever_weak_holds(bad: float, guidance_scale: float) -> None:
    cond, weak, uncond = predictions(3)
    cond[0, 0, 0, 0, 0] = -0.0
    broken = torch.full_like(weak, bad)
    cfg = cond if guidance_scale == 1 else uncond + guidance_scale * (cond - uncond)
    for scale in (0, 0.0, torch.tensor(0.0), torch.zeros(2)):
        got = stg.combine(cond, broken, uncond, scale=scale, guidance_scale=guidance_scale)
        assert_close(got, cfg, **exact)
        assert_close(stg.combine(cond, broken, scale=scale), cond, **exact)
        if not isinstance(scale, Tensor):  # down to the sign of zero
            assert torch.equal(got.view(torch.int32), cfg.view(torch.int32))
    one = stg.combine(cond, weak, uncond, scale=1.5, guidance_scale=guidance_scale)
    both = stg.combine(cond, [broken, weak], uncond, scale=[0.0, 1.5], guidance_scale=guidance_scale)
    assert_close(both, one, **exact)


def test_guidance_scale_one_leaves_uncond_out_of_account() -> None:
    cond, weak = predictions(2)
    got = stg.combine(cond, weak, torch.full_like(cond, torch.nan), scale=1.5, guidance_scale=1)
    assert_close(got, stg.combine(cond, weak, scale=1.5), **exact)


def test_nan_in_weak_is_not_hidden() -> None:
    cond, weak = predictions(2)
    weak[1] = torch.nan
    out = stg.combine(cond, weak, scale=0.5)
    assert out[1].isnan().all()
    assert not out[0].isnan().any()


def test_weak_equal_to_cond_changes_nothing() -> None:
    cond, uncond = predictions(2)
    assert_close(
        stg.combine(cond, cond.clone(), uncond, scale=3.0, guidance_scale=4.5), uncond + 4.5 * (cond - uncond), **exact
    )


def test_rescale_one_gives_the_standard_deviation_of_cond() -> None:
    cond, weak, uncond = predictions(3)
    out = stg.combine(cond, weak, uncond, scale=2.0, guidance_scale=6.0, rescale=1.0)
    dims = (1, 2, 3, 4)
    assert_close(out.std(dims), cond.std(dims), **close)
    off = stg.combine(cond, weak, uncond, scale=2.0, guidance_scale=6.0)
    assert (off.std(dims) > 1.5 * cond.std(dims)).all()
    assert_close(out / off, (cond.std(dims) / off.std(dims)).reshape(2, 1, 1, 1, 1).expand(SHAPE), **close)


def test_rescale_of_a_constant_prediction_is_finite() -> None:
    cond, weak = torch.ones(2, 3, 4), torch.zeros(2, 3, 4)
    assert_close(stg.combine(cond, weak, rescale=0.7), torch.full((2, 3, 4), 2.0), **exact)


@pytest.mark.parametrize("rescale", [0.3, 1.0])
def test_rescale_agrees_with_diffusers(rescale: float) -> None:
    from diffusers.guiders.guider_utils import rescale_noise_cfg

    cond, weak, uncond = predictions(3)
    plain = stg.combine(cond, weak, uncond, scale=2.0, guidance_scale=6.0)
    got = stg.combine(cond, weak, uncond, scale=2.0, guidance_scale=6.0, rescale=rescale)
    assert_close(got, rescale_noise_cfg(plain, cond, guidance_rescale=rescale), **close)


def test_diffusers_skip_layer_guider_agrees() -> None:
    """diffusers' SkipLayerGuidance: u + g (c - u) + s (c - w)."""
    from diffusers.guiders.skip_layer_guidance import LayerSkipConfig, SkipLayerGuidance

    cond, weak, uncond = predictions(3)
    guider = SkipLayerGuidance(
        guidance_scale=4.5,
        skip_layer_guidance_scale=2.8,
        skip_layer_guidance_start=0.0,
        skip_layer_guidance_stop=1.0,
        skip_layer_config=LayerSkipConfig(indices=[0], fqn="blocks"),
        guidance_rescale=0.7,
    )
    guider.set_state(step=1, num_inference_steps=4, timestep=torch.tensor(500))
    found = guider.forward(cond, uncond, weak)
    expected = found[0] if isinstance(found, tuple) else found.pred  # a tuple in diffusers 0.35
    got = stg.combine(cond, weak, uncond, scale=2.8, guidance_scale=4.5, rescale=0.7)
    assert_close(got, expected, **close)


# --- dtypes and inputs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, rescale: float) -> None:
    cond, weak, uncond = predictions(3, dtype=dtype)
    got = stg.combine(cond, weak, uncond, scale=3.0, guidance_scale=7.0, rescale=rescale)
    in_float = stg.combine(
        cond.float(), weak.float(), uncond.float(), scale=3.0, guidance_scale=7.0, rescale=rescale
    ).to(dtype)
    assert got.dtype == dtype
    assert_close(got, in_float, **exact)  # one rounding, at the end
    naive = uncond + 7.0 * (cond - uncond) + 3.0 * (cond - weak)
    assert rescale or not torch.equal(naive, got)


def test_half_precision_does_not_overflow_on_the_way() -> None:
    cond, weak = torch.full((1, 4), 6e4).half(), torch.full((1, 4), 5e4).half()
    uncond = torch.full((1, 4), 6.4e4).half()
    # 6.4e4 + 10 * -0.4e4 + 1e4 = 3.4e4; 10 * 6e4 alone is beyond float16.
    assert_close(
        stg.combine(cond, weak, uncond, guidance_scale=10.0).float(), torch.full((1, 4), 3.4e4), rtol=1e-2, atol=0
    )


def test_inputs_are_left_alone_and_the_result_is_fresh() -> None:
    cond, weak, uncond = predictions(3)
    before = [t.clone() for t in (cond, weak, uncond)]
    for out in (stg.combine(cond, weak, uncond, scale=0.0), stg.combine(cond, [], None), stg.combine(cond, cond)):
        out.mul_(5.0)
    for tensor, copy in zip((cond, weak, uncond), before, strict=True):
        assert_close(tensor, copy, **exact)


def test_gradients_flow_to_all_predictions() -> None:
    cond, weak, uncond = (t.double().float().requires_grad_() for t in predictions(3))
    stg.combine(cond, weak, uncond, scale=2.0, guidance_scale=4.0).sum().backward()
    for tensor, weight in ((cond, 6.0), (weak, -2.0), (uncond, -3.0)):
        assert_close(tensor.grad, torch.full(SHAPE, weight), **close)


# --- properties -------------------------------------------------------------------------------------------------------

few = settings(max_examples=25, deadline=None, derandomize=True, database=None)
scales = st.floats(-10, 10, width=32)


def tolerance(*scales: float) -> dict[str, float]:
    return {"rtol": 0.0, "atol": 1e-5 * (1 + sum(map(abs, scales)))}


@few
@given(a=scales, b=scales, g=scales, seed=st.integers(0, 1000))
def test_linear_in_the_scale(a: float, b: float, g: float, seed: int) -> None:
    cond, weak, uncond = predictions(3, seed=seed)
    zero, one, both = (stg.combine(cond, weak, uncond, scale=s, guidance_scale=g) for s in (a, b, a + b))
    cfg = stg.combine(cond, weak, uncond, scale=0.0, guidance_scale=g)
    assert_close(zero + one, both + cfg, **tolerance(*[4 * v for v in (a, b, g)]))


@few
@given(s=scales, g=scales, factor=st.floats(0.125, 8, width=32), shift=st.floats(-8, 8, width=32))
def test_affine_maps_commute_with_it(s: float, g: float, factor: float, shift: float) -> None:
    """All weights sum to one: guiding x or factor * x + shift (another parametrisation of the same) is the same."""
    triple = predictions(3)
    moved = stg.combine(*(factor * t + shift for t in triple), scale=s, guidance_scale=g)
    assert_close(moved, factor * stg.combine(*triple, scale=s, guidance_scale=g) + shift, **tolerance(80 * s, 80 * g))


@few
@given(r=st.floats(0, 1), s=scales, seed=st.integers(0, 1000))
def test_rescale_interpolates(r: float, s: float, seed: int) -> None:
    cond, weak = predictions(2, seed=seed)
    off, on, between = (stg.combine(cond, weak, scale=s, rescale=value) for value in (0.0, 1.0, r))
    assert_close(between, r * on + (1 - r) * off, **tolerance(8 * s))
