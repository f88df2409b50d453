"""Guided calls do not wait for the GPU: after the first one they read no tensor's value on the host."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import stg_hooks as stg
from tests import kdiffusion, stock_pipelines, zoo
from tests.pipelines import build, run

ROOT = Path(stg.__file__).parent
OURS = (ROOT.resolve(), (ROOT / "integrations").resolve())
READERS = ("item", "tolist", "numpy", "cpu", "__int__", "__float__", "__bool__", "__index__", "__format__", "__repr__")


@contextmanager
def reads_of_ours() -> Iterator[list[str]]:
    """Note where our own code reads the value of a tensor, as `file:number: line`."""
    found: list[str] = []
    before = [(Tensor, name, getattr(Tensor, name)) for name in READERS]
    before += [(torch, name, getattr(torch, name)) for name in ("equal", "allclose")]

    def noting(original: Any) -> Any:
        def read(*args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1)
            file = Path(caller.f_code.co_filename).resolve()
            # States of random generators are on the CPU; watch.py reads what has arrived there (see test_no_ops.py).
            if any(file.is_relative_to(folder) for folder in OURS) and file.name not in ("effects.py", "watch.py"):
                line = linecache.getline(str(file), caller.f_lineno).strip()
                found.append(f"{file.name}:{caller.f_lineno}: {line}")
            return original(*args, **kwargs)

        return read

    try:
        for owner, name, original in before:
            setattr(owner, name, noting(original))
        yield found
    finally:
        for owner, name, original in before:
            setattr(owner, name, original)


def later_reads(pipe: Any, once: Any, applied: stg.apply) -> list[str]:
    """Run a pipeline of two steps or more, and return the reads of all steps but the first one."""
    with reads_of_ours() as found:

        def forget_the_first(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            if index == 0:
                found.clear()
            return {}

        once(callback_on_step_end=forget_the_first)
    assert len({row.step.index for row in applied.trace}) > 1
    return found


def test_reading_is_noticed() -> None:
    """A first call looks at the model, and at what it is given."""
    model = zoo.build("plain")
    with reads_of_ours() as found, stg.apply(model, [2], batched_cfg=True):
        model(**zoo.inputs(2))
    assert found


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("family", ["wan", "ltx", "cogvideox"])
def test_a_pipeline(family: str, rescale: float) -> None:
    """Flow matching and DDPM; the trace knows the noise levels nevertheless."""
    pipe, call, case = build(family)
    with stg.apply(pipe, case.layers, torch.tensor([0.5]), rescale=rescale) as applied:
        assert later_reads(pipe, lambda **more: run(pipe, call, **more), applied) == []
    assert all(row.step.sigma is not None for row in applied.trace)


def test_weights_that_are_tensors() -> None:
    """SVD weighs every frame differently. Only its conditions are read (is CFG on?), which it reads itself as well."""
    stock = stock_pipelines.STOCK["StableVideoDiffusionPipeline"]
    pipe = stock.build()
    with stg.apply(pipe, [stock.layer]) as applied:
        reads = later_reads(pipe, lambda **more: stock_pipelines.run(pipe, stock.call(), **more), applied)
    assert all("guard" in where for where in reads), reads


def test_a_guider_reads_the_noise_level_only_for_the_trace() -> None:
    """On the meta device, where a value cannot be read at all."""
    K = kdiffusion.load()
    denoiser = K.layers.Denoiser(kdiffusion.transformer(), sigma_data=0.5).to("meta")
    guider = stg.Guider(denoiser, ["blocks.2"], guidance_scale=torch.full((2,), 3.0, device="meta"), rescale=0.5)
    x, sigma = torch.empty(2, 3, 8, 8, device="meta"), torch.empty(2, device="meta")
    conditions = {name: {"class_cond": torch.zeros(2, dtype=torch.long, device="meta")} for name in ("cond", "uncond")}
    guider.callback({"i": 0, "sigma": sigma[0]})
    assert guider(x, sigma, **conditions).shape == x.shape
    with pytest.raises(RuntimeError, match="meta"):
        _ = guider.trace[0].step


def test_a_zero_signal_to_noise_ratio_has_a_noise_level() -> None:
    """As in CogVideoX-5B, whose first step is pure noise."""
    pipe, call, case = build("cogvideox")
    pipe.scheduler = diffusers.CogVideoXDDIMScheduler(
        rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"
    )
    with stg.apply(pipe, case.layers) as applied:
        run(pipe, call)
    levels = [row.step.sigma for row in applied.trace]
    assert levels[0] == float("inf")
    assert all(level is not None and 0 < level < 100 for level in levels[1:])
