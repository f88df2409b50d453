"""A classifier that reads the digits in every frame, trained on real clips: it grades what the demo generates."""

from __future__ import annotations

from importlib import resources

import torch
from torch import Tensor, nn

from stg_hooks.demo import clips

WIDTH = 48
MEASURES = {
    "right": "both digits right in every frame",
    "kept": "both digits the same in every frame",
}
"""Fractions of clips, and what they mean."""


class Judge(nn.Module):
    """Read the red and the blue digit of single frames; the pooled features also serve the Frechet distance."""

    def __init__(self) -> None:
        super().__init__()

        def stage(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
            convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
            return [convolution, nn.BatchNorm2d(outputs, momentum=0.05), nn.SiLU()]

        self.body = nn.Sequential(
            *stage(3, 24, 1), *stage(24, WIDTH, 2), *stage(WIDTH, WIDTH, 1), *stage(WIDTH, WIDTH, 2)
        )
        self.heads = nn.ModuleList(nn.Linear(WIDTH, clips.DIGITS) for _ in clips.COLOURS)

    def pool(self, video: Tensor) -> Tensor:
        """Take the strongest response of each channel in each frame.

        Args:
            video: clips in [-1, 1], (B, 3, F, H, W).

        Returns:
            (B, F, 48).
        """
        frames = video.transpose(1, 2)
        seen: Tensor = self.body(frames.flatten(0, 1)).amax(dim=(2, 3))
        return seen.view(*frames.shape[:2], WIDTH)

    def read(self, pooled: Tensor) -> Tensor:
        """Classify what `pool` gave.

        Args:
            pooled: (B, F, 48).

        Returns:
            Logits, (B, F, 2, 10): the red digit, the blue digit.
        """
        return torch.stack([head(pooled) for head in self.heads], dim=2)


def load() -> Judge:
    """Load the shipped weights.

    Returns:
        The judge, in evaluation mode.
    """
    from safetensors.torch import load as parse

    data = (resources.files("stg_hooks.demo") / "weights" / "judge.safetensors").read_bytes()
    judge = Judge()
    judge.load_state_dict({name: value.float() for name, value in parse(data).items()}, strict=False)
    return judge.eval().requires_grad_(False)


@torch.no_grad()
def look(video: Tensor, judge: Judge) -> tuple[Tensor, Tensor]:
    """Let the judge look at clips.

    Args:
        video: clips in [-1, 1], (B, 3, F, H, W).
        judge: the classifier.

    Returns:
        The digits that it reads, (B, F, 2), and features, (B, 96): mean and standard deviation over frames.
    """
    pooled = torch.cat([judge.pool(part) for part in video.split(250)])
    return judge.read(pooled).argmax(dim=3), torch.cat([pooled.mean(1), pooled.std(1)], dim=1)


def grade(seen: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Compare what the judge reads with what was asked for.

    Args:
        seen: digits by frame, (B, F, 2).
        labels: the digits asked for, (B, 2).

    Returns:
        By the names in MEASURES, whether each clip has it, (B,), bool.
    """
    return {
        "right": (seen == labels[:, None]).flatten(1).all(dim=1),
        "kept": (seen == seen[:, :1]).flatten(1).all(dim=1),
    }


def grain(video: Tensor) -> Tensor:
    """Measure the noise of the background; faint ink makes it a little more than 0 in real clips.

    Args:
        video: clips in [-1, 1], (B, 3, F, H, W).

    Returns:
        Root mean square distance of dark pixels to the background, of 255, (B,).
    """
    away = (video - clips.BACKGROUND) * 127.5
    dark = (video < clips.BACKGROUND + 0.12).all(dim=1, keepdim=True).expand_as(video)
    return ((away.square() * dark).sum(dim=(1, 2, 3, 4)) / dark.sum(dim=(1, 2, 3, 4)).clamp(min=1)).sqrt()


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Measure how far two sets of features are apart, each seen as a Gaussian.

    Args:
        features_a: (N, D).
        features_b: (M, D).

    Returns:
        Squared Frechet distance. It is biased upwards for small N and M: compare with a floor of the same size.
    """
    a, b = features_a.double(), features_b.double()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    # trace sqrt(A B) = trace sqrt(A^1/2 B A^1/2), which is symmetric.
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()
    return float(distance)
