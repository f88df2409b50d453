"""Tiny models of still more repositories, for tests.repositories: none was looked at when the code was made."""

from __future__ import annotations

import sys
import types
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.further_repositories import BlockDiagonal, Registry, memory_efficient_attention, standing_in
from tests.opaque import attend_varlen
from tests.repositories import ROWS, TEXT, Repository, Tiny, first_two, module, random


def sit() -> Tiny:
    model = module("models").SiT(8, 2, 4, 32, 3, 2, 2.0, num_classes=7, learn_sigma=False)
    cond = {"x": random(ROWS, 4, 8, 8), "t": torch.full((ROWS,), 0.5), "y": torch.tensor([1, 2])}
    return Tiny(model, cond, {"y": torch.tensor([7, 7])})


def lumina_2() -> Tiny:
    standing_in("flash_attn.bert_padding", index_first_axis=_rows_of, pad_input=_padded, unpad_input=None)
    standing_in("apex.normalization", FusedRMSNorm=torch.nn.RMSNorm)
    model = module("models.model").NextDiT(
        2, 4, 32, 3, 1, 2, multiple_of=16, qk_norm=True, cap_feat_dim=12, axes_dims=[4, 6, 6], axes_lens=[16, 16, 16]
    )
    cond = {
        "x": random(ROWS, 4, 8, 8),
        "t": torch.full((ROWS,), 0.5),
        "cap_feats": random(ROWS, TEXT, 12),
        "cap_mask": torch.ones(ROWS, TEXT, dtype=torch.int32),
    }
    text = {"JointTransformerBlock": slice(0, TEXT)}
    return Tiny(model, cond, {"cap_feats": random(ROWS, TEXT, 12)}, text)


def _rows_of(x: Tensor, indices: Tensor) -> Tensor:
    return x[indices]


def _padded(x: Tensor, indices: Tensor, batch: int, length: int) -> Tensor:
    found = x.new_zeros(batch * length, *x.shape[1:])
    found[indices] = x
    return found.unflatten(0, (batch, length))


def hunyuan_dit() -> Tiny:
    args = types.SimpleNamespace(
        learn_sigma=False, text_states_dim=12, text_states_dim_t5=16, text_len=TEXT, text_len_t5=4, norm="layer",
        is_ipa=False, infer_mode="torch", use_flash_attn=False, qk_norm=True, size_cond=None, use_style_cond=False,
        use_fp16=False,
    )  # fmt: skip
    model = module("hydit.modules.models").HunYuanDiT(args, (8, 8), 2, 4, 32, 4, 2, 2.0, log_fn=lambda *_: None)
    cond = {
        "x": random(ROWS, 4, 8, 8),
        "t": torch.full((ROWS,), 500.0),
        "encoder_hidden_states": random(ROWS, TEXT, 12),
        "text_embedding_mask": torch.ones(ROWS, TEXT),
        "encoder_hidden_states_t5": random(ROWS, 4, 16),
        "text_embedding_mask_t5": torch.ones(ROWS, 4),
        "cos_cis_img": random(16, 16).cos(),
        "sin_cis_img": random(16, 16).sin(),
        "return_dict": False,
    }
    return Tiny(model, cond, {"encoder_hidden_states": random(ROWS, TEXT, 12)})


def stable_audio() -> Tiny:
    with_models = f"{sys.path[0]}/stable_audio_tools"
    standing_in("stable_audio_tools", __path__=[with_models])
    standing_in("stable_audio_tools.models", __path__=[f"{with_models}/models"])
    with mock.patch.dict("os.environ", {"ENABLE_TORCH_COMPILE": "0"}):
        model = module("stable_audio_tools.models.dit").DiffusionTransformer(
            4, 1, 64, cond_token_dim=12, global_cond_dim=6, depth=3, num_heads=2
        )
    cond = {
        "x": random(ROWS, 4, 10),
        "t": torch.full((ROWS,), 0.5),
        "cross_attn_cond": random(ROWS, TEXT, 12),
        "global_embed": random(ROWS, 6),
    }
    return Tiny(model, cond, {"cross_attn_cond": random(ROWS, TEXT, 12)})


