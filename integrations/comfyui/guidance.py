"""Skip guidance in ComfyUI's sampling, through the extension points of its `ModelPatcher` only.

A run is a call of `SAMPLER_SAMPLE`, which keeps the model prepared. A step of it goes through three others:

- `PREDICT_NOISE`: a `_Step` is made and travels down with the options of the step. It holds all that is kept, and dies
  with the step, however that ends.
- `CALC_COND_BATCH`: the sampler's own call with cond and uncond gets an `APPLY_MODEL` wrapper, in which `stg.Predictor`
  makes the weak predictions of the cond rows right after the call, from the first skipped layer on. Extra passes of
  other nodes have one conditioning, and are left alone.
- post-CFG: `calc_cond_batch([cond])` is called once more with a model that answers with these weak predictions, so that
  areas, masks, several prompts and context windows are put together as ComfyUI puts the cond predictions together.
  Where there are none (guiders with three conditionings), the same call makes a full weak pass.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import stg_hooks as stg
from stg_hooks.errors import CallError, SettingError
from stg_hooks.guidance.guide import check_uncond
from stg_hooks.guidance.request import Request, plan_from
from stg_hooks.guidance.rules import at_step, cfg, find_rule
from stg_hooks.guidance.settings import Settings
from stg_hooks.integrations.comfyui.attention import visible_attention
from stg_hooks.integrations.comfyui.fields import SLACK
from stg_hooks.step import Step

Options = dict[str, Any]
Wrapper = Callable[..., Any]

_NUMBERS = itertools.count()
_OPTIONS = 5  # the place of `transformer_options` among the arguments of `apply_model`


class _NotKeptError(Exception):
    """A weak prediction is asked for that was not made along with a cond prediction."""


@dataclasses.dataclass(eq=False)
class _Step:
    """What is kept in one step of a sampler."""

    sigma: float
    sigmas: Tensor | None
    """All noise levels of the run, where the sampler told them."""
    settings: Settings | None = None
    kept: dict[uuid.UUID, list[list[Tensor]]] = dataclasses.field(default_factory=dict)
    """By ComfyUI's name of a conditioning: the weak predictions of each call, one per branch."""

    @property
    def place(self) -> Step:
        """Where in the run it is."""
        if self.sigmas is None or len(self.sigmas) < 2:
            return Step(sigma=self.sigma)
        count = len(self.sigmas) - 1
        index = int((self.sigmas.double() > self.sigma * (1 + 1e-5)).sum())
        return Step(min(index, count - 1), count, self.sigma, of_sampler=True)


class _Run(ExitStack):
    """A run of a sampler, at the end of which the model is as it was."""

    def __init__(self) -> None:
        super().__init__()
        self._is_open = False
        self._predictors: list[stg.Predictor] = []

    def __enter__(self) -> _Run:
        """Begin."""
        self._is_open = True
        return super().__enter__()

    def prepared(self, predictor: stg.Predictor) -> AbstractContextManager[None]:
        """Prepare a model: until the end of the run, or, outside of one, within a `with`."""
        if not self._is_open:
            return predictor.installed()
        if predictor not in self._predictors:
            self.enter_context(predictor.installed())
            self._predictors.append(predictor)
        return nullcontext()


