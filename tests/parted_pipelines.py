"""Stock pipelines whose calls have other rows than [uncond, cond], around tiny random parts.

As in `tests.stock_pipelines`, the table is written by hand, from the pipelines' source.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from PIL import Image
from torch import Tensor

from tests import zoo
from tests.installed import from_diffusers
from tests.stock_pipelines import STOCK, UNET, euler, image, masks, noise, part, prompts, random_model

PICTURE = Image.new("RGB", (16, 16), (200, 30, 90))
MASK_PICTURE = Image.new("L", (16, 16), 255)
UNET_8 = {**UNET, "in_channels": 8}
XL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 2, "projection_class_embeddings_input_dim": 20}


@dataclasses.dataclass(frozen=True)
class Parted:
    """One pipeline class.

    `rows` names the parts of each call of the denoiser in a step; `off` is what leaves cond rows alone in a call. The
    scheduler receives what is predicted, times `sign`, where `received` says which channels of it.
    """

    pipeline: str
    model: str
    config: dict[str, Any]
    parts: Callable[[], dict[str, Any]]
    call: dict[str, Any]
    rows: tuple[str, ...]
    layer: str = "mid_block.attentions.0"
    identity: Callable[[], Any] = zoo.KeepInTuple
    off: dict[str, Any] | None = None
    off_rows: tuple[str, ...] = ("cond",)
    denoiser: str = "unet"
    received: Callable[[Tensor], Tensor] = lambda prediction: prediction
    patches: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Methods of the pipeline, and of those inside it, that are replaced: its text encoder is not there."""

    def build(self) -> Any:
        cls = from_diffusers(self.pipeline)
        expected, optional = cls._get_signature_keys(cls)
        absent = dict.fromkeys({*expected} - {*optional} - {"self"})
        pipe = cls(**{**absent, **self.parts(), self.denoiser: random_model(self.model, **self.config)})
        for name, patch in self.patches.items():
            owner, _, attribute = name.rpartition(".")
            vars(operator.attrgetter(owner)(pipe) if owner else pipe)[attribute] = patch
        pipe.set_progress_bar_config(disable=True)
        return pipe


def ddim() -> dict[str, Any]:
    return {
        "vae": vae(),
        "scheduler": diffusers.DDIMScheduler(set_alpha_to_one=False),
        "requires_safety_checker": False,
    }


def vae() -> Any:
    return part("AutoencoderKL", block_out_channels=(4,), norm_num_groups=1, shift_factor=0.0)


def controlnet(**config: Any) -> Any:
    """Make a ControlNet for a U-Net of this configuration, and images as large as latents."""
    names = inspect.signature(diffusers.ControlNetModel).parameters
    own = {name: value for name, value in config.items() if name in names}
    return random_model("ControlNetModel", **own, conditioning_embedding_out_channels=(4,))


def both_prompts(prompt: str, device: Any, count: int, cfg: bool, *_: Any, **__: Any) -> tuple[Tensor, Tensor | None]:
    """Encode a prompt, and a negative one."""
    return noise(1, 3, 8, seed=len(prompt)), noise(1, 3, 8, seed=2) if cfg else None


def boxes(repeat_batch: int, gligen_boxes: Any = (), **kwargs: Any) -> dict[str, Tensor]:
    """Say what is to be where; nothing, where no boxes are given."""
    shapes = {"masks": (), "phrases_masks": (), "image_masks": (), "phrases_embeddings": (8,), "image_embeddings": (8,)}
    found = {name: noise(1, 2, *shape, seed=5) for name, shape in shapes.items()}
    found["boxes"] = noise(1, 2, 4).sigmoid()
    return {name: len(gligen_boxes) * t.expand(repeat_batch, *t.shape[1:]) for name, t in found.items()}


OFF = {"guidance_scale": 1.0}
PAG = {"pag_scale": 2.0}
PAG_OFF = {"pag_scale": 0.0}
PIX = {"image": image(), "image_guidance_scale": 1.5}

