"""Where attention modes take hold: which attention they find, which they leave alone, and what is refused."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import stg_hooks as stg
from benchmarks import measure
from stg_hooks import adapters
from tests import zoo
from tests.test_modes import CASES, Case, assert_close_in_std, by_hand

pytestmark = [
    pytest.mark.usefixtures("inference"),
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
]
DIM = zoo.DIM


def weak(
    model: nn.Module, inputs: dict[str, Any], layers: Any = 1, mode: Any = "attention", kind: Any = None
) -> Tensor:
    with stg.skip(model, layers=layers, mode=mode, kind=kind):
        output = model(**inputs)
    return output[0] if isinstance(output, tuple) else output


# --- what is found ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["attention", "values", "smoothed", "smoothed(sigma=0.7)"])
@pytest.mark.parametrize("processor", ["AttnProcessor", "SlicedAttnProcessor"])
def test_processors_that_compute_the_map_by_hand(processor: str, mode: str) -> None:
    from diffusers.models import attention_processor

    family = zoo.FAMILIES["unet2d"]
    model = family.build()
    expected = weak(model, family.inputs(), mode=mode)
    model.set_attn_processor(getattr(attention_processor, processor)(*([1] if "Sliced" in processor else [])))
    assert_close_in_std(weak(model, family.inputs(), mode=mode), expected)


@pytest.mark.parametrize("name", ["wan", "flux", "cogvideox", "hunyuan_video", "sd3", "unet2d"])
def test_fused_projections(name: str) -> None:
    family = zoo.FAMILIES[name]
    model = family.build()
    expected = weak(model, family.inputs())
    model.fuse_qkv_projections()
    assert_close_in_std(weak(model, family.inputs()), expected)


def test_any_attention_backend() -> None:
    """A kernel of its own, which torch functions do not pass, computes everywhere but in the perturbed attention."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    family = zoo.FAMILIES["wan"]
    model = family.build()
    expected = weak(model, family.inputs())
    used = []

    def kernel(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        used.append(query.shape)
        with torch._C.DisableTorchFunction():
            q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    flash = AttentionBackendName.FLASH
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_AttentionBackendRegistry._backends, flash, kernel)
        patch.setitem(_AttentionBackendRegistry._supported_arg_names, flash, {"query", "key", "value"})
        for module in model.modules():
            if hasattr(getattr(module, "processor", None), "_attention_backend"):
                module.processor._attention_backend = flash
        assert_close_in_std(weak(model, family.inputs()), expected)
        assert len(used) == 2 * 3 - 2, "self- and cross-attention of the other two blocks"
        assert model.blocks[1].attn1.processor._attention_backend is flash


@pytest.mark.parametrize("mode", ["attention", "values", "attention-input", "smoothed"])
def test_multi_head_attention_of_torch(mode: str) -> None:
    model, inputs = zoo.build("encoder"), zoo.inputs()
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    expected_model = by_hand(model, [], mode)
    for layer in [expected_model.encoder.layers[1]]:
        layer.self_attn = MultiHeadByHand(layer.self_attn, mode)
    expected = expected_model(**inputs)
    torch.backends.mha.set_fastpath_enabled(before)
    assert_close_in_std(weak(model, inputs, mode=mode), expected)


class MultiHeadByHand(nn.Module):
    def __init__(self, attention: nn.MultiheadAttention, mode: str) -> None:
        super().__init__()
        self.attention, self.mode = attention, mode
        self.batch_first, self._qkv_same_embed_dim = attention.batch_first, True

    def forward(self, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        a = self.attention
        q, k, v = (
            t.unflatten(-1, (a.num_heads, -1)).transpose(1, 2)
            for t in F.linear(x, a.in_proj_weight, a.in_proj_bias).chunk(3, -1)
        )
        if self.mode in ("attention", "smoothed"):
            is_text = torch.arange(x.shape[1]) >= 5  # the model puts it behind
            if self.mode == "smoothed":
                q = torch.where(is_text[:, None], q, q[..., ~is_text, :].mean(-2, keepdim=True))
            logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            if self.mode == "attention":
                seen = is_text[:, None] | is_text | torch.eye(len(is_text), dtype=torch.bool)
                logits = logits.masked_fill(~seen, -torch.inf)
            v = logits.softmax(-1) @ v
        mixed = x if self.mode == "attention-input" else v.transpose(1, 2).flatten(2)
        return a.out_proj(mixed), None


def test_attention_inside_a_block_can_be_named() -> None:
    case = next(case for case in CASES if case.family == "flux" and case.layer == 3)
    family = zoo.FAMILIES["flux"]
    model = family.build()
    expected = by_hand(model, case.attention, "attention", case.text)(**family.inputs())[0]
    assert_close_in_std(weak(model, family.inputs(), layers="single_transformer_blocks.1.attn"), expected)


class HandMade(nn.Module):
    """Text and video in one attention, written by hand; the text in front, behind, or only attended to."""

    def __init__(self, side: str) -> None:
        super().__init__()
        self.side = side
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(DIM, DIM) for _ in range(4))
        self.perturbed = False

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        parts = [x, text] if self.side == "last" else [text, x]
        both = torch.cat(parts, dim=1)
        query = self.to_q(x if self.side == "keys" else both)
        logits = torch.matmul(query, self.to_k(both).mT) / DIM**0.5
        is_text = torch.cat([torch.full((part.shape[1],), part is text) for part in parts])
        if self.perturbed:
            seen = is_text[:, None] | is_text | torch.eye(len(is_text), dtype=torch.bool)
            logits = logits.masked_fill(~(seen[~is_text] if self.side == "keys" else seen), -torch.inf)
        mixed = self.attend(query, self.to_k(both), self.to_v(both), logits)
        return self.to_out(mixed if self.side == "keys" else mixed[:, ~is_text])

    def attend(self, query: Tensor, key: Tensor, value: Tensor, logits: Tensor) -> Tensor:
        return torch.softmax(logits, dim=-1) @ value


