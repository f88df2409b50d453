"""Guide any denoiser in any loop."""

from __future__ import annotations

import dataclasses
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stg_hooks.errors import CallError, NotCopied, SettingError, TargetError
from stg_hooks.guidance.guide import Guidance, Guided, Predictions, StepOrLater
from stg_hooks.guidance.per_output import PerOutput, each_of
from stg_hooks.guidance.plain import written
from stg_hooks.guidance.request import Request
from stg_hooks.guidance.rules import Rule, remembers
from stg_hooks.guidance.scale_values import Scales, check_scales, is_number
from stg_hooks.guidance.schedule import Plan, Schedule
from stg_hooks.guidance.settings import Branch, Settings
from stg_hooks.guidance.trace import Stats, Trace
from stg_hooks.hooks import activation
from stg_hooks.model.resolve import LayerSpec
from stg_hooks.modes.frames import Kind
from stg_hooks.modes.perturbation import Mode
from stg_hooks.passes.guided_call import in_weak_pass
from stg_hooks.passes.inputs import Inputs, Written
from stg_hooks.passes.joined import halved_output, joined_call
from stg_hooks.passes.predict import Predictor
from stg_hooks.passes.returned import own_predictions, places_of_predictions, predictions, replace_predictions
from stg_hooks.passes.rows import HALF
from stg_hooks.ranks.link import Ranks, check_alone, check_own_copy, ranks_from
from stg_hooks.sampler_steps import SamplerSteps
from stg_hooks.step import Step, check_step

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclasses.dataclass
class _Call:
    """One call of a Guider: what it was given, and what holds in it."""

    args: tuple[Any, ...]
    positive: dict[str, Any]
    negative: dict[str, Any] | None
    """`None` where no uncond prediction is to be made."""
    step: StepOrLater
    settings: Settings
    guidance_scale: Scales
    is_inside: bool
    """Whether a weak pass of a caller makes it, which is not to be guided again."""

    @property
    def active(self) -> tuple[Branch, ...]:
        """The branches that guide it."""
        return () if self.is_inside else self.settings.active