# fmt: off
PARTED = {found.pipeline: found for found in [
    Parted(
        "DiTPipeline", "DiTTransformer2DModel",
        {"sample_size": 8, "num_layers": 3, "patch_size": 2, "attention_head_dim": 8, "num_attention_heads": 2,
            "in_channels": 4, "out_channels": 8, "num_embeds_ada_norm": 1001},
        lambda: {"vae": vae(), "scheduler": diffusers.DDIMScheduler()},
        {"class_labels": [3, 7], "guidance_scale": 3.0, "output_type": "pt"},
        ("cond+uncond",), "transformer_blocks.1", zoo.KeepHiddenStates, OFF, denoiser="transformer",
        # All rows of the call go to the scheduler: both halves are guided, with the same noise.
        received=lambda prediction: prediction[:, :4],
    ),
    Parted(
        "LuminaPipeline", "LuminaNextDiT2DModel",
        {"sample_size": 16, "patch_size": 2, "in_channels": 4, "hidden_size": 24, "num_layers": 3,
            "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 16, "ffn_dim_multiplier": None,
            "norm_eps": 1e-5, "learn_sigma": True, "qk_norm": True, "cross_attention_dim": 8, "scaling_factor": 1.0},
        lambda: {"vae": None, "scheduler": euler()},
        prompts(**masks(), height=64, width=64),
        ("cond+uncond",), "layers.1", zoo.KeepHiddenStates, OFF, denoiser="transformer",
        received=lambda prediction: -prediction[:, :4],
    ),
    Parted(
        "StableDiffusionInstructPix2PixPipeline", "UNet2DConditionModel", UNET_8, ddim, prompts(**PIX),
        ("cond+image+uncond",), off=OFF,
    ),
    Parted(
        "StableDiffusionXLInstructPix2PixPipeline", "UNet2DConditionModel", {**UNET_8, **XL},
        lambda: {"vae": vae(), "scheduler": diffusers.DDIMScheduler()},
        prompts(**PIX, pooled_prompt_embeds=noise(1, 8, seed=3), negative_pooled_prompt_embeds=noise(1, 8, seed=4),
            height=16, width=16),
        ("cond+image+uncond",), off=OFF,
    ),
    Parted(
        "CycleDiffusionPipeline", "UNet2DConditionModel", UNET, ddim,
        {"prompt": "a dog", "source_prompt": "a black cat", "image": image(), "strength": 1.0, "eta": 0.1,
            "guidance_scale": 3.0, "source_guidance_scale": 2.0},
        ("uncond+uncond+cond+cond",), off=OFF, off_rows=("cond+cond",), patches={"encode_prompt": both_prompts},
    ),
    Parted(
        "StableDiffusionGLIGENTextImagePipeline", "UNet2DConditionModel",
        {**UNET, "attention_type": "gated-text-image"},
        lambda: {**ddim(), "processor": None},
        prompts(gligen_boxes=[[0.1, 0.1, 0.6, 0.6]], gligen_phrases=["a"], gligen_images=[PICTURE]),
        ("apart+cond", "uncond+apart"), off=OFF, off_rows=("cond", "apart"),
        patches={f"get_cross_attention_kwargs_{kind}_grounded": boxes for kind in ("with", "without")},
    ),
    Parted(
        "StableDiffusionPAGPipeline", "UNet2DConditionModel", UNET, ddim, prompts(**PAG),
        ("uncond+cond+perturbed",), off=PAG_OFF, off_rows=("uncond+cond",),
    ),
    Parted(
        "SanaPAGPipeline", "SanaTransformer2DModel", STOCK["SanaPipeline"].config,
        lambda: {"vae": None, "scheduler": euler()},
        prompts(**masks(), **PAG, height=128, width=128, use_resolution_binning=False, negative_prompt=None),
        ("uncond+cond+perturbed",), "transformer_blocks.1", zoo.KeepHiddenStates, PAG_OFF, ("uncond+cond",),
        "transformer",
    ),
]}
# fmt: on


PICTURE_IN = {"image": image(), "strength": 1.0}
MASK = {"mask_image": image()[:, :1].sigmoid().round()}
SMALL = {"height": 16, "width": 16}


def with_pag(name: str, variant: str | None = None, **more: Any) -> Parted:
    """Return the PAG variant of a stock pipeline: the same parts, and a perturbed part in each call.

    Args:
        name: the stock pipeline.
        variant: the class, where it is another than its name tells; it has a VAE.
        more: further arguments of its call.
    """
    stock = STOCK[name]
    own = {"vae": vae} if variant is not None else {}
    if variant is not None and "ControlNet" in variant:
        own["controlnet"] = functools.partial(controlnet, **stock.config)

    def parts() -> dict[str, Any]:
        return {**stock.parts(), **{part: make() for part, make in own.items()}}

    return Parted(
        variant or name.replace("Pipeline", "PAGPipeline"), stock.model, stock.config, parts,
        {**stock.call(), **PAG, **more}, ("uncond+cond+perturbed",), stock.layer, stock.identity, PAG_OFF,
        ("uncond+cond",), stock.denoiser,
        received=lambda prediction: prediction[:, :4],  # the others predict a variance
    )  # fmt: skip


