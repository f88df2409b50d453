"""Rows and containers: lists of samples, what a Guider returns, variance channels, scales per prompt."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stg_hooks as stg
from stg_hooks.guidance.samples import are_samples

EXECUTIONS = ("auto", "sequential", "batched", "full")
SCALE, G = 1.5, 4.0
CHANNELS = 6


pytestmark = pytest.mark.usefixtures("inference")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.mix(x))


class Lists(nn.Module):
    """Takes and returns lists of samples and texts, as Wan's own repository does."""

    def __init__(self, outputs: int = CHANNELS) -> None:
        super().__init__()
        self.inp, self.text, self.out = nn.Linear(CHANNELS, 8), nn.Linear(5, 8), nn.Linear(8, outputs)
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: list[Tensor], t: Tensor, context: list[Tensor], seq_len: int | None = None) -> list[Tensor]:
        h = torch.stack([self.inp(sample.movedim(0, -1)) for sample in x])
        text = torch.stack([self.text(tokens).mean(0) for tokens in context])
        h = h + (text + t.reshape(-1, 1)).reshape(len(x), 1, 1, 1, 8)
        for block in self.blocks:
            h = block(h)
        return [sample.movedim(-1, 0) for sample in self.out(h)]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(cls: type[nn.Module] = Lists, **more: Any) -> Any:
    torch.manual_seed(0)
    return cls(**more).eval()


def without_a_block(model: Any) -> Any:
    weak = copy.deepcopy(model)
    weak.blocks[2] = nn.Identity()
    return weak


def samples(count: int) -> list[Tensor]:
    return [random(CHANNELS, 2, 3, 3, seed=i) for i in range(count)]


def texts(count: int, lengths: int = 3) -> list[Tensor]:
    return [random(lengths + i, 5, seed=10 + i) for i in range(count)]


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("count", [2, 4, 2 * CHANNELS])
def test_halves_of_a_list(count: int, execution: str) -> None:
    model, half = build(), count // 2
    x, t, context = samples(count), torch.linspace(0.1, 0.9, count), texts(count)
    plain, weak = model(x, t, context), without_a_block(model)(x, t, context)
    for step in (1, 3):
        with stg.apply(model, ["blocks.2"], SCALE, batched_cfg=True, execution=execution) as applied:
            got = [model(x, t, context=context, seq_len=9) for _ in range(step)]
        for output in got:
            assert isinstance(output, list)
            for i, one in enumerate(output):
                j = half + i % half
                torch.testing.assert_close(one, plain[i] + SCALE * (plain[j] - weak[j]))
        assert applied.stats.weak_passes == applied.stats.guided_calls == step


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("rows", ["cond+uncond", slice(2), [2, 3], [True, True, False, False], slice(None)], ids=str)
def test_rows_of_a_list(rows: Any, execution: str) -> None:
    model, is_last = build(), rows == [2, 3]
    x, t, context = samples(4), torch.linspace(0.1, 0.9, 4), texts(4)
    plain, weak = model(x, t, context), without_a_block(model)(x, t, context)
    with stg.apply(model, ["blocks.2"], SCALE, rows=rows, execution=execution):
        got = [model(x, t, context) for _ in range(2)]
    for output in got:
        for i, one in enumerate(output):
            j = i if rows == slice(None) else 2 * is_last + i % 2
            torch.testing.assert_close(one, plain[i] + SCALE * (plain[j] - weak[j]))


def test_rows_of_a_list_that_are_no_half() -> None:
    model = build()
    with (
        pytest.raises(stg.CallError, match="first or the last half"),
        stg.apply(model, ["blocks.2"], rows=slice(0, None, 2)),
    ):
        model(samples(4), torch.linspace(0.1, 0.9, 4), texts(4))


@pytest.mark.parametrize("count", [2, 4])
def test_the_final_prediction_of_a_list(count: int) -> None:
    """Rescale takes the standard deviation of a sample, and scales count samples."""
    model, half = build(), count // 2
    x, t, context = samples(count), torch.linspace(0.1, 0.9, count), texts(count)
    plain, weak = model(x, t, context), without_a_block(model)(x, t, context)
    scales = torch.linspace(0.5, 2.0, half)
    with stg.apply(model, ["blocks.2"], scales, batched_cfg=True, guidance_scale=G, rescale=0.7):
        got = model(x, t, context)
    for i in range(half):
        u, c, w = plain[i], plain[half + i], weak[half + i]
        out = u + G * (c - u) + scales[i] * (c - w)
        want = out * (0.7 * c.std() / out.std() + 0.3)
        torch.testing.assert_close(got[i], want)
        torch.testing.assert_close(got[half + i], want)


