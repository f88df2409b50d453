"""A small trained video model that a stock diffusers pipeline runs on a CPU in seconds.

from stg_hooks import demo

pipe = demo.load()
latents = pipe(**demo.inputs(["red 3 blue 7", "red 8 blue 2"]), guidance_scale=2.0).frames
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

STEPS = 6
GUIDANCE_SCALE = 2.0
PROMPTS = ("red 3 blue 7", "red 8 blue 2", "red 5 blue 0", "red 9 blue 4")
_DIGITS = tuple(map(str, range(clips.DIGITS)))
_VOCABULARY = 'The demo knows a red and a blue digit, for example "red 3 blue 7".'
_NULL = len(clips.COLOURS) * clips.DIGITS  # the first of two tokens that mean "no condition"


def load() -> Any:
    """Build the demo's pipeline from the weights inside this package.

    Returns:
        A stock `diffusers.WanPipeline`, float32, on the CPU. It has no text encoder and no VAE: call it with `inputs`.
    """
    try:
        from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    except ImportError as error:
        raise ImportError(
            "The demo runs a diffusers pipeline. It needs: pip install diffusers transformers accelerate"
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
        "pipe = demo.load()\n"
        "demo.to_video(pipe(**demo.inputs([prompt]) | dict({}), generator=generator).frames)[0]"
    )
    return pipe


def sample(
    pipe: Any, prompt: str, generator: torch.Generator, guidance_scale: float = GUIDANCE_SCALE, **settings: Any
) -> Tensor:
    """Make one clip.

    Args:
        pipe: the demo's pipeline.
        prompt: a red and a blue digit.
        generator: source of the noise.
        guidance_scale: CFG weight of the pipeline.
        **settings: further arguments of the pipeline.

    Returns:
        Frames in 0..255, (6, 16, 16, 3), uint8.
    """
    call = {**inputs([prompt]), **settings}
    return to_video(pipe(generator=generator, guidance_scale=guidance_scale, **call).frames)[0]


def labels(prompts: Sequence[str]) -> Tensor:
    """Read prompts such as "red 3 blue 7"; the colours may come in any order.

    Args:
        prompts: a red and a blue digit each.

    Returns:
        The digit that is red and the digit that is blue, (B, 2).
    """
    if isinstance(prompts, str):
        raise TypeError(f"prompts must be a list of strings, not one string: write [{prompts!r}]")
    if not prompts:
        raise ValueError(f"prompts is empty; it needs one string per clip. {_VOCABULARY}")
    return torch.tensor([_read(prompt) for prompt in prompts])


def embed(labels: Tensor | None, count: int = 1) -> Tensor:
    """Look conditions up in the learned token table.

    Args:
        labels: digits as `labels` returns them, (B, 2); None for "no condition".
        count: batch size B when labels is None.

    Returns:
        Prompt embeddings, (B, 2, 64).
    """
    if labels is None:
        tokens = torch.arange(_NULL, _NULL + 2).expand(count, 2)
    else:
        tokens = labels + torch.tensor([0, clips.DIGITS])
    return _table()[tokens]


def inputs(prompts: Sequence[str] | Tensor) -> dict[str, Any]:
    """Give everything that the pipeline needs besides guidance: `pipe(**inputs(["red 3 blue 7"]))`.

    Args:
        prompts: a red and a blue digit each, such as "red 3 blue 7"; or the two digits, (B, 2).

    Returns:
        Keyword arguments for the pipeline.
    """
    wanted = _check(prompts) if isinstance(prompts, Tensor) else labels(prompts)
    return {
        "prompt_embeds": embed(wanted),
        "negative_prompt_embeds": embed(None, len(wanted)),
        # Without a VAE the pipeline assumes one that shrinks time by 4 and space by 8: 6 x 4 x 4 latents.
        "num_frames": 4 * (clips.FRAMES - 1) + 1,
        "height": 8 * clips.SIZE // clips.FOLD,
        "width": 8 * clips.SIZE // clips.FOLD,
        "num_inference_steps": STEPS,
        "output_type": "latent",
    }


def to_clips(latents: Tensor) -> Tensor:
    """Turn what the pipeline returns into clips.

    Args:
        latents: (B, 48, 6, 4, 4).

    Returns:
        Clips in [-1, 1], (B, 3, 6, 16, 16).
    """
    return clips.unfold(latents.float()).clamp(-1, 1)


def to_video(latents: Tensor) -> Tensor:
    """Turn what the pipeline returns into frames to look at.

    Args:
        latents: (B, 48, 6, 4, 4).

    Returns:
        Frames in 0..255, (B, 6, 16, 16, 3), uint8.
    """
    video = to_clips(latents).permute(0, 2, 3, 4, 1)
    return ((video + 1) * 127.5).round().to(torch.uint8)


def _read(prompt: str) -> list[int]:
    """Turn one prompt into two digits."""
    words = prompt.lower().replace(",", " ").split()
    found = dict(zip(words[::2], words[1::2], strict=False))
    digits = [found.get(colour, "") for colour in clips.COLOURS]
    if len(words) != 2 * len(clips.COLOURS) or any(digit not in _DIGITS for digit in digits):
        raise ValueError(f"{prompt!r} cannot be drawn. {_VOCABULARY}")
    return [int(digit) for digit in digits]


def _check(digits: Tensor) -> Tensor:
    """Refuse numbers that would silently pick tokens of another colour."""
    if digits.ndim != 2 or digits.shape[1] != len(clips.COLOURS):
        raise ValueError(f"labels have shape {tuple(digits.shape)}; they need (B, 2): a red digit, a blue digit")
    if ((digits < 0) | (digits >= clips.DIGITS)).any():
        raise ValueError(f"labels must be digits from 0 to {clips.DIGITS - 1}")
    return digits


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