class Fused(HandMade):
    def attend(self, query: Tensor, key: Tensor, value: Tensor, logits: Tensor) -> Tensor:
        if self.perturbed:
            return super().attend(query, key, value, logits)
        return F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0]


class JointBlock(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attn, self.ff = attention, nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = x + self.attn(x, text)
        x = x + F.gelu(self.ff(x))
        return x  # noqa: RET504


@pytest.mark.parametrize(
    ("attention", "side"),
    [(HandMade, "first"), (HandMade, "last"), (Fused, "first"), (Fused, "last"), (Fused, "keys")],
)
def test_text_on_either_side(attention: Callable[[str], nn.Module], side: str) -> None:
    model = zoo.DiT(lambda: JointBlock(attention(side)), depth=3).eval()
    reference = copy.deepcopy(model)
    reference.blocks[1].attn.perturbed = True
    assert_close_in_std(weak(model, zoo.inputs()), reference(**zoo.inputs()))


def test_masked_text_stays_masked() -> None:
    case = Case("hunyuan_video", 1, ["transformer_blocks.1.attn"], ("last", 5))
    family = zoo.FAMILIES["hunyuan_video"]
    model, inputs = family.build(), family.inputs()
    inputs["encoder_attention_mask"] = torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    expected = by_hand(model, case.attention, "attention", case.text)(**inputs)[0]
    assert (expected - weak(model, family.inputs())).abs().max() > 1e-3 * expected.std(), "the mask must matter"
    assert_close_in_std(weak(model, inputs), expected)


def test_more_than_one_part_of_the_map_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from stg_hooks.modes import attention_calls

    family = zoo.FAMILIES["cogvideox"]
    model = family.build()
    expected = weak(model, family.inputs())
    monkeypatch.setattr(attention_calls, "_PART", 3)
    assert_close_in_std(weak(model, family.inputs()), expected)


class Quantised(nn.Linear):
    """Computes where torch functions are not seen, as quantised layers do."""

    def forward(self, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return F.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("name", ["wan", "cogvideox", "flux"])
def test_layers_with_kernels_of_their_own(name: str) -> None:
    family = zoo.FAMILIES[name]
    model = family.build()
    expected = weak(model, family.inputs())
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Quantised
    assert_close_in_std(weak(model, family.inputs()), expected)


# --- what is left alone -----------------------------------------------------------------------------------------------


def test_cross_attention_of_the_same_length_is_left_alone() -> None:
    model, inputs = zoo.build("plain"), zoo.inputs()
    inputs["text"] = torch.randn(inputs["x"].shape)
    expected = by_hand(model, ["blocks.1.attn"], "values")(**inputs)
    assert_close_in_std(weak(model, inputs), expected)


def test_other_threads_and_later_calls_see_the_plain_model() -> None:
    family = zoo.FAMILIES["wan"]
    model, inputs = family.build(), family.inputs()
    base, other = model(**inputs)[0], []

    def during(call: Any) -> Tensor:
        thread = threading.Thread(target=lambda: other.append(torch.no_grad()(model)(**inputs)[0]))
        thread.start()
        thread.join()
        return call.own_values()

    assert_close_in_std(
        weak(model, inputs, mode=lambda call: call.compute(attention=during)), weak(model, inputs, mode="values"), 1e-6
    )
    torch.testing.assert_close(other[0], base, rtol=0, atol=0)
    torch.testing.assert_close(model(**inputs)[0], base, rtol=0, atol=0)


def test_everything_is_restored_after_an_error() -> None:
    family = zoo.FAMILIES["wan"]
    model, inputs = family.build(), family.inputs()
    model(**inputs)
    before = zoo.snapshot(model)

    def fail(call: Any) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        weak(model, inputs, mode=lambda call: call.compute(attention=fail))
    assert zoo.snapshot(model) == before
    assert torch.overrides._get_current_function_mode_stack() == []


def test_the_map_is_not_computed() -> None:
    """FLOPs of the perturbed block lack both products of its self-attention, and a joint one keeps those with text."""
    family = zoo.FAMILIES["wan"]
    model, inputs = family.build(), family.inputs()
    heads, head, tokens, rows = 2, 12, 8, 2
    plain = measure.flops(lambda: model(**inputs))
    assert plain - measure.flops(lambda: weak(model, inputs)) == 2 * (2 * rows * heads * tokens * tokens * head)

    joint = zoo.FAMILIES["cogvideox"]
    model, inputs = joint.build(), joint.inputs()
    heads, head, rows = 2, 8, 2
    video = model(**inputs)[0].shape[1] * 2 * 2
    saved = measure.flops(lambda: model(**inputs)) - measure.flops(lambda: weak(model, inputs))
    assert saved == 2 * (2 * rows * heads * video * video * head)


# --- executions -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:the calls of:stg_hooks.StgWarning")
@pytest.mark.parametrize("execution", ["sequential", "batched"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_execution_equals_the_full_one(case: Case, execution: str) -> None:
    family = zoo.FAMILIES[case.family]
    model, inputs = family.build(), family.inputs(batch=2 if case.family == "svd" else 4)
    branches = [stg.Branch(case.layer, 1.5, "attention", case.kind), stg.Branch(case.attention, 0.5, "smoothed")]

    def guided(execution: str) -> Tensor:
        with stg.apply(model, branches=branches, batched_cfg=True, execution=execution):
            return model(**inputs)[0]

    expected = guided("full")
    assert (expected - model(**inputs)[0]).abs().max() > 1e-3 * expected.std()
    # The plain calls of this random U-Net on one row and on two differ by as much.
    assert_close_in_std(guided(execution), expected, 5e-5 if case.family == "svd" else 1e-5)


def test_work_before_the_perturbed_block_is_shared() -> None:
    model, inputs = zoo.build("twelve"), zoo.inputs(batch=2)
    block = measure.flops(lambda: model.blocks[0](inputs["x"], inputs["text"])) // 2
    plain = measure.flops(lambda: model(**inputs))
    around = (measure.flops(lambda: model.embed(inputs["x"])) + measure.flops(lambda: model.out(inputs["x"]))) // 2
    with stg.apply(model, layers="blocks.8.attn", mode="values", batched_cfg=True, execution="sequential") as session:
        model(**inputs)  # the first call of a layout is checked
        guided = measure.flops(lambda: model(**inputs))
    tokens, rows = inputs["x"].shape[1], 1
    assert guided - plain == 4 * block + around - 2 * (2 * rows * tokens * tokens * DIM)
    assert (session.stats.blocks_run, session.stats.blocks_saved) == (2 * 4, 2 * 8)


# --- what is refused --------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """Attention without a map."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(DIM, DIM) for _ in range(3))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return F.relu(self.to_q(x)) @ (F.relu(self.to_k(x)).mT @ self.to_v(x))


class Pooled(zoo.Attention):
    """Asks with fewer tokens than there are."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q, k, v = (project(x)[:, None] for project in (self.to_q, self.to_k, self.to_v))
        return F.scaled_dot_product_attention(q[:, :, ::2], k, v)[:, 0].repeat_interleave(2, 1)[:, : x.shape[1]]


REFUSED_LATER: list[tuple[str, Callable[[], nn.Module], Any, str, str]] = [
    (
        "linear",
        lambda: zoo.DiT(lambda: JointBlock(Linear())),
        1,
        "attention",
        "computes its attention neither with torch's",
    ),
    ("pooled", lambda: zoo.DiT(lambda: JointBlock(Pooled())), 1, "values", r"has \d+ queries but \d+ keys"),
    (
        "cross",
        lambda: zoo.build("plain"),
        "blocks.1.cross",
        "attention",
        "is cross-attention: its keys come from other",
    ),
    (
        "cross beside self",
        lambda: zoo.build("plain"),
        ["blocks.1.attn", "blocks.1.cross"],
        "values",
        r"the attention in 'blocks.1.cross' of Block is cross-attention: (.|\n)*Attention.forward\(x, context=None\)$",
    ),
    ("shuffled", lambda: zoo.build("plain"), 1, "shuffled", "changes nothing in Block, which does not know where"),
]


@pytest.mark.parametrize(
    ("build", "layers", "mode", "text"), [case[1:] for case in REFUSED_LATER], ids=[c[0] for c in REFUSED_LATER]
)
def test_what_cannot_be_perturbed_is_an_error_and_not_silence(
    build: Callable[[], nn.Module], layers: Any, mode: str, text: str
) -> None:
    with pytest.raises(stg.BlockError, match=text):
        weak(build().eval(), zoo.inputs(), layers=layers, mode=mode)


def mix(*parts: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*parts)


class Mixer(nn.Module):
    """Attention that no name gives away."""

    def __init__(self) -> None:
        super().__init__()
        self.asks, self.answers, self.says = (nn.Linear(DIM, DIM) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return mix(self.asks(x), self.answers(x), self.says(x))


class AttentionAlone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = zoo.Attention()


class MixerBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(DIM), Mixer()

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return x + self.mixer(self.norm(x)) + text.mean(1, keepdim=True)


def test_the_lines_of_adapter_that_name_an_attention_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "ATTENTION", set())
    model, inputs = zoo.DiT(MixerBlock).eval(), zoo.inputs()  # type: ignore[arg-type]
    with pytest.raises(stg.LayerError) as error:
        stg.check(model, "blocks.1", "values")  # `skip` lets its first call tell
    assert str(error.value).splitlines() == [
        (
            "layers=['blocks.1']: MixerBlock has no attention for mode='values'. It can have 'residual', 'shuffled', "
            "'dropout'."
        ),
        "  it is:    MixerBlock.forward(x, text)",
        "  it holds: norm (LayerNorm), mixer (Mixer)",
        "If attention is computed there, first state by which class:",
        "  from stg_hooks.adapters import ATTENTION",
        '  ATTENTION.add("Mixer")',
    ]
    exec("\n".join(line.strip() for line in str(error.value).splitlines()[-2:]), {})
    by_hand = copy.deepcopy(model)
    by_hand.blocks[1].mixer = by_hand.blocks[1].mixer.says
    for layers in ("blocks.1", 1, "blocks.1.mixer"):
        assert_close_in_std(weak(model, inputs, layers=layers, mode="values"), by_hand(**inputs))


def wan() -> nn.Module:
    return zoo.FAMILIES["wan"].build()


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no feed-forward": (
        lambda: stg.skip(zoo.DiT(AttentionAlone), 0, "feed-forward"),
        stg.LayerError,
        "AttentionAlone has no feed-forward network to silence. It can have 'residual', 'attention', 'values'",
    ),
    "cross-attention by name": (
        lambda: stg.skip(wan(), "blocks.1.attn2", "values"),
        stg.LayerError,
        r"layers=\['blocks.1.attn2'\] is cross-attention: .* mode='values' replaces self-attention only",
    ),
    "no temporal in this layer": (
        lambda: stg.skip(
            zoo.FAMILIES["svd"].build(), "down_blocks.0.attentions.0.transformer_blocks.0", "values", kind="temporal"
        ),
        stg.LayerError,
        "BasicTransformerBlock has no temporal attention for mode='values'",
    ),
    "unknown kind": (
        lambda: stg.Branch(1, kind="temporl"),
        stg.SettingError,
        "unknown kind='temporl'; choose from 'spatial', 'temporal'. Did",
    ),  # type: ignore[arg-type]
    "layer inside a layer": (
        lambda: stg.apply(wan(), branches=[stg.Branch(["blocks.1", "blocks.1.attn1"], 1.0, "attention")]),
        stg.LayerError,
        r"layers=\['blocks.1', 'blocks.1.attn1'\]: the second is inside the first",
    ),
    "the same branch twice": (
        lambda: stg.apply(wan(), branches=[stg.Branch(1, 1.0, "values"), stg.Branch("blocks.1", 2.0, "values")]),
        stg.SettingError,
        "branches 0 and 1 perturb the same layers in the same way. Give one of them, with scale 3.0",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_before_anything_is_touched(name: str) -> None:
    call, error, text = REFUSED[name]
    with pytest.raises(error, match=text):
        call()


# --- kinds and published settings -------------------------------------------------------------------------------------


def test_svd_is_published_with_two_branches() -> None:
    model = zoo.FAMILIES["svd"].build()
    model.register_to_config(layers_per_block=2, transformer_layers_per_block=1, cross_attention_dim=1024)
    assert stg.layers(model).to_dict()[""]["layers"][7]["name"] == "up_blocks.1.attentions.0"
    both = ("layers=[7], mode='attention', kind='spatial', scale=2.0", "kind='temporal', scale=0.5")
    assert f"{both[0]} and layers=[7], mode='attention', {both[1]}" in repr(stg.layers(model))