def test_the_weak_model_for_the_first_half_of_a_list() -> None:
    model = build()
    x, t, context = samples(4), torch.linspace(0.1, 0.9, 4), texts(4)
    plain, weak = model(x, t, context), without_a_block(model)(x, t, context)
    with stg.apply(model, ["blocks.2"], on="uncond", batched_cfg=True):
        got = model(x, t, context)
    for one, want in zip(got, [*weak[:2], *plain[2:]], strict=True):
        torch.testing.assert_close(one, want)


def test_an_odd_list_is_no_pair_of_halves() -> None:
    model = build()
    with (
        pytest.raises(stg.CallError, match=r"cannot be \[uncond, cond\] samples"),
        stg.apply(model, ["blocks.2"], batched_cfg=True),
    ):
        model(samples(3), torch.ones(3), texts(3))


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_a_guider_of_lists(count: int, rescale: float, execution: str) -> None:
    """Wan's own loop takes sample 0 of what its model returns; texts may differ in length."""
    model = build()
    x, t, positive, negative = samples(count), torch.full((count,), 0.5), texts(count), texts(count, 7)
    c, u = model(x, t, positive), model(x, t, negative)
    w = without_a_block(model)(x, t, positive)
    guider = stg.Guider(model, ["blocks.2"], SCALE, guidance_scale=G, rescale=rescale, execution=execution)
    for _ in range(2):
        got = guider(x, t=t, cond={"context": positive}, uncond={"context": negative})
        assert isinstance(got, list)
        assert len(got) == count
        for i in range(count):
            out = u[i] + G * (c[i] - u[i]) + SCALE * (c[i] - w[i])
            out = out * (rescale * c[i].std() / out.std() + 1 - rescale)
            torch.testing.assert_close(got[i], out)


def test_whether_entries_are_samples() -> None:
    one, two = torch.ones(2), torch.ones(4)
    video, audio, packed = torch.ones(2, 6, 3, 3), torch.ones(2, 6, 5), torch.ones(2, 5, 6)
    c, c16 = torch.ones(2, 3, 3, 3), torch.ones(16, 3, 3, 3)
    assert are_samples([c16, c16], ([c16, c16], one), {}) is True
    assert are_samples([c16, c16], ([c16, c16],), {"context": [torch.ones(3, 5), torch.ones(4, 5)]}) is True
    assert are_samples([video, audio], ((video, audio), one), {}) is False
    assert are_samples([packed, packed], ((packed, packed), one, torch.ones(2, 7, 5)), {}) is False
    assert are_samples([packed, packed], ((packed[:1], packed[:1]), torch.ones(1)), {}) is False
    assert are_samples([c, c, c, c], ([c, c, c, c], two), {}) is True
    assert are_samples([video, video], (video, one), {"residuals": {"a": [audio, audio]}}) is False
    assert are_samples([c, c], ([c, c], one), {}) is None
    assert are_samples([c16, c16], ([c16, c16], 0.5), {}) is None


def test_what_cannot_be_told_apart_is_an_error() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

        def forward(self, pair: list[Tensor], t: Tensor) -> list[Tensor]:
            for block in self.blocks:
                pair = [x + block(x) for x in pair]
            return pair

    x = [random(2, 4, 3, seed=i) for i in range(2)]
    model = build(Pair)
    with pytest.raises(stg.CallError, match="row"), stg.apply(model, ["blocks.1"], batched_cfg=True):
        model(x, torch.ones(2))


# --- what is returned


@dataclasses.dataclass
class Plain:
    x: Tensor
    note: str = "kept"


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Tensor
    note: str = "kept"


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    x: Tensor
    note: str = "kept"


@dataclasses.dataclass
class Sample:
    sample: list[Tensor]
    other: Any = None


class Bare:
    def __init__(self, x: Tensor) -> None:
        self.x, self.note = x, "kept"


Named = namedtuple("Named", ["x", "note"])

STYLES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tensor": (lambda x: x, lambda o: o),
    "tuple": (lambda x: (x,), lambda o: o[0]),
    "list": (lambda x: [x], lambda o: o[0]),
    "nested": (lambda x: {"a": [x]}, lambda o: o["a"][0]),
    "dict": (lambda x: {"x": x, "note": "kept"}, lambda o: o["x"]),
    "dataclass": (Plain, lambda o: o.x),
    "frozen": (Frozen, lambda o: o.x),
    "slots": (Slotted, lambda o: o.x),
    "object": (Bare, lambda o: o.x),
    "namedtuple": (lambda x: Named(x, "kept"), lambda o: o.x),
    "list in sample": (lambda x: Sample([x], torch.ones(3)), lambda o: o.sample[0]),
    "beside a loss": (lambda x: (x, x.mean(), "kept", torch.arange(2)), lambda o: o[0]),
}


