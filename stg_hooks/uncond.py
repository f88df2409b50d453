"""Let the weak model make the uncond prediction: skip guidance without an extra pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from stg_hooks.errors import SettingError
from stg_hooks.guidance.settings import Settings
from stg_hooks.hooks.compiled import is_compiled
from stg_hooks.hooks.forward import patched
from stg_hooks.passes.guided_call import in_weak_pass
from stg_hooks.passes.halves import weak_halves
from stg_hooks.passes.predict import Predictor
from stg_hooks.passes.returned import predictions
from stg_hooks.passes.rows import halves
from stg_hooks.roles import check_rows_apart
from stg_hooks.session import Session
from stg_hooks.step import check_step


class UncondDenoiser:
    """Bypasses layers for what a denoiser computes without the prompt.

    In calls with rows `[uncond, cond]`, each half is a call of its own, as `weak_halves` says.
    """

    def __init__(self, session: Session, model: nn.Module) -> None:
        """Resolve all layers that are known to be skipped; change nothing yet.

        Args:
            session: what it shares with the guides of the same pipeline's other denoisers.
            model: the denoiser.
        """
        self._session = session
        self._model = model
        self._predictor = Predictor(model, (), "full", session.guidance.stats)
        self._predictor.prepare(session.guidance.plan.possible)
        self._check_caches()

    def _check_caches(self) -> None:
        found = self._predictor.caches.found
        if found is not None:
            raise SettingError(
                f"on='uncond' cannot be combined with {found.name}: what the cache keeps of cond and uncond rows is "
                "one. Disable it (model.disable_cache()), or use on='cond', whose weak passes have caches of their own."
            )

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replace `forward` of the denoiser and of the layers; restore them at the end."""
        with ExitStack() as stack:
            stack.enter_context(self._predictor.installed())
            self._check_caches()
            patch = stack.enter_context(patched(self._model))
            stack.enter_context(patch.everywhere(self._session.guarded(self._around)))
            if not is_compiled(self._model):
                stack.enter_context(self._model.register_forward_pre_hook(patch.check, prepend=True))
            yield

    def _around(self, proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        session = self._session
        role = None if in_weak_pass() else session.role(self._model)
        if role is None:
            return proceed(*args, **kwargs)
        self._predictor.caches.check_same()
        guidance = session.guidance
        guidance.stats.calls += 1
        check_rows_apart(role, "on='uncond'")
        step = check_step(session.step) or session.host.step()
        settings = Settings(()) if role.rows in ("cond", "perturbed") else guidance.settings(step)
        if settings.replaces:
            raise SettingError(f"{settings.why_replaces} cannot be combined with on='uncond' here: use stg.Guider.")
        if not settings.active:
            return proceed(*args, **kwargs)
        session.warn_of_own(role, settings)
        self._predictor.learn(settings.active, proceed, args, kwargs)
        execution = self._predictor.of(settings.active)
        guidance.stats.guided_calls += 1
        if role.rows == "uncond":
            with execution.switches[0].switched_on():
                output = proceed(*args, **kwargs)
        else:
            output = weak_halves(execution, proceed, args, kwargs)
        pairs = [halves(t) if role.rows == "uncond+cond" else (t, None) for t in predictions(output)]
        unconds, conds = [u for u, _ in pairs], [c for _, c in pairs if c is not None]
        # There are no weak predictions to compare with cond ones.
        guidance.watch.look(step, conds, unconds, execution.switches)
        return output