def hidream() -> Tiny:
    standing_in("hi_diffusers", __path__=[f"{sys.path[0]}/hi_diffusers"])  # without its pipelines
    model = module("hi_diffusers.models.transformers.transformer_hidream_image").HiDreamImageTransformer2DModel(
        2, 4, 4, 2, 2, 16, 2, [12, 16], 6, 2, 1, (4, 6, 6), (8, 8), [0, 1, 1, 0]
    )
    tokens = 16

    def encoded() -> list[Tensor]:
        return [random(ROWS, TEXT, 12), random(2, ROWS, 4, 16)]

    cond = {
        "hidden_states": random(ROWS, 4, 8, 8),
        "timesteps": torch.full((ROWS,), 500.0),
        "encoder_hidden_states": encoded(),
        "pooled_embeds": random(ROWS, 6),
        "return_dict": False,
    }
    through = {"HiDreamImageBlock": one_or_two}
    text = {"HiDreamImageBlock": slice(tokens, None)}
    return Tiny(model, cond, {"encoder_hidden_states": encoded()}, text, through, "hidden_states")


def one_or_two(image_tokens: Tensor, text_tokens: Tensor | None = None, **_: Any) -> Any:
    return image_tokens if text_tokens is None else (image_tokens, text_tokens)


def open_sora_plan() -> Tiny:
    for package in ("opensora", "opensora.utils", "opensora.models", "opensora.models.diffusion"):
        standing_in(package, __path__=[f"{sys.path[0]}/{package.replace('.', '/')}"])
    standing_in("opensora.utils.utils", to_2tuple=None)
    torch.backends.cuda.sdp_kernel = lambda **_: nullcontext()  # it asks for one that needs a GPU
    model = module("opensora.models.diffusion.opensora_v1_3.modeling_opensora").OpenSoraT2V_v1_3(
        2, 24, 4, 4, 4, cross_attention_dim=48, sample_size_h=4, sample_size_w=4, sample_size_t=4, patch_size=2,
        patch_size_t=1, activation_fn="gelu-approximate", caption_channels=12, sparse1d=True, sparse_n=4,
    )  # fmt: skip
    cond = {
        "hidden_states": random(ROWS, 4, 4, 4, 8),
        "timestep": torch.full((ROWS,), 500.0),
        "encoder_hidden_states": random(ROWS, 1, TEXT, 12),
        "attention_mask": torch.ones(ROWS, 4, 4, 8),
        "encoder_attention_mask": torch.ones(ROWS, 1, TEXT),
        "return_dict": False,
    }
    return Tiny(model, cond, {"encoder_hidden_states": random(ROWS, 1, TEXT, 12)}, first="hidden_states")


def k_diffusion() -> Tiny:
    standing_in("k_diffusion", __path__=[f"{sys.path[0]}/k_diffusion"])
    with mock.patch.dict("os.environ", {"K_DIFFUSION_USE_COMPILE": "0", "K_DIFFUSION_USE_FLASH_2": "0"}):
        model = module("k_diffusion.models.image_transformer_v2")
        attention = model.GlobalAttentionSpec(16)
        levels = [model.LevelSpec(2, 32, 64, attention, 0.0), model.LevelSpec(2, 48, 96, attention, 0.0)]
        found = model.ImageTransformerDenoiserModelV2(levels, model.MappingSpec(1, 32, 64, 0.0), 3, 3, (2, 2), 3)
    cond = {"x": random(ROWS, 3, 8, 8), "sigma": torch.full((ROWS,), 2.0), "class_cond": torch.tensor([0, 1])}
    return Tiny(found, cond, {"class_cond": torch.tensor([2, 2])})


