"""Look at the calls of a denoiser without changing them: which steps, what guidance would do there, what it costs."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stg_hooks.denoiser import GuidedDenoiser
from stg_hooks.errors import CallError, SettingError, warn
from stg_hooks.guidance.channels import VarianceWatch
from stg_hooks.guidance.guide import Guidance, Guided, Predictions, StepOrLater
from stg_hooks.guidance.request import Request
from stg_hooks.guidance.settings import Branch, Settings
from stg_hooks.guidance.trace import Stats
from stg_hooks.guidance.watch import Watch
from stg_hooks.passes.guided_call import in_weak_pass, is_checking, weak_pass
from stg_hooks.passes.rows import halves, take_rows
from stg_hooks.roles import check_rows_apart
from stg_hooks.session import Session
from stg_hooks.step import Step
from stg_hooks.study.cost import Flops, is_compiled_anywhere


@dataclasses.dataclass(frozen=True)
class Observation:
    """One step: its predictions, and `cond - weak` of every branch."""

    step: Step
    cond: Tensor
    terms: list[Tensor]
    uncond: Tensor | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    guidance_scale: float | None
    costs: list[float] | None
    """FLOPs of each branch's weak pass, as a part of the plain step's; `None` where they were not counted."""


class NoiseLevels:
    """Chooses the steps of a run that are looked at."""

    def __init__(self, wanted: int | Sequence[float], steps: int | None) -> None:
        """Check what is wanted.

        Args:
            wanted: how many, spread evenly over the run; or the levels themselves.
            steps: how many steps a run has, where calls do not tell.

        Raises:
            SettingError: neither a number above 0 nor a list of numbers.
        """
        if isinstance(wanted, int):
            if isinstance(wanted, bool) or wanted < 1:
                raise SettingError(f"noise_levels={wanted!r}: expected how many, 1 or more, or a list of levels.")
        elif not wanted or any(level < 0 for level in wanted):
            raise SettingError(f"noise_levels={wanted!r}: expected numbers from 0 on, at least one.")
        if steps is not None and steps < 1:
            raise SettingError(f"steps={steps!r}: expected 1 or more.")
        self._wanted, self._steps = wanted, steps
        self.begin_run()

    def begin_run(self) -> None:
        """Forget the run before."""
        self.step: Step | None = None
        """The step that is being looked at."""
        self._calls = 0
        self._looked_at: set[int] = set()
        self._left = [] if isinstance(self._wanted, int) else sorted(map(float, self._wanted), reverse=True)
        self._lowest: float | None = None

    def wants(self, step: Step) -> bool:
        """Tell whether to look at a call with the prompt; to be asked once about each.

        Raises:
            CallError: the call does not tell where in the run it is.
        """
        index, count = step.index, step.count
        if self._steps is not None and count is None:
            index, count = self._calls if index is None else index, self._steps
        step = dataclasses.replace(step, index=index, count=count)
        self._calls += 1
        self.step = None
        if isinstance(self._wanted, int):
            if index is None or count is None:
                raise CallError("where in its run this call is made cannot be told: pass steps=, the calls of a run.")
            chosen = {(2 * i + 1) * count // (2 * self._wanted) for i in range(self._wanted)}
            wanted = index in chosen and index not in self._looked_at
        else:
            if step.sigma is None:
                raise CallError(
                    "noise_levels= is a list, but the noise level of this call is not known. Pass how many: "
                    "noise_levels=5, and steps=, the calls of a run."
                )
            self._lowest = step.sigma
            passed = [level for level in self._left if step.sigma <= level * (1 + 1e-6)]
            self._left = self._left[len(passed) :]
            wanted = bool(passed)
        if wanted:
            self.step = step
            self._looked_at.add(-1 if index is None else index)
        return wanted

    def end_run(self) -> None:
        """Report what was not reached.

        Raises:
            SettingError: no step was looked at.
        """
        if not self._looked_at:
            raise SettingError(
                f"noise_levels={self._wanted!r}: the run made {self._calls} calls with the prompt"
                + (f", down to the level {self._lowest:.4g}" if self._lowest is not None else "")
                + ", and none of them was to be looked at."
            )
        if self._left:
            warn(f"stg.profile: the run ends at the noise level {self._lowest:.4g}, above {self._left}.")


class Meter:
    """Counts what the plain calls of a step and its weak passes cost, for the first few steps that are looked at."""

    STEPS = 2

    def __init__(self, stats: Stats, model: nn.Module) -> None:
        """Start with nothing counted.

        Args:
            stats: where weak passes are counted; tells which one is running.
            model: the denoiser; of compiled ones nothing can be counted.
        """
        self._stats = stats
        self._left = 0 if is_compiled_anywhere(model) else self.STEPS
        self._plain: int | None = None
        self._weak: dict[int, int] = {}
        self._first = 0

    def begin(self) -> None:
        """Count from here on, if that has not been done often enough."""
        self._plain = 0 if self._left else None
        self._weak, self._first = {}, self._stats.weak_passes

    def metered(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call of the denoiser."""
        if self._plain is None or is_checking():
            return call(*args, **kwargs)
        with Flops() as counter:
            output = call(*args, **kwargs)
        flops = counter.total
        if in_weak_pass():
            branch = self._stats.weak_passes - self._first
            self._weak[branch] = self._weak.get(branch, 0) + flops
        else:
            self._plain += flops
        return output

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing within a `with`."""
        before, self._plain = self._plain, None
        try:
            yield
        finally:
            self._plain = before

    def end(self) -> list[float] | None:
        """Return the cost of each weak pass as a part of the plain calls', if they were counted."""
        plain, self._plain = self._plain, None
        if plain is None:
            return None
        self._left -= 1
        return [flops / plain for _, flops in sorted(self._weak.items())] if plain else None


