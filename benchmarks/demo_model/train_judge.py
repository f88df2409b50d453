"""Train the demo's judge on real clips, lightly spoiled so that it copes with generated ones."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from benchmarks.demo_model import digits
from stg_hooks.demo import clips, judge

WEIGHTS = Path(clips.__file__).parent / "weights" / "judge.safetensors"


def spoil(video: Tensor, generator: torch.Generator) -> Tensor:
    """Add noise to every clip and blur half of them.

    Args:
        video: (B, 3, F, H, W).
        generator: source of randomness.

    Returns:
        (B, 3, F, H, W).
    """
    blurred = F.avg_pool3d(video, (1, 3, 3), stride=1, padding=(0, 1, 1), count_include_pad=False)
    amount = torch.rand(video.shape[0], 1, 1, 1, 1, generator=generator) - 0.5
    video = video.lerp(blurred, amount.clamp(min=0))
    level = 0.1 * torch.rand(video.shape[0], 1, 1, 1, 1, generator=generator)
    return (video + level * torch.randn(video.shape, generator=generator)).clamp(-1, 1)


def accuracies(grader: judge.Judge, video: Tensor, labels: Tensor) -> dict[str, float]:
    """Grade clips."""
    hits = judge.grade(judge.look(video, grader)[0], labels)
    return {name: round(hit.double().mean().item(), 4) for name, hit in hits.items()}


def main() -> None:
    """Train, test on fresh clips of images held out, and write the shipped weights in float16."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed + 1)
    grader = judge.Judge()
    optimizer = torch.optim.AdamW(grader.parameters(), lr=3e-3, weight_decay=0.01, fused=True)
    started = time.monotonic()
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / options.steps))
        video, labels = digits.draw(options.batch, generator)
        logits = grader.read(grader.pool(spoil(video, generator)))  # (B, F, 2, 10)
        targets = labels[:, None].expand(logits.shape[:3])
        loss = F.cross_entropy(logits.flatten(0, 2), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1} loss {loss.item():.4f} seconds {time.monotonic() - started:.0f}", flush=True)
    rounded = {k: v.detach().half() for k, v in grader.state_dict().items() if v.is_floating_point()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(rounded, options.out)
    options.out.chmod(0o644)
    grader.load_state_dict({name: value.float() for name, value in rounded.items()}, strict=False)
    grader.eval()
    for name, held_out in (("trained on", False), ("held out", True)):
        video, labels = digits.draw(2000, torch.Generator().manual_seed(options.seed + 2), held_out)
        print(f"images {name}: {accuracies(grader, video, labels)}")
        print(f"images {name}, spoiled: {accuracies(grader, spoil(video, generator), labels)}")


if __name__ == "__main__":
    main()
