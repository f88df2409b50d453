"""A modular pipeline of diffusers, with skip guidance as its guider."""

import diffusers
import torch
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep
from torch import Tensor

import stg_hooks as stg


def main() -> Tensor:
    """Sample one video; return its latents, (1, 16, 3, 4, 4)."""
    torch.manual_seed(0)
    transformer = diffusers.WanTransformer3DModel(  # tiny and random: pipe.load_components() loads yours
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=8,
        freq_dim=8,
        ffn_dim=16,
        num_layers=6,
        rope_max_seq_len=32,
    ).eval()
    pipe = WanCoreDenoiseStep().init_pipeline()  # the blocks between the text encoder and the decoder
    pipe.update_components(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        guider=stg.modular.SkipGuidance(layers=[4], scale=1.0, guidance_scale=3.0, stop=0.8),
    )
    latents: Tensor = pipe(
        prompt_embeds=torch.randn(1, 6, 8),
        negative_prompt_embeds=torch.randn(1, 6, 8),
        height=32,
        width=32,
        num_frames=9,
        num_inference_steps=10,
        generator=torch.Generator().manual_seed(0),
        output="latents",
    )
    print(pipe.guider.stats)  # 10 steps, 8 of them guided, at one of the six blocks each
    return latents


if __name__ == "__main__":
    print(main().shape)
