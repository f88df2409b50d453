"""Guide any denoiser in any loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from stg_hooks.calls import predictions
from stg_hooks.combine import Scale, check_scale, combine
from stg_hooks.errors import SettingError, TargetError
from stg_hooks.execution import Execution, Stats, in_weak_pass
from stg_hooks.layers import LayerSpec
from stg_hooks.perturb import Mode
from stg_hooks.settings import Branch, branches_from


class Guider:
    """A denoiser with guidance built in: call it where the denoiser was called.

    `out = uncond + guidance_scale * (cond - uncond) + sum_i scale_i * (cond - weak_i)`, with `rescale` as in
    `combine`. The model is changed only while a weak prediction is being computed.
    """

    def __init__(
        self,
        denoiser: Callable[..., Any],
        layers: LayerSpec | None = None,
        scale: Scale | None = None,
        *,
        guidance_scale: Scale = 1.0,
        rescale: float | None = None,
        mode: str | Mode | None = None,
        branches: Sequence[Branch] | None = None,
        model: nn.Module | None = None,
        execution: str = "auto",
    ) -> None:
        """Choose what to guide and how.

        Args:
            denoiser: called as `denoiser(*args, **kwargs, **cond)`: a module, or any callable around one.
            layers: what the weak model skips, as for `skip`; left out, the setting published for the model is used.
            scale: weight of `cond - weak`; 1.0 unless a published setting says otherwise. 0 switches guidance off.
            guidance_scale: CFG weight, used in calls that have `uncond`; 1 = off.
            rescale: from 0 (off, the default) to 1 (the result has the standard deviation of cond).
            mode: what a skipped layer does instead, `"residual"` by default.
            branches: several perturbed predictions, instead of `layers`, `scale` and `mode`.
            model: the module that holds the layers, where `denoiser` is not itself a module.
            execution: how the weak prediction is computed, as for `apply`.

        Raises:
            LayerError: a layer that does not exist or cannot be skipped in this mode.
            SettingError: a setting that cannot be used, or `layers` left out where nothing is published.
            TargetError: `denoiser` is not callable, or is no module and `model` is missing.

        Source: STG, arXiv 2411.18664, Eq. 13 and 20, Alg. 4.
        """
        if not callable(denoiser):
            raise TargetError(f"denoiser must be callable, not {type(denoiser).__name__}.")
        if model is None:
            if not isinstance(denoiser, nn.Module):
                raise TargetError(
                    f"{denoiser!r} is no torch.nn.Module, so its layers cannot be found: "
                    "pass the module that it calls as model=..."
                )
            model = denoiser
        if not isinstance(model, nn.Module):
            raise TargetError(f"model=: expected a torch.nn.Module to find layers in, not {type(model).__name__}.")
        check_scale("guidance_scale", guidance_scale)
        self.branches, self.rescale = branches_from(model, layers, scale, mode, rescale, branches)
        self.denoiser = denoiser
        self.guidance_scale = guidance_scale
        self.stats = Stats()
        self._execution = Execution(model, self.branches, execution, self.stats)

    def __call__(
        self,
        *args: Any,
        cond: Mapping[str, Any] | None = None,
        uncond: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the guided prediction.

        Args:
            *args: passed to every call of the denoiser.
            cond: keyword arguments that carry the prompt.
            uncond: keyword arguments of the prediction without it; left out, there is no CFG.
            **kwargs: passed to every call of the denoiser.

        Returns:
            A new tensor in the shape and dtype of the denoiser's prediction; a tuple of them where it makes several.

        Raises:
            TargetError: `cond` or `uncond` is no mapping.
            SettingError: an argument is given twice.
        """
        positive = _merged(kwargs, "cond", cond)
        negative = None if uncond is None else _merged(kwargs, "uncond", uncond)
        active = not in_weak_pass() and any(isinstance(b.scale, Tensor) or b.scale != 0 for b in self.branches)
        weaks: list[list[Tensor]] = []
        if active:
            with self._execution.installed():
                output, call = self._execution.cond_pass(self.denoiser, args, positive, batched_cfg=False)
                conds = predictions(output)
                weaks = self._execution.weak_predictions(call, conds)
        else:
            conds = predictions(self.denoiser(*args, **positive))
        unconds: Sequence[Tensor | None] = [None] * len(conds)
        if negative is not None and not _is_one(self.guidance_scale):
            unconds = predictions(self.denoiser(*args, **negative))
        results = [
            combine(
                c,
                [weak[i] for weak in weaks],
                u,
                scale=[branch.scale for branch in self.branches] if active else [],
                guidance_scale=self.guidance_scale,
                rescale=self.rescale,
            )
            for i, (c, u) in enumerate(zip(conds, unconds, strict=True))
        ]
        return results[0] if len(results) == 1 else tuple(results)


def _is_one(value: Scale) -> bool:
    return not isinstance(value, Tensor) and value == 1.0


def _merged(kwargs: dict[str, Any], name: str, condition: Mapping[str, Any] | None) -> dict[str, Any]:
    if condition is None:
        return dict(kwargs)
    if not isinstance(condition, Mapping):
        raise TargetError(
            f"{name} must be a mapping of keyword arguments, such as {name}={{'encoder_hidden_states': ...}}, "
            f"not {type(condition).__name__}."
        )
    twice = sorted(kwargs.keys() & condition.keys())
    if twice:
        raise SettingError(f"{', '.join(twice)}: given both as an argument and in {name}. Leave one out.")
    return {**kwargs, **condition}
