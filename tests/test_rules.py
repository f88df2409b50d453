"""The guidance rules: their formulas, diffusers' guiders as the oracle, and their way into pipelines."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale
from diffusers.pipelines.pag.pag_utils import PAGMixin
from torch import Tensor, nn
from torch.testing import assert_close

import stg_hooks as stg
from stg_hooks.guidance.rules import RULES
from tests import zoo

exact: dict[str, Any] = {"rtol": 0, "atol": 0}
close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
G, SCALE = 4.0, 0.7


def predictions(count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Correlated ones, of another size in each sample."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(3, 4, 2, 5, 5, generator=generator)
    size = torch.tensor([0.3, 1.0, 4.0]).reshape(3, 1, 1, 1, 1)
    return [(size * (common + torch.randn(common.shape, generator=generator))).to(dtype) for _ in range(count)]


C, W, U, W2 = predictions(4)


# --- against diffusers' guiders ---


def test_zero_star() -> None:
    alpha = cfg_zero_star_scale(C.flatten(1), U.flatten(1)).reshape(-1, 1, 1, 1, 1)
    expected = alpha * U + G * (C - alpha * U) + SCALE * (C - W)
    got = stg.combine(C, W, U, scale=SCALE, guidance_scale=G, rule="zero_star")
    assert_close(got, expected, **close)
    for i in range(3):  # per sample
        alone = stg.combine(C[i : i + 1], W[i : i + 1], U[i : i + 1], scale=SCALE, guidance_scale=G, rule="zero_star")
        assert_close(got[i : i + 1], alone, **close)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("norm", [None, 5.0, 15.0, 1e6])
def test_apg(eta: float, norm: float | None) -> None:
    oracle = normalized_guidance(C, U, G, eta=eta, norm_threshold=norm or 0.0)
    rule = functools.partial(stg.rules.apg, eta=eta, norm=norm)
    got = stg.combine(C, W, U, scale=SCALE, guidance_scale=G, rule=rule)
    assert_close(got, oracle + SCALE * (C - W), **close)
    if eta == 1.0 and norm in (None, 1e6):
        assert_close(got, stg.combine(C, W, U, scale=SCALE, guidance_scale=G), **close)


def test_the_name_apg_is_apg_without_a_parallel_part() -> None:
    expected = normalized_guidance(C, U, G, eta=0.0) + SCALE * (C - W)
    assert_close(stg.combine(C, W, U, scale=SCALE, guidance_scale=G, rule="apg"), expected, **close)


@pytest.mark.parametrize("norm_dim", [-1, (-1, -2), (1, 2)])
def test_apg_over_some_dimensions(norm_dim: int | tuple[int, ...]) -> None:
    oracle = normalized_guidance(C, U, G, eta=0.3, norm_threshold=2.0, norm_dim=norm_dim)
    rule = f"apg(eta=0.3, norm=2.0, norm_dim={norm_dim})"
    assert_close(stg.combine(C, W, U, scale=SCALE, guidance_scale=G, rule=rule), oracle + SCALE * (C - W), **close)
    assert not torch.allclose(oracle, normalized_guidance(C, U, G, eta=0.3, norm_threshold=2.0), rtol=1e-2, atol=1e-2)
    average = stg.rules.AveragedApg(-0.5, 0.3, 2.0, norm_dim).at(stg.Step(0, 4), 0)
    assert_close(average(C, U, [], G), oracle, **close)


# --- frequencies, and what stands out ---


@pytest.mark.parametrize(
    ("parallel", "expected"),
    [
        (1.0, [
            -8.6861, 3.8676, 16.3831, 13.2323, -2.798, -13.469, -9.3412, -0.9458, -15.6694, -12.2605, 1.4329, 8.1631,
            3.4213, -0.6746, 4.1067, 8.674, 1.0425, -1.9959, 2.504, 1.3454, -8.5359, -13.6042, -3.2273, 13.3067,
        ]),
        (0.25, [
            -8.6405, -0.6083, 9.9947, 8.2304, -3.8488, -9.8609, -2.4763, 6.445, -10.4677, -6.1861, 5.2879, 7.8415,
            -0.9332, -6.8862, -0.731, 7.9992, -5.6314, -4.6785, 4.4967, 6.7369, -2.4879, -9.8994, -3.7788, 8.4538,
        ]),
    ],
)  # fmt: skip
def test_frequency_decoupled_as_diffusers_computes_it(parallel: float, expected: list[float]) -> None:
    """`FrequencyDecoupledGuidance(guidance_scales=[10.0, 5.0, 2.0])` of 0.42.1 with kornia 0.9.0: rows 0, 3 and 6."""
    n = torch.arange(64.0).reshape(1, 1, 8, 8)
    c, u = (n * 0.7).sin(), (n * 1.3).cos()
    rule = f"frequency_decoupled(scales=(10.0, 5.0, 2.0), parallel={parallel})"
    got = stg.combine(c, [], u, scale=[], guidance_scale=G, rule=rule)
    assert_close(got[0, 0, ::3].flatten(), torch.tensor(expected), rtol=0, atol=1e-4)


def test_frequency_decoupled_by_matrices() -> None:
    """Two bands of frames of any size, with blur and resizing as matrices over one axis; videos frame by frame."""
    c, u = (
        torch.randn(2, 3, 2, 7, 10, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (0, 1)
    )

    def blur(size: int) -> Tensor:
        found = torch.zeros(size, size, dtype=torch.float64)
        for i in range(size):
            for offset, weight in zip(range(-2, 3), (1, 4, 6, 4, 1), strict=True):
                j = abs(i + offset)
                found[i, j if j < size else 2 * (size - 1) - j] += weight / 16
        return found

    def resize(size: int, new: int) -> Tensor:
        found = torch.zeros(new, size, dtype=torch.float64)
        for i in range(new):
            at = max(0.0, (i + 0.5) * size / new - 0.5)
            low, part = int(at), at - int(at)
            found[i, low] += 1 - part
            found[i, min(low + 1, size - 1)] += part
        return found

    rows, columns = ((resize(n, n // 2) @ blur(n), blur(n) @ resize(n // 2, n)) for n in c.shape[-2:])
    d = c - u
    low = rows[1] @ (rows[0] @ d @ columns[0].mT) @ columns[1].mT
    expected = u + 7.0 * (d - low) + 3.0 * low
    got = stg.combine(c.float(), [], u.float(), scale=[], guidance_scale=G, rule="frequency_decoupled(scales=(7, 3))")
    assert_close(got, expected.float(), **close)
    alike = stg.combine(c, [], u, scale=[], guidance_scale=G, rule=f"frequency_decoupled(scales=({G}, {G}))")
    assert_close(alike, (u + G * (c - u)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("rule", "shape", "error", "message"),
    [
        ("frequency_decoupled", (2, 6, 4), stg.TargetError, "tokens in a sequence. Use another rule"),
        ("salient", (2, 6, 4), stg.TargetError, "tokens in a sequence"),
        ("frequency_decoupled(scales=(9, 7, 5, 3))", (1, 2, 8, 8), stg.SettingError, "4 bands .* frames of 12 rows"),
        ("frequency_decoupled(scales=())", (1, 2, 8, 8), stg.SettingError, r"scales=\(\): expected a CFG weight"),
        ("frequency_decoupled(scales=5)", (1, 2, 8, 8), stg.SettingError, "scales=5: expected a CFG weight"),
        ("apg(norm_dim=7)", (1, 2, 8, 8), stg.SettingError, "norm_dim=7: expected dimensions"),
        ("apg(etta=1)", (1, 2, 8, 8), stg.SettingError, "'apg' has no value 'etta'; choose from eta, norm, norm_dim"),
        ("CFG_Zero", (1, 2, 8, 8), stg.SettingError, "Here it is called rule='zero_star'"),
        ("cfg(x=1)", (1, 2, 8, 8), stg.SettingError, "'cfg' has no value 'x'; it has none"),
    ],
)
def test_rules_that_cannot_be_used(rule: str, shape: tuple[int, ...], error: type[Exception], message: str) -> None:
    c, u, w = torch.randn(3, *shape).unbind()
    with pytest.raises(error, match=message):
        stg.combine(c, w, u, guidance_scale=G, rule=rule)


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_rescaled_terms(rescale: float, partial: bool) -> None:
    """`rescale_guidance` of sd-perturbed-attention, commit 59be2a7, written out sample by sample."""
    found = []
    for c, u, w, w2 in zip(C, U, W, W2, strict=True):
        plain, term = u + G * (c - u), SCALE * (c - w) + 0.2 * (c - w2)
        factor = rescale * c.std() / ((c if partial else plain) + term).std() + 1 - rescale
        found.append(plain + factor * term)
    rule = f"rescaled_terms(rescale={rescale}, partial={partial})"
    got = stg.combine(C, [W, W2], U, scale=[SCALE, 0.2], guidance_scale=G, rule=rule)
    assert_close(got, torch.stack(found), **close)


def test_salient() -> None:
    """`snf_guidance` of sd-perturbed-attention: a choice in each place of a frame, written out place by place."""
    c, u, w = (tensor[:, :2, 0] for tensor in (C, U, W))
    one, other = G * (c - u), 3.0 * (c - w)
    weights = torch.tensor([-0.5, 0.0, -0.5]).exp()
    weights = weights / weights.sum()

    def stands_out(frame: Tensor) -> Tensor:
        at = [1, 0, 1, 2, 3, 4, 3]  # reflected at the edges
        wide = frame.abs()[at][:, at]
        blurred = torch.zeros(5, 5)
        for y in range(5):
            for x in range(5):
                blurred[y, x] = weights @ wide[y : y + 3, x : x + 3] @ weights
        return blurred.flatten().softmax(0).reshape(5, 5)

    expected = torch.empty_like(c)
    for i in range(3):
        for k in range(2):
            is_more = stands_out(other[i, k]) > stands_out(one[i, k])
            assert 0 < is_more.sum() < 25
            expected[i, k] = u[i, k] + torch.where(is_more, other[i, k], one[i, k])
    assert_close(stg.combine(c, w, u, scale=3.0, guidance_scale=G, rule="salient"), expected, **close)


# --- orthogonal branches ---


def test_orthogonal_follows_the_paper() -> None:
    """STG Eq. 21, sample by sample in float64."""
    s1, s2 = 2.0, 0.5
    expected = []
    for c, w1, w2, u in zip(C.double(), W.double(), W2.double(), U.double(), strict=True):
        d1, d2 = c - w1, c - w2
        d2 = d2 - (d1 * d2).sum() / d1.square().sum() * d1
        assert abs((d1 * d2).sum()) < 1e-9
        expected.append(u + G * (c - u) + s1 * d1 + s2 * d2)
    got = stg.combine(C, [W, W2], U, scale=[s1, s2], guidance_scale=G, rule="orthogonal")
    assert_close(got, torch.stack(expected).float(), **close)
    assert not torch.allclose(got, stg.combine(C, [W, W2], U, scale=[s1, s2], guidance_scale=G))


def test_three_branches_are_orthogonal_to_each_other() -> None:
    terms = [torch.randn(2, 30) for _ in range(3)]
    alone = [stg.rules.orthogonal(torch.zeros(2, 30), None, terms[: i + 1], 1.0) for i in range(3)]
    parts = [alone[0], alone[1] - alone[0], alone[2] - alone[1]]
    for i in range(3):
        for j in range(i):
            assert_close((parts[i] * parts[j]).sum(1), torch.zeros(2), rtol=0, atol=1e-4)


def test_a_branch_that_repeats_another_adds_nothing() -> None:
    twice = stg.combine(C, [W, W], U, scale=[1.0, 1.0], guidance_scale=G, rule="orthogonal")
    assert_close(twice, stg.combine(C, W, U, guidance_scale=G), **close)
    off = stg.combine(C, [C, W], U, scale=[1.0, SCALE], guidance_scale=G, rule="orthogonal")  # onto zero
    assert_close(off, stg.combine(C, W, U, scale=SCALE, guidance_scale=G), **close)


# --- identities of all rules ---


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "rescaled_terms"])
@pytest.mark.parametrize("uncond", [None, U])
def test_without_cfg_every_rule_is_skip_guidance(rule: str, uncond: Tensor | None) -> None:
    got = stg.combine(C, W, uncond, scale=SCALE, guidance_scale=1.0, rule=rule)
    assert_close(got, C + SCALE * (C - W), **close)


@pytest.mark.parametrize("rule", RULES)
def test_scale_zero_and_a_weak_that_is_cond(rule: str) -> None:
    got = stg.combine(C, W * torch.nan, U, scale=0.0, guidance_scale=G, rule=rule)
    assert got.isfinite().all()
    if rule != "salient":  # whose choice in each place may fall on a term that is zero there
        assert_close(stg.combine(C, C, U, scale=3.0, guidance_scale=G, rule=rule), got, **close)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("zero", ["cond", "uncond", "both"])
def test_nothing_to_project_onto(rule: str, zero: str) -> None:
    c, u = (torch.zeros_like(C) if zero in (name, "both") else t for name, t in (("cond", C), ("uncond", U)))
    assert stg.combine(c, c, u, guidance_scale=G, rule=rule).isfinite().all()


@pytest.mark.parametrize("rule", RULES)
def test_half_precision_is_computed_in_float32(rule: str) -> None:
    c, w, u = (t.bfloat16() for t in (C, W, U))
    got = stg.combine(c, w, u, scale=SCALE, guidance_scale=G, rule=rule)
    expected = stg.combine(c.float(), w.float(), u.float(), scale=SCALE, guidance_scale=G, rule=rule)
    assert_close(got, expected.bfloat16(), **exact)


@pytest.mark.parametrize("rule", RULES)
def test_rescale_comes_after_the_rule(rule: str) -> None:
    out = stg.combine(C, W, U, scale=SCALE, guidance_scale=G, rule=rule)
    dims = (1, 2, 3, 4)
    expected = out * (0.7 * C.std(dims, keepdim=True) / out.std(dims, keepdim=True) + 0.3)
    assert_close(stg.combine(C, W, U, scale=SCALE, guidance_scale=G, rule=rule, rescale=0.7), expected, **close)


def test_a_rule_of_ones_own() -> None:
    def rule(cond: Tensor, uncond: Tensor | None, terms: Sequence[Tensor], guidance_scale: Any) -> Tensor:
        assert uncond is not None
        assert [t.dtype for t in (cond, uncond, *terms)] == [torch.float32] * 4
        return uncond if guidance_scale > 3 else sum(terms, cond)

    got = stg.combine(C, [W, W2], U, scale=[SCALE, 0.5], guidance_scale=2.0, rule=rule)
    assert_close(got, C + SCALE * (C - W) + 0.5 * (C - W2), **close)
    kept = U.clone()
    stg.combine(C, [W, W2], U, guidance_scale=G, rule=rule).mul_(2)  # fresh, though the rule handed its argument back
    assert_close(U, kept, **exact)


# --- in a run: all faces in test_contract.py ---


def test_a_module_has_to_be_told_the_cfg_weight() -> None:
    with pytest.raises(stg.SettingError, match=r"rule='apg' needs the final prediction, hence the CFG weight"):
        stg.apply(zoo.DiT(), [2], batched_cfg=True, rule="apg")


# --- a rule that remembers ---


def averaged(predictions: Sequence[tuple[Tensor, Tensor, Tensor]], scale: float, g: float) -> list[Tensor]:
    """Guide the steps of one run by diffusers' guider."""
    buffer = MomentumBuffer(-0.5)
    return [
        normalized_guidance(c, u, g, buffer, eta=0.3, norm_threshold=9.0) + scale * (c - w) for c, w, u in predictions
    ]