class Guider(NotCopied):
    """A denoiser with guidance built in: call it where the denoiser was called.

    `out = uncond + guidance_scale * (cond - uncond) + sum_i scale_i * (cond - weak_i)`, with `rescale` as in
    `combine`. The model is changed only while a weak prediction is being computed. `stats` counts, and `trace` keeps
    what guidance did, as for `apply`.

    Within `with guider:` the model stays prepared between calls, without effect on calls of its own. That makes the
    calls of a run cheaper; leaving the `with` restores the model.
    """

    def __init__(
        self,
        denoiser: Callable[..., Any],
        layers: LayerSpec | None = None,
        scale: Scales | Callable[[Step], Scales] | None = None,
        *,
        guidance_scale: Scales = 1.0,
        rescale: PerOutput[float] | None = None,
        mode: str | Mode | None = None,
        kind: Kind | None = None,
        branches: Sequence[Branch] | None = None,
        preset: str | None = None,
        start: float | None = None,
        stop: float | None = None,
        sigma_range: tuple[float, float] | None = None,
        schedule: Schedule | None = None,
        rule: str | Rule | None = None,
        on: str = "cond",
        every: int = 1,
        channels: int | None = None,
        sigmas: Tensor | Sequence[float] | None = None,
        model: nn.Module | None = None,
        execution: str = "auto",
        group: ProcessGroup | None = None,
        timeout: float = 300.0,
        strict: bool = False,
    ) -> None:
        """Choose what to guide and how.

        Args:
            denoiser: called as `denoiser(*args, **kwargs, **cond)`: a module, or any callable around one.
            layers: what the weak model skips, as for `skip`; left out, the setting published for the model is used.
            scale: weight of `cond - weak`; 1.0 unless a published setting says otherwise. 0 makes no weak prediction;
                `rescale` and `rule` hold nevertheless. A tensor holds one value per sample, `(B,)`, or has the
                dimensions of the prediction. A function of the `Step` changes it during the run. By name, as for
                `apply`, where the model predicts several things.
            guidance_scale: CFG weight, used in calls that have `uncond`; 1 = off. A tensor as for `scale`.
            rescale: from 0 (off, the default) to 1 (the result has the standard deviation of cond).
            mode: what a skipped layer does instead, `"residual"` by default.
            kind: in factorised models, only attention within frames (`"spatial"`) or across them (`"temporal"`).
            branches: several perturbed predictions, instead of `layers`, `scale`, `mode` and `kind`.
            preset: as for `apply`; so are `start`, `stop`, `sigma_range` and `schedule`. They need to know the step:
                set `guider.step` before each step, or, for a denoiser called with a `sigma`, give `sigmas`.
            start: as for `apply`.
            stop: as for `apply`.
            sigma_range: as for `apply`.
            schedule: as for `apply`.
            rule: as for `combine`, `"cfg"` unless a published setting says otherwise.
            on: `"uncond"` lets the weak model make the *uncond* prediction instead, so that `uncond` in the formula is
                what it predicts: no extra pass is made, and `scale` has no meaning.
            every: as for `apply`, counted in guided calls; the step must be known, as for `start`.
            channels: how many channels (dimension 1) of a prediction are guided, where the others are a learned
                variance: those stay as cond has them. Left out, all are.
            sigmas: the noise levels that the sampler goes through, from high to low, `(N + 1,)`; the step of a call is
                the first one whose noise level is not above the call's `sigma`.
            model: the module that holds the layers, where `denoiser` is not itself a module.
            execution: how the weak prediction is computed, as for `apply`: `"auto"`, `"sequential"`, `"batched"` or
                `"full"`.
            group: spread the cond, weak and uncond predictions over these processes, as for `apply`.
            timeout: as for `apply`.
            strict: raise where a skip changes nothing, instead of a warning; its first call synchronises with the GPU.

        Raises:
            LayerError: a layer that does not exist or cannot be skipped in this mode.
            SettingError: a setting that cannot be used, or `layers` left out where nothing is published.
            TargetError: `denoiser` is not callable, or is not a module and `model` is missing.

        Source: STG, arXiv 2411.18664, Eq. 13 and 20, Alg. 4.
        """
        if not callable(denoiser):
            raise TargetError(f"denoiser must be callable, not {type(denoiser).__name__}.")
        if model is None:
            if not isinstance(denoiser, nn.Module):
                raise TargetError(
                    f"a {type(denoiser).__name__} is not a torch.nn.Module, so its layers cannot be found: pass the "
                    "module that it calls as model=..., or guide a pipeline by stg.apply(pipe, ...)."
                )
            model = denoiser
        if not isinstance(model, nn.Module):
            raise TargetError(f"model=: expected a torch.nn.Module to find layers in, not {type(model).__name__}.")
        check_scales("guidance_scale", guidance_scale)
        request = Request(
            layers=layers,
            scale=scale,
            mode=mode,
            kind=kind,
            rescale=rescale,
            branches=branches,
            preset=preset,
            start=start,
            stop=stop,
            sigma_range=sigma_range,
            schedule=schedule,
            rule=rule,
            on=on,
        )
        self._guidance = Guidance("stg.Guider", model, request, every, channels, strict)
        self._guidance.outputs.check_names([("guidance_scale", guidance_scale)])
        self.denoiser = denoiser
        self.model = model
        self._written: Written = {}
        self.guidance_scale = guidance_scale
        self.step: Step | None = None
        """Where in the run the next calls are made; set it in a loop of your own if settings change during the run."""
        self._steps = SamplerSteps(sigmas)
        self._takes_sigma = _second_parameter(denoiser) == "sigma"
        self._needs_step = not self.plan.is_constant or every > 1 or remembers(rule)
        self._predictor = Predictor(model, (), execution, self.stats)
        self._predictor.prepare(self.plan.possible)
        self._open: list[ExitStack] = []
        self.models = [model]
        self.ranks = ranks_from(group, timeout, on)
        self._has_met = False
        if self.ranks is not None:
            check_own_copy(model, self.ranks)

    def to_dict(self) -> dict[str, Any]:
        """Return what was asked for as JSON can hold it, as `apply.to_dict` does, with a number as `guidance_scale`.

        Raises:
            SettingError: JSON cannot hold a setting, such as a function that no module has under its name.
        """
        return {**self._guidance.to_dict(), "guidance_scale": written("guidance_scale", self.guidance_scale)}

    @property
    def plan(self) -> Plan:
        """Which settings hold when."""
        return self._guidance.plan

    @property
    def stats(self) -> Stats:
        """What has happened so far."""
        return self._guidance.stats

    @property
    def trace(self) -> Trace:
        """What guidance did, call by call."""
        return self._guidance.trace

    def __enter__(self) -> Guider:
        """Prepare the model for the calls of a run."""
        with ExitStack() as stack:
            stack.enter_context(self._predictor.installed())
            self._open.append(stack.pop_all())
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the model.

        Raises:
            CallError: `__enter__` was not called before.
        """
        if not self._open:
            raise CallError("stg.Guider was left without having been entered. Write: with guider:")
        self._open.pop().close()

    def _prepared(self) -> AbstractContextManager[None]:
        """Prepare the model for one call, unless it is."""
        return nullcontext() if self._open else self._predictor.installed()

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
            uncond: keyword arguments of the prediction without it; left out, there is no CFG. A denoiser of the kind
                `denoiser(x, sigma, ...)` makes both predictions in one call, on rows `[uncond, cond]`, where all
                tensors have one row per sample.
            **kwargs: passed to every call of the denoiser.

        Returns:
            What the denoiser returns for cond (a tensor, or a list, tuple, dictionary or object that holds it), with
            the guided predictions, new tensors, in place of its own.

        Raises:
            CallError: the settings depend on something about the step that is not known, or the noise level is 0 (on
                a GPU it is looked at only if settings change during the run).
            LayerError: with `strict`, a skip changed nothing.
            TargetError: `cond` or `uncond` is not a mapping.
            SettingError: an argument is given twice, or not for both predictions.
            RankError: with `group`: another rank has failed, died, or was given something else.
        """
        call = self._read(args, kwargs, cond, uncond)
        inputs = _in_lists_of_their_own(args, call.positive)
        if call.is_inside:
            output, found = self._alone(call, ())
        else:
            caches = self._predictor.caches
            if self._open:
                caches.check_same()
            else:
                caches.look()
            caches.begin_pass()
            wanted = self._guidance.wanted(call.step, call.settings)
            make = self._alone if self.ranks is None else partial(self._with_ranks, self.ranks)
            output, found = make(call, wanted)
        self.stats.calls += 1
        return self._combined(call, inputs, output, found)

    def _read(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        cond: Mapping[str, Any] | None,
        uncond: Mapping[str, Any] | None,
    ) -> _Call:
        """Tell what a call is about, and raise where it cannot be made."""
        positive, negative = _merged(kwargs, "cond", cond), _merged(kwargs, "uncond", uncond)
        if uncond and uncond.keys() != (cond or {}).keys():
            raise SettingError(
                f"cond has {sorted(cond or ())}, but uncond has {sorted(uncond)}: give the same arguments for both."
            )
        sigma = (args[1] if len(args) > 1 else kwargs.get("sigma")) if self._takes_sigma else None
        step = check_step(self.step) or self._steps.of(sigma, self._needs_step)
        settings = self._guidance.settings(step)
        g = self.guidance_scale if settings.guidance_scale is None else settings.guidance_scale
        cfg = uncond is not None and not is_number(g, 1)
        call = _Call(args, positive, negative if cfg else None, step, settings, g, in_weak_pass())
        if call.active and self._guidance.on == "uncond" and not cfg:
            raise CallError(
                "on='uncond' needs an uncond prediction, and there is none in this call: pass uncond={...} and a "
                f"guidance_scale other than 1 (it is {g})."
            )
        return call

    def _combined(
        self, call: _Call, inputs: tuple[tuple[Any, ...], dict[str, Any]], output: Any, found: Predictions
    ) -> Any:
        """Put the guided predictions in the place of those that the denoiser returned for cond."""
        guidance, step, settings, g = self._guidance, call.step, call.settings, call.guidance_scale
        changes = settings.changes and not call.is_inside
        of_rows = any(isinstance(one, Tensor) and one.ndim > 0 for one in each_of(g))
        found.places = places_of_predictions(output)
        samples = guidance.are_samples(output, found.conds, inputs, settings, of_rows)
        if not changes:
            none: list[list[Tensor]] = [[] for _ in found.conds]
            outputs = guidance.outputs.called(found.places)
            guided = Guided.of(step, settings, (), found.conds, none, guidance.channels, samples, outputs)
        else:
            with self.ranks.telling() if self.ranks is not None else nullcontext():
                guided = guidance.guided(step, settings, found, guidance.channels, samples)
                guidance.watch.report(wait=False)
            guidance.variance.look(type(self.model).__name__, *inputs, found.conds, samples)
        self.stats.guided_calls += changes
        final = guided.final(g, found.unconds)
        if changes:
            guidance.traced(guided, guided.terms(), found.unconds, g)
        return replace_predictions(output, [guided.with_rest(*pair) for pair in zip(final, found.conds, strict=True)])

    def _alone(self, call: _Call, wanted: tuple[Branch, ...]) -> tuple[Any, Predictions]:
        """Make the predictions of a step in this process; return what the denoiser returned for cond, too."""
        args, positive, negative = call.args, call.positive, call.negative
        joined = None
        # Only this kind of denoiser promises that dimension 0 is the sample, in all that it is given.
        if negative is not None and self._takes_sigma and self._guidance.on == "cond" and self.ranks is None:
            joined = joined_call(args, positive, negative)
        args_of_cond, kwargs_of_cond = joined or (args, positive)
        inputs = Inputs(args, negative, self._written) if negative is not None and joined is None else None
        is_joined = joined is not None
        found = Predictions([])
        if wanted:
            with self._prepared(), activation.entered(self):
                made = self._predictor.predict(
                    wanted,
                    self.denoiser,
                    args_of_cond,
                    kwargs_of_cond,
                    HALF if is_joined else None,
                    is_comparable=not activation.others(self),
                )
            output, found.weaks, found.unskipped, found.switches = (
                made.output,
                made.weaks,
                made.unskipped,
                made.switches,
            )
        else:
            output = self.denoiser(*args_of_cond, **kwargs_of_cond)
            output = replace_predictions(output, own_predictions(output))
        if is_joined:
            output, found.conds, found.unconds = halved_output(output)
        else:
            found.conds = predictions(output)
            found.unconds = [None] * len(found.conds)
        if inputs is not None:
            inputs.compare()
            self._add_uncond(found, call.active, *inputs.again())
        return output, found

    def _with_ranks(self, ranks: Ranks, call: _Call, wanted: tuple[Branch, ...]) -> tuple[Any, Predictions]:
        """Make the predictions of a step together with the other ranks."""
        if not self._has_met:
            ranks.enter(self.model)
            self._has_met = True
        check_alone(self, ranks, self.model)
        said = {
            "step": call.step if isinstance(call.step, Step) else None,
            "guidance_scale": call.guidance_scale,
            "rescale": call.settings.rescale,
            "rule": call.settings.rule,
        }
        args, has_uncond = call.args, call.negative is not None
        conditions = [call.positive, call.positive if call.negative is None else call.negative]
        inputs = [Inputs(args, condition, self._written) for condition in conditions]
        with self._prepared(), activation.entered(self):
            from stg_hooks.ranks.share import Share

            self._predictor.learn(wanted, self.denoiser, args, call.positive)
            share = Share(ranks, self._predictor, wanted, has_uncond)
            output = share.first(self.denoiser, lambda for_uncond: (args, conditions[for_uncond]))
            first = own_predictions(output)
            for given in inputs:
                given.compare()
            start = time.perf_counter()
            weaks = share.rest(self.denoiser, lambda for_uncond: inputs[for_uncond].again(), first, said)
            self.stats.seconds += time.perf_counter() - start
        unconds: Sequence[Tensor | None] = share.unconds or [None] * len(share.conds)
        return output, Predictions(share.conds, unconds, weaks if wanted else None, switches=share.switches)

    def _add_uncond(
        self, found: Predictions, active: Sequence[Branch], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Make the uncond prediction in a call of its own, by the weak model if that is asked for."""
        if not active or self._guidance.on == "cond":
            with self._predictor.caches.apart("uncond"):
                found.unconds = predictions(self.denoiser(*args, **kwargs))
            return
        with self._prepared():
            self._predictor.learn(active, self.denoiser, args, kwargs)
            switch = self._predictor.of(active).switches[0]
            apart = self._predictor.caches.apart(id(switch), switch.modules, switch.is_bypass)
            with apart, switch.switched_on():
                found.unconds, found.switches = predictions(self.denoiser(*args, **kwargs)), [switch]

    def callback(self, info: Mapping[str, Any]) -> None:
        """Follow a k-diffusion sampler: pass it as `callback=`.

        Args:
            info: what the sampler reports once in each step; `i`, `sigma`, `sigma_hat` and `n_accept` are used.
        """
        self._steps.callback(info)


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


def _in_lists_of_their_own(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copy the containers of a call, as the denoiser may change lists."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    kept: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(leaves, spec)
    return kept


def _second_parameter(denoiser: Callable[..., Any]) -> str | None:
    function = type(denoiser).forward if isinstance(denoiser, nn.Module) else denoiser
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
    names = names[1:] if isinstance(denoiser, nn.Module) else names
    return names[1] if len(names) > 1 else None