PARTED |= {
    found.pipeline: found
    for found in (
        *map(
            with_pag,
            (
                "AnimateDiffPipeline",
                "HunyuanDiTPipeline",
                "PixArtSigmaPipeline",
                "StableDiffusion3Pipeline",
                "StableDiffusionControlNetPipeline",
                "StableDiffusionXLPipeline",
            ),
        ),
        with_pag("StableDiffusionPipeline", "StableDiffusionPAGImg2ImgPipeline", **PICTURE_IN),
        with_pag("StableDiffusionPipeline", "StableDiffusionPAGInpaintPipeline", **PICTURE_IN, **MASK, **SMALL),
        with_pag("StableDiffusionXLPipeline", "StableDiffusionXLPAGImg2ImgPipeline", **PICTURE_IN),
        with_pag(
            "StableDiffusionXLPipeline",
            "StableDiffusionXLPAGInpaintPipeline",
            **PICTURE_IN,
            **MASK,
            **SMALL,
            output_type="pt",  # with latents it would return before it takes its attention processors off
        ),
        with_pag(
            "StableDiffusion3Pipeline",
            "StableDiffusion3PAGImg2ImgPipeline",
            **PICTURE_IN,
            height=8,
            width=8,
        ),
        with_pag(
            "StableDiffusionControlNetPipeline",
            "StableDiffusionControlNetPAGInpaintPipeline",
            **PICTURE_IN,
            **MASK,
            **SMALL,
            control_image=image().sigmoid(),
        ),
        with_pag(
            "StableDiffusionXLPipeline", "StableDiffusionXLControlNetPAGPipeline", image=image().sigmoid(), **SMALL
        ),
        with_pag(
            "StableDiffusionXLPipeline",
            "StableDiffusionXLControlNetPAGImg2ImgPipeline",
            **PICTURE_IN,
            **SMALL,
            control_image=image().sigmoid(),
            output_type="pt",
        ),
    )
}


class Prior:
    """Stands in for the pipeline that makes embeddings of an image out of a prompt."""

    def __call__(self, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return noise(1, 8, seed=1), noise(1, 8, seed=2)

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        pass


def both_in_one(prompt: Any, device: Any, count: int, cfg: bool, *_: Any) -> tuple[Tensor, Tensor, None]:
    """Encode a prompt, with a negative one before it."""
    negative = [noise(1, 8, seed=2)] if cfg else [], [noise(1, 3, 8, seed=4)] if cfg else []
    return torch.cat([*negative[0], noise(1, 8, seed=1)]), torch.cat([*negative[1], noise(1, 3, 8, seed=3)]), None


def combined(name: str, **call: Any) -> Parted:
    """Return a combined pipeline of Kandinsky 2.1 or 2.2, with a prior that is not there."""
    stock = STOCK["KandinskyV22Pipeline"]
    is_first = "V22" not in name
    kind = {"addition_embed_type": "text_image", "encoder_hid_dim_type": "text_image_proj"} if is_first else {}
    channels = {"in_channels": 9} if "Inpaint" in name else {}
    encode = {"decoder_pipe._encode_prompt": both_in_one} if is_first else {}
    return Parted(
        name, stock.model, {**stock.config, **kind, **channels}, stock.parts,
        {"prompt": "a dog", "guidance_scale": 3.0, "output_type": "pt", **SMALL, **call},
        ("uncond+cond",), stock.layer, stock.identity, OFF,
        received=lambda prediction: torch.cat([prediction[:, :4], 0 * prediction[:, 4:]], 1),  # others are a variance
        patches={"prior_pipe": Prior(), **encode},
    )  # fmt: skip


PARTED |= {
    found.pipeline: found
    for version in ("", "V22")
    for found in (
        combined(f"Kandinsky{version}CombinedPipeline"),
        combined(f"Kandinsky{version}Img2ImgCombinedPipeline", image=PICTURE, strength=1.0),
        combined(f"Kandinsky{version}InpaintCombinedPipeline", image=PICTURE, mask_image=MASK_PICTURE),
    )
}

WHOLE = (
    "AceStepPipeline",
    "BriaFiboPipeline",
    "DreamLitePipeline",
    "Flux2KleinKVPipeline",
    "OmniGenPipeline",
    "StableDiffusionDiffEditPipeline",
)
"""Classes that tests/test_other_calls.py runs."""

SLOW = {
    name for name, found in PARTED.items() if "Combined" in name or found.call.get("strength") or "XLControl" in name
}
"""Those that are much like others."""
