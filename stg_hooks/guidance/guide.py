"""Turn predictions into the guided one: what holds in a step, which weak predictions it needs, their sum."""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from stg_hooks.checks import check_choice
from stg_hooks.errors import SettingError
from stg_hooks.guidance.channels import VarianceWatch, check_channels, guided_part, with_rest
from stg_hooks.guidance.combine import combine, correction
from stg_hooks.guidance.per_output import UNNAMED, Outputs
from stg_hooks.guidance.plain import read, written
from stg_hooks.guidance.request import Request, plan_from
from stg_hooks.guidance.reuse import Differences
from stg_hooks.guidance.rules import at_step
from stg_hooks.guidance.samples import are_samples, check_told
from stg_hooks.guidance.scale_values import Scale, Scales, is_number, of_sample
from stg_hooks.guidance.schedule import check_every, required
from stg_hooks.guidance.settings import Branch, Settings
from stg_hooks.guidance.trace import Stats, Trace
from stg_hooks.guidance.watch import Watch
from stg_hooks.modes.switch import Switch
from stg_hooks.step import Step

PREDICTIONS = ("cond", "uncond")

StepOrLater: TypeAlias = Step | Callable[[], Step]
"""A step, or a function that finds it out: for readers of the trace, where looking would synchronise with the GPU."""


