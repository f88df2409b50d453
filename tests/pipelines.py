"""Stock diffusers pipelines on the tiny golden models, and skip guidance for them as a textbook would write it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests import zoo

GOLDEN = Path(__file__).resolve().parent / "golden"
FAMILIES = ("mochi", "ltx", "cogvideox", "hunyuan_video", "wan")
BATCHED_CFG = ("mochi", "ltx", "cogvideox")
"""Families that put [uncond, cond] into one call; the others make two calls."""

_FOUR = (8, 8, 8, 8)
_ONES = (1, 1, 1, 1, 1)

# Only their compression ratios matter: everything runs on latents.
VAES: dict[str, Callable[[], nn.Module]] = {
    "mochi": lambda: diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=_ONES,
    ),
    "ltx": lambda: diffusers.AutoencoderKLLTXVideo(
        block_out_channels=_FOUR,
        decoder_block_out_channels=_FOUR,
        layers_per_block=_ONES,
        decoder_layers_per_block=_ONES,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        latent_channels=8,
        patch_size=1,
    ),
    "cogvideox": lambda: diffusers.AutoencoderKLCogVideoX(
        block_out_channels=_FOUR,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        temporal_compression_ratio=4,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
    ),
    "hunyuan_video": lambda: diffusers.AutoencoderKLHunyuanVideo(
        block_out_channels=_FOUR, layers_per_block=1, latent_channels=4, norm_num_groups=2
    ),
    "wan": lambda: diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    ),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One recorded run: how it was made, on which weights, and what came out."""

    name: str
    info: dict[str, Any]
    config: dict[str, Any]
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    expected: dict[str, Tensor]

    @property
    def layers(self) -> list[int]:
        return list(self.info["layers"])

    @property
    def scale(self) -> float:
        return float(self.info["scale"])

    @property
    def steps(self) -> int:
        return int(self.info["call"]["num_inference_steps"])

    @property
    def guidance_scale(self) -> float:
        """The CFG weight; 1.0 for HunyuanVideo, where `guidance_scale` is an input of the model instead."""
        return 1.0 if self.name == "hunyuan_video" else float(self.info["call"]["guidance_scale"])


@functools.cache
def load_case(name: str) -> Case:
    folder = GOLDEN / name
    info, config = (json.loads((folder / file).read_text()) for file in ("case.json", "config.json"))
    tensors = [load_file(folder / f"{file}.safetensors") for file in ("model", "inputs", "expected")]
    return Case(name, info, config, *tensors)


@functools.cache
def _vae(name: str) -> nn.Module:
    return VAES[name]().eval()


def build_transformer(case: Case) -> nn.Module:
    model = getattr(diffusers, case.info["model"]).from_config(case.config).eval()
    model.load_state_dict(case.weights)
    return model


def build_pipeline(case: Case, transformer: nn.Module, **more: Any) -> Any:
    """Put a stock pipeline around a denoiser, without text encoders."""
    cls = getattr(diffusers, case.info["pipeline"])
    parameters = inspect.signature(cls.__init__).parameters.values()
    absent = {p.name: None for p in parameters if p.name != "self" and p.default is inspect.Parameter.empty}
    scheduler = getattr(diffusers, case.info["scheduler"]).from_config(case.info["scheduler_config"])
    pipe = cls(**{**absent, "scheduler": scheduler, "vae": _vae(case.name), "transformer": transformer, **more})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build(name: str) -> tuple[Any, dict[str, Any], Case]:
    """Build a stock pipeline with weights of its own.

    Returns:
        The pipeline, the arguments of the recorded call (for `run`), and the case.
    """
    case = load_case(name)
    call = {**case.inputs, **case.info["call"], "output_type": "latent", "return_dict": False}
    return build_pipeline(case, build_transformer(case)), call, case


def build_wan_2_2() -> tuple[Any, dict[str, Any], Case]:
    """Build a Wan pipeline with two different denoisers: two of its four steps each, and a CFG weight each."""
    _, call, case = build("wan")
    high, low = build_transformer(case), build_transformer(case)
    low.blocks = nn.ModuleList(reversed(low.blocks))
    pipe = build_pipeline(case, high, transformer_2=low, boundary_ratio=0.9)
    return pipe, {**call, "guidance_scale": 5.0, "guidance_scale_2": 3.0}, case


def with_true_cfg(call: dict[str, Any]) -> dict[str, Any]:
    """Turn on HunyuanVideo's CFG proper, which makes a second call per step."""
    negative = {
        "negative_prompt_embeds": noise_like(call["prompt_embeds"], seed=3),
        "negative_pooled_prompt_embeds": noise_like(call["pooled_prompt_embeds"], seed=4),
        "negative_prompt_attention_mask": call["prompt_attention_mask"],
    }
    return {**call, **negative, "true_cfg_scale": 3.0}


def without_cfg(call: dict[str, Any], case: Case) -> dict[str, Any]:
    return call if case.name == "hunyuan_video" else {**call, "guidance_scale": 1.0}


