"""Skip guidance as the guider of diffusers' modular pipelines."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

from torch import Tensor, nn

from stg_hooks.errors import CallError, ExtraError, SettingError, TargetError, warn
from stg_hooks.guidance.guide import Guidance, Predictions
from stg_hooks.guidance.plain import read, written
from stg_hooks.guidance.request import Request
from stg_hooks.guidance.rules import Rule
from stg_hooks.guidance.scale_values import Scale, Scales, check_scale, is_number
from stg_hooks.guidance.schedule import Asked, Plan, Schedule
from stg_hooks.guidance.settings import Branch, Settings
from stg_hooks.guidance.trace import Stats, Trace
from stg_hooks.hooks import activation
from stg_hooks.hooks.forward import Action, patched
from stg_hooks.integrations.diffusers.modular import ModularHost
from stg_hooks.integrations.diffusers.running import calling_pipeline
from stg_hooks.model.resolve import LayerSpec
from stg_hooks.modes.frames import Kind
from stg_hooks.modes.perturbation import Mode
from stg_hooks.passes.predict import Predicted, Predictor
from stg_hooks.passes.returned import own_predictions, replace_predictions
from stg_hooks.passes.ways import check_execution
from stg_hooks.step import Step

try:
    from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
except ImportError as error:
    raise ExtraError(
        "stg.modular is for modular pipelines of diffusers 0.36 or later: pip install -U diffusers"
    ) from error

__all__ = ["SkipGuidance"]

_NAME = "stg.modular.SkipGuidance"
_NO_MODEL = nn.Module()
_Call = Callable[..., Any]
_ONE_FOR_ALL = (
    "in pipelines with a guider for each of video and audio, the video's makes the passes of both. Use one for the "
    "video, too: pipe.update_components(guider=stg.modular.SkipGuidance(...)); with scale=0.0 it leaves the video as "
    "it is."
)
_ONE_FOR_EACH = (
    "in modular pipelines each prediction has a guider of its own, which has one value: "
    "pipe.update_components(guider=stg.modular.SkipGuidance(...), audio_guider=stg.modular.SkipGuidance(...))."
)
_REQUEST = [field.name for field in dataclasses.fields(Request) if field.name != "on"]
_SETTINGS = (*_REQUEST, "guidance_scale", "every", "execution", "strict")


@dataclasses.dataclass
class _Now:
    """One step: what holds in it, and which calls the pipeline is to make."""

    step: Step
    guidance: Guidance
    settings: Settings
    guidance_scale: Scales
    weak: dict[str, Branch]
    """The branches whose weak predictions are to be made, by the name of their pass."""
    names: list[str]
    """The passes, in the order in which the pipeline makes them."""
    data: object
    """Where the inputs come from; the guiders of one call of the denoiser, such as video's and audio's, share it."""
    is_led: bool = False
    """The pipeline has told this guider, or another one in its name, of the passes it makes."""
    patch: ExitStack = dataclasses.field(default_factory=ExitStack)
    made: list[Predicted] = dataclasses.field(default_factory=list)
    """What each call of the cond pass gave."""


class SkipGuidance(BaseGuidance):  # type: ignore[misc]  # diffusers has no types
    """The guider of a modular pipeline: classifier-free guidance with skip guidance.

        pipe.update_components(guider=stg.modular.SkipGuidance(layers=[8], scale=1.0, guidance_scale=5.0))

    In each step the pipeline makes a cond pass, a weak pass for each branch, and an uncond pass. The weak predictions
    come with the cond pass, from the first skipped layer on; the pipeline's own call for a weak pass is answered with
    them, so that what it does with a prediction is done to them, too. Nothing is on the model between passes.

    Settings can be read and set as attributes. They are saved by name where they are functions: see `schedule`.
    """

    _input_predictions: ClassVar = ["pred_cond", "pred_cond_stg", "pred_uncond"]

    def __init__(
        self,
        layers: LayerSpec | None = None,
        scale: float | Callable[[Step], Scale] | str | None = None,
        guidance_scale: float = 5.0,
        *,
        rescale: float | None = None,
        mode: str | Mode | None = None,
        kind: Kind | None = None,
        branches: Sequence[Branch | Mapping[str, Any]] | None = None,
        preset: str | None = None,
        start: float | None = None,
        stop: float | None = None,
        sigma_range: Sequence[float] | None = None,
        schedule: Schedule | str | None = None,
        rule: str | Rule | None = None,
        every: int = 1,
        execution: str = "auto",
        strict: bool = False,
        enabled: bool = True,
    ) -> None:
        """Choose how to guide; touch no model.

        Args:
            layers: what the weak model skips, as for `stg.skip`, by numbers and names; left out, the setting published
                for the model is used.
            scale: weight of `cond - weak`; 1.0 unless a published setting says otherwise. 0 makes no weak prediction.
            guidance_scale: CFG weight; at 1 no uncond prediction is made. A schedule may change it.
            rescale: as for `stg.apply`, as are the settings below.
            mode: what a skipped layer does instead.
            kind: in factorised models, only attention within frames or across them.
            branches: several perturbed predictions, instead of `layers`, `scale`, `mode` and `kind`.
            preset: a published setting, by its name.
            start: part of the run from which on there is skip guidance; CFG goes on outside.
            stop: part of the run from which on there is none.
            sigma_range: lowest and highest noise level with skip guidance.
            schedule: a list of (noise level, values), or a function of the `stg.Step` that a module has under its
                name; it is saved as `"module:function"`, and may be given so. So may `scale`, `mode` and `rule`.
            rule: how the predictions become one.
            every: use a weak prediction in this many steps.
            execution: how weak predictions are computed.
            strict: raise where a skip changes nothing, instead of a warning.
            enabled: whether there is guidance at all; otherwise there is only the cond pass.

        Raises:
            SettingError: a value that cannot be used, a contradiction, or something that JSON cannot hold.
        """
        super().__init__()
        given = locals()
        self._enabled = enabled
        self.register_to_config(enabled=enabled)
        self.stats = Stats()
        """What has happened so far."""
        self.trace = Trace()
        """What guidance did, step by step."""
        self._now: _Now | None = None
        self._host: ModularHost | None = None
        self._choose({name: given[name] for name in _SETTINGS})

    def _choose(self, given: Mapping[str, Any]) -> None:
        """Check settings, and take them over."""
        plain = {name: written(name, value) for name, value in given.items()}
        settings = {name: read(name, value) for name, value in plain.items()}
        check_scale("guidance_scale", settings["guidance_scale"])
        check_execution(settings["execution"])
        request = Request(**{name: settings[name] for name in _REQUEST})
        self._is_published = request.layers is None and request.branches is None
        # What is published depends on the model: the rest is checked with any layer.
        self._request = request
        known = dataclasses.replace(request, layers=[0], preset=None) if self._is_published else request
        guidance = Guidance(_NAME, _NO_MODEL, known, settings["every"], strict=settings["strict"])
        for name, value in (pair for one in guidance.plan.possible for pair in one.by_name):
            if isinstance(value, Mapping):
                raise SettingError(f"{name}={dict(value)!r}: {_ONE_FOR_EACH}")
        self._guidance = guidance
        self._guided_model: nn.Module = _NO_MODEL
        self._predictors: dict[int, tuple[nn.Module, Predictor]] = {}
        self.register_to_config(**plain)
        self.__dict__.update(settings)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a setting, checked as when the guider is made; or anything else."""
        if name in _SETTINGS:
            self._choose({**{other: getattr(self, other) for other in _SETTINGS}, name: value})
        else:
            super().__setattr__(name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        """Let copies and pickles have the settings only: the rest belongs to a model."""
        return type(self).from_config, (dict(self.config),)

    # --- which passes a step has ---

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        """Say which passes the pipeline is to make, and with which inputs.

        Args:
            data: for each argument of the denoiser, its value, or its values for cond and uncond.
        """
        names = self._begin(data)
        return self._tied([self._prepare_batch(data, int(name == "pred_uncond"), name) for name in names])

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        """Say which passes the pipeline is to make, and with which inputs.

        Args:
            data: holds the inputs.
            input_fields: for each argument of the denoiser, where in `data` it is, or it is for cond and uncond.
        """
        names = self._begin(data)
        return self._tied(
            [self._prepare_batch_from_block_state(input_fields, data, int(n == "pred_uncond"), n) for n in names]
        )

    def _begin(self, data: object) -> list[str]:
        """Find out what holds in a step, and return the names of its passes."""
        self._end()
        host, guidance = self._host_here(), self._guidance
        model = _NO_MODEL if host is None else next(iter(host.denoisers().values()))
        if self._is_published and model is not self._guided_model:
            guidance = Guidance(_NAME, model, self._request, self.config.every, strict=self.config.strict)
            self._guidance, self._guided_model = guidance, model
        guidance.stats, guidance.trace = self.stats, self.trace
        if host is not None:
            step = host.step_of(self)
        else:
            step = Step() if self._step is None else Step(self._step, self._num_inference_steps)
        settings = guidance.settings(step) if self._enabled else Settings((), guidance_scale=1.0)
        scale = self.config.guidance_scale if settings.guidance_scale is None else settings.guidance_scale
        weak: dict[str, Branch] = {}
        taken = {branch.key: name for peer in self._peers(data) for name, branch in peer.weak.items()}
        for branch in guidance.wanted(step, settings):
            # The first one has the name that LTX-2's own guider gives it: as the audio's guider, that shares it.
            free = (f"pred_cond_stg{number or ''}" for number in itertools.count())
            name = taken.get(branch.key) or next(n for n in free if n not in {*taken.values(), *weak})
            weak[name] = branch
        # The weak passes follow the cond pass, so that nothing has to be kept for long.
        names = ["pred_cond", *weak, *([] if is_number(scale, 1) else ["pred_uncond"])]
        self._now = _Now(step, guidance, settings, scale, weak, names, data)
        return names

    def _peers(self, data: object) -> list[_Now]:
        """Return what other guiders of the pipeline have begun with the same inputs."""
        parts = () if self._host is None else self._host.pipeline.components.values()
        others = [part._now for part in parts if isinstance(part, SkipGuidance) and part is not self]
        return [now for now in others if now is not None and now.data is data]

    def _host_here(self) -> ModularHost | None:
        """Find the pipeline that is running: it knows its model and noise levels, and guiders are not told."""
        pipeline: Any = calling_pipeline()
        if pipeline is None or self._host is None or self._host.pipeline is not pipeline:
            try:
                self._host = None if pipeline is None else ModularHost(pipeline)
            except TargetError:  # its denoiser has a name of its own
                self._host = None
        return self._host

    @property
    def num_conditions(self) -> int:
        """How many passes a step has; before a run, whether uncond inputs are needed is what pipelines ask it for."""
        if self._now is not None:
            return len(self._now.names)
        known = [settings.guidance_scale for settings in self._guidance.plan.possible]
        scales = [self.config.guidance_scale, *(scale for scale in known if scale is not None)]
        may_change = isinstance(self.config.schedule, str)  # a function
        return 1 + (self._enabled and (may_change or not all(is_number(scale, 1) for scale in scales)))

    @property
    def is_conditional(self) -> bool:
        """Whether the pass that is being made has the prompt."""
        return self._pass() != "pred_uncond"

    def active_predictions(self) -> list[str]:
        """Return the names of the passes of this step: pipelines with a guider for each modality ask for them."""
        return ["pred_cond"] if self._now is None else self._now.names

    @property
    def spatio_temporal_guidance_blocks(self) -> list[int]:
        """Return no blocks: what LTX-2 is to skip by itself; that it is given tells its weak passes from others."""
        return []

    # --- a pass ---

    def _pass(self) -> str | None:
        """Return the name of the pass that is being made; `None` for one that a guider of another kind asked for."""
        if self._now is None:
            return None
        # As pipelines with several guiders put their passes together.
        nows = [self._now, *self._peers(self._now.data)]
        names = list(dict.fromkeys(name for now in nows for name in now.names))
        return names[self._count_prepared - 1] if 0 < self._count_prepared <= len(names) else None

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Get in the way of the call that the pipeline is going to make, if a weak prediction depends on it.

        Args:
            denoiser: the module that it is going to call.

        Raises:
            LayerError: a layer that does not exist or cannot be skipped in its mode.
        """
        self._count_prepared += 1
        name, now = self._pass(), self._now
        if now is None or not self._enabled:
            return
        nows = [now, *self._peers(now.data)]
        weak = {name: branch for one in nows for name, branch in one.weak.items()}
        if name == "pred_cond":
            predictor = self._predictor(denoiser, now.guidance.plan)
            for one in nows:
                one.is_led = True
            if weak:
                self._answer(denoiser, functools.partial(self._cond, now, predictor, tuple(weak.values())))
        elif name in weak:
            self._answer(denoiser, functools.partial(self._weak, iter(now.made), list(weak).index(name)))
        elif name is None and now.guidance.plan.base.branches:
            predictor = self._predictor(denoiser, now.guidance.plan)
            self._answer(denoiser, functools.partial(self._for_others, predictor, now.guidance.plan.base.branches[:1]))

    def cleanup_models(self, denoiser: nn.Module) -> None:
        """Leave the model as it was.

        Args:
            denoiser: the module that has been called.
        """
        if self._now is not None:
            self._now.patch.close()

    def _cond(
        self, now: _Now, predictor: Predictor, branches: tuple[Branch, ...], proceed: _Call, args: Any, kwargs: Any
    ) -> Any:
        """Make a call of the cond pass, and the weak predictions that go with it."""
        with predictor.installed():
            predictor.caches.begin_pass()
            alone = not activation.others(self)
            now.made.append(predictor.predict(branches, proceed, args, kwargs, is_comparable=alone))
        return now.made[-1].output

    def _weak(
        self, calls: Iterator[Predicted], branch: int, proceed: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """Answer a call of a weak pass with what came with that of the cond pass."""
        made = next(calls, None)
        if made is None:
            raise CallError(
                f"the pipeline calls its denoiser more often for a weak pass than for pred_cond, so {_NAME} cannot "
                "tell which prediction belongs to which. Use stg.Guider in a loop of your own."
            )
        return replace_predictions(made.output, made.weaks[branch])

    def _for_others(
        self, predictor: Predictor, branches: tuple[Branch, ...], proceed: _Call, args: Any, kwargs: Any
    ) -> Any:
        """Make the weak pass that LTX-2's own guider of the audio asks for while this one asks for none."""
        if kwargs.get("spatio_temporal_guidance_blocks") is None:
            return proceed(*args, **kwargs)
        with predictor.installed():
            switch = predictor.of(branches).switches[0]
            with predictor.caches.apart(id(switch), switch.modules, switch.is_bypass), switch.switched_on():
                return proceed(*args, **kwargs)

    def _answer(self, denoiser: nn.Module, answer: Action) -> None:
        """Have calls of the denoiser, in this thread and until the pass ends, answered by a function."""
        assert self._now is not None
        thread, stack = threading.get_ident(), self._now.patch

        def action(proceed: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if threading.get_ident() != thread or Predictor.in_weak_pass():
                return proceed(*args, **kwargs)
            try:
                return answer(proceed, args, kwargs)
            except BaseException:  # an interrupt, too: pipelines do not clean up then
                stack.close()
                raise

        patch = stack.enter_context(patched(denoiser))
        stack.enter_context(patch.everywhere(action))

    def _tied(self, batches: list[Any]) -> list[Any]:
        """Restore the model also where a pipeline fails before or after its call: when it drops the step's inputs."""
        assert self._now is not None
        weakref.finalize(batches[0], self._now.patch.close).atexit = False
        return batches

    def _predictor(self, denoiser: nn.Module, plan: Plan) -> Predictor:
        """Return the predictor of a denoiser; of those before, the last one is kept, for pipelines with two."""
        found = self._predictors.pop(id(denoiser), None)
        if found is None:
            found = denoiser, Predictor(denoiser, (), self.config.execution, self.stats)
            found[1].prepare(plan.possible)
        self._predictors = {**dict(list(self._predictors.items())[-1:]), id(denoiser): found}
        return found[1]

    def _end(self) -> None:
        if self._now is not None:
            self._now.patch.close()
        self._now = None

    # --- the guided prediction ---

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None, **weaks: Tensor) -> Any:
        """Return the guided prediction.

        Args:
            pred_cond: the prediction with the prompt.
            pred_uncond: the one without it; `None` for no CFG.
            **weaks: those of the weak passes.

        Returns:
            The guided prediction, with those that pipelines look at themselves.

        Raises:
            LayerError: with `strict`, a skip changed nothing.
        """
        now = self._now
        if now is None:
            raise CallError(f"{_NAME} was called without a step that it had prepared: call prepare_inputs before.")
        guidance, settings, step = now.guidance, now.settings, now.step
        if now.weak and not now.is_led:
            raise CallError(f"a {_NAME} was given no pass of its own: {_ONE_FOR_ALL}")
        found = Predictions([pred_cond], [pred_uncond], [[weaks[name]] for name in now.weak] if now.weak else None)
        for made in now.made:  # as the denoiser returned them: the pipeline's own arithmetic may round
            conds = own_predictions(made.output)
            guidance.watch.look(step, conds, found.unconds, made.switches, made.weaks, made.unskipped)
        self.stats.calls += 1
        guided = guidance.guided(step, settings, found)
        (final,) = guided.final(now.guidance_scale, found.unconds)
        if settings.changes and self._enabled:
            self.stats.guided_calls += 1
            guidance.traced(guided, guided.terms(), found.unconds, now.guidance_scale)
        self._end()
        self._report(guidance, is_over=step.index is not None and step.index + 1 == step.count)
        return GuiderOutput(pred=guided.with_rest(final, pred_cond), pred_cond=pred_cond, pred_uncond=pred_uncond)

    def _report(self, guidance: Guidance, is_over: bool) -> None:
        guidance.watch.report(wait=is_over)
        plan = guidance.plan
        asked = plan.asked
        if not is_over:
            return
        plan.asked = Asked()
        if asked.began and not asked.guided and not plan.is_off and self._enabled:
            levels = " Its noise levels went from {:.4g} to {:.4g}.".format(*asked.sigmas) if asked.sigmas else ""
            text = (
                f"{_NAME} guided nothing: no step of the run was to be guided, by what start=, stop=, sigma_range=, "
                f"scale= or schedule= says.{levels}"
            )
            warn(text)
