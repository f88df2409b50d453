"""Stock diffusers pipelines around tiny random parts: what each is made of, how it is called, and what its calls are.

The table is written by hand, from the pipelines' source: it is what `stg_hooks.integrations` is checked against.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import diffusers
import peft
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from tests import zoo
from tests.installed import from_diffusers, made
from tests.pipelines import VAES

Rows = Literal["uncond+cond", "cond+uncond", "cond, uncond", "cond"]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclasses.dataclass(frozen=True)
class Stock:
    """One pipeline class.

    `rows` says what the first step's calls of the denoiser are while CFG is on: one call on `[uncond, cond]`, one on a
    list of cond and then uncond samples, a cond call and then an uncond call, or one cond call. `off` is what switches
    CFG off: then there is one cond call.
    """

    pipeline: str
    model: str | type[nn.Module]
    config: dict[str, Any]
    parts: Callable[[], dict[str, Any]]
    call: Callable[[], dict[str, Any]]
    rows: Rows
    off: dict[str, Any] | None
    layer: str
    identity: Callable[[], nn.Module]
    denoiser: str = "transformer"
    received: int = 0
    """Which of the scheduler's inputs in the first step is the guided prediction."""
    off_parts: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What switches CFG off, where that is a part of the pipeline."""
    own_calls: int = 0
    """Weak predictions of the pipeline's own that it makes in a step with CFG, after the others."""
    variant: str = ""
    channels: int | None = None
    """How many channels of a prediction are guided, where the others predict a variance."""
    normalised: Callable[[Tensor, Tensor], Tensor] | None = None
    """What the pipeline makes of its combined prediction while CFG is on, given the cond prediction."""

    def build(self) -> Any:
        cls = class_of(self.pipeline)
        parameters = inspect.signature(cls.__init__).parameters.values()
        absent = {p.name: None for p in parameters if p.name != "self" and p.default is inspect.Parameter.empty}
        pipe = cls(**{**absent, **self.parts(), self.denoiser: random_model(self.model, **self.config)})
        pipe.set_progress_bar_config(disable=True)
        return pipe


def class_of(name: str) -> Any:
    """Return a pipeline class, also where diffusers hides it because its tokenizer needs a package."""
    modules = {"Kolors": "kolors.pipeline_kolors", "KolorsPAG": "pag.pipeline_pag_kolors"}
    module = modules.get(name.removesuffix("Pipeline"))
    return from_diffusers(f"pipelines.{module}:{name}" if module else name)


