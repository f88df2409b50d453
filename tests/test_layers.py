"""What is found in a model, how it is numbered, and what `layers=` may say."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import stg_hooks as stg
from tests import zoo
from tests.zoo import resolve


def names_of(layers: list[Any]) -> list[str]:
    return [layer.name for layer in layers]


def find_layers(model: nn.Module) -> list[Any]:
    return list(stg.layers(model))


def numbered(model: nn.Module) -> list[str]:
    return [layer.name for layer in stg.layers(model) if layer.index is not None]


def is_attention(part: nn.Module) -> bool:
    """Say whether a part of a block is told as attention."""
    model, block = nn.Module(), zoo.Block()
    block.part = part
    model.blocks = nn.ModuleList([block, zoo.Block()])
    return "part" in find_layers(model)[0].attention


# --- finding and numbering --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo.ZOO)
def test_zoo_layers_are_found(name: str) -> None:
    found, case = find_layers(zoo.build(name)), zoo.ZOO[name]
    assert [(layer.index, layer.name) for layer in found[: len(case.numbered)]] == list(enumerate(case.numbered))
    side = found[len(case.numbered) :]
    assert {(layer.index, layer.name) for layer in side} == {(None, name) for name in case.named}


@pytest.mark.parametrize("name", zoo.ZOO)
def test_zoo_layers_are_numbered_in_running_order(name: str) -> None:
    model = zoo.build(name)
    order = numbered(model)
    assert zoo.calls(model, order[::-1], lambda: model(**zoo.inputs())) == order


def test_the_running_order_check_can_fail() -> None:
    """`named_modules` order is not running order: the recording above tells them apart."""
    model = zoo.build("unet")
    declared = [name for name, module in model.named_modules() if isinstance(module, zoo.Block)]
    assert zoo.calls(model, declared, lambda: model(**zoo.inputs())) != declared


def test_svd_index_7_is_the_first_attention_on_the_way_up() -> None:
    """The published `u0` of Stable Video Diffusion is layer 7 of 16."""
    model = zoo.FAMILIES["svd"].build()
    assert len(numbered(model)) == 16
    assert resolve(model, 6)[0].name == "mid_block.attentions.0"
    assert resolve(model, 7)[0].name == "up_blocks.1.attentions.0"


def test_running_order_is_seen_below_an_instance_forward() -> None:
    """Offloading and compilation put a `forward` on the instance; the order is read from the class."""
    model = zoo.build("unet")
    plain = model.forward
    model.forward = lambda *args, **kwargs: plain(*args, **kwargs)
    assert numbered(model) == list(zoo.ZOO["unet"].numbered)


def test_attention_inside_a_block_is_named() -> None:
    assert all(layer.attention == ("attn", "cross") for layer in find_layers(zoo.build("plain")))
    assert find_layers(zoo.build("encoder"))[0].attention == ("self_attn",)
    video = zoo.FAMILIES["svd"].build()
    assert find_layers(video)[7].attention == tuple(
        f"{kind}.0.{attention}"
        for kind in ("transformer_blocks", "temporal_transformer_blocks")
        for attention in ("attn1", "attn2")
    )


def test_is_attention_goes_by_projections_and_then_by_name() -> None:
    class FusedThing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(4, 12)

    class LinearAttention(nn.Module):
        pass

    class AttentionBlock(nn.Module):
        pass

    assert is_attention(zoo.Attention())
    assert is_attention(FusedThing())
    assert is_attention(nn.MultiheadAttention(8, 2))
    assert is_attention(LinearAttention())
    assert not is_attention(AttentionBlock())
    assert not is_attention(nn.Linear(4, 4))
    assert not is_attention(zoo.Block())


def test_looking_changes_nothing() -> None:
    model = zoo.build("refined")
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    find_layers(model)
    resolve(model, [0, "noise_refiner.*"])
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == before


# --- resolving --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (0, ["blocks.0"]),
        ([11], ["blocks.11"]),
        (-1, ["blocks.11"]),
        ([-12], ["blocks.0"]),
        (range(2, 8, 3), ["blocks.2", "blocks.5"]),
        ([range(2), -1], ["blocks.0", "blocks.1", "blocks.11"]),
        ((3, 1), ["blocks.1", "blocks.3"]),
        ({3, 1}, ["blocks.1", "blocks.3"]),
        ([5, -7, "blocks.5", "5"], ["blocks.5"]),
        ("blocks.1", ["blocks.1"]),
        (["blocks.10"], ["blocks.10"]),
        ("blocks.1*", ["blocks.1", "blocks.10", "blocks.11"]),
        ("blocks.1?", ["blocks.10", "blocks.11"]),
        ("blocks.[23]", ["blocks.2", "blocks.3"]),
        (["blocks.7", 2, [4, ["blocks.3"]]], ["blocks.2", "blocks.3", "blocks.4", "blocks.7"]),
    ],
)
def test_resolve(spec: Any, expected: list[str]) -> None:
    assert names_of(resolve(zoo.build("twelve"), spec)) == expected


def test_resolve_all() -> None:
    model = zoo.build("twelve")
    everything = list(zoo.ZOO["twelve"].numbered)
    for spec in ("blocks.*", range(12), model.blocks, [*model.blocks][::-1]):
        assert names_of(resolve(model, spec)) == everything


def test_block_1_is_not_block_10() -> None:
    """Trap 5: a name, a glob without a star and a tail all end at a module boundary."""
    model = zoo.build("twelve")
    assert resolve(model, "blocks.1")[0].module is model.blocks[1]
    assert names_of(resolve(model, "1")) == ["blocks.1"]
    with pytest.raises(stg.LayerError):
        resolve(model, "locks.1")


def test_resolve_modules() -> None:
    model = zoo.build("twelve")
    (layer,) = resolve(model, model.blocks[10])
    assert (layer.index, layer.name, layer.module) == (10, "blocks.10", model.blocks[10])
    (inside,) = resolve(model, model.blocks[10].attn)
    assert (inside.index, inside.name) == (None, "blocks.10.attn")
    with pytest.raises(stg.LayerError, match="not inside this DiT"):
        resolve(model, zoo.Block())
    with pytest.raises(stg.LayerError, match="not inside this DiT"):
        resolve(model, model)


def test_a_star_stays_between_two_dots() -> None:
    model = zoo.build("unet")
    assert names_of(resolve(model, "up_blocks.*.attentions.0")) == [
        "up_blocks.0.attentions.0",
        "up_blocks.1.attentions.0",
    ]
    assert names_of(resolve(model, "mid_block.attentions.*")) == ["mid_block.attentions.0"]
    assert len(resolve(model, "attentions.*")) == 7
    assert names_of(resolve(model, "*_block.attentions.0")) == ["mid_block.attentions.0"]
    with pytest.raises(stg.LayerError, match="matches no layer"):
        resolve(model, "up_blocks.*.0")


def test_tails_start_at_a_module_boundary() -> None:
    model = zoo.build("wrapped")
    for name in ("blocks.2", "inner_model.blocks.2", "2", "blocks.[2]"):
        assert names_of(resolve(model, name)) == ["inner_model.blocks.2"]
    assert resolve(model, 2)[0].name == "inner_model.blocks.2"
    with pytest.raises(stg.LayerError, match="has no module of that name"):
        resolve(model, "model.blocks.2")


def test_an_exact_name_beats_longer_ones_that_end_in_it() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList(zoo.Block() for _ in range(2))
    model.inner = nn.Module()
    model.inner.blocks = nn.ModuleList(zoo.Block() for _ in range(2))
    assert names_of(resolve(model, "blocks.0")) == ["blocks.0"]


def test_side_stacks_can_be_named_but_not_numbered() -> None:
    model = zoo.build("refined")
    assert names_of(resolve(model, ["noise_refiner.1", "token_refiner.0", 0])) == [
        "blocks.0",
        "prompt.token_refiner.0",
        "noise_refiner.1",
    ]
    assert resolve(model, 0)[0].name == "blocks.0"
    with pytest.raises(stg.LayerError, match="has 3 layers"):
        resolve(model, 3)


def test_any_module_can_be_named() -> None:
    model = zoo.build("no_stacks")
    assert [(layer.index, layer.name) for layer in resolve(model, ["second", "first.ff"])] == [
        (None, "second"),
        (None, "first.ff"),
    ]
    assert resolve(zoo.build("no_attention"), "blocks.1")[0].module is not None


# --- the table --------------------------------------------------------------------------------------------------------


def test_table_lists_what_can_be_skipped() -> None:
    table = stg.layers(zoo.build("refined"))
    assert len(table) == 7
    assert [layer.index for layer in table] == [0, 1, 2, None, None, None, None]
    assert [layer.name for layer in table][:3] == ["blocks.0", "blocks.1", "blocks.2"]
    lines = repr(table).splitlines()
    assert lines[0] == "Refined: 3 layers"
    assert lines[1].split() == ["index", "name", "block", "attention", "inside"]
    assert lines[2].split() == ["0", "blocks.0", "Block", "attn,", "cross"]
    assert any(line.split()[:2] == ["-", "noise_refiner.0"] for line in lines)
    assert len(lines) == 2 + 7


def test_table_to_dict_is_plain_data() -> None:
    table = stg.layers(zoo.build("two_stacks")).to_dict()
    assert json.loads(json.dumps(table)) == table
    assert table[""]["model"] == "TwoStacks"
    assert table[""]["published"] == []
    assert table[""]["layers"][2] == {
        "index": 2,
        "name": "single_blocks.0",
        "block": "Block",
        "attention": ["attn", "cross"],
        "kinds": {},
    }


def test_table_marks_the_published_layer() -> None:
    import diffusers

    config = {**zoo.FAMILIES["mochi"].config, "num_layers": 48}
    with torch.device("meta"):
        table = stg.layers(diffusers.MochiTransformer3DModel(**config))
    marked = [line for line in repr(table).splitlines() if line.endswith("<- published")]
    assert [line.split()[0] for line in marked] == ["34"]
    assert "published for Mochi 1: layers=[34], mode='residual', scale=1.0" in repr(table)
    assert table.to_dict()[""]["published"][0]["layers"] == [34]
    assert "published" not in repr(stg.layers(zoo.FAMILIES["mochi"].build()))


def test_table_of_a_model_without_layers() -> None:
    table = stg.layers(zoo.build("no_stacks"))
    assert len(table) == 0
    assert list(table) == []
    assert repr(table).startswith("NoStacks: 0 layers")


def test_side_stacks_are_told_by_whole_words() -> None:
    model = nn.Module()
    for name in ("embedded", "text_embedder", "contexture", "captionProjection"):
        part = nn.Module()
        part.blocks = nn.ModuleList(zoo.Block() for _ in range(2))
        model.add_module(name, part)
    assert {name.split(".")[0] for name in numbered(model)} == {"embedded", "contexture"}


class Fused(nn.Module):
    """One projection for queries, keys, values and more, as in the single blocks of Flux: its norms tell."""

    def __init__(self, names: tuple[str, str], inside: bool) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(8, 40), nn.Linear(24, 8)
        norms = {name: nn.LayerNorm(4) for name in names}
        if inside:
            self.norm = nn.ModuleDict(norms)
        else:
            for name, norm in norms.items():
                self.add_module(name, norm)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    "names",
    [("query_norm", "key_norm"), ("q_norm", "k_norm"), ("norm_q", "norm_k"), ("img_attn_q_norm", "img_attn_k_norm")],
)
def test_blocks_with_one_projection_for_all_are_numbered(names: tuple[str, str], inside: bool) -> None:
    model = nn.Module()
    model.single_blocks = nn.ModuleList(Fused(names, inside) for _ in range(3))
    assert [layer.name for layer in find_layers(model)] == [f"single_blocks.{i}" for i in range(3)]
    assert is_attention(model.single_blocks[0])  # type: ignore[index]
    assert not is_attention(nn.ModuleDict({name: nn.LayerNorm(4) for name in names}))  # norms alone project nothing
    model.single_blocks = nn.ModuleList(Fused((names[0], "other"), inside) for _ in range(3))
    assert find_layers(model) == []


# --- regular expressions, and globs of what is inside layers ----------------------------------------------------------


@pytest.mark.parametrize("spell", [re.compile, "re:{}".format], ids=["compiled", "text"])
@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r"blocks\.(1|2)$", ["blocks.1", "blocks.2"]),
        (r"^blocks\.[01]", ["blocks.0", "blocks.1"]),
        (r"blocks\.(1|2)\..*attn1", ["blocks.1.attn1", "blocks.2.attn1"]),
        (r"blocks\.(1|2)\..*attn", ["blocks.1.attn1", "blocks.2.attn1"]),  # and not the cross-attention beside them
        (r"(?i)BLOCKS\.0$", ["blocks.0"]),
    ],
)
def test_regular_expressions(spell: Callable[[str], Any], pattern: str, expected: list[str]) -> None:
    model = zoo.FAMILIES["wan"].build()
    assert [name for name, _ in model.named_modules() if name in expected] == expected  # the names, told by torch
    for layers in (spell(pattern), [spell(pattern)]):
        assert names_of(resolve(model, layers)) == expected
        assert names_of(stg.check(model, layers, "values")) == expected


def test_a_regular_expression_skips_what_it_names() -> None:
    model, inputs = zoo.build("plain"), zoo.inputs()
    with stg.skip(model, re.compile(r"blocks\.(1|2)$")):
        found = model(**inputs)
    torch.testing.assert_close(found, zoo.without(model, ["blocks.1", "blocks.2"])(**inputs))


def test_regular_expressions_that_name_nothing() -> None:
    model = zoo.build("plain")
    with pytest.raises(stg.LayerError, match=r"layers=\[re.compile\('nothing'\)\] is found in no name.*4 layers"):
        resolve(model, re.compile("nothing"))
    with pytest.raises(stg.LayerError, match=r"layers=\['re:\('\] is not a regular expression: missing \)"):
        resolve(model, "re:(")
    with pytest.raises(stg.TargetError, match="a regular expression for text, not for bytes"):
        resolve(model, re.compile(b"blocks"))


def test_globs_reach_what_is_inside_layers() -> None:
    model = zoo.FAMILIES["wan"].build()
    expected = [name for name, _ in model.named_modules() if name.endswith(".attn1")]
    assert names_of(resolve(model, "blocks.*.attn1")) == expected
    assert names_of(resolve(model, "blocks.[12].attn?")) == ["blocks.1.attn1", "blocks.2.attn1"]
