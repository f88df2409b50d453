"""The executions of one denoiser: one for each set of branches that a run asks for."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import nn

from stg_hooks.caches import Caches
from stg_hooks.execution import Execution
from stg_hooks.guided_call import Stats
from stg_hooks.layers import items_of
from stg_hooks.schedule import Settings
from stg_hooks.settings import Branch
from stg_hooks.skip import Switch


class Executions:
    """Makes executions when they are first needed, and keeps them installed for as long as the denoiser is guided."""

    def __init__(self, model: nn.Module, way: str, stats: Stats) -> None:
        """Touch nothing.

        Args:
            model: the module that holds the layers.
            way: how weak predictions are computed, as for `apply`.
            stats: where to count.
        """
        self._model = model
        self._way = way
        self._stats = stats
        self.caches = Caches(model)
        self._made: dict[Hashable, Execution] = {}
        self._prepared: frozenset[Hashable] = frozenset()
        self._installed: list[ExitStack] = []
        self._lock = threading.Lock()

    def make(self, branches: Sequence[Branch]) -> Execution:
        """Make an execution, or return the one that was made before for the same branches.

        Raises:
            LayerError: a layer that does not exist or cannot be skipped in its mode.
            SettingError: an unknown way.
        """
        key = tuple((_key(branch.layers), branch.mode, branch.kind) for branch in branches)
        if key not in self._made:
            self._made[key] = Execution(self._model, branches, self._way, self._stats, self.caches)
        return self._made[key]

    def prepare(self, known: Iterable[Settings]) -> None:
        """Make what is known to be asked for, and check the layers of branches that are off as well.

        Args:
            known: settings that may hold in a step.

        Raises:
            LayerError: a layer that does not exist or cannot be skipped in its mode.
            SettingError: an unknown way.
        """
        for settings in known:
            for branch in settings.branches:
                Switch(self._model, branch.layers, branch.mode, branch.kind)
            if settings.active:
                self.make(settings.active)
        self._prepared = frozenset(self._made)

    def of(self, branches: Sequence[Branch]) -> Execution:
        """Return an installed execution; a schedule may ask for layers that nobody knew of before the run."""
        with self._lock:
            known = len(self._made)
            execution = self.make(branches)
            if len(self._made) > known:
                for stack in self._installed:  # other threads may leave before this one
                    stack.enter_context(execution.installed())
            return execution

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Prepare the denoiser for all executions; restore it at the end."""
        self.caches.look()
        with ExitStack() as stack:
            with self._lock:
                for execution in self._made.values():
                    stack.enter_context(execution.installed())
                self._installed.append(stack)
            try:
                yield
            finally:
                with self._lock:
                    self._installed = [other for other in self._installed if other is not stack]
                    if not self._installed:
                        self._made = {key: made for key, made in self._made.items() if key in self._prepared}


def _key(layers: object) -> Hashable:
    """Return something that is equal for equal choices of layers; modules count by identity."""
    return tuple(item if isinstance(item, (str, int, range)) else id(item) for item in items_of(layers))
