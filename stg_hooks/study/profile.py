"""Measure what each layer would do for guidance, along one ordinary run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stg_hooks.errors import LayerError, SettingError, TargetError, warn
from stg_hooks.guidance.guide import Guided
from stg_hooks.guidance.settings import Branch
from stg_hooks.guider import Guider
from stg_hooks.hooks import activation
from stg_hooks.hosts import Host, pipeline_host
from stg_hooks.model.layers import Layer, find_layers
from stg_hooks.model.resolve import LayerSpec, resolve
from stg_hooks.modes.switch import Switch
from stg_hooks.module_calls import ModuleCalls
from stg_hooks.module_host import ModuleHost
from stg_hooks.passes.predict import Predictor
from stg_hooks.session import Session
from stg_hooks.step import Step
from stg_hooks.study import measures
from stg_hooks.study.observe import NoiseLevels, Observation, Observing, Probe, observation_of
from stg_hooks.study.results import Profile, ProfileRow, mean
from stg_hooks.study.sampling import Sample, generator_of, prompts_from, sampler_of, takes_prompt

PROMPTS = ("A dog runs along a beach, waves behind it.", "A woman pours tea at a window, steam rising from the cup.")
"""What a profile is made with where no prompts are given."""


def profile(
    target: Any,
    layers: LayerSpec | None = None,
    modes: str | Iterable[str] = ("residual",),
    noise_levels: int | Sequence[float] = 5,
    *,
    prompts: str | Sequence[str] | None = None,
    seed: int = 0,
    sample: Sample | None = None,
    steps: int | None = None,
    batched_cfg: bool | None = None,
    layout: str | None = None,
    layers_at_once: int | None = None,
    **settings: Any,
) -> Profile:
    """Measure the guidance term `d = cond - weak` of every layer and mode, along ordinary runs without skip guidance.

    At each noise level the weak predictions of all layers share what the plain call has computed, each up to its own
    layer: about half the work of as many whole passes. Little else is run, so that a profile costs about as much as
    `len(noise_levels) * (layers - 1) / 2` further calls. The run's own result is not changed.

    Args:
        target: a diffusers pipeline, a `Guider`, or a module whose calls are to be looked at.
        layers: which to measure, each by itself; left out, all that are numbered.
        modes: what a skipped layer does instead, one or several.
        noise_levels: how many, spread evenly over the steps of the run; or which, as in `Step`: of each the first step
            is taken that does not lie above it.
        prompts: what to make; two of ours unless given. Measures are means over them.
        seed: of the noise that the run starts from.
        sample: a function of `(prompt, generator)` that makes one ordinary run with the target, instead of
            `pipe(prompt=, generator=)`; needed for a `Guider` or a module.
        steps: how many calls a run makes, for a module, or a guider that does not know the step.
        batched_cfg: for a module: its rows are `[uncond, cond]`.
        layout: the dimensions of predictions, such as `"BCFHW"`, where they cannot be told.
        layers_at_once: how many weak predictions share one recorded pass. Fewer need less memory, which otherwise holds
            the output of every block for the cond rows, and one more pass of the denoiser for each further group.
        **settings: further arguments of the pipeline, such as `num_inference_steps`.

    Returns:
        The measures. Print it for a table; `save(folder)` writes it.

    Raises:
        CallError: the step is not known where noise levels have to be chosen, or a call cannot be understood.
        LayerError: a layer that does not exist or cannot be skipped in one of the modes.
        SettingError: a setting that cannot be used, or noise levels that the run did not reach.
        TargetError: a target that cannot be looked at.

    Source: d as in STG, arXiv 2411.18664, Eq. 13.
    """
    make, model = sampler_of(_called(target, sample), sample, settings, "latent"), _model_of(target)
    if layers_at_once is not None and (layers_at_once < 1 or isinstance(target, Guider)):
        raise SettingError(f"layers_at_once={layers_at_once!r}: expected 1 or more, and no stg.Guider as target.")
    if steps is not None and not isinstance(target, (Guider, nn.Module)):
        raise SettingError(f"steps={steps!r}: a pipeline tells its steps. To make fewer, pass num_inference_steps=.")
    names = (modes,) if isinstance(modes, str) else tuple(modes)
    chosen = _numbered(model, layers)
    pairs = _possible(model, chosen, names, layers is None)
    branches = [Branch([layer.index], 1.0, mode) for layer, mode in pairs]  # type: ignore[list-item]
    levels = NoiseLevels(noise_levels, steps)
    found: list[tuple[Observation, list[dict[str, float | None]]]] = []

    def observed(one: Observation) -> None:
        found.append((one, _measured(one, model, layout)))

    own = getattr(getattr(target, "stg_sample", None), "prompts", PROMPTS)
    pipe = target if sample is None else None
    if prompts is None:
        prompts = own if pipe is not None and takes_prompt(pipe, settings) else ""
    texts = prompts_from(prompts, pipe)
    watching: AbstractContextManager[None]
    if isinstance(target, Guider):
        watching = _watched_guider(target, branches, levels, observed)
    else:
        watching = _watched_host(_host(target, batched_cfg), branches, levels, layers_at_once, observed)
    with watching, torch.no_grad():
        for text in texts:
            levels.begin_run()
            make(text, generator_of(seed))
            levels.end_run()
    return _profile(model, pairs, texts, found)


def _called(target: Any, sample: Sample | None) -> Any:
    if sample is None and isinstance(target, (Guider, nn.Module)):
        raise TargetError(
            f"{type(target).__name__} makes no samples by itself. Say how to make one: sample=function, which takes "
            "(prompt, generator) and runs your loop."
        )
    return target


def _model_of(target: Any) -> nn.Module:
    if isinstance(target, Guider):
        return target.model
    return target if isinstance(target, nn.Module) else next(iter(pipeline_host(target).denoisers().values()))


def _host(target: Any, batched_cfg: bool | None) -> Host:
    if isinstance(target, nn.Module):
        return ModuleHost(target, ModuleCalls(bool(batched_cfg)))
    if batched_cfg is not None:
        raise SettingError("batched_cfg= describes the calls of a module. A pipeline is asked itself: leave it out.")
    return pipeline_host(target)


def _numbered(model: nn.Module, layers: LayerSpec | None) -> list[Layer]:
    found = find_layers(model) if layers is None else resolve(model, layers)
    numbered = [layer for layer in found if layer.index is not None]
    if not numbered or (layers is not None and len(numbered) < len(found)):
        raise LayerError(f"layers={layers!r}: a profile is of numbered layers. See stg.layers(model).")
    return numbered


def _possible(model: nn.Module, layers: list[Layer], modes: Sequence[str], all_layers: bool) -> list[tuple[Layer, str]]:
    """List what can be skipped; where all layers were asked for, those that cannot are left out with a warning."""
    if not modes or len(set(modes)) < len(modes):
        raise SettingError(f"modes={modes!r}: expected names, each once.")
    pairs, refused = [], []
    for mode in modes:
        for layer in layers:
            try:
                Switch(model, layer.index if layer.index is not None else layer.name, mode)
                pairs.append((layer, mode))
            except LayerError as error:
                if not all_layers:
                    raise
                refused.append((layer, mode, error))
    if not pairs:
        raise refused[0][2]
    if refused:
        left_out = ", ".join(f"{layer.index} ({mode})" for layer, mode, _ in refused)
        warn(f"stg.profile leaves out layers {left_out}: {refused[0][2]}")
    return pairs


@contextmanager
def _watched_host(
    host: Host,
    branches: list[Branch],
    levels: NoiseLevels,
    layers_at_once: int | None,
    observed: Callable[[Observation], None],
) -> Iterator[None]:
    size = layers_at_once or len(branches)
    groups = [branches[i : i + size] for i in range(0, len(branches), size)]
    unique = {id(module): module for module in host.denoisers().values()}
    guidance = Observing(next(iter(unique.values())), groups[0], levels)
    session = Session(host, guidance)
    with ExitStack() as stack:
        for module in unique.values():
            stack.enter_context(Probe(session, module, groups[1:], guidance, observed).installed())
        stack.enter_context(activation.entered(session))
        yield


@contextmanager
def _watched_guider(
    guider: Guider, branches: list[Branch], levels: NoiseLevels, observed: Callable[[Observation], None]
) -> Iterator[None]:
    """Have a guider make all weak predictions where they are wanted, and guide by CFG alone."""
    last: dict[str, Any] = {}
    denoiser = guider.denoiser

    def called(*args: Any, **kwargs: Any) -> Any:
        last.update(args=args, kwargs=kwargs)
        return guidance.meter.metered(denoiser, args, kwargs)

    def found(guided: Guided, unconds: Sequence[Tensor | None]) -> None:
        uncond = None if unconds[0] is None else guided.part(unconds[0])
        # Not yet over: in calls of its own, uncond has been computed by now.
        observed(observation_of(guided, guidance, uncond, guider.guidance_scale, **last, costs=guidance.meter.end()))

    guidance = Observing(guider.model, branches, levels, found)
    predictor = Predictor(guider.model, (), "sequential", guidance.stats)
    predictor.prepare(guidance.plan.possible)
    own = guider.denoiser, guider._guidance, guider._predictor
    try:
        guider.denoiser, guider._guidance, guider._predictor = called, guidance, predictor
        yield
    finally:
        guider.denoiser, guider._guidance, guider._predictor = own


def _measured(observation: Observation, model: nn.Module, layout: str | None) -> list[dict[str, float | None]]:
    """Measure every term of a step."""
    cond, uncond = observation.cond, observation.uncond
    rows = []
    for d in observation.terms:
        picture = measures.as_picture(d, model, observation.args, observation.kwargs, layout)
        is_video = picture is not None and picture.shape[2] > 1
        row = {
            "norm": measures.relative_norm(d, cond),
            "cosine": None if uncond is None else measures.cosine(d, cond.float() - uncond.float()),
            "high_frequency": None if picture is None else measures.high_frequency(picture),
            "temporal": measures.temporal(picture) if picture is not None and is_video else None,
            "std_ratio": measures.std_ratio(d, cond),
        }
        rows.append({name: None if value is None else float(value) for name, value in row.items()})
    return rows


def _profile(
    model: nn.Module,
    pairs: list[tuple[Layer, str]],
    prompts: tuple[str, ...],
    found: list[tuple[Observation, list[dict[str, float | None]]]],
) -> Profile:
    """Put together what was measured, mean over prompts."""
    by_level: dict[tuple[int, float], list[list[dict[str, float | None]]]] = {}
    for observation, measured in found:
        by_level.setdefault((observation.step.index or 0, _level(observation.step)), []).append(measured)
    counted = [observation.costs for observation, _ in found if observation.costs]
    rows = []
    for i, (layer, mode) in enumerate(pairs):
        assert layer.index is not None
        cost = min((costs[i] for costs in counted), default=None)  # a first call may find out what can be shared
        for (step, level), runs in sorted(by_level.items()):
            values = {name: mean(iter([run[i][name] for run in runs])) for name in runs[0][i]}
            rows.append(ProfileRow(layer=layer.index, mode=mode, noise_level=level, step=step, cost=cost, **values))
    unique = {layer.index: layer for layer, _ in pairs}
    return Profile(
        model=type(model).__name__,
        layers=tuple({"index": i, "name": layer.name, "type": layer.block} for i, layer in unique.items()),
        modes=tuple(dict.fromkeys(mode for _, mode in pairs)),
        noise_levels=tuple(level for _, level in sorted(by_level)),
        prompts=prompts,
        guidance_scale=found[0][0].guidance_scale,
        rows=tuple(rows),
        noise_kind=found[0][0].step.kind or "run",
    )


def _level(step: Step) -> float:
    return step.sigma if step.sigma is not None else 1.0 - (step.fraction or 0.0)
