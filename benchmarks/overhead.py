"""What hooks cost: guidance of a model that computes nothing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import stg_hooks as stg
from benchmarks import contestants, measure
from benchmarks.shapes import SHAPES, Inputs


class Nothing(nn.Module):
    """A block that computes next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        return x  # noqa: RET504 - by its name stg_hooks reads what passes through


class Nothings(nn.Module):
    """As many blocks as Mochi has: all that guidance takes here is taken by hooks."""

    def __init__(self, depth: int = 48) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Nothing() for _ in range(depth))

    def forward(self, x: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        for block in self.blocks:
            x = block(x)
        return (x,)


def hooks(
    names: Sequence[str], device: torch.device, rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """Measure what hooks take, in a model that computes nothing."""
    model = Nothings().to(device)
    inputs: Inputs = {"x": torch.randn(2, 4, 8, device=device)}
    chosen = ["plain", *(name for name in ("idle", "sequential", "batched") if name in names)]
    field = {name: contestants.build(name, SHAPES["mochi"], model, inputs, 34) for name in chosen}
    for contestant in field.values():
        with contestant.session():
            for _ in range(2):  # the first call of a session may contain checks
                contestant.step()
    times = measure.interleaved({n: (c.step, c.session) for n, c in field.items()}, rounds, device, clock)
    guide = stg.apply(model, layers=[34], scale=1.0, batched_cfg=True)
    entering = []
    for _ in range(rounds):
        start = clock()
        guide.__enter__()
        middle = clock()
        guide.__exit__(KeyboardInterrupt, None, None)  # nothing was guided, which is fine here
        entering.append((middle - start, clock() - middle))
    return {
        "blocks": 48,
        "plain_us": 1e6 * statistics.median(times["plain"]),
        "added_us": {
            name: {
                key: 1e6 * value
                for key, value in measure.bootstrap(times, lambda t, n=name: t[n] - t["plain"], 500).items()
            }
            for name in chosen[1:]
        },
        "enter_us": 1e6 * statistics.median(enter for enter, _ in entering),
        "leave_us": 1e6 * statistics.median(leave for _, leave in entering),
    }
