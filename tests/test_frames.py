"""Spatial and temporal attention: by name, and by looking at what a model does with frames."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import stg_hooks as stg
from stg_hooks import adapters
from stg_hooks.adapters import TEMPORAL
from stg_hooks.model.layers import find_layers
from stg_hooks.modes.frames import FrameKinds, kinds_of
from stg_hooks.modes.token_probe import Looks
from tests import zoo
from tests.test_modes import assert_close_in_std, by_hand
from tests.tiny_models import MODELS

DIM = zoo.DIM


@pytest.fixture(autouse=True)
def _plain_inference() -> Iterator[None]:
    with torch.no_grad():
        yield


class Both(nn.Module):
    """One attention within frames and one across them, and nothing in their names says which."""

    def __init__(self, temporal_first: bool) -> None:
        super().__init__()
        self.one, self.two, self.temporal_first = zoo.Attention(), zoo.Attention(), temporal_first

    def forward(self, x: Tensor) -> Tensor:
        b, t, s, c = x.shape
        for attention, temporal in [(self.one, self.temporal_first), (self.two, not self.temporal_first)]:
            rows = x.transpose(1, 2).reshape(b * s, t, c) if temporal else x.reshape(b * t, s, c)
            mixed = attention(rows, rows)
            x = x + (mixed.view(b, s, t, c).transpose(1, 2) if temporal else mixed.view(b, t, s, c))
        return x


class Video(nn.Module):
    def __init__(self, temporal_first: bool) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(3, DIM), nn.Linear(DIM, 3)
        self.blocks = nn.ModuleList([Both(temporal_first) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        b, c, t, h, w = x.shape
        tokens = self.embed(x.permute(0, 2, 3, 4, 1).reshape(b, t, h * w, c))
        for block in self.blocks:
            tokens = block(tokens)
        return self.out(tokens).view(b, t, h, w, c).permute(0, 4, 1, 2, 3)


def video(temporal_first: bool, frames: int = 4, size: int = 2) -> tuple[nn.Module, Tensor]:
    """Make a model and latents; as many frames as pixels, so that shapes do not tell."""
    torch.manual_seed(0)
    return Video(temporal_first).eval(), torch.randn(2, 3, frames, size, size)


@pytest.mark.parametrize("mode", ["attention", "smoothed"])
@pytest.mark.parametrize("temporal_first", [True, False])
def test_kinds_are_found_by_what_a_model_does_with_frames(temporal_first: bool, mode: str) -> None:
    model, x = video(temporal_first)
    names = dict(zip(["temporal", "spatial"], ["one", "two"] if temporal_first else ["two", "one"], strict=True))
    assert kinds_of(model) == {}, "names do not tell"
    for kind, name in names.items():
        expected = by_hand(model, [f"blocks.1.{name}"], mode)(x)
        assert (expected - model(x)).abs().max() > 1e-3 * expected.std()
        with stg.skip(model, 1, mode, kind=kind):
            assert_close_in_std(model(x), expected)
            assert_close_in_std(model(x), expected)


@pytest.mark.parametrize("execution", ["full", "sequential", "batched"])
def test_branches_of_both_kinds(execution: str) -> None:
    model, x = video(temporal_first=False)
    x = torch.cat([x, x.flip(0)])
    plain = model(x)
    branches = [stg.Branch(1, 2.0, "attention", "spatial"), stg.Branch(1, 0.5, "attention", "temporal")]
    weaks = [by_hand(model, [f"blocks.1.{name}"], "attention")(x) for name in ("one", "two")]
    term = (2.0 * (plain - weaks[0]) + 0.5 * (plain - weaks[1]))[2:]
    with stg.apply(model, branches=branches, batched_cfg=True, execution=execution):
        assert_close_in_std(model(x), plain + torch.cat([term, term]), 2e-5)


def test_an_adapter_says_what_names_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = video(temporal_first=False)
    monkeypatch.setitem(TEMPORAL, "Video", (".two",))
    assert {name for name, kind in kinds_of(model).items() if kind == "temporal"} == {
        f"blocks.{i}.two" for i in range(3)
    }
    with stg.skip(model, 1, "values", kind="temporal"):
        assert_close_in_std(model(x), by_hand(model, ["blocks.1.two"], "values")(x))


class Whole(Both):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, 2)
        return x + F.gelu(self.two(tokens, tokens)).view(-1, *x.shape[1:])


def test_a_kind_that_a_layer_does_not_have_is_an_error() -> None:
    model, x = video(temporal_first=False)
    model.blocks[1] = Whole(False).eval()
    told = r"'blocks.1.two' does not see frames alone(.|\n)*TEMPORAL\[\"Video\"\] = \(\".one\",\)$"
    with pytest.raises(stg.BlockError, match=told), stg.skip(model, 1, "values", kind="temporal"):
        model(x)


FACTORISED = [
    "UNetSpatioTemporalConditionModel",
    "LatteTransformer3DModel",
    "UNetMotionModel",
    "UNet3DConditionModel",
    "I2VGenXLUNet",
]


@pytest.mark.parametrize("name", FACTORISED)
def test_looking_agrees_with_the_names_that_tell(name: str) -> None:
    """Every self-attention of every factorised model of diffusers that has its own list of frames."""
    model, inputs = MODELS[name].build(name), MODELS[name].inputs()
    named, looks, found = kinds_of(model), Looks(model), {}
    frames, looking = FrameKinds(looks), False

    def look(block: nn.Module, *_: Any) -> None:
        nonlocal looking
        if looking:
            return
        looking, inside = True, {id(m) for m in block.modules()}
        for attention in named:
            module = model.get_submodule(attention)
            if id(module) in inside and attention.endswith("attn1"):
                found[attention] = frames._kind(module)
        looking = False

    with looks.installed():
        handles = [layer.module.register_forward_pre_hook(look) for layer in find_layers(model)]
        model(**inputs)
    for handle in handles:
        handle.remove()
    assert len(found) >= 4
    assert found == {attention: named[attention] for attention in found}


class Alone(zoo.Attention):
    """Takes frames out of the batch itself, where nobody looks."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        frames = x.unflatten(0, (-1, 2)).transpose(1, 2).flatten(0, 1)
        return super().forward(frames).unflatten(0, (-1, x.shape[1])).transpose(1, 2).flatten(0, 1)