def test_the_momentum_of_apg_in_a_loop() -> None:
    model: nn.Module = zoo.build("plain")
    weak_model = zoo.without(model, ["blocks.2"])
    text, other = zoo.inputs()["text"], zoo.inputs(seed=7)["text"]
    xs = [zoo.inputs(seed=seed)["x"] for seed in range(4)]
    expected = averaged([(model(x, text), weak_model(x, text), model(x, other)) for x in xs], 0.5, G)
    rule = stg.rules.AveragedApg(momentum=-0.5, eta=0.3, norm=9.0)
    guider = stg.Guider(model, [2], 0.5, guidance_scale=G, rule=rule)
    plain = stg.Guider(model, [2], 0.5, guidance_scale=G, rule=functools.partial(stg.rules.apg, eta=0.3, norm=9.0))
    for _ in range(2):  # the second run starts again
        got = []
        for index, x in enumerate(xs):
            guider.step = stg.Step(index, 4)
            got.append(guider(x, cond={"text": text}, uncond={"text": other}))
        assert_close(got, expected, **close)
    assert_close(plain(xs[0], cond={"text": text}, uncond={"text": other}), expected[0], **close)
    assert not torch.allclose(plain(xs[1], cond={"text": text}, uncond={"text": other}), expected[1], rtol=1e-2)


