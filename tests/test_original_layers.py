"""Which layers are found in models that are built as those of their authors' own repositories."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import stg_hooks as stg
from stg_hooks import adapters
from tests import originals, zoo
from tests.zoo import DIM


def weak(model: nn.Module, layer: Any, mode: str = "residual") -> Tensor:
    with torch.no_grad(), stg.skip(model, [layer], mode):
        return model(**zoo.inputs())


def without(model: nn.Module, name: str, forward: Any) -> Tensor:
    """Run a deep copy in which a block returns what it was given."""
    changed = copy.deepcopy(model)
    changed.get_submodule(name).forward = forward
    with torch.no_grad():
        return changed(**zoo.inputs())


@pytest.mark.parametrize("name", originals.MODELS)
def test_main_blocks_are_numbered_in_running_order(name: str) -> None:
    model, (_, main, side) = originals.build(name), originals.MODELS[name]
    found = list(stg.layers(model))
    assert [layer.name for layer in found if layer.index is not None] == list(main)
    assert {layer.name for layer in found if layer.index is None} == set(side)
    assert zoo.calls(model, main[::-1], lambda: model(**zoo.inputs())) == list(main)


@pytest.mark.parametrize(
    "name",
    ["streams", "kernels", "without_norms", "processors", "chooses", "hourglass", "masked", "with_faces", "fed"],
)
@pytest.mark.parametrize("index", [0, -1])
def test_a_bypassed_block_gives_what_it_was_given(name: str, index: int) -> None:
    """Both streams where it has two, else its first argument."""
    model = originals.build(name)
    block = originals.MODELS[name][1][index]
    forward = (lambda img, txt: (img, txt)) if "double" in block else (lambda x, *_: x)
    torch.testing.assert_close(weak(model, index), without(model, block, forward), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["streams", "video", "carrier", "pair"])
def test_blocks_that_take_and_return_objects(kind: str) -> None:
    model = originals.build(f"objects_{kind}")
    through = (lambda video, audio: (video, audio)) if kind in ("streams", "video") else (lambda given: given)
    exact = without(model, "blocks.1", through)
    torch.testing.assert_close(weak(model, 1), exact, rtol=0, atol=0)
    guider = stg.Guider(model, layers=[1], scale=2.0)
    with torch.no_grad():
        cond = model(**zoo.inputs())
        for _ in range(2):
            torch.testing.assert_close(guider(**zoo.inputs()), cond + 2.0 * (cond - exact), rtol=1e-5, atol=1e-6)
    for mode in ("values", "attention"):
        assert not torch.equal(weak(model, 1, mode), cond)


def test_an_object_that_a_block_makes_is_made_anew() -> None:
    torch.manual_seed(0)
    model = zoo.ObjectDiT(zoo.ObjectBlock).eval().requires_grad_(False)
    exact = without(model, "blocks.1", lambda x, text: zoo.BlockOutput(x))
    torch.testing.assert_close(weak(model, 1), exact, rtol=0, atol=0)


def test_an_object_of_another_class_is_refused_and_the_line_that_is_printed_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Odd(zoo.Block):
        def forward(self, x: Tensor, text: Tensor) -> Any:
            return {"made": originals.Carrier(self.mix(x, text), text[:, :1])}

    class Model(zoo.DiT):
        def run(self, block: nn.Module, x: Tensor, text: Tensor) -> Tensor:
            return block(x, text)["made"].x

    model = Model(Odd).eval()
    with pytest.raises(stg.BlockError) as error:
        weak(model, 1)
    lines = [line[2:] for line in str(error.value).splitlines() if line.startswith("  ")][3:]
    monkeypatch.setattr(adapters, "STREAMS", {})
    exec("\n".join(lines), {})
    torch.testing.assert_close(
        weak(model, 1), without(model, "blocks.1", lambda x, text: {"made": originals.Carrier(x, text)}), rtol=0, atol=0
    )


def test_what_comes_over_a_skip_connection_is_not_the_stream() -> None:
    class Required(originals.SkipBlock):
        def forward(self, x: Tensor, skip: Tensor) -> Tensor:
            return super().forward(x, skip)

    for block in (originals.SkipBlock(skip=True), Required(skip=True)):
        with torch.no_grad():
            block.skip_linear.weight.copy_(torch.cat((torch.zeros(zoo.DIM, zoo.DIM), torch.eye(zoo.DIM)), dim=1))
        model = originals.Hourglass().eval().requires_grad_(False)
        model.out_blocks[0] = block.eval().requires_grad_(False)
        torch.testing.assert_close(weak(model, 3), without(model, "out_blocks.0", lambda x, _: x), rtol=0, atol=0)


def test_bare_attention_between_stages_adds_nothing() -> None:
    model = originals.build("stages")
    torch.testing.assert_close(weak(model, 2), without(model, "mid_attn", lambda x: 0 * x), rtol=0, atol=0)


def test_a_block_that_resamples_is_refused_with_the_reason() -> None:
    model = originals.build("dictionaries")
    torch.testing.assert_close(weak(model, 0), without(model, "enc.block0", lambda x, _: x), rtol=0, atol=0)
    with pytest.raises(stg.BlockError, match="none of its inputs matches") as error:
        weak(model, 1)
    assert "the block changes the shape of its stream" in str(error.value)
    assert not torch.equal(weak(model, 1, "values"), model(**zoo.inputs()))


def test_an_example_in_an_error_is_a_main_block() -> None:
    class Unseen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.refiner_blocks = nn.ModuleList(Unseen() for _ in range(9))
            self.prepare = nn.ModuleList(Unseen() for _ in range(9))
            self.work = nn.ModuleList([Unseen(), nn.Linear(3, 3)])

        def forward(self, x: Tensor, text: Tensor) -> Tensor:
            for block in self.prepare:
                text = block(text)
            for block in self.work:
                x = block(x)
            return x

    with pytest.raises(stg.LayerError, match=r'layers=\["work\.0"\]'):
        stg.check(Model(), layers=[0])


# --- one call tells ---------------------------------------------------------------------------------------------------


class Hidden(nn.Module):
    """Blocks of which nothing tells, in dictionaries that run in another order, one never, one for text."""

    def __init__(self) -> None:
        super().__init__()
        self.late, self.early = (nn.ModuleList(originals.Unseen() for _ in range(2)) for _ in range(2))
        self.never, self.prepares = (nn.ModuleList([originals.Unseen()]) for _ in range(2))
        self.plan = [("prepares", 0), ("early", 0), ("early", 1), ("late", 0), ("late", 1)]

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        for name, i in self.plan:
            block = getattr(self, name)[i]
            if name == "prepares":
                text = block(text)
            else:
                x = block(x) + text.mean(1, keepdim=True)
        return x


def test_one_call_tells_what_looking_does_not() -> None:
    torch.manual_seed(0)
    model = Hidden().eval()
    assert len(stg.layers(model)) == 0
    with pytest.raises(stg.LayerError, match=r"stg\.layers\(model, example=dict"):
        stg.check(model, layers=[0])
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    table = stg.layers(model, example=zoo.inputs())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    numbered = [layer.name for layer in table if layer.index is not None]
    assert numbered == ["early.0", "early.1", "late.0", "late.1"]
    assert {layer.name for layer in table if layer.index is None} == {"prepares.0"}
    torch.testing.assert_close(weak(model, 2), without(model, "late.0", lambda x: x), rtol=0, atol=0)
    by_hand = copy.deepcopy(model)
    block = by_hand.late[0]
    block.forward = lambda x: x + block.linear2(block.linear1(x)[..., 2 * zoo.DIM :])
    with torch.no_grad():
        torch.testing.assert_close(weak(model, 2, "values"), by_hand(**zoo.inputs()), rtol=1e-5, atol=1e-6)


def test_random_state_is_put_back_and_a_bad_example_is_an_error() -> None:
    model = originals.build("streams")
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    assert len(stg.layers(model, example=list(zoo.inputs().values()))) == 4
    assert torch.equal(torch.rand(1), expected)
    with pytest.raises(stg.CallError, match="example= does not fit: Streams could not be called with it"):
        stg.layers(model, example={"y": 1})
    with pytest.raises(stg.TargetError, match="example= is for a module"):
        stg.layers(object(), example={})


def test_an_extractor_of_faces_in_diffusers_is_not_numbered() -> None:
    diffusers = pytest.importorskip("diffusers")
    faces = {
        "is_train_face": True,
        "LFE_id_dim": 16,
        "LFE_vit_dim": 8,
        "LFE_depth": 5,
        "LFE_dim_head": 4,
        "LFE_num_heads": 2,
        "LFE_num_id_token": 2,
        "LFE_num_querie": 3,
        "LFE_output_dim": 16,
        "cross_attn_dim_head": 4,
        "cross_attn_num_heads": 2,
    }
    with torch.device("meta"):
        model = diffusers.ConsisIDTransformer3DModel(
            num_attention_heads=2, attention_head_dim=8, num_layers=3, text_embed_dim=8, time_embed_dim=4, **faces
        )
    numbered = [layer.name for layer in stg.layers(model) if layer.index is not None]
    assert numbered == [f"transformer_blocks.{i}" for i in range(3)]


class FusedWithActivation(originals.Single):
    """Flux's `SingleStreamBlock` as it is published: the activation is a module."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp_act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        qkv, mlp = self.linear1(F.layer_norm(x, x.shape[-1:])).split([3 * DIM, 2 * DIM], dim=-1)
        q, k, v = originals.heads_of(qkv)
        q, k = self.norm(q, k)
        return x + self.linear2(torch.cat((self.mix(q, k, v), self.mlp_act(mlp)), 2))


