"""A guidance-distilled model: the CFG weight is an input, and there is no prediction without the prompt."""

import itertools

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

import stg_hooks as stg


def main() -> Tensor:
    """Sample one image; return its latents as tokens, (1, 16, 16)."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(  # tiny and random: load yours here
        in_channels=16,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    condition = {
        "encoder_hidden_states": torch.randn(1, 5, 32),
        "pooled_projections": torch.randn(1, 8),
        "txt_ids": torch.zeros(5, 3),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
    }
    guider = stg.Guider(model, layers=[4], scale=0.7, rescale=0.7)
    x, levels = torch.randn(1, 16, 16), torch.linspace(1, 0, 9)
    with torch.no_grad():
        for t, lower in itertools.pairwise(levels):
            velocity = guider(x, timestep=t.expand(1), guidance=torch.tensor([3.5]), cond=condition).sample
            x = x + (lower - t) * velocity
    return x


if __name__ == "__main__":
    print(main().shape)
