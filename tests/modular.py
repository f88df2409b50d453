"""Tiny random modular pipelines of diffusers, and a guider that makes every prediction in a pass of its own."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import diffusers
import torch
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from torch import Tensor, nn

from tests.installed import from_diffusers, skip_if_older
from tests.tiny_models import MODELS, HandThrough

STEPS = 3


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclasses.dataclass(frozen=True)
class Modular:
    """The denoising blocks of one family, a tiny model for them, and a call."""

    blocks: str
    model: str
    layer: str
    """A block; the table of tiny models says what it returns when it is bypassed."""
    call: Callable[[], dict[str, Any]]
    denoisers: Sequence[str] = ("transformer",)
    guiders: Sequence[str] = ("guider",)
    scheduler: str = "FlowMatchEulerDiscreteScheduler"
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What differs from the table of tiny models."""

    def build(self, guider: Callable[[], Any] | None = None) -> Any:
        """Return the pipeline with guiders of a kind, or with its own."""
        module, name = self.blocks.split(":")
        pipe = from_diffusers(f"modular_pipelines.{module}:{name}")().init_pipeline()
        parts: dict[str, Any] = {"scheduler": getattr(diffusers, self.scheduler)()}
        for seed, denoiser in enumerate(self.denoisers):
            tiny = dataclasses.replace(MODELS[self.model], config={**MODELS[self.model].config, **self.config})
            parts[denoiser] = tiny.build(self.model)
            next(parts[denoiser].parameters()).add_(0.1 * seed)
        pipe.update_components(**parts, **({} if guider is None else {name: guider() for name in self.guiders}))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def run(self, pipe: Any, output: str = "latents", **changes: Any) -> Tensor:
        """Make a run of three steps."""
        pipe.scheduler.set_timesteps(STEPS)
        call = {"timesteps": pipe.scheduler.timesteps, "num_inference_steps": STEPS, **self.call(), **changes}
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Unexpected input")
            try:
                found: Tensor = pipe(**call, output=output)
            except UserWarning as warning:
                skip_if_older(str(warning))
                raise
        return found


def text(*shape: int, name: str = "prompt_embeds") -> dict[str, Tensor]:
    """Embeddings of a prompt and of a negative prompt."""
    return {name: noise(1, *shape, seed=1), f"negative_{name}": noise(1, *shape, seed=2)}


def _qwen() -> dict[str, Any]:
    mask = torch.ones(1, 5, dtype=torch.bool)
    fields = {**text(5, 8), "prompt_embeds_mask": mask, "negative_prompt_embeds_mask": mask}
    shapes = [[(1, 2, 2)]]
    return {"latents": noise(1, 4, 16), "img_shapes": shapes, "denoiser_input_fields": {**fields, "img_shapes": shapes}}


def _sdxl() -> dict[str, Any]:
    ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]])
    fields = {**text(5, 8), **text(8, name="pooled_prompt_embeds"), "add_time_ids": ids, "negative_add_time_ids": ids}
    return {"latents": noise(1, 4, 8, 8), "denoiser_input_fields": fields}


def _ltx2() -> dict[str, Any]:
    mask = torch.ones(1, 5)
    audio_scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    audio_scheduler.set_timesteps(STEPS)
    return {
        "latents": noise(1, 8, 4), "audio_latents": noise(1, 7, 4, seed=5), "dtype": torch.float32,
        "audio_scheduler": audio_scheduler, "height": 64, "width": 64, "num_frames": 9, "use_cross_timestep": False,
        "denoiser_input_fields": {"audio_num_frames": 7},
        **text(5, 8, name="connector_prompt_embeds"), **text(5, 8, name="connector_audio_prompt_embeds"),
        "connector_attention_mask": mask, "negative_connector_attention_mask": mask,
    }  # fmt: skip


def _ltx() -> dict[str, Any]:
    mask = torch.ones(1, 5)
    return {
        "latents": noise(1, 8, 4), "dtype": torch.float32, "height": 64, "width": 64, "num_frames": 9,
        "rope_interpolation_scale": (8 / 25, 32, 32), **text(5, 8),
        "prompt_attention_mask": mask, "negative_prompt_attention_mask": mask,
    }  # fmt: skip


def _flux2() -> dict[str, Any]:
    ids = torch.zeros(1, 5, 4)
    return {
        "latents": noise(1, 7, 4), **text(5, 8), "txt_ids": ids, "negative_txt_ids": ids,
        "latent_ids": torch.arange(28.0).reshape(1, 7, 4),
    }  # fmt: skip


def _sd3() -> dict[str, Any]:
    return {"latents": noise(1, 4, 4, 4), **text(5, 8), **text(8, name="pooled_prompt_embeds")}


def _hunyuan() -> dict[str, Any]:
    masks = {f"{negative}prompt_embeds_mask": torch.ones(1, 5) for negative in ("", "negative_")}
    more = {f"{negative}prompt_embeds_mask_2": torch.ones(1, 2) for negative in ("", "negative_")}
    return {
        "latents": noise(1, 4, 2, 4, 4), "cond_latents_concat": noise(1, 4, 2, 4, 4, seed=7),
        "mask_concat": torch.zeros(1, 1, 2, 4, 4), "image_embeds": noise(1, 2, 8, seed=6),
        **text(5, 8), **masks, **text(2, 8, name="prompt_embeds_2"), **more,
    }  # fmt: skip


def _wan() -> dict[str, Any]:
    return {"latents": noise(1, 4, 2, 4, 4), "dtype": torch.float32, **text(5, 8)}


