"""A Guider is a k-diffusion denoiser: its own samplers and models against a denoiser written by hand."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import stg_hooks as stg
from tests import kdiffusion, zoo

K = kdiffusion.load()
pytestmark = pytest.mark.filterwarnings("error::stg_hooks.StgWarning")  # guidance that works says nothing

exact: dict[str, Any] = {"rtol": 0, "atol": 0}
close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
SIGMAS = K.sampling.get_sigmas_karras(5, 0.1, 8.0)
SCALE, G = 0.8, 3.0


def image(batch: int = 2, size: int = 8) -> Tensor:
    return SIGMAS[0] * torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def classes(batch: int = 2) -> dict[str, dict[str, Tensor]]:
    """The last class stands for "no condition"."""
    return {
        "cond": {"class_cond": torch.arange(batch) % 4},
        "uncond": {"class_cond": torch.full((batch,), 4)},
    }


def vectors(batch: int = 2) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return {
        "cond": {"mapping_cond": torch.randn(batch, 6, generator=generator)},
        "uncond": {"mapping_cond": torch.zeros(batch, 6)},
    }


@pytest.fixture(scope="module")
def denoiser() -> nn.Module:
    return K.layers.Denoiser(kdiffusion.transformer(), sigma_data=0.5)


@pytest.fixture(scope="module")
def weak(denoiser: nn.Module) -> nn.Module:
    return zoo.without(denoiser, ["inner_model.blocks.2"], zoo.Keep)


def by_hand(
    denoiser: nn.Module, weak: nn.Module, scale: float = SCALE, g: float = G, rescale: float = 0.0
) -> Callable[..., Tensor]:
    """Three full passes and the textbook's combination; the weak model is a copy with the block replaced."""

    def denoise(x: Tensor, sigma: Tensor, cond: dict[str, Any], uncond: dict[str, Any] | None = None) -> Tensor:
        c, w = denoiser(x, sigma, **cond), weak(x, sigma, **cond)
        u = c if uncond is None else denoiser(x, sigma, **uncond)
        out = (u + g * (c - u)) + scale * (c - w)
        dims = list(range(1, out.ndim))
        return out * (rescale * c.std(dims, keepdim=True) / out.std(dims, keepdim=True) + 1 - rescale)

    return denoise


def sample(name: str, model: Any, x: Tensor, extra_args: dict[str, Any], **more: Any) -> Tensor:
    """Run one of k-diffusion's samplers, with the same noise each time."""
    torch.manual_seed(3)
    sampler = getattr(K.sampling, f"sample_{name}")
    more = {"extra_args": extra_args, "disable": True, **more}
    if name in ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"):
        more["noise_sampler"] = K.sampling.BrownianTreeNoiseSampler(x, 0.05, 9.0, seed=4)
    if name == "dpm_fast":
        return sampler(model, x, 0.1, 8.0, 7, **more)
    if name == "dpm_adaptive":
        return sampler(model, x, 0.1, 8.0, rtol=1.0, atol=0.5, h_init=0.5, **more)
    return sampler(model, x, SIGMAS.to(x.dtype), **more)


ON_SCHEDULE = [
    "euler",
    "euler_ancestral",
    "heun",
    "dpm_2",
    "dpm_2_ancestral",
    "lms",
    "dpmpp_2s_ancestral",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_3m_sde",
    "dpmpp_sde",
]
SAMPLERS = [*ON_SCHEDULE, "dpm_fast", "dpm_adaptive"]


# --- what it computes ---


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler(name: str, denoiser: nn.Module, weak: nn.Module) -> None:
    guider = stg.Guider(denoiser, ["blocks.2"], SCALE, guidance_scale=G)
    got = sample(name, guider, image(), classes(), callback=guider.callback)
    assert_close(got, sample(name, by_hand(denoiser, weak), image(), classes()), **close)
    assert not torch.allclose(got, sample(name, by_hand(denoiser, weak, scale=0.0), image(), classes()), **close)
    assert guider.stats.weak_passes == guider.stats.guided_calls == guider.stats.calls > 0


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m"])
def test_cond_only(name: str, denoiser: nn.Module, weak: nn.Module) -> None:
    args = {"cond": classes()["cond"]}
    guider = stg.Guider(denoiser, ["blocks.2"], SCALE, guidance_scale=G)
    assert_close(sample(name, guider, image(), args), sample(name, by_hand(denoiser, weak), image(), args), **close)
    expected = sample(name, guider, image(), args)
    assert_close(sample(name, guider, image(), classes()["cond"]), expected, **exact)  # as k-diffusion passes it


