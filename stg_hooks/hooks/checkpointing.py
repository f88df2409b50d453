"""Gradient checkpointing: in the backward pass a block is computed again, when nothing is skipped any more."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint as torch_checkpoint

from stg_hooks.errors import CallError


def checkpointed() -> list[tuple[Callable[..., Any], bool]]:
    """List what `torch.utils.checkpoint` runs in this thread, the innermost first, and whether it is reentrant."""
    return list(_frames())


def _frames() -> Iterator[tuple[Callable[..., Any], bool]]:
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "checkpoint" and frame.f_code.co_filename == torch_checkpoint.__file__:
            yield frame.f_locals["function"], bool(frame.f_locals["use_reentrant"])
        if frame.f_back is None:
            return
        frame = frame.f_back


def skipped_in(module: nn.Module, outer: int) -> AbstractContextManager[object]:
    """Keep what a skipped layer saves for the backward pass, instead of having it computed again, unskipped.

    Args:
        module: the layer.
        outer: how many checkpointed functions were running when the model was called: those run all of it again, the
            skip included.

    Returns:
        A context manager for what the layer does instead.

    Raises:
        CallError: the layer is computed again in a way that cannot be told from others.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    inner = checkpointed()
    inner = inner[: len(inner) - outer]
    if not inner:
        return nullcontext()
    function, is_reentrant = inner[0]
    own = (module, module.__dict__.get("forward"))  # the latter while it is patched
    is_alone = any(function is one for one in own) or getattr(function, "__self__", None) is module
    if len(inner) > 1 or is_reentrant or not is_alone:
        how = "with use_reentrant=True" if is_reentrant else "together with others"
        raise CallError(
            f"a skipped {type(module).__name__} is checkpointed {how}, so the backward pass would compute it again "
            "without the skip, and gradients would be wrong. Checkpoint each block by itself, "
            "torch.utils.checkpoint.checkpoint(block, ..., use_reentrant=False), as diffusers does, or switch "
            "checkpointing off."
        )
    # Detached, because a tensor that saves itself is never freed.
    return torch.autograd.graph.saved_tensors_hooks(Tensor.detach, _same)


def _same(saved: Tensor) -> Tensor:
    return saved