class _Unwatched(Watch):
    """Says nothing: a profile shows which layers change nothing."""

    def look(self, *_: object, **__: object) -> None:
        """Look at nothing."""


class Observing(Guidance):
    """Wants all weak predictions where a noise level is to be looked at, and guides nothing."""

    def __init__(
        self,
        model: nn.Module,
        branches: Sequence[Branch],
        levels: NoiseLevels,
        observed: Callable[[Guided, Sequence[Tensor | None]], None] | None = None,
    ) -> None:
        """Check the branches.

        Args:
            model: the denoiser.
            branches: one weak prediction each.
            levels: chooses the steps.
            observed: takes predictions, the uncond ones apart.
        """

        def schedule(step: Step) -> dict[str, Any] | None:
            if not levels.wants(step):
                return None
            self.meter.begin()
            return {}

        super().__init__("stg.profile", model, Request(branches=branches, schedule=schedule))
        self.levels, self.meter, self._observed = levels, Meter(self.stats, model), observed
        self.watch = _Unwatched("stg.profile")
        self.variance = VarianceWatch(is_told=True)

    def guided(
        self,
        step: StepOrLater,
        settings: Settings,
        predictions: Predictions,
        channels: int | None = None,
        samples: bool = False,
    ) -> Guided:
        """Let predictions be observed; return what leaves them as they are."""
        found = super().guided(step, settings, predictions, channels, samples)
        if self._observed is not None:
            self._observed(found, predictions.unconds)
        return dataclasses.replace(found, settings=Settings(()), branches=(), weaks=[[] for _ in found.conds])


def observation_of(
    guided: Guided,
    guidance: Observing,
    uncond: Tensor | None,
    guidance_scale: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    costs: list[float] | None = None,
) -> Observation:
    """Say what was found in a step, of several predictions in the first one."""
    step = guidance.levels.step
    assert step is not None
    cond = guided.conds[0]
    return Observation(
        step=step,
        cond=cond,
        terms=[cond.float() - weak.float() for weak in guided.weaks[0]],
        uncond=uncond,
        args=args,
        kwargs=kwargs,
        guidance_scale=float(guidance_scale) if isinstance(guidance_scale, (int, float)) else None,
        costs=costs,
    )


