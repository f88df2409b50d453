"""Which channels of a prediction are guided: not those of a learned variance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stg_hooks.checks import is_count
from stg_hooks.errors import SettingError, warn
from stg_hooks.model.tensors import leaves_of


def check_channels(channels: object) -> None:
    """Raise unless `channels` is a number of channels, or left out."""
    if channels is not None and not is_count(channels):
        raise SettingError(f"channels={channels!r}: expected how many channels of a prediction are guided, 1 or more.")


def guided_part(tensor: Tensor, channels: int | None) -> Tensor:
    """Return the channels (dimension 1) of a prediction that are guided.

    Raises:
        SettingError: it has fewer.
    """
    if channels is None:
        return tensor
    if tensor.ndim < 2 or tensor.shape[1] < channels:
        raise SettingError(f"channels={channels}, but the denoiser's predictions have shape {tuple(tensor.shape)}.")
    return tensor[:, :channels]


def with_rest(guided: Tensor, whole: Tensor, channels: int | None) -> Tensor:
    """Put the other channels, those of `whole`, behind the guided ones."""
    return guided if channels is None else torch.cat([guided, whole[:, channels:]], dim=1)


class VarianceWatch:
    """Warns once of predictions that seem to hold a variance, where nothing was said about channels."""

    def __init__(self, is_told: bool) -> None:
        """Start; `is_told` where `channels` was given."""
        self._is_done = is_told

    def look(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        predictions: Sequence[Tensor],
        samples: bool = False,
    ) -> None:
        """Compare predictions with the first latents of the call: a variance comes in as many channels more.

        Args:
            name: what the denoiser is called.
            args: positional arguments of the call.
            kwargs: keyword arguments of the call.
            predictions: what it predicted.
            samples: they are single samples, which have no dimension for the batch.
        """
        if self._is_done:
            return
        dim = 0 if samples else 1
        # Flatter ones may be sequences, whose dimension 1 holds tokens.
        latents = next((x for x in leaves_of(args, kwargs) if isinstance(x, Tensor) and x.ndim > dim + 2), None)
        if latents is None:
            return
        channels = latents.shape[dim]
        doubled = (*latents.shape[:dim], 2 * channels, *latents.shape[dim + 1 :])
        if doubled in [tuple(prediction.shape) for prediction in predictions]:
            self._is_done = True
            warn(
                f"the predictions of {name} have {2 * channels} channels, and its input {channels}. If the other "
                f"{channels} are a learned variance, they are not to be guided: pass channels={channels}. "
                f"channels={2 * channels} guides all of them, without this warning."
            )