def test_the_lines_of_adapter_that_name_temporal_attention_work(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = zoo.build("plain"), zoo.inputs()
    for block in model.blocks:
        block.attn = Alone().eval()
    with pytest.raises(stg.LayerError, match="DiT has no attention of its own across frames") as error:
        stg.skip(model, 1, "values", kind="temporal")
    lines = [line.strip() for line in str(error.value).splitlines()[-2:]]
    assert lines == ["from stg_hooks.adapters import TEMPORAL", 'TEMPORAL["DiT"] = (".attn",)']
    monkeypatch.setattr(adapters, "TEMPORAL", {})
    exec("\n".join(lines), {})
    with stg.skip(model, 1, "values", kind="temporal"):
        assert_close_in_std(model(**inputs), by_hand(model, ["blocks.1.attn"], "values")(**inputs))


@pytest.mark.parametrize("name", ["WanTransformer3DModel", "LTXVideoTransformer3DModel", "FluxTransformer2DModel"])
def test_a_model_that_folds_nothing_into_the_batch_is_refused_at_once(name: str) -> None:
    model = MODELS[name].build(name)
    with pytest.raises(stg.LayerError, match=f"{name} has no attention of its own across frames"):
        stg.skip(model, 1, "attention", kind="temporal")


@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")
def test_a_model_that_folds_other_things_is_refused_in_its_first_call() -> None:
    name = "MochiTransformer3DModel"
    model, inputs = MODELS[name].build(name), MODELS[name].inputs()
    skip = stg.skip(model, 1, "attention", kind="temporal")
    with pytest.raises(stg.BlockError, match="attn1' does not see frames alone"), skip:
        model(**inputs)
