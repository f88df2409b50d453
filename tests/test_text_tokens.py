"""Text in streams that a model puts together before its blocks, against attention written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import stg_hooks as stg
from stg_hooks.modes.token_labels import sounds_like_text
from tests import awkward, zoo
from tests.test_coverage import tensors
from tests.test_modes import assert_close_in_std
from tests.tiny_models import MODELS

pytestmark = pytest.mark.usefixtures("inference")


def with_text(model: nn.Module, block: str, is_text: Tensor, mode: str, run: Callable[[], Any]) -> list[Tensor]:
    """What a model predicts with one block's attention written out, `is_text` (rows, tokens) given out by hand."""
    inside = False
    plain = F.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        if not inside:
            return plain(query, key, value, attn_mask=attn_mask, **options)
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], dim=-3) for t in (key, value))
        text, tokens = is_text[:, None], is_text.shape[1]
        assert query.shape[-2] == key.shape[-2] == tokens
        if mode == "smoothed":
            video = (~text[..., None]).to(query.dtype)
            mean = (query * video).sum(-2, keepdim=True) / video.sum(-2, keepdim=True)
            query = torch.where(text[..., None], query, mean)
        logits = query @ key.mT * (options.get("scale") or query.shape[-1] ** -0.5)
        if attn_mask is not None:
            added = attn_mask.dtype != torch.bool
            logits = logits + attn_mask if added else logits.masked_fill(~attn_mask, -torch.inf)
        if mode == "attention":
            own = torch.eye(tokens, dtype=torch.bool)
            logits = torch.where(own & ~text[..., None], query @ key.mT * query.shape[-1] ** -0.5, logits)
            logits = logits.masked_fill(~(text[..., None] | text[..., None, :] | own), -torch.inf)
        return logits.softmax(-1) @ value

    def switch(*_: Any) -> None:
        nonlocal inside
        inside = not inside

    module = model.get_submodule(block)
    with (
        pytest.MonkeyPatch.context() as patch,
        module.register_forward_pre_hook(switch),
        module.register_forward_hook(switch),
    ):
        patch.setattr(F, "scaled_dot_product_attention", attend)
        return tensors(run())


# Each model's own order of its tokens: T for text and whatever else is not denoised, V for video.
ORDER = {
    "AuraFlowTransformer2DModel single_transformer_blocks.0": "T" * 13 + "V" * 4,  # 8 registers, then text
    "BriaFiboTransformer2DModel single_transformer_blocks.0": "T" * 5 + "V" * 7,
    "ChromaTransformer2DModel single_transformer_blocks.0": "T" * 5 + "V" * 7,
    "Flux2Transformer2DModel single_transformer_blocks.0": "T" * 5 + "V" * 7,
    "ErnieImageTransformer2DModel layers.1": "V" * 4 + "T" * 5,
    "HiDreamImageTransformer2DModel single_stream_blocks.0": "V" * 4 + "T" * 15,
    "Ideogram4Transformer2DModel layers.1": "TTVVVV",
    "Krea2Transformer2DModel transformer_blocks.1": "T" * 5 + "V" * 6,
    "Lumina2Transformer2DModel layers.1": "T" * 5 + "V" * 4,
    "MiniMaxH3Transformer3DModel transformer_blocks.1": "T" * 5 + "V" * 10,
    "OmniGenTransformer2DModel layers.1": "T" * 6 + "V" * 4,
    "ZImageTransformer2DModel layers.1": "V" * 32 + "T" * 32,
}


@pytest.mark.parametrize("mode", ["attention", "smoothed"])
@pytest.mark.parametrize("case", ORDER)
def test_text_that_was_joined_before_the_blocks_is_found(case: str, mode: str) -> None:
    name, block = case.split()
    tiny = MODELS[name]
    model, inputs = tiny.build(name), tiny.inputs()
    is_text = torch.tensor([letter == "T" for letter in ORDER[case]])[None]
    plain = tensors(model(**inputs))[0]
    (expected, *_) = with_text(model, block, is_text, mode, lambda: model(**inputs))
    (as_video, *_) = with_text(model, block, torch.zeros_like(is_text), mode, lambda: model(**inputs))
    assert (expected - plain).abs().max() > 1e-3 * plain.std()
    assert (expected - as_video).abs().max() > 1e-3 * plain.std()
    with stg.skip(model, [block], mode):
        for _ in range(2):
            assert_close_in_std(tensors(model(**inputs))[0], expected, 2e-5)
    torch.testing.assert_close(tensors(model(**inputs))[0], plain, rtol=0, atol=0)