def test_feed_forward_of_a_fused_block_leaves_its_attention_alone() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(FusedWithActivation(), FusedWithActivation()), torch.randn(2, 5, DIM)
    other = copy.deepcopy(model)
    other[1].linear2.weight.data[:, DIM:] = 0.0
    with torch.no_grad(), stg.skip(model, ["1"], "feed-forward"):
        torch.testing.assert_close(model(x), other(x))


def test_a_fused_block_without_a_module_for_it_is_refused() -> None:
    model = nn.Sequential(originals.Single(), originals.Single())
    with pytest.raises(stg.StgError, match="has no feed-forward network to silence"):
        stg.skip(model, ["1"], "feed-forward")


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha, self.ln = nn.MultiheadAttention(DIM, 2, batch_first=True), nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln(x)
        return x + self.mha(normed, normed, normed)[0]


class Attributes(nn.Module):
    """Attention in attributes of a U-Net and in no list, as in the lessons that many write theirs after."""

    block: type[nn.Module] = SelfAttention

    def __init__(self) -> None:
        super().__init__()
        self.inc, self.outc = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.sa3, self.sa2, self.sa1 = (self.block() for _ in range(3))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = self.sa1(self.inc(x))
        x = self.sa2(x + text.mean(1, keepdim=True))
        return self.outc(self.sa3(x))


