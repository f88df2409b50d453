"""Train the demo's generator: a small WanTransformer3DModel with rectified flow, on clips drawn on the fly."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from benchmarks.demo_model import digits
from benchmarks.demo_model.muon import Muon
from stg_hooks.demo import clips

NULL = len(clips.COLOURS) * clips.DIGITS  # the first of two tokens for "no condition"
TEXT_DIM = 64
CONFIG: dict[str, Any] = {
    "patch_size": (1, 1, 1),
    "num_attention_heads": 4,
    "attention_head_dim": 24,
    "in_channels": 48,
    "out_channels": 48,
    "text_dim": TEXT_DIM,
    "freq_dim": 64,
    "ffn_dim": 192,
    "num_layers": 8,
    "cross_attn_norm": True,
    "rope_max_seq_len": 32,
}


class Generator(nn.Module):
    """Hold the transformer and the token table that replaces a text encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer: Any = WanTransformer3DModel(**CONFIG)
        nn.init.zeros_(self.transformer.proj_out.weight)
        nn.init.zeros_(self.transformer.proj_out.bias)
        self.tokens = nn.Parameter(torch.randn(NULL + 2, TEXT_DIM))

    def forward(self, noisy: Tensor, sigma: Tensor, tokens: Tensor) -> Tensor:
        """Predict the velocity, with exactly the arguments that WanPipeline passes.

        Args:
            noisy: (B, 48, 6, 4, 4).
            sigma: noise levels, (B,).
            tokens: indices into the table, (B, 2).

        Returns:
            noise - clean, (B, 48, 6, 4, 4).
        """
        prediction: Tensor = self.transformer(
            hidden_states=noisy, timestep=sigma * 1000, encoder_hidden_states=self.tokens[tokens], return_dict=False
        )[0]
        return prediction


def batch(size: int, shift: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw clips, noise, noise levels and tokens.

    Args:
        size: batch size B.
        shift: where noise levels lie: sigma / (1 - sigma) is log-normal around it.
        generator: source of randomness.

    Returns:
        clean (B, 48, 6, 4, 4), noise of the same shape, sigma (B,), tokens (B, 2).
    """
    video, label = digits.draw(size, generator)
    clean = clips.fold(video)
    noise = torch.randn(clean.shape, generator=generator)
    # Stratified over the batch: less gradient noise than independent draws.
    quantile = (torch.arange(size) + torch.rand(size, generator=generator)) / size
    ratio = shift * torch.exp(1.2 * math.sqrt(2) * torch.erfinv((2 * quantile - 1).clamp(-0.9999, 0.9999)))
    sigma = ratio / (1 + ratio)
    tokens = label + torch.tensor([0, clips.DIGITS])
    dropped = torch.rand(size, generator=generator) < 0.12
    tokens[dropped] = torch.arange(NULL, NULL + 2)
    return clean, noise, sigma, tokens


def optimizers(model: Generator, rate: float) -> list[torch.optim.Optimizer]:
    """Give the blocks' matrices to Muon and everything else to AdamW."""
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    for name, parameter in model.named_parameters():
        hidden = ".blocks." in name and parameter.ndim == 2
        (matrices if hidden else rest).append(parameter)
    return [
        Muon(matrices, lr=rate, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


class LayerDrop:
    """Leave out whole blocks in some of the training steps (LayerDrop, arXiv 1909.11556).

    It regularises, and it makes the model with blocks skipped a worse model of the same clips, not another one.
    """

    def __init__(self, blocks: Any, share: float, rate: float = 0.3) -> None:
        self.count, self.share, self.rate = len(blocks), share, rate
        self.dropped: set[int] = set()
        for index, block in enumerate(blocks):
            block.register_forward_hook(lambda _, args, output, i=index: args[0] if i in self.dropped else output)

    def draw(self, generator: torch.Generator) -> None:
        """Choose the blocks that the next step does without, if any."""
        chance = torch.rand(1 + self.count, generator=generator)
        self.dropped = {i for i in range(self.count) if chance[0] < self.share and chance[1 + i] < self.rate}


class Trainer:
    """Hold what a training needs to go on where it was interrupted."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.model = Generator()
        self.drop = LayerDrop(self.model.transformer.blocks, options.layer_drop)
        self.parameters = list(self.model.parameters())
        self.averages = [p.detach().clone() for p in self.parameters]
        self.optimizers = optimizers(self.model, options.rate)
        self.path: Path = options.out / "checkpoint.pt"
        self.step, self.seconds, self.loss = 0, 0.0, math.nan
        if options.resume and self.path.exists():
            state = torch.load(self.path, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.averages = [state["ema"][name] for name, _ in self.model.named_parameters()]
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step, self.seconds = state["step"], state["seconds"]
        self.started = time.monotonic() - self.seconds

    def update(self) -> None:
        """Make one step."""
        generator = torch.Generator().manual_seed(self.options.seed + 1_000_000 * self.step)
        clean, noise, sigma, tokens = batch(self.options.batch, self.options.shift, generator)
        self.drop.draw(generator)
        level = sigma[:, None, None, None, None]
        prediction = self.model((1 - level) * clean + level * noise, sigma, tokens)
        loss = (prediction - (noise - clean)).square().mean()
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True, materialize_grads=True)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        rate = self.options.rate * min(1.0, (self.step + 1) / 100)
        rate *= 0.5 * (1 + math.cos(math.pi * self.step / self.options.steps))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        decay = min(0.997, (self.step + 1) / (self.step + 10))
        torch._foreach_lerp_(self.averages, [p.detach() for p in self.parameters], 1 - decay)
        self.step += 1
        self.loss = loss.item() if math.isnan(self.loss) else self.loss + 0.02 * (loss.item() - self.loss)
        if self.step % 25 == 0:
            elapsed = time.monotonic() - self.started
            print(f"step {self.step} loss {self.loss:.4f} rate {rate:.5f} seconds {elapsed:.0f}", flush=True)
        if self.step % 100 == 0:
            self.save()

    def save(self) -> None:
        """Write a checkpoint so that an interruption never leaves a torn file."""
        names = [name for name, _ in self.model.named_parameters()]
        state = {
            "model": self.model.state_dict(),
            "ema": dict(zip(names, self.averages, strict=True)),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": time.monotonic() - self.started,
        }
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        partial.rename(self.path)


def main() -> None:
    """Train, log and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("/tmp/demo_model"))
    parser.add_argument("--steps", type=int, default=7750, help="planned steps; the learning rate falls to zero there")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--shift", type=float, default=5.0)
    parser.add_argument("--layer-drop", type=float, default=0.5, help="share of steps in which blocks are left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    trainer = Trainer(options)
    print(f"{sum(p.numel() for p in trainer.parameters):,} parameters", flush=True)
    while trainer.step < options.steps:
        trainer.update()
    trainer.save()


if __name__ == "__main__":
    main()