def test_a_rule_that_remembers_needs_a_run() -> None:
    rule = stg.rules.AveragedApg()
    with pytest.raises(stg.SettingError, match=r"remembers the steps of a run, of which stg\.combine knows nothing"):
        stg.combine(C, W, U, guidance_scale=G, rule=rule)
    model: nn.Module = zoo.build("plain")
    text = zoo.inputs()["text"]
    guider = stg.Guider(model, [2], guidance_scale=G, rule=rule)
    with pytest.raises(stg.CallError, match=r"the step's index is not known here.*guider\.step = stg\.Step"):
        guider(zoo.inputs()["x"], cond={"text": text}, uncond={"text": text})
    for bad in (1.0, -1, True, "0.5", float("nan")):
        with pytest.raises(stg.SettingError, match=r"momentum=.*expected a number between -1 and 1"):
            stg.rules.AveragedApg(momentum=bad)  # type: ignore[arg-type]


def test_windows_have_averages_of_their_own_or_are_refused() -> None:
    model: nn.Module = zoo.build("plain")
    text, other = zoo.inputs()["text"], zoo.inputs(seed=7)["text"]
    xs = [zoo.inputs(seed=seed)["x"] for seed in range(3)]

    def steps(*windows: Callable[[Tensor], Tensor]) -> list[Tensor]:
        guider = stg.Guider(model, [2], 0.5, guidance_scale=G, rule=stg.rules.AveragedApg())
        first = []
        for index, x in enumerate(xs):
            guider.step = stg.Step(index, 3)
            made = [guider(window(x), cond={"text": text}, uncond={"text": other}) for window in windows]
            first.append(made[0])
        return first

    with torch.no_grad():
        alone = steps(lambda x: x)
        assert_close(steps(lambda x: x, lambda x: x[:, :3]), alone, **exact)
        with pytest.raises(stg.CallError, match=r"AveragedApg remembers .* the second one at step 1.*a rule object"):
            steps(lambda x: x, lambda x: -x)


# --- a scale that falls with the timestep ---


@pytest.mark.parametrize(("scale", "fall"), [(3.0, 0.003), (2.0, 0.01), (3.0, 0.0)])
def test_adaptive_scale(scale: float, fall: float) -> None:
    class Theirs(PAGMixin):
        _pag_scale, _pag_adaptive_scale, pag_applied_layers = scale, fall, ("mid",)

    ours = stg.rules.adaptive_scale(scale, fall)
    for t in (999, 701, 300, 1):
        expected = Theirs()._get_pag_scale(t)
        assert ours(stg.Step(timestep=t)) == pytest.approx(expected)
        assert ours(stg.Step(sigma=t / 1000, kind="flow")) == pytest.approx(expected)
    with pytest.raises(stg.CallError, match=r"falls with the timestep, which is not known.*stg\.Step\(timestep=t\)"):
        ours(stg.Step(0, 4, 0.5))
    with pytest.raises(stg.SettingError, match="fall=-1: expected a number, 0 or more"):
        stg.rules.adaptive_scale(1.0, -1)