def random_model(model_class: str | type[nn.Module], **config: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = made(model_class, **config) if isinstance(model_class, str) else model_class(**config)
    model = model.eval().requires_grad_(False)
    for parameter in model.parameters():  # some start at zero, and then a skip would change nothing
        parameter.copy_(0.2 * torch.randn_like(parameter) + (1.0 if parameter.ndim == 1 else 0.0))
    return model


def run(pipe: Any, call: dict[str, Any], **changes: Any) -> Tensor:
    """Call a pipeline for two steps with a fresh generator, and return the latents (the video's, of several)."""
    common = {"generator": torch.Generator().manual_seed(7), "num_inference_steps": 2, "output_type": "latent"}
    torch.manual_seed(7)  # some encode images with the global generator
    output = pipe(**{**common, "return_dict": False, **call, **changes})[0]
    latents: Tensor = torch.cat(output, dim=2) if isinstance(output, list) else torch.as_tensor(output)
    return latents


class UNetWithImages(diffusers.UNet2DConditionModel):
    """A U-Net with an IP-Adapter: its prompt is joined by tokens of an image, for which it has keys of their own."""

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        cross, tokens, width = config["cross_attention_dim"], 4, 6
        project = {"proj.weight": torch.empty(tokens * cross, width), "proj.bias": torch.empty(tokens * cross)}
        norm = {"norm.weight": torch.empty(cross), "norm.bias": torch.empty(cross)}
        names = [name for name in self.attn_processors if name.endswith("attn2.processor")]
        sizes = [self.get_submodule(name.removesuffix(".processor")).inner_dim for name in names]
        keys = {
            f"{2 * i + 1}.to_{which}_ip.weight": torch.empty(size, cross)
            for i, size in enumerate(sizes)
            for which in "kv"
        }
        self._load_ip_adapter_weights([{"image_proj": {**project, **norm}, "ip_adapter": keys}])


class UNetWithLora(diffusers.UNet2DConditionModel):
    """A U-Net with a LoRA that is not fused."""

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v", "to_out.0"]))


class StopHereError(Exception):
    """The scheduler has been given what was wanted."""


@contextmanager
def received(pipe: Any, wanted: int | None = None) -> Iterator[list[Tensor]]:
    """Record what the scheduler, and copies of it, are given as the prediction; stop at the wanted one, if any."""
    cls = type(pipe.scheduler)
    step, inputs = cls.step, []

    @functools.wraps(step)  # some pipelines read the signature
    def recorded(self: Any, model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        inputs.append(model_output.clone())
        if wanted is not None and len(inputs) > wanted:
            raise StopHereError
        return step(self, model_output, *args, **kwargs)

    cls.step = recorded
    try:
        yield inputs
    finally:
        cls.step = step


@functools.cache
def vae(name: str) -> nn.Module:
    torch.manual_seed(0)
    return VAES[name]().eval()


@functools.cache
def part(name: str, **config: Any) -> Any:
    return made(name, **config)


def euler(**config: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def image(size: int = 16) -> Tensor:
    return noise(1, 3, size, size, seed=5).clamp(-1, 1)


def clip(frames: int, size: int = 16) -> Tensor:
    return noise(frames, 3, size, size, seed=5).sigmoid()


def prompts(tokens: int = 3, dim: int = 8, **more: Any) -> dict[str, Any]:
    """Embeddings of a prompt and of a negative one, with as many tokens each."""
    return {
        "prompt_embeds": noise(1, tokens, dim, seed=1),
        "negative_prompt_embeds": noise(1, tokens, dim, seed=2),
        "guidance_scale": 3.0,
        **more,
    }


def masks(tokens: int = 3, dtype: torch.dtype = torch.long) -> dict[str, Any]:
    return {
        "prompt_attention_mask": torch.ones(1, tokens, dtype=dtype),
        "negative_prompt_attention_mask": torch.ones(1, tokens, dtype=dtype),
    }


def pooled(dim: int = 8) -> dict[str, Any]:
    return {
        "pooled_prompt_embeds": noise(1, dim, seed=3),
        "negative_pooled_prompt_embeds": noise(1, dim, seed=4),
    }


class NoChecker(nn.Module):
    """In place of Cosmos' safety checker, which is a package of its own."""

    device, dtype = torch.device("cpu"), torch.float32

    def check_text_safety(self, prompt: str) -> bool:
        return True


class ImageEncoder(nn.Module):
    """In place of CLIP's or SigLIP's: a linear map of the image's mean colour."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.register_parameter("weight", nn.Parameter(noise(3, width, seed=6)))

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        embeds = pixel_values.mean((-2, -1)) @ self.weight
        return SimpleNamespace(image_embeds=embeds, last_hidden_state=embeds[:, None])


class FeatureExtractor:
    crop_size: ClassVar = {"width": 32, "height": 32}

    def __call__(self, images: Any, **kwargs: Any) -> Any:
        return transformers.BatchFeature({"pixel_values": torch.as_tensor(images)})


NO_CFG = {"guidance_scale": 1.0}
WAN = {**zoo.FAMILIES["wan"].config, "in_channels": 16, "out_channels": 16}
HUNYUAN = {**zoo.FAMILIES["hunyuan_video"].config, "guidance_embeds": True}
LTX = {**zoo.FAMILIES["ltx"].config, "in_channels": 8, "out_channels": 8}
COGVIDEOX = {**zoo.FAMILIES["cogvideox"].config, "max_text_seq_length": 3}
COSMOS = {
    "in_channels": 16,
    "concat_padding_mask": False,  # or it needs torchvision
    "out_channels": 16,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 3,
    "mlp_ratio": 2,
    "text_embed_dim": 8,
    "adaln_lora_dim": 4,
    "max_size": (4, 32, 32),
    "extra_pos_embed_type": None,
}
FLUX = {**zoo.FAMILIES["flux"].config, "guidance_embeds": True}
SD3 = zoo.FAMILIES["sd3"].config
UNET = zoo.FAMILIES["unet2d"].config
TRUE_CFG = {"true_cfg_scale": 3.0}
NO_TRUE_CFG = {"true_cfg_scale": 1.0}
LTX2_OFF = {
    **dict.fromkeys(("stg_scale", "audio_stg_scale", "guidance_rescale", "audio_guidance_rescale"), 0.0),
    **dict.fromkeys(("modality_scale", "audio_modality_scale"), 1.0),
    "audio_guidance_scale": 3.0,
}


def to_norm_of_cond(cond: Tensor, prediction: Tensor) -> Tensor:
    return prediction * (cond.norm(dim=-1, keepdim=True) / prediction.norm(dim=-1, keepdim=True))


class KeepVideoAndAudio(nn.Module):
    """LTX-2: (video, audio) in, (video, audio) out."""

    def forward(self, hidden_states: Tensor, audio_hidden_states: Tensor, **kwargs: Any) -> Any:
        return hidden_states, audio_hidden_states


class KeepTextAndImage(nn.Module):
    """AuraFlow: (image, text) in, (text, image) out."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return encoder_hidden_states, hidden_states


# fmt: off
_TABLE = [
    # --- video ---
    Stock(
        "LTXImageToVideoPipeline", "LTXVideoTransformer3DModel",
        LTX,
        lambda: {"vae": vae("ltx"), "scheduler": euler()},
        lambda: {**prompts(), **masks(), "image": image(32), "height": 32, "width": 32, "num_frames": 9},
        "uncond+cond", NO_CFG, "transformer_blocks.1", zoo.KeepHiddenStates,
    ),
    Stock(
        "LTXConditionPipeline", "LTXVideoTransformer3DModel",
        LTX,
        lambda: {"vae": vae("ltx"), "scheduler": euler()},
        lambda: {**prompts(), **masks(), "image": image(32), "height": 32, "width": 32, "num_frames": 9},
        "uncond+cond", NO_CFG, "transformer_blocks.1", zoo.KeepHiddenStates,
    ),
    Stock(
        "CogVideoXImageToVideoPipeline", "CogVideoXTransformer3DModel",
        {**COGVIDEOX, "in_channels": 8},
        lambda: {"vae": vae("cogvideox"), "scheduler": diffusers.CogVideoXDDIMScheduler()},
        lambda: prompts(image=image(), height=16, width=16, num_frames=8, max_sequence_length=3),
        "uncond+cond", NO_CFG, "transformer_blocks.1", zoo.KeepStreams,
    ),
    Stock(
        "CogVideoXVideoToVideoPipeline", "CogVideoXTransformer3DModel",
        COGVIDEOX,
        lambda: {"vae": vae("cogvideox"), "scheduler": diffusers.CogVideoXDDIMScheduler()},
        lambda: prompts(video=clip(8)[None], height=16, width=16, strength=1.0, max_sequence_length=3),
        "uncond+cond", NO_CFG, "transformer_blocks.1", zoo.KeepStreams,
    ),
    Stock(
        "HunyuanVideoImageToVideoPipeline", "HunyuanVideoTransformer3DModel",
        {**HUNYUAN, "in_channels": 9, "guidance_embeds": False, "image_condition_type": "latent_concat"},
        lambda: {"vae": vae("hunyuan_video"), "scheduler": euler()},
        lambda: prompts(**pooled(), **masks(), **TRUE_CFG, image=image(), height=16, width=16, num_frames=5),
        "cond, uncond", NO_TRUE_CFG, "transformer_blocks.1", zoo.KeepStreams,
    ),
    Stock(
        "HunyuanVideoFramepackPipeline", "HunyuanVideoFramepackTransformer3DModel",
        {**HUNYUAN, "has_image_proj": True, "image_proj_dim": 8, "has_clean_x_embedder": True},
        lambda: {"vae": vae("hunyuan_video"), "scheduler": euler(), "image_encoder": ImageEncoder(),
            "feature_extractor": FeatureExtractor()},
        lambda: prompts(**pooled(), **masks(), **TRUE_CFG, image=image(), height=16, width=16, num_frames=5,
            latent_window_size=3),
        "cond, uncond", NO_TRUE_CFG, "transformer_blocks.1", zoo.KeepStreams,
    ),
    Stock(
        "HunyuanVideo15Pipeline", "HunyuanVideo15Transformer3DModel",
        {"in_channels": 9, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 3,
            "num_refiner_layers": 1, "mlp_ratio": 2.0, "text_embed_dim": 8, "text_embed_2_dim": 8,
            "image_embed_dim": 8, "rope_axes_dim": (4, 6, 6), "target_size": 16, "task_type": "t2v"},
        lambda: {"vae": part("AutoencoderKLHunyuanVideo15", latent_channels=4, block_out_channels=(8, 8, 8, 8, 8),
            layers_per_block=1), "scheduler": euler(),
            "guider": diffusers.ClassifierFreeGuidance(guidance_scale=3.0)},
        lambda: {**{k: v for k, v in prompts().items() if k != "guidance_scale"}, "prompt_embeds_2": noise(1, 3, 8,
            seed=3), "negative_prompt_embeds_2": noise(1, 3, 8, seed=4), **dict.fromkeys(("prompt_embeds_mask",
            "negative_prompt_embeds_mask", "prompt_embeds_mask_2", "negative_prompt_embeds_mask_2"), torch.ones(1, 3,
            dtype=torch.long)), "height": 32, "width": 32, "num_frames": 5},
        "cond, uncond", {}, "transformer_blocks.1", zoo.KeepStreams,
            off_parts={"guider": diffusers.ClassifierFreeGuidance(guidance_scale=1.0)},
    ),
    Stock(
        "WanImageToVideoPipeline", "WanTransformer3DModel",
        {**WAN, "in_channels": 36},
        lambda: {"vae": vae("wan"), "scheduler": euler()},
        lambda: prompts(image=image(), height=16, width=16, num_frames=5),
        "cond, uncond", NO_CFG, "blocks.1", zoo.KeepHiddenStates,
    ),
    Stock(
        "WanVideoToVideoPipeline", "WanTransformer3DModel",
        WAN,
        lambda: {"vae": vae("wan"), "scheduler": euler()},
        lambda: prompts(video=clip(5)[None], height=16, width=16, strength=1.0),
        "cond, uncond", NO_CFG, "blocks.1", zoo.KeepHiddenStates,
    ),
    Stock(
        "WanVACEPipeline", "WanVACETransformer3DModel",
        {**WAN, "vace_layers": [0, 2], "vace_in_channels": 96},
        lambda: {"vae": vae("wan"), "scheduler": euler()},
        lambda: prompts(height=16, width=16, num_frames=5),
        "cond, uncond", NO_CFG, "blocks.1", zoo.KeepHiddenStates,
    ),
    Stock(
        "SkyReelsV2Pipeline", "SkyReelsV2Transformer3DModel",
        WAN,
        lambda: {"vae": vae("wan"), "scheduler": part("UniPCMultistepScheduler", prediction_type="flow_prediction",
            use_flow_sigmas=True)},
        lambda: prompts(height=16, width=16, num_frames=5),
        "cond, uncond", NO_CFG, "blocks.1", zoo.KeepHiddenStates,
    ),
    Stock(
        "SkyReelsV2DiffusionForcingPipeline", "SkyReelsV2Transformer3DModel",
        {**WAN, "inject_sample_info": False},
        lambda: {"vae": vae("wan"), "scheduler": part("UniPCMultistepScheduler", prediction_type="flow_prediction",
            use_flow_sigmas=True)},
        lambda: prompts(prompt=None, height=16, width=16, num_frames=5, base_num_frames=5, fps=16),
        "cond, uncond", NO_CFG, "blocks.1", zoo.KeepHiddenStates,
    ),
    Stock(
        "CosmosTextToWorldPipeline", "CosmosTransformer3DModel",
        COSMOS,
        lambda: {"vae": part("AutoencoderKLCosmos", latent_channels=16, encoder_block_out_channels=(8, 8, 8, 8),
            decode_block_out_channels=(8, 8, 8, 8), attention_resolutions=(8,), resolution=64, num_layers=1,
            patch_size=4), "scheduler": diffusers.EDMEulerScheduler(sigma_data=0.5, final_sigmas_type="sigma_min"),
            "safety_checker": NoChecker()},
        lambda: prompts(height=32, width=32, num_frames=9),
        "cond, uncond", NO_CFG, "transformer_blocks.1", zoo.KeepHiddenStates, received=1,
    ),
    Stock(
        "Cosmos2VideoToWorldPipeline", "CosmosTransformer3DModel",
        {**COSMOS, "in_channels": 17},
        lambda: {"vae": vae("wan"), "scheduler": euler(use_karras_sigmas=True), "safety_checker": NoChecker()},
        lambda: prompts(image=image(), height=16, width=16, num_frames=5),
        "cond, uncond", NO_CFG, "transformer_blocks.1", zoo.KeepHiddenStates,
    ),
    Stock(
        "Cosmos2TextToImagePipeline", "CosmosTransformer3DModel",
        COSMOS,
        lambda: {"vae": vae("wan"), "scheduler": euler(use_karras_sigmas=True), "safety_checker": NoChecker()},
        lambda: prompts(height=32, width=32),
        "cond, uncond", NO_CFG, "transformer_blocks.2", zoo.KeepHiddenStates,
    ),
    Stock(
        "Kandinsky5T2VPipeline", "Kandinsky5Transformer3DModel",
        {"in_visual_dim": 4, "in_text_dim": 8, "in_text_dim2": 8, "time_dim": 8, "out_visual_dim": 4, "model_dim": 16,
            "ff_dim": 16, "num_text_blocks": 1, "num_visual_blocks": 3, "axes_dims": (2, 2, 4)},
        lambda: {"vae": vae("hunyuan_video"), "scheduler": euler()},
        lambda: {"prompt_embeds_qwen": noise(1, 3, 8, seed=1), "negative_prompt_embeds_qwen": noise(1, 3, 8, seed=2),
            "prompt_embeds_clip": noise(1, 8, seed=3), "negative_prompt_embeds_clip": noise(1, 8, seed=4),
            "prompt_cu_seqlens": torch.tensor([0, 3]), "negative_prompt_cu_seqlens": torch.tensor([0, 3]),
            "guidance_scale": 3.0, "height": 16, "width": 16, "num_frames": 5},
        "cond, uncond", NO_CFG, "visual_transformer_blocks.1", zoo.KeepHiddenStates,
    ),
    Stock(
        "LattePipeline", "LatteTransformer3DModel",
        {"sample_size": 8, "num_layers": 2, "patch_size": 2, "attention_head_dim": 8, "num_attention_heads": 2,
            "caption_channels": 8, "in_channels": 4, "cross_attention_dim": 16, "out_channels": 8,
            "attention_bias": True, "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single", "norm_elementwise_affine": False, "video_length": 2},
        lambda: {"vae": None, "scheduler": diffusers.DDIMScheduler()},
        lambda: prompts(height=64, width=64, video_length=2, clean_caption=False, mask_feature=False,
            negative_prompt=None),
        "uncond+cond", NO_CFG, "transformer_blocks.1", zoo.KeepHiddenStates,
    ),
    Stock(
        "AllegroPipeline", "AllegroTransformer3DModel",
        {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 3, "cross_attention_dim": 24,
            "sample_width": 8, "sample_height": 8, "sample_frames": 3, "caption_channels": 8},
        lambda: {"vae": None, "scheduler": diffusers.DDIMScheduler()},
        lambda: prompts(**masks(), height=64, width=64, num_frames=12, negative_prompt=None),
        "uncond+cond", NO_CFG, "transformer_blocks.1", zoo.KeepHiddenStates,
    ),
    Stock(
        "EasyAnimatePipeline", "EasyAnimateTransformer3DModel",
        {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 2,
            "text_embed_dim": 8, "num_layers": 3, "sample_width": 16, "sample_height": 16, "patch_size": 2},
        lambda: {"vae": part("AutoencoderKLMagvit", block_out_channels=(8, 8, 8, 8),
            down_block_types=("SpatialDownBlock3D", *("SpatialTemporalDownBlock3D",) * 3),
            up_block_types=("SpatialUpBlock3D", *("SpatialTemporalUpBlock3D",) * 3), latent_channels=4,
            layers_per_block=1, norm_num_groups=2, spatial_group_norm=False), "scheduler": euler()},
        lambda: prompts(**masks(), height=32, width=32, num_frames=5),
        "uncond+cond", NO_CFG, "transformer_blocks.1", zoo.KeepStreams,
    ),
    Stock(
        "SanaVideoPipeline", "SanaVideoTransformer3DModel",
        {"in_channels": 16, "out_channels": 16, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 3,
            "num_cross_attention_heads": 2, "cross_attention_head_dim": 12, "cross_attention_dim": 24,
            "caption_channels": 8, "mlp_ratio": 2.5, "sample_size": 8, "rope_max_seq_len": 32},
        lambda: {"vae": vae("wan"), "scheduler": euler()},
        lambda: prompts(**masks(), height=32, width=32, frames=5, use_resolution_binning=False, negative_prompt=None),
        "uncond+cond", NO_CFG, "transformer_blocks.1", zoo.KeepHiddenStates,
    ),
    Stock(
        "TextToVideoSDPipeline", "UNet3DConditionModel",
        {"block_out_channels": (8, 16), "layers_per_block": 1, "sample_size": 8,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"), "up_block_types": ("UpBlock3D",
            "CrossAttnUpBlock3D"), "cross_attention_dim": 8, "attention_head_dim": 4, "norm_num_groups": 2},
        lambda: {"vae": None, "scheduler": diffusers.DDIMScheduler()},
        lambda: prompts(height=64, width=64, num_frames=2),
        "uncond+cond", NO_CFG, "mid_block.attentions.0", zoo.KeepInTuple, "unet",
    ),
    Stock(
        "StableVideoDiffusionPipeline", "UNetSpatioTemporalConditionModel",
        {**zoo.FAMILIES["svd"].config, "block_out_channels": (32, 64), "cross_attention_dim": 8,
            "num_attention_heads": (2, 2), "down_block_types": ("CrossAttnDownBlockSpatioTemporal",
            "DownBlockSpatioTemporal"), "up_block_types": ("UpBlockSpatioTemporal",
            "CrossAttnUpBlockSpatioTemporal")},
        lambda: {"vae": part("AutoencoderKLTemporalDecoder", block_out_channels=(32,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4),
            "scheduler": diffusers.EulerDiscreteScheduler(prediction_type="v_prediction", use_karras_sigmas=True,
            timestep_type="continuous", sigma_min=0.002, sigma_max=700.0), "image_encoder": ImageEncoder(),
            "feature_extractor": FeatureExtractor()},
        lambda: {"image": image(64), "height": 64, "width": 64, "num_frames": 3, "min_guidance_scale": 1.5},
        "uncond+cond", {"min_guidance_scale": 1.0, "max_guidance_scale": 1.0}, "mid_block.attentions.0",
            zoo.KeepInTuple, "unet",
    ),
    Stock(
        "AnimateDiffPipeline", "UNetMotionModel",
        {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 2,
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"), "up_block_types": ("UpBlockMotion",
            "CrossAttnUpBlockMotion"), "cross_attention_dim": 8, "num_attention_heads": 2,
            "motion_num_attention_heads": 2},
        lambda: {"vae": part("AutoencoderKL", block_out_channels=(4,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=1), "scheduler": diffusers.DDIMScheduler(), "motion_adapter": part("MotionAdapter",
            block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=2,
            motion_num_attention_heads=2)},
        lambda: prompts(height=64, width=64, num_frames=3),
        "uncond+cond", NO_CFG, "mid_block.attentions.0", zoo.KeepInTuple, "unet",
    ),
    Stock(
        "I2VGenXLPipeline", "I2VGenXLUNet",
        {"block_out_channels": (8, 16), "layers_per_block": 1, "sample_size": 8,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"), "up_block_types": ("UpBlock3D",
            "CrossAttnUpBlock3D"), "cross_attention_dim": 8, "attention_head_dim": 4, "num_attention_heads": None,
            "norm_num_groups": 2},
        lambda: {"vae": part("AutoencoderKL", block_out_channels=(4,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=1), "scheduler": diffusers.DDIMScheduler(), "image_encoder": ImageEncoder(),
            "feature_extractor": FeatureExtractor()},
        lambda: prompts(image=Image.new("RGB", (64, 64), (200, 30, 90)), height=64, width=64, num_frames=3),
        "uncond+cond", NO_CFG, "mid_block.attentions.0", zoo.KeepInTuple, "unet",
    ),
    Stock(
        "LTX2Pipeline", "LTX2VideoTransformer3DModel",
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8,
            "cross_attention_dim": 16, "audio_in_channels": 8, "audio_out_channels": 8,
            "audio_num_attention_heads": 2, "audio_attention_head_dim": 4, "audio_cross_attention_dim": 8,
            "num_layers": 3, "caption_channels": 8, "rope_double_precision": False, "perturbed_attn": True},
        lambda: {"scheduler": euler(), "vae": part("AutoencoderKLLTX2Video", latent_channels=4,
            block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 3, layers_per_block=(1,) * 5,
            decoder_layers_per_block=(1,) * 4), "audio_vae": part("AutoencoderKLLTX2Audio", base_channels=8,
            ch_mult=(1,), num_res_blocks=1, latent_channels=2, mel_bins=16),
            "connectors": random_model("pipelines.ltx2.connectors:LTX2TextConnectors",
            caption_channels=8, text_proj_in_factor=1,
            video_connector_num_attention_heads=2, video_connector_attention_head_dim=4, video_connector_num_layers=1,
            video_connector_num_learnable_registers=None, audio_connector_num_attention_heads=2,
            audio_connector_attention_head_dim=4, audio_connector_num_layers=1,
            audio_connector_num_learnable_registers=None, rope_double_precision=False)},
        lambda: {**prompts(), **masks(), **LTX2_OFF, "height": 64, "width": 96, "num_frames": 17},
        "uncond+cond", {"guidance_scale": 1.0, "audio_guidance_scale": 1.0}, "transformer_blocks.1",
            KeepVideoAndAudio,
    ),
    # --- images ---
    Stock(
        "FluxPipeline", "FluxTransformer2DModel",
        FLUX,
        lambda: {"vae": None, "scheduler": euler()},
        lambda: prompts(**pooled(), **TRUE_CFG, height=32, width=32),
        "cond, uncond", NO_TRUE_CFG, "transformer_blocks.1", zoo.KeepTextFirst,
    ),
    Stock(
        "FluxKontextPipeline", "FluxTransformer2DModel",
        FLUX,
        lambda: {"vae": None, "scheduler": euler()},
        lambda: prompts(**pooled(), **TRUE_CFG, height=32, width=32, max_area=1024, _auto_resize=False),
        "cond, uncond", NO_TRUE_CFG, "single_transformer_blocks.0", zoo.KeepTextFirst,
    ),
    Stock(
        "FluxControlPipeline", "FluxTransformer2DModel",
        {**FLUX, "in_channels": 8, "out_channels": 4},
        lambda: {"vae": part("AutoencoderKL", block_out_channels=(4,), latent_channels=1, norm_num_groups=1,
            shift_factor=0.0), "scheduler": euler()},
        lambda: {"prompt_embeds": noise(1, 3, 8, seed=1), "pooled_prompt_embeds": noise(1, 8, seed=3),
            "control_image": image(), "height": 16, "width": 16},
        "cond", None, "transformer_blocks.1", zoo.KeepTextFirst,
    ),
    Stock(
        "StableDiffusionPipeline", "UNet2DConditionModel",
        UNET,
        lambda: {"vae": None, "scheduler": diffusers.DDIMScheduler(), "requires_safety_checker": False},
        lambda: prompts(),
        "uncond+cond", NO_CFG, "mid_block.attentions.0", zoo.KeepInTuple, "unet",
    ),
    Stock(
        "StableDiffusionPipeline", UNetWithImages,
        UNET,
        lambda: {"vae": None, "scheduler": diffusers.DDIMScheduler(), "requires_safety_checker": False},
        lambda: prompts(ip_adapter_image_embeds=[noise(2, 1, 6, seed=3)]),
        "uncond+cond", {**NO_CFG, "ip_adapter_image_embeds": [noise(1, 1, 6, seed=3)]}, "mid_block.attentions.0",
        zoo.KeepInTuple, "unet", variant="with IP-Adapter",
    ),
    Stock(
        "StableDiffusionPipeline", UNetWithLora,
        UNET,
        lambda: {"vae": None, "scheduler": diffusers.DDIMScheduler(), "requires_safety_checker": False},
        lambda: prompts(),
        "uncond+cond", NO_CFG, "mid_block.attentions.0", zoo.KeepInTuple, "unet", variant="with LoRA",
    ),
    Stock(
        "StableDiffusionControlNetPipeline", "UNet2DConditionModel",
        UNET,
        lambda: {"vae": None, "scheduler": diffusers.DDIMScheduler(), "requires_safety_checker": False,
            "controlnet": random_model("ControlNetModel", **{k: v for k, v in UNET.items() if k not in ("sample_size",
            "out_channels", "up_block_types")}, conditioning_embedding_out_channels=(4,) * 4)},
        lambda: prompts(image=image(64).sigmoid()),
        "uncond+cond", NO_CFG, "mid_block.attentions.0", zoo.KeepInTuple, "unet",
    ),
    Stock(
        "IFPipeline", "UNet2DConditionModel",
        {**UNET, "in_channels": 3, "out_channels": 6},
        lambda: {"scheduler": diffusers.DDPMScheduler(variance_type="learned_range")},
        lambda: prompts(),
        "uncond+cond", NO_CFG, "mid_block.attentions.0", zoo.KeepInTuple, "unet", channels=3,
    ),
    Stock(
        "KandinskyV22Pipeline", "UNet2DConditionModel",
        {**UNET, "out_channels": 8, "encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 8,
            "addition_embed_type": "image", "addition_embed_type_num_heads": 2},
        lambda: {"scheduler": diffusers.DDPMScheduler(variance_type="learned_range"), "movq": random_model(
            "VQModel", block_out_channels=(4,), norm_num_groups=2, num_vq_embeddings=4, latent_channels=4)},
        lambda: {"image_embeds": noise(1, 8, seed=1), "negative_image_embeds": noise(1, 8, seed=2),
            "height": 8, "width": 8, "guidance_scale": 3.0},
        "uncond+cond", NO_CFG, "mid_block.attentions.0", zoo.KeepInTuple, "unet", channels=4,
    ),
    Stock(
        "StableDiffusionXLPipeline", "UNet2DConditionModel",
        {**UNET, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 56},
        lambda: {"vae": None, "scheduler": diffusers.EulerDiscreteScheduler()},
        lambda: prompts(**pooled()),
        "uncond+cond", NO_CFG, "up_blocks.1.attentions.0", zoo.KeepInTuple, "unet",
    ),
    Stock(
        "KolorsPipeline", "UNet2DConditionModel",
        {**UNET, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 56, "encoder_hid_dim": 12, "encoder_hid_dim_type": "text_proj"},
        lambda: {"vae": None, "scheduler": diffusers.EulerDiscreteScheduler()},
        lambda: {**prompts(**pooled()), "prompt_embeds": noise(1, 3, 12, seed=5),
            "negative_prompt_embeds": noise(1, 3, 12, seed=6)},
        "uncond+cond", NO_CFG, "up_blocks.1.attentions.0", zoo.KeepInTuple, "unet",
    ),
    Stock(
        "StableDiffusion3Pipeline", "SD3Transformer2DModel",
        SD3,
        lambda: {"vae": None, "scheduler": euler()},
        lambda: prompts(**pooled(), height=32, width=32),
        "uncond+cond", NO_CFG, "transformer_blocks.1", zoo.KeepTextFirst,
    ),
    Stock(
        "PixArtSigmaPipeline", "PixArtTransformer2DModel",
        {"sample_size": 8, "num_layers": 3, "patch_size": 2, "attention_head_dim": 8, "num_attention_heads": 2,
            "caption_channels": 8, "cross_attention_dim": 16, "in_channels": 4, "out_channels": 8,
            "use_additional_conditions": False},
        lambda: {"vae": None, "scheduler": diffusers.DDIMScheduler()},
        lambda: prompts(**masks(), height=64, width=64, use_resolution_binning=False, negative_prompt=None),
        "uncond+cond", NO_CFG, "transformer_blocks.1", zoo.KeepHiddenStates,
    ),
    Stock(
        "SanaPipeline", "SanaTransformer2DModel",
        {"patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 3, "num_attention_heads": 2,
            "attention_head_dim": 4, "num_cross_attention_heads": 2, "cross_attention_head_dim": 4,
            "cross_attention_dim": 8, "caption_channels": 8, "sample_size": 4},
        lambda: {"vae": None, "scheduler": euler()},
        lambda: prompts(**masks(), height=128, width=128, use_resolution_binning=False, negative_prompt=None),
        "uncond+cond", NO_CFG, "transformer_blocks.1", zoo.KeepHiddenStates,
    ),
    Stock(
        "HunyuanDiTPipeline", "HunyuanDiT2DModel",
        {"sample_size": 8, "num_layers": 4, "patch_size": 2, "attention_head_dim": 8, "num_attention_heads": 2,
            "in_channels": 4, "cross_attention_dim": 8, "cross_attention_dim_t5": 8, "pooled_projection_dim": 8,
            "hidden_size": 16, "text_len": 3, "text_len_t5": 3, "activation_fn": "gelu-approximate"},
        lambda: {"vae": None, "scheduler": diffusers.DDPMScheduler(), "requires_safety_checker": False},
        lambda: prompts(**masks(), **{f"{name}_2": value for name, value in {**prompts(),
            **masks()}.items() if name != "guidance_scale"}, height=64, width=64, use_resolution_binning=False),
        "uncond+cond", NO_CFG, "blocks.1", zoo.KeepHiddenStates,
    ),
    Stock(
        "Lumina2Pipeline", "Lumina2Transformer2DModel",
        {"sample_size": 4, "patch_size": 2, "in_channels": 4, "hidden_size": 24, "num_layers": 3,
            "num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 2,
            "axes_dim_rope": (4, 4, 4), "axes_lens": (32, 32, 32), "cap_feat_dim": 8},
        lambda: {"vae": None, "scheduler": euler()},
        lambda: prompts(**masks(), height=32, width=32),
        "cond, uncond", NO_CFG, "layers.1", zoo.KeepHiddenStates, normalised=to_norm_of_cond,
    ),
    Stock(
        "ChromaPipeline", "ChromaTransformer2DModel",
        {"patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
            "num_attention_heads": 2, "joint_attention_dim": 8, "axes_dims_rope": (4, 4, 8),
            "approximator_hidden_dim": 32, "approximator_layers": 1, "approximator_num_channels": 16},
        lambda: {"vae": None, "scheduler": euler()},
        lambda: prompts(**masks(dtype=torch.bool), height=32, width=32),
        "cond, uncond", NO_CFG, "transformer_blocks.1", zoo.KeepTextFirst,
    ),
    Stock(
        "QwenImagePipeline", "QwenImageTransformer2DModel",
        {"patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 3, "attention_head_dim": 16,
            "num_attention_heads": 2, "joint_attention_dim": 8, "guidance_embeds": False, "axes_dims_rope": (8, 4,
            4)},
        lambda: {"vae": None, "scheduler": euler()},
        lambda: {**prompts(), **TRUE_CFG, "guidance_scale": None, "prompt_embeds_mask": torch.ones(1, 3,
            dtype=torch.long), "negative_prompt_embeds_mask": torch.ones(1, 3, dtype=torch.long), "height": 32,
            "width": 32},
        "cond, uncond", NO_TRUE_CFG, "transformer_blocks.1", zoo.KeepTextFirst, normalised=to_norm_of_cond,
    ),
    Stock(
        "CogView4Pipeline", "CogView4Transformer2DModel",
        {"patch_size": 2, "in_channels": 4, "num_layers": 3, "attention_head_dim": 4, "num_attention_heads": 4,
            "out_channels": 4, "text_embed_dim": 8, "time_embed_dim": 8, "condition_dim": 4},
        lambda: {"vae": None, "scheduler": euler(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75)},
        lambda: prompts(height=32, width=32),
        "cond, uncond", NO_CFG, "transformer_blocks.1", zoo.KeepStreams,
    ),
    Stock(
        "AuraFlowPipeline", "AuraFlowTransformer2DModel",
        {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 2, "num_single_dit_layers": 2,
            "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 8, "caption_projection_dim": 16,
            "out_channels": 4, "pos_embed_max_size": 64},
        lambda: {"vae": part("AutoencoderKL", block_out_channels=(4,), norm_num_groups=1), "scheduler": euler()},
        lambda: prompts(**masks(), height=16, width=16),
        "uncond+cond", NO_CFG, "joint_transformer_blocks.1", KeepTextAndImage,
    ),
    Stock(
        "StableAudioPipeline", "StableAudioDiTModel",
        {"sample_size": 8, "in_channels": 4, "num_layers": 3, "attention_head_dim": 4,
            "num_key_value_attention_heads": 2, "out_channels": 4, "cross_attention_dim": 8, "time_proj_dim": 8,
            "global_states_input_dim": 16, "cross_attention_input_dim": 8, "num_attention_heads": 2},
        lambda: {"vae": diffusers.AutoencoderOobleck(encoder_hidden_size=6, downsampling_ratios=[1, 2],
            decoder_channels=3, decoder_input_channels=4, audio_channels=2, channel_multiples=[2, 4],
            sampling_rate=4), "projection_model": random_model("StableAudioProjectionModel", text_encoder_dim=8,
            conditioning_dim=8, min_value=0, max_value=32), "scheduler": diffusers.EulerDiscreteScheduler()},
        lambda: prompts(attention_mask=torch.ones(1, 3), negative_attention_mask=torch.ones(1, 3)),
        "uncond+cond", NO_CFG, "transformer_blocks.1", zoo.KeepHiddenStates,
    ),
    Stock(
        "LatentConsistencyModelPipeline", "UNet2DConditionModel",
        {**UNET, "time_cond_proj_dim": 8},
        lambda: {"vae": None, "scheduler": diffusers.LCMScheduler(), "requires_safety_checker": False},
        lambda: {"prompt_embeds": noise(1, 3, 8, seed=1)},
        "cond", None, "mid_block.attentions.0", zoo.KeepInTuple, "unet",
    ),
    Stock(
        "ZImagePipeline", "ZImageTransformer2DModel",
        {"in_channels": 4, "dim": 32, "n_layers": 3, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
            "cap_feat_dim": 8, "axes_dims": [8, 4, 4], "axes_lens": [64, 32, 32]},
        lambda: {"vae": None, "scheduler": euler()},
        lambda: {"prompt_embeds": [noise(3, 8, seed=1), noise(3, 8, seed=3)], "negative_prompt_embeds": [noise(3, 8,
            seed=2), noise(3, 8, seed=4)], "guidance_scale": 3.0, "height": 64, "width": 64},
        "cond+uncond", {"guidance_scale": 0.0}, "layers.1", zoo.KeepHiddenStates,
    ),
]
_WITH_OWN = [
    dataclasses.replace(
        next(stock for stock in _TABLE if stock.pipeline == "StableDiffusion3Pipeline"),
        variant="with its own skip_guidance_layers",
        own_calls=1,
        call=lambda: prompts(**pooled(), height=32, width=32, skip_guidance_layers=[0],
            skip_layer_guidance_start=-1.0, skip_layer_guidance_stop=1.0),
    ),
    dataclasses.replace(
        next(stock for stock in _TABLE if stock.pipeline == "LTX2Pipeline"),
        variant="with its own guidance",
        own_calls=2,
        call=lambda: {**prompts(), **masks(), **LTX2_OFF, "height": 64, "width": 96, "num_frames": 17,
            "stg_scale": 1.0, "audio_stg_scale": 1.0, "modality_scale": 3.0, "audio_modality_scale": 3.0,
            "spatio_temporal_guidance_blocks": [2]},
        off={**LTX2_OFF, **NO_CFG, "audio_guidance_scale": 1.0},
    ),
]
# fmt: on
STOCK = {f"{stock.pipeline} {stock.variant}".strip(): stock for stock in [*_TABLE, *_WITH_OWN]}

GOLDEN: dict[str, Rows] = {
    "MochiPipeline": "uncond+cond",
    "LTXPipeline": "uncond+cond",
    "CogVideoXPipeline": "uncond+cond",
    "HunyuanVideoPipeline": "cond, uncond",
    "WanPipeline": "cond, uncond",
}
"""Run by tests/test_pipelines.py, against recordings of the published STG pipelines where there are any."""

_WAYS = {
    "uncond+cond": "one call on rows [uncond, cond]",
    "cond+uncond": "one call on a list of samples, cond and then uncond",
    "cond, uncond": "a cond call, then an uncond call",
    "cond": "cond only (no CFG, or guidance as an input)",
}


def tested() -> dict[str, Rows]:
    """Return how each pipeline class that tests run calls its denoiser."""
    return {**GOLDEN, **{stock.pipeline: stock.rows for stock in STOCK.values()}}


def page_table() -> str:
    """Return the table of docs/how-it-works.md."""
    lines = ["| how a pipeline calls its denoiser | pipelines that tests run |", "| --- | --- |"]
    for rows, way in _WAYS.items():
        names = [name.removesuffix("Pipeline") for name, value in tested().items() if value == rows]
        lines.append(f"| {way} | {', '.join(names)} |")
    return "\n".join(lines)