@pytest.mark.parametrize("layer", ["d_blocks.1.2", "u_blocks.0.1", "u_blocks.1.1"])
@pytest.mark.parametrize("name", ["euler", "dpmpp_2m"])
def test_unet(name: str, layer: str) -> None:
    """A skipped attention of the U-Net returns its input: the residual around it is inside it."""
    model = K.layers.Denoiser(kdiffusion.unet(), sigma_data=0.5)
    weak_model = zoo.without(model, [f"inner_model.u_net.{layer}"], zoo.Keep)
    guider = stg.Guider(model, [layer], SCALE, guidance_scale=G)
    got = sample(name, guider, image(size=16), vectors())
    assert_close(got, sample(name, by_hand(model, weak_model), image(size=16), vectors()), **close)
    plain = sample(name, by_hand(model, model), image(size=16), vectors())
    assert not torch.allclose(got, plain, **close)


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "dpm_fast"])  # lms cannot do it itself
def test_half_precision(name: str, denoiser: nn.Module) -> None:
    half = zoo.without(denoiser, []).bfloat16()
    weak_half = zoo.without(half, ["inner_model.blocks.2"], zoo.Keep)
    x, sigma = image().bfloat16(), torch.full((2,), 2.0, dtype=torch.bfloat16)
    guider = stg.Guider(half, ["blocks.2"], SCALE, guidance_scale=G)
    got = sample(name, guider, x, classes())
    assert got.dtype == torch.bfloat16
    assert got.isfinite().all()
    c, u = (half(x, sigma, **classes()[which]).float() for which in ("cond", "uncond"))
    expected = u + G * (c - u) + SCALE * (c - weak_half(x, sigma, **classes()["cond"]).float())
    assert_close(guider(x, sigma, **classes()).float(), expected, rtol=3e-2, atol=3e-2 * expected.std().item())


class AlphaModel(nn.Module):
    """Takes (x, t) and a class, in the way that each of k-diffusion's wrappers calls what it wraps."""

    def __init__(self) -> None:
        super().__init__()
        self.net = kdiffusion.transformer()
        self.register_buffer("alphas_cumprod", torch.linspace(0.999, 0.01, 50))

    def forward(self, x: Tensor, t: Tensor, class_cond: Tensor) -> Tensor:
        return self.net(x, 0.1 + t.to(x.dtype) / 50, class_cond=class_cond)

    apply_model = forward


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "Denoiser": lambda model: K.layers.Denoiser(model.net, sigma_data=0.5),
    "VDenoiser": lambda model: K.external.VDenoiser(model),
    "CompVisDenoiser": lambda model: K.external.CompVisDenoiser(model),
    "DiscreteEpsDDPMDenoiser": lambda model: K.external.DiscreteEpsDDPMDenoiser(model, model.alphas_cumprod, False),
    "quantised": lambda model: K.external.DiscreteEpsDDPMDenoiser(model, model.alphas_cumprod, True),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_models(wrapper: str) -> None:
    """Layers are found through the wrappers, by index and by the tail of a name."""
    model = WRAPPERS[wrapper](AlphaModel())
    (name,) = [n for n, _ in model.named_modules() if n.endswith("blocks.2") and "mapping" not in n]
    weak_model = zoo.without(model, [name], zoo.Keep)
    expected = sample("dpmpp_2m", by_hand(model, weak_model), image(), classes())
    for layers in ([2], ["blocks.2"], [name], [model.get_submodule(name)]):
        guider = stg.Guider(model, layers, SCALE, guidance_scale=G)
        assert_close(sample("dpmpp_2m", guider, image(), classes()), expected, **close)


