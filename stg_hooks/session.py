"""What the denoisers of one `apply` have in common."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from stg_hooks.errors import CallError, warn
from stg_hooks.hooks import activation
from stg_hooks.modes.modes import find_mode
from stg_hooks.step import Step

if TYPE_CHECKING:
    from stg_hooks.guidance.guide import Guidance
    from stg_hooks.guidance.settings import Settings
    from stg_hooks.hosts import Host
    from stg_hooks.ranks.link import Ranks
    from stg_hooks.roles import OwnGuidance, Role


@dataclasses.dataclass(eq=False)
class Session:
    """Shared by what guides the denoisers of one `apply`; it holds no reference back, which would be a cycle."""

    host: Host
    guidance: Guidance
    ranks: Ranks | None = None
    step: Step | None = None
    models: tuple[nn.Module, ...] = ()
    lost_steps: int = 0
    calls_elsewhere: int = 0
    """Calls that would have been guided, had the `with` been in force where they were made."""
    told: set[OwnGuidance] = dataclasses.field(default_factory=set)
    """The target's own guidance that has been warned about."""

    def guarded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Have a target put back what its run has changed where a function of ours raises in it."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except BaseException:
                self.host.put_back()
                raise

        return call

    def warn_of_own(self, role: Role, settings: Settings) -> None:
        """Warn once where the target makes such weak predictions itself, too, as it does by default.

        Raises:
            CallError: with `strict`, instead of a warning.
        """
        kinds = {find_mode(branch.mode).needs == "streams" for branch in settings.active}
        for own in role.own:
            if own.isolates in kinds:
                self._warn_of(own)

    def _warn_of(self, own: OwnGuidance) -> None:
        what = "isolates streams" if own.isolates else "skips layers"
        text = (
            f"{own.by} {what} by itself unless it is told not to, and stg.apply() adds to that guidance. To have it "
            f"once, call it with {own.how_to_switch_off}."
        )
        if self.guidance.watch.strict:
            raise CallError(text)
        if own not in self.told:
            self.told.add(own)
            warn(text)

    def role(self, model: nn.Module) -> Role | None:
        """Say what a call of a model is for; `None` if it is not to be guided.

        Raises:
            CallError: with `strict`, the target makes it where the `with` is not in force.
        """
        if activation.is_active(self):
            return self.host.role()
        is_own = self.host.is_calling()
        if is_own is False or any(model in getattr(other, "models", ()) for other in activation.others(self)):
            return None
        self.calls_elsewhere += 1
        if is_own and (self.guidance.watch.strict or self.calls_elsewhere == 1):
            text = (
                f"{self.host.name} is called in another thread, task or context than the one in which its stg.apply() "
                f"was entered, so this call is not guided. {activation.ENTER_THERE}"
            )
            if self.guidance.watch.strict:
                raise CallError(text)
            warn(text)
        return None
