"""What hooks cost: guidance of models that compute nothing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from torch import Tensor, nn

import stg_hooks as stg
from benchmarks import contestants, measure

DEPTHS = {28: 19, 48: 34}
"""Blocks, and the skipped one: as in LTX-Video 2B and in Mochi."""
TITLES = {
    "guided": "stg.apply, guided",
    "batched": "stg.apply, guided, batched",
    "idle": "stg.apply, scale 0",
    "outside": "stg.apply, outside its window",
    "guider": "stg.Guider, in `with guider:`",
    "modular": "stg.modular.SkipGuidance",
    "slg": "diffusers' SkipLayerGuidance",
}
Way = tuple[Callable[[], Any], Callable[[], AbstractContextManager[Any]]]


class Nothing(nn.Module):
    """A block that computes next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(1, 1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states + 1
        return hidden_states  # noqa: RET504 - by its name stg_hooks reads what passes through


class Nothings(nn.Module):
    """As many blocks as a model has: all that guidance takes here is taken by hooks."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Nothing() for _ in range(depth))

    def forward(self, x: Tensor, t: Tensor, text: Tensor | None = None, return_dict: bool = False) -> tuple[Tensor]:
        for block in self.blocks:
            x = block(x)
        return (x,)


TransformerBlockRegistry.register(Nothing, TransformerBlockMetadata(return_hidden_states_index=0))


def hooks(
    device: torch.device, rounds: int, clock: Callable[[], float] = time.perf_counter, enough: Any = lambda _: False
) -> list[dict[str, Any]]:
    """Measure what hooks take per step, in models of several depths that compute nothing."""
    return [_of(depth, skipped, device, rounds, clock, enough) for depth, skipped in DEPTHS.items()]


def _of(
    depth: int, skipped: int, device: torch.device, rounds: int, clock: Callable[[], float], enough: Any
) -> dict[str, Any]:
    model = Nothings(depth).to(device)
    ways, plain = _ways(model, skipped, device)
    for step, session in ways.values():
        with session():
            for _ in range(2):  # the first call of a session may contain checks
                step()
    times = measure.quiet(measure.interleaved(ways, rounds, device, clock, enough))
    guide = stg.apply(model, layers=[skipped], scale=1.0, batched_cfg=True)
    entering = []
    for _ in range(min(rounds, 100)):
        start = clock()
        guide.__enter__()
        middle = clock()
        guide.__exit__(KeyboardInterrupt, None, None)  # nothing was guided, which is fine here
        entering.append((middle - start, clock() - middle))
    return {
        "blocks": depth,
        "skipped": skipped,
        "rounds": len(times["rows"]),
        "plain_us": {name: 1e6 * statistics.median(times[name]) for name in ("rows", "calls")},
        "added_us": {
            name: {
                key: 1e6 * value
                for key, value in measure.bootstrap(times, lambda t, n=name: t[n] - t[plain[n]], 500).items()
            }
            for name in TITLES
        },
        "enter_us": 1e6 * statistics.median(enter for enter, _ in entering),
        "leave_us": 1e6 * statistics.median(leave for _, leave in entering),
    }


def _ways(model: nn.Module, skipped: int, device: torch.device) -> tuple[dict[str, Way], dict[str, str]]:
    """Return what to time, and for each of it the plain step that it is compared with."""
    x = torch.randn(2, 4, 8, device=device)
    t = torch.tensor([500.0, 500.0], device=device)
    one, t1, text = x[:1], t[:1], torch.zeros(1, 1, device=device)
    inputs = {"x": one, "t": t1, "text": text}

    def rows() -> Tensor:
        uncond, cond = model(x, t)[0].chunk(2)
        return uncond + contestants.GUIDANCE_SCALE * (cond - uncond)

    def calls() -> Tensor:
        cond, uncond = model(one, t1, text)[0], model(one, t1, text)[0]
        return uncond + contestants.GUIDANCE_SCALE * (cond - uncond)

    def applied(**settings: Any) -> Callable[[], AbstractContextManager[Any]]:
        guide = stg.apply(model, layers=[skipped], batched_cfg=True, **settings)
        guide.step = stg.Step(index=5, count=10)
        return lambda: guide

    guider = stg.Guider(model, layers=[skipped], scale=1.0, guidance_scale=contestants.GUIDANCE_SCALE)

    def with_guider(name: str) -> Callable[[], Tensor]:
        found = contestants.guider_of(name, skipped)
        return lambda: contestants.with_guider(found, model, inputs, inputs)

    ways: dict[str, Way] = {
        "rows": (rows, nullcontext),
        "calls": (calls, nullcontext),
        "guided": (rows, applied(scale=1.0)),
        "batched": (rows, applied(scale=1.0, execution="batched")),
        "idle": (rows, applied(scale=0.0)),
        "outside": (rows, applied(scale=1.0, start=0.8)),
        "guider": (lambda: guider(one, t1, cond={"text": text}, uncond={"text": text})[0], lambda: _inside(guider)),
        "modular": (with_guider("modular"), nullcontext),
        "slg": (with_guider("slg"), nullcontext),
    }
    of_rows = ("guided", "batched", "idle", "outside")
    return ways, {name: "rows" if name in of_rows else "calls" for name in TITLES}


@contextmanager
def _inside(guider: stg.Guider) -> Iterator[None]:
    with guider:
        yield
