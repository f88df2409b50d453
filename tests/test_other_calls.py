"""Guidance of pipelines with calls of several kinds, against whole runs in which a hook adds what is to be added."""

from __future__ import annotations

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
from tests.parted_pipelines import OFF, PICTURE, PICTURE_IN, Parted, ddim, vae
from tests.stock_pipelines import UNET, ImageEncoder, euler, noise, part, prompts, run
from tests.test_pipelines import assert_far, assert_same
from tests.test_stock_pipelines import tensors

pytestmark = [pytest.mark.filterwarnings("error::stg_hooks.StgWarning")]
SCALE = 0.7


@contextmanager
def by_hand(denoiser: nn.Module, weak: nn.Module, rows: tuple[str, ...]) -> Iterator[list[int]]:
    """Add what skip guidance adds to the parts of each call; the calls of a step have these rows."""
    names, last, count = itertools.cycle(rows), [], []

    def add(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        (found, *others), parts = tensors(output), next(names).split("+")
        count.append(len(found))
        if parts != ["perturbed"]:
            other = tensors(weak(*args, **kwargs))[0]
            terms = (SCALE * (found - other)).chunk(len(parts))
            last[:] = [term for term, label in zip(terms, parts, strict=True) if label == "cond"]
        # The n-th part with a label belongs to the n-th cond part.
        which = [min(parts[:i].count(label), len(last) - 1) for i, label in enumerate(parts)]
        new = found + torch.cat([last[i] for i in which])
        return (new, *others) if isinstance(output, tuple) else type(output)(new)

    with denoiser.register_forward_hook(add, with_kwargs=True):
        yield count


def check(parted: Parted, pipe: Any, rows: tuple[str, ...], whole: Callable[[], Tensor], keeps: bool = False) -> None:
    """Compare a guided run with one that is guided by hand; the denoiser keeps something of its last call or not."""
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
    assert keeps or zoo.snapshot(denoiser) == before


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


def embeds_of_modes(mode: str, prompts: list[str], **kwargs: Any) -> tuple[Tensor, Tensor]:
    lengths = torch.arange(1, len(prompts) + 1)[:, None]
    return noise(len(prompts), 3, 8, seed=len(mode)), (torch.arange(3) <= lengths).long()


@pytest.mark.parametrize("has_image", [True, False])
def test_dream_lite(has_image: bool) -> None:
    config = {**UNET, "addition_embed_type": "time", "addition_time_embed_dim": 2, "attention_head_dim": 2,
              "num_kv_heads": 1,
              "down_block_types": ("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
              "up_block_types": ("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
              "projection_class_embeddings_input_dim": 4}  # fmt: skip
    tiny = {f"{half}coder_block_out_channels": (4,) for half in ("en", "de")}
    tiny |= {f"num_{half}coder_blocks": (1,) for half in ("en", "de")}
    given = {"image": PICTURE, "image_guidance_scale": 1.5} if has_image else {}
    parted = Parted(
        "DreamLitePipeline", "DreamLiteUNetModel", config,
        lambda: {"vae": diffusers.AutoencoderTiny(**tiny), "scheduler": euler(), "text_encoder": ImageEncoder()},
        {"prompt": "a dog", "guidance_scale": 3.0, "height": 16, "width": 16, **given},
        (), patches={"encode_prompt": embeds_of_modes},
    )  # fmt: skip
    pipe = parted.build()
    check(parted, pipe, ("uncond+image+cond" if has_image else "uncond+cond",), lambda: run(pipe, parted.call))


class Instructions:
    """Stands in for OmniGen's processor of texts with images among them."""

    max_image_size = 1024

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, prompts: list[str], images: Any, height: int, width: int, use_img_cfg: bool, **_: Any) -> Any:
        rows, text = 3 if use_img_cfg else 2, 6
        tokens = (height // 2) * (width // 2)
        total = text + 1 + tokens
        # As there, texts are padded on the left: position and mask differ from row to row.
        padding = torch.arange(rows) % 3
        positions = (torch.arange(total) - padding[:, None]).clamp(min=0)
        mask = (torch.arange(total) >= padding[:, None])[:, None].expand(rows, total, total)
        sizes = {0: [[2, 6]], 2: [[2, 6]]} if use_img_cfg else {}
        return {
            "input_ids": torch.arange(rows * text).view(rows, text) % 11,
            "attention_mask": mask.long(),
            "position_ids": positions,
            "input_pixel_values": [PICTURE_IN["image"][:, :, :4, :4]] * len(sizes),
            "input_image_sizes": sizes,
        }


@pytest.mark.parametrize("has_image", [True, False])
def test_omni_gen(has_image: bool) -> None:
    config = {"in_channels": 4, "patch_size": 2, "hidden_size": 16, "num_attention_heads": 2,
              "num_key_value_heads": 2, "intermediate_size": 24, "num_layers": 3, "pad_token_id": 0, "vocab_size": 12,
              "rope_scaling": {"long_factor": [1, 1, 1, 1], "short_factor": [1, 1, 1, 1]}, "pos_embed_max_size": 8,
              "time_step_dim": 8}  # fmt: skip
    given = {"input_images": [PICTURE], "img_guidance_scale": 1.5} if has_image else {}
    parted = Parted(
        "OmniGenPipeline", "OmniGenTransformer2DModel", config,
        lambda: {"vae": vae(), "scheduler": euler(), "tokenizer": None},
        {"prompt": "a <img><|image_1|></img>", "guidance_scale": 3.0, "height": 8, "width": 8, **given},
        (), "layers.1", zoo.KeepHiddenStates, denoiser="transformer",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        # The pipeline imports its own one where torchvision is installed.
        name = "diffusers.pipelines.omnigen.pipeline_omnigen.OmniGenMultiModalProcessor"
        patch.setattr(name, Instructions, raising=False)
        pipe = parted.build()
    rows = "cond+uncond+image" if has_image else "cond+uncond"
    if has_image:  # its images are named by the rows that they belong to, which weak passes with fewer rows have not
        with pytest.warns(stg.StgWarning, match="Weak passes are made in full"):
            check(parted, pipe, (rows,), lambda: run(pipe, parted.call), keeps=True)
    else:
        check(parted, pipe, (rows,), lambda: run(pipe, parted.call), keeps=True)


def embeds_of_layers(prompt: Any, guidance_scale: float, **kwargs: Any) -> tuple[Any, ...]:
    rows = len(prompt)
    embeds, layers = noise(rows, 5, 16, seed=1), [noise(rows, 5, 8, seed=3 + i) for i in range(4)]
    mask, ids = (torch.arange(5) < torch.tensor([[5], [3]])[:rows]).long(), torch.zeros(rows, 5, 3)
    return embeds, embeds.flip(-1), ids, mask, mask, layers, [layer.flip(-1) for layer in layers]


@pytest.mark.parametrize("cfg", [True, False])
def test_bria_fibo_with_two_prompts(cfg: bool) -> None:
    config = {
        "in_channels": 4,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "text_encoder_dim": 8,
        "axes_dims_rope": [2, 2, 4],
    }
    parted = Parted(
        "BriaFiboPipeline", "BriaFiboTransformer2DModel", config, lambda: {"vae": None, "scheduler": euler()},
        {"prompt": ["a", "b"], "guidance_scale": 3.0 if cfg else 1.0, "height": 64, "width": 64},
        (), "transformer_blocks.1", zoo.KeepTextFirst, denoiser="transformer",
        patches={"encode_prompt": embeds_of_layers},
    )  # fmt: skip
    pipe = parted.build()
    check(parted, pipe, ("uncond+cond" if cfg else "cond",), lambda: run(pipe, parted.call))


def test_flux_2_klein_with_a_cache_of_its_reference_image() -> None:
    config = {"patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
              "num_attention_heads": 2, "joint_attention_dim": 8, "timestep_guidance_channels": 8,
              "axes_dims_rope": [4, 4, 4, 4], "guidance_embeds": False}  # fmt: skip
    parted = Parted(
        "Flux2KleinKVPipeline", "Flux2Transformer2DModel", config,
        lambda: {"vae": part("AutoencoderKLFlux2", block_out_channels=(4,), norm_num_groups=1, latent_channels=1,
            down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), layers_per_block=1),
            "scheduler": euler()},
        {"prompt_embeds": noise(1, 3, 8, seed=1), "image": PICTURE.resize((64, 64)), "height": 16, "width": 16},
        (), "transformer_blocks.1", zoo.KeepTextFirst, denoiser="transformer",
    )  # fmt: skip
    pipe = parted.build()
    check(parted, pipe, ("cond",), lambda: run(pipe, parted.call))
    with stg.apply(pipe, layers=[1], scale=1.0) as guidance:  # it stores keys in what it is given, in the first step
        for _ in range(2):
            run(pipe, parted.call)
    calls, in_full = guidance.stats.calls, 2
    assert calls > in_full
    assert guidance.stats.blocks_run == 2 * calls + in_full  # one of four is skipped, and one comes before it


@pytest.mark.parametrize(("cfg", "rescale"), [(True, 0.0), (True, 0.7), (False, 0.0)])
def test_panorama_has_cond_and_uncond_of_each_view_in_turn(cfg: bool, rescale: float) -> None:
    views = [[0, 8, at, at + 8] for at in (0, 4, 8)]  # the last one alone, in a call of its own
    parted = Parted(
        "StableDiffusionPanoramaPipeline", "UNet2DConditionModel", UNET,
        lambda: {"vae": vae(), "scheduler": diffusers.DDIMScheduler(set_alpha_to_one=False)},
        {**prompts(), **({} if cfg else OFF), "height": 8, "width": 16, "view_batch_size": 2},
        (), patches={"get_views": lambda *args, **kwargs: views},
    )  # fmt: skip
    pipe = parted.build()
    rows = ("uncond+cond+uncond+cond", "uncond+cond") if cfg else ("cond+cond", "cond")
    if not rescale:
        check(parted, pipe, rows, lambda: run(pipe, parted.call))
        return
    with stg.apply(pipe, layers=[parted.layer], rescale=rescale) as guidance:
        guided = run(pipe, parted.call)
    assert guidance.stats.guided_calls == guidance.stats.calls > 0
    assert_same(guided, rescaled_by_hand(parted, pipe, rescale))


def rescaled_by_hand(parted: Parted, pipe: Any, rescale: float) -> Tensor:
    """Run a pipeline with rows [uncond, cond] in turn, whose rows become the final prediction."""
    weak, g = zoo.without(pipe.unet, [parted.layer], parted.identity), parted.call["guidance_scale"]

    def final(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        found, other = tensors(output)[0], tensors(weak(*args, **kwargs))[0]
        uncond, cond = found[::2], found[1::2]
        whole = uncond + g * (cond - uncond) + (cond - other[1::2])
        std, dims = torch.std, [1, 2, 3]
        factor = rescale * std(cond, dims, keepdim=True) / std(whole, dims, keepdim=True) + 1 - rescale
        return type(output)((whole * factor).repeat_interleave(2, 0))

    with pipe.unet.register_forward_hook(final, with_kwargs=True):
        return run(pipe, parted.call)
