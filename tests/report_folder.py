"""Folders as `profile` and `sweep` write them, with made-up numbers and clips of drawn shapes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from stg_hooks.study import media, results

PROMPTS = ("red 3 blue 7", "red 8 blue 2")
LEVELS = (0.95, 0.8, 0.6, 0.4, 0.2)


def write_profile(folder: Path, layers: int = 8, modes: Sequence[str] = ("residual", "attention")) -> None:
    """Write profile.json: smooth curves over the layers, with one value missing."""
    rows = []
    for number, mode in enumerate(modes):
        for layer in range(layers):
            for step, level in enumerate(LEVELS):
                depth = layer / max(1, layers - 1)
                bump = math.exp(-(((depth - 0.3 - 0.4 * level) / 0.3) ** 2))
                rows.append(
                    results.ProfileRow(
                        layer,
                        mode,
                        level,
                        step,
                        norm=0.02 + 0.3 * bump / (1 + number),
                        cosine=None if (layer, step) == (0, 0) else 0.8 * bump - 0.3 * depth,
                        high_frequency=0.1 + 0.6 * depth * (1 - level),
                        temporal=0.2 + 0.5 * bump * depth,
                        std_ratio=1 + 0.1 * bump - 0.05 * level,
                        cost=0.5 - 0.45 * depth,
                    )
                )
    table = tuple({"index": index, "name": f"blocks.{index}", "type": "Block"} for index in range(layers))
    results.Profile("WanTransformer3DModel", table, tuple(modes), LEVELS, PROMPTS, 2.0, tuple(rows)).save(folder)


def write_sweep(
    folder: Path,
    layers: Sequence[Sequence[int]] = ((2,), (5,), (2, 5)),
    modes: Sequence[str] = ("residual", "attention"),
    scales: Sequence[float] = (0.5, 1.0, 2.0),
    prompts: Sequence[str] = PROMPTS,
    seeds: Sequence[int] = (7, 8),
    failed: Sequence[str] = (),
    own: Sequence[str] = (),
) -> None:
    """Write sweep.json and its cells; the clips grow brighter with the scale."""
    settings = {
        "kind": "sweep",
        "version": results.VERSION,
        "model": "WanTransformer3DModel",
        "pipeline": "WanPipeline",
        "layers": layers,
        "modes": modes,
        "scales": scales,
        "prompts": prompts,
        "seeds": seeds,
        "guidance_scale": 2.0,
        "fps": 8,
        "metrics": own,
        "settings": {"num_inference_steps": 12},
    }
    results.write_json(folder / results.SWEEP_FILE, settings)
    for place in results.grid(settings):
        name = results.cell_id(*place)
        home = folder / results.CELLS / name
        home.mkdir(parents=True)
        error = "OutOfMemoryError: <none> left" if name in failed else None
        pairs = [(p, s) for p in range(len(prompts)) for s in range(len(seeds))] if error is None else []
        cell = _cell(name, place, error, [_sample(home, place, *pair) for pair in pairs])
        results.write_json(home / results.CELL_FILE, dataclasses.asdict(cell))


def _sample(home: Path, place: results.Place, prompt: int, seed: int) -> results.Sample:
    layers, mode, scale = place
    video = _video(prompt, seed, layers, scale)
    strip, frames, width, height = media.write_strip(home, f"p{prompt}-s{seed}", video.numpy())
    metrics = {
        "sharpness": float(video.float().std() / 255),
        "flicker": 0.01 + 0.002 * seed + 0.01 * scale,
        "difference": scale * (0.1 + 0.01 * sum(layers)) * (0.6 if mode == "attention" else 1),
    }
    return results.Sample(prompt, seed, f"p{prompt}-s{seed}.webp", strip, frames, width, height, metrics)


def _cell(name: str, place: results.Place, error: str | None, samples: Sequence[results.Sample]) -> results.Cell:
    layers, mode, scale = place
    names = samples[0].metrics if samples else ()
    code = "video = pipe(prompt=prompt, generator=generator).frames[0]"
    if layers:
        setting = "" if mode == "residual" else f', mode="{mode}"'
        code = f"with stg.apply(pipe, layers={list(layers)}, scale={scale}{setting}):\n    {code}"
    return results.Cell(
        id=name,
        layers=layers,
        mode=mode,
        scale=scale,
        status="done" if error is None else "failed",
        error=error,
        seconds=4.0 + 0.5 * len(layers),
        cost=0.6 / (1 + min(layers)) * (0.9 if mode == "attention" else 1) if layers else 0.0,
        metrics={key: results.mean(sample.metrics[key] for sample in samples) for key in names},
        code=code,
        samples=tuple(samples),
    )


def _video(prompt: int, seed: int, layers: Sequence[int], scale: float) -> torch.Tensor:
    """Draw a moving square over grain, the brighter the larger the scale, (F, H, W, 3), uint8."""
    grain = torch.Generator().manual_seed(100 * prompt + seed)
    video = torch.randint(12, 28, (6, 24, 24, 3), generator=grain)
    colour = torch.tensor([[200, 40, 40], [60, 60, 220]])[prompt % 2] * (0.6 + 0.2 * scale) / 1.4
    top = (5 * sum(layers) + seed) % 16
    for frame in range(len(video)):
        video[frame, top : top + 8, 2 * frame : 2 * frame + 8] = colour.long()
    return video.clamp(max=255).to(torch.uint8)
