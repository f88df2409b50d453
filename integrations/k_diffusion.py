"""Guide k-diffusion's samplers and denoisers. It is never imported: what counts is how they call and are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from stg_hooks.apply import apply
from stg_hooks.errors import TargetError
from stg_hooks.guider import Guider


def callback(guider: Guider, then: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], None]:
    """Compose a guider's callback with one of your own.

    Args:
        guider: follows the sampler.
        then: called next, with what the sampler reports and the guider's newest row of its trace under `"trace"`
            (`None` before the first guided call).

    Returns:
        What to pass to a sampler as `callback=`.

    Raises:
        TargetError: something else than a guider, or than a function.
    """
    given: tuple[object, object] = guider, then
    if not isinstance(given[0], Guider) or not callable(given[1]):
        raise TargetError(
            f"callback({type(guider).__name__}, {type(then).__name__}): expected a stg.Guider and a function of a dict."
        )

    def both(info: dict[str, Any]) -> None:
        guider.callback(info)
        then({**info, "trace": guider.trace[-1] if guider.trace else None})

    return both


def apply_to_cfg(denoiser: nn.Module, *args: Any, **kwargs: Any) -> apply:
    """Guide a denoiser that does CFG itself, by one call of its `inner_model` on rows `[uncond, cond]`.

    Args:
        denoiser: a `CFGDenoiser` as k-diffusion's users write it, called as
            `denoiser(x, sigma, uncond=..., cond=..., cond_scale=...)`.
        *args: as for `stg.apply`.
        **kwargs: as for `stg.apply`; `guidance_scale` is its `cond_scale`, which `rescale` needs.

    Returns:
        What `stg.apply(denoiser.inner_model, batched_cfg=True)` returns: use it in a `with`.

    Raises:
        TargetError: the denoiser has no `inner_model`.
    """
    inner = getattr(denoiser, "inner_model", None)
    if not isinstance(inner, nn.Module):
        raise TargetError(
            f"{type(denoiser).__name__} has no inner_model that is a torch.nn.Module. Pass the module that it calls "
            "on [uncond, cond]: stg.apply(module, ..., batched_cfg=True)."
        )
    return apply(inner, *args, batched_cfg=True, **kwargs)
