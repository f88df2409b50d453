"""Tiny models of further repositories, for tests.repositories."""

from __future__ import annotations

import importlib.util
import math
import sys
import types
from contextlib import nullcontext, suppress
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from tests.opaque import attend
from tests.repositories import ROWS, TEXT, Repository, Tiny, module, random


def standing_in(name: str, **contents: Any) -> None:
    """Put a module with these contents in the place of one that is not installed."""
    made, spec = types.ModuleType(name), None
    with suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(name)  # the rest of a package of theirs is still to be found
    path = [] if spec is None else [*(spec.submodule_search_locations or ())]
    vars(made).update({"__path__": path, **contents})
    sys.modules[name] = made
    parent, _, last = name.rpartition(".")
    if parent:
        with suppress(ImportError):
            module(parent)
        if parent not in sys.modules:
            standing_in(parent)
        setattr(sys.modules[parent], last, made)


def mochi() -> Tiny:
    kernels = {"flash_varlen_attn": module("flash_attn").flash_attn_varlen_func, "sage_attn": None}
    standing_in("genmo.lib.attn_imports", **kernels, sdpa_attn_ctx=lambda training: nullcontext())
    model = module("genmo.mochi_preview.dit.joint_model.asymm_models_joint")
    model.sdpa_kernel = lambda _: nullcontext()  # it asks for one that needs a GPU
    model.torch = types.SimpleNamespace(**{**vars(torch), "bfloat16": torch.float32})  # it insists on this type
    module("genmo.mochi_preview.dit.joint_model.temporal_rope").torch = model.torch
    frames, side = 2, 4
    transformer = model.AsymmDiTJoint(
        in_channels=4, hidden_size_x=32, hidden_size_y=16, depth=3, num_heads=2, mlp_ratio_x=12288 / 32, t5_feat_dim=16,
        t5_token_length=TEXT, qk_norm=True,
    )  # fmt: skip
    tokens = frames * (side // 2) ** 2
    total = tokens + TEXT
    cond = {
        "x": random(1, 4, frames, side, side),
        "sigma": torch.full((1,), 0.5),
        "y_feat": [random(1, TEXT, 16)],
        "y_mask": [torch.ones(1, TEXT, dtype=torch.bool)],
        "packed_indices": {
            "valid_token_indices_kv": torch.arange(total),
            "cu_seqlens_kv": torch.tensor([0, total], dtype=torch.int32),
            "max_seqlen_in_batch_kv": total,
        },
    }
    uncond = {"y_feat": [random(1, TEXT, 16)]}
    text = {"AsymmetricJointBlock": slice(tokens, total)}
    through = {"AsymmetricJointBlock": lambda x, c, y, **_: (x, y)}
    return Tiny(transformer, cond, uncond, text, through)


def svd() -> Tiny:
    model = module("sgm.modules.diffusionmodules.video_model").VideoUNet(
        4, 32, 4, 1, [1, 2], channel_mult=[1, 2], num_head_channels=16, context_dim=12, adm_in_channels=6,
        num_classes="sequential", use_linear_in_transformer=True, extra_ff_mix_layer=True, use_spatial_context=True,
        merge_strategy="learned_with_images", video_kernel_size=[3, 1, 1],
    )  # fmt: skip
    frames = 3
    cond = {
        "x": random(ROWS * frames, 4, 8, 8),
        "timesteps": torch.full((ROWS * frames,), 0.5),
        "context": random(ROWS * frames, 1, 12),
        "y": random(ROWS * frames, 6),
        "num_video_frames": frames,
        "image_only_indicator": torch.zeros(ROWS, frames),
    }
    return Tiny(model, cond, {"context": random(ROWS * frames, 1, 12)})


def latte() -> Tiny:
    standing_in("models.latte_t2v", LatteT2V=None)  # made for another version of diffusers
    model = module("models.latte").Latte(
        8, 2, 4, 32, 4, 2, 2.0, num_frames=3, num_classes=7, learn_sigma=False, extras=2
    )
    cond = {"x": random(ROWS, 3, 4, 8, 8), "t": torch.full((ROWS,), 500.0), "y": torch.tensor([1, 2])}
    return Tiny(model, cond, {"y": torch.tensor([7, 7])})


def f_lite() -> Tiny:
    model = module("f_lite.model").DiT(
        4, 2, 32, 3, 2, 2.0, cross_attn_input_size=12, residual_v=True, train_bias_and_rms=False
    )
    cond = {"x": random(ROWS, 4, 8, 8), "context": random(ROWS, TEXT, 12), "timesteps": torch.full((ROWS,), 0.5)}
    return Tiny(model, cond, {"context": random(ROWS, TEXT, 12)}, through={"DiTBlock": with_first_values})


def with_first_values(x: Tensor, context: Tensor, c: Tensor, v_0: Tensor | None, rope: Any) -> tuple[Tensor, Tensor]:
    """Give the first block's values along; that block itself has none to give."""
    if v_0 is None:
        raise RuntimeError
    return x, v_0


class _Linear(nn.Linear):
    """In place of fairscale's, which are spread over processes."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **_: Any) -> None:
        super().__init__(in_features, out_features, bias)


def lumina() -> Tiny:
    standing_in("fairscale.nn.model_parallel.initialize", get_model_parallel_world_size=lambda: 1)
    standing_in(
        "fairscale.nn.model_parallel.layers", ColumnParallelLinear=_Linear, RowParallelLinear=_Linear,
        ParallelEmbedding=nn.Embedding,
    )  # fmt: skip
    standing_in("lumina_next_t2i", __path__=[f"{sys.path[0]}/lumina_next_t2i"])  # without its pipelines
    standing_in("flash_attn.bert_padding", index_first_axis=None, pad_input=None, unpad_input=None)
    with mock.patch.object(Tensor, "cuda", lambda tensor: tensor):
        model = module("lumina_next_t2i.models.model").NextDiT(
            2, 4, 32, 3, 2, multiple_of=16, learn_sigma=False, qk_norm=True, cap_feat_dim=12
        )
    cond = {
        "x": random(ROWS, 4, 8, 8),
        "t": torch.full((ROWS,), 0.5),
        "cap_feats": random(ROWS, TEXT, 12),
        "cap_mask": torch.ones(ROWS, TEXT),
    }
    return Tiny(model, cond, {"cap_feats": random(ROWS, TEXT, 12)})


def sky_reels() -> Tiny:
    model = module("skyreels_v2_infer.modules.transformer")
    norm = model.fast_rms_norm
    model.fast_rms_norm = getattr(norm, "_torchdynamo_orig_callable", norm)  # it would be compiled

    def flash_attention(
        q: Tensor, k: Tensor, v: Tensor, q_lens: Tensor | None = None, k_lens: Tensor | None = None, **_: Any
    ) -> Tensor:
        return attend(q, k, v, k_lens=k_lens)

    model.flash_attention = module("skyreels_v2_infer.modules.attention").flash_attention = flash_attention
    transformer = model.WanModel(
        text_len=TEXT, in_dim=4, dim=32, ffn_dim=48, freq_dim=16, text_dim=12, out_dim=4, num_heads=2, num_layers=3
    )
    cond = {
        "x": random(ROWS, 4, 2, 4, 4),
        "t": torch.full((ROWS,), 500.0),
        "context": random(ROWS, TEXT, 12),
    }
    return Tiny(transformer, cond, {"context": random(ROWS, TEXT, 12)}, through={"WanAttentionBlock": in_half})


def in_half(x: Tensor, *_: Any, **__: Any) -> Tensor:
    """Bypass a block that returns bfloat16 whatever it is given."""
    if x.dtype != torch.bfloat16:
        raise RuntimeError
    return x


def step_video() -> Tiny:
    place = "xfuser.model_executor.models.customized.step_video_t2v"
    standing_in("xfuser")
    standing_in("stepvideo", __path__=[f"{sys.path[0]}/stepvideo"])  # without its pipelines
    sys.modules[f"{place}.blocks"] = module("stepvideo.modules.blocks")
    sys.modules[f"{place}.normalization"] = module("stepvideo.modules.normalization")
    model = module("stepvideo.modules.model").StepVideoModel(
        2, 128, 4, 4, 3, caption_channels=[12, 6], attention_type="torch"
    )
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.5 / math.sqrt(parameter.shape[-1])) if "norm" not in name else None
    cond = {
        "hidden_states": random(ROWS, 2, 4, 4, 4),
        "encoder_hidden_states": random(ROWS, TEXT, 12),
        "encoder_hidden_states_2": random(ROWS, 2, 6),
        "timestep": torch.full((ROWS,), 500.0),
        "encoder_attention_mask": torch.ones(ROWS, TEXT + 2),
    }
    uncond = {"encoder_hidden_states": random(ROWS, TEXT, 12)}
    return Tiny(model, cond, uncond, first="hidden_states")


class BlockDiagonal:
    """In place of xformers' mask of sequences that lie one after the other."""

    def __init__(self, queries: list[int], keys: list[int]) -> None:
        self.queries, self.keys = queries, keys

    @classmethod
    def from_seqlens(cls, queries: list[int], keys: list[int]) -> BlockDiagonal:
        return cls(queries, keys)


def memory_efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, p: float = 0.0, scale: float | None = None,
    *, op: Any = None,
) -> Tensor:  # fmt: skip
    if query.ndim == 3:  # one head
        return memory_efficient_attention(query[:, :, None], key[:, :, None], value[:, :, None], attn_bias)[:, :, 0]
    if attn_bias is None:
        return attend(query, key, value).contiguous()
    parts = zip(query.split(attn_bias.queries, 1), key.split(attn_bias.keys, 1), value.split(attn_bias.keys, 1),
        strict=True)  # fmt: skip
    return torch.cat([attend(*part) for part in parts], 1)