def test_a_function_around_a_denoiser(denoiser: nn.Module, weak: nn.Module) -> None:
    """As in tools that keep their conditioning elsewhere."""

    def thresholded(x: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        return denoiser(x, sigma, **kwargs).clamp(-1, 1)

    def expected(x: Tensor, sigma: Tensor, cond: Any, uncond: Any) -> Tensor:
        clamped = [lambda *a, f=f, **k: f(*a, **k).clamp(-1, 1) for f in (denoiser, weak)]
        return by_hand(*clamped)(x, sigma, cond, uncond)  # type: ignore[arg-type]

    guider = stg.Guider(thresholded, ["blocks.2"], SCALE, guidance_scale=G, model=denoiser)
    assert_close(sample("euler", guider, image(), classes()), sample("euler", expected, image(), classes()), **close)


def test_conditions_that_do_not_fit_in_one_call_are_made_in_two(denoiser: nn.Module, weak: nn.Module) -> None:
    """A condition that all samples share has no rows: the two predictions are made one after the other."""
    shared = {"cond": {"class_cond": torch.tensor([1])}, "uncond": {"class_cond": torch.tensor([4])}}
    guider = stg.Guider(denoiser, ["blocks.2"], SCALE, guidance_scale=G)
    got = sample("euler", guider, image(), shared)
    assert_close(got, sample("euler", by_hand(denoiser, weak), image(), shared), **close)


# --- a fresh tensor each time ---


class OneBuffer(nn.Module):
    """Writes every prediction into the same memory."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.inner_model = denoiser
        self.buffers_by_shape: dict[torch.Size, Tensor] = {}

    def forward(self, x: Tensor, sigma: Tensor, class_cond: Tensor) -> Tensor:
        return self.buffers_by_shape.setdefault(x.shape, torch.empty_like(x)).copy_(
            self.inner_model(x, sigma, class_cond=class_cond)
        )


@pytest.mark.parametrize("name", ["lms", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde"])
@pytest.mark.parametrize("scale", [0.0, SCALE])
@pytest.mark.parametrize("cfg", [False, True])
def test_samplers_that_keep_predictions(
    name: str, scale: float, cfg: bool, denoiser: nn.Module, weak: nn.Module
) -> None:
    args = classes() if cfg else {"cond": classes()["cond"]}
    guider = stg.Guider(OneBuffer(denoiser), ["blocks.2"], scale, guidance_scale=G, execution="full")
    got = sample(name, guider, image(), args)
    assert_close(got, sample(name, by_hand(denoiser, weak, scale), image(), args), **close)


@pytest.mark.parametrize("cfg", [False, True])
def test_memory_that_is_used_again_between_branches(cfg: bool, denoiser: nn.Module) -> None:
    branches = [stg.Branch([1], 0.5), stg.Branch([2], 0.8)]
    args = classes() if cfg else {"cond": classes()["cond"]}
    x, sigma = image(), torch.full((2,), 2.0)
    for execution in ("sequential", "full"):
        expected = stg.Guider(denoiser, branches=branches, guidance_scale=G, execution=execution)(x, sigma, **args)
        got = stg.Guider(OneBuffer(denoiser), branches=branches, guidance_scale=G, execution=execution)(
            x, sigma, **args
        )
        assert_close(got, expected, **close)
    reusing = OneBuffer(denoiser)
    plain = reusing(x, sigma, **classes()["cond"]).clone()
    with stg.apply(denoiser, branches=branches):
        expected = denoiser(x, sigma, **classes()["cond"])
    with stg.apply(reusing, branches=branches):
        assert_close(reusing(x, sigma, **classes()["cond"]), expected, **exact)
    assert_close(reusing(x, sigma, **classes()["cond"]), plain, **exact)


# --- callbacks ---


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_callback_of_ones_own(name: str, denoiser: nn.Module) -> None:
    seen: list[dict[str, Any]] = []
    plain: list[dict[str, Any]] = []
    guider = stg.Guider(denoiser, ["blocks.2"], SCALE, guidance_scale=G)
    got = sample(name, guider, image(), classes(), callback=stg.k_diffusion.callback(guider, seen.append))
    again = sample(name, guider, image(), classes(), callback=plain.append)
    assert_close(got, again, **exact)
    assert [set(info) - {"trace"} for info in seen] == [set(info) for info in plain]
    assert [info["i"] for info in seen] == list(range(len(seen)))
    rows = [row for info in seen for row in [info["trace"]]]
    assert all(any(row is other for other in guider.trace) for row in rows)
    if name in ("euler", "lms", "dpmpp_2m"):
        assert [row.step.sigma for row in rows] == pytest.approx(SIGMAS[:-1].tolist())
        assert [row.step.index for row in rows] == [0, 1, 2, 3, 4]
    assert all(row.size > 0 and -1 <= row.cosine <= 1 for row in rows)


def test_a_callback_before_anything_was_guided(denoiser: nn.Module) -> None:
    seen: list[dict[str, Any]] = []
    guider = stg.Guider(denoiser, ["blocks.2"], 0.0)
    both = stg.k_diffusion.callback(guider, seen.append)
    sample("euler", guider, image(), {"cond": classes()["cond"]}, callback=both)
    assert [info["trace"] for info in seen] == [None] * 5


# --- schedules ---


def steps_seen(name: str, denoiser: nn.Module, known: str, **more: Any) -> list[stg.Step]:
    seen: list[stg.Step] = []

    def note(step: stg.Step) -> None:
        seen.append(step)

    guider = stg.Guider(denoiser, ["blocks.2"], schedule=note, sigmas=SIGMAS if known == "sigmas" else None)
    args = {"cond": classes()["cond"]}
    for _ in range(2):  # the second run starts from the first step again
        sample(name, guider, image(), args, **({} if known == "sigmas" else {"callback": guider.callback}), **more)
    assert guider.stats.weak_passes == 0
    assert len(seen) % 2 == 0
    assert [(s.index, s.sigma) for s in seen[: len(seen) // 2]] == [(s.index, s.sigma) for s in seen[len(seen) // 2 :]]
    return seen[: len(seen) // 2]


@pytest.mark.parametrize("name", ON_SCHEDULE)
def test_sigmas_and_the_callback_tell_the_same_steps(name: str, denoiser: nn.Module) -> None:
    by_sigmas, by_callback = (steps_seen(name, denoiser, known) for known in ("sigmas", "callback"))
    assert [s.index for s in by_sigmas] == [s.index for s in by_callback]
    assert [s.sigma for s in by_sigmas] == [s.sigma for s in by_callback]
    assert {s.count for s in by_sigmas} == {5}
    assert {s.count for s in by_callback} == {None}
    assert {s.kind for s in by_sigmas} == {"karras"}
    # The step of a call is the first one whose noise level is not above the call's.
    expected = [next(i for i in range(5) if SIGMAS[i] <= s.sigma * (1 + 1e-5)) for s in by_sigmas]
    assert [s.index for s in by_sigmas] == expected
    assert {s.index for s in by_sigmas} == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("name", ["euler", "heun", "dpm_2"])
def test_the_callback_follows_churn(name: str, denoiser: nn.Module) -> None:
    """A churned step is made at more noise than its own; also where churn begins in the middle."""
    churn = {"s_churn": 5.0, "s_tmax": 6.0}
    steps = steps_seen(name, denoiser, "callback", **churn)
    firsts = [index for index, _ in itertools.groupby(step.index for step in steps)]
    assert firsts == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["dpm_fast", "dpm_adaptive"])
def test_samplers_without_a_schedule_count_up(name: str, denoiser: nn.Module) -> None:
    indices = [step.index for step in steps_seen(name, denoiser, "callback")]
    assert indices == sorted(indices)
    assert indices[0] == 0
    assert set(indices) == set(range(indices[-1] + 1))


def test_a_range_of_noise_levels_needs_no_sigmas(denoiser: nn.Module) -> None:
    level = SIGMAS[2].item()
    guider = stg.Guider(denoiser, [2], SCALE, sigma_range=(level, SIGMAS[1].item()))
    sample("euler", guider, image(), {"cond": classes()["cond"]})
    assert [row.step.sigma for row in guider.trace] == pytest.approx(SIGMAS[1:3].tolist())


# --- the CFGDenoiser idiom ---


class CFGDenoiser(nn.Module):
    """As written in many scripts around k-diffusion."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner_model = model

    def forward(self, x: Tensor, sigma: Tensor, uncond: Tensor, cond: Tensor, cond_scale: float) -> Tensor:
        x_in = torch.cat([x] * 2)
        sigma_in = torch.cat([sigma] * 2)
        cond_in = torch.cat([uncond, cond])
        uncond, cond = self.inner_model(x_in, sigma_in, class_cond=cond_in).chunk(2)
        return uncond + (cond - uncond) * cond_scale


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "dpmpp_2m_sde"])
def test_a_denoiser_that_does_cfg_itself(name: str, rescale: float, denoiser: nn.Module, weak: nn.Module) -> None:
    cfg = CFGDenoiser(denoiser)
    args = {which: condition["class_cond"] for which, condition in classes().items()} | {"cond_scale": G}
    plain = sample(name, cfg, image(), args)
    more = {"rescale": rescale, "guidance_scale": G} if rescale else {}
    with stg.k_diffusion.apply_to_cfg(cfg, ["blocks.2"], SCALE, **more) as applied:
        got = sample(name, cfg, image(), args)
    assert_close(got, sample(name, by_hand(denoiser, weak, rescale=rescale), image(), classes()), **close)
    assert applied.stats.weak_passes == applied.stats.calls == applied.stats.guided_calls
    assert_close(sample(name, cfg, image(), args), plain, **exact)


