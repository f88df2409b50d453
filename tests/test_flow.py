"""Which children a `forward` gives what is denoised: what cannot be followed is never left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stg_hooks as stg
from tests import zoo


class TwoLists(nn.Module):
    """What is denoised goes through `early` and `blocks`."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.ModuleList([zoo.Attention() for _ in range(2)])
        self.blocks = nn.ModuleList([zoo.Attention() for _ in range(3)])


class InnerFunctions(TwoLists):
    def forward(self, x: Tensor) -> Tensor:
        def early(hidden: Tensor) -> Tensor:
            for block in self.early:
                hidden = block(hidden)
            return hidden

        x = early(x)
        for block in self.blocks:
            x = (lambda hidden, block=block: block(hidden))(x)
        return x


class TimeFirst(TwoLists):
    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        for block in self.early:
            x = block(x)
        for block in self.blocks:
            x = block(x) + t
        return x


class InAnAttribute(TwoLists):
    def forward(self, x: Tensor) -> Tensor:
        self.hidden = x
        x = self.start()
        for block in self.blocks:
            x = block(x)
        return x

    def start(self) -> Tensor:
        x = self.hidden
        for block in self.early:
            x = block(x)
        return x


class Walrus(TwoLists):
    def forward(self, x: Tensor) -> Tensor:
        if (hidden := x * 1) is not None:
            for block in self.early:
                hidden = block(hidden)
        for block in self.blocks:
            x = block(x) + hidden
        return x


class Comprehension(TwoLists):
    def forward(self, x: Tensor) -> Tensor:
        parts = [self.early[1](self.early[0](part)) for part in x.chunk(2)]
        x = torch.cat(parts)
        for block in self.blocks:
            x = block(x)
        return x


class SwitchedOn(TwoLists):
    def forward(self, x: Tensor, with_early: bool = False) -> Tensor:
        with_early = with_early or not self.training
        if with_early:
            for block in self.early:
                x = block(x)
        for block in self.blocks:
            x = block(x)
        return x


class Conditions(TwoLists):
    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        for block in self.early:
            text = block(text)
        for block in self.blocks:
            x = block(x) + text
        return x


def numbered(model: nn.Module) -> list[str]:
    """List what holds the numbered layers."""
    return [layer.name.split(".")[0] for layer in stg.layers(model) if layer.index is not None]


FOLLOWED = [InnerFunctions, TimeFirst, InAnAttribute, Walrus, Comprehension, SwitchedOn]


@pytest.mark.parametrize("build", FOLLOWED)
def test_what_is_denoised_is_followed(build: Callable[[], Any]) -> None:
    assert set(numbered(build())) == {"early", "blocks"}


def test_what_prepares_conditions_is_a_bystander() -> None:
    assert set(numbered(Conditions())) == {"blocks"}
