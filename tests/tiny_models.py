"""A tiny random configuration and one call of every denoiser that diffusers exports, and what a skip has to do in it.

This file is also the source of the table in docs/models.md, which `python -m tests.model_table` writes.

A class is described by its configuration, by a call of it (`b` rows, `r(*shape)` draws normal numbers), by the names of
its numbered layers in running order, and by the blocks to try: one of each kind, with what it hands through, written as
the expression over the block's own parameters that takes the place of its `return`.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Call = Callable[[int, Callable[..., Tensor]], dict[str, Any]]

X = "hidden_states"
XT = "hidden_states, encoder_hidden_states"
TX = "encoder_hidden_states, hidden_states"
TUPLE = "(hidden_states,)"


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A tiny random model, a call of it, and what is to be found in it."""

    config: Mapping[str, Any]
    call: Call
    layers: Sequence[str]
    """The numbered layers in running order; `*` stands for 0, 1, 2..."""
    skips: Mapping[str, str]
    """One block of each kind, and what it hands through."""
    named: Sequence[str] = ()
    """Blocks without a number, as `layers`."""
    attention: str = ""
    """Why the modes that replace self-attention are refused; empty where they work."""
    rows: str = ""
    """Why a call with `[uncond, cond]` rows cannot be guided, nor batched; empty where it can."""
    alone: str = ""
    """Why weak passes share no work with the cond pass; empty where they do."""
    batched: str = ""
    """Why `execution="batched"` falls back; empty where it works."""
    note: str = ""
    return_dict: bool = True
    """Whether its `forward` takes `return_dict`."""

    def build(self, name: str) -> nn.Module:
        """Build it with random weights, none of them zero: else a skip could change nothing."""
        from tests import installed

        torch.manual_seed(0)
        model: nn.Module = installed.made(name, **self.config).eval().requires_grad_(False)
        for key, parameter in model.named_parameters():
            scale = 1.0 if parameter.ndim == 1 and key.endswith("weight") else 0.0
            parameter.copy_(scale + 0.2 * torch.randn_like(parameter))
        return model

    def inputs(self, batch: int = 2, seed: int = 1) -> dict[str, Any]:
        """Make the arguments of a call, the same ones for the same seed."""
        random = torch.Generator().manual_seed(seed)
        call = self.call(batch, lambda *shape: torch.randn(*shape, generator=random))
        return {**call, **({"return_dict": False} if self.return_dict else {})}


class HandThrough(nn.Module):
    """Takes what a block takes and returns the value of an expression over it: the oracle for a bypassed block."""

    def __init__(self, block: nn.Module, returns: str) -> None:
        super().__init__()
        self.parameter_names = list(inspect.signature(type(block).forward).parameters)[1:]
        self.returns = compile(returns, "<returns>", "eval")
        self.__dict__["block"] = block  # models look at attributes of their blocks

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self.parameter_names, args, strict=False)), **kwargs}
        return eval(self.returns, {}, given)


# --- calls that several classes share ---------------------------------------------------------------------------------


def t(b: int, value: float = 500.0) -> Tensor:
    """One time per row, all different: a row in the place of another is noticed."""
    return torch.linspace(value, 0.9 * value, b) if value <= 1 else torch.linspace(value, 0.9 * value, b).round()


def image(channels: int = 4, text: int = 8, size: int = 4, **more: Any) -> Call:
    """Latents as an image, and text."""
    return lambda b, r: {
        "hidden_states": r(b, channels, size, size),
        "encoder_hidden_states": r(b, 5, text),
        "timestep": t(b),
        **{key: value(b, r) for key, value in more.items()},
    }


def video(channels: int = 4, text: int = 8, frames: int = 2, size: int = 4, **more: Any) -> Call:
    """Latents as a video, and text."""
    return lambda b, r: {
        "hidden_states": r(b, channels, frames, size, size),
        "encoder_hidden_states": r(b, 5, text),
        "timestep": t(b),
        **{key: value(b, r) for key, value in more.items()},
    }


def tokens(channels: int = 4, text: int = 8, axes: int = 3, **more: Any) -> Call:
    """Latents as a sequence with coordinates, as Flux takes them."""
    return lambda b, r: {
        "hidden_states": r(b, 7, channels),
        "encoder_hidden_states": r(b, 5, text),
        "timestep": t(b, 0.5),
        "img_ids": torch.arange(7.0 * axes).reshape(7, axes),
        "txt_ids": torch.zeros(5, axes),
        **{key: value(b, r) for key, value in more.items()},
    }


def unet(text: int = 8, channels: int = 4, size: int = 8, **more: Any) -> Call:
    """The arguments of a U-Net."""
    return lambda b, r: {
        "sample": r(b, channels, size, size),
        "timestep": 500,
        "encoder_hidden_states": r(b, 5, text),
        **{key: value(b, r) for key, value in more.items()},
    }


