"""Spatial and temporal attention: by names, classes and adapters, held against what models do with frames."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stg_hooks as stg
from stg_hooks import adapters
from stg_hooks.adapters import TEMPORAL
from tests import zoo
from tests.test_modes import assert_close_in_std, by_hand
from tests.tiny_models import MODELS

DIM = zoo.DIM


pytestmark = pytest.mark.usefixtures("inference")


def kinds_of(model: nn.Module) -> dict[str, str]:
    """List which attention is spatial, and which is temporal."""
    layers = stg.layers(model).to_dict()[""]["layers"]
    return {f"{layer['name']}.{part}": kind for layer in layers for part, kind in layer["kinds"].items()}


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


@pytest.mark.parametrize("mode", ["attention", "values", "smoothed"])
@pytest.mark.parametrize("temporal_first", [True, False])
def test_the_kinds_that_an_adapter_states(temporal_first: bool, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = video(temporal_first)
    names = dict(zip(["temporal", "spatial"], ["one", "two"] if temporal_first else ["two", "one"], strict=True))
    assert kinds_of(model) == {}, "names do not tell"
    monkeypatch.setitem(TEMPORAL, "Video", (f".{names['temporal']}",))
    for kind, name in names.items():
        assert {path for path, found in kinds_of(model).items() if found == kind} == {
            f"blocks.{i}.{name}" for i in range(3)
        }
        expected = by_hand(model, [f"blocks.1.{name}"], mode)(x)
        assert (expected - model(x)).abs().max() > 1e-3 * expected.std()
        with stg.skip(model, 1, mode, kind=kind):
            assert_close_in_std(model(x), expected)
            assert_close_in_std(model(x), expected)


@pytest.mark.parametrize("execution", ["full", "sequential", "batched"])
def test_branches_of_both_kinds(execution: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TEMPORAL, "Video", (".two",))
    model, x = video(temporal_first=False)
    x = torch.cat([x, x.flip(0)])
    plain = model(x)
    branches = [stg.Branch(1, 2.0, "attention", "spatial"), stg.Branch(1, 0.5, "attention", "temporal")]
    weaks = [by_hand(model, [f"blocks.1.{name}"], "attention")(x) for name in ("one", "two")]
    term = (2.0 * (plain - weaks[0]) + 0.5 * (plain - weaks[1]))[2:]
    with stg.apply(model, branches=branches, batched_cfg=True, execution=execution):
        assert_close_in_std(model(x), plain + torch.cat([term, term]), 2e-5)


@pytest.mark.parametrize("kind", ["spatial", "temporal"])
def test_kinds_that_no_name_tells_are_an_error_at_once(kind: Any) -> None:
    model, _ = video(temporal_first=False)
    told = r"no name or class in Video says that attention works(.|\n)*TEMPORAL\[\"Video\"\] = \(\".one\",\)$"
    for make in (stg.skip, stg.apply, stg.Guider):
        with pytest.raises(stg.LayerError, match=told):
            make(model, 1, **({} if make is stg.skip else {"scale": 1.0}), mode="values", kind=kind)


FACTORISED = [
    "UNetSpatioTemporalConditionModel",
    "LatteTransformer3DModel",
    "UNetMotionModel",
    "UNet3DConditionModel",
    "I2VGenXLUNet",
]


@pytest.mark.parametrize("name", FACTORISED)
def test_names_agree_with_what_a_model_does(name: str) -> None:
    """Every self-attention of every factorised model of diffusers: across frames, a row has a token per frame."""
    model, inputs = MODELS[name].build(name), MODELS[name].inputs()
    latents = next(iter(inputs.values()))
    frames = latents.shape[1 if name == "UNetSpatioTemporalConditionModel" else 2]
    kinds, found = kinds_of(model), {}

    def note(attention: str) -> Callable[..., None]:
        def look(module: nn.Module, args: Any, kwargs: Any) -> None:
            given = next(leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, Tensor))
            assert given.shape[0] * given.shape[1] % (len(latents) * frames) == 0
            found[attention] = "temporal" if given.shape[1] == frames else "spatial"

        return look

    for attention in kinds:
        if attention.endswith("attn1"):
            model.get_submodule(attention).register_forward_pre_hook(note(attention), with_kwargs=True)
    model(**inputs)
    assert len(found) >= 4
    assert set(found.values()) == {"spatial", "temporal"}
    assert found == {attention: kinds[attention] for attention in found}


class Alone(zoo.Attention):
    """Takes frames out of the batch itself, where nobody looks."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        frames = x.unflatten(0, (-1, 2)).transpose(1, 2).flatten(0, 1)
        return super().forward(frames).unflatten(0, (-1, x.shape[1])).transpose(1, 2).flatten(0, 1)


def test_the_lines_of_adapter_that_name_temporal_attention_work(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = zoo.build("plain"), zoo.inputs()
    for block in model.blocks:
        block.attn = Alone().eval()
    with pytest.raises(stg.LayerError, match="no name or class in DiT says") as error:
        stg.skip(model, 1, "values", kind="temporal")
    lines = [line.strip() for line in str(error.value).splitlines()[-2:]]
    assert lines == ["from stg_hooks.adapters import TEMPORAL", 'TEMPORAL["DiT"] = (".attn",)']
    monkeypatch.setattr(adapters, "TEMPORAL", {})
    exec("\n".join(lines), {})
    with stg.skip(model, 1, "values", kind="temporal"):
        assert_close_in_std(model(**inputs), by_hand(model, ["blocks.1.attn"], "values")(**inputs))


@pytest.mark.parametrize(
    "name",
    ["WanTransformer3DModel", "LTXVideoTransformer3DModel", "FluxTransformer2DModel", "MochiTransformer3DModel"],
)
def test_a_model_with_one_kind_of_attention_is_refused_at_once(name: str) -> None:
    model = MODELS[name].build(name)
    with pytest.raises(stg.LayerError, match=f"no name or class in {name} says that attention works across frames"):
        stg.skip(model, 1, "attention", kind="temporal")
