"""A small trained video model that a stock diffusers pipeline runs on a CPU in seconds.

from stg_hooks import demo

pipe = demo.load()
latents = pipe(**demo.inputs(["red circle left", "blue square up"]), guidance_scale=2.0).frames
frames = demo.to_video(latents)
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from stg_hooks.demo import clips

__all__ = ["GUIDANCE_SCALE", "PROMPTS", "STEPS", "embed", "inputs", "labels", "load", "sample", "to_clips", "to_video"]

STEPS = 12
GUIDANCE_SCALE = 2.0
PROMPTS = ("red circle left", "blue square up", "green triangle right", "yellow circle down")
_WORDS = (("shape", clips.SHAPES), ("colour", clips.COLOURS), ("motion", clips.MOTIONS))
_NULL = sum(len(words) for _, words in _WORDS)  # the first of three tokens that mean "no condition"


def load() -> Any:
    """Build the demo's pipeline from the weights inside this package.

    Returns:
        A stock `diffusers.WanPipeline`, float32, on the CPU. It has no text encoder and no VAE: call it with `inputs`.
    """
    try:
        from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    except ImportError as error:
        raise ImportError(
            'The demo runs a diffusers pipeline. Install it with: pip install "stg-hooks[demo]"'
        ) from error
    config = json.loads(_file("config.json"))
    weights = _weights()
    del weights["tokens"]
    transformer: Any = WanTransformer3DModel.from_config(config["transformer"])
    transformer.load_state_dict(weights)
    transformer.eval().requires_grad_(False)
    scheduler = FlowMatchEulerDiscreteScheduler(**config["scheduler"])
    pipe: Any = WanPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    # How stg.profile and stg.sweep make samples with it.
    pipe.stg_sample = functools.partial(sample, pipe)
    pipe.stg_sample.prompts = PROMPTS
    pipe.stg_sample.code = (
        "from stg_hooks import demo\n"
        "demo.to_video(pipe(**demo.inputs([prompt]) | dict({}), generator=generator).frames)[0]"
    )
    return pipe


def sample(
    pipe: Any, prompt: str, generator: torch.Generator, guidance_scale: float = GUIDANCE_SCALE, **settings: Any
) -> Tensor:
    """Make one clip.

    Args:
        pipe: the demo's pipeline.
        prompt: one shape, one colour and one motion.
        generator: source of the noise.
        guidance_scale: CFG weight of the pipeline.
        **settings: further arguments of the pipeline.

    Returns:
        Frames in 0..255, (6, 24, 24, 3), uint8.
    """
    call = {**inputs([prompt]), **settings}
    return to_video(pipe(generator=generator, guidance_scale=guidance_scale, **call).frames)[0]


def labels(prompts: Sequence[str]) -> Tensor:
    """Read prompts such as "red circle left"; the words may come in any order.

    Args:
        prompts: one shape, one colour and one motion each.

    Returns:
        Indices into `clips.SHAPES`, `clips.COLOURS` and `clips.MOTIONS`, (B, 3).
    """
    if isinstance(prompts, str):
        raise TypeError(f"prompts must be a list of strings, not one string: write [{prompts!r}]")
    if not prompts:
        raise ValueError(f"prompts is empty; it needs one string per clip. {_vocabulary()}")
    return torch.tensor([_read(prompt) for prompt in prompts])


def embed(labels: Tensor | None, count: int = 1) -> Tensor:
    """Look conditions up in the learned token table.

    Args:
        labels: indices as `labels` returns them, (B, 3); None for "no condition".
        count: batch size B when labels is None.

    Returns:
        Prompt embeddings, (B, 3, 64).
    """
    if labels is None:
        tokens = torch.arange(_NULL, _NULL + 3).expand(count, 3)
    else:
        tokens = labels + torch.tensor([0, len(clips.SHAPES), len(clips.SHAPES) + len(clips.COLOURS)])
    return _table()[tokens]


def inputs(prompts: Sequence[str] | Tensor) -> dict[str, Any]:
    """Give everything that the pipeline needs besides guidance: `pipe(**inputs(["red circle left"]))`.

    Args:
        prompts: one shape, one colour and one motion each, in any order; or their indices, (B, 3).

    Returns:
        Keyword arguments for the pipeline.
    """
    wanted = _check(prompts) if isinstance(prompts, Tensor) else labels(prompts)
    return {
        "prompt_embeds": embed(wanted),
        "negative_prompt_embeds": embed(None, len(wanted)),
        # Without a VAE the pipeline assumes one that shrinks time by 4 and space by 8: 6 x 6 x 6 latents.
        "num_frames": 4 * (clips.FRAMES - 1) + 1,
        "height": 8 * clips.SIZE // clips.FOLD,
        "width": 8 * clips.SIZE // clips.FOLD,
        "num_inference_steps": STEPS,
        "output_type": "latent",
    }


def to_clips(latents: Tensor) -> Tensor:
    """Turn what the pipeline returns into clips.

    Args:
        latents: (B, 48, 6, 6, 6).

    Returns:
        Clips in [-1, 1], (B, 3, 6, 24, 24).
    """
    return clips.unfold(latents.float()).clamp(-1, 1)


def to_video(latents: Tensor) -> Tensor:
    """Turn what the pipeline returns into frames to look at.

    Args:
        latents: (B, 48, 6, 6, 6).

    Returns:
        Frames in 0..255, (B, 6, 24, 24, 3), uint8.
    """
    video = to_clips(latents).permute(0, 2, 3, 4, 1)
    return ((video + 1) * 127.5).round().to(torch.uint8)


def _read(prompt: str) -> list[int]:
    """Turn one prompt into three indices."""
    words = prompt.lower().replace(",", " ").split()
    known = {word for _, existing in _WORDS for word in existing}
    for word in words:
        if word not in known:
            raise ValueError(f"{word!r} in {prompt!r} is not a word of the demo. {_vocabulary()}")
    found = []
    for name, existing in _WORDS:
        matches = [word for word in words if word in existing]
        if len(matches) != 1:
            raise ValueError(f"{prompt!r} has {len(matches)} words for the {name}; it needs one. {_vocabulary()}")
        found.append(existing.index(matches[0]))
    return found


def _check(indices: Tensor) -> Tensor:
    """Refuse indices that would silently pick words of another kind."""
    limits = torch.tensor([len(existing) for _, existing in _WORDS])
    if indices.ndim != 2 or indices.shape[1] != len(limits):
        raise ValueError(f"labels have shape {tuple(indices.shape)}; they need (B, 3): shape, colour, motion")
    if ((indices < 0) | (indices >= limits)).any():
        raise ValueError(f"labels must lie below {limits.tolist()} and not below 0. {_vocabulary()}")
    return indices


def _vocabulary() -> str:
    """List the words that exist."""
    return "; ".join(f"{name}: {', '.join(existing)}" for name, existing in _WORDS) + '. For example "red circle left".'


def _file(name: str) -> bytes:
    """Read a file that ships with the demo."""
    return (resources.files("stg_hooks.demo") / "weights" / name).read_bytes()


@functools.cache
def _table() -> Tensor:
    """Keep the token table: prompts are looked up more often than pipelines are built."""
    return _weights()["tokens"]


def _weights() -> dict[str, Tensor]:
    """Read the transformer's weights and the token table, in float32."""
    from safetensors.torch import load as parse

    return {name: value.float() for name, value in parse(_file("transformer.safetensors")).items()}