def lumina() -> tuple[nn.Module, dict[str, Any], Tensor]:
    """A model that puts the video right behind the text, of which each row has its own number of tokens."""
    tiny = MODELS["Lumina2Transformer2DModel"]
    model, inputs = tiny.build("Lumina2Transformer2DModel"), tiny.inputs(4)
    lengths = [5, 2, 5, 3]
    inputs["encoder_attention_mask"] = torch.arange(5) < torch.tensor(lengths)[:, None]
    orders = [("T" * n + "V" * 4).ljust(9, "T") for n in lengths]  # what is behind is masked
    return model, inputs, torch.tensor([[letter == "T" for letter in order] for order in orders])


@pytest.mark.filterwarnings("error::stg_hooks.StgWarning")
@pytest.mark.parametrize("execution", ["full", "sequential", "batched"])
def test_every_execution_finds_the_text(execution: str) -> None:
    model, inputs, is_text = lumina()
    plain = tensors(model(**inputs))[0]
    (weak, *_) = with_text(model, "layers.1", is_text, "attention", lambda: model(**inputs))
    term = (plain - weak)[2:]
    with stg.apply(model, ["layers.1"], 1.5, mode="attention", batched_cfg=True, execution=execution):
        for _ in range(2):
            actual = tensors(model(**inputs))[0]
            assert_close_in_std(actual, plain + 1.5 * torch.cat([term, term]), 5e-5)


def test_a_look_leaves_no_trace_and_happens_once_for_a_layout() -> None:
    tiny = MODELS["Flux2Transformer2DModel"]
    model, inputs = tiny.build("Flux2Transformer2DModel"), tiny.inputs()
    embedded: list[int] = []
    model.x_embedder.register_forward_hook(lambda *_: embedded.append(1))
    before, random = zoo.snapshot(model), torch.get_rng_state()
    with stg.skip(model, ["single_transformer_blocks.0"], "attention"):
        model(**inputs)
        assert len(embedded) == 3, "the call, and two to look"
        model(**inputs)
        assert len(embedded) == 4
    with stg.skip(model, ["single_transformer_blocks.0"], "values"):
        model(**inputs)
    assert len(embedded) == 5, "own values for all: nothing to look for"
    assert zoo.snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), random)


def test_masks_are_read_once_in_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, _ = lumina()
    mask, read, plain = inputs["encoder_attention_mask"], [], Tensor.tolist

    def noted(tensor: Tensor) -> Any:
        read.append(tensor.shape)
        return plain(tensor)

    with stg.skip(model, ["layers.0", "layers.1"], "attention"):
        model(**inputs)
        monkeypatch.setattr(Tensor, "tolist", noted)
        model(**inputs)
        assert read.count(mask.flatten().shape) == 1


class JointAttention(nn.Module):
    """Names its streams as the blocks below do, and puts either first."""

    def __init__(self, text_first: bool) -> None:
        super().__init__()
        self.text_first = text_first
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(zoo.DIM, zoo.DIM) for _ in range(4))

    def forward(self, c: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([c, x] if self.text_first else [x, c], dim=1)
        q, k, v = (to(both).unflatten(-1, (2, -1)).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v))
        both = self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        if self.text_first:
            return both[:, : c.shape[1]], both[:, c.shape[1] :]
        return both[:, x.shape[1] :], both[:, : x.shape[1]]


class JointBlock(nn.Module):
    def __init__(self, text_first: bool) -> None:
        super().__init__()
        self.norm_c, self.norm_x = nn.LayerNorm(zoo.DIM), nn.LayerNorm(zoo.DIM)
        self.attn = JointAttention(text_first)

    def forward(self, c: Tensor, x: Tensor, emb: Tensor) -> tuple[Tensor, Tensor]:
        """Text first, in words that do not tell."""
        more_c, more_x = self.attn(self.norm_c(c) * (1 + emb), self.norm_x(x) * (1 + emb))
        return c + more_c, x + more_x


class VideoFirstBlock(JointBlock):
    """Its attention names the text first, other than the block."""

    def forward(self, x: Tensor, y: Tensor, emb: Tensor) -> tuple[Tensor, Tensor]:
        y, x = super().forward(y, x, emb)
        return x, y


class Joint(nn.Module):
    def __init__(self, block: type[JointBlock], text_first: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block(text_first) for _ in range(3))
        self.out = nn.Linear(zoo.DIM, zoo.DIM)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        emb = text.mean(1, keepdim=True)
        for block in self.blocks:
            if isinstance(block, VideoFirstBlock):
                x, text = block(x, text, emb)
            else:
                text, x = block(text, x, emb)
        return self.out(x)