@dataclasses.dataclass
class Predictions:
    """What was predicted in a step; a denoiser may return several tensors."""

    conds: Sequence[Tensor]
    unconds: Sequence[Tensor | None] = ()
    """One for each of `conds`."""
    weaks: Sequence[Sequence[Tensor]] | None = None
    """For each branch, one for each of `conds`; `None` where no weak pass was made, so that an older one serves."""
    unskipped: Sequence[Sequence[Tensor] | None] | None = None
    """For each branch, what its weak pass would give, bit for bit, if it skipped nothing; `None` where that is not
    known. Left out, that is `conds`."""
    switches: Sequence[Switch | None] = ()
    """For each branch, its skipped layers; `None` for those that are skipped on other ranks."""
    places: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Where they were in what the denoiser returned, by key, attribute or position, and how many are there."""


@dataclasses.dataclass
class Noisy:
    """What the predictions of a flow model were made for, where clean samples are to be combined: `x - sigma * v`."""

    latents: list[Tensor]
    sigma: float

    def clean(self, prediction: Tensor, i: int) -> Tensor:
        """Return the clean sample that one of the predictions, of a step, points to."""
        return self.latents[i].float() - self.sigma * prediction.float()

    def velocity(self, clean: Tensor, i: int) -> Tensor:
        """Return the prediction that points to a clean sample."""
        return (self.latents[i].float() - clean.float()) / self.sigma


@dataclasses.dataclass
class Guided:
    """The predictions of a step, and what they come to.

    Where each prediction is one sample, it gets a dimension for the batch in here; channels that are not guided are
    left out, until `with_rest` puts them back.
    """

    step: StepOrLater
    settings: Settings
    branches: tuple[Branch, ...]
    """Those that have a weak prediction; none where the weak model makes the uncond prediction."""
    conds: list[Tensor]
    weaks: list[list[Tensor]]
    """For each prediction, those of all branches."""
    channels: int | None = None
    samples: bool = False
    outputs: Outputs = UNNAMED
    noisy: Noisy | None = None
    """Where rescale and rule are about clean samples."""

    @classmethod
    def of(
        cls,
        step: StepOrLater,
        settings: Settings,
        branches: tuple[Branch, ...],
        conds: Sequence[Tensor],
        weaks: Sequence[Sequence[Tensor]],
        channels: int | None = None,
        samples: bool = False,
        outputs: Outputs = UNNAMED,
    ) -> Guided:
        """Take the parts of predictions that are guided; `weaks` are those of all branches for each prediction."""
        found = cls(step, settings, branches, [], [], channels, samples, outputs)
        found.conds = [found.part(c) for c in conds]
        found.weaks = [[found.part(weak) for weak in of_one] for of_one in weaks]
        return found

    @property
    def scales(self) -> list[Scales]:
        """The weight of each branch."""
        return [branch.scale for branch in self.branches]

    def part(self, prediction: Tensor) -> Tensor:
        """Return the part of a prediction that is guided."""
        return guided_part(prediction[None] if self.samples else prediction, self.channels)

    def with_rest(self, guided: Tensor, prediction: Tensor) -> Tensor:
        """Put the rest of a prediction back behind its guided part."""
        found = with_rest(guided, prediction[None] if self.samples else prediction, self.channels)
        return found[0] if self.samples else found

    def added(self, term: Tensor, prediction: Tensor) -> Tensor:
        """Add a term to the guided part of a prediction."""
        part = self.part(prediction)
        return self.with_rest((part.float() + term).to(part.dtype), prediction)

    def weight(self, name: str, given: Scales, i: int) -> Scale:
        """Return what a weight is for one of the predictions."""
        off: Scale = 1.0 if name == "guidance_scale" else 0.0
        value = self.outputs.of(name, given, i, off)
        return of_sample(name, value, i, len(self.conds)) if self.samples else value

    def terms(self) -> list[Tensor]:
        """Return what skip guidance adds to the guided part of each prediction."""
        pairs = zip(self.conds, self.weaks, strict=True)
        return [correction(c, weaks, self._scales_of(i)) for i, (c, weaks) in enumerate(pairs)]

    def final(self, guidance_scale: Scales, unconds: Sequence[Tensor | None]) -> list[Tensor]:
        """Return the guided part of each guided prediction; `unconds` are whole predictions."""
        found = []
        for i, (c, weaks, u) in enumerate(zip(self.conds, self.weaks, unconds, strict=True)):
            rule = self.settings.rule
            final = combine(
                self._clean(c, i),
                [self._clean(weak, i) for weak in weaks],
                None if u is None else self._clean(self.part(u), i),
                scale=self._scales_of(i),
                guidance_scale=self.weight("guidance_scale", guidance_scale, i),
                rescale=self.outputs.of("rescale", self.settings.rescale, i, 0.0),
                rule=at_step(rule, self.step, i) if isinstance(self.step, Step) else rule,
            )
            found.append(final if self.noisy is None else self.noisy.velocity(final, i).to(c.dtype))
        return found

    def _clean(self, prediction: Tensor, i: int) -> Tensor:
        return prediction if self.noisy is None else self.noisy.clean(prediction, i)

    def _scales_of(self, i: int) -> list[Scale]:
        return [self.weight("scale", scale, i) for scale in self.scales]


class Guidance:
    """What one `apply` or `Guider` does with predictions, and what it has done."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        request: Request,
        every: int = 1,
        channels: int | None = None,
        strict: bool = False,
    ) -> None:
        """Check what was asked for.

        Args:
            name: what to call the user's own call in messages.
            model: the module whose published setting counts when no layers are given.
            request: what was asked for.
            every: as for `apply`.
            channels: as for `apply`.
            strict: as for `apply`.

        Raises:
            SettingError: a value that cannot be used, or a contradiction.
        """
        request = dataclasses.replace(
            request,
            **{field.name: read(field.name, getattr(request, field.name)) for field in dataclasses.fields(request)},
        )
        _check_on(request.on, request.scale)
        check_channels(channels)
        self._request = request
        self.on = request.on
        self.outputs = Outputs.stated(model)
        self.plan = plan_from(model, request)
        for settings in self.plan.possible:
            self.outputs.check_names(settings.by_name)
        check_every(every)
        self.every = every
        self.channels = channels
        self.stats = Stats()
        self.trace = Trace()
        self.watch = Watch(name, strict)
        self.variance = VarianceWatch(channels is not None)
        self._local = _OfThread()
        if self.on == "uncond":
            if every > 1:
                raise SettingError(f"every={every}: on='uncond' makes no extra pass that could be left out.")
            for settings in self.plan.possible:
                check_uncond(settings)

    def to_dict(self) -> dict[str, Any]:
        """Return what was asked for as JSON can hold it: `stg.apply(pipe, **found)` asks for the same.

        Raises:
            SettingError: JSON cannot hold a setting, such as a function that no module has under its name.
        """
        asked = {field.name: getattr(self._request, field.name) for field in dataclasses.fields(self._request)}
        asked |= {"every": self.every, "channels": self.channels, "strict": self.watch.strict}
        for name, plain in {"on": "cond", "every": 1, "strict": False}.items():
            asked[name] = None if asked[name] == plain else asked[name]
        return {name: written(name, value) for name, value in asked.items() if value is not None}

    def for_another(self) -> Guidance:
        """Return the same guidance for another denoiser of the same pipeline: what `every` uses again is its own."""
        other = copy.copy(self)
        other._local = _OfThread()
        return other

    def settings(self, step: StepOrLater) -> Settings:
        """Return what holds in a step; one that is not known yet changes nothing."""
        settings = self.plan.at(step) if isinstance(step, Step) else self.plan.base
        if self.on == "uncond":
            check_uncond(settings)
        return settings

    def wanted(self, step: StepOrLater, settings: Settings) -> tuple[Branch, ...]:
        """Return the branches whose weak predictions a step needs; to be asked once in every step.

        Raises:
            CallError: `every` counts steps, and the step is not known, or has been guided already.
        """
        if self.on == "uncond":
            return ()
        if self.every > 1 and isinstance(step, Step):
            if settings.active:
                required(step.index, f"every={self.every} counts steps", "index")
            kept = self._local.kept
            if kept is not None and kept.serves(step, settings.active, self.every):
                return ()
        return settings.active

    def are_samples(
        self,
        output: Any,
        found: Sequence[Tensor],
        call: tuple[tuple[Any, ...], dict[str, Any]],
        settings: Settings,
        of_rows: bool,
    ) -> bool:
        """Tell whether each prediction of a call is one sample, without a dimension for the batch.

        Args:
            output: what the denoiser returned.
            found: the predictions in it.
            call: its arguments.
            settings: what holds in it.
            of_rows: what is done with it depends on that.

        Raises:
            CallError: it cannot be told.
        """
        if isinstance(output, Tensor) or len(found) <= len(self.outputs.names):
            return False
        samples = are_samples(found, *call)
        if of_rows or settings.of_samples or self.channels is not None:
            return check_told(samples, len(found), "guidance")
        return bool(samples)

    def guided(
        self,
        step: StepOrLater,
        settings: Settings,
        predictions: Predictions,
        channels: int | None = None,
        samples: bool = False,
    ) -> Guided:
        """Look at the predictions of a step that is guided, and return what they come to.

        Args:
            step: where in the run they were made.
            settings: what holds there.
            predictions: what was predicted.
            channels: how many channels are guided; all, if left out.
            samples: each prediction is one sample.

        Raises:
            CallError: differences of an earlier step do not fit.
            LayerError: with `strict`, a skip changed nothing.
        """
        conds, branches = predictions.conds, settings.active if self.on == "cond" else ()
        self.watch.look(
            step if isinstance(step, Step) else Step(),
            conds,
            predictions.unconds,
            predictions.switches,
            predictions.weaks or (),
            predictions.unskipped,
        )
        if not branches:
            weaks: list[list[Tensor]] = [[] for _ in conds]
        elif predictions.weaks is None:
            assert self._local.kept is not None
            weaks = self._local.kept.weaks(conds)
        else:
            weaks = [[weak[i] for weak in predictions.weaks] for i in range(len(conds))]
            if self.every > 1 and isinstance(step, Step):
                self._local.kept = Differences.of(conds, weaks, branches, step)
        outputs = self.outputs.called(predictions.places)
        return Guided.of(step, settings, branches, conds, weaks, channels, samples, outputs)

    def traced(
        self, guided: Guided, terms: Sequence[Tensor], unconds: Sequence[Tensor | None], guidance_scale: Scales | None
    ) -> None:
        """Add a step to the trace; where CFG is off, nothing points along it."""
        if self.on == "cond":
            parts = [None if u is None or is_number(guidance_scale, 1) else guided.part(u) for u in unconds]
            self.trace.add(guided.step, guided.scales, terms, guided.conds, parts)

    def forget(self) -> None:
        """Let go of what this thread has computed."""
        self._local.kept = None

    def forget_all(self) -> None:
        """Let go of what all threads have computed."""
        self._local = _OfThread()


class _OfThread(threading.local):
    kept: Differences | None = None


def _check_on(on: str, scale: object) -> None:
    """Raise unless `on` names a prediction, and `scale` is left out where it has no meaning."""
    check_choice(f"on={on!r}", on, PREDICTIONS)
    if on == "uncond" and scale is not None:
        raise SettingError(
            "scale= has no meaning with on='uncond', where nothing is added: the weak prediction takes the place of "
            "uncond, and guidance_scale says how far to go from it. Leave scale out."
        )


def check_uncond(settings: Settings) -> None:
    """Raise if settings hold something that has no meaning where the weak model makes the uncond prediction."""
    if len(settings.parts) > 1:
        raise SettingError(
            f"on='uncond' with {len(settings.parts)} branches: there is one uncond prediction. Give layers=[...]."
        )
    if any(isinstance(branch.scale, Tensor) or branch.scale not in (0, 1) for branch in settings.branches):
        _check_on("uncond", settings.branches[0].scale)
