"""What `every=n` costs in exactness: the demo's model, guided with differences that are used again for n - 1 steps.

    python -m benchmarks.every                        48 clips of 12 steps and of 24, one CPU thread, ten minutes
    python -m benchmarks.every --count 2 --steps 12   does it run?

Clips are compared with exact guidance (n = 1) from the same noise. The error is told as a part of what guidance changes
at all, the distance between exact guidance and none: 1 means as far from the exact result as no guidance. Settings are
those that the demo's own evaluation chose. Sampling is deterministic, so that nothing else differs.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import stg_hooks as stg
from benchmarks.measure import machine
from stg_hooks import demo
from stg_hooks.demo.__main__ import conditions, default_settings, evaluation

RESULTS = Path(__file__).resolve().parent / "results" / "every.json"
SETTINGS, BATCH = default_settings(evaluation()), 8


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=48, help="clips; there are 48 conditions")
    parser.add_argument("--steps", type=int, nargs="+", default=[12, 24])
    parser.add_argument("--every", type=int, nargs="+", default=[2, 3, 4, 6])
    parser.add_argument("--scale", type=float, nargs="+", default=[SETTINGS.scale])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = [row for steps in options.steps for row in rows_for(options, steps)]
    settings = {
        "layers": list(SETTINGS.layers),
        "mode": SETTINGS.mode,
        "guidance_scale": SETTINGS.guidance_scale,
        "clips": options.count,
    }
    results = {"machine": machine(torch.device("cpu")), "settings": settings, "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(markdown(results))
    print(markdown(results))
    return results


def rows_for(options: argparse.Namespace, steps: int) -> list[dict[str, Any]]:
    pipe, prompts = demo.load(), conditions(options.count)
    plain, _ = sample(pipe, prompts, steps, 0.0, 1)
    rows = []
    for scale in options.scale:
        exact, passes = sample(pipe, prompts, steps, scale, 1)
        rows.append(entry(steps, scale, 1, passes))
        effect = distance(exact, plain)
        for every in options.every:
            latents, passes = sample(pipe, prompts, steps, scale, every)
            error = (distance(latents, exact) / effect).tolist()
            low, middle, high = statistics.quantiles(error, n=4) if len(error) > 1 else error * 3
            rows.append(entry(steps, scale, every, passes) | {"error": [low, middle, high]})
    return rows


def sample(pipe: Any, prompts: Sequence[str], steps: int, scale: float, every: int) -> tuple[Tensor, int]:
    """Return latents, (B, 48, 6, 4, 4), and how many weak passes a clip took."""
    parts, passes = [], 0
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(batch))]
        call = demo.inputs(batch) | {"num_inference_steps": steps, "guidance_scale": SETTINGS.guidance_scale}
        with stg.apply(pipe, list(SETTINGS.layers), scale, mode=SETTINGS.mode, every=every) as applied:
            parts.append(pipe(**call, generator=generators).frames)
        passes = applied.stats.weak_passes
    return torch.cat(parts), passes


def distance(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).flatten(1).norm(dim=1)


def entry(steps: int, scale: float, every: int, passes: int) -> dict[str, Any]:
    return {"steps": steps, "scale": scale, "every": every, "weak_passes": passes}


def markdown(results: dict[str, Any]) -> str:
    settings = results["settings"]
    what = (
        f"The demo's model, layers {settings['layers']}, guidance_scale {settings['guidance_scale']}, "
        f"{settings['clips']} clips. Error: distance of the latents from those of exact guidance, as a part of the "
        "distance between exact guidance and none; median and quartiles over the clips."
    )
    head = "| steps | scale | every | weak passes | error | quartiles |"
    lines = ["# What `every=n` costs in exactness", "", what, "", head, "| --- " * 6 + "|"]
    for row in results["rows"]:
        error = row.get("error")
        name = "1 (exact)" if row["every"] == 1 else str(row["every"])
        numbers = [f"{error[1]:.2f}", f"{error[0]:.2f} - {error[2]:.2f}"] if error else ["", ""]
        cells = [str(row["steps"]), str(row["scale"]), name, str(row["weak_passes"]), *numbers]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
