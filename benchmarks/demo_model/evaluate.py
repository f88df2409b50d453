"""Sample clips with the demo's pipeline and grade them: accuracies by the judge, Frechet distance to real clips."""

from __future__ import annotations

import argparse
import json
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stg_hooks import demo
from stg_hooks.demo import clips, judge

REFERENCE = 2000


def sample(pipe: Any, labels: Tensor, guidance: float, steps: int, batch: int, seed: int) -> Tensor:
    """Generate one clip per label.

    Args:
        pipe: the demo's pipeline.
        labels: (N, 3).
        guidance: guidance scale of the pipeline; 1 is off.
        steps: sampling steps.
        batch: clips per call.
        seed: seed of the noise; clip i gets the same noise whatever the settings.

    Returns:
        Clips, (N, 3, 6, 24, 24).
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(labels), 48, 6, 6, 6, generator=generator)
    videos = []
    for start in range(0, len(labels), batch):
        part = slice(start, start + batch)
        call = demo.inputs(labels[part]) | {"num_inference_steps": steps}
        videos.append(demo.to_clips(pipe(**call, latents=noise[part], guidance_scale=guidance).frames))
    return torch.cat(videos)


def context(pipe: Any, layers: list[str], scale: float) -> AbstractContextManager[Any]:
    """Apply spatiotemporal skip guidance if a scale is given."""
    if not scale:
        return nullcontext()
    import stg_hooks as stg

    chosen: list[Any] = [int(layer) if layer.isdecimal() else layer for layer in layers]
    applied: AbstractContextManager[Any] = stg.apply(pipe, layers=chosen, scale=scale)
    return applied


def sheet(video: Tensor, path: Path) -> None:
    """Write a contact sheet, one clip per row, two columns of clips.

    Args:
        video: (N, 3, F, H, W) with even N.
        path: where the PNG goes.
    """
    from PIL import Image

    pixels = ((video.permute(0, 3, 2, 4, 1) + 1) * 127.5).round().to(torch.uint8)  # N, H, F, W, 3
    count, height, frames, width, _ = pixels.shape
    rows = pixels.reshape(count // 2, 2, height, frames * width, 3).permute(0, 2, 1, 3, 4)
    image = Image.fromarray(rows.reshape(count // 2 * height, 2 * frames * width, 3).numpy())
    image.resize((image.width * 2, image.height * 2), Image.Resampling.NEAREST).save(path)


def main() -> None:
    """Grade every guidance scale asked for and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0, 3.0])
    parser.add_argument("--stg", type=float, default=0.0, help="scale of the skip guidance; 0 is off")
    parser.add_argument("--layers", nargs="+", default=["4"], help="layers that the skip guidance bypasses")
    parser.add_argument("--steps", type=int, default=demo.STEPS)
    parser.add_argument("--shift", type=float, help="timestep shift, if not the shipped one")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sheet", type=Path, help="also write a contact sheet of the first 32 clips here")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe, grader = demo.load(), judge.load()
    if options.shift is not None:
        pipe.scheduler.set_shift(options.shift)
    generator = torch.Generator().manual_seed(1_000_003)  # not a seed that training uses
    reference = judge.features(clips.draw(REFERENCE, generator)[0], grader)
    video, labels = clips.draw(options.count, generator)
    floor = judge.frechet_distance(judge.features(video, grader), reference)
    results = []
    for guidance in options.guidance:
        started = time.perf_counter()
        with context(pipe, options.layers, options.stg):
            video = sample(pipe, labels, guidance, options.steps, options.batch, options.seed)
        result: dict[str, Any] = {"guidance_scale": guidance, "stg_scale": options.stg}
        result |= judge.accuracy(video, labels, grader)
        result["frechet_distance"] = judge.frechet_distance(judge.features(video, grader), reference)
        result["seconds"] = time.perf_counter() - started
        results.append({key: round(value, 4) for key, value in result.items()})
        if options.sheet:
            sheet(video[:32], options.sheet.with_stem(f"{options.sheet.stem}_{guidance:g}"))
    report = {
        "count": options.count,
        "steps": options.steps,
        "shift": options.shift or pipe.scheduler.config.shift,
        "frechet_floor": round(floor, 4),
        "results": results,
    }
    text = json.dumps(report, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