class HiddenAttributes(Attributes):
    block = originals.Unseen


@pytest.mark.parametrize("cls", [Attributes, HiddenAttributes])
def test_blocks_in_attributes_are_numbered_where_there_are_several_of_a_class(cls: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = cls().eval()
    torch.testing.assert_close(weak(model, 1), without(model, "sa2", lambda x: x), rtol=0, atol=0)
    numbered = [layer.name for layer in stg.layers(model) if layer.index is not None]
    assert numbered == ["sa1", "sa2", "sa3"]


class InTheLoop(nn.Module):
    """A block that runs in one turn of the loop over others: `init_attn` of DynamiCrafter and VideoCrafter."""

    def __init__(self) -> None:
        super().__init__()
        self.input_blocks = nn.ModuleList([nn.Linear(DIM, DIM), *(SelfAttention() for _ in range(3))])
        self.init_attn, self.late = (nn.Sequential(SelfAttention()) for _ in range(2))
        self.has_attention = True

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        for i, block in enumerate(self.input_blocks):
            if i == 3:
                x = self.late(x)
            x = block(x) + text.mean(1, keepdim=True)
            if i == 0 and self.has_attention:
                x = self.init_attn(x)
        return x


def test_what_runs_in_one_turn_of_a_loop_is_numbered_where_it_runs() -> None:
    torch.manual_seed(0)
    model = InTheLoop().eval()
    names = [layer.name for layer in stg.layers(model) if layer.index is not None]
    assert zoo.calls(model, names[::-1], lambda: model(**zoo.inputs())) == names
    assert names == ["init_attn.0", "input_blocks.1", "input_blocks.2", "late.0", "input_blocks.3"]
