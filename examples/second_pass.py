"""Two passes: small latents first, then enlarged ones, noised a little and denoised with other settings."""

import torch
from torch import Tensor

import stg_hooks as stg
from stg_hooks import demo

COND = {"encoder_hidden_states": demo.embed(demo.labels(["red 3 blue 7"]))}
UNCOND = {"encoder_hidden_states": demo.embed(None)}


def denoise(guider: stg.Guider, x: Tensor, levels: list[float]) -> Tensor:
    """Follow the flow from the first level to 0."""
    for i, level in enumerate(levels):
        guider.step = stg.Step(i, len(levels), level, "flow")
        lower = levels[i + 1] if i + 1 < len(levels) else 0.0
        timestep = torch.full((len(x),), 1000 * level)
        x = x + (lower - level) * guider(hidden_states=x, timestep=timestep, cond=COND, uncond=UNCOND).sample
    return x


def main() -> tuple[Tensor, Tensor]:
    """Sample one clip of the demo's model; return its latents, small and enlarged."""
    model = demo.load().transformer
    torch.manual_seed(0)
    first = stg.Guider(model, layers=[6], scale=0.5, guidance_scale=2.0)
    second = stg.Guider(model, layers=[5, 6], scale=0.3, guidance_scale=1.5, rescale=0.5, stop=0.5)
    with torch.no_grad():
        small = denoise(first, torch.randn(1, 48, 6, 4, 4), [1.0, 0.98, 0.95, 0.9, 0.85, 0.75, 0.6, 0.4])
        large = torch.nn.functional.interpolate(small, scale_factor=(1, 2, 2))
        large = torch.lerp(large, torch.randn_like(large), 0.6)
        return small, denoise(second, large, [0.6, 0.45, 0.3, 0.15])


if __name__ == "__main__":
    print([tuple(latents.shape) for latents in main()])
