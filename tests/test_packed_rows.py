"""Rows whose tokens lie one after the other in front of an attention kernel: weak passes have the cond rows alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import stg_hooks as stg
from tests import opaque, zoo
from tests.zoo import DIM

close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
pytestmark = pytest.mark.filterwarnings("error::stg_hooks.StgWarning")  # no pass falls back to all rows

TOKENS, TEXT = 4, 3


class PackedAttention(nn.Module):
    """As Mochi's own: with one row, padding is cut off by the longest length; with more, tokens are packed."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, text: Tensor, ends: Tensor, valid: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        if len(x) == 1:
            both = torch.cat([x, text[:, : longest - x.shape[1]]], 1)
            kept = both.flatten(0, 1)
        else:
            both = torch.cat([x, text], 1)
            kept = both.flatten(0, 1)[valid]
        q, k, v = self.qkv(kept).unflatten(-1, (3, 2, -1)).unbind(1)
        out = self.proj(opaque.attend_varlen(q, k, v, ends, ends, longest, longest).flatten(1))
        if len(x) == 1:
            out = F.pad(out[None], (0, 0, 0, x.shape[1] + text.shape[1] - longest))
        else:
            out = torch.zeros(len(x) * (x.shape[1] + text.shape[1]), DIM).index_copy(0, valid, out)
            out = out.unflatten(0, (len(x), -1))
        return out[:, : x.shape[1]], out[:, x.shape[1] :]


class PackedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.ff = PackedAttention(), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, text: Tensor, packed: dict[str, Any]) -> tuple[Tensor, Tensor]:
        more, text_more = self.attn(x, text, packed["ends"], packed["valid"], packed["longest"])
        return x + more + F.gelu(self.ff(x)), text + text_more


class PackedModel(nn.Module):
    """As Mochi's own: takes a dictionary about the tokens that are no padding."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(PackedBlock() for _ in range(4))
        self.out = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, text: list[Tensor], packed: dict[str, Any]) -> Tensor:
        (states,) = text
        for block in self.blocks:
            x, states = block(x, states, packed=packed)
        return self.out(x)


def packed_inputs(lengths: list[int], *, padded_left: bool = False) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    x, text = (torch.randn(len(lengths), n, DIM, generator=generator) for n in (TOKENS, TEXT))
    mask = torch.arange(TOKENS + TEXT) < TOKENS + torch.tensor(lengths)[:, None]
    if padded_left:
        mask = mask.flip(1)
    counts = mask.sum(1, dtype=torch.int32)
    packed = {
        "ends": F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0)),
        "valid": mask.flatten().nonzero().flatten(),
        "longest": int(counts.max()),
    }
    return {"x": x, "text": [text], "packed": packed}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return PackedModel().eval().requires_grad_(False)


def without(model: nn.Module, block: int) -> nn.Module:
    """Return a copy of a model in which a block passes on what it is given."""
    changed = copy.deepcopy(model)
    changed.blocks[block].forward = lambda x, text, packed: (x, text)
    return changed


ROWS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "[u, u, c, c]": ({"batched_cfg": True}, [2, 3]),
    "[c, c, u, u]": ({"rows": "cond+uncond"}, [0, 1]),
    "[u, c, u, c]": ({"rows": slice(1, None, 2)}, [1, 3]),
}


@pytest.mark.parametrize("execution", zoo.EXECUTIONS)
@pytest.mark.parametrize("lengths", [[3, 1, 2, 1], [0, 3, 3, 3], [3, 3, 1, 2]], ids=str)
@pytest.mark.parametrize("said", ROWS)
def test_packed_tokens_are_cut(model: nn.Module, said: str, lengths: list[int], execution: str) -> None:
    settings, conds = ROWS[said]
    inputs = packed_inputs(lengths)
    plain, weak = model(**inputs), without(model, 2)(**inputs)
    expected, term = plain.clone(), (plain - weak)[conds]
    expected[conds] += term
    expected[[row for row in range(4) if row not in conds]] += term
    with stg.apply(model, [2], 1.0, execution=execution, **settings) as guidance:
        for _ in range(3):
            assert_close(model(**inputs), expected, **close)
    if execution != "full":
        assert guidance.stats.blocks_saved == 3 * 3


@pytest.mark.parametrize("execution", zoo.EXECUTIONS)
@pytest.mark.parametrize("lengths", [[3, 1], [1, 3], [3, 3], [0, 2]], ids=str)
def test_one_cond_row(model: nn.Module, lengths: list[int], execution: str) -> None:
    """Whose longest length is its own."""
    inputs = packed_inputs(lengths)
    plain, weak = model(**inputs), without(model, 1)(**inputs)
    with stg.apply(model, [1], 1.0, execution=execution, batched_cfg=True):
        for _ in range(3):
            assert_close(model(**inputs), plain + (plain - weak)[1:], **close)


class TwoSequences(nn.Module):
    """As HunyuanVideo's own: the tokens of a row are a sequence, and its padding is another one."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        assert len(ends) == 2 * len(x) + 1
        q, k, v = self.qkv(x).flatten(0, 1).unflatten(-1, (3, 2, -1)).unbind(1)
        out = opaque.attend_varlen(q, k, v, ends, ends, x.shape[1], x.shape[1])
        return x + self.proj(out.view(len(x), x.shape[1], -1))


class TwoSequencesModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TwoSequences() for _ in range(4))

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        both = torch.cat([x, text], 1)
        starts, total = torch.arange(len(x)) * both.shape[1], both.shape[1]
        stops = torch.stack([starts + x.shape[1] + mask.sum(1), starts + total], 1)
        ends = F.pad(stops.flatten(), (1, 0)).to(torch.int32)
        for block in self.blocks:
            both = block(both, ends)
        return both[:, : x.shape[1]]


@pytest.mark.parametrize("execution", zoo.EXECUTIONS)
@pytest.mark.parametrize("said", ROWS)
def test_padding_as_a_sequence_of_its_own(said: str, execution: str) -> None:
    torch.manual_seed(0)
    model, (settings, conds) = TwoSequencesModel().eval().requires_grad_(False), ROWS[said]
    inputs = {**zoo.inputs(4), "mask": torch.arange(3) < torch.tensor([[3], [1], [2], [3]])}
    weak = copy.deepcopy(model)
    weak.blocks[2].forward = lambda both, ends: both
    plain, term = model(**inputs), (model(**inputs) - weak(**inputs))[conds]
    expected = plain.clone()
    expected[conds] += term
    expected[[row for row in range(4) if row not in conds]] += term
    with stg.apply(model, ["blocks.2"], 1.0, execution=execution, **settings):
        for _ in range(3):
            assert_close(model(**inputs), expected, **close)