class SkipGuidance:
    """What one node does to the models that come out of it; keeps nothing of a run but what it learned of the model."""

    def __init__(
        self,
        module: nn.Module,
        request: Request,
        percents: tuple[float, float] = (0.0, 1.0),
        values: Sequence[Mapping[str, Any]] = (),
        zero_above: float = math.inf,
        execution: str = "auto",
    ) -> None:
        """Check what was asked for; change nothing yet.

        Args:
            module: ComfyUI's `diffusion_model`.
            request: what was asked for, as for `stg.apply`.
            percents: from where to where there is guidance, as ComfyUI's `percent_to_sigma` counts.
            values: all that a schedule that is a function may give.
            zero_above: noise level above which the denoised prediction is 0 and the model is not called.
            execution: as for `stg.apply`.

        Raises:
            StgError: a setting or a layer that cannot be used.
        """
        if not 0 <= percents[0] <= percents[1] <= 1:
            raise SettingError(
                f"start_percent={percents[0]}, end_percent={percents[1]}: expected 0 <= start <= end <= 1."
            )
        self._key = f"stg_hooks.{next(_NUMBERS)}"
        self._plan = plan_from(module, request)
        self._on = request.on
        self._percents = percents
        self._zero_above = zero_above
        self._execution = execution
        self._made: tuple[nn.Module, dict[object, stg.Predictor]] = module, {}
        self._possible = [*self._plan.possible, *map(self._plan.base.changed, values)]
        for settings in self._possible:
            self._check(module, settings)

    def __deepcopy__(self, memo: object) -> SkipGuidance:
        """Stay one object: ComfyUI of 2025 copied the options of a model deeply."""
        return self

    def _check(self, module: nn.Module, settings: Settings) -> None:
        if self._on == "uncond":
            check_uncond(settings)
        for branch in settings.branches:
            stg.check(module, branch.layers, branch.mode, kind=branch.kind)
        if settings.active:
            self.predictor(module, settings.active)

    @property
    def settings(self) -> Settings:
        """What holds where no schedule says otherwise."""
        return self._plan.base

    def patch(self, patcher: Any) -> Any:
        """Return a clone of a `ModelPatcher` that is guided."""
        from comfy.patcher_extension import WrappersMP

        found = patcher.clone()
        found.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, self._key, self.sampler_sample)
        found.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, self._key, self.predict_noise)
        found.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, self._key, self.calc_cond_batch)
        has_cfg = any(one.guidance_scale is not None for one in self._possible)
        found.set_model_sampler_post_cfg_function(self.post_cfg, disable_cfg1_optimization=has_cfg)
        return found

    # --- ComfyUI's extension points

    def sampler_sample(
        self, executor: Any, model: Any, sigmas: Tensor, extra_args: Options, *args: Any, **kwargs: Any
    ) -> Any:
        """Keep the model prepared for a run, which is cheaper than for each call."""
        with _Run() as run:
            options = _with(extra_args["model_options"], **{f"{self._key}.run": run})
            return executor(model, sigmas, {**extra_args, "model_options": options}, *args, **kwargs)

    def predict_noise(
        self, executor: Any, x: Tensor, timestep: Tensor, model_options: Options, seed: Any = None
    ) -> Any:
        """Begin a step."""
        sigma, of_model = float(timestep.max()), model_options.get("transformer_options", {})
        if sigma > self._zero_above:
            return torch.zeros_like(x)
        step = _Step(sigma, of_model.get("sample_sigmas"))
        return executor(x, timestep, _with(model_options, **{self._key: step}), seed)

    def calc_cond_batch(
        self, executor: Any, model: Any, conds: Sequence[Any], x: Tensor, timestep: Tensor, model_options: Options
    ) -> Any:
        """Make the weak predictions along with the cond ones, or in place of the uncond ones."""
        step = model_options.get("transformer_options", {}).get(self._key)
        if step is None or len(conds) < 2 or not self._at(step, model).active:
            return executor(model, conds, x, timestep, model_options)
        if self._on == "uncond":
            return self._weak_uncond(executor, model, conds, x, timestep, model_options)
        if len(conds) > 2 or conds[0] is None:
            return executor(model, conds, x, timestep, model_options)
        return executor(model, conds, x, timestep, self._wrapped(model_options, self._along(step)))

    def post_cfg(self, args: dict[str, Any]) -> Tensor:
        """Add guidance to what the sampler has made of its predictions."""
        denoised: Tensor = args["denoised"]
        model, options = args["model"], args["model_options"]
        step = options.get("transformer_options", {}).get(self._key) or _Step(float(args["sigma"].max()), None)
        settings = self._at(step, model)
        if self._on == "uncond" or not settings.changes:
            return denoised
        if (settings.rule != "cfg" or settings.guidance_scale is not None) and "sampler_cfg_function" in options:
            raise CallError(
                f"{settings.why_replaces} says how predictions become one, and so does another node of this model "
                "(RescaleCFG and others). Remove one of them."
            )
        weaks = [self._weak(args, step, branch) for branch in range(len(settings.active))]
        return _guided(args, settings, weaks, step.place)

    # --- weak predictions

    def _along(self, step: _Step) -> Wrapper:
        """Return an `APPLY_MODEL` wrapper that makes weak predictions along with cond ones, and keeps them."""
        settings = step.settings
        assert settings is not None

        def apply_model(executor: Any, *args: Any, **kwargs: Any) -> Any:
            options = args[_OPTIONS]
            which, names = options["cond_or_uncond"], options["uuids"]
            conds = [i for i, one in enumerate(which) if one == 0]
            if not conds or stg.Predictor.in_weak_pass():
                return executor(*args, **kwargs)
            predictor, x = self.predictor(executor.class_obj.diffusion_model, settings.active), args[0]
            size = x.shape[0] // len(which)
            rows = [i * size + row for i in conds for row in range(size)]

            def denoiser(*args: Any, **kwargs: Any) -> Any:
                return executor(*(self._weak_call(args) if stg.Predictor.in_weak_pass() else args), **kwargs)

            def cut(args: Any, kwargs: Any) -> Any:
                place = slice(rows[0], rows[-1] + 1) if rows == [*range(rows[0], rows[-1] + 1)] else rows
                return _cut(args, kwargs, conds, lambda tensor: tensor[place] if _has(tensor, x) else tensor)

            with options.get(f"{self._key}.run", _Run()).prepared(predictor):
                output, weaks = predictor(denoiser, args, kwargs, rows=rows, weak_call=cut)
            parts = [weak.chunk(len(conds)) for (weak,) in weaks]
            for i, of_cond in zip(conds, zip(*parts, strict=True), strict=True):
                step.kept.setdefault(names[i], []).append(list(of_cond))
            return output

        return apply_model

    def _weak(self, args: dict[str, Any], step: _Step, branch: int) -> Tensor:
        """Return a weak prediction of the whole latents."""
        model, cond, options = args["model"], args["cond"], args["model_options"]
        assert step.settings is not None
        if step.kept:
            # Control and hooks have acted on them already.
            bare = [{k: v for k, v in one.items() if k not in ("control", "hooks", "gligen")} for one in cond]
            answers = {k: v for k, v in options.items() if k != "model_function_wrapper"}
            kept = {name: deque(found) for name, found in step.kept.items()}
            try:
                return self._predicted(model, bare, args, _only(answers, self._key, _answer(kept, branch)))
            except _NotKeptError:
                pass
        return self._predicted(model, cond, args, self._wrapped(options, self._skipping(step.settings.active[branch])))

    @staticmethod
    def _predicted(model: Any, cond: Any, args: dict[str, Any], options: Options) -> Tensor:
        from comfy.samplers import calc_cond_batch

        (found,) = calc_cond_batch(model, [cond], args["input"], args["sigma"], options)
        assert isinstance(found, Tensor)
        return found

    def _weak_uncond(
        self, executor: Any, model: Any, conds: Sequence[Any], x: Tensor, timestep: Tensor, options: Options
    ) -> Any:
        """Let the weak model make the uncond prediction."""
        if len(conds) > 2 or conds[1] is None:
            raise CallError(
                "on='uncond' lets the weak model make the uncond prediction, and this sampler makes "
                + ("none: set its CFG above 1, or use on='cond'." if conds[1] is None else "several: use on='cond'.")
            )
        step = options["transformer_options"][self._key]
        weak = self._wrapped(options, self._skipping(step.settings.active[0]))
        found = [*executor(model, [conds[0], None], x, timestep, options)]
        found[1] = executor(model, [None, conds[1]], x, timestep, weak)[1]
        return found

    def _skipping(self, branch: stg.Branch) -> Wrapper:
        """Return an `APPLY_MODEL` wrapper that makes full weak passes."""

        def apply_model(executor: Any, *args: Any, **kwargs: Any) -> Any:
            module = executor.class_obj.diffusion_model
            with ExitStack() as stack:
                stack.enter_context(stg.skip(module, branch.layers, branch.mode, kind=branch.kind))
                return executor(*self._weak_call(args), **kwargs)

        return apply_model

    def _weak_call(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Give a weak call names of its own, by which caches of other nodes tell it from others."""
        options = visible_attention(args[_OPTIONS])
        options["uuids"] = [uuid.uuid5(name, self._key) for name in options["uuids"]]
        return *args[:_OPTIONS], options

    def predictor(self, module: nn.Module, branches: tuple[stg.Branch, ...]) -> stg.Predictor:
        """Return the predictor of some branches; a node that compiles a model may have put another module in place."""
        if self._made[0] is not module:
            self._made = module, {}
        made, key = self._made[1], tuple(branch.key for branch in branches)
        if key not in made:
            made[key] = stg.Predictor(module, branches, self._execution)
        return made[key]

    def _at(self, step: _Step, model: Any) -> Settings:
        """Return what holds in a step."""
        if step.settings is None:
            high, low = map(model.model_sampling.percent_to_sigma, self._percents)
            is_on = low * (1 - SLACK) <= step.sigma <= high * (1 + SLACK)
            step.settings = self._plan.at(step.place) if is_on else Settings(())
        return step.settings

    def _wrapped(self, options: Options, wrapper: Wrapper) -> Options:
        """Return options with one more `APPLY_MODEL` wrapper, next to the model."""
        from comfy.patcher_extension import WrappersMP

        wrappers = options.get("transformer_options", {}).get("wrappers", {})
        of_model = {**wrappers.get(WrappersMP.APPLY_MODEL, {}), self._key: [wrapper]}
        return _with(options, wrappers={**wrappers, WrappersMP.APPLY_MODEL: of_model})


def _with(options: Options, **more: Any) -> Options:
    return {**options, "transformer_options": {**options.get("transformer_options", {}), **more}}


def _only(options: Options, key: str, wrapper: Wrapper) -> Options:
    """Return options in which a wrapper is all that is called."""
    from comfy.patcher_extension import WrappersMP

    return _with(options, wrappers={WrappersMP.APPLY_MODEL: {key: [wrapper]}})


def _answer(kept: Mapping[uuid.UUID, deque[list[Tensor]]], branch: int) -> Wrapper:
    """Return an `APPLY_MODEL` wrapper that answers with what was kept, in the order in which it was made."""

    def apply_model(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        names = args[_OPTIONS]["uuids"]
        if not all(kept.get(name) for name in names):
            raise _NotKeptError
        return torch.cat([kept[name].popleft()[branch] for name in names])

    return apply_model


def _cut(
    args: tuple[Any, ...], kwargs: dict[str, Any], conds: Sequence[int], take: Callable[[Any], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Cut a call of `apply_model` down to some of its conditionings; patches of others divide rows by their number."""
    options = args[_OPTIONS]
    lists = {name: [options[name][i] for i in conds] for name in ("cond_or_uncond", "uuids")}
    tensors, named = pytree.tree_map(take, (args[:_OPTIONS], kwargs))
    return (*tensors, {**options, **lists}), named


def _has(leaf: object, x: Tensor) -> bool:
    """Tell whether something has an entry per row of a call."""
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == x.shape[0]


def _guided(args: dict[str, Any], settings: Settings, weaks: Sequence[Tensor], step: Step) -> Tensor:
    """Combine predictions, on top of what the sampler and other nodes have made of them."""
    cond, own = args["cond_denoised"], float(args["cond_scale"])
    denoised: Tensor = args["denoised"].float()
    uncond = None if args["uncond"] is None else args["uncond_denoised"]
    scale = own if settings.guidance_scale is None else settings.guidance_scale

    def rule(c: Tensor, u: Tensor | None, terms: Sequence[Tensor], g: Any) -> Tensor:
        if settings.rule == "cfg" and settings.guidance_scale is None:
            return reduce(torch.add, terms, denoised)
        plain = cfg(c, None if uncond is None else uncond.float(), (), own)
        combined: Tensor = find_rule(at_step(settings.rule, step, 0))(c, u, terms, g)
        return denoised - plain + combined

    weights: dict[str, Any] = {
        "scale": [branch.scale for branch in settings.active], "guidance_scale": scale, "rescale": settings.rescale
    }  # fmt: skip
    return stg.combine(cond, weaks, uncond, **weights, rule=rule)
