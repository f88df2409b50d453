"""The executions of one denoiser: one for each set of branches that a run asks for."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import nn

from stg_hooks.guidance.schedule import Settings
from stg_hooks.guidance.settings import Branch
from stg_hooks.modes.modes import find_mode
from stg_hooks.modes.switch import Switch
from stg_hooks.passes.caches import Caches
from stg_hooks.passes.execution import Execution
from stg_hooks.passes.guided_call import Stats

_SPARE = 8


class Executions:
    """Makes executions when they are first needed, and keeps them installed for as long as the denoiser is guided.

    Of those that a schedule asks for, the last few are kept for the next time, with what they have found out.
    """

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
        self._installed: list[tuple[ExitStack, set[Hashable]]] = []
        self._lock = threading.Lock()

    def make(self, branches: Sequence[Branch]) -> Execution:
        """Make an execution, or return the one that was made before for the same branches.

        Raises:
            LayerError: a layer that does not exist or cannot be skipped in its mode.
            SettingError: an unknown way.
        """
        key = _key(branches)
        if key not in self._made:
            found = [dataclasses.replace(branch, mode=find_mode(branch.mode)) for branch in branches]
            self._made[key] = Execution(self._model, found, self._way, self._stats, self.caches)
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
            execution, key = self.make(branches), _key(branches)
            for switch in execution.switches:
                switch.check_same()
            self._made[key] = self._made.pop(key)  # used last
            for stack, installed in self._installed:  # other threads may leave before this one
                if key not in installed:
                    stack.enter_context(execution.installed())
                    installed.add(key)
            return execution

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Prepare the denoiser for all executions; restore it at the end."""
        self.caches.look()
        with ExitStack() as stack:
            installed = stack, set(self._prepared)
            with self._lock:
                for key in self._prepared:
                    stack.enter_context(self._made[key].installed())
                self._installed.append(installed)
            try:
                yield
            finally:
                with self._lock:
                    self._installed = [other for other in self._installed if other is not installed]
                    if not self._installed:
                        spare = [key for key in self._made if key not in self._prepared]
                        for key in spare[:-_SPARE]:
                            del self._made[key]


def _key(branches: Sequence[Branch]) -> Hashable:
    return tuple(branch.key for branch in branches)