class Styled(nn.Module):
    def __init__(self, style: str, outputs: int = CHANNELS) -> None:
        super().__init__()
        self.inp, self.out, self.style = nn.Linear(CHANNELS, 8), nn.Linear(8, outputs), STYLES[style][0]
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: Tensor, c: Tensor) -> Any:
        h = self.inp(x.movedim(1, -1)) + c.reshape(-1, *[1] * (x.ndim - 1))
        for block in self.blocks:
            h = block(h)
        return self.style(self.out(h).movedim(-1, 1))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_denoiser_returns(style: str, dtype: torch.dtype) -> None:
    model, of = build(Styled, style=style).to(dtype), STYLES[style][1]
    x, one, zero = random(2, CHANNELS, 3, 3, seed=1).to(dtype), torch.ones(2, dtype=dtype), torch.zeros(2, dtype=dtype)
    weak = without_a_block(model)
    c, u, w = of(model(x, one)).clone(), of(model(x, zero)).clone(), of(weak(x, one))
    got = stg.Guider(model, ["blocks.2"], SCALE, guidance_scale=G)(x, cond={"c": one}, uncond={"c": zero})
    want = (u.float() + G * (c.float() - u.float()) + SCALE * (c.float() - w.float())).to(dtype)
    assert type(got) is type(model(x, one))
    torch.testing.assert_close(of(got), want)
    assert getattr(got, "note", "kept") == "kept"
    with stg.apply(model, ["blocks.2"], SCALE):
        applied = model(x, one)
    assert type(applied) is type(got)
    want = (c.float() + SCALE * (c.float() - w.float())).to(dtype)
    torch.testing.assert_close(of(applied), want, rtol=0, atol=0)  # rounded once
    x, one = torch.cat([x, x]), torch.cat([zero, one])
    plain, term = model(x, one), (SCALE * (c.float() - w.float())).repeat(2, 1, 1, 1)
    want = (of(plain).clone().float() + term).to(dtype)
    with stg.apply(model, ["blocks.2"], SCALE, batched_cfg=True):
        both = model(x, one)
    assert type(both) is type(plain)
    torch.testing.assert_close(of(both), want)
    if style == "beside a loss":
        assert torch.equal(both[1], plain[1])
        assert (both[2], both[3].tolist()) == ("kept", [0, 1])


def test_an_object_beside_a_prediction_is_left_alone() -> None:
    """A cache, rather."""
    cache = Bare(torch.ones(2, 3))
    model = build(Styled, style="tensor")
    model.style = lambda x: (x, cache)
    got = stg.Guider(model, ["blocks.2"], SCALE)(random(2, CHANNELS, 3, 3, seed=1), torch.ones(2))
    assert got[1] is cache
    torch.testing.assert_close(cache.x, torch.ones(2, 3))