def dynami_crafter() -> Tiny:
    standing_in("xformers.ops", memory_efficient_attention=memory_efficient_attention)
    standing_in("xformers", ops=sys.modules["xformers.ops"])
    model = module("lvdm.modules.networks.openaimodel3d").UNetModel(
        4, 32, 4, 1, [1, 2], channel_mult=[1, 2], num_head_channels=16, context_dim=12, use_linear=True,
        temporal_conv=True, temporal_attention=True, use_relative_position=False, temporal_length=3,
        addition_attention=True, image_cross_attention=False,
    )  # fmt: skip
    cond = {
        "x": random(ROWS, 4, 3, 8, 8),
        "timesteps": torch.full((ROWS,), 500.0),
        "context": random(ROWS, TEXT, 12),
    }
    return Tiny(model, cond, {"context": random(ROWS, TEXT, 12)})


def hunyuan_video_15() -> Tiny:
    standing_in("flash_attn.bert_padding", pad_input=_padded, unpad_input=_unpadded)
    sys.modules["flash_attn"].flash_attn_varlen_qkvpacked_func = flash_attn_varlen_qkvpacked_func
    interface = sys.modules["flash_attn.flash_attn_interface"]
    interface.flash_attn_varlen_qkvpacked_func = flash_attn_varlen_qkvpacked_func
    standing_in("hyvideo.models", __path__=[f"{sys.path[0]}/hyvideo/models"])
    standing_in("hyvideo.models.text_encoders.byT5", ByT5Mapper=None)
    states = types.SimpleNamespace(sp_enabled=False, sp=1)
    standing_in("hyvideo.commons.parallel_states", get_parallel_state=lambda: states)
    standing_in("hyvideo.models.transformers", __path__=[f"{sys.path[0]}/hyvideo/models/transformers"])
    model = module("hyvideo.models.transformers.hunyuanvideo_1_5_transformer").HunyuanVideo_1_5_DiffusionTransformer(
        [1, 2, 2], 4, False, 4, 32, 2, 2.0, "gelu_tanh", 2, 2, [4, 6, 6], text_states_dim=12, attn_mode="flash2"
    )
    tokens = 8
    cond = {
        "hidden_states": random(ROWS, 4, 2, 4, 4),
        "timestep": torch.full((ROWS,), 500.0),
        "text_states": random(ROWS, TEXT, 12),
        "text_states_2": None,
        "encoder_attention_mask": torch.ones(ROWS, TEXT, dtype=torch.int64),
    }
    text = dict.fromkeys(("MMDoubleStreamBlock", "MMSingleStreamBlock"), slice(tokens, tokens + TEXT))
    through = {"MMDoubleStreamBlock": first_two, "MMSingleStreamBlock": lambda x, **_: x}
    return Tiny(model, cond, {"text_states": random(ROWS, TEXT, 12)}, text, through, "hidden_states")


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, deterministic: bool = False,
) -> Tensor:  # fmt: skip
    return attend_varlen(*qkv.unbind(1), cu_seqlens, cu_seqlens)


def _unpadded(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    lengths = mask.sum(-1, dtype=torch.int32)
    indices = mask.flatten().nonzero().flatten()
    return (
        x.flatten(0, 1)[indices],
        indices,
        F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)),
        int(lengths.max()),
        lengths,
    )


