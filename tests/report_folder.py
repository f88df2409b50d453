"""Folders as `profile` and `sweep` write them, with made-up numbers and clips of drawn shapes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from stg_hooks.demo import clips

PROMPTS = ("red circle left", "blue square up")


def write_profile(folder: Path, layers: int = 8, modes: Sequence[str] = ("residual", "attention")) -> None:
    """Write profile.json: smooth curves over the layers, with one value missing."""
    levels = (0.95, 0.8, 0.6, 0.4, 0.2)
    rows: list[dict[str, Any]] = []
    for number, mode in enumerate(modes):
        for layer in range(layers):
            for step, level in enumerate(levels):
                depth = layer / max(1, layers - 1)
                bump = math.exp(-(((depth - 0.3 - 0.4 * level) / 0.3) ** 2))
                rows.append(
                    {
                        "layer": layer,
                        "mode": mode,
                        "noise_level": level,
                        "step": step,
                        "norm": 0.02 + 0.3 * bump / (1 + number),
                        "cosine": None if (layer, step) == (0, 0) else 0.8 * bump - 0.3 * depth,
                        "high_frequency": 0.1 + 0.6 * depth * (1 - level),
                        "temporal": 0.2 + 0.5 * bump * depth,
                        "std_ratio": 1 + 0.1 * bump - 0.05 * level,
                        "cost": 0.5 - 0.45 * depth,
                    }
                )
    content = {
        "kind": "profile",
        "version": 1,
        "model": "WanTransformer3DModel",
        "layers": [
            {"index": index, "name": f"blocks.{index}", "type": "WanTransformerBlock"} for index in range(layers)
        ],
        "modes": list(modes),
        "noise_levels": list(levels),
        "prompts": list(PROMPTS),
        "guidance_scale": 2.0,
        "rows": rows,
    }
    (folder / "profile.json").write_text(json.dumps(content), encoding="utf-8")


def write_sweep(
    folder: Path,
    layers: Sequence[Sequence[int]] = ((2,), (5,), (2, 5)),
    modes: Sequence[str] = ("residual", "attention"),
    scales: Sequence[float] = (0.5, 1.0, 2.0),
    prompts: Sequence[str] = PROMPTS,
    seeds: Sequence[int] = (0, 1),
    failed: Sequence[str] = (),
    zoom: int = 1,
) -> None:
    """Write sweep.json and its cells; the clips grow brighter with the scale."""
    content = {
        "kind": "sweep",
        "version": 1,
        "model": "WanTransformer3DModel",
        "pipeline": "WanPipeline",
        "layers": [list(group) for group in layers],
        "modes": list(modes),
        "scales": list(scales),
        "prompts": list(prompts),
        "seeds": list(seeds),
        "guidance_scale": 2.0,
        "fps": 8,
        "settings": {"num_inference_steps": 12},
    }
    (folder / "sweep.json").write_text(json.dumps(content), encoding="utf-8")
    _cell(folder, content, [], "residual", 0.0, None, zoom)
    for group in layers:
        for mode in modes:
            for scale in scales:
                name = f"{mode}-L{'+'.join(map(str, group))}-s{scale}"
                _cell(folder, content, list(group), mode, scale, "out of memory" if name in failed else None, zoom)


def _cell(
    folder: Path, sweep: dict[str, Any], layers: list[int], mode: str, scale: float, error: str | None, zoom: int
) -> None:
    name = f"{mode}-L{'+'.join(map(str, layers))}-s{scale}" if layers else "baseline"
    place = folder / "cells" / name
    place.mkdir(parents=True)
    samples = []
    for prompt in range(len(sweep["prompts"])):
        for seed in range(len(sweep["seeds"])) if error is None else ():
            video = _video(prompt, seed, layers, scale, zoom)
            strip = f"p{prompt}-s{seed}.strip.webp"
            Image.fromarray(video.permute(1, 0, 2, 3).flatten(1, 2).numpy()).save(place / strip, quality=80)
            samples.append(
                {
                    "prompt": prompt,
                    "seed": seed,
                    "file": f"p{prompt}-s{seed}.mp4",
                    "strip": strip,
                    "frames": video.shape[0],
                    "width": video.shape[2],
                    "height": video.shape[1],
                    "metrics": {
                        "sharpness": float(video.float().std() / 255),
                        "flicker": 0.01 + 0.002 * seed + 0.01 * scale,
                        "difference": scale * (0.1 + 0.01 * sum(layers)) * (0.6 if mode == "attention" else 1),
                    },
                }
            )
    metrics = {
        key: sum(sample["metrics"][key] for sample in samples) / len(samples)
        for key in (samples[0]["metrics"] if samples else ())
    }
    setting = "" if mode == "residual" else f', mode="{mode}"'
    code = "video = pipe(prompt).frames[0]"
    cell = {
        "id": name,
        "layers": layers,
        "mode": mode if layers else None,
        "scale": scale,
        "status": "done" if error is None else "failed",
        "error": error,
        "seconds": 4.0 + 0.5 * len(layers),
        "cost": (0.5 - 0.05 * min(layers)) * (0.9 if mode == "attention" else 1) if layers else 0.0,
        "metrics": metrics,
        "code": f"with stg.apply(pipe, layers={layers}, scale={scale}{setting}):\n    {code}" if layers else code,
        "samples": samples,
    }
    (place / "cell.json").write_text(json.dumps(cell), encoding="utf-8")


def _video(prompt: int, seed: int, layers: Sequence[int], scale: float, zoom: int) -> torch.Tensor:
    """Draw a moving shape, the brighter the larger the scale, (F, H, W, 3), uint8."""
    source = torch.Generator().manual_seed(100 * prompt + seed)
    label = [torch.tensor([number]) for number in ((prompt + sum(layers)) % 3, prompt % 4, (prompt + seed) % 4)]
    video = clips.render(*label, source)[0].permute(1, 2, 3, 0)
    video = (0.6 + 0.2 * scale) * (video - clips.BACKGROUND) + clips.BACKGROUND
    pixels = ((video.clamp(-1, 1) + 1) * 127.5).to(torch.uint8)
    return pixels.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
