"""The real k-diffusion for the tests, without its torchvision, which cannot load beside a CPU-only torch."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_PARTS = ("sampling", "external", "layers", "models.image_v1", "models.image_transformer_v1")


@functools.cache
def load() -> Any:
    """Import the parts of k-diffusion that sample and denoise; `import k_diffusion` finds them from then on."""
    spec = importlib.util.find_spec("k_diffusion")
    assert spec is not None, "k-diffusion is not installed: make test"
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations or ())
    os.environ["K_DIFFUSION_USE_COMPILE"] = "0"  # it would compile its norms on first use
    sys.modules["k_diffusion"] = package
    with _stubbed("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
        for part in _PARTS:
            importlib.import_module(f"k_diffusion.{part}")
    return package


@contextmanager
def _stubbed(*names: str) -> Iterator[None]:
    before = {name: sys.modules.get(name) for name in names}
    for name in names:
        sys.modules[name] = types.ModuleType(name)
    try:
        for name in names[1:]:
            outer, _, inner = name.rpartition(".")
            setattr(sys.modules[outer], inner, sys.modules[name])
        yield
    finally:
        for name, module in before.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


def filled(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every weight that starts at zero a value: a fresh k-diffusion model returns exactly 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval().requires_grad_(False)


def transformer(depth: int = 4, classes: int = 5) -> nn.Module:
    """Build a class-conditional image transformer for images (B, 3, 8, 8)."""
    torch.manual_seed(0)
    model = load().models.image_transformer_v1.ImageTransformerDenoiserModelV1(
        n_layers=depth, d_model=64, d_ff=64, in_features=3, out_features=3, patch_size=(2, 2), num_classes=classes
    )
    return filled(model)


def unet() -> nn.Module:
    """Build a U-Net for images (B, 3, 16, 16), conditioned by vectors (B, 6)."""
    torch.manual_seed(0)
    model = load().models.image_v1.ImageDenoiserModelV1(
        3, 16, [1, 1], [16, 32], self_attn_depths=[True, True], mapping_cond_dim=6
    )
    return filled(model)
