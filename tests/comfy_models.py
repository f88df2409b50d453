"""A real ComfyUI, headless on a CPU: tiny random models, wrapped and sampled as ComfyUI's own nodes do it.

`STG_HOOKS_COMFYUI` names a checkout; CONTRIBUTING.md says how to get one.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

CHECKOUT = os.environ.get("STG_HOOKS_COMFYUI", "")
needs_comfyui = pytest.mark.skipif(not CHECKOUT, reason="STG_HOOKS_COMFYUI names no checkout of ComfyUI")


def load() -> None:
    """Import ComfyUI, which reads the command line."""
    if "comfy.samplers" in sys.modules:
        return
    sys.path.append(CHECKOUT)  # last: it has a `tests` and a `utils` of its own
    given, level = sys.argv, logging.getLogger().level
    try:
        with torchvision():
            sys.argv = [sys.argv[0], "--cpu"]
            import comfy.options

            comfy.options.enable_args_parsing()
            import comfy.cli_args
            import comfy.model_patcher
            import comfy.sample
            import comfy.samplers
            import comfy.supported_models
    finally:
        sys.argv = given
        logging.getLogger().setLevel(level)


def extra(name: str) -> Any:
    """Import one of ComfyUI's own nodes, some of which need more packages than its models."""
    load()
    with torchvision():
        return pytest.importorskip(name)


@contextmanager
def torchvision() -> Iterator[None]:
    """Stand in for torchvision, which is imported, but not used here, within a `with`."""
    import transformers  # which asks once whether there is one

    assert transformers
    stubs = [name for name in ("torchvision", "torchvision.transforms") if name not in sys.modules]
    for name in stubs:
        sys.modules[name] = types.ModuleType(name)
    sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for name in stubs:
            del sys.modules[name]


FLUX = {
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 12,
    "context_in_dim": 20,
    "hidden_size": 32,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 3,
    "depth_single_blocks": 4,
    "axes_dim": [4, 6, 6],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": True,
}
HUNYUAN = {
    "byt5": False,
    "meanflow": False,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
    "meanflow_sum": False,
    "image_model": "hunyuan_video",
    "patch_size": [1, 2, 2],
}
UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": (1, 2),
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": 20,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "legacy": False,
    "adm_in_channels": None,
}
LTXV = {
    "image_model": "ltxv",
    "in_channels": 128,
    "cross_attention_dim": 32,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "caption_channels": 20,
    "num_layers": 6,
}
WAN = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "in_dim": 16,
    "out_dim": 16,
    "dim": 32,
    "ffn_dim": 64,
    "freq_dim": 16,
    "text_dim": 20,
    "num_heads": 2,
    "num_layers": 6,
    "text_len": 512,
}
SD3 = {
    "input_size": None,
    "patch_size": 2,
    "in_channels": 16,
    "depth": 4,
    "adm_in_channels": 12,
    "pos_embed_scaling_factor": None,
    "pos_embed_max_size": 8,
    "num_patches": 64,
    "qk_norm": "rms",
    "context_size": 20,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 20, "out_features": 256}},
}
SDXL = {
    **UNET,
    "model_channels": 64,
    "transformer_depth": [0, 2],
    "transformer_depth_output": [0, 0, 2, 2],
    "transformer_depth_middle": 2,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 12 + 256 * 6,
}
MOCHI = {
    "image_model": "mochi_preview",
    "depth": 5,
    "patch_size": 2,
    "num_heads": 2,
    "hidden_size_x": 32,
    "hidden_size_y": 24,
    "mlp_ratio_x": 384.0,  # it is read from weights of one size only
    "mlp_ratio_y": 2.0,
    "learn_sigma": False,
    "in_channels": 12,
    "qk_norm": True,
    "qkv_bias": False,
    "out_bias": True,
    "attn_drop": 0.0,
    "patch_embed_bias": True,
    "posenc_preserve_area": True,
    "timestep_mlp_bias": True,
    "attend_to_padding": False,
    "timestep_scale": 1000.0,
    "use_t5": True,
    "t5_feat_dim": 32,
    "t5_token_length": 8,
    "rope_theta": 10000.0,
}
PREDICT2 = {
    "image_model": "cosmos_predict2",
    "max_img_h": 16,
    "max_img_w": 16,
    "max_frames": 16,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "concat_padding_mask": True,
    "model_channels": 32,
    "num_blocks": 4,
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "crossattn_emb_channels": 20,
    "pos_emb_cls": "rope3d",
    "pos_emb_learnable": True,
    "pos_emb_interpolation": "crop",
    "use_adaln_lora": True,
    "adaln_lora_dim": 8,
    "extra_per_block_abs_pos_emb": False,
    "min_fps": 1,
    "max_fps": 30,
}
QWEN = {
    "image_model": "qwen_image",
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 20,
    "axes_dims_rope": (4, 6, 6),
}
CHROMA = {
    **FLUX,
    "image_model": "chroma",
    "in_channels": 64,
    "out_channels": 64,
    "in_dim": 64,
    "out_dim": 32,
    "hidden_dim": 32,
    "n_layers": 2,
    "txt_ids_dims": [],
}
Z_IMAGE = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 256,
    "cap_feat_dim": 20,
    "n_layers": 4,
    "qk_norm": True,
    "n_heads": 2,
    "n_kv_heads": 2,
    "axes_dims": [32, 48, 48],
    "axes_lens": [64, 64, 64],
    "z_image_modulation": True,
    "pad_tokens_multiple": 8,
}
LTX_2 = {
    **LTXV,
    "image_model": "ltxav",
    "audio_in_channels": 128,
    "audio_cross_attention_dim": 32,
    "audio_attention_head_dim": 16,
    "audio_num_attention_heads": 2,
    "caption_channels": 32,
    "connector_num_attention_heads": 2,
    "connector_attention_head_dim": 16,
    "connector_num_layers": 1,
}