def frame_pack() -> Tiny:
    model = module("diffusers_helper.models.hunyuan_video_packed").HunyuanVideoTransformer3DModelPacked(
        16, 16, 2, 16, 2, 2, 1, 2.0, 2, 1, text_embed_dim=12, pooled_projection_dim=6, rope_axes_dim=(4, 6, 6),
        has_image_proj=True, image_proj_dim=10, has_clean_x_embedder=True,
    )  # fmt: skip
    tokens, images = 8, 3
    cond = {
        "hidden_states": random(1, 16, 2, 4, 4),
        "timestep": torch.full((1,), 500.0),
        "encoder_hidden_states": random(1, TEXT, 12),
        "encoder_attention_mask": torch.ones(1, TEXT, dtype=torch.int64),
        "pooled_projections": random(1, 6),
        "guidance": torch.full((1,), 6000.0),
        "latent_indices": torch.arange(2)[None],
        "clean_latents": random(1, 16, 1, 4, 4),
        "clean_latent_indices": torch.tensor([[7]]),
        "image_embeddings": random(1, images, 10),
        "return_dict": False,
    }
    everything = tokens + 4
    blocks = ("HunyuanVideoTransformerBlock", "HunyuanVideoSingleTransformerBlock")
    text = dict.fromkeys(blocks, slice(everything, everything + images + TEXT))
    through = dict.fromkeys(blocks, first_two)
    return Tiny(model, cond, {"encoder_hidden_states": random(1, TEXT, 12)}, text, through, "hidden_states")


def vchitect() -> Tiny:
    model = module("models.VchitectXL").VchitectXLTransformerModel(8, 2, 4, 3, 16, 2, 12, 32, 6, 4, 8)
    frames = 3
    cond = {
        "hidden_states": random(1, frames, 4, 8, 8),
        "encoder_hidden_states": random(1, TEXT, 12).expand(frames, -1, -1),
        "pooled_projections": random(1, 6),
        "timestep": torch.full((1,), 500.0),
        "return_dict": False,
    }
    through = {
        "JointTransformerBlock": lambda hidden_states, encoder_hidden_states, **_: (
            encoder_hidden_states,
            hidden_states,
        )
    }
    uncond = {"encoder_hidden_states": random(1, TEXT, 12).expand(frames, -1, -1)}
    return Tiny(model, cond, uncond, {"JointTransformerBlock": slice(16, 16 + TEXT)}, through, "hidden_states")


def repa() -> Tiny:
    model = module("models.sit").SiT(
        input_size=8, hidden_size=32, decoder_hidden_size=32, encoder_depth=2, depth=3, num_heads=2, mlp_ratio=2.0,
        num_classes=7, use_cfg=True, z_dims=[6], projector_dim=16, fused_attn=True, qk_norm=False,
    )  # fmt: skip
    cond = {"x": random(ROWS, 4, 8, 8), "t": torch.full((ROWS,), 0.5), "y": torch.tensor([1, 2])}
    return Tiny(_FirstOf(model), cond, {"y": torch.tensor([7, 7])})