class _OfThread(threading.local):
    waiting: Observation | None = None  # of a cond call, until its uncond call comes


class Probe(GuidedDenoiser):
    """Computes weak predictions where a guide would, and hands them to an observer instead of guiding."""

    def __init__(
        self,
        session: Session,
        model: nn.Module,
        more: Sequence[Sequence[Branch]],
        guidance: Observing,
        observed: Callable[[Observation], None],
    ) -> None:
        """Resolve all layers; change nothing yet.

        Args:
            session: what probes of the same pipeline share.
            model: the denoiser.
            more: further groups of branches; for each of them a cond pass is made once more.
            guidance: that of the session, which wants the first group of branches.
            observed: takes what was found.
        """
        super().__init__(session, model, "sequential")
        self._more, self._observing, self._observed = more, guidance, observed
        for branches in more:
            self._predictor.make(branches)
        self._thread = _OfThread()

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        super()._before(model, args, kwargs)
        call = self._local.call
        if call is not None and call.is_cond and not in_weak_pass():
            self._thread.waiting = None  # its uncond call did not come

    def _around(self, proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._local.call is None and not in_weak_pass():
            return super()._around(proceed, args, kwargs)

        def call(*args: Any, **kwargs: Any) -> Any:
            return self._observing.meter.metered(proceed, args, kwargs)

        return super()._around(call, args, kwargs)

    def _guided(self, call: Any, unguided: Sequence[Tensor], output: Sequence[Tensor]) -> Any:
        """Compute the weak predictions, and leave the output alone."""
        check_rows_apart(call.role, "profile")
        both = call.role.is_halved
        unconds = [halves(tensor)[0] for tensor in output] if both else None
        conds = [halves(tensor)[1] for tensor in output] if both else list(output)
        by_branch = self._all_weaks(call, conds)
        weaks = [[weak[i] for weak in by_branch] for i in range(len(conds))]
        guided = Guided.of(call.step, call.settings, (), conds, weaks, samples=bool(call.role.samples))
        uncond = None if unconds is None else guided.part(unconds[0])
        scale = call.role.guidance_scale
        found = observation_of(guided, self._observing, uncond, scale, call.args, call.kwargs)
        self._thread.waiting = found
        if not call.role.uncond_follows:
            self._finish(found)
        return None

    def _other(self, call: Any, output: Sequence[Tensor]) -> Any:
        """Complete what the cond call found with the uncond prediction."""
        waiting = self._thread.waiting
        if call.role.rows == "uncond" and waiting is not None:
            self._finish(dataclasses.replace(waiting, uncond=output[0]))
        return None

    def _finish(self, found: Observation) -> None:
        self._thread.waiting = None
        self._observed(dataclasses.replace(found, costs=self._observing.meter.end()))

    def _all_weaks(self, call: Any, conds: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return the weak predictions of every branch."""
        guided = call.guided
        call.inputs.compare()
        weaks = self._predictor.of(call.settings.active).weak_predictions(guided, conds, self._model, call.inputs)
        for branch, alone in guided.unskipped.items():
            # A skip that changes nothing measures zero: in calls of another size, cond rounds otherwise.
            if all(map(torch.equal, weaks[branch], alone)):
                weaks[branch] = list(conds)
        for branches in self._more:
            args, kwargs = call.inputs.again()
            if call.role.is_halved:
                half = conds[0].shape[0]
                args, kwargs = take_rows(args, kwargs, self._names, 2 * half, slice(half, None))
            execution = self._predictor.of(branches)
            with weak_pass(), self._observing.meter.paused():
                _, again = execution.cond_pass(self._model, args, kwargs)
            weaks += execution.weak_predictions(again, conds)
        return weaks
