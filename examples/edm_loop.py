"""A loop in the form of EDM: the denoiser takes a noise level and returns the clean sample."""

import itertools
from typing import Any

import torch
from torch import Tensor

import stg_hooks as stg
from stg_hooks import demo


def karras(steps: int, low: float = 0.02, high: float = 80.0, rho: float = 7.0) -> Tensor:
    """Return noise levels from high to low, then 0: arXiv 2206.00364, Eq. 5."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    levels = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return torch.cat([levels, levels.new_zeros(1)]).float()


def main() -> Tensor:
    """Sample one clip of the demo's model; return its latents."""
    model = demo.load().transformer

    def denoise(x: Tensor, sigma: Tensor, **condition: Any) -> Tensor:
        """Use a flow model, which knows (1 - t) * clean + t * noise, as a denoiser of clean + sigma * noise."""
        t = sigma / (1 + sigma)
        mixed = x * (1 - t).view(-1, 1, 1, 1, 1)
        return mixed - t.view(-1, 1, 1, 1, 1) * model(mixed, 1000 * t, return_dict=False, **condition)[0]

    cond = {"encoder_hidden_states": demo.embed(demo.labels(["red 3 blue 7"]))}
    uncond = {"encoder_hidden_states": demo.embed(None)}
    sigmas = karras(demo.STEPS)
    guider = stg.Guider(denoise, [6], 0.5, model=model, guidance_scale=2.0, sigma_range=(0.1, 10.0), sigmas=sigmas)
    x = sigmas[0] * torch.randn(1, 48, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for sigma, lower in itertools.pairwise(sigmas):
            clean = guider(x, sigma.expand(len(x)), cond=cond, uncond=uncond)
            x = clean + (x - clean) * (lower / sigma)
    return x


if __name__ == "__main__":
    print(demo.to_video(main()).shape)
