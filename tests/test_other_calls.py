"""Guidance of pipelines that make calls of several kinds, against whole runs in which a hook adds what is to be added."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import stg_hooks as stg
from tests import zoo
from tests.parted_pipelines import OFF, PARTED, PICTURE_IN, Parted, ddim
from tests.stock_pipelines import UNET, euler, noise, prompts, random_model, run
from tests.test_pipelines import assert_far, assert_same
from tests.test_stock_pipelines import tensors

pytestmark = [pytest.mark.filterwarnings("error::stg_hooks.StgWarning")]
SCALE = 0.7


@contextmanager
def by_hand(denoiser: nn.Module, weak: nn.Module, rows: tuple[str, ...]) -> Iterator[list[int]]:
    """Add what skip guidance adds to the parts of each call; the calls of a step have these rows."""
    names, last, count = itertools.cycle(rows), [], []

    def add(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        (found,), parts = tensors(output), next(names).split("+")
        count.append(len(found))
        if parts != ["perturbed"]:
            (other,) = tensors(weak(*args, **kwargs))
            terms = (SCALE * (found - other)).chunk(len(parts))
            last[:] = [term for term, label in zip(terms, parts, strict=True) if label == "cond"]
        # The n-th part with a label belongs to the n-th cond part.
        which = [min(parts[:i].count(label), len(last) - 1) for i, label in enumerate(parts)]
        new = found + torch.cat([last[i] for i in which])
        return (new,) if isinstance(output, tuple) else type(output)(new)

    with denoiser.register_forward_hook(add, with_kwargs=True):
        yield count


def check(parted: Parted, pipe: Any, rows: tuple[str, ...], whole: Callable[[], Tensor]) -> None:
    denoiser = getattr(pipe, parted.denoiser)
    weak = zoo.without(denoiser, [parted.layer], parted.identity)
    plain, before = whole(), zoo.snapshot(denoiser)
    with by_hand(denoiser, weak, rows) as calls:
        expected = whole()
    assert calls
    assert_far(expected, plain)
    with stg.apply(pipe, layers=[parted.layer], scale=SCALE):
        assert_same(whole(), expected)
    with stg.apply(pipe, layers=[parted.layer], scale=0.0):
        assert torch.equal(whole(), plain)
    assert zoo.snapshot(denoiser) == before


def diff_edit() -> tuple[Parted, Any]:
    call = prompts(mask_image=torch.ones(8, 8), image_latents=noise(1, 2, 4, 8, 8, seed=6), inpaint_strength=1.0)
    parted = Parted(
        "StableDiffusionDiffEditPipeline",
        "UNet2DConditionModel",
        UNET,
        lambda: {**ddim(), "inverse_scheduler": diffusers.DDIMInverseScheduler()},
        call,
        ("uncond+cond",),
    )
    return parted, parted.build()


@pytest.mark.parametrize("cfg", [True, False])
def test_diff_edit(cfg: bool) -> None:
    parted, pipe = diff_edit()
    rows, off = (("uncond+cond",), {}) if cfg else (("cond",), OFF)
    check(parted, pipe, rows, lambda: run(pipe, {**parted.call, **off}))

    def inverted() -> Tensor:
        options = {**prompts(), **off, "inpaint_strength": 1.0, "num_inference_steps": 2}
        return pipe.invert(image=PICTURE_IN["image"], generator=torch.Generator().manual_seed(0), **options).latents

    check(parted, pipe, rows, inverted)


def test_the_mask_of_diff_edit() -> None:
    parted, pipe = diff_edit()

    def masked() -> Tensor:
        """Return the map from which the mask is made, as the mask has two values only."""
        found: list[Tensor] = []
        whole = torch.abs

        def noted(x: Tensor) -> Tensor:
            found.append(x.clone())
            return whole(x)

        options = {f"{kind}_{name}": value for kind, shift in (("source", 0.0), ("target", 0.5))
                   for name, value in (("prompt_embeds", noise(1, 3, 8, seed=1) + shift),
                                       ("negative_prompt_embeds", noise(1, 3, 8, seed=2) + shift))}  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "abs", noted)
            pipe.generate_mask(
                image=PICTURE_IN["image"], generator=torch.Generator().manual_seed(0), num_maps_per_mask=2,
                guidance_scale=3.0, num_inference_steps=4, **options,
            )  # fmt: skip
        return found[-1]

    check(parted, pipe, ("uncond+cond+uncond+cond",), masked)


class Condition:
    """Stands in for ACE-Step's encoder of text, lyrics and timbre."""

    silence_latent = noise(1, 8, 4, seed=3)
    null_condition_emb = noise(1, 1, 8, seed=4)

    def __call__(self, text_hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        return text_hidden_states, None


def encoded(instruction: str, **kwargs: Any) -> tuple[Tensor, ...]:
    return (noise(1, 3, 8, seed=len(instruction)),) * 4


@pytest.mark.parametrize("cfg", [True, False])
@pytest.mark.parametrize("task", [{}, {"task_type": "cover", "audio_cover_strength": 0.4}])
def test_ace_step(cfg: bool, task: dict[str, Any]) -> None:
    config = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
              "num_key_value_heads": 1, "head_dim": 8, "in_channels": 12, "audio_acoustic_hidden_dim": 4,
              "encoder_hidden_size": 8}  # fmt: skip
    parted = Parted(
        "AceStepPipeline", "AceStepTransformer1DModel", config,
        lambda: {"condition_encoder": Condition(), "scheduler": euler(num_train_timesteps=1)},
        {"prompt": "a song", "lyrics": "", "audio_duration": 0.3, "guidance_scale": 3.0 if cfg else 1.0, **task},
        (), "layers.1", zoo.KeepHiddenStates, denoiser="transformer", patches={"encode_prompt": encoded},
    )  # fmt: skip
    pipe = parted.build()
    rows = ("cond+uncond" if cfg else "cond", *(["perturbed"] if task else []))
    check(parted, pipe, rows, lambda: run(pipe, parted.call))
