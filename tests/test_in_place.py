"""Blocks that write into their arguments, and models that set attributes in every call, as hosts like ComfyUI have.

Their weak passes share work like those of other models. The stand-ins here have their form, not their sizes.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import stg_hooks as stg
from benchmarks import measure

WIDTH, DEPTH = 16, 12


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(F.scaled_dot_product_attention(q, k, v))


class Writing(nn.Module):
    """Adds to its argument, and returns it (LTX-Video)."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.ff = Attention(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x += self.attn(x) * t
        x.addcmul_(self.ff(x), t)
        return x


class Double(nn.Module):
    """Adds to both of its streams (Flux, HunyuanVideo)."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.ff, self.text_ff = Attention(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor) -> tuple[Tensor, Tensor]:
        attended = self.attn(torch.cat((txt, img), 1))
        img += attended[:, txt.shape[1] :] * vec
        img += self.ff(img)
        txt += attended[:, : txt.shape[1]] * vec
        txt += self.text_ff(txt)
        return img, txt


class Returning(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.ff = Attention(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = x + self.attn(x) * t
        return x + self.ff(x)


class Net(nn.Module):
    block: type[nn.Module] = Writing

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)
        self.blocks = nn.ModuleList(self.block() for _ in range(DEPTH))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, t = self.embed(x), t.view(-1, 1, 1)
        for block in self.blocks:
            x = block(x, t)
        return self.out(x)


class OnSlices(Net):
    """Its blocks write into a part of a tensor."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, t = self.embed(x), t.view(-1, 1, 1)
        for block in self.blocks:
            block(x[:, 1:], t)
        return self.out(x)


