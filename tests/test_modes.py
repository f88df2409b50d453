"""Attention modes against models whose attention is written out by hand, with its map of all tokens."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import stg_hooks as stg
from tests import zoo
from tests.tiny_models import MODELS

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")


@pytest.fixture(autouse=True)
def _plain_inference() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it hides the attention from the oracle
    with torch.no_grad():
        yield
    torch.backends.mha.set_fastpath_enabled(before)


class ByHand(nn.Module):
    """An attention module in whose calls the attention itself is written out."""

    def __init__(
        self, attention: nn.Module, mode: str, text: tuple[str, int] | None, blur: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.attention, self.mode, self.text, self.blur = attention, mode, text, blur

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.is_floating_point()]

        def attend(
            query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any
        ) -> Tensor:
            assert options.get("scale") is None
            total = query.shape[-2]
            assert key.shape[-2] == total
            is_text = torch.zeros(total, dtype=torch.bool)
            if self.text is not None:
                side, count = self.text
                is_text[slice(0, count) if side == "first" else slice(total - count, None)] = True
            if self.mode == "values":
                return value
            if self.mode == "attention-input":
                x = given[0]
                if x.ndim == 4:
                    x = x.flatten(2).transpose(1, 2)
                if x.shape[1] != total:
                    x = torch.cat([given[1], x] if self.text == ("first", self.text[1]) else [x, given[1]], dim=1)
                return x.unflatten(-1, (value.shape[1], -1)).transpose(1, 2)
            if self.mode == "smoothed":
                query = query.clone()
                query[..., ~is_text, :] = self.blur(query[..., ~is_text, :])
            logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
            if attn_mask is not None:
                logits = (
                    logits.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
                )
            if self.mode == "attention":
                seen = is_text[:, None] | is_text | torch.eye(total, dtype=torch.bool)
                alone = torch.where(torch.eye(total, dtype=torch.bool), 0.0, -torch.inf)
                logits = logits.masked_fill(~seen, -torch.inf) if is_text.any() else alone.expand_as(logits)
            return logits.softmax(-1) @ value

        with mock.patch.object(F, "scaled_dot_product_attention", attend):
            return self.attention(*args, **kwargs)


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer, the self-attention in it, and the text in its joint attention: on which side, and how many tokens."""

    family: str
    layer: int
    attention: Sequence[str]
    text: tuple[str, int] | None = None
    kind: Any = None
    without: Sequence[str] = ()
    """Modes that the layer cannot have."""

    def __str__(self) -> str:
        return f"{self.family}-{self.layer}" + (f"-{self.kind}" if self.kind else "")


CASES = [
    Case("wan", 1, ["blocks.1.attn1"]),
    Case("ltx", 1, ["transformer_blocks.1.attn1"]),
    Case("mochi", 1, ["transformer_blocks.1.attn1"], ("last", 5), without=["attention-input"]),
    Case("cogvideox", 1, ["transformer_blocks.1.attn1"], ("first", 5)),
    Case("hunyuan_video", 1, ["transformer_blocks.1.attn"], ("last", 5)),
    Case("hunyuan_video", 2, ["single_transformer_blocks.0.attn"], ("last", 5)),
    Case("flux", 1, ["transformer_blocks.1.attn"], ("first", 5)),
    Case("flux", 3, ["single_transformer_blocks.1.attn"], ("first", 5)),
    Case("sd3", 1, ["transformer_blocks.1.attn"], ("last", 5)),
    Case("sd3", 2, ["transformer_blocks.2.attn"], ("last", 5)),
    Case("unet2d", 1, ["mid_block.attentions.0.transformer_blocks.0.attn1"]),
    Case("svd", 0, ["down_blocks.0.attentions.0.transformer_blocks.0.attn1"], kind="spatial"),
    Case("svd", 0, ["down_blocks.0.attentions.0.temporal_transformer_blocks.0.attn1"], kind="temporal"),
    Case("svd", 0, [f"down_blocks.0.attentions.0.{t}transformer_blocks.0.attn1" for t in ("", "temporal_")]),
]


def tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def mean(queries: Tensor) -> Tensor:
    return queries.mean(-2, keepdim=True)