def noise_like(tensor: Tensor, seed: int) -> Tensor:
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))


def run(pipe: Any, call: dict[str, Any], seed: int = 7, **changes: Any) -> Tensor:
    """Call a pipeline with a fresh generator and return the latents."""
    return pipe(**{"generator": torch.Generator().manual_seed(seed), **call, **changes})[0]


@contextmanager
def scheduler_inputs(pipe: Any) -> Iterator[list[Tensor]]:
    """Record the prediction that every step of the scheduler receives."""
    received: list[Tensor] = []

    def look(prediction: Tensor) -> Tensor:
        received.append(prediction.clone())
        return prediction

    with _before_step(pipe, look):
        yield received


@contextmanager
def _before_step(pipe: Any, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    step = pipe.scheduler.step

    @functools.wraps(step)  # CogVideoX reads the signature
    def changed(model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        return step(change(model_output), *args, **kwargs)

    pipe.scheduler.step = changed
    try:
        yield
    finally:
        del pipe.scheduler.step


# The textbook: separate weak models, separate calls for cond, uncond and weak, combined where the scheduler takes over.
# It uses nothing of stg_hooks, and none of its tricks.


# Per family: the stacks in running order, and what a block hands on.
_BLOCKS: dict[str, tuple[tuple[str, ...], type[nn.Module]]] = {
    "mochi": (("transformer_blocks",), zoo.KeepStreams),
    "ltx": (("transformer_blocks",), zoo.KeepHiddenStates),
    "cogvideox": (("transformer_blocks",), zoo.KeepStreams),
    "hunyuan_video": (("transformer_blocks", "single_transformer_blocks"), zoo.KeepStreams),
    "wan": (("blocks",), zoo.KeepHiddenStates),
}
_HAVE_ROWS = (
    "hidden_states",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "timestep",
    "pooled_projections",
    "guidance",
)


def weak_copy(transformer: nn.Module, family: str, layers: Sequence[int]) -> nn.Module:
    """Copy a denoiser and put modules that do nothing in the place of some blocks."""
    weak = copy.deepcopy(transformer)
    stacks, identity = _BLOCKS[family]
    places = [(getattr(weak, stack), i) for stack in stacks for i in range(len(getattr(weak, stack)))]
    for layer in layers:
        stack, i = places[layer]
        stack[i] = identity()
    return weak


@contextmanager
def textbook(
    pipe: Any,
    case: Case,
    branches: Sequence[tuple[Sequence[int], float]],
    guidance_scale: float | Callable[[], float] | Sequence[float],
    rescale: float = 0.0,
) -> Iterator[list[Tensor]]:
    """Guide a pipeline the slow way: every step gets `u + g * (c - u) + sum_i s_i * (c - w_i)`, then rescale.

    Args:
        pipe: the stock pipeline.
        case: what it was built from.
        branches: (layers, scale) of each weak model.
        guidance_scale: the CFG weight, 1.0 for none; one per denoiser, or a function if it changes during the run.
        rescale: as in the paper, per video.

    Returns:
        A context manager that gives the list of all combined predictions.
    """
    denoisers = [m for m in (pipe.transformer, getattr(pipe, "transformer_2", None)) if m is not None]
    weights = guidance_scale if isinstance(guidance_scale, Sequence) else [guidance_scale] * len(denoisers)
    models = [
        (copy.deepcopy(m), [weak_copy(m, case.name, layers) for layers, _ in branches], g)
        for m, g in zip(denoisers, weights, strict=True)
    ]
    calls: list[tuple[int, dict[str, Any]]] = []
    combined: list[Tensor] = []

    def guide(_: Tensor) -> Tensor:
        which, positive = calls[0]
        plain, weaks, g = models[which]
        negative = None
        if len(calls) == 2:
            assert calls[1][0] == which
            negative = calls[1][1]
        elif g != 1.0:
            negative, positive = _half(positive, 0), _half(positive, 1)
        calls.clear()
        g = g() if callable(g) else g
        c = plain(**positive)[0]
        out = c
        if negative is not None:
            u = plain(**negative)[0]
            out = u + g * (c - u)
        for weak, (_, scale) in zip(weaks, branches, strict=True):
            out = out + scale * (c - weak(**positive)[0])
        if rescale:
            out = torch.stack([o * (rescale * p.std() / o.std() + 1 - rescale) for o, p in zip(out, c, strict=True)])
        combined.append(out.clone())
        return out

    def note(which: int) -> Callable[..., None]:
        return lambda module, args, kwargs: calls.append((which, kwargs))

    handles = [m.register_forward_pre_hook(note(i), with_kwargs=True) for i, m in enumerate(denoisers)]
    try:
        with _before_step(pipe, guide):
            yield combined
    finally:
        for handle in handles:
            handle.remove()


def _half(call: dict[str, Any], which: int) -> dict[str, Any]:
    return {
        name: value.chunk(2)[which] if name in _HAVE_ROWS and value is not None else value
        for name, value in call.items()
    }