# Name: class of the configuration, configuration, latents without the batch, width of the text, width of the pooled.
MODELS: dict[str, tuple[str, dict[str, Any], tuple[int, ...], int, int | None]] = {
    "LTXV": ("LTXV", LTXV, (128, 3, 2, 2), 20, None),
    "Wan": ("WAN21_T2V", WAN, (16, 3, 4, 4), 20, None),
    "HunyuanVideo": ("HunyuanVideo", {**FLUX, **HUNYUAN}, (16, 3, 4, 4), 20, 12),
    "Flux": ("Flux", {**FLUX, "image_model": "flux", "txt_ids_dims": []}, (16, 4, 4), 20, 12),
    "SD3": ("SD3", SD3, (16, 4, 4), 20, 12),
    "SD15": ("SD15", UNET, (4, 8, 8), 20, None),
    "SDXL": ("SDXL", SDXL, (4, 8, 8), 20, 12),
    "Mochi": ("GenmoMochi", MOCHI, (12, 3, 4, 4), 32, None),
    "Predict2": ("CosmosT2IPredict2", PREDICT2, (16, 2, 4, 4), 20, None),
    "Qwen": ("QwenImage", QWEN, (16, 1, 4, 4), 20, None),
    "Chroma": ("Chroma", CHROMA, (16, 4, 4), 20, 12),
    "Z-Image": ("ZImage", Z_IMAGE, (16, 4, 4), 20, None),
    "LTX-2": ("LTXAV", LTX_2, (128, 3, 2, 2), 32, None),
}

PARAMETERS = {
    "Flux": ("comfy.ldm.flux.model", "FluxParams"),
    "HunyuanVideo": ("comfy.ldm.hunyuan_video.model", "HunyuanVideoParams"),
    "Chroma": ("comfy.ldm.chroma.model", "ChromaParams"),
}


def build(name: str, seed: int = 0) -> Any:
    """Return a tiny `ModelPatcher`, as `UNETLoader` gives it."""
    load()
    import comfy.model_patcher
    import comfy.supported_models

    kind, given, *_ = MODELS[name]
    if not hasattr(comfy.supported_models, kind):
        pytest.skip(f"this version has no {kind}")
    if name in PARAMETERS:  # which have come one by one
        module, parameters = PARAMETERS[name]
        known = dataclasses.fields(getattr(importlib.import_module(module), parameters))
        given = {key: given[key] for key in given.keys() & {"image_model", *(field.name for field in known)}}
    config = getattr(comfy.supported_models, kind)(dict(given))
    config.set_inference_dtype(torch.float32, None)
    device = torch.device("cpu")
    model = config.get_model({}, "", device=device)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.diffusion_model.named_parameters():  # which ComfyUI leaves as they were in memory
        size = 1.0 / max(1, parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.4
        base = 1.0 if parameter.ndim == 1 and ("norm" in key or "scale" in key) else 0.0
        parameter.data = base + size * torch.randn(parameter.shape, generator=generator)
    for key, buffer in model.diffusion_model.named_buffers():
        if key.endswith("pos_embed") or not torch.isfinite(buffer.float()).all():
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


def conditioning(name: str, seed: int, **more: Any) -> list[Any]:
    """Return CONDITIONING, as a text encoder gives it."""
    *_, width, pooled = MODELS[name]
    generator = torch.Generator().manual_seed(seed)
    extra = dict(more)
    if pooled:
        extra["pooled_output"] = torch.randn(1, pooled, generator=generator)
    tokens = 8 if name == "Mochi" else 5
    if name in ("LTXV", "Mochi", "Z-Image"):
        extra["attention_mask"] = torch.ones(1, tokens, dtype=torch.long)
        extra["attention_mask"][:, 4:] = seed % 2 if name == "LTXV" else 1
    if name == "Z-Image":
        extra["num_tokens"] = tokens
    return [[torch.randn(1, tokens, width, generator=generator), extra]]


def latents(name: str, seed: int = 5, rows: int = 1) -> Any:
    """Return noise; for LTX-2, video and audio in one."""
    generator = torch.Generator().manual_seed(seed)
    video = torch.randn(rows, *MODELS[name][2], generator=generator)
    if name != "LTX-2":
        return video
    from comfy.nested_tensor import NestedTensor

    return NestedTensor([video, torch.randn(rows, 8, 5, 16, generator=generator)])


def nothing_of(noise: Any) -> Any:
    """Return the latents of nothing."""
    return noise * 0


def flat(found: Any) -> Tensor:
    """Return latents as one tensor."""
    if isinstance(found, Tensor):
        return found
    return torch.cat([part.flatten(1) for part in found.unbind()], 1)


def sample(patcher: Any, name: str, cfg: float = 3.0, steps: int = 3, rows: int = 1, **given: Any) -> Tensor:
    """Do what the KSampler node does."""
    import comfy.sample

    positive = given.pop("positive", None) or conditioning(name, 1)
    negative = given.pop("negative", None) or conditioning(name, 2)
    noise = latents(name, rows=rows)
    with torch.inference_mode():
        found = comfy.sample.sample(
            patcher, noise, steps, cfg, "euler", "simple", positive, negative, nothing_of(noise),
            disable_pbar=True, seed=0, **given,
        )  # fmt: skip
    return flat(found)


class Counting:
    """Counts the calls of modules within a `with`."""

    def __init__(self, *modules: nn.Module) -> None:
        self._modules = modules
        self.calls = 0

    def __enter__(self) -> Counting:
        def count(module: nn.Module, given: Any) -> None:
            self.calls += 1

        self._handles = [module.register_forward_pre_hook(count) for module in self._modules]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
