"""What hooks cost: guidance of models that compute nothing."""

from __future__ import annotations

import statistics
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
    device: torch.device, clock: Callable[[], float], enough: Callable[[list[measure.Turn]], bool]
) -> list[dict[str, Any]]:
    """Measure what hooks take per step, in models of several depths that compute nothing."""
    return [_of(depth, skipped, device, clock, enough) for depth, skipped in DEPTHS.items()]


def _of(
    depth: int,
    skipped: int,
    device: torch.device,
    clock: Callable[[], float],
    enough: Callable[[list[measure.Turn]], bool],
) -> dict[str, Any]:
    model = Nothings(depth).to(device)
    fields = _fields(model, skipped, device)
    for step, session in (way for _, ways in fields.values() for way in ways.values()):
        with session():
            for _ in range(2):  # the first call of a session may contain checks
                step()
    turns: dict[str, list[measure.Turn]] = {}
    plain = {}
    for name, (reference, ways) in fields.items():
        found = measure.in_turns(ways, reference, device, clock, enough)
        plain[name] = statistics.median(turn.before for own in found.values() for turn in own)
        turns |= {name: measure.steady(own) for name, own in found.items()}
    guide = stg.apply(model, layers=[skipped], scale=1.0, batched_cfg=True)
    entering = []
    for _ in range(20):
        start = clock()
        guide.__enter__()
        middle = clock()
        guide.__exit__(KeyboardInterrupt, None, None)  # nothing was guided, which is fine here
        entering.append((middle - start, clock() - middle))
    return {
        "blocks": depth,
        "skipped": skipped,
        "plain_us": {name: 1e6 * seconds for name, seconds in plain.items()},
        "added_us": {
            name: {key: 1e6 * value for key, value in measure.estimate(measure.added, turns[name], draws=500).items()}
            for name in TITLES
        },
        "enter_us": 1e6 * statistics.median(enter for enter, _ in entering),
        "leave_us": 1e6 * statistics.median(leave for _, leave in entering),
    }


def _fields(
    model: nn.Module, skipped: int, device: torch.device
) -> dict[str, tuple[measure.Way, dict[str, measure.Way]]]:
    """Return plain steps by their kind, each with what is compared with it."""
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

    of_rows: dict[str, measure.Way] = {
        "guided": (rows, applied(scale=1.0)),
        "batched": (rows, applied(scale=1.0, execution="batched")),
        "idle": (rows, applied(scale=0.0)),
        "outside": (rows, applied(scale=1.0, start=0.8)),
    }
    of_calls: dict[str, measure.Way] = {
        "guider": (lambda: guider(one, t1, cond={"text": text}, uncond={"text": text})[0], lambda: _inside(guider)),
        "modular": (with_guider("modular"), nullcontext),
        "slg": (with_guider("slg"), nullcontext),
    }
    return {"rows": ((rows, nullcontext), of_rows), "calls": ((calls, nullcontext), of_calls)}


@contextmanager
def _inside(guider: stg.Guider) -> Iterator[None]:
    with guider:
        yield
