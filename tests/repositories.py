"""Check models as their authors publish them: python -m tests.repositories PATH

PATH holds checkouts of the repositories, each in a folder of any name; none is shipped with this project. For every one
that is known, a tiny random model of its own code is built, and each numbered kind of block is skipped in three modes,
by `skip`, `apply` and `Guider`, and compared with a deep copy in which that block was changed by hand. Kernels that a
CPU does not have (flash-attention) are replaced by a function that torch cannot look into either.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import stg_hooks as stg
from tests.opaque import KERNEL, attend, attend_varlen, plain

ROWS, TEXT, MODES = 2, 5, ("residual", "values", "attention")


@dataclasses.dataclass
class Tiny:
    """A tiny model and a call of it."""

    model: nn.Module
    cond: dict[str, Any]
    uncond: dict[str, Any]
    """The arguments that differ without the prompt."""
    text: dict[str, slice] = dataclasses.field(default_factory=dict)
    """Class of a block to the text among the tokens of its self-attention."""
    through: dict[str, Callable[..., Any]] = dataclasses.field(default_factory=dict)
    """Class of a block to what it gives when it is bypassed; its first argument, if left out. `None`: it cannot be."""
    first: str = "x"
    """The argument that is denoised."""
    isolated: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The arguments with which it keeps its streams apart itself, where it has several."""
    modes: tuple[str, ...] = MODES
    """Those that are tried."""


@dataclasses.dataclass(frozen=True)
class Repository:
    """How to build a tiny model of a repository."""

    name: str
    mark: str
    """A file that tells it, relative to the folder that its modules are imported from."""
    build: Callable[[], Tiny]
    commit: str
    """The one that was tried."""
    absent: tuple[str, ...] = ()
    """Modules that it imports and that are replaced by empty ones, unless they are installed."""
    kernel: str = "torch's own"
    """What computes its attention."""
    note: str = ""


def random(*shape: int) -> Tensor:
    return torch.randn(*shape)