def _z_image() -> dict[str, Any]:
    embeds = {"prompt_embeds": [noise(3, 8, seed=1)], "negative_prompt_embeds": [noise(3, 8, seed=2)]}
    return {"latents": noise(1, 4, 4, 4), "dtype": torch.float32, **embeds}


SDXL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 56}
WAN_2 = {"denoisers": ("transformer", "transformer_2"), "guiders": ("guider", "guider_2")}
# fmt: off
MODULAR = {
    "wan": Modular("wan.denoise:WanDenoiseStep", "WanTransformer3DModel", "blocks.1", _wan),
    "wan22": Modular("wan.denoise:Wan22DenoiseStep", "WanTransformer3DModel", "blocks.1", _wan, **WAN_2),
    "ltx": Modular("ltx.denoise:LTXDenoiseStep", "LTXVideoTransformer3DModel", "transformer_blocks.1", _ltx),
    "ltx2": Modular("ltx2.denoise:LTX2DenoiseStep", "LTX2VideoTransformer3DModel", "transformer_blocks.1", _ltx2,
        guiders=("guider", "audio_guider"), config={"perturbed_attn": True}),
    "qwen": Modular("qwenimage.denoise:QwenImageDenoiseStep", "QwenImageTransformer2DModel", "transformer_blocks.1",
        _qwen),
    "sdxl": Modular("stable_diffusion_xl.denoise:StableDiffusionXLDenoiseStep", "UNet2DConditionModel",
        "mid_block.attentions.0", _sdxl, ("unet",), scheduler="EulerDiscreteScheduler", config=SDXL),
    "z_image": Modular("z_image.denoise:ZImageDenoiseStep", "ZImageTransformer2DModel", "layers.1", _z_image),
    "flux2": Modular("flux2.denoise:Flux2KleinBaseDenoiseStep", "Flux2Transformer2DModel", "transformer_blocks.1",
        _flux2),
    "sd3": Modular("stable_diffusion_3.denoise:StableDiffusion3DenoiseStep", "SD3Transformer2DModel",
        "transformer_blocks.1", _sd3),
    "hunyuan15": Modular("hunyuan_video1_5.denoise:HunyuanVideo15DenoiseStep", "HunyuanVideo15Transformer3DModel",
        "transformer_blocks.1", _hunyuan, config={"in_channels": 9}),
}
# fmt: on


def without(model: nn.Module, layer: str) -> nn.Module:
    """Return a copy of a model that lacks a block."""
    weak = copy.deepcopy(model)
    parent, _, name = layer.rpartition(".")
    skips = MODELS[type(model).__name__].skips
    returns = skips.get(layer) or next(iter(skips.values()))
    block = weak.get_submodule(layer)
    weak.get_submodule(parent)._modules[name] = HandThrough(block, returns)
    return weak


class ByHand(BaseGuidance):  # type: ignore[misc]
    """Makes a pass for each prediction, the weak ones by copies of the model, and writes the formula out."""

    _input_predictions: ClassVar = ["pred_cond", "pred_uncond", "pred_cond_weak"]
    spatio_temporal_guidance_blocks = None

    def __init__(
        self, layers: Sequence[str], scales: Sequence[float] = (1.0,), g: float = 5.0, rescale: float = 0.0
    ) -> None:
        super().__init__()
        self.register_to_config()
        self.layers, self.scales, self.g, self.rescale = layers, scales, g, rescale
        self.weak: dict[Any, nn.Module] = {}
        self.on: Callable[[int], bool] = lambda step: True

    def active_predictions(self) -> list[str]:
        weak = [f"pred_cond_weak_{layer}" for layer in self.layers] if self.on(self._step) else []
        return ["pred_cond", *(["pred_uncond"] if self.g != 1 else []), *weak]

    @property
    def num_conditions(self) -> int:
        return len(self.active_predictions())

    @property
    def is_conditional(self) -> bool:
        return self.active_predictions()[self._count_prepared - 1] != "pred_uncond"

    def prepare_inputs(self, data: Any) -> list[Any]:
        return [self._prepare_batch(data, int(n == "pred_uncond"), n) for n in self.active_predictions()]

    def prepare_inputs_from_block_state(self, data: Any, fields: Any) -> list[Any]:
        names = self.active_predictions()
        return [self._prepare_batch_from_block_state(fields, data, int(n == "pred_uncond"), n) for n in names]

    def prepare_models(self, denoiser: nn.Module) -> None:
        self._count_prepared += 1
        names = self.active_predictions()
        name = names[self._count_prepared - 1] if self._count_prepared <= len(names) else ""
        if name.startswith("pred_cond_weak"):
            layer = name.removeprefix("pred_cond_weak_")
            if (denoiser, layer) not in self.weak:
                self.weak[denoiser, layer] = without(denoiser, layer)
            denoiser.forward = self.weak[denoiser, layer].forward

    def cleanup_models(self, denoiser: nn.Module) -> None:
        denoiser.__dict__.pop("forward", None)

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None, **weaks: Tensor) -> Any:
        out = pred_cond if pred_uncond is None else pred_uncond + self.g * (pred_cond - pred_uncond)
        for scale, weak in zip(self.scales, weaks.values(), strict=False):
            out = out + scale * (pred_cond - weak)
        if self.rescale and weaks:
            dims = list(range(1, out.ndim))
            of_std = pred_cond.std(dims, keepdim=True) / out.std(dims, keepdim=True)
            out = out * (self.rescale * of_std + 1 - self.rescale)
        return GuiderOutput(pred=out, pred_cond=pred_cond, pred_uncond=pred_uncond)
