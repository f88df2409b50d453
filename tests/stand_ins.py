"""Narrow pipelines with random weights that the published settings take for the models they were made for."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from stg_hooks.guidance.published import Published
from tests import pipelines, stock_pipelines, zoo

_GOLDEN = {
    "MochiTransformer3DModel": "mochi",
    "LTXVideoTransformer3DModel": "ltx",
    "CogVideoXTransformer3DModel": "cogvideox",
    "HunyuanVideoTransformer3DModel": "hunyuan_video",
    "WanTransformer3DModel": "wan",
}
_STOCK = {
    "UNetSpatioTemporalConditionModel": "StableVideoDiffusionPipeline",
    "LTX2VideoTransformer3DModel": "LTX2Pipeline",
    "SD3Transformer2DModel": "StableDiffusion3Pipeline",
}


def build(setting: Published) -> tuple[Any, dict[str, Any]]:
    """Build a stock pipeline that a published setting fits, with as many blocks as the published model.

    Returns:
        The pipeline, and what to call it with besides guidance and steps.
    """
    pipe, inputs = _golden(setting) if setting.model in _GOLDEN else _stock(setting)
    model = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    assert setting.fits(model)
    if setting.schedule:  # much time at much noise, so that a few steps meet several levels
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=30.0)
    return pipe, inputs | {"output_type": "latent", "generator": torch.Generator().manual_seed(0)}


def _golden(setting: Published) -> tuple[Any, dict[str, Any]]:
    case = pipelines.load_case(_GOLDEN[setting.model])
    torch.manual_seed(0)
    config = case.config | setting.where
    if "num_attention_heads" in setting.where:  # as many heads, as narrow as can be
        config["attention_head_dim"] = 12
    model = getattr(diffusers, setting.model).from_config(config).eval()
    left_out = ("num_inference_steps", "guidance_scale")
    call = {name: value for name, value in case.info["call"].items() if name not in left_out}
    return pipelines.build_pipeline(case, model), {**case.inputs, **call}


def _stock(setting: Published) -> tuple[Any, dict[str, Any]]:
    stock = stock_pipelines.STOCK[_STOCK[setting.model]]
    pipe, call = stock.build(), stock.call()
    torch.manual_seed(0)
    if setting.model == "UNetSpatioTemporalConditionModel":
        config = {**zoo.FAMILIES["svd"].config, "cross_attention_dim": 8}
        pipe.unet = getattr(diffusers, setting.model)(**config).eval()
        pipe.unet.register_to_config(**setting.where)  # their width of 1024 only tells it from other models
        return pipe, {name: value for name, value in call.items() if "guidance" not in name}
    # The rest, such as cross_attn_mod and qk_norm, only tells versions apart.
    config = stock.config | {"num_layers": setting.where["num_layers"]}
    pipe.transformer = getattr(diffusers, setting.model)(**config).eval()
    pipe.transformer.register_to_config(**setting.where)
    kept = {name: value for name, value in call.items() if "guidance" not in name and "stg" not in name}
    return pipe, kept
