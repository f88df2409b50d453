"""Make the predictions of one denoiser: its own, and the weak ones of the branches that a run asks for."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from stg_hooks.errors import CallError
from stg_hooks.guidance.settings import Branch, Settings
from stg_hooks.guidance.trace import Stats
from stg_hooks.hooks import activation
from stg_hooks.modes.modes import find_mode
from stg_hooks.modes.switch import Switch
from stg_hooks.passes.caches import Caches
from stg_hooks.passes.execution import Execution
from stg_hooks.passes.guided_call import WeakCall, in_weak_pass
from stg_hooks.passes.learning import learn_once, made_ahead
from stg_hooks.passes.returned import own_predictions, replace_predictions
from stg_hooks.passes.rows import Rows, SomeRows, first_batch

_SPARE = 8


@dataclasses.dataclass
class Predicted:
    """What a denoiser returned for a call, and the weak predictions of its cond rows."""

    output: Any
    """In memory of its own."""
    weaks: list[list[Tensor]]
    """For each branch, one for each prediction of the denoiser."""
    unskipped: list[Sequence[Tensor] | None]
    """For each branch, what its weak pass would give, bit for bit, if it skipped nothing; `None` where not known."""
    switches: Sequence[Switch]
    """The skipped layers of each branch."""


class Predictor:
    """Makes calls of a denoiser, and the weak predictions that go with them: the way in for hosts.

        predictor = stg.Predictor(module, [stg.Branch([34])])
        with predictor.installed():
            output, weaks = predictor(denoiser, args, kwargs)

    A weak pass shares with the call what comes before the first skipped layer, where the model allows it. While it is
    installed, the module's layers have patches, without effect on calls that are not made here. What a predictor has
    found out about the calls of a module it keeps; use one for a whole run.
    """

    def __init__(
        self,
        module: nn.Module,
        branches: Sequence[Branch] = (),
        execution: str = "auto",
        stats: Stats | None = None,
    ) -> None:
        """Resolve the layers of the branches; change nothing yet.

        Args:
            module: holds the layers.
            branches: one weak prediction each; their scales are for the caller to use.
            execution: how weak predictions are computed, as for `apply`.
            stats: where to count; in `stats` of its own, if left out.

        Raises:
            LayerError: a layer that does not exist or cannot be skipped in its mode.
            SettingError: an unknown execution, or two branches that are the same.
            TargetError: the module has a step cache that cannot be kept apart for weak passes.
        """
        self._model = module
        self._way = execution
        self.stats = Stats() if stats is None else stats
        """What has been counted so far; of calls only their weak passes."""
        self.branches = tuple(branches)
        self.caches = Caches(module)
        self._made: dict[Hashable, Execution] = {}
        self._prepared: frozenset[Hashable] = frozenset()
        # Of those that a schedule asks for, the last few are kept for the next time, with what they have found out.
        self._installed: list[tuple[ExitStack, set[Hashable]]] = []
        self._lock = threading.Lock()
        if branches:
            self._make_ahead(self.branches)
            self._prepared = frozenset(self._made)

    def __call__(
        self,
        denoiser: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        rows: SomeRows | None = None,
        weak_call: WeakCall | None = None,
    ) -> tuple[Any, list[list[Tensor]]]:
        """Make a call of the denoiser, and the weak predictions of its cond rows; inside `installed`.

        Args:
            denoiser: makes the call: the module, or what calls it. It is called again for weak passes, with fewer rows
                where `rows` says so; `Predictor.in_weak_pass()` tells it.
            args: positional arguments of the call.
            kwargs: keyword arguments of the call.
            rows: which rows of the call are conditional, in any order: a slice, indices, or a mask. All, if left out.
            weak_call: takes the arguments of the call and returns those of its cond rows, in the order of `rows`. Left
                out, tensors are cut that have the call's rows in dimension 0.

        Returns:
            What the denoiser returned for the whole call, and `weaks[branch][output]`: one weak prediction for each
            tensor in it, with the cond rows only.

        Raises:
            CallError: it is not installed, or the call does not have these rows.
        """
        if not self._installed:
            raise CallError("stg.Predictor was called outside of `with predictor.installed():`.")
        kwargs = dict(kwargs or {})
        if in_weak_pass():
            return denoiser(*args, **kwargs), []
        self.caches.check_same()
        self.caches.begin_pass()
        chosen = Rows.chosen(rows, first_batch(args, kwargs))
        cutting = weak_call if chosen is not None else None
        found = self.predict(self.branches, denoiser, args, kwargs, chosen, cutting, not activation.others(self))
        return found.output, found.weaks

    @staticmethod
    def in_weak_pass() -> bool:
        """Tell whether this thread is computing a weak prediction, which is not to be guided again."""
        return in_weak_pass()

    def predict(
        self,
        branches: Sequence[Branch],
        denoiser: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        rows: Rows | None = None,
        weak_call: WeakCall | None = None,
        is_comparable: bool = True,
    ) -> Predicted:
        """Make a call, and the weak predictions of some branches.

        Args:
            branches: one weak prediction each.
            denoiser: makes the call.
            args: its positional arguments.
            kwargs: its keyword arguments.
            rows: its cond rows; all, if left out.
            weak_call: returns the arguments of the cond rows, where the host knows them better.
            is_comparable: another pass that skips nothing has to give the same; not where others guide it, too.
        """
        self.learn(branches, denoiser, args, kwargs)
        execution = self.of(branches)
        output, call = execution.cond_pass(denoiser, args, kwargs, rows, weak_call=weak_call)
        own = own_predictions(output)
        conds = own if rows is None else [rows.take(tensor) for tensor in own]
        start = time.perf_counter()
        call.is_comparable = is_comparable
        weaks = execution.weak_predictions(call, conds)
        self.stats.seconds += time.perf_counter() - start
        unskipped = [call.unskipped.get(branch) for branch in range(len(weaks))]
        return Predicted(replace_predictions(output, own), weaks, unskipped, execution.switches)

    def make(self, branches: Sequence[Branch]) -> Execution:
        """Make an execution, or return the one that was made before for the same branches.

        Raises:
            LayerError: a layer that does not exist or cannot be skipped in its mode.
            SettingError: an unknown execution.
        """
        return self._made_as(_key(branches), branches)

    def _made_as(self, key: Hashable, branches: Sequence[Branch]) -> Execution:
        if key not in self._made:
            found = [dataclasses.replace(branch, mode=find_mode(branch.mode)) for branch in branches]
            self._made[key] = Execution(self._model, found, self._way, self.stats, self.caches)
        return self._made[key]

    def prepare(self, possible: Iterable[Settings]) -> None:
        """Make what is known to be asked for, and check the layers of branches that are off as well.

        Args:
            possible: settings that may hold in a step.

        Raises:
            LayerError: a layer that does not exist or cannot be skipped in its mode.
            SettingError: an unknown execution.
        """
        for settings in possible:
            if settings.active:
                self._make_ahead(settings.active)
            for branch in settings.parts:
                if not any(branch is active for active in settings.active):
                    self._check_ahead(branch)
        self._prepared = frozenset(self._made)

    def _make_ahead(self, branches: Sequence[Branch]) -> None:
        if made_ahead(partial(self.make, branches)) is None:
            for branch in branches:  # each may be wrong for another reason
                self._check_ahead(branch)

    def _check_ahead(self, branch: Branch) -> None:
        made_ahead(partial(Switch, self._model, branch.layers, branch.mode, branch.kind))

    def learn(
        self, branches: Sequence[Branch], denoiser: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Let a call tell the layers of some branches, before it is made, where looking at the model does not.

        Args:
            branches: those of which the call needs weak predictions.
            denoiser: makes the call.
            args: its positional arguments.
            kwargs: its keyword arguments.

        Raises:
            LayerError: a layer that does not exist or cannot be skipped in its mode.
        """
        if branches and _key(branches) not in self._made and made_ahead(partial(self.make, branches)) is None:
            learn_once(self._model, denoiser, args, kwargs)

    def of(self, branches: Sequence[Branch]) -> Execution:
        """Return an installed execution; a schedule may ask for layers that were not known before the run."""
        with self._lock:
            key = _key(branches)
            execution = self._made_as(key, branches)
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
