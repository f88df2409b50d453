"""Step caches of a denoiser: what hosts let a model keep from one step to the next, so that less is computed."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext

from torch import nn

from stg_hooks.errors import CallError
from stg_hooks.hosts import StepCaches, step_caches


class Caches:
    """The step caches of one denoiser, whether there are any or not."""

    def __init__(self, model: nn.Module) -> None:
        """Look for them; change nothing yet.

        Args:
            model: the denoiser.

        Raises:
            TargetError: there is a cache that cannot be used together with skip guidance.
        """
        self._modules = list(model.modules())
        self.found: StepCaches | None = None
        self.look()

    def look(self) -> None:
        """Look again: caches may have been enabled or disabled meanwhile.

        Raises:
            TargetError: there is a cache that cannot be used together with skip guidance.
        """
        found = step_caches(self._modules)
        if found is None or self.found is None or found.hooks != self.found.hooks:
            self.found = found

    def check_same(self) -> None:
        """Raise if caches have been enabled or disabled since they were looked for.

        Raises:
            CallError: they have.
            TargetError: there is a cache that cannot be used together with skip guidance.
        """
        found = step_caches(self._modules)
        if (found.hooks if found else []) != (self.found.hooks if self.found else []):
            known = found or self.found
            assert known is not None
            raise CallError(
                f"{known.name}: this step cache was {'enabled' if found else 'disabled'} inside the `with`. Enable and "
                "disable caches before stg.apply() or stg.skip()."
            )

    def begin_pass(self) -> None:
        """Take notice of a pass that is not a weak one, before it is made."""
        if self.found is not None:
            self.found.begin_pass()

    def apart(
        self, key: object, perturbed: Collection[nn.Module] = (), bypassed: bool = True
    ) -> AbstractContextManager[object]:
        """Keep calls of the denoiser away from what other passes keep, within a `with`.

        Args:
            key: tells these calls from others; one goes with each of the other passes.
            perturbed: the modules that are perturbed in it.
            bypassed: whether they are not computed at all.
        """
        return nullcontext() if self.found is None else self.found.apart(key, perturbed, bypassed)