def by_hand(
    model: nn.Module,
    names: Sequence[str],
    mode: str,
    text: tuple[str, int] | None = None,
    blur: Callable[[Tensor], Tensor] = mean,
) -> nn.Module:
    model = copy.deepcopy(model)
    for name in names:
        model.set_submodule(name, ByHand(model.get_submodule(name), mode, text, blur))
    return model


def assert_close_in_std(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=tolerance * expected.std().item())


@pytest.mark.parametrize("mode", zoo.ATTENTION_MODES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_skip_equals_attention_written_by_hand(case: Case, mode: str) -> None:
    if mode in case.without:
        return
    family = zoo.FAMILIES[case.family]
    model, inputs = family.build(), family.inputs()
    base = model(**inputs)[0]
    expected = by_hand(model, case.attention, mode, case.text)(**inputs)[0]
    assert not torch.allclose(base, expected, rtol=0.0, atol=3e-4 * expected.std().item())
    with stg.skip(model, layers=case.layer, mode=mode, kind=case.kind):
        actual = model(**inputs)[0]
    assert_close_in_std(actual, expected)
    torch.testing.assert_close(model(**inputs)[0], base, rtol=0, atol=0)


# --- modes that change more than attention ----------------------------------------------------------------------------


class Zero(nn.Module):
    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.zeros_like(x)


@pytest.mark.parametrize(
    ("name", "layer", "networks"),
    [
        ("wan", 1, ["blocks.1.ffn"]),
        ("flux", 1, ["transformer_blocks.1.ff", "transformer_blocks.1.ff_context"]),
        ("cogvideox", 1, ["transformer_blocks.1.ff"]),
        ("mochi", 1, ["transformer_blocks.1.ff", "transformer_blocks.1.ff_context"]),
        ("unet2d", 1, ["mid_block.attentions.0.transformer_blocks.0.ff"]),
    ],
)
def test_feed_forward_adds_nothing(name: str, layer: int, networks: Sequence[str]) -> None:
    family = zoo.FAMILIES[name]
    model, inputs = family.build(), family.inputs()
    reference = copy.deepcopy(model)
    for network in networks:
        reference.set_submodule(network, Zero())
    expected, called = reference(**inputs)[0], []
    model.get_submodule(networks[0]).register_forward_hook(lambda *_: called.append(1))
    with stg.skip(model, layer, "feed-forward"):
        assert_close_in_std(model(**inputs)[0], expected)
        assert_close_in_std(model(**inputs)[0], expected)
    assert (model(**inputs)[0] - expected).abs().max() > 1e-3 * expected.std()


@pytest.mark.parametrize(
    ("name", "layer", "network"),
    [
        ("PRXTransformer2DModel", "blocks.1", "down_proj"),
        ("MiniMaxMusic3Transformer1DModel", "transformer_blocks.1", "ff_out"),
        ("NucleusMoEImageTransformer2DModel", "transformer_blocks.0", "img_mlp"),
        ("RFD4ProteinaTransformer", "transformer_layers.1", "transition"),
        ("T5FilmDecoder", "decoders.1", "layer.2.DenseReluDense"),
    ],
)
def test_feed_forward_is_found_where_it_is_called_otherwise(name: str, layer: str, network: str) -> None:
    model, inputs = MODELS[name].build(name), MODELS[name].inputs()
    plain = tensors(model(**inputs))[0]
    with model.get_submodule(f"{layer}.{network}").register_forward_hook(lambda m, args, output: output * 0.0):
        expected = tensors(model(**inputs))[0]
    with stg.skip(model, layer, "feed-forward"):
        assert_close_in_std(tensors(model(**inputs))[0], expected)
    assert (plain - expected).abs().max() > 1e-4 * expected.std()


def test_attention_that_only_its_own_kernel_computes() -> None:
    name = "AnyFlowFARTransformer3DModel"
    model, inputs = MODELS[name].build(name), MODELS[name].inputs()
    told = (
        "cannot compute its attention with torch's scaled_dot_product_attention "
        ".*requires the 'flex' attention backend.*Use mode='residual'"
    )
    with pytest.raises(stg.BlockError, match=told), stg.skip(model, "blocks.1", "values"):
        model(**inputs)


class OwnValues(nn.Module):
    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        found: Tensor = self.attention.out_layer(self.attention.to_value(x))
        return found


def test_values_of_attention_in_a_kernel_of_torch() -> None:
    """Kandinsky 6's super-resolution calls `flex_attention`, whose layout ships."""
    name = "Kandinsky6SRTransformer3DModel"
    model, inputs = MODELS[name].build(name), MODELS[name].inputs()
    by_hand = copy.deepcopy(model)
    block: Any = by_hand.get_submodule("visual_transformer_blocks.1")
    block.self_attention = OwnValues(block.self_attention)
    with stg.skip(model, "visual_transformer_blocks.1", "values"):
        assert_close_in_std(tensors(model(**inputs))[0], tensors(by_hand(**inputs))[0])


def test_feed_forward_of_a_layer_with_a_fused_implementation() -> None:
    model = zoo.build("encoder")
    reference = copy.deepcopy(model)
    reference.encoder.layers[1].linear2 = Zero()
    reference.encoder.layers[1].linear1.register_forward_hook(lambda m, args, output: output[..., : zoo.DIM])
    reference.encoder.layers[1].norm2.register_forward_pre_hook(lambda *_: None)  # no fused implementation
    with stg.skip(model, 1, "feed-forward"):
        assert_close_in_std(model(**zoo.inputs()), reference(**zoo.inputs()))


class Shuffled(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        order = torch.randperm(hidden_states.shape[1], generator=torch.Generator().manual_seed(0))
        output = torch.empty_like(hidden_states)
        output[:, order] = self.block(hidden_states[:, order], *args, **kwargs)
        return output


@pytest.mark.parametrize("name", ["wan", "ltx"])
def test_shuffled_tokens_are_back_in_their_places_after_the_block(name: str) -> None:
    family = zoo.FAMILIES[name]
    model, inputs = family.build(), family.inputs()
    reference, block = copy.deepcopy(model), family.numbered[1]
    reference.set_submodule(block, Shuffled(reference.get_submodule(block)))
    random = torch.get_rng_state()
    with stg.skip(model, 1, "shuffled"):
        assert_close_in_std(model(**inputs)[0], reference(**inputs)[0])
    assert torch.equal(torch.get_rng_state(), random), "random numbers of the caller were used"


class WritesIntoText(zoo.Block):
    """Knows where its tokens are, and writes what it finds there into the text."""

    def forward(self, hidden_states: Tensor, text: Tensor) -> Tensor:
        place = torch.linspace(-1, 1, hidden_states.shape[1])[:, None]
        text += (hidden_states * place).mean(1, keepdim=True)
        return self.mix(hidden_states + place, text)


def test_a_shuffled_block_writes_into_its_arguments_once() -> None:
    torch.manual_seed(0)
    model, inputs = zoo.DiT(WritesIntoText).eval(), zoo.inputs()
    reference = copy.deepcopy(model)
    reference.blocks[1] = Shuffled(reference.blocks[1])
    expected = reference(inputs["x"], inputs["text"].clone())
    with stg.skip(model, 1, "shuffled"):
        for _ in range(2):
            assert_close_in_std(model(inputs["x"], inputs["text"].clone()), expected)


def test_smoothed_is_what_diffusers_calls_smoothed_energy_guidance() -> None:
    from diffusers.hooks.smoothed_energy_guidance_utils import (
        SmoothedEnergyGuidanceConfig,
        _apply_smoothed_energy_guidance_hook,
    )

    family = zoo.FAMILIES["unet2d"]
    model, inputs = family.build(), family.inputs()
    reference = copy.deepcopy(model)
    config = SmoothedEnergyGuidanceConfig([0], "mid_block.attentions.0.transformer_blocks", ["to_q"])
    _apply_smoothed_energy_guidance_hook(reference, config, blur_sigma=1.0)  # 0.42.1 takes the mean where it is finite
    with stg.skip(model, "mid_block.attentions.0", "smoothed"):
        assert_close_in_std(model(**inputs)[0], reference(**inputs)[0])
