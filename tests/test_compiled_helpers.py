"""Blocks that call functions which torch.compile has compiled, as those of SkyReels V2 do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import stg_hooks as stg

pytest.importorskip("torch._dynamo")
if not hasattr(torch.compiler, "set_stance"):
    pytest.skip("needs torch 2.6", allow_module_level=True)

COMPILED: list[object] = []


def counting(graph: Any, example: Any) -> Callable[..., Any]:
    COMPILED.append(graph)
    return graph.forward  # type: ignore[no-any-return]


@torch.compile(backend=counting, dynamic=True)
def mul_add(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return x + y * z


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v)[:, 0]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = SelfAttention()
        self.ff = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        x = mul_add(x, self.self_attn(x), z)
        return mul_add(x, self.ff(x), z)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, t[:, None, None].sin())
        return x


class OnlyValues(SelfAttention):
    def forward(self, x: Tensor) -> Tensor:
        return self.qkv(x)[..., 16:]


@pytest.mark.parametrize("mode", ["values", "feed-forward"])
def test_what_a_block_calls_is_not_compiled_with_what_looks_at_it(mode: str) -> None:
    torch.manual_seed(0)
    model, x, t = Model().eval(), torch.randn(2, 5, 8), torch.tensor([1.0, 2.0])
    other = copy.deepcopy(model)
    if mode == "values":
        other.blocks[1].self_attn.__class__ = OnlyValues
    else:
        other.blocks[1].ff.forward = lambda x: torch.zeros_like(x)
    with torch.no_grad():
        expected = other(x, t)
        count = len(COMPILED)
        with stg.skip(model, [1], mode):
            torch.testing.assert_close(model(x, t), expected)
        assert len(COMPILED) == count > 0
        plain = model(x, t)
    assert len(COMPILED) == count
    assert not torch.equal(plain, expected)