@pytest.mark.parametrize("bad", [object(), nn.Linear(1, 1), types.SimpleNamespace(inner_model=lambda x: x)])
def test_a_cfg_denoiser_without_a_module_inside(bad: Any) -> None:
    with pytest.raises(stg.TargetError, match=r"has no inner_model that is a torch\.nn\.Module\. Pass the module"):
        stg.k_diffusion.apply_to_cfg(bad, [2])


# --- bad input ---


@pytest.mark.parametrize(
    ("level", "message"),
    [(0.0, r"^called with sigma=0\.0: there is nothing to denoise\."), (torch.nan, r"^called with sigma=nan")],
)
def test_a_call_at_a_noise_level_that_is_none(level: float, message: str, denoiser: nn.Module) -> None:
    with pytest.raises(stg.CallError, match=message):
        stg.Guider(denoiser, [2])(image(), torch.full((2,), level), cond=classes()["cond"])


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (
            {"uncond": classes()["uncond"]},
            stg.SettingError,
            r"^cond has \[\], but uncond has \['class_cond'\]: give the same",
        ),
        (
            {"cond": {"class_cond": torch.tensor([1]), "aug_cond": torch.zeros(1, 9)}, "uncond": classes(1)["uncond"]},
            stg.SettingError,
            r"cond has \['aug_cond', 'class_cond'\], but uncond has",
        ),
        ({}, ValueError, "class_cond must be specified"),  # k-diffusion's own words
    ],
    ids=["no cond", "other keys", "neither"],
)
def test_conditions_that_do_not_fit(args: Any, error: type[Exception], message: str, denoiser: nn.Module) -> None:
    with pytest.raises(error, match=message):
        sample("euler", stg.Guider(denoiser, [2], guidance_scale=G), image(1), args)


