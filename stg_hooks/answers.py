"""What a guided call returns to a caller that combines cond and uncond itself.

A caller computes `u + g (c - u)` of what it is given. With the term of skip guidance added to both, its result is the
guided prediction. With rescale or another rule there is no such term: then the final prediction takes the place of
both, or of cond, and uncond is chosen so that the caller's formula gives it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from stg_hooks.errors import CallError
from stg_hooks.guidance.scale_values import Scales, fitted, is_number
from stg_hooks.parts import put_back, uncond_side
from stg_hooks.step import Step

if TYPE_CHECKING:
    from stg_hooks.guidance.guide import Guidance, Guided
    from stg_hooks.guidance.settings import Settings
    from stg_hooks.roles import Role


class Answers:
    """What the guided calls of one denoiser return."""

    def __init__(self, guidance: Guidance, caller: str, denoiser: str) -> None:
        """Change nothing yet.

        Args:
            guidance: what was asked for.
            caller: what combines the predictions, by name, for messages.
            denoiser: what makes them.
        """
        self._guidance = guidance
        self._caller = caller
        self._denoiser = denoiser

    def to_cond(
        self,
        role: Role,
        guided: Guided,
        unguided: Sequence[Tensor],
        unconds: Sequence[Tensor | None],
        output: Sequence[Tensor],
    ) -> list[Tensor]:
        """Return what a call that holds the cond prediction returns.

        Args:
            role: what the call is for.
            guided: what its predictions come to.
            unguided: its own predictions.
            unconds: those of them without the prompt.
            output: what it would return; another `apply` may have guided it already.

        Raises:
            CallError: the final prediction is asked for, and cannot be given.
        """
        replaces, g = guided.settings.replaces, _scale_of(guided.settings, role)
        if replaces:
            self._check_replaceable(guided, role, is_first=unguided is output)
        if role.uncond_follows and replaces and not is_number(role.guidance_scale, 1):
            return [*unguided]  # the final prediction has to wait for uncond
        terms = guided.terms()
        if not role.uncond_follows:
            self._guidance.traced(guided, terms, unconds, g)
        new = guided.final(_or_one(g), unconds) if replaces else terms
        return put_back(role, new, output, guided.with_rest if replaces else guided.added)

    def _check_replaceable(self, guided: Guided, role: Role, is_first: bool) -> None:
        settings, what, name = guided.settings, guided.settings.why_replaces, self._caller
        if not is_first:
            raise CallError(
                f"another stg.apply() has guided this call of {self._denoiser} already, so {what} cannot "
                "give the final prediction. Use one stg.apply(branches=[...])."
            )
        if role.has_more:
            raise CallError(
                f"{name} combines more than one cond and one uncond prediction in this step, so {what} cannot give the "
                "final prediction. Switch that guidance off, or use rescale=0.0 and rule='cfg'."
            )
        cfg = "uncond" in role.parts or role.uncond_follows
        if not cfg and settings.guidance_scale is not None and not is_number(settings.guidance_scale, 1):
            raise CallError(
                f"guidance_scale={settings.guidance_scale}: {name} makes no uncond prediction in this step. "
                "Call it with guidance_scale > 1, so that it does; its own value is not used then."
            )
        needs = role.uncond_follows or (cfg and settings.guidance_scale is None)
        if needs and role.guidance_scale is None:
            raise CallError(
                f"{what} needs the CFG weight of this step, which {name} does not tell before the call. "
                "Use rescale=0.0 and rule='cfg', or stg.Guider in a loop of your own."
            )

    def to_other(self, role: Role, guided: Guided | None, output: Sequence[Tensor]) -> list[Tensor] | None:
        """Return the uncond prediction, or a weak one of the caller's own, that goes with the guided cond prediction.

        With it the caller's own combination comes to the guided prediction, and `cond - perturbed` stays what it was.

        Args:
            role: what the call is for.
            guided: what the cond call before it came to; `None` where there was none.
            output: what it would return.

        Returns:
            What it returns; `None` for what it would return.

        Raises:
            CallError: there was no such cond call, or the final prediction cannot be given.
        """
        guidance = self._guidance
        if guided is not None and not guided.settings.changes:
            return None
        own = uncond_side(role, output)
        if guided is not None and role.is_uncond:
            assert isinstance(guided.step, Step)
            guidance.watch.look(guided.step, (), own)
        if guided is None or [c.shape for c in guided.conds] != [guided.part(o).shape for o in own]:
            if guidance.plan.is_constant and not guidance.plan.base.changes:
                return None
            raise CallError(
                f"{self._caller} made a call for {role.rows} rows without a matching cond call before it, "
                "so the weak prediction of this step is not known. Use stg.Guider in a loop of your own."
            )
        terms = guided.terms()
        if role.rows == "perturbed":
            if guided.settings.replaces:
                raise CallError(
                    f"{self._caller} adds a guidance of its own in this step, so {guided.settings.why_replaces} cannot "
                    "give the final prediction. Switch that guidance off, or use rescale=0.0 and rule='cfg'."
                )
            return put_back(role, terms, output, guided.added)
        g = _scale_of(guided.settings, role)
        guidance.traced(guided, terms, own, g)
        if not guided.settings.replaces:
            return put_back(role, terms, output, guided.added)
        if is_number(role.guidance_scale, 1):
            return None  # it has no weight, and cond is the final prediction already
        # The caller has cond already and will compute u' + g * (c - u'): choose u' so that this is the final one.
        assert role.guidance_scale is not None
        moved = []
        for i, (final, c) in enumerate(zip(guided.final(_or_one(g), own), guided.conds, strict=True)):
            applied = fitted("guidance_scale", guided.weight("guidance_scale", role.guidance_scale, i), c)
            moved.append(((final.float() - applied * c.float()) / (1.0 - applied)).to(c.dtype))
        return put_back(role, moved, output, guided.with_rest)


def _scale_of(settings: Settings, role: Role) -> Scales | None:
    return role.guidance_scale if settings.guidance_scale is None else settings.guidance_scale


def _or_one(guidance_scale: Scales | None) -> Scales:
    return 1.0 if guidance_scale is None else guidance_scale