def first_two(img: Tensor, txt: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return img, txt


def nothing(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Give what a branch adds when it is bypassed."""
    return torch.zeros_like(x)


# --- the repositories -------------------------------------------------------------------------------------------------


def flux() -> Tiny:
    model = module("flux.model")
    params = model.FluxParams(8, 8, 6, 12, 32, 2.0, 2, 2, 2, [4, 6, 6], 10000, True, True)
    ids = torch.arange(8.0)[None, :, None].expand(ROWS, 8, 3)
    cond = {
        "img": random(ROWS, 8, 8),
        "img_ids": ids,
        "txt": random(ROWS, TEXT, 12),
        "txt_ids": torch.zeros(ROWS, TEXT, 3),
        "timesteps": torch.full((ROWS,), 0.5),
        "y": random(ROWS, 6),
        "guidance": torch.full((ROWS,), 3.0),
    }
    text = dict.fromkeys(("DoubleStreamBlock", "SingleStreamBlock"), slice(0, TEXT))
    through = {"DoubleStreamBlock": first_two}
    return Tiny(model.Flux(params), cond, {"txt": random(ROWS, TEXT, 12)}, text, through, "img")


def open_sora() -> Tiny:
    model = module("opensora.models.mmdit.model")
    config = model.MMDiTConfig(
        from_pretrained="",
        cache_dir="",
        in_channels=8,
        vec_in_dim=6,
        context_in_dim=12,
        hidden_size=32,
        mlp_ratio=2.0,
        num_heads=2,
        depth=2,
        depth_single_blocks=2,
        axes_dim=[4, 6, 6],
        theta=10000,
        qkv_bias=True,
        guidance_embed=False,
    )
    model.auto_grad_checkpoint = lambda block, *args: block(*args)
    module("opensora.models.mmdit.layers").LigerRMSNormFunction = _RmsNorm
    ids = torch.arange(8.0)[None, :, None].expand(ROWS, 8, 3)
    cond = {
        "img": random(ROWS, 8, 8),
        "img_ids": ids,
        "txt": random(ROWS, TEXT, 12),
        "txt_ids": torch.zeros(ROWS, TEXT, 3),
        "timesteps": torch.full((ROWS,), 0.5),
        "y_vec": random(ROWS, 6),
    }
    text = dict.fromkeys(("DoubleStreamBlock", "SingleStreamBlock"), slice(0, TEXT))
    through = {"DoubleStreamBlock": first_two}
    return Tiny(model.MMDiTModel(config), cond, {"txt": random(ROWS, TEXT, 12)}, text, through, "img")


class _RmsNorm:
    @staticmethod
    def apply(x: Tensor, scale: Tensor, eps: float, *_: Any) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], scale, eps)


def hunyuan_video() -> Tiny:
    model = module("hyvideo.modules.models")
    frames, side = 2, 4
    tokens = frames * (side // 2) ** 2

    def lengths(mask: Tensor, images: int) -> Tensor:
        ends = [n for i, t in enumerate(mask.sum(1).tolist()) for n in (i * len(mask[0]) + t, (i + 1) * len(mask[0]))]
        shifts = [images * (1 + i // 2) for i in range(len(ends))]
        return torch.tensor([0, *(end + shift for end, shift in zip(ends, shifts, strict=True))], dtype=torch.int32)

    model.get_cu_seqlens = lengths
    sizes = types.SimpleNamespace(text_states_dim=12, text_states_dim_2=6)
    transformer = model.HYVideoDiffusionTransformer(
        sizes, [1, 2, 2], 4, 4, 32, 2, 2.0, mm_double_blocks_depth=2, mm_single_blocks_depth=2, rope_dim_list=[4, 6, 6]
    )
    cond = {
        "x": random(ROWS, 4, frames, side, side),
        "t": torch.full((ROWS,), 500.0),
        "text_states": random(ROWS, TEXT, 12),
        "text_mask": torch.ones(ROWS, TEXT, dtype=torch.int64),
        "text_states_2": random(ROWS, 6),
        "freqs_cos": random(tokens, 16).cos(),
        "freqs_sin": random(tokens, 16).sin(),
        "return_dict": False,
    }
    text = dict.fromkeys(("MMDoubleStreamBlock", "MMSingleStreamBlock"), slice(tokens, tokens + TEXT))
    through = {"MMDoubleStreamBlock": first_two}
    return Tiny(transformer, cond, {"text_states": random(ROWS, TEXT, 12)}, text, through)


def wan() -> Tiny:
    model = module("wan.modules.model")

    def flash_attention(q: Tensor, k: Tensor, v: Tensor, k_lens: Tensor | None = None, **_: Any) -> Tensor:
        return attend(q, k, v, k_lens=k_lens)

    model.flash_attention = module("wan.modules.attention").flash_attention = flash_attention  # the kernel wants a GPU
    transformer = model.WanModel(
        text_len=TEXT, in_dim=4, dim=32, ffn_dim=48, freq_dim=16, text_dim=12, out_dim=4, num_heads=2, num_layers=3
    )
    cond = {
        "x": [random(4, 2, 4, 4) for _ in range(ROWS)],
        "t": torch.full((ROWS,), 500.0),
        "context": [random(TEXT, 12) for _ in range(ROWS)],
        "seq_len": 8,
    }
    return Tiny(transformer, cond, {"context": [random(TEXT, 12) for _ in range(ROWS)]})


def u_vit() -> Tiny:
    model = module("libs.uvit").UViT(16, 4, 4, 32, 4, 2, 2.0, num_classes=7)
    cond = {"x": random(ROWS, 4, 16, 16), "timesteps": torch.full((ROWS,), 500.0), "y": torch.tensor([1, 2])}
    return Tiny(model, cond, {"y": torch.tensor([6, 6])})


def edm2() -> Tiny:
    model = module("training.networks_edm2").Precond(
        16, 4, 3, use_fp16=False, model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[8],
        channels_per_head=16,
    )  # fmt: skip
    cond = {"x": random(ROWS, 4, 16, 16), "sigma": torch.full((ROWS,), 2.0), "class_labels": torch.eye(3)[:ROWS]}
    return Tiny(model, cond, {"class_labels": torch.zeros(ROWS, 3)})


def edm() -> Tiny:
    model = module("training.networks").EDMPrecond(
        16, 4, 3, model_type="SongUNet", model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[8]
    )
    cond = {"x": random(ROWS, 4, 16, 16), "sigma": torch.full((ROWS,), 2.0), "class_labels": torch.eye(3)[:ROWS]}
    return Tiny(model, cond, {"class_labels": torch.zeros(ROWS, 3)})


def sd3() -> Tiny:
    model = module("mmditx").MMDiTX(
        None, 2, 4, depth=2, adm_in_channels=6, pos_embed_max_size=8, num_patches=64, qk_norm="rms",
        context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 12, "out_features": 128}},
    )  # fmt: skip
    cond = {
        "x": random(ROWS, 4, 8, 8),
        "t": torch.full((ROWS,), 500.0),
        "y": random(ROWS, 6),
        "context": random(ROWS, TEXT, 12),
    }
    changed = {"context": random(ROWS, TEXT, 12), "y": random(ROWS, 6)}
    return Tiny(model, cond, changed, {"JointBlock": slice(0, TEXT)}, {"JointBlock": joint_block})


def joint_block(context: Tensor, x: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    return context, x


def dit() -> Tiny:
    model = module("models").DiT(8, 2, 4, 32, 3, 2, 2.0, num_classes=7, learn_sigma=False)
    cond = {"x": random(ROWS, 4, 8, 8), "t": torch.full((ROWS,), 500.0), "y": torch.tensor([1, 2])}
    return Tiny(model, cond, {"y": torch.tensor([7, 7])})


def mdt() -> Tiny:
    model = module("masked_diffusion.models").MDTv2(
        input_size=8, patch_size=2, hidden_size=32, depth=4, num_heads=2, num_classes=7, learn_sigma=False,
        mask_ratio=0.3, decode_layer=1,
    )  # fmt: skip
    cond = {"x": random(ROWS, 4, 8, 8), "t": torch.full((ROWS,), 500.0), "y": torch.tensor([1, 2])}
    return Tiny(model, cond, {"y": torch.tensor([7, 7])})


def lucidrains() -> Tiny:
    model = module("denoising_diffusion_pytorch.denoising_diffusion_pytorch").Unet(
        16, dim_mults=(1, 2), attn_heads=2, attn_dim_head=8
    )
    through = {"Attention": nothing, "LinearAttention": nothing}
    return Tiny(model, {"x": random(ROWS, 3, 16, 16), "time": torch.full((ROWS,), 500.0)}, {}, {}, through)


def ltx_video() -> Tiny:
    model = module("ltx_video.models.transformers.transformer3d").Transformer3DModel(
        2, 16, 8, 8, 3, norm_num_groups=1, cross_attention_dim=32, attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_elementwise_affine=False, adaptive_norm="single_scale_shift",
        standardization_norm="rms_norm", caption_channels=12, positional_embedding_type="rope",
        positional_embedding_theta=10000.0, positional_embedding_max_pos=[20, 64, 64], qk_norm="rms_norm",
        timestep_scale_multiplier=1000,
    )  # fmt: skip
    cond = {
        "hidden_states": random(ROWS, 8, 8),
        "indices_grid": torch.arange(8.0).expand(ROWS, 3, 8),
        "encoder_hidden_states": random(ROWS, TEXT, 12),
        "timestep": torch.full((ROWS, 1), 0.5),
    }
    return Tiny(model, cond, {"encoder_hidden_states": random(ROWS, TEXT, 12)}, first="hidden_states")


def ltx_2() -> Tiny:
    core, modality = module("ltx_core.model.transformer.model"), module("ltx_core.model.transformer.modality")
    transformer = module("ltx_core.model.transformer.transformer")
    model = core.LTXModel(
        model_type=core.LTXModelType.AudioVideo, num_attention_heads=2, attention_head_dim=24, in_channels=8,
        out_channels=8, num_layers=3, cross_attention_dim=48, audio_num_attention_heads=2, audio_attention_head_dim=12,
        audio_in_channels=6, audio_out_channels=6, audio_cross_attention_dim=24,
        ops=transformer.TransformerOpsConfig.from_functions(),
    )  # fmt: skip
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)

    def stream(tokens: int, channels: int, axes: int, context: Tensor) -> Any:
        positions = torch.arange(tokens * 2.0).view(1, 1, tokens, 2).expand(ROWS, axes, tokens, 2)
        level = torch.full((ROWS,), 0.5)
        return modality.Modality(
            random(ROWS, tokens, channels), level, level[:, None].expand(ROWS, tokens), positions, context
        )

    video, audio = stream(8, 8, 3, random(ROWS, TEXT, 48)), stream(4, 6, 1, random(ROWS, TEXT, 24))
    own = module("ltx_core.guidance.perturbations")
    perturbations = own.BatchedPerturbationConfig.empty(ROWS, 3)
    between = (own.PerturbationType.SKIP_A2V_CROSS_ATTN, own.PerturbationType.SKIP_V2A_CROSS_ATTN)
    apart = own.PerturbationConfig([own.Perturbation(kind, None) for kind in between])
    other = dataclasses.replace(video, context=random(ROWS, TEXT, 48))
    through = {"BasicAVTransformerBlock": lambda video, audio, *_: (video, audio)}
    return Tiny(
        model, {"video": video, "audio": audio, "perturbations": perturbations}, {"video": other}, {}, through, "video",
        {"perturbations": own.BatchedPerturbationConfig([apart] * ROWS, 3)},
    )  # fmt: skip


REPOSITORIES = (
    Repository(
        "HunyuanVideo",
        "hyvideo/modules/models.py",
        hunyuan_video,
        "fa14b00",
        kernel="flash-attention",
    ),
    Repository(
        "Wan 2.1",
        "wan/modules/model.py",
        wan,
        "9737cba",
        ("easydict", "dashscope", "decord", "ftfy", "torchvision"),
        "its own function around flash-attention",
        "Takes and returns lists of samples.",
    ),
    Repository("FLUX.1", "flux/model.py", flux, "802fb47", ("fire", "safetensors", "cv2", "requests")),
    Repository(
        "Open-Sora 2",
        "opensora/models/mmdit/model.py",
        open_sora,
        "7ad6a96",
        ("colossalai", "mmengine", "liger_kernel", "tensornvme", "omegaconf", "pandas", "torchvision", "cv2", "av"),
        "flash-attention",
    ),
    Repository("LTX-Video", "ltx_video/models/transformers/transformer3d.py", ltx_video, "5260738"),
    Repository(
        "LTX-2",
        "ltx_core/model/transformer/model.py",
        ltx_2,
        "400fd31",
        ("triton",),
        note="Its blocks take and return dataclasses.",
    ),
    Repository("SD3.5", "mmditx.py", sd3, "fbf8f48"),
    Repository("DiT", "models.py", dit, "ed81ce2", ("torchvision",)),
    Repository(
        "MDT",
        "masked_diffusion/models.py",
        mdt,
        "7d26c21",
        ("torchvision", "blobfile", "mpi4py"),
        note="The blocks of its masked training are not numbered.",
    ),
    Repository("U-ViT", "libs/uvit.py", u_vit, "ce55170"),
    Repository(
        "EDM2",
        "training/networks_edm2.py",
        edm2,
        "4bf8162",
        ("click", "psutil", "requests"),
        "a softmax of its own",
        "Residual is refused for blocks that change the number of channels or the resolution.",
    ),
    Repository(
        "EDM",
        "training/networks.py",
        edm,
        "008a4e5",
        ("click", "psutil", "requests"),
        "a softmax of its own",
        "Residual is refused for blocks that change the number of channels or the resolution.",
    ),
    Repository(
        "denoising-diffusion-pytorch",
        "denoising_diffusion_pytorch/denoising_diffusion_pytorch.py",
        lucidrains,
        "faed4db",
        ("torchvision", "ema_pytorch", "accelerate", "pytorch_fid", "scipy"),
        "torch's own",
        "Modes of attention are refused: it has keys that belong to no token, and linear attention without a map.",
    ),
)


# --- importing them ---------------------------------------------------------------------------------------------------


def module(name: str) -> Any:
    return importlib.import_module(name)


class _Empty(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for packages that are not installed, and are not needed to build a model."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        is_one = name.partition(".")[0] in self._names
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if is_one else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        made = types.ModuleType(spec.name)
        made.__getattr__ = lambda name: _nothing(name)  # type: ignore[method-assign]
        return made

    def exec_module(self, module: types.ModuleType) -> None:
        module.__path__ = []


def _nothing(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return mock.MagicMock(name=name)


@contextmanager
def importable(root: Path, absent: tuple[str, ...]) -> Iterator[None]:
    """Import from a folder within a `with`; afterwards, what was imported from it is forgotten."""
    finder, before = _Empty(absent), set(sys.modules)
    for name in ("diffusers.models.attention_dispatch", "transformers"):  # they look for kernels when imported
        with suppress(ImportError):
            module(name)
    interface = types.ModuleType("flash_attn.flash_attn_interface")
    interface.flash_attn_func, interface.flash_attn_varlen_func = attend, attend_varlen
    interface._flash_attn_forward = None
    package = types.ModuleType("flash_attn")
    vars(package).update({k: v for k, v in vars(interface).items() if k.startswith("flash")})
    package.flash_attn_interface = interface
    for made in (package, interface):
        made.__spec__ = importlib.machinery.ModuleSpec(made.__name__, None)
    sys.modules.update({"flash_attn": package, "flash_attn.flash_attn_interface": interface})
    sys.path.insert(0, str(root))
    sys.meta_path.append(finder)  # the last to be asked: what is installed comes first
    try:
        with mock.patch.object(torch.cuda, "current_device", return_value=0):
            yield
    finally:
        sys.path.remove(str(root))
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - before:
            origin = getattr(sys.modules[name], "__file__", None)
            if origin is None or str(root) in origin:
                del sys.modules[name]


_OTHERS = {
    "EDM": ("training/networks_edm2.py", False),
    "DiT": ("diffusion/gaussian_diffusion.py", True),
    "PixArt-alpha": ("diffusion/model/nets/pixart_controlnet.py", True),
    "PixArt-sigma": ("diffusion/model/nets/pixart_controlnet.py", False),
    "SiT": ("transport/transport.py", True),
    "Lumina-Image 2": ("transport/transport.py", True),
}
"""A further file that tells a repository by being there, or by being absent, where others have the same marks."""


def found_under(path: Path) -> Iterator[tuple[Repository, Path]]:
    """Find the known repositories in the folders below a path."""
    from tests.further_repositories import FURTHER
    from tests.more_repositories import MORE

    for repository in (*REPOSITORIES, *FURTHER, *MORE):
        for mark in sorted(path.glob(f"**/{repository.mark}")):
            root = mark.parents[len(Path(repository.mark).parts) - 1]
            has_another = _OTHERS.get(repository.name)
            if has_another is None or (root / has_another[0]).exists() is has_another[1]:
                yield repository, root
                break


# --- the checks -------------------------------------------------------------------------------------------------------


def changed(tiny: Tiny, name: str, mode: str) -> nn.Module:
    """Copy a model, and change one block by hand."""
    model = copy.deepcopy(tiny.model)
    block = model.get_submodule(name)
    forward, kind = block.forward, type(block).__name__
    through = tiny.through.get(kind, lambda first, *_, **__: first)
    if mode == "residual":
        block.forward = through
        return model

    def around(*args: Any, **kwargs: Any) -> Any:
        change = by_hand(mode, tiny.text.get(kind))
        with in_place_of_attention(change):
            return forward(*args, **kwargs)

    block.forward = around
    return model


def by_hand(mode: str, text: slice | None) -> Any:
    """Return what a perturbed attention gives, for `(..., tokens, channels)`, by the formula with the whole map."""

    def change(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        total = q.shape[-2]
        if total != k.shape[-2]:
            return plain(q, k, v, mask)
        if mode == "values" or text is None:
            return v
        is_text = torch.zeros(total, dtype=torch.bool)
        is_text[text] = True
        seen = is_text | is_text[:, None]
        return plain(q, k, v, torch.eye(total, dtype=torch.bool) | (seen if mask is None else seen & mask))

    return change


@contextmanager
def in_place_of_attention(change: Any) -> Iterator[None]:
    def sdpa(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
        if attn_mask is not None and attn_mask.is_floating_point():  # what is added to the logits: nothing, or a lot
            attn_mask = attn_mask == 0
        return change(query, key, value, attn_mask)

    def softmax(logits: Tensor, dim: int | None = None, **_: Any) -> Tensor:
        is_square = logits.ndim > 1 and logits.shape[-1] == logits.shape[-2]
        if logits.ndim < 4 and not is_square:  # that of a gate between experts; of more dimensions it is attention
            return logits.exp() / logits.exp().sum(-1, keepdim=True)
        return torch.eye(logits.shape[-1]).expand(logits.shape).to(logits.dtype)

    KERNEL.change = change
    is_fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with ExitStack() as stack:
            for owner, name, instead in (
                (F, "scaled_dot_product_attention", sdpa),
                (Tensor, "softmax", softmax),
                (torch, "softmax", softmax),
            ):
                stack.enter_context(mock.patch.object(owner, name, instead))
            yield
    finally:
        KERNEL.change = plain
        torch.backends.mha.set_fastpath_enabled(is_fast)


def tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def run(model: nn.Module, arguments: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        return tensors(model(**arguments))


def compare(actual: list[Tensor], expected: list[Tensor]) -> str:
    """Say whether predictions agree."""
    if len(actual) != len(expected):
        return f"{len(actual)} predictions, not {len(expected)}"
    gaps = [float((a - e).abs().max() / (e.std() + 1e-12)) for a, e in zip(actual, expected, strict=True)]
    return "" if max(gaps) < 1e-4 else f"differs by {max(gaps):.1e} standard deviations"


def attempts(tiny: Tiny) -> Iterator[tuple[str, str, str]]:
    """Try the blocks of each class; give what was tried, the block, and what was wrong with it, if anything."""
    numbered = [layer for layer in stg.layers(tiny.model) if layer.index is not None]
    if not numbered:
        numbered = [layer for layer in stg.layers(tiny.model, example=tiny.cond) if layer.index is not None]
    order: list[str] = []
    handles = [x.module.register_forward_hook(lambda *_, n=x.name: order.append(n)) for x in numbered]
    cond, uncond = run(tiny.model, tiny.cond), None
    for handle in handles:
        handle.remove()
    yield "layers", "", "" if numbered and order == [layer.name for layer in numbered] else f"they run as {order}"
    shared = {name: value for name, value in tiny.cond.items() if name not in tiny.uncond}
    both = {name: tiny.cond[name] for name in tiny.uncond}
    if tiny.uncond:
        uncond = run(tiny.model, {**tiny.cond, **tiny.uncond})
    if tiny.isolated:
        weak = run(tiny.model, {**tiny.cond, **tiny.isolated})
        with stg.skip(tiny.model, mode="isolated"):
            yield "isolated: skip", "", compare(run(tiny.model, tiny.cond), weak) or unchanged(weak, cond)
    first, last = {x.block: x for x in numbered[::-1]}, {x.block: x for x in numbered}
    for layer in {x.name: x for x in (*first.values(), *last.values())}.values():
        for mode in tiny.modes:
            try:
                weak = run(changed(tiny, layer.name, mode), tiny.cond)
            except RuntimeError:  # its shapes do not allow it
                yield f"{mode}: refused", layer.name, refused(tiny, layer, mode)
                continue
            try:
                with stg.skip(tiny.model, [layer.index], mode):
                    skipped = run(tiny.model, tiny.cond)
                yield f"{mode}: skip", layer.name, compare(skipped, weak) or unchanged(weak, cond)
                terms = [1.5 * (c - w) for c, w in zip(cond, weak, strict=True)]
                with stg.apply(tiny.model, layers=[layer.index], mode=mode, scale=1.5):
                    guided = run(tiny.model, tiny.cond)
                yield f"{mode}: apply", layer.name, compare(guided, added(cond, terms))
                options: dict[str, Any] = {"guidance_scale": 3.0} if uncond else {}
                guider = stg.Guider(tiny.model, layers=[layer.index], mode=mode, scale=1.5, **options)
                own = {"cond": both, "uncond": tiny.uncond} if uncond else {}
                with torch.no_grad():
                    guided = tensors(guider(**shared, **own))
                pairs = zip(cond, uncond or cond, strict=True)
                whole = added([u + 3.0 * (c - u) for c, u in pairs] if uncond else cond, terms)
                yield f"{mode}: Guider", layer.name, compare(guided, whole)
            except Exception as error:
                yield mode, layer.name, f"{type(error).__name__}: {error}"


def refused(tiny: Tiny, layer: Any, mode: str) -> str:
    """Say whether what cannot be is refused with an error of ours."""
    try:
        with stg.skip(tiny.model, [layer.index], mode):
            run(tiny.model, tiny.cond)
    except stg.StgError:
        return ""
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "it was not refused"


def settle(model: nn.Module) -> None:
    """Give parameters values by which blocks change something: some are zero, or anything, before training."""
    model.eval().requires_grad_(False)
    for parameter in model.parameters():
        size = parameter.abs().max() if parameter.numel() else 1.0
        if not 1e-3 < size < 1e3:  # also where it is not a number
            nn.init.normal_(parameter, std=0.1)


def added(one: list[Tensor], other: list[Tensor]) -> list[Tensor]:
    return [a + b for a, b in zip(one, other, strict=True)]


def unchanged(weak: list[Tensor], cond: list[Tensor]) -> str:
    return "it changed nothing" if all(map(torch.equal, weak, cond)) else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="a folder that holds checkouts")
    parser.add_argument("--only", nargs="*", default=(), help="names of repositories")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    wrong = 0
    for repository, root in found_under(arguments.path):
        if arguments.only and repository.name not in arguments.only:
            continue
        with importable(root, repository.absent):
            torch.manual_seed(0)
            try:
                tiny = repository.build()
            except Exception as error:  # of their code, which may have changed
                print(f"{repository.name}: not built, {type(error).__name__}: {error}")
                continue
            settle(tiny.model)
            found = list(attempts(tiny))
        bad = [(what, block, why) for what, block, why in found if why]
        wrong += len(bad)
        print(f"{repository.name}: {len(found) - len(bad)} of {len(found)} right")
        for what, block, why in bad:
            print(f"  {what} {block}: {why}")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
