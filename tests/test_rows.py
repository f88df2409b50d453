"""Weak passes are made on the cond rows alone only where these are known to be found, among arguments and inside."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stg_hooks as stg
from tests import zoo
from tests.zoo import DIM, Block

EXECUTIONS = ("sequential", "batched", "full")
SCALE = 1.5
STEPS = 3


pytestmark = pytest.mark.usefixtures("inference")


class TextFirst(zoo.DiT):
    """Takes text with its rows in dimension 1."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return super().forward(x, text.transpose(0, 1))


class PromptEmbeds(zoo.DiT):
    """Takes one text state per layer and row, as `[layers, rows, tokens, channels]`."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        for block, states in zip(self.blocks, text, strict=True):
            x = block(x, states)
        return self.out(x)


class TableBlock(Block):
    """Hands on a table with an entry per token, changed."""

    def forward(self, x: Tensor, text: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        x = self.mix(x + table, text)
        table = table + 0.1 * self.ff(table)
        return x, table


class Tables(nn.Module):
    """Has a table whose entries are as many as the rows of a call, where it has that many tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TableBlock() for _ in range(4))
        self.positions = nn.Parameter(torch.randn(8, DIM))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        table = self.positions[: x.shape[1]]
        for block in self.blocks:
            x, table = block(x, text, table)
        return x


class Centred(zoo.DiT):
    """Lets rows influence each other: only all of them together give the prediction."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = super().forward(x, text)
        return x - x.mean(0, keepdim=True)


def rows_of(text: Tensor, dim: int, rows: slice) -> Tensor:
    return text.movedim(dim, 0)[rows].movedim(0, dim)


def build(cls: type[nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    return cls().eval()


def calls(x_rows: int, tokens: int, text_shape: tuple[int, ...]) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        {
            "x": torch.randn(x_rows, tokens, DIM, generator=generator),
            "text": torch.randn(*text_shape, generator=generator),
        }
        for _ in range(STEPS)
    ]


def by_hand(model: nn.Module, call: dict[str, Tensor], dim: int) -> Tensor:
    """Guide as the textbook does, with rows cut by somebody who knows the model."""
    half = call["x"].shape[0] // 2
    cond = {"x": call["x"][half:], "text": rows_of(call["text"], dim, slice(half, None))}
    plain = model(**call)
    with stg.skip(model, [2]):
        weak = model(**cond)
    return plain + SCALE * (plain[half:] - weak).repeat(2, 1, 1)


CASES: dict[type[nn.Module], tuple[tuple[int, int, tuple[int, ...]], int]] = {
    TextFirst: ((4, 5, (3, 4, DIM)), 1),
    PromptEmbeds: ((4, 5, (4, 4, 3, DIM)), 1),
    Tables: ((4, 4, (4, 3, DIM)), 0),
}


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("cls", CASES, ids=lambda cls: cls.__name__)
@pytest.mark.filterwarnings("ignore::stg_hooks.StgWarning")
def test_rows_in_unusual_places(cls: type[nn.Module], execution: str) -> None:
    model, (shape, dim) = build(cls), CASES[cls]
    with stg.apply(model, [2], SCALE, batched_cfg=True, execution=execution):
        got = [model(**call) for call in calls(*shape)]
    for output, call in zip(got, calls(*shape), strict=True):
        torch.testing.assert_close(output, by_hand(model, call, dim))


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_rows_that_influence_each_other(execution: str) -> None:
    """A weak pass on all rows is what remains."""
    model = build(Centred)
    guide = stg.apply(model, [2], SCALE, batched_cfg=True, execution=execution)
    with pytest.warns(stg.StgWarning, match="cannot be cut down to their cond rows") as caught, guide:
        got = [model(**call) for call in calls(4, 5, (4, 3, DIM))]
    assert sum("cannot be cut down" in str(warning.message) for warning in caught) == 1
    for output, call in zip(got, calls(4, 5, (4, 3, DIM)), strict=True):
        plain = model(**call)
        with stg.skip(model, [2]):
            weak = model(**call)
        torch.testing.assert_close(output, plain + SCALE * (plain - weak)[2:].repeat(2, 1, 1))


@pytest.mark.parametrize("execution", ["sequential", "full"])
def test_nothing_is_told_where_rows_are_found(execution: str) -> None:
    model = zoo.build("plain")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with stg.apply(model, [2], SCALE, batched_cfg=True, execution=execution) as handle:
            for call in calls(4, 5, (4, 3, DIM)):
                model(**call)
    assert handle.stats.weak_passes == STEPS


class Growing(zoo.DiT):
    """Goes through more blocks for some texts."""

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks[0 if text.mean() > 0 else 1 :]:
            x = self.run(block, x, text)
        return self.out(x)


@pytest.mark.filterwarnings("error::stg_hooks.StgWarning")
def test_a_layout_that_takes_another_way_is_recorded_again() -> None:
    model = build(Growing)
    signs = [1.0, 1.0, -1.0, -1.0, 1.0]
    inputs: list[dict[str, Any]] = [
        {"x": call["x"], "text": sign * call["text"].abs()}
        for sign, call in zip(signs, calls(4, 5, (4, 3, DIM)) * 2, strict=False)
    ]
    with stg.apply(model, [2], SCALE, batched_cfg=True, execution="sequential") as handle:
        got = [model(**call) for call in inputs]
    assert handle.stats.blocks_run == 1 + 1 + 3 + 2 + 3  # where it changes, a full pass
    for output, call in zip(got, inputs, strict=True):
        torch.testing.assert_close(output, by_hand(model, call, 0))


class FramesOfSamples(zoo.DiT):
    """Its rows are the frames of all samples, beside an indicator of `(samples, frames)`, as SVD's own U-Net has."""

    def forward(self, x: Tensor, text: Tensor, indicator: Tensor) -> Tensor:
        assert indicator.numel() == len(x)
        return super().forward(x * (1 + indicator.flatten()[:, None, None]), text)


@pytest.mark.filterwarnings("error::stg_hooks.StgWarning")
@pytest.mark.parametrize("rows", ["uncond+cond", "cond+uncond"])
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_an_indicator_of_samples_and_frames_is_cut_with_the_frames(execution: str, rows: str) -> None:
    model = build(FramesOfSamples)
    weak_model = zoo.without(model, ["blocks.2"])
    indicator = torch.arange(12.0).view(4, 3) / 12  # [uncond, uncond, cond, cond], three frames each
    inputs = [{**call, "indicator": indicator} for call in calls(12, 5, (12, 3, DIM))]
    with stg.apply(model, [2], SCALE, rows=rows, execution=execution) as handle:
        got = [model(**call) for call in inputs]
    assert handle.stats.blocks_run == STEPS * (3 if execution == "full" else 1)
    for output, call in zip(got, inputs, strict=True):
        plain, weak = model(**call), weak_model(**call)
        conds = slice(6, None) if rows == "uncond+cond" else slice(6)
        torch.testing.assert_close(output, plain + SCALE * (plain - weak)[conds].repeat(2, 1, 1))