def pixart() -> Tiny:
    mask = types.SimpleNamespace(BlockDiagonalMask=BlockDiagonal)
    standing_in("xformers.ops", memory_efficient_attention=memory_efficient_attention, fmha=mask)
    standing_in("xformers", ops=sys.modules["xformers.ops"])
    standing_in("mmcv", Registry=Registry, build_from_cfg=None)
    model = module("diffusion.model.nets.PixArt").PixArt(
        8, 2, 4, 32, 3, 2, 2.0, pred_sigma=False, caption_channels=12, model_max_length=TEXT
    )
    cond = {
        "x": random(ROWS, 4, 8, 8),
        "timestep": torch.full((ROWS,), 500.0),
        "y": random(ROWS, 1, TEXT, 12),
    }
    return Tiny(model, cond, {"y": random(ROWS, 1, TEXT, 12)})


class Registry:
    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def register_module(self, *_: Any, **__: Any) -> Any:
        return lambda cls: cls


def allegro() -> Tiny:
    model = module("allegro.models.transformers.transformer_3d_allegro").AllegroTransformer3DModel(
        2, 24, 4, 4, 3, cross_attention_dim=48, attention_bias=True, sample_size=[4, 4], sample_size_t=2, patch_size=2,
        patch_size_t=1, activation_fn="gelu-approximate", norm_type="ada_norm_single", norm_elementwise_affine=False,
        caption_channels=12, use_rope=True, sa_attention_mode="flash", ca_attention_mode="xformers",
    )  # fmt: skip
    module("allegro.models.transformers.block").sdpa_kernel = lambda *_, **__: nullcontext()
    cond = {
        "hidden_states": random(ROWS, 4, 2, 4, 4),
        "timestep": torch.full((ROWS,), 500.0),
        "encoder_hidden_states": random(ROWS, 1, TEXT, 12),
        "attention_mask": torch.ones(ROWS, 2, 4, 4),
        "encoder_attention_mask": torch.ones(ROWS, 1, TEXT),
        "return_dict": False,
    }
    return Tiny(model, cond, {"encoder_hidden_states": random(ROWS, 1, TEXT, 12)}, first="hidden_states")