class OnItsArgument(Net):
    """Its blocks write into what the model is given."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = F.pad(x, (0, WIDTH - 4)) if x.shape[-1] == 4 else x
        t = t.view(-1, 1, 1)
        for block in self.blocks:
            x = block(x, t)
        return self.out(x)


class Streams(nn.Module):
    """First two streams, then both in one, to which the model itself adds (Flux with a control model)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.text, self.out = nn.Linear(4, WIDTH), nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)
        self.blocks = nn.ModuleList(Double() for _ in range(DEPTH // 2))
        self.single_blocks = nn.ModuleList(Writing() for _ in range(DEPTH // 2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        img, txt, vec = self.embed(x), self.text(x[:, :3]), t.view(-1, 1, 1)
        for block in self.blocks:
            img, txt = block(img=img, txt=txt, vec=vec)
            img[:, :2] += 0.1 * vec
        x = torch.cat((txt, img), 1)
        for block in self.single_blocks:
            x = block(x, vec)
            x[:, txt.shape[1] :] += 0.1
        return self.out(x[:, txt.shape[1] :])


class Setting(Net):
    """Sets attributes before its blocks, for whatever reads them (Cosmos Predict 2)."""

    block = Returning

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        emb = t.view(-1, 1, 1) * torch.ones(WIDTH)
        self.log_info = {"t": emb.detach()}
        self.emb, self.given = emb, x
        return super().forward(x, t)


class SettingLater(Setting):
    """Keeps what its blocks have computed, and adds it in the next call."""

    kept: Tensor | None = None

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out = super().forward(x, t)
        self.kept, before = out, self.kept
        return out if before is None else out + 0.1 * before


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "one stream": (Net, "blocks.7"),
    "a part of a tensor": (OnSlices, "blocks.7"),
    "the argument of the model": (OnItsArgument, "blocks.7"),
    "two streams": (Streams, "blocks.4"),
    "two streams in one": (Streams, "single_blocks.3"),
    "attributes": (Setting, "blocks.7"),
}


@pytest.fixture(autouse=True)
def _plain_inference() -> Iterator[None]:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", stg.StgWarning)
        yield


def build(cls: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return cls().eval().requires_grad_(False)


def arguments(step: int, rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"x": torch.randn(rows, 64, 4, generator=generator), "t": torch.rand(rows, generator=generator)}


def without(model: nn.Module, name: str) -> nn.Module:
    """Copy a model, with a block that passes its streams through."""
    weak = copy.deepcopy(model)
    weak.get_submodule(name).forward = lambda *args, **given: (given["img"], given["txt"]) if given else args[0]
    return weak


@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("batched_cfg", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_weak_prediction_is_that_of_a_model_without_the_block(
    name: str, batched_cfg: bool, inference: Callable[[], torch.no_grad]
) -> None:
    cls, layer = MODELS[name]
    model = build(cls)
    plain, weak = copy.deepcopy(model), without(model, layer)
    with inference(), stg.apply(model, [layer], 1.0, batched_cfg=batched_cfg, execution="sequential") as handle:
        for step in range(4):
            given = arguments(step, 4)
            got = model(**{k: v.clone() for k, v in given.items()})
            cond = plain(**{k: v.clone() for k, v in given.items()})
            rows = slice(2, None) if batched_cfg else slice(None)
            want = cond[rows] - weak(**{k: v[rows].clone() for k, v in given.items()})
            expected = cond + (want.repeat(2, 1, 1) if batched_cfg else want)
            assert torch.equal(got, expected) if not batched_cfg else torch.allclose(got, expected, atol=1e-5)
    number = next(i for i, found in enumerate(stg.layers(model)) if found.name == layer)
    assert handle.stats.blocks_run == 4 * (DEPTH - 1 - number)


@pytest.mark.parametrize("name", MODELS)
def test_it_computes_the_layers_after_the_skipped_one_only(name: str) -> None:
    cls, layer = MODELS[name]
    model = build(cls)
    blocks = [found.module for found in stg.layers(model) if found.index is not None]
    number = next(i for i, block in enumerate(blocks) if block is model.get_submodule(layer))
    plain, own, _ = measure.flops_of(blocks, lambda: model(**arguments(0, 4)))
    with stg.apply(model, [layer], 1.0, batched_cfg=True, execution="sequential"):
        for step in range(3):
            model(**arguments(step, 4))
        count = measure.flops(lambda: model(**arguments(3, 4)))
    embedding = (plain - sum(own)) / 2
    assert count == pytest.approx(plain + sum(own[number + 1 :]) / 2 + embedding, rel=1e-2)


def test_attributes_are_those_of_the_own_pass() -> None:
    model, plain = build(Setting), build(Setting)
    with stg.apply(model, ["blocks.7"], 1.0, batched_cfg=True):
        for step in range(3):
            model(**arguments(step, 4))
            plain(**arguments(step, 4))
            assert torch.equal(model.emb, plain.emb)
            assert torch.equal(model.given, plain.given)


def test_what_blocks_have_computed_is_no_such_attribute() -> None:
    """It is right, by passes on all rows."""
    model, plain, weak = build(SettingLater), build(SettingLater), without(build(SettingLater), "blocks.7")
    with warnings.catch_warnings(), stg.apply(model, ["blocks.7"], 1.0, batched_cfg=True) as handle:
        warnings.simplefilter("ignore", stg.StgWarning)
        for step in range(4):
            weak.kept = plain.kept
            given = arguments(step, 4)
            cond, other = plain(**given), weak(**given)
            torch.testing.assert_close(model(**given), cond + (cond - other)[2:].repeat(2, 1, 1))
    assert handle.stats.blocks_run == 4 * (DEPTH - 1)


def test_one_tensor_is_kept() -> None:
    """The last value of the stream, on the cond rows; and what the call has predicted."""
    model, given = build(Net), arguments(0, 4)

    def peak() -> int:
        return measure.peak_memory(lambda: model(**given), torch.device("cpu"))[1]

    plain, stream = peak(), 2 * 64 * WIDTH * 4
    with stg.apply(model, ["blocks.7"], 1.0, batched_cfg=True, execution="sequential"):
        model(**given)
        assert peak() < plain + 2 * stream