@pytest.mark.parametrize("mode", ["attention", "smoothed"])
@pytest.mark.parametrize("layer", ["blocks.1", "blocks.1.attn"])
@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize("block", [JointBlock, VideoFirstBlock])
def test_streams_whose_names_do_not_tell(block: type[JointBlock], text_first: bool, layer: str, mode: str) -> None:
    torch.manual_seed(0)
    model, inputs = Joint(block, text_first).eval(), zoo.inputs()
    is_text = torch.tensor([letter == "T" for letter in ("TTTVVVVV" if text_first else "VVVVVTTT")])[None]
    plain = model(**inputs)
    (expected,) = with_text(model, "blocks.1", is_text, mode, lambda: model(**inputs))
    (swapped,) = with_text(model, "blocks.1", ~is_text, mode, lambda: model(**inputs))
    assert (expected - plain).abs().max() > 1e-2 * plain.std()
    assert (expected - swapped).abs().max() > 1e-2 * plain.std()
    with stg.skip(model, [layer], mode):
        for _ in range(2):
            assert_close_in_std(model(**inputs), expected, 2e-5)


NAMELESS: dict[str, tuple[Callable[[], nn.Module], str, int, int]] = {
    # the model, and its text: its name, how many tokens (there are five of video), how many channels
    "fewer": (awkward.NamelessJoint, "text", 3, zoo.DIM),
    "as many": (awkward.NamelessJoint, "text", 5, zoo.DIM),
    "fewer, in a list": (lambda: awkward.NamelessJoint(in_list=True), "text", 3, zoo.DIM),
    "as many, in a list": (lambda: awkward.NamelessJoint(in_list=True), "text", 5, zoo.DIM),
    "by its channels, where the model has no name for it": (awkward.NamelessText, "y", 3, 2 * zoo.DIM),
    "where an adapter says that a block is attention": (awkward.NamelessJoint, "text", 3, zoo.DIM),
}


@pytest.mark.parametrize("mode", ["attention", "smoothed"])
@pytest.mark.parametrize("case", NAMELESS)
def test_text_is_found_where_streams_have_no_names(case: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "adapter" in case:
        monkeypatch.setattr("stg_hooks.adapters.ATTENTION", {"NamelessJointBlock"})
    build, name, count, channels = NAMELESS[case]
    model, inputs = build().eval(), {"x": torch.randn(2, 5, zoo.DIM), name: torch.randn(2, count, channels)}
    is_text = torch.tensor([True] * count + [False] * 5)[None]
    plain = model(**inputs)
    (expected,) = with_text(model, "blocks.1", is_text, mode, lambda: model(**inputs))
    (as_video,) = with_text(model, "blocks.1", torch.zeros_like(is_text), mode, lambda: model(**inputs))
    assert (expected - plain).abs().max() > 1e-3 * plain.std()
    assert (expected - as_video).abs().max() > 1e-3 * plain.std()
    with stg.skip(model, [1], mode):
        for _ in range(2):
            assert_close_in_std(model(**inputs), expected, 2e-5)


def test_attention_that_was_asked_for_by_name_has_to_be_called() -> None:
    model = awkward.NamelessJoint().eval()
    inputs = {"x": torch.randn(2, 5, zoo.DIM), "text": torch.randn(2, 3, zoo.DIM)}
    refused = pytest.raises(stg.BlockError, match="did not call its attention")
    with refused, stg.skip(model, ["blocks.1.video.attn"], "attention"):
        model(**inputs)


class Joined(zoo.DiT):
    """Puts text and video together before its blocks, in calls that it counts."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.calls, self.most = 0, most

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > self.most:
            raise RuntimeError("called too often")
        both = torch.cat([text, self.embed(x)], dim=1)
        for block in self.blocks:
            both = block(both, None)
        return self.out(both[:, text.shape[1] :])


class Alone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = zoo.Attention()

    def forward(self, x: Tensor, _: None) -> Tensor:
        return x + self.attn(x, x)


def test_what_cannot_be_found_is_refused_where_it_counts() -> None:
    torch.manual_seed(0)
    model, inputs = Joined(most=2).eval(), zoo.inputs()
    model.blocks = nn.ModuleList([Alone(), Alone()]).eval()
    inputs["text"] = torch.randn(2, 3, zoo.DIM)
    refused = pytest.raises(stg.BlockError, match=r"cannot be found out which tokens are which.*called too often")
    with refused, stg.skip(model, 1, "attention"):
        model(**inputs)
    model.calls = 0
    with stg.skip(model, 1, "values"):  # which the error names
        model(**inputs)


@pytest.mark.parametrize(
    ("name", "is_text"),
    [
        ("encoder_hidden_states_2", True),
        ("txtIds", True),
        ("pooled_text_emb", True),
        ("conditioning_mask", True),
        ("micro_conds", True),
        ("second", False),
        ("hidden_states", False),
        ("seconds_total", False),
    ],
)
def test_names_are_read_in_whole_words(name: str, is_text: bool) -> None:
    assert sounds_like_text(name) is is_text