class _FirstOf(nn.Module):
    """Leaves out what a model returns for its training."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.model(x, t, y)[0]


def mar_head() -> Tiny:
    model = module("models.diffloss").SimpleMLPAdaLN(4, 32, 4, 12, 3)
    cond = {"x": random(ROWS, 4), "t": torch.full((ROWS,), 500.0), "c": random(ROWS, 12)}
    return Tiny(model, cond, {"c": random(ROWS, 12)}, modes=("residual",))


def lesson() -> Tiny:
    model = module("modules").UNet_conditional(num_classes=5, device="cpu")
    cond = {"x": random(ROWS, 3, 64, 64), "t": torch.full((ROWS,), 500.0), "y": torch.tensor([1, 2])}
    return Tiny(model, cond, {"y": torch.tensor([0, 0])}, modes=("residual",))  # its size is fixed, and takes long


def flow_matching() -> Tiny:
    model = module("models.unet").UNetModel(
        3, 32, 3, 1, (1, 2), channel_mult=(1, 2), num_classes=4, num_head_channels=16, use_scale_shift_norm=True
    )
    cond = {"x": random(ROWS, 3, 8, 8), "timesteps": torch.full((ROWS,), 0.5), "extra": {"label": torch.tensor([1, 2])}}
    return Tiny(model, cond, {"extra": {"label": torch.tensor([0, 0])}})


def pixart_sigma() -> Tiny:
    mask = types.SimpleNamespace(BlockDiagonalMask=BlockDiagonal)
    standing_in("xformers.ops", memory_efficient_attention=memory_efficient_attention, fmha=mask)
    standing_in("xformers", ops=sys.modules["xformers.ops"])
    standing_in("mmcv", Registry=Registry, build_from_cfg=None)
    compress = {"sampling": "conv", "scale_factor": 2, "kv_compress_layer": [1]}
    model = module("diffusion.model.nets.PixArt").PixArt(
        8, 2, 4, 32, 3, 2, 2.0, pred_sigma=False, caption_channels=12, model_max_length=TEXT,
        kv_compress_config=compress,
    )  # fmt: skip
    cond = {
        "x": random(ROWS, 4, 8, 8),
        "timestep": torch.full((ROWS,), 500.0),
        "y": random(ROWS, 1, TEXT, 12),
    }
    return Tiny(model, cond, {"y": random(ROWS, 1, TEXT, 12)})


MORE = (
    Repository("REPA", "models/sit.py", repa, "67f7145", ("torchvision",)),
    Repository(
        "MAR, its head for diffusion",
        "models/diffloss.py",
        mar_head,
        "fe470ac",
        kernel="none: its blocks hold no attention",
        note="One call tells its blocks: the first one, or `example=`.",
    ),
    Repository(
        "Diffusion-Models-pytorch",
        "modules.py",
        lesson,
        "be35220",
        note="Its blocks are in no list. One call tells them: the first one, or `example=`. Only residual was tried.",
    ),
    Repository("flow_matching", "models/discrete_unet.py", flow_matching, "11568d3", kernel="a softmax of its own"),
    Repository(
        "PixArt-sigma",
        "diffusion/model/nets/PixArt.py",
        pixart_sigma,
        "1ce521a",
        ("mmcv", "xformers", "torchvision"),
        "xformers",
    ),
    Repository(
        "HunyuanVideo 1.5",
        "hyvideo/models/transformers/hunyuanvideo_1_5_transformer.py",
        hunyuan_video_15,
        "60783e7",
        ("loguru",),
        "flash-attention, packed",
    ),
    Repository(
        "FramePack",
        "diffusers_helper/models/hunyuan_video_packed.py",
        frame_pack,
        "97fe5db",
        ("torchvision", "safetensors", "cv2"),
        "flash-attention",
    ),
    Repository("Vchitect 2", "models/VchitectXL.py", vchitect, "299618f"),
    Repository("SiT", "models.py", sit, "947f95b", ("torchvision",)),
    Repository("Lumina-Image 2", "models/model.py", lumina_2, "4a4d6f8", (), "flash-attention"),
    Repository("HunyuanDiT", "hydit/modules/models.py", hunyuan_dit, "d2cb9cd", ("flash_attn",)),
    Repository(
        "stable-audio-tools",
        "stable_audio_tools/models/dit.py",
        stable_audio,
        "50049e3",
        kernel="flash-attention",
    ),
    Repository(
        "HiDream-I1",
        "hi_diffusers/models/transformers/transformer_hidream_image.py",
        hidream,
        "9b42dd6",
        kernel="flash-attention",
    ),
    Repository(
        "Open-Sora Plan 1.3",
        "opensora/models/diffusion/opensora_v1_3/modeling_opensora.py",
        open_sora_plan,
        "f7fa604",
    ),
    Repository(
        "k-diffusion",
        "k_diffusion/models/image_transformer_v2.py",
        k_diffusion,
        "4601bf0",
        ("natten", "torchvision"),
    ),
    Repository(
        "DynamiCrafter",
        "lvdm/modules/networks/openaimodel3d.py",
        dynami_crafter,
        "c453369",
        ("cv2", "torchvision", "pytorch_lightning", "omegaconf", "decord"),
        "xformers",
    ),
)
