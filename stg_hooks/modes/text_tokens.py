"""Find the text among the tokens of a block that is given text and video as one stream, joined before the blocks.

The arguments of such a block do not tell one from the other. So, once for each layout of a call, the model runs up to
the block with other latents: tokens that stay the same are not video.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from stg_hooks.errors import BlockError
from stg_hooks.model.source import bound_arguments
from stg_hooks.modes.token_labels import Runs, is_text_only, named_tensors, sounds_like_text
from stg_hooks.modes.token_probe import Looks, is_stream, latents_among, may_carry_tokens


class TextTokens:
    """The text in the streams of a model's blocks."""

    def __init__(self, looks: Looks) -> None:
        """Prepare for one model.

        Args:
            looks: runs up to the blocks of the model that joins text and video.
        """
        self._looks = looks
        self._known: dict[object, dict[str, Runs]] = {}

    def given_to(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Runs]:
        """Find the text in what a block is given.

        Args:
            block: a block of the model, in a call of it.
            args: the positional arguments of the block's call.
            kwargs: its keyword arguments.

        Returns:
            Name of an argument to the runs of its tokens, where there is text in it. For rows that hold text in
            different places, the kind of a run is a tuple with an entry per row.
        """
        given = dict(named_tensors(bound_arguments(block, args, kwargs)))
        main = next((leaf for name, leaf in given.items() if not sounds_like_text(name)), None)
        if not is_stream(main):
            return {}
        if any(sounds_like_text(name) and is_stream(leaf) and leaf.ndim == main.ndim for name, leaf in given.items()):
            return {}  # its arguments tell
        root = self._looks.tensors()
        latents = latents_among(root)
        if len(latents) == sum(may_carry_tokens(leaf) for _, leaf in root):
            return {}  # nothing but latents
        key = id(block), self._looks.layout()
        if key not in self._known:
            self._known[key] = self._look(block, latents)
        return self._known[key]

    def _look(self, block: nn.Module, latents: list[Tensor]) -> dict[str, Runs]:
        def change(leaf: Tensor) -> Tensor:
            return _other(leaf) if any(leaf is latent for latent in latents) else leaf

        try:
            one, other = self._looks.given(block, change)
            pairs = {name: (tensor, other[name]) for name, tensor in one.items()}
            runs = {name: _runs(*pair) for name, pair in pairs.items() if pair[0].shape == pair[1].shape}
        except Exception as error:  # in a call that the caller did not make
            model = type(self._looks.model).__name__
            raise BlockError(
                f"{model} may put text and video together before {type(block).__name__}, and it cannot be found out "
                f"which tokens are which ({type(error).__name__}: {error}), which this mode has to know. Use "
                "mode='values', which treats them all alike, or mode='residual'."
            ) from error
        if all(map(is_text_only, runs.values())):  # a block that is given no latents
            return {}
        return {name: found for name, found in runs.items() if found}


def _runs(one: Tensor, other: Tensor) -> Runs:
    """Say which tokens are the same in both; empty where none is."""
    same = (one == other).flatten(2).all(-1) if one.ndim > 2 else (one == other).all(-1)[None]
    if not same.any():
        return ()
    if same.all():
        return ((True, one.shape[-2]),)
    if (same == same[:, :1]).all():  # the sequence comes first
        same = same[:, :1].T
    columns = [row[0] if len(set(row)) == 1 else tuple(row) for row in same.T.tolist()]
    return tuple((kind, len(list(group))) for kind, group in itertools.groupby(columns))


def _other(latents: Tensor) -> Tensor:
    """Return other numbers of the same shape, without drawing random ones."""
    wave = torch.arange(latents.numel(), device=latents.device, dtype=torch.float32).sin()
    return latents + wave.reshape(latents.shape).to(latents.dtype)