# --- a learned variance


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_variance_is_left_alone(execution: str) -> None:
    model = build(Styled, style="tensor", outputs=2 * CHANNELS)
    x, one, zero = random(2, CHANNELS, 3, 3, seed=1), torch.ones(2), torch.zeros(2)
    c, u, w = model(x, one), model(x, zero), without_a_block(model)(x, one)
    guider = stg.Guider(model, ["blocks.2"], SCALE, guidance_scale=G, rescale=0.7, channels=CHANNELS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", stg.StgWarning)
        got = guider(x, cond={"c": one}, uncond={"c": zero})
        with stg.apply(model, ["blocks.2"], SCALE, batched_cfg=True, channels=CHANNELS, execution=execution):
            both = model(torch.cat([x, x]), torch.cat([zero, one]))
    mean = slice(CHANNELS)
    torch.testing.assert_close(
        got[:, mean], stg.combine(c[:, mean], w[:, mean], u[:, mean], scale=SCALE, guidance_scale=G, rescale=0.7)
    )
    torch.testing.assert_close(got[:, CHANNELS:], c[:, CHANNELS:], rtol=0, atol=0)
    term = SCALE * (c - w)[:, mean]
    torch.testing.assert_close(both[:, mean], torch.cat([u, c])[:, mean] + torch.cat([term, term]))
    torch.testing.assert_close(both[:, CHANNELS:], torch.cat([u, c])[:, CHANNELS:])


def test_a_list_with_a_variance() -> None:
    model = build(outputs=2 * CHANNELS)
    x, t, context = samples(2), torch.full((2,), 0.5), texts(2)
    c, w = model(x, t, context), without_a_block(model)(x, t, context)
    with pytest.warns(stg.StgWarning, match=f"pass channels={CHANNELS}"):
        stg.Guider(model, ["blocks.2"])(x, t, context)
    got = stg.Guider(model, ["blocks.2"], SCALE, channels=CHANNELS)(x, t, context)
    with stg.apply(model, ["blocks.2"], SCALE, channels=CHANNELS):
        applied = model(x, t, context)
    for i in range(2):
        want = torch.cat([(c[i] + SCALE * (c[i] - w[i]))[:CHANNELS], c[i][CHANNELS:]])
        torch.testing.assert_close(got[i], want)
        torch.testing.assert_close(applied[i], want)


@pytest.mark.parametrize("with_apply", [False, True])
def test_twice_the_channels_are_pointed_out_once(with_apply: bool) -> None:
    x, one = random(2, CHANNELS, 3, 3, seed=1), torch.ones(2)

    def told(channels: int | None, outputs: int, x: Tensor) -> list[str]:
        model = build(Styled, style="tensor", outputs=outputs)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            if with_apply:
                with stg.apply(model, ["blocks.2"], channels=channels):
                    model(x, one), model(x, one)
            else:
                guider = stg.Guider(model, ["blocks.2"], channels=channels)
                guider(x, one), guider(x, one)
        return [str(w.message) for w in seen if issubclass(w.category, stg.StgWarning)]

    (text,) = told(None, 2 * CHANNELS, x)
    assert f"channels={CHANNELS}" in text
    assert f"channels={2 * CHANNELS}" in text
    assert not told(2 * CHANNELS, 2 * CHANNELS, x)
    assert not told(None, CHANNELS, x)
    assert not told(None, 2 * CHANNELS, random(2, CHANNELS, 5, seed=1))  # a sequence


@pytest.mark.parametrize("channels", [0, -1, True, 2.0, "3"])
def test_channels_that_cannot_be(channels: Any) -> None:
    model = build(Styled, style="tensor")
    for make in (stg.Guider, stg.apply):
        with pytest.raises(stg.SettingError, match="channels="):
            make(model, ["blocks.2"], channels=channels)
    with pytest.raises(stg.SettingError, match="channels=7, but"):
        stg.Guider(model, ["blocks.2"], channels=7)(random(2, CHANNELS, 3, 3, seed=1), torch.ones(2))


# --- scales per prompt


def test_scales_per_prompt_count_for_its_samples() -> None:
    c, w, u = (random(4, 3, 2, seed=i) for i in range(3))
    scale, g = torch.tensor([0.0, 2.0]), torch.tensor([3.0, 5.0])
    got = stg.combine(c, w, u, scale=scale, guidance_scale=g)
    s4, g4 = torch.tensor([0.0, 0, 2, 2]).reshape(4, 1, 1), torch.tensor([3.0, 3, 5, 5]).reshape(4, 1, 1)
    torch.testing.assert_close(got, u + g4 * (c - u) + s4 * (c - w))
    per_frame = torch.tensor([[[1.0], [2], [3]], [[4], [5], [6]]])
    want = c + per_frame.repeat_interleave(2, 0) * (c - w)
    torch.testing.assert_close(stg.combine(c, w, scale=per_frame), want)
    with pytest.raises(stg.SettingError, match=r"^scale has shape \(3,\).*\(4, 3, 2\).*per prompt"):
        stg.combine(c, w, scale=torch.ones(3))


def test_scales_per_prompt_of_a_batch() -> None:
    model = build(Styled, style="tensor")
    x, one, zero = random(4, CHANNELS, 3, 3, seed=1), torch.ones(4), torch.zeros(4)
    c, u, w = model(x, one), model(x, zero), without_a_block(model)(x, one)
    scale = torch.tensor([0.0, 2.0])
    term = scale.repeat_interleave(2).reshape(4, 1, 1, 1) * (c - w)
    with stg.apply(model, ["blocks.2"], scale, batched_cfg=True) as applied:
        both = model(torch.cat([x, x]), torch.cat([zero, one]))
    torch.testing.assert_close(both, torch.cat([u, c]) + torch.cat([term, term]))
    assert applied.trace[0].size == pytest.approx((term.norm() / c.norm()).item(), rel=1e-5)
