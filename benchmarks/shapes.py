"""The models that the benchmark measures: stock diffusers classes at their real depths, at several widths."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

Inputs = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Size:
    """How wide a model is, and what it is given: a grid of tokens and a text."""

    config: Mapping[str, Any]
    frames: int
    height: int
    width: int
    text: int
    what: str = "reduced width"

    @property
    def tokens(self) -> int:
        return self.frames * self.height * self.width

    def with_tokens(self, tokens: int, multiple: int = 1) -> Size:
        """Change height and width, and if need be the frames, to come close to a number of tokens."""
        frames = max(1, min(self.frames, tokens // (4 * multiple**2)))
        height = max(1, round(math.sqrt(tokens / frames * self.height / self.width) / multiple)) * multiple
        width = max(1, round(tokens / frames / height / multiple)) * multiple
        what = f"{self.what}, {frames * height * width} of {self.tokens} tokens"
        return dataclasses.replace(self, frames=frames, height=height, width=width, what=what)


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model: its class, depth and published layer; inputs for two rows, `[uncond, cond]`."""

    name: str
    title: str
    model: str
    skipped: int
    """The layer of the published setting, as `stg.layers` numbers them."""
    cfg: bool
    make_inputs: Callable[[Mapping[str, Any], Size], Inputs]
    depth: Mapping[str, int]
    """What the configuration says about the number of blocks; empty for the U-Net, which is not a chain of blocks."""
    tiny: Size
    small: Size
    full: Size
    multiple: int = 1
    """Height and width must be multiples of this."""
    mode: str = "residual"
    own_stg: bool = False
    """Its stock pipeline has skip guidance of its own."""
    guiders: bool = False
    """The steps are those of a modular pipeline, with the guiders that there are for it."""

    @property
    def blocks(self) -> int | None:
        return sum(self.depth.values()) or None

    @property
    def rows(self) -> int:
        """Rows of a call without skip guidance."""
        return 2 if self.cfg else 1

    def formula(self, skipped: int | None = None) -> float | None:
        """Cost relative to a call without skip guidance, if blocks cost the same and nothing else costs anything."""
        if self.blocks is None:
            return None
        rest = self.blocks - (self.skipped if skipped is None else skipped) - 1
        return (self.rows * self.blocks + rest) / (self.rows * self.blocks)

    def resized(self, size: Size, tokens: int | None) -> Size:
        return size if tokens is None else size.with_tokens(tokens, self.multiple)

    def build(self, size: Size, device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
        """Build the model with random weights, directly on the device."""
        torch.manual_seed(0)
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                model: nn.Module = getattr(diffusers, self.model)(**self.depth, **size.config)
        finally:
            torch.set_default_dtype(default)
        if dtype != torch.float32:
            model.to(dtype=dtype)  # buffers that were computed in a type of their own
        return model.eval().requires_grad_(False)

    def inputs(self, model: nn.Module, size: Size, device: torch.device | str | None = None) -> Inputs:
        """Make the arguments of a call on two rows, `[uncond, cond]`, that look at the same latents.

        Args:
            model: what they are for.
            size: as the model.
            device: where it runs, if its weights do not lie there.
        """
        torch.manual_seed(1)
        parameter = next(model.parameters())

        def place(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.to(device or parameter.device, parameter.dtype if value.is_floating_point() else value.dtype)

        return {name: place(value) for name, value in self.make_inputs(size.config, size).items()}


def take(inputs: Inputs, rows: Sequence[int]) -> Inputs:
    """Make the arguments of a call on other rows: 0 is uncond, 1 is cond."""
    return {
        name: value[list(rows)] if isinstance(value, Tensor) and value.ndim else value for name, value in inputs.items()
    }


def _same(*shape: int) -> Tensor:
    return torch.randn(1, *shape).expand(2, *shape).contiguous()


def _mochi(config: Mapping[str, Any], size: Size) -> Inputs:
    return {
        "hidden_states": _same(12, size.frames, 2 * size.height, 2 * size.width),
        "encoder_hidden_states": torch.randn(2, size.text, config["text_embed_dim"]),
        "timestep": torch.tensor([500, 500]),
        "encoder_attention_mask": torch.ones(2, size.text, dtype=torch.bool),
    }


def _ltx(config: Mapping[str, Any], size: Size) -> Inputs:
    return {
        "hidden_states": _same(size.tokens, config["in_channels"]),
        "encoder_hidden_states": torch.randn(2, size.text, config["caption_channels"]),
        "timestep": torch.tensor([500, 500]),
        "encoder_attention_mask": torch.ones(2, size.text, dtype=torch.bool),
        "num_frames": size.frames,
        "height": size.height,
        "width": size.width,
    }


def _cogvideox(config: Mapping[str, Any], size: Size) -> Inputs:
    return {
        "hidden_states": _same(size.frames, 16, 2 * size.height, 2 * size.width),
        "encoder_hidden_states": torch.randn(2, size.text, config["text_embed_dim"]),
        "timestep": torch.tensor([500, 500]),
    }


def _wan(config: Mapping[str, Any], size: Size) -> Inputs:
    return {
        "hidden_states": _same(16, size.frames, 2 * size.height, 2 * size.width),
        "timestep": torch.tensor([500, 500]),
        "encoder_hidden_states": torch.randn(2, size.text, config["text_dim"]),
    }


def _hunyuan_video(config: Mapping[str, Any], size: Size) -> Inputs:
    return {
        "hidden_states": _same(16, size.frames, 2 * size.height, 2 * size.width),
        "timestep": torch.tensor([500, 500]),
        "encoder_hidden_states": torch.randn(2, size.text, config["text_embed_dim"]),
        "encoder_attention_mask": torch.ones(2, size.text, dtype=torch.int64),
        "pooled_projections": torch.randn(2, config["pooled_projection_dim"]),
        "guidance": torch.tensor([6000.0, 6000.0]),
    }


def _ltx2(config: Mapping[str, Any], size: Size) -> Inputs:
    audio = 8 * size.frames
    return {
        "hidden_states": _same(size.tokens, config["in_channels"]),
        "audio_hidden_states": _same(audio, config["audio_in_channels"]),
        "encoder_hidden_states": torch.randn(2, size.text, config["caption_channels"]),
        "audio_encoder_hidden_states": torch.randn(2, size.text, config["caption_channels"]),
        "timestep": torch.tensor([500, 500]),
        "encoder_attention_mask": torch.ones(2, size.text, dtype=torch.bool),
        "audio_encoder_attention_mask": torch.ones(2, size.text, dtype=torch.bool),
        "num_frames": size.frames,
        "height": size.height,
        "width": size.width,
        "audio_num_frames": audio,
    }


def _svd(config: Mapping[str, Any], size: Size) -> Inputs:
    return {
        "sample": _same(size.frames, 8, size.height, size.width),
        "timestep": torch.tensor(1.6),
        "encoder_hidden_states": torch.randn(2, 1, config["cross_attention_dim"]),
        "added_time_ids": torch.ones(2, 3),
    }


def _mochi_config(heads: int, head: int, pooled: int, text: int, time: int) -> dict[str, Any]:
    return {
        "num_attention_heads": heads,
        "attention_head_dim": head,
        "pooled_projection_dim": pooled,
        "text_embed_dim": text,
        "time_embed_dim": time,
    }


def _ltx_config(heads: int, head: int, channels: int, caption: int) -> dict[str, Any]:
    return {
        "in_channels": channels,
        "out_channels": channels,
        "num_attention_heads": heads,
        "attention_head_dim": head,
        "cross_attention_dim": heads * head,
        "caption_channels": caption,
    }


def _ltx2_config(heads: int, head: int, channels: int, caption: int) -> dict[str, Any]:
    return {
        **_ltx_config(heads, head, channels, caption),
        "audio_in_channels": channels,
        "audio_out_channels": channels,
        "audio_num_attention_heads": heads,
        "audio_attention_head_dim": head // 2,
        "audio_cross_attention_dim": heads * head // 2,
        "perturbed_attn": True,
    }


def _cogvideox_config(
    heads: int, head: int, text: int, time: int, size: tuple[int, int, int], length: int
) -> dict[str, Any]:
    frames, height, width = size
    return {
        "num_attention_heads": heads,
        "attention_head_dim": head,
        "text_embed_dim": text,
        "time_embed_dim": time,
        "max_text_seq_length": length,
        "sample_frames": 4 * (frames - 1) + 1,
        "sample_height": 2 * height,
        "sample_width": 2 * width,
    }


def _wan_config(heads: int, head: int, ffn: int, text: int, freq: int) -> dict[str, Any]:
    return {
        "num_attention_heads": heads,
        "attention_head_dim": head,
        "ffn_dim": ffn,
        "text_dim": text,
        "freq_dim": freq,
    }


def _hunyuan_config(heads: int, axes: tuple[int, int, int], text: int, pooled: int) -> dict[str, Any]:
    return {
        "num_attention_heads": heads,
        "attention_head_dim": sum(axes),
        "rope_axes_dim": axes,
        "text_embed_dim": text,
        "pooled_projection_dim": pooled,
    }


def _svd_config(channels: Sequence[int], heads: Sequence[int], cross: int, frames: int) -> dict[str, Any]:
    return {
        "sample_size": None,
        "block_out_channels": tuple(channels),
        "num_attention_heads": tuple(heads),
        "cross_attention_dim": cross,
        "num_frames": frames,
    }


# At these sizes a step takes a second or more on one core, a block milliseconds, and a hook microseconds.
_GRID, _TEXT = (6, 10, 12), 32
_TINY, _TINY_TEXT = (2, 4, 6), 5
_WAN = Size(_wan_config(2, 16, 96, 16, 16), *_TINY, _TINY_TEXT)

_ALL = (
    Shape(
        "mochi",
        "Mochi 1",
        "MochiTransformer3DModel",
        34,
        True,
        _mochi,
        {"num_layers": 48},
        Size(_mochi_config(4, 8, 16, 16, 16), *_TINY, _TINY_TEXT),
        Size(_mochi_config(4, 64, 128, 256, 64), *_GRID, _TEXT),
        Size(_mochi_config(24, 128, 1536, 4096, 256), 28, 30, 53, 256, "480x848, 163 frames"),
    ),
    Shape(
        "ltx",
        "LTX-Video 2B",
        "LTXVideoTransformer3DModel",
        19,
        True,
        _ltx,
        {"num_layers": 28},
        Size(_ltx_config(4, 8, 8, 16), *_TINY, _TINY_TEXT),
        Size(_ltx_config(4, 64, 32, 256), *_GRID, _TEXT),
        Size(_ltx_config(32, 64, 128, 4096), 21, 16, 22, 128, "512x704, 161 frames"),
    ),
    Shape(
        "cogvideox",
        "CogVideoX-2B",
        "CogVideoXTransformer3DModel",
        11,
        True,
        _cogvideox,
        {"num_layers": 30},
        Size(_cogvideox_config(4, 8, 16, 16, _TINY, _TINY_TEXT), *_TINY, _TINY_TEXT),
        Size(_cogvideox_config(4, 64, 256, 128, _GRID, _TEXT), *_GRID, _TEXT),
        Size(_cogvideox_config(30, 64, 4096, 512, (13, 30, 45), 226), 13, 30, 45, 226, "480x720, 49 frames"),
    ),
    Shape(
        "wan-1.3b",
        "Wan 2.1 1.3B",
        "WanTransformer3DModel",
        2,
        True,
        _wan,
        {"num_layers": 30},
        _WAN,
        Size(_wan_config(4, 64, 1536, 256, 64), *_GRID, _TEXT),
        Size(_wan_config(12, 128, 8960, 4096, 256), 21, 30, 52, 512, "480x832, 81 frames"),
    ),
    Shape(
        "wan-14b",
        "Wan 2.1 14B",
        "WanTransformer3DModel",
        8,
        True,
        _wan,
        {"num_layers": 40},
        _WAN,
        Size(_wan_config(4, 64, 704, 256, 64), *_GRID, _TEXT),
        Size(_wan_config(40, 128, 13824, 4096, 256), 21, 30, 52, 512, "480x832, 81 frames"),
    ),
    Shape(
        "hunyuan-video",
        "HunyuanVideo, no CFG",
        "HunyuanVideoTransformer3DModel",
        2,
        False,
        _hunyuan_video,
        {"num_layers": 20, "num_single_layers": 40},
        Size(_hunyuan_config(2, (4, 6, 6), 16, 16), *_TINY, _TINY_TEXT),
        Size(_hunyuan_config(4, (8, 28, 28), 256, 64), *_GRID, _TEXT),
        Size(_hunyuan_config(24, (16, 56, 56), 4096, 768), 16, 20, 32, 256, "320x512, 61 frames (diffusers' example)"),
    ),
    Shape(
        "svd",
        "Stable Video Diffusion",
        "UNetSpatioTemporalConditionModel",
        7,
        True,
        _svd,
        {},
        Size(_svd_config((32, 32, 64, 64), (1, 1, 2, 2), 16, 2), 2, 8, 8, 1),
        Size(_svd_config((64, 128, 256, 256), (1, 2, 4, 4), 256, 4), 4, 24, 32, 1),
        Size(_svd_config((320, 640, 1280, 1280), (5, 10, 20, 20), 1024, 25), 25, 72, 128, 1, "576x1024, 25 frames"),
        multiple=8,
    ),
)
_LTX_2 = Shape(
    "ltx-2",
    "LTX-2",
    "LTX2VideoTransformer3DModel",
    29,
    True,
    _ltx2,
    {"num_layers": 48},
    Size(_ltx2_config(4, 8, 8, 16), *_TINY, _TINY_TEXT),
    Size(_ltx2_config(4, 48, 32, 192), *_GRID, _TEXT),
    Size(_ltx2_config(32, 128, 128, 3840), 16, 16, 24, 256, "512x768, 121 frames"),
    mode="values",
    own_stg=True,
)
_MODULAR = dataclasses.replace(
    next(shape for shape in _ALL if shape.name == "wan-1.3b"),
    name="wan-modular",
    title="Wan 2.1 1.3B, modular pipeline",
    guiders=True,
)
SHAPES = {shape.name: shape for shape in (*_ALL, _LTX_2, _MODULAR)}
