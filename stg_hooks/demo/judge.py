"""A classifier that tells what a clip shows, trained on real clips: it grades what the demo generates."""

from __future__ import annotations

from importlib import resources

import torch
from torch import Tensor, nn

from stg_hooks.demo import clips

FEATURES = 64
NAMES = ("shape", "colour", "motion")


class Judge(nn.Module):
    """Classify clips by shape, colour and motion; the pooled features also serve the Frechet distance."""

    def __init__(self) -> None:
        super().__init__()

        def stage(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
            convolution = nn.Conv3d(inputs, outputs, 3, stride=(1, stride, stride), padding=1)
            return [convolution, nn.BatchNorm3d(outputs, momentum=0.05), nn.SiLU()]

        self.body = nn.Sequential(*stage(3, 24, 2), *stage(24, 48, 2), *stage(48, FEATURES, 1))
        self.heads = nn.ModuleList(
            nn.Linear(FEATURES, len(words)) for words in (clips.SHAPES, clips.COLOURS, clips.MOTIONS)
        )

    def features(self, video: Tensor) -> Tensor:
        """Pool what the convolutions see.

        Args:
            video: clips in [-1, 1], (B, 3, F, H, W).

        Returns:
            (B, 64).
        """
        # Mostly background: the mean of the strongest eighth of the positions says more than the mean of all.
        seen: Tensor = self.body(video).flatten(2)
        return seen.topk(seen.shape[2] // 8, dim=2).values.mean(dim=2)

    def forward(self, video: Tensor) -> tuple[Tensor, ...]:
        """Classify.

        Args:
            video: clips in [-1, 1], (B, 3, F, H, W).

        Returns:
            Logits for shape (B, 3), colour (B, 4) and motion (B, 4).
        """
        features = self.features(video)
        return tuple(head(features) for head in self.heads)


def load() -> Judge:
    """Load the shipped weights.

    Returns:
        The judge, in evaluation mode.
    """
    from safetensors.torch import load as parse

    data = (resources.files("stg_hooks.demo") / "weights" / "judge.safetensors").read_bytes()
    judge = Judge()
    judge.load_state_dict({name: value.float() for name, value in parse(data).items()})
    return judge.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(video: Tensor, labels: Tensor, judge: Judge | None = None) -> dict[str, float]:
    """Measure how often clips show what was asked for.

    Args:
        video: clips in [-1, 1], (B, 3, F, H, W).
        labels: indices into SHAPES, COLOURS and MOTIONS, (B, 3).
        judge: the classifier; by default the shipped one.

    Returns:
        Fractions named shape, colour, motion and all.
    """
    judge = judge or load()
    seen = [torch.stack([logits.argmax(dim=1) for logits in judge(part)], dim=1) for part in _parts(video)]
    hits = torch.cat(seen) == labels
    fractions = {name: hits[:, index].double().mean().item() for index, name in enumerate(NAMES)}
    return fractions | {"all": hits.all(dim=1).double().mean().item()}


@torch.no_grad()
def features(video: Tensor, judge: Judge | None = None) -> Tensor:
    """Describe clips by the judge's features.

    Args:
        video: clips in [-1, 1], (B, 3, F, H, W).
        judge: the classifier; by default the shipped one.

    Returns:
        (B, 64).
    """
    judge = judge or load()
    return torch.cat([judge.features(part) for part in _parts(video)])


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


def _parts(video: Tensor) -> list[Tensor]:
    """Cut a set of clips into pieces that fit into memory."""
    return [video[start : start + 250] for start in range(0, len(video), 250)]