FURTHER = (
    Repository(
        "Mochi",
        "genmo/mochi_preview/dit/joint_model/asymm_models_joint.py",
        mochi,
        "0c86aeb",
        kernel="flash-attention",
        note='`"attention"` is refused with several cond rows in a call, whose padding is taken out before the kernel.',
    ),
    Repository(
        "SVD (generative-models)",
        "sgm/modules/diffusionmodules/video_model.py",
        svd,
        "0ad7de9",
        ("omegaconf", "pytorch_lightning", "kornia", "open_clip", "torchvision"),
    ),
    Repository("Latte", "models/latte.py", latte, "b27c24a", ("torchvision",), "a softmax of its own"),
    Repository(
        "F-Lite",
        "f_lite/model.py",
        f_lite,
        "85f0471",
        ("torchvision",),
        note="Residual is refused for the first block, whose values the others are given.",
    ),
    Repository("Lumina-Next", "lumina_next_t2i/models/model.py", lumina, "1c60696", ("fairscale",)),
    Repository(
        "SkyReels V2",
        "skyreels_v2_infer/modules/transformer.py",
        sky_reels,
        "abed76f",
        ("ftfy", "torchvision", "decord", "xfuser"),
        "its own function around flash-attention",
        "Residual is refused for the first block in float32, as it returns bfloat16.",
    ),
    Repository("Step-Video", "stepvideo/modules/model.py", step_video, "675e08c", ("xfuser",)),
    Repository(
        "PixArt-alpha",
        "diffusion/model/nets/PixArt.py",
        pixart,
        "cac2fd3",
        ("mmcv", "xformers", "torchvision"),
        "xformers",
    ),
    Repository("Allegro", "allegro/models/transformers/transformer_3d_allegro.py", allegro, "f395a54", ("xformers",)),
)
