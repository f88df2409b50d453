"""What running pipelines say of their calls where their code does not: whether latents are predicted twice."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import stg_hooks as stg
from tests.test_cfg_spellings import CALLS, HALVES, ONE, TWO, by_hand, pipeline
from tests.test_pipeline_code import Denoiser


@pytest.fixture
def arguments() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(1, 6, 8), torch.randn(1, 6, 8), torch.randn(1, 6, 8)


@torch.no_grad()
@pytest.mark.parametrize(
    "text",
    [
        HALVES + "uncond, cond = e.chunk(2); p = (1 - w) * uncond + w * cond",
        "negative_n = n; a = T(x, c); b = T(x, negative_n); p = (b * (1 - w)).add(w * a)",
    ],
)
def test_what_the_errors_tell_to_write_is_right(text: str, tmp_path: Path, arguments: Any) -> None:
    pipe, (x, c, n) = pipeline(text, tmp_path), arguments
    with stg.apply(pipe, layers=["blocks.1"], scale=0.7):
        guided = pipe(x, c, n)
    assert_close(guided, by_hand(pipe.transformer, x, c, n), rtol=1e-5, atol=1e-5)


STEPS = "timesteps = torch.arange({}); p = T(x, c)"


@torch.no_grad()
def test_samples_from_the_same_noise_are_no_cfg(tmp_path: Path, arguments: Any) -> None:
    """Two prompts, one noise: the latents of both rows are the same in the first step only."""
    x, c, n = arguments
    both = torch.cat([x, x]), torch.cat([c, n]), n
    pipe = pipeline(STEPS.format(2), tmp_path)
    with stg.apply(pipe, layers=["blocks.1"]):
        together = pipe(*both)
        assert_close(together, torch.cat([pipe(x, c, n), pipe(x, n, n)]), rtol=1e-5, atol=1e-5)
    pipe = pipeline(STEPS.format(1), tmp_path)  # so it says, and there is no way to tell
    with pytest.raises(stg.CallError, match=ONE), stg.apply(pipe, layers=["blocks.1"]):
        pipe(*both)


@torch.no_grad()
def test_runs_from_the_same_noise_are_no_cfg(tmp_path: Path, arguments: Any) -> None:
    x, c, n = arguments
    pipe = pipeline("p = T(x, c); break", tmp_path)
    pipe.scheduler = SimpleNamespace()
    with stg.apply(pipe, layers=["blocks.1"]) as applied:
        for prompt in (c, n):
            pipe.scheduler.timesteps = torch.arange(1)
            pipe(x, prompt, n)
        assert applied.stats.weak_passes == 2
        with pytest.raises(stg.CallError, match=TWO):
            pipe(x, c, n)


class OnLists(nn.Module):
    """Takes and returns lists of samples."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = Denoiser().blocks

    def forward(self, x: list[Tensor], emb: list[Tensor]) -> list[Tensor]:
        return list(Denoiser.forward(self, torch.cat(x), torch.cat(emb)).split(1))  # type: ignore[arg-type]


@torch.no_grad()
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_lists_of_the_same_samples(device: str, tmp_path: Path, arguments: Any) -> None:
    x, c, n = (one.to(device) for one in arguments)
    pipe = pipeline("e = T([x, x], [n, c]); p = e[0] + w * (e[1] - e[0])", tmp_path)
    pipe.transformer = OnLists().to(device)
    told = pytest.raises(stg.CallError, match=ONE) if device == "cpu" else nullcontext()
    with told, stg.apply(pipe, layers=["blocks.1"]):
        pipe(x, c, n)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_is_compiled_is_looked_at_as_well(mode: Any, tmp_path: Path, arguments: Any) -> None:
    pipe = pipeline(CALLS + "p = sum([a, b])", tmp_path)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with mode(), pytest.raises(stg.CallError, match=TWO), stg.apply(pipe, layers=["blocks.1"]):
        pipe(*arguments)
