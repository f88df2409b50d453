"""Published settings are found for the classes of ComfyUI and of the original repositories."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import stg_hooks as stg
from stg_hooks.adapters import KIN, PUBLISHED
from stg_hooks.guidance.published import preset_for, published_settings, recommended


class RMSNorm(nn.Module):
    pass


def blocks(count: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Identity() for _ in range(count))


def module(kind: str, *bases: type, **attributes: Any) -> nn.Module:
    """Make a module of a class of this name."""
    found: nn.Module = type(kind, bases or (nn.Module,), {})()
    for name, value in attributes.items():
        setattr(found, name, value)
    return found


def mmdit(kind: str, norm: nn.Module) -> nn.Module:
    found = module(kind, joint_blocks=blocks(24))
    attention = module("SelfAttention", ln_q=norm)
    found.joint_blocks[0].x_block = module("DismantledBlock", attn=attention)  # type: ignore[index, union-attr]
    return found


Video = type("LTXVModel", (nn.Module,), {})
Wan = type("WanModel", (nn.Module,), {})
FOUND = {
    "LTXV in ComfyUI": (module("LTXVModel", transformer_blocks=blocks(28)), "LTX-Video 2B (0.9 to 0.9.6-dev)"),
    "LTXV 13B in ComfyUI": (module("LTXVModel", transformer_blocks=blocks(48)), "LTX-Video 13B 0.9.8-dev"),
    "LTX-Video": (
        module("Transformer3DModel", transformer_blocks=blocks(28), patchify_proj=nn.Identity()),
        "LTX-Video 2B (0.9 to 0.9.6-dev)",
    ),
    "LTX-2 in ComfyUI, a subclass there": (
        module("LTXAVModel", Video, transformer_blocks=blocks(48), cross_attention_adaln=False),
        "LTX-2",
    ),
    "LTX-2.3": (
        module(
            "LTXModel", transformer_blocks=blocks(48), cross_attention_adaln=True, audio_patchify_proj=nn.Identity()
        ),
        "LTX-2.3",
    ),
    "Mochi": (module("AsymmDiTJoint", blocks=blocks(48)), "Mochi 1"),
    "HunyuanVideo in ComfyUI": (
        module("HunyuanVideo", double_blocks=blocks(20), single_blocks=blocks(40), vector_in=nn.Identity()),
        "HunyuanVideo",
    ),
    "HunyuanVideo": (
        module("HYVideoDiffusionTransformer", double_blocks=blocks(20), single_blocks=blocks(40)),
        "HunyuanVideo",
    ),
    "Wan 1.3B": (module("WanModel", blocks=blocks(30), num_heads=12), "Wan 2.1 1.3B"),
    "Wan 14B, a subclass in ComfyUI": (module("VaceWanModel", Wan, blocks=blocks(40), num_heads=40), "Wan 2.1 14B"),
    "SD3.5 medium": (mmdit("MMDiTX", RMSNorm()), "Stable Diffusion 3.5 medium"),
    "SD3.5 medium in ComfyUI": (mmdit("MMDiT", RMSNorm()), "Stable Diffusion 3.5 medium"),
}
NOTHING = {
    "another depth": module("LTXVModel", transformer_blocks=blocks(6)),
    "another model of the same class name": module("Transformer3DModel", transformer_blocks=blocks(28)),
    "HunyuanImage": module("HunyuanVideo", double_blocks=blocks(20), single_blocks=blocks(40), vector_in=None),
    "Wan 2.2 5B": module("WanModel", blocks=blocks(30), num_heads=24),
    "SD3 medium": mmdit("MMDiTX", nn.Identity()),
    "nothing of it": module("HunyuanVideo"),
    "the class of diffusers, without its configuration": module("WanTransformer3DModel", blocks=blocks(40)),
}


@pytest.mark.parametrize("case", FOUND)
def test_settings_are_found(case: str) -> None:
    model, name = FOUND[case]
    assert recommended(model).name == name
    assert preset_for(model, name).name == name


@pytest.mark.parametrize("case", NOTHING)
def test_settings_are_not_found(case: str) -> None:
    assert published_settings(NOTHING[case]) == []


def test_errors_name_the_class_at_hand() -> None:
    with pytest.raises(stg.SettingError, match=r"no setting is published for this LTXVModel\."):
        recommended(NOTHING["another depth"])
    with pytest.raises(
        stg.SettingError, match=r"but this is a WanModel with \{'num_layers': 30, 'num_attention_heads': 24"
    ):
        preset_for(NOTHING["Wan 2.2 5B"], "Wan 2.1 1.3B")


def test_every_class_is_kin_of_one_that_has_settings() -> None:
    for name, kin in KIN.items():
        entries = [entry for entry in PUBLISHED if entry.model == kin.model]
        assert entries, name
        assert all(set(entry.where) <= set(kin.where) for entry in entries)
