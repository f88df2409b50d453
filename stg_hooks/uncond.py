"""Let the weak model make the uncond prediction: skip guidance without an extra pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stg_hooks import activation
from stg_hooks.calls import cut, first_batch, predictions, row_factor
from stg_hooks.compiled import is_compiled
from stg_hooks.errors import CallError, SettingError, closest
from stg_hooks.executions import Executions
from stg_hooks.guide import Session
from stg_hooks.guided_call import in_weak_pass
from stg_hooks.hosts import check_rows_apart
from stg_hooks.patching import Action, patched
from stg_hooks.schedule import Settings
from stg_hooks.step import check_step

PREDICTIONS = ("cond", "uncond")


def check_on(on: str, scale: object) -> None:
    """Raise unless `on` names a prediction, and `scale` is left out where it has no meaning."""
    if on not in PREDICTIONS:
        names = " and ".join(map(repr, PREDICTIONS))
        raise SettingError(f"on={on!r}: there is {names}.{closest(str(on), PREDICTIONS)}")
    if on == "uncond" and scale is not None:
        raise SettingError(
            "scale= has no meaning with on='uncond', where nothing is added: the weak prediction takes the place of "
            "uncond, and guidance_scale says how far to go from it. Leave scale out."
        )


def check_settings(settings: Settings) -> None:
    """Raise if settings hold something that has no meaning where the weak model makes the uncond prediction."""
    if len(settings.branches) > 1:
        raise SettingError(
            f"on='uncond' with {len(settings.branches)} branches: there is one uncond prediction. Give layers=[...]."
        )
    if any(isinstance(branch.scale, Tensor) or branch.scale not in (0, 1) for branch in settings.branches):
        check_on("uncond", settings.branches[0].scale)


class UncondGuide:
    """Bypasses layers for what a denoiser computes without the prompt."""

    def __init__(self, session: Session, model: nn.Module) -> None:
        """Resolve all layers that are known to be skipped; touch nothing.

        Args:
            session: what it shares with the guides of the same pipeline's other denoisers.
            model: the denoiser.
        """
        self._session = session
        self._model = model
        self._executions = Executions(model, "full", session.stats)
        self._executions.prepare(session.plan.known)
        self._check_caches()

    def _check_caches(self) -> None:
        found = self._executions.caches.found
        if found is not None:
            raise SettingError(
                f"on='uncond' cannot be combined with {found.name}: what the cache keeps of cond and uncond rows is "
                "one. Disable it (model.disable_cache()), or use on='cond', whose weak passes have caches of their own."
            )

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replace `forward` of the denoiser and of the layers; restore them at the end."""
        with ExitStack() as stack:
            stack.enter_context(self._executions.installed())
            self._check_caches()
            patch = stack.enter_context(patched(self._model))
            stack.enter_context(patch.everywhere(self._around))
            if not is_compiled(self._model):
                stack.enter_context(self._model.register_forward_pre_hook(patch.check, prepend=True))
            yield

    def _around(self, proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        session = self._session
        role = session.host.role() if activation.is_active(session) and not in_weak_pass() else None
        if role is None:
            return proceed(*args, **kwargs)
        self._executions.caches.check_same()
        session.stats.calls += 1
        check_rows_apart(role, "on='uncond'")
        step = check_step(session.step) or session.host.step()
        settings = Settings(()) if role.rows in ("cond", "perturbed") else session.plan.at(step)
        check_settings(settings)
        if settings.replaces:
            raise SettingError(f"{settings.why_replaces} cannot be combined with on='uncond' here: use stg.Guider.")
        if not settings.active:
            return proceed(*args, **kwargs)
        switch = self._executions.of(settings.active).switches[0]
        session.stats.guided_calls += 1
        batch = first_batch(args, kwargs)
        if role.rows == "uncond":
            on = switch.switched_on()
        elif batch is None or batch % 2:
            raise CallError(f"a call with {batch or 'no'} rows cannot be [uncond, cond], which batched_cfg=True says.")
        else:
            on = switch.switched_on(instead=lambda action: _for_first_half(action, batch))
        with on:
            output = proceed(*args, **kwargs)
        session.watch.look(step, (), predictions(output), [switch])  # there is nothing else to compare it with
        return output


def _for_first_half(action: Action, batch: int) -> Action:
    """Do something instead of `forward` for the first half of the rows, and nothing else for the second one."""

    def mixed(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        instead = pytree.tree_leaves(action(forward, args, kwargs))
        real, spec = pytree.tree_flatten(forward(*args, **kwargs))
        if len(real) != len(instead):
            raise CallError("a skipped layer gave another number of outputs than the real one, so on='uncond' fails.")
        return pytree.tree_unflatten([_joined(i, r, batch) for i, r in zip(instead, real, strict=True)], spec)

    return mixed


def _joined(instead: Any, real: Any, batch: int) -> Any:
    if not isinstance(real, Tensor) or instead is real:
        return real
    folded = row_factor(real, batch)
    if not folded or not isinstance(instead, Tensor) or instead.shape != real.shape:
        raise CallError(
            f"on='uncond': the rows of a layer's output of shape {tuple(real.shape)} cannot be told apart in a call "
            f"with {batch} rows. Use stg.Guider, which makes the two predictions in calls of their own."
        )
    half = batch // 2
    return torch.cat([cut(instead, slice(0, half), batch, folded), cut(real, slice(half, None), batch, folded)])
