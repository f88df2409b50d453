"""Calls whose weak passes want what the calls before them let go: a `Gap` tells, also where NaN would be lost."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import stg_hooks as stg
from benchmarks import measure
from tests import zoo

LATE = 500.0
SKIPPED = 3
pytestmark = pytest.mark.filterwarnings("error::stg_hooks.StgWarning")

Join = Callable[[Tensor, Tensor], Tensor]


class TakesEarlyOutput(nn.Module):
    """From a noise level on, what the first block returned is used again after the skipped block."""

    def __init__(self, join: Join, take: Callable[[Tensor], Tensor], skipped: int = SKIPPED) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([zoo.Block() for _ in range(skipped + 3)])
        self.join, self.take, self.skipped = join, take, skipped

    def forward(self, x: Tensor, text: Tensor, t: float) -> Tensor:
        early = None
        for i, block in enumerate(self.blocks):
            x = block(x, text)
            if i == 0 and t < LATE:
                early = self.take(x)
            if i == self.skipped + 1 and early is not None:
                x = self.join(x, early)
        return x


def _added(x: Tensor, early: Tensor) -> Tensor:
    return x + torch.nan_to_num(early)


JOINS: dict[str, tuple[Join, Callable[[Tensor], Tensor]]] = {
    "sum": (torch.add, lambda x: x),
    "pooled": (torch.add, lambda x: x.mean(1, keepdim=True)),
    "transposed": (lambda x, early: x + early.mT, lambda x: x.mT),
    "NaN is lost": (lambda x, early: x + torch.nan_to_num(early), lambda x: x),
    "mask": (lambda x, mask: torch.where(mask, x / 2, x), lambda x: x > 0.1),
    "by its entries": (lambda x, mask: x.masked_fill(mask, 0), lambda x: x > 0.1),
    "written into": (lambda x, other: x + other, lambda x: torch.zeros_like(x.detach()).copy_(x)),
    "compiled": (torch.compile(_added, backend="eager"), lambda x: x),
    "its shape": (lambda x, early: x / early.shape[-1], lambda x: x),
    "number": (lambda x, n: x * n, lambda x: torch.tensor(2.0 if x.mean() > -10 else 1.0)),
}


@pytest.mark.parametrize("execution", ["sequential", "batched"])
@pytest.mark.parametrize("order", [(900.0, 100.0, 100.0, 900.0), (100.0, 900.0, 100.0)])
@pytest.mark.parametrize("join", JOINS)
def test_an_output_that_is_used_again_at_some_noise_levels(join: str, order: tuple[float, ...], execution: str) -> None:
    torch.manual_seed(0)
    model = TakesEarlyOutput(*JOINS[join]).eval()
    plain, weak = copy.deepcopy(model), zoo.without(model, (f"blocks.{SKIPPED}",))
    text = torch.randn(2, zoo.TEXT_TOKENS, zoo.DIM)
    with torch.no_grad(), stg.apply(model, [SKIPPED], 1.5, execution=execution) as applied:
        for t in order:
            x = torch.randn(2, zoo.TOKENS, zoo.DIM)
            cond = plain(x, text, t)
            expected = cond + 1.5 * (cond - weak(x, text, t))
            assert_close(model(x, text, t), expected, rtol=1e-4, atol=1e-5)
    if join == "its shape":  # which is known nevertheless
        assert applied.stats.blocks_run == 2 * len(order)


def test_only_what_is_wanted_is_kept_from_then_on() -> None:
    torch.manual_seed(0)
    model = TakesEarlyOutput(*JOINS["pooled"], skipped=12).eval()
    x, text = torch.randn(2, zoo.TOKENS, zoo.DIM), torch.randn(2, zoo.TEXT_TOKENS, zoo.DIM)
    state = x.numel() * x.element_size()
    with torch.no_grad(), stg.apply(model, [12], 1.5) as applied:
        model(x, text, 900.0)
        model(x, text, 900.0)
        _, plain = measure.peak_memory(lambda: model(x, text, 900.0), torch.device("cpu"))
        for _ in range(3):
            model(x, text, 100.0)
        run = applied.stats.blocks_run
        _, peak = measure.peak_memory(lambda: model(x, text, 100.0), torch.device("cpu"))
    assert applied.stats.blocks_run == run + 2
    assert peak <= plain + 3 * state, "of twelve outputs one is kept more"


class Collecting(zoo.Block):
    """Hands over what it returns at low noise levels, in a list or a dictionary that it is given."""

    def forward(self, x: Tensor, text: Tensor, found: Any) -> Tensor:
        x = self.mix(x, text)
        if isinstance(found, list):
            found.append(x)
        elif found is not None:
            found[len(found)] = x
        return x


class Collects(nn.Module):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Collecting() for _ in range(6)])
        self.kind = kind

    def forward(self, x: Tensor, text: Tensor, t: float) -> Tensor:
        found = self.kind()
        for block in self.blocks:
            x = block(x, text, found=found if t < LATE else None)
        return x + sum(found if isinstance(found, list) else found.values())


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("kind", [list, dict])
def test_blocks_that_begin_to_hand_over_more_than_they_return(kind: type, inference: bool) -> None:
    torch.manual_seed(0)
    model = Collects(kind).eval()
    weak, plain = zoo.without(model, (f"blocks.{SKIPPED}",)), copy.deepcopy(model)
    x, text = torch.randn(2, zoo.TOKENS, zoo.DIM), torch.randn(2, zoo.TEXT_TOKENS, zoo.DIM)
    with torch.inference_mode(inference), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", stg.StgWarning)  # it says that nothing is shared from there on
        with stg.apply(model, [SKIPPED], 1.5):
            for t in (900.0, 100.0, 100.0):
                cond = plain(x, text, t)
                assert_close(model(x, text, t), cond + 1.5 * (cond - weak(x, text, t)), rtol=1e-4, atol=1e-5)
