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

# Name: class of the configuration, configuration, latents without the batch, width of the text, width of the pooled.
MODELS: dict[str, tuple[str, dict[str, Any], tuple[int, ...], int, int | None]] = {
    "LTXV": ("LTXV", LTXV, (128, 3, 2, 2), 20, None),
    "Wan": ("WAN21_T2V", WAN, (16, 3, 4, 4), 20, None),
    "HunyuanVideo": ("HunyuanVideo", {**FLUX, **HUNYUAN}, (16, 3, 4, 4), 20, 12),
    "Flux": ("Flux", {**FLUX, "image_model": "flux", "txt_ids_dims": []}, (16, 4, 4), 20, 12),
    "SD3": ("SD3", SD3, (16, 4, 4), 20, 12),
    "SD15": ("SD15", UNET, (4, 8, 8), 20, None),
}

PARAMETERS = {
    "Flux": ("comfy.ldm.flux.model", "FluxParams"),
    "HunyuanVideo": ("comfy.ldm.hunyuan_video.model", "HunyuanVideoParams"),
}


def build(name: str, seed: int = 0) -> Any:
    """Return a tiny `ModelPatcher`, as `UNETLoader` gives it."""
    load()
    import comfy.model_patcher
    import comfy.supported_models

    kind, given, *_ = MODELS[name]
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
    if name == "LTXV":
        extra["attention_mask"] = torch.ones(1, 5, dtype=torch.long)
        extra["attention_mask"][:, 4:] = seed % 2
    return [[torch.randn(1, 5, width, generator=generator), extra]]


def latents(name: str, seed: int = 5, rows: int = 1) -> Tensor:
    return torch.randn(rows, *MODELS[name][2], generator=torch.Generator().manual_seed(seed))


def sample(patcher: Any, name: str, cfg: float = 3.0, steps: int = 3, rows: int = 1, **given: Any) -> Tensor:
    """Do what the KSampler node does."""
    import comfy.sample

    positive = given.pop("positive", None) or conditioning(name, 1)
    negative = given.pop("negative", None) or conditioning(name, 2)
    noise = latents(name, rows=rows)
    with torch.inference_mode():
        found: Tensor = comfy.sample.sample(
            patcher, noise, steps, cfg, "euler", "simple", positive, negative, torch.zeros_like(noise),
            disable_pbar=True, seed=0, **given,
        )  # fmt: skip
    return found


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