def wan_animate_2_cache(layers: int) -> Any:
    """Make the cache of keys that Wan-Animate-2 writes in its first pass."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    return WanAnimate2KVCache(layers)


HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 8,
    "freq_dim": 16,
    "ffn_dim": 16,
    "num_layers": 3,
    "rope_max_seq_len": 32,
}
FLUX = {
    **HEADS,
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "joint_attention_dim": 8,
    "axes_dims_rope": (2, 2, 4),
}
DUAL = ("transformer_blocks.*", "single_transformer_blocks.*")
BLOCKS, TRANSFORMER_BLOCKS, LAYERS = ("blocks.*",), ("transformer_blocks.*",), ("layers.*",)
COGVIDEOX = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 8,
    "num_layers": 3,
    "sample_width": 4,
    "sample_height": 4,
    "sample_frames": 5,
    "max_text_seq_length": 5,
}
HUNYUAN_VIDEO = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 2,
    "text_embed_dim": 8,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (2, 2, 4),
}
LTX = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "cross_attention_dim": 16,
    "num_layers": 3,
    "caption_channels": 8,
}
LTX2 = {
    **LTX,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 4,
    "audio_cross_attention_dim": 8,
}
UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
}
UNET_LAYERS = ("down_blocks.*.attentions.*", "mid_block.attentions.*", "up_blocks.*.attentions.*")
UNET_3D_LAYERS = (
    "transformer_in.transformer_blocks.*",
    *UNET_LAYERS,
    "down_blocks.*.temp_attentions.*",
    "mid_block.temp_attentions.*",
    "up_blocks.*.temp_attentions.*",
)
UNET_SKIPS = {"mid_block.attentions.0": TUPLE, "up_blocks.1.attentions.0": TUPLE}


LISTS = "Lists of samples in place of a batch."
SHAPES = "A list of shapes with an entry per row."
LINEAR = "Linear attention, without a map."
FRAMES = "Frames are folded into the batch, and their number is read from it."


# --- the classes ------------------------------------------------------------------------------------------------------

# fmt: off
MODELS: dict[str, Tiny] = {
    "AceStepTransformer1DModel": Tiny(
        {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 8, "in_channels": 8, "audio_acoustic_hidden_dim": 4,
         "sliding_window": 2},
        lambda b, r: {"hidden_states": r(b, 8, 4), "timestep": t(b, 0.5), "timestep_r": t(b, 0.5),
            "encoder_hidden_states": r(b, 5, 16), "context_latents": r(b, 8, 4)},
        LAYERS, {"layers.1": X},
    ),
    "AllegroTransformer3DModel": Tiny(
        {**HEADS, "num_layers": 3, "caption_channels": 8, "sample_height": 4, "sample_width": 4, "sample_frames": 2,
         "attention_head_dim": 12, "cross_attention_dim": 24},
        video(),
        TRANSFORMER_BLOCKS, {"transformer_blocks.1": X},
    ),
    "AnyFlowFARTransformer3DModel": Tiny(
        {**WAN, "chunk_partition": (1, 1)},
        image(hidden_states=lambda b, r: r(b, 2, 4, 4, 4), timestep=lambda b, r: t(b)[:, None].expand(b, 2),
            r_timestep=lambda b, r: t(b, 400.0)[:, None].expand(b, 2), chunk_partition=lambda b, r: [1, 1]),
        BLOCKS, {"blocks.1": X},
        attention="Block-sparse attention that only its own backend computes.",
    ),
    "AnyFlowTransformer3DModel": Tiny(
        WAN,
        image(hidden_states=lambda b, r: r(b, 2, 4, 4, 4), timestep=lambda b, r: t(b)[:, None].expand(b, 2),
            r_timestep=lambda b, r: t(b, 400.0)[:, None].expand(b, 2)),
        BLOCKS, {"blocks.1": X},
    ),
    "AuraFlowTransformer2DModel": Tiny(
        {**HEADS, "sample_size": 4, "num_mmdit_layers": 2, "num_single_dit_layers": 2, "joint_attention_dim": 8,
         "caption_projection_dim": 16, "pos_embed_max_size": 4},
        image(timestep=lambda b, r: t(b, 0.5)),
        ("joint_transformer_blocks.*", "single_transformer_blocks.*"),
        {"joint_transformer_blocks.1": TX, "single_transformer_blocks.0": X},
    ),
    "BriaFibo2Transformer2DModel": Tiny(
        {"in_channels": 4, "dim": 24, "n_layers": 3, "n_refiner_layers": 2, "n_heads": 3, "cap_feat_dim": 8,
         "injection_layer_ids": (1,), "perceiver_num_layers": 2, "min_num_gist_tokens": 2, "max_num_gist_tokens": 4,
         "gist_step": 1, "gist_min_text_len": 2, "gist_max_text_len": 8, "axes_dims": (2, 2, 4),
         "axes_lens": (32, 32, 32)},
        image(encoder_hidden_states=lambda b, r: r(b, 2, 5, 8), timestep=lambda b, r: t(b, 0.5)),
        LAYERS, {"layers.1": "x"},
        named=("noise_refiner.*", "perceiver.layers.*"),
    ),
    "BriaFiboTransformer2DModel": Tiny(
        {**FLUX, "text_encoder_dim": 8},
        tokens(text_encoder_layers=lambda b, r: [r(b, 5, 8) for _ in range(4)]),
        DUAL, {"transformer_blocks.1": TX, "single_transformer_blocks.0": X},
    ),
    "BriaTransformer2DModel": Tiny(
        {**FLUX, "pooled_projection_dim": None},
        tokens(),
        DUAL, {"transformer_blocks.1": TX, "single_transformer_blocks.0": TX},
    ),
    "ChromaTransformer2DModel": Tiny(
        {**FLUX, "approximator_num_channels": 8, "approximator_hidden_dim": 8, "approximator_layers": 1},
        tokens(),
        DUAL, {"transformer_blocks.1": TX, "single_transformer_blocks.0": X},
    ),
    "ChronoEditTransformer3DModel": Tiny(
        WAN,
        video(),
        BLOCKS, {"blocks.1": X},
    ),
    "CogVideoXTransformer3DModel": Tiny(
        COGVIDEOX,
        image(hidden_states=lambda b, r: r(b, 2, 4, 4, 4)),
        TRANSFORMER_BLOCKS, {"transformer_blocks.1": XT},
    ),
    "CogView3PlusTransformer2DModel": Tiny(
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 3, "text_embed_dim": 8, "time_embed_dim": 8,
         "condition_dim": 4, "pos_embed_max_size": 4, "sample_size": 4},
        image(original_size=lambda b, r: torch.full((b, 2), 4.0), target_size=lambda b, r: torch.full((b, 2), 4.0),
            crop_coords=lambda b, r: torch.zeros(b, 2)),
        TRANSFORMER_BLOCKS, {"transformer_blocks.1": XT},
    ),
    "CogView4Transformer2DModel": Tiny(
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 3, "text_embed_dim": 8, "time_embed_dim": 8,
         "condition_dim": 4, "pos_embed_max_size": 4, "sample_size": 4, "rope_axes_dim": (8, 8)},
        image(original_size=lambda b, r: torch.full((b, 2), 4.0), target_size=lambda b, r: torch.full((b, 2), 4.0),
            crop_coords=lambda b, r: torch.zeros(b, 2)),
        TRANSFORMER_BLOCKS, {"transformer_blocks.1": XT},
    ),
    "ConsisIDTransformer3DModel": Tiny(
        COGVIDEOX,
        image(hidden_states=lambda b, r: r(b, 2, 4, 4, 4)),
        TRANSFORMER_BLOCKS, {"transformer_blocks.1": XT},
    ),
    "Cosmos3OmniTransformer": Tiny(
        {"head_dim": 8, "hidden_size": 16, "intermediate_size": 16, "latent_channel": 4, "num_attention_heads": 2,
         "num_hidden_layers": 3, "num_key_value_heads": 1, "patch_latent_dim": 16, "vocab_size": 8,
         "rope_axes_dim": [2, 1, 1]},
        lambda b, r: {"input_ids": torch.arange(4), "text_indexes": torch.arange(4),
            "position_ids": torch.arange(8), "und_len": 4, "sequence_length": 8, "vision_tokens": [r(1, 4, 1, 4, 4)],
            "vision_token_shapes": [(1, 2, 2)], "vision_sequence_indexes": torch.arange(4, 8),
            "vision_mse_loss_indexes": torch.arange(4, 8), "vision_timesteps": torch.full((4,), 500.0),
            "vision_noisy_frame_indexes": [torch.tensor([0])]},
        LAYERS, {"layers.1": "und_seq, gen_seq"},
        rows="One sample per call, packed without a batch.",
    ),
    "CosmosTransformer3DModel": Tiny(
        {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "num_layers": 3,
         "mlp_ratio": 2, "text_embed_dim": 8, "adaln_lora_dim": 4, "max_size": (4, 8, 8),
         "concat_padding_mask": False},
        video(fps=lambda b, r: 24),
        TRANSFORMER_BLOCKS, {"transformer_blocks.1": X},
    ),
    "DiTTransformer2DModel": Tiny(
        {**HEADS, "num_layers": 3, "sample_size": 4, "num_embeds_ada_norm": 1000, "norm_num_groups": 4},
        lambda b, r: {"hidden_states": r(b, 4, 4, 4), "timestep": t(b).long(), "class_labels": torch.arange(b)},
        TRANSFORMER_BLOCKS, {"transformer_blocks.1": X},
    ),
    "DreamLiteTransformer2DModel": Tiny(
        {**HEADS, "in_channels": 16, "num_layers": 3, "cross_attention_dim": 8, "norm_num_groups": 4},
        lambda b, r: {"hidden_states": r(b, 16, 4, 4), "encoder_hidden_states": r(b, 5, 8)},
        TRANSFORMER_BLOCKS, {"transformer_blocks.1": X},
    ),
    "DreamLiteUNetModel": Tiny(
        {**UNET, "down_block_types": ("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
         "up_block_types": ("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"), "attention_head_dim": 4},
        unet(),
        UNET_LAYERS, {"mid_block.attentions.0": TUPLE, "up_blocks.0.attentions.0": TUPLE},
    ),
    "EasyAnimateTransformer3DModel": Tiny(
        {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "patch_size": 2,
         "sample_width": 4, "sample_height": 4, "num_layers": 3, "mmdit_layers": 2, "time_embed_dim": 8,
         "text_embed_dim": 8},
        video(),
        TRANSFORMER_BLOCKS, {"transformer_blocks.1": XT},
    ),
    "ErnieImageTransformer2DModel": Tiny(
        {"hidden_size": 16, "num_attention_heads": 2, "num_layers": 3, "ffn_hidden_size": 16, "in_channels": 4,
         "out_channels": 4, "text_in_dim": 8, "rope_axes_dim": (2, 2, 4)},
        lambda b, r: {"hidden_states": r(b, 4, 2, 2), "timestep": t(b), "text_bth": r(b, 5, 8),
            "text_lens": torch.full((b,), 5)},
        LAYERS, {"layers.1": "x"},
        batched="The sequence comes first in its blocks.",
    ),
    "Flux2Transformer2DModel": Tiny(
        {**FLUX, "timestep_guidance_channels": 8, "axes_dims_rope": (2, 2, 2, 2)},
        tokens(axes=4, guidance=lambda b, r: t(b, 4.0)),
        DUAL, {"transformer_blocks.1": TX, "single_transformer_blocks.0": X},
    ),
    "Flux3Transformer2DModel": Tiny(
        {**FLUX, "cond_in_channels": 4, "timestep_channels": 8, "axes_dims_rope": (2, 2, 2, 2)},
        tokens(axes=4, image_cond_hidden_states=lambda b, r: r(b, 5, 4),
            image_cond_ids=lambda b, r: torch.ones(5, 4)),
        ("mode_blocks.image.*", "mode_blocks.image_cond.*", "single_transformer_blocks.*"),
        {"txt_mode_blocks.1": X, "mode_blocks.image.1": X, "single_transformer_blocks.0": TX},
        named=("txt_mode_blocks.*",),
    ),
    "FluxTransformer2DModel": Tiny(
        {**FLUX, "pooled_projection_dim": 8},
        tokens(pooled_projections=lambda b, r: r(b, 8)),
        DUAL, {"transformer_blocks.1": TX, "single_transformer_blocks.0": TX},
    ),
    "GlmImageTransformer2DModel": Tiny(
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 3, "text_embed_dim": 8, "time_embed_dim": 8,
         "condition_dim": 4, "prior_vq_quantizer_codebook_size": 8},
        image(prior_token_id=lambda b, r: torch.arange(4 * b).reshape(b, 4) % 8,
            prior_token_drop=lambda b, r: torch.zeros(b, dtype=torch.bool),
            target_size=lambda b, r: torch.full((b, 2), 4.0), crop_coords=lambda b, r: torch.zeros(b, 2)),
        TRANSFORMER_BLOCKS, {"transformer_blocks.1": XT},
    ),
    "HeliosTransformer3DModel": Tiny(
        {**{k: v for k, v in WAN.items() if k != "rope_max_seq_len"}, "rope_dim": (4, 4, 4)},
        video(),
        BLOCKS, {"blocks.1": X},
    ),
    "HiDreamImageTransformer2DModel": Tiny(
        {**HEADS, "patch_size": 2, "in_channels": 4, "num_layers": 2, "num_single_layers": 2,
         "caption_channels": [8, 8], "text_emb_dim": 8, "axes_dims_rope": (2, 2, 4), "max_resolution": (4, 4),
         "llama_layers": [0, 1, 2, 1]},
        lambda b, r: {"hidden_states": r(b, 4, 4, 4), "timesteps": t(b), "encoder_hidden_states_t5": r(b, 5, 8),
            "encoder_hidden_states_llama3": r(3, b, 5, 8), "pooled_embeds": r(b, 8)},
        ("double_stream_blocks.*", "single_stream_blocks.*"),
        {"double_stream_blocks.1": XT, "single_stream_blocks.0": X},
        rows="The text states of all layers come in one tensor, rows in dimension 1.",
    ),
    "HunyuanDiT2DModel": Tiny(
        {**HEADS, "in_channels": 4, "patch_size": 2, "sample_size": 4, "hidden_size": 16, "num_layers": 4,
         "mlp_ratio": 2.0, "cross_attention_dim": 8, "cross_attention_dim_t5": 8, "pooled_projection_dim": 8,
         "text_len": 5, "text_len_t5": 5},
        lambda b, r: {"hidden_states": r(b, 4, 4, 4), "timestep": t(b), "encoder_hidden_states": r(b, 5, 8),
            "text_embedding_mask": torch.ones(b, 5), "encoder_hidden_states_t5": r(b, 5, 8),
            "text_embedding_mask_t5": torch.ones(b, 5), "image_meta_size": torch.ones(b, 6),
            "style": torch.zeros(b, dtype=torch.long), "image_rotary_emb": (torch.ones(4, 8), torch.zeros(4, 8))},
        BLOCKS, {"blocks.1": X, "blocks.2": X},
        note="The first half of the blocks feeds the second half across.",
    ),
    "HunyuanImageTransformer2DModel": Tiny(
        {**{k: v for k, v in HUNYUAN_VIDEO.items() if k != "pooled_projection_dim"}, "rope_axes_dim": (4, 4),
         "text_embed_2_dim": 8},
        image(encoder_attention_mask=lambda b, r: torch.ones(b, 5), encoder_hidden_states_2=lambda b, r: r(b, 2, 8),
            encoder_attention_mask_2=lambda b, r: torch.ones(b, 2)),
        DUAL, {"transformer_blocks.1": XT, "single_transformer_blocks.0": XT},
        named=("context_embedder.token_refiner.refiner_blocks.*",),
    ),
    "HunyuanVideo15Transformer3DModel": Tiny(
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 3, "num_refiner_layers": 2, "mlp_ratio": 2.0,
         "text_embed_dim": 8, "text_embed_2_dim": 8, "image_embed_dim": 8, "rope_axes_dim": (2, 2, 4)},
        video(encoder_attention_mask=lambda b, r: torch.ones(b, 5), encoder_hidden_states_2=lambda b, r: r(b, 2, 8),
            encoder_attention_mask_2=lambda b, r: torch.ones(b, 2), image_embeds=lambda b, r: r(b, 2, 8)),
        TRANSFORMER_BLOCKS, {"transformer_blocks.1": XT},
        named=("context_embedder.token_refiner.refiner_blocks.*",),
    ),
    "HunyuanVideoFramepackTransformer3DModel": Tiny(
        {**HUNYUAN_VIDEO, "has_image_proj": True, "image_proj_dim": 8, "has_clean_x_embedder": True},
        video(encoder_attention_mask=lambda b, r: torch.ones(b, 5), pooled_projections=lambda b, r: r(b, 8),
            image_embeds=lambda b, r: r(b, 2, 8), indices_latents=lambda b, r: torch.arange(2),
            guidance=lambda b, r: t(b, 6000.0), latents_clean=lambda b, r: r(b, 4, 1, 4, 4),
            indices_latents_clean=lambda b, r: torch.zeros(1, dtype=torch.long),
            latents_history_2x=lambda b, r: r(b, 4, 2, 4, 4), indices_latents_history_2x=lambda b, r: torch.arange(2),
            latents_history_4x=lambda b, r: r(b, 4, 4, 4, 4), indices_latents_history_4x=lambda b, r: torch.arange(4)),
        DUAL, {"transformer_blocks.1": XT, "single_transformer_blocks.0": XT},
        named=("context_embedder.token_refiner.refiner_blocks.*",),
        rows="Indices of frames, as many as rows.",
    ),
    "HunyuanVideoTransformer3DModel": Tiny(
        HUNYUAN_VIDEO,
        video(encoder_attention_mask=lambda b, r: torch.ones(b, 5), pooled_projections=lambda b, r: r(b, 8),
            guidance=lambda b, r: t(b, 6000.0)),
        DUAL, {"transformer_blocks.1": XT, "single_transformer_blocks.0": XT},
        named=("context_embedder.token_refiner.refiner_blocks.*",),
    ),
    "I2VGenXLUNet": Tiny(
        {**UNET, "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
         "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"), "attention_head_dim": 4},
        unet(sample=lambda b, r: r(b, 4, 2, 8, 8), fps=lambda b, r: torch.full((b,), 8),
            image_latents=lambda b, r: r(b, 4, 2, 8, 8), image_embeddings=lambda b, r: r(b, 8)),
        UNET_3D_LAYERS, UNET_SKIPS,
        batched=FRAMES,
        note="Spatial and temporal layers take turns.",
    ),
    "Ideogram4Transformer2DModel": Tiny(
        {**HEADS, "in_channels": 4, "num_layers": 3, "intermediate_size": 16, "adaln_dim": 8, "llm_features_dim": 8,
         "mrope_section": (2, 1, 1)},
        lambda b, r: {"hidden_states": r(b, 6, 4), "timestep": t(b, 0.5), "encoder_hidden_states": r(b, 6, 8),
            "position_ids": torch.arange(18).reshape(1, 6, 3).expand(b, -1, -1),
            "segment_ids": torch.zeros(b, 6, dtype=torch.long),
            "indicator": torch.tensor([3, 3, 2, 2, 2, 2]).expand(b, -1)},
        LAYERS, {"layers.1": X},
    ),
    "JoyImageEditPlusTransformer3DModel": Tiny(
        {"in_channels": 4, "hidden_size": 16, "num_attention_heads": 2, "text_dim": 8, "mlp_width_ratio": 2.0,
         "num_layers": 3, "rope_dim_list": [2, 2, 4]},
        lambda b, r: {"hidden_states": r(b, 4, 4, 1, 2, 2), "timestep": t(b), "encoder_hidden_states": r(b, 5, 8),
            "shape_list": [[(1, 2, 2)]] * b},
        ("double_blocks.*",), {"double_blocks.1": XT},
        batched=SHAPES,
    ),
    "JoyImageEditTransformer3DModel": Tiny(
        {"in_channels": 4, "hidden_size": 16, "num_attention_heads": 2, "text_dim": 8, "mlp_width_ratio": 2.0,
         "num_layers": 3, "rope_dim_list": [2, 2, 4]},
        video(),
        ("double_blocks.*",), {"double_blocks.1": XT},
    ),
    "Kandinsky3UNet": Tiny(
        {"time_embedding_dim": 16, "groups": 4, "attention_head_dim": 4, "layers_per_block": 2,
         "block_out_channels": (8, 8, 16, 16), "cross_attention_dim": 8, "encoder_hid_dim": 8},
        unet(timestep=lambda b, r: t(b), encoder_attention_mask=lambda b, r: torch.ones(b, 5)),
        ("down_blocks.1.attentions.*", "down_blocks.2.attentions.*", "down_blocks.3.attentions.*",
         "up_blocks.0.attentions.*", "up_blocks.1.attentions.*", "up_blocks.2.attentions.*"),
        {"up_blocks.0.attentions.1": "x", "up_blocks.2.attentions.0": "x"},
    ),
    "Kandinsky5Transformer3DModel": Tiny(
        {"in_text_dim": 8, "in_text_dim2": 8, "time_dim": 8, "model_dim": 16, "ff_dim": 16, "num_text_blocks": 2,
         "num_visual_blocks": 3, "axes_dims": (2, 2, 4)},
        video(hidden_states=lambda b, r: r(b, 5, 10, 10, 4), pooled_projections=lambda b, r: r(b, 8),
            visual_rope_pos=lambda b, r: [torch.arange(5)] * 3, text_rope_pos=lambda b, r: torch.arange(5)),
        ("visual_transformer_blocks.*",), {"visual_transformer_blocks.1": "visual_embed"},
        named=("text_transformer_blocks.*",),
    ),
    "Kandinsky6SRTransformer3DModel": Tiny(
        {"in_visual_dim": 2, "out_visual_dim": 4, "time_dim": 8, "model_dim": 16, "ff_dim": 16,
         "num_visual_blocks": 3, "axes_dims": (4, 6, 6)},
        lambda b, r: {"hidden_states": r(b, 1, 8, 8, 5), "timestep": t(b)},
        ("visual_transformer_blocks.*",), {"visual_transformer_blocks.1": X},
        attention="Block-sparse attention that only its own backend computes.",
    ),
    "Kandinsky6Transformer3DModel": Tiny(
        {"in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 8, "in_text_dim2": 8, "time_dim": 8,
         "model_dim": 16, "ff_dim": 16, "num_text_blocks": 2, "num_visual_blocks": 3, "axes_dims": (2, 2, 4),
         "in_audio_dim": 4, "out_audio_dim": 4},
        lambda b, r: {"hidden_states": r(b, 2, 4, 4, 9), "encoder_hidden_states": r(b, 5, 8),
            "pooled_projections": r(b, 8), "timestep": t(b), "audio_hidden_states": r(b, 7, 4)},
        ("visual_transformer_blocks.*",), {"visual_transformer_blocks.1": "vis, aud"},
        named=("video_text_transformer_blocks.*", "audio_text_transformer_blocks.*"),
    ),
    "Krea2Transformer2DModel": Tiny(
        {**HEADS, "in_channels": 4, "num_layers": 3, "num_key_value_heads": 1, "intermediate_size": 16,
         "timestep_embed_dim": 8, "text_hidden_dim": 8, "num_text_layers": 2, "text_num_attention_heads": 2,
         "text_num_key_value_heads": 2, "text_intermediate_size": 8, "axes_dims_rope": (2, 2, 4)},
        lambda b, r: {"hidden_states": r(b, 6, 4), "encoder_hidden_states": r(b, 5, 2, 8), "timestep": t(b, 0.5),
            "position_ids": torch.arange(33).reshape(11, 3)},
        TRANSFORMER_BLOCKS, {"transformer_blocks.1": X},
        named=("text_fusion.layerwise_blocks.*", "text_fusion.refiner_blocks.*"),
    ),
    "LTX2VideoTransformer3DModel": Tiny(
        LTX2,
        lambda b, r: {"hidden_states": r(b, 8, 4), "audio_hidden_states": r(b, 7, 4),
            "encoder_hidden_states": r(b, 5, 8), "audio_encoder_hidden_states": r(b, 5, 8), "timestep": t(b),
            "num_frames": 2, "height": 2, "width": 2, "audio_num_frames": 7},
        TRANSFORMER_BLOCKS, {"transformer_blocks.1": "hidden_states, audio_hidden_states"},
    ),
    "LTXVideoTransformer3DModel": Tiny(
        LTX,
        lambda b, r: {"hidden_states": r(b, 8, 4), "encoder_hidden_states": r(b, 5, 8), "timestep": t(b),
            "encoder_attention_mask": torch.ones(b, 5), "num_frames": 2, "height": 2, "width": 2},
        TRANSFORMER_BLOCKS, {"transformer_blocks.1": X},
    ),
    "LatteTransformer3DModel": Tiny(
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 3, "cross_attention_dim": 16, "sample_size": 4,
         "patch_size": 2, "num_embeds_ada_norm": 10, "norm_type": "ada_norm_single",
         "norm_elementwise_affine": False, "caption_channels": 8, "video_length": 2},
        video(),
        ("transformer_blocks.*", "temporal_transformer_blocks.*"),
        {"transformer_blocks.1": X, "temporal_transformer_blocks.1": X},
        batched=FRAMES,
        note="Spatial and temporal layers take turns.",
    ),
    "LongCatAudioDiTTransformer": Tiny(
        {"dit_dim": 16, "dit_depth": 3, "dit_heads": 2, "dit_text_dim": 8, "latent_dim": 4},
        lambda b, r: {"hidden_states": r(b, 6, 4), "encoder_hidden_states": r(b, 5, 8),
            "encoder_attention_mask": torch.ones(b, 5, dtype=torch.bool), "timestep": t(b, 0.5),
            "latent_cond": r(b, 6, 4)},
        BLOCKS, {"blocks.1": X},
    ),
    "LongCatImageTransformer2DModel": Tiny(
        {**FLUX, "pooled_projection_dim": 8},
        tokens(),
        DUAL, {"transformer_blocks.1": TX, "single_transformer_blocks.0": TX},
    ),
    "Lumina2Transformer2DModel": Tiny(
        {"sample_size": 4, "in_channels": 4, "hidden_size": 16, "num_layers": 3, "num_refiner_layers": 2,
         "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 4, "axes_dim_rope": (2, 2, 4),
         "axes_lens": (16, 16, 16), "cap_feat_dim": 8},
        image(timestep=lambda b, r: t(b, 0.5),
            encoder_attention_mask=lambda b, r: torch.ones(b, 5, dtype=torch.bool)),
        LAYERS, {"layers.1": X},
        named=("context_refiner.*", "noise_refiner.*"),
    ),
    "LuminaNextDiT2DModel": Tiny(
        {"sample_size": 4, "hidden_size": 16, "num_layers": 3, "num_attention_heads": 2, "num_kv_heads": 1,
         "multiple_of": 4, "cross_attention_dim": 8},
        image(timestep=lambda b, r: t(b, 0.5), encoder_mask=lambda b, r: torch.ones(b, 5),
            image_rotary_emb=lambda b, r: torch.polar(torch.ones(4, 4, 4), torch.arange(64.0).reshape(4, 4, 4)),
            cross_attention_kwargs=lambda b, r: {}),
        LAYERS, {"layers.1": X},
    ),
    "MiniMaxH3Transformer3DModel": Tiny(
        {"num_attention_heads": 2, "attention_head_dim": 8, "hidden_size": 16, "num_layers": 3,
         "num_refiner_layers": 2, "ffn_dim": 16, "in_channels": 4, "audio_in_channels": 4, "text_dim": 8,
         "freq_dim": 8, "time_embed_hidden_dim": 16, "time_embed_dim": 8, "rope_freq_dim": 1},
        lambda b, r: {"hidden_states": r(b, 5, 16), "audio_hidden_states": r(b, 5, 4),
            "encoder_hidden_states": r(b, 5, 8), "timestep": torch.tensor([500.0, 400.0, 300.0, 200.0, 100.0]),
            "timestep_indices": torch.arange(15) // 5, "token_tags": torch.tensor([2, 0, 1]).repeat_interleave(5),
            "position_ids": torch.arange(45).reshape(15, 3), "video_indices": torch.arange(5, 10),
            "audio_indices": torch.arange(10, 15), "text_indices": torch.arange(5)},
        TRANSFORMER_BLOCKS, {"transformer_blocks.1": X},
        named=("token_refiner.refiner_blocks.*",),
    ),
    "MiniMaxMusic3RVQDepthDecoder": Tiny(
        {"hidden_size": 16, "num_layers": 3, "num_attention_heads": 2, "intermediate_size": 16,
         "audio_vocab_size": 4, "num_codebooks": 3},
        lambda b, r: {"inputs_embeds": r(b, 5, 16)},
        LAYERS, {"layers.1": X},
        note="Decodes audio codes one after the other; no denoiser.",
        return_dict=False,
    ),
    "MiniMaxMusic3Transformer1DModel": Tiny(
        {**HEADS, "in_channels": 4, "condition_dim": 8, "num_layers": 3, "ff_inner_dim": 16, "rotary_dim": 4,
         "fourier_embedding_dim": 8},
        lambda b, r: {"hidden_states": r(b, 4, 6), "timestep": t(b, 0.5), "encoder_hidden_states": r(b, 6, 8)},
        TRANSFORMER_BLOCKS, {"transformer_blocks.1": X},
    ),
    "MochiTransformer3DModel": Tiny(
        {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 3, "pooled_projection_dim": 16,
         "in_channels": 4, "text_embed_dim": 16, "time_embed_dim": 8, "max_sequence_length": 5},
        video(text=16, encoder_attention_mask=lambda b, r: torch.ones(b, 5, dtype=torch.bool)),
        TRANSFORMER_BLOCKS, {"transformer_blocks.1": XT},
    ),
    "MotifVideoTransformer3DModel": Tiny(
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 3,
         "num_decoder_layers": 1, "mlp_ratio": 2.0, "text_embed_dim": 8, "image_embed_dim": 8,
         "rope_axes_dim": (2, 2, 4)},
        video(image_embeds=lambda b, r: r(b, 2, 8), encoder_attention_mask=lambda b, r: torch.ones(b, 5)),
        DUAL, {"transformer_blocks.1": XT, "single_transformer_blocks.0": XT, "single_transformer_blocks.2": XT},
    ),
    "NucleusMoEImageTransformer2DModel": Tiny(
        {**HEADS, "in_channels": 4, "num_layers": 4, "joint_attention_dim": 8, "axes_dims_rope": (2, 2, 4),
         "mlp_ratio": 12.0, "num_experts": 2, "moe_intermediate_dim": 8,
         "dense_moe_strategy": "leave_first_block_dense", "capacity_factors": [0.0, 2.0, 2.0, 2.0]},
        lambda b, r: {"hidden_states": r(b, 4, 4), "img_shapes": [(1, 2, 2)] * b,
            "encoder_hidden_states": r(b, 5, 8), "timestep": t(b, 0.5)},
        TRANSFORMER_BLOCKS, {"transformer_blocks.0": X, "transformer_blocks.1": X},
    ),
    "OmniGenTransformer2DModel": Tiny(
        {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 16,
         "num_layers": 3, "pad_token_id": 0, "vocab_size": 16, "max_position_embeddings": 32,
         "original_max_position_embeddings": 32,
         "rope_scaling": {"short_factor": [1.0] * 4, "long_factor": [1.0] * 4}, "pos_embed_max_size": 4,
         "time_step_dim": 8},
        lambda b, r: {"hidden_states": r(b, 4, 4, 4), "timestep": t(b, 0.5),
            "input_ids": torch.arange(5 * b).reshape(b, 5) % 16, "input_img_latents": [], "input_image_sizes": {},
            "attention_mask": torch.ones(b, 10, 10), "position_ids": torch.arange(10).expand(b, -1)},
        LAYERS, {"layers.1": X},
        batched="It keeps its rotary frequencies anew in each call.",
    ),
    "OvisImageTransformer2DModel": Tiny(
        {**FLUX, "out_channels": 4},
        tokens(),
        DUAL, {"transformer_blocks.1": TX, "single_transformer_blocks.0": TX},
    ),
    "PRXTransformer2DModel": Tiny(
        {"in_channels": 4, "context_in_dim": 8, "hidden_size": 16, "mlp_ratio": 2.0, "num_heads": 2, "depth": 3,
         "axes_dim": [4, 4]},
        image(timestep=lambda b, r: t(b, 0.5)),
        BLOCKS, {"blocks.1": X},
    ),
    "PixArtTransformer2DModel": Tiny(
        {**HEADS, "out_channels": 4, "num_layers": 3, "cross_attention_dim": 16, "sample_size": 4,
         "caption_channels": 8, "norm_num_groups": 4, "use_additional_conditions": False},
        image(added_cond_kwargs=lambda b, r: {"resolution": None, "aspect_ratio": None}),
        TRANSFORMER_BLOCKS, {"transformer_blocks.1": X},
    ),
    "PriorTransformer": Tiny(
        {**HEADS, "num_layers": 3, "embedding_dim": 8, "num_embeddings": 5},
        lambda b, r: {"hidden_states": r(b, 8), "timestep": t(b), "proj_embedding": r(b, 8),
            "encoder_hidden_states": r(b, 5, 8)},
        TRANSFORMER_BLOCKS, {"transformer_blocks.1": X},
    ),
    "QwenImage21Transformer2DModel": Tiny(
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 3, "context_in_dim": 8,
         "axes_dims_rope": (2, 2, 4)},
        lambda b, r: {"hidden_states": r(b, 4, 4), "encoder_hidden_states": r(b, 5, 8), "timestep": t(b, 0.5),
            "img_shapes": [[(1, 2, 2)]] * b, "img_mask": torch.tensor([[False] * 5 + [True]]).expand(b, -1)},
        TRANSFORMER_BLOCKS, {"transformer_blocks.1": X},
        rows="A row is added to the times, so that they outnumber the rows.",
        attention="Its attention is computed in pieces that share keys.",
    ),
    "QwenImageTransformer2DModel": Tiny(
        {**HEADS, "in_channels": 16, "out_channels": 4, "num_layers": 3, "joint_attention_dim": 8,
         "axes_dims_rope": (2, 2, 4)},
        lambda b, r: {"hidden_states": r(b, 4, 16), "encoder_hidden_states": r(b, 5, 8),
            "encoder_hidden_states_mask": torch.ones(b, 5, dtype=torch.bool), "timestep": t(b, 0.5),
            "img_shapes": [[(1, 2, 2)]] * b},
        TRANSFORMER_BLOCKS, {"transformer_blocks.1": TX},
    ),
    "RFD4ProteinaTransformer": Tiny(
        {"nlayers": 3, "token_dim": 16, "nheads": 2, "dim_cond": 8, "pair_repr_dim": 8, "latent_dim": 4,
         "t_emb_dim": 8, "feats_seq": ("xt_bb_ca", "xt_local_latents"),
         "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"), "feats_pair_repr": ("xt_bb_ca_pair_dists",),
         "feats_pair_cond": ("time_emb_bb_ca",), "tri_mult_c": 8, "num_sequence_classes": 5},
        lambda b, r: {"bb_ca": r(b, 5, 3), "local_latents": r(b, 5, 4), "bb_ca_time": t(b, 0.5),
            "local_latents_time": t(b, 0.4), "padding_mask": torch.ones(b, 5, dtype=torch.bool),
            "conditioning": {"is_in_context_conditioning": torch.zeros(b, 5, dtype=torch.bool),
            "supports_local_latent": torch.ones(b, 5, dtype=torch.bool)}},
        ("transformer_layers.*",), {"transformer_layers.1": "values"},
    ),
    "SD3Transformer2DModel": Tiny(
        {**HEADS, "sample_size": 4, "in_channels": 4, "out_channels": 4, "num_layers": 3, "joint_attention_dim": 8,
         "caption_projection_dim": 16, "pooled_projection_dim": 8, "pos_embed_max_size": 4},
        image(pooled_projections=lambda b, r: r(b, 8)),
        TRANSFORMER_BLOCKS, {"transformer_blocks.1": TX, "transformer_blocks.2": "None, hidden_states"},
    ),
    "SanaTransformer2DModel": Tiny(
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 3, "num_cross_attention_heads": 2,
         "cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 8, "sample_size": 4},
        image(),
        TRANSFORMER_BLOCKS, {"transformer_blocks.1": X},
        attention=LINEAR,
    ),
    "SanaVideoTransformer3DModel": Tiny(
        {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "num_layers": 3,
         "num_cross_attention_heads": 2, "cross_attention_head_dim": 12, "cross_attention_dim": 24,
         "caption_channels": 8, "sample_size": 4},
        video(),
        TRANSFORMER_BLOCKS, {"transformer_blocks.1": X},
        attention=LINEAR,
    ),
    "SanaWMLTX2RefinerTransformer3DModel": Tiny(
        LTX2,
        lambda b, r: {"hidden_states": r(b, 4, 4), "encoder_hidden_states": r(b, 5, 8), "timestep": t(b),
            "video_rotary_emb": (r(1, 4, 16), r(1, 4, 16))},
        TRANSFORMER_BLOCKS, {"transformer_blocks.1": X},
    ),
    "SanaWMTransformer3DModel": Tiny(
        {"in_channels": 4, "num_layers": 4, "hidden_size": 24, "num_attention_heads": 2, "softmax_every_n": 2,
         "linear_head_dim": 12, "chunk_plucker_channels": 4, "caption_channels": 8, "mlp_ratio": 2.0},
        video(timestep=lambda b, r: t(b)[:, None, None].expand(b, 1, 2),
            encoder_attention_mask=lambda b, r: torch.ones(b, 1, 1, 5)),
        BLOCKS, {"blocks.0": "x", "blocks.1": "x"},
        attention=LINEAR,
    ),
    "SkyReelsV2Transformer3DModel": Tiny(
        WAN,
        video(),
        BLOCKS, {"blocks.1": X},
    ),
    "StableAudio3DiTModel": Tiny(
        {"io_channels": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "cond_token_dim": 8, "global_cond_dim": 8,
         "local_add_cond_dim": 5, "timestep_features_dim": 8, "ff_mult": 2.0, "num_memory_tokens": 2},
        lambda b, r: {"hidden_states": r(b, 4, 6), "timestep": t(b, 0.5), "encoder_hidden_states": r(b, 5, 8),
            "global_hidden_states": r(b, 8)},
        TRANSFORMER_BLOCKS, {"transformer_blocks.1": X},
    ),
    "StableAudioDiTModel": Tiny(
        {**HEADS, "sample_size": 6, "in_channels": 4, "out_channels": 4, "num_layers": 3,
         "num_key_value_attention_heads": 1, "cross_attention_dim": 8, "time_proj_dim": 8,
         "global_states_input_dim": 8, "cross_attention_input_dim": 8},
        lambda b, r: {"hidden_states": r(b, 4, 6), "timestep": t(b, 0.5), "encoder_hidden_states": r(b, 5, 8),
            "global_hidden_states": r(b, 1, 8), "rotary_embedding": (torch.ones(7, 4), torch.zeros(7, 4))},
        TRANSFORMER_BLOCKS, {"transformer_blocks.1": X},
    ),
    "StableCascadeUNet": Tiny(
        {"in_channels": 4, "out_channels": 4, "timestep_ratio_embedding_dim": 8, "conditioning_dim": 16,
         "block_out_channels": (8, 16), "num_attention_heads": (2, 2), "down_num_layers_per_block": (1, 1),
         "up_num_layers_per_block": (1, 1), "clip_text_in_channels": 8, "clip_text_pooled_in_channels": 8,
         "clip_image_in_channels": 8, "clip_seq": 2, "switch_level": (False,)},
        lambda b, r: {"sample": r(b, 4, 8, 8), "timestep_ratio": t(b, 0.5), "clip_text_pooled": r(b, 1, 8),
            "clip_text": r(b, 5, 8), "clip_img": r(b, 1, 8)},
        ("down_blocks.*.2", "up_blocks.*.2"), {"down_blocks.1.2": "x", "up_blocks.0.2": "x"},
        attention="Its attention sees text and image tokens beside its own.",
    ),
    "T5FilmDecoder": Tiny(
        {"input_dims": 4, "targets_length": 6, "d_model": 16, "num_layers": 3, "num_heads": 2, "d_kv": 8,
         "d_ff": 16},
        lambda b, r: {"encodings_and_masks": [(r(b, 5, 16), torch.ones(b, 5)), (r(b, 2, 16), torch.ones(b, 2))],
            "decoder_input_tokens": r(b, 6, 4), "decoder_noise_time": t(b, 0.5)},
        ("decoders.*",), {"decoders.1": TUPLE},
        return_dict=False,
    ),
    "Transformer2DModel": Tiny(
        {**HEADS, "in_channels": 16, "num_layers": 3, "cross_attention_dim": 8, "norm_num_groups": 4},
        lambda b, r: {"hidden_states": r(b, 16, 4, 4), "encoder_hidden_states": r(b, 5, 8)},
        TRANSFORMER_BLOCKS, {"transformer_blocks.1": X},
    ),
    "TransformerTemporalModel": Tiny(
        {**HEADS, "in_channels": 16, "num_layers": 3, "norm_num_groups": 4},
        lambda b, r: {"hidden_states": r(b * 2, 16, 4, 4), "num_frames": 2},
        TRANSFORMER_BLOCKS, {"transformer_blocks.1": X},
        batched=FRAMES,
    ),
    "UNet1DModel": Tiny(
        {"sample_size": 64, "in_channels": 4, "out_channels": 4, "block_out_channels": (32, 32, 64),
         "extra_in_channels": 64},
        lambda b, r: {"sample": r(b, 4, 64), "timestep": t(b)},
        ("down_blocks.*.attentions.*", "mid_block.attentions.*", "up_blocks.*.attentions.*"),
        {"down_blocks.2.attentions.0": X},
    ),
    "UNet2DConditionModel": Tiny(
        {**UNET, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
         "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 4},
        unet(),
        UNET_LAYERS, UNET_SKIPS,
    ),
    "UNet2DModel": Tiny(
        {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4,
         "attention_head_dim": 4, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
         "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
        lambda b, r: {"sample": r(b, 3, 8, 8), "timestep": t(b)},
        UNET_LAYERS, {"mid_block.attentions.0": X, "up_blocks.0.attentions.0": X},
    ),
    "UNet3DConditionModel": Tiny(
        {**UNET, "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
         "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"), "attention_head_dim": 4},
        unet(sample=lambda b, r: r(b, 4, 2, 8, 8)),
        UNET_3D_LAYERS, UNET_SKIPS,
        batched=FRAMES,
        note="Spatial and temporal layers take turns.",
    ),
    "UNetMotionModel": Tiny(
        {**UNET, "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
         "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"), "num_attention_heads": 2,
         "motion_num_attention_heads": 2, "motion_max_seq_length": 4},
        unet(sample=lambda b, r: r(b, 4, 2, 8, 8),
            encoder_hidden_states=lambda b, r: r(b, 5, 8).repeat_interleave(2, dim=0)),
        (*UNET_LAYERS, "down_blocks.*.motion_modules.*", "mid_block.motion_modules.*",
         "up_blocks.*.motion_modules.*"),
        UNET_SKIPS,
        batched=FRAMES,
        note="Spatial and temporal layers take turns.",
    ),
    "UNetSpatioTemporalConditionModel": Tiny(
        {"sample_size": 8, "in_channels": 8, "block_out_channels": (32, 64),
         "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
         "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), "layers_per_block": 1,
         "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 24, "cross_attention_dim": 16,
         "num_attention_heads": (2, 4), "num_frames": 2},
        lambda b, r: {"sample": r(b, 2, 8, 8, 8), "timestep": torch.tensor(1.3),
            "encoder_hidden_states": r(b, 1, 16), "added_time_ids": torch.ones(b, 3)},
        UNET_LAYERS, UNET_SKIPS,
        batched=FRAMES,
    ),
    "UVit2DModel": Tiny(
        {"hidden_size": 16, "cond_embed_dim": 8, "micro_cond_encode_dim": 4, "micro_cond_embed_dim": 20,
         "encoder_hidden_size": 8, "vocab_size": 10, "codebook_size": 8, "in_channels": 8, "block_out_channels": 8,
         "num_res_blocks": 1, "block_num_heads": 2, "num_hidden_layers": 3, "num_attention_heads": 2,
         "intermediate_size": 16, "sample_size": 4},
        lambda b, r: {"input_ids": torch.arange(16 * b).reshape(b, 4, 4) % 10, "encoder_hidden_states": r(b, 5, 8),
            "pooled_text_emb": r(b, 8), "micro_conds": r(b, 5)},
        ("down_block.attention_blocks.*", "transformer_layers.*", "up_block.attention_blocks.*"),
        {"transformer_layers.1": X},
        return_dict=False,
    ),
    "WanAnimate2Transformer3DModel": Tiny(
        {"text_len": 3, "in_dim": 8, "dim": 24, "ffn_dim": 16, "freq_dim": 16, "text_dim": 8, "out_dim": 4,
         "num_heads": 2, "num_layers": 3, "use_img_emb": False},
        lambda b, r: {"hidden_states": [r(4, 1, 4, 4) for _ in range(b)], "timestep": t(b),
            "encoder_hidden_states": [r(3, 8) for _ in range(b)],
            "condition_latents": [r(4, 1, 4, 4) for _ in range(b)], "kv_cache": wan_animate_2_cache(3),
            "kv_cache_mode": "extract", "seq_len": 4, "offset_grid_sizes": torch.tensor([[1, 2, 2]])},
        BLOCKS, {"blocks.1": X},
        rows=LISTS,
        alone="Its blocks write keys into a cache that they are given.",
    ),
    "WanAnimateTransformer3DModel": Tiny(
        {**WAN, "in_channels": 12, "latent_channels": 4, "image_dim": 8,
         "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8}, "motion_encoder_size": 16, "motion_style_dim": 8,
         "motion_dim": 4, "motion_encoder_dim": 8, "face_encoder_hidden_dim": 8, "face_encoder_num_heads": 2,
         "inject_face_latents_blocks": 1},
        video(channels=12, frames=3, encoder_hidden_states_image=lambda b, r: r(b, 2, 8),
            pose_hidden_states=lambda b, r: r(b, 4, 2, 4, 4), face_pixel_values=lambda b, r: r(b, 3, 5, 16, 16)),
        BLOCKS, {"blocks.1": X},
        named=("face_adapter.*",),
    ),
    "WanTransformer3DModel": Tiny(
        WAN,
        video(),
        BLOCKS, {"blocks.1": X},
    ),
    "WanVACETransformer3DModel": Tiny(
        {**WAN, "vace_layers": [0, 1, 2], "vace_in_channels": 4},
        video(control_hidden_states=lambda b, r: r(b, 4, 2, 4, 4),
            control_hidden_states_scale=lambda b, r: torch.ones(3)),
        BLOCKS, {"blocks.1": X},
        named=("vace_blocks.*",),
    ),
    "ZImageTransformer2DModel": Tiny(
        {"in_channels": 4, "dim": 16, "n_layers": 3, "n_refiner_layers": 2, "n_heads": 2, "n_kv_heads": 2,
         "cap_feat_dim": 8, "axes_dims": [2, 2, 4], "axes_lens": [64, 16, 16]},
        lambda b, r: {"x": [r(4, 1, 4, 4) for _ in range(b)], "t": t(b, 0.5),
            "cap_feats": [r(3, 8) for _ in range(b)]},
        LAYERS, {"layers.1": "x"},
        named=("context_refiner.*", "noise_refiner.*"),
        rows=LISTS,
    ),
}
# fmt: on

EXPLAINED = {
    "MotionAdapter": "Holds the motion modules that UNetMotionModel takes over; it has no forward of its own.",
}
"""What diffusers exports without a denoiser's call."""


def expand(patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    """List the names that each pattern matches, part by part, in the order of the patterns and then of the numbers."""

    def matches(pattern: str, name: str) -> bool:
        wanted, parts = pattern.split("."), name.split(".")
        return len(wanted) == len(parts) and all(w in ("*", p) for w, p in zip(wanted, parts, strict=True))

    return [name for pattern in patterns for name in names if matches(pattern, name)]


def exported() -> dict[str, type[nn.Module]]:
    """Return the model classes that diffusers' packages of transformers and U-Nets define."""
    import diffusers
    from diffusers.models import transformers, unets

    modules = [
        importlib.import_module(f"{package.__name__}.{entry.name}")
        for package in (transformers, unets)
        for entry in pkgutil.iter_modules(package.__path__)
    ]
    return {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, diffusers.ModelMixin) and value.__module__ == module.__name__
    }