@pytest.mark.parametrize("callback", [False, True])
def test_a_window_without_the_number_of_steps(callback: bool, denoiser: nn.Module) -> None:
    guider = stg.Guider(denoiser, [2], stop=0.5)
    with pytest.raises(
        stg.CallError,
        match=r"parts of the run, but .* is not known here.*stg\.Guider\(\.\.\., sigmas=",
    ):
        sample("euler", guider, image(), {"cond": classes()["cond"]}, callback=guider.callback if callback else None)


@pytest.mark.parametrize("bad", [[1.0], [0.1, 1.0], [[1.0, 0.5]], [1.0, 1.0, 0.0], [], "karras"])
def test_sigmas_that_are_no_schedule(bad: Any, denoiser: nn.Module) -> None:
    message = r"sigmas=('karras': expected| has shape .*) .*from high to low"
    with pytest.raises(stg.SettingError, match=message):
        stg.Guider(denoiser, [2], sigmas=bad)


def test_callbacks_that_are_none(denoiser: nn.Module) -> None:
    guider = stg.Guider(denoiser, [2])
    with pytest.raises(stg.CallError, match=r"the sampler reported \['x'\]: expected i and sigma"):
        guider.callback({"x": image()})
    for given in ((guider, None), (denoiser, print)):
        with pytest.raises(stg.TargetError, match=r"expected a stg\.Guider and a function of a dict"):
            stg.k_diffusion.callback(*given)


# --- weights of one value per sample ---


@pytest.mark.parametrize("rule", ["cfg", "zero_star", "apg"])
@pytest.mark.parametrize("together", [True, False])
def test_weights_for_each_image(together: bool, rule: str, denoiser: nn.Module) -> None:
    """One value per sample for scale and CFG weight, in one call for both predictions and in two."""
    args = classes()
    if not together:  # an object that both conditions have of their own is in the way of one call

        class Tagged(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner_model = denoiser

            def forward(self, x: Tensor, sigma: Tensor, class_cond: Tensor, tag: object) -> Tensor:
                return self.inner_model(x, sigma, class_cond=class_cond)

        model: nn.Module = Tagged()
        args = {which: {**condition, "tag": object()} for which, condition in args.items()}
    else:
        model = denoiser
    scale, g = torch.tensor([0.5, 2.0]), torch.tensor([1.5, 4.0])
    x, sigma = image(), torch.full((2,), 2.0)
    got = stg.Guider(model, ["blocks.2"], scale, guidance_scale=g, rescale=0.5, rule=rule)(x, sigma, **args)
    for i in range(2):
        guider = stg.Guider(model, ["blocks.2"], scale[i].item(), guidance_scale=g[i].item(), rescale=0.5, rule=rule)
        one = {
            which: {k: v[i : i + 1] if isinstance(v, Tensor) else v for k, v in args[which].items()} for which in args
        }
        assert_close(got[i : i + 1], guider(x[i : i + 1], sigma[:1], **one), **close)
