"""What a sweep is asked for: checked, written down, compared, and as the code that makes one of its samples."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import nn

from stg_hooks.errors import ResultsError, SettingError
from stg_hooks.hosts import denoisers_of
from stg_hooks.model.layers import Layer, find_layers
from stg_hooks.model.resolve import LayerSpec, resolve
from stg_hooks.study.results import Place
from stg_hooks.study.sampling import Sample, default_of, guidance_scale_of, prompts_from, takes_prompt

_LOOKED_AT = 32  # parameters, and values of each


def asked_of(
    pipe: Any,
    prompts: str | Sequence[str],
    layers: Iterable[LayerSpec] | None,
    scales: Iterable[float],
    modes: Iterable[str],
    seeds: int | Iterable[int],
    settings: Mapping[str, Any],
    fps: int,
    metrics: Iterable[str],
    sample: Sample | None,
) -> dict[str, Any]:
    """Check what was asked for, and write it down in a form that can be compared and kept.

    Args:
        pipe: as for `sweep`; so are those that follow.
        prompts: as for `sweep`.
        layers: as for `sweep`.
        scales: as for `sweep`.
        modes: as for `sweep`.
        seeds: as for `sweep`.
        settings: as for `sweep`.
        fps: as for `sweep`.
        metrics: names of the user's own metrics.
        sample: as for `sweep`.

    Returns:
        What `sweep.json` is to hold.

    Raises:
        LayerError: a layer that does not exist.
        SettingError: a setting that cannot be used.
    """
    denoisers = denoisers_of(pipe)
    model = next(iter(denoisers.values()))
    groups = [[layer.index] for layer in find_layers(model) if layer.index is not None] if layers is None else layers
    chosen = [[_label(layer) for layer in resolve(model, group)] for group in _listed("layers", groups)]
    scales = [float(scale) for scale in _listed("scales", scales)]
    if 0.0 in scales:
        raise SettingError(
            "scales: 0.0 is the plain pipeline, which is a cell of its own in every sweep. Leave it out."
        )
    modes = _listed("modes", modes)
    if not all(isinstance(mode, str) for mode in modes):
        raise SettingError(f"modes={modes!r}: expected names, which tell the cells apart on disk.")
    numbers = _listed("seeds", range(seeds) if isinstance(seeds, int) else seeds)
    asked = {"layers": chosen, "modes": modes, "scales": scales, "seeds": [int(seed) for seed in numbers]}
    for name, values in asked.items():
        if any(value in values[:i] for i, value in enumerate(values)):
            raise SettingError(f"{name}={values}: something is there twice.")
    return {
        "model": type(model).__name__,
        "weights": _fingerprint(denoisers.values()),
        "pipeline": None if pipe is model else type(pipe).__name__,
        **asked,
        "prompts": list(prompts_from(prompts, pipe if sample is None else None)),
        "guidance_scale": guidance_scale_of(pipe, sample, settings),
        "fps": fps,
        "settings": {name: _text(value) for name, value in settings.items()},
        "metrics": sorted(metrics),
    }


def _fingerprint(models: Iterable[nn.Module]) -> str:
    """Describe weights: all names, shapes and types, and some of the values, where they are on a device."""
    digest = hashlib.sha256()
    for model in models:
        parameters = list(model.named_parameters())
        for i, (name, parameter) in enumerate(parameters):
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            if i % (1 + len(parameters) // _LOOKED_AT) == 0 and not parameter.is_meta:
                some = parameter.detach().flatten()[:_LOOKED_AT].float().cpu()
                digest.update(str(some.tolist()).encode())
    return digest.hexdigest()[:16]


def _listed(name: str, values: Any) -> list[Any]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise SettingError(f"{name}={values!r}: expected a list.")
    found = list(values)
    if not found:
        raise SettingError(f"{name}=[]: expected at least one.")
    return found


def _label(layer: Layer) -> int | str:
    return layer.name if layer.index is None else layer.index


def _text(value: Any) -> Any:
    """Keep what JSON can hold; turn the rest into text that is the same for the same value in every process."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_text(item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): _text(item) for name, item in value.items()}
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous().view(torch.uint8) if value.ndim else value.detach().cpu()
        return f"tensor {tuple(value.shape)} {value.dtype} {_digest(str(data.tolist()).encode())}"
    if hasattr(value, "tobytes"):  # arrays and pictures
        shape = getattr(value, "shape", getattr(value, "size", ""))
        return f"{type(value).__name__} {shape} {_digest(value.tobytes())}"
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


class OtherSettingsError(ResultsError, SettingError):
    """A folder holds a sweep with other settings than those that are asked for."""


def check_same(folder: Path, found: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise an `OtherSettingsError` unless a folder's settings are those that are asked for."""
    differing = [
        f"{name} is {found.get(name)!r} there and {asked.get(name)!r} here"
        for name in dict.fromkeys([*found, *asked])
        if found.get(name) != asked.get(name)
    ]
    if differing:
        raise OtherSettingsError(
            f"{folder} holds a sweep with other settings: {'; '.join(differing)}. Use the same settings to go on with "
            "it, or another folder."
        )


def call_text(pipe: Any, sample: Sample | None, settings: Mapping[str, Any]) -> str:
    """Write the call that makes a sample of `prompt` and `generator`, and its defaults, which may change.

    What stands in a pipeline's `stg_sample` may say as `.code` how it is written out; lines before the last are set-up.
    """
    if sample is not None:
        return f"{getattr(sample, '__name__', 'sample')}(prompt, generator)"
    usual = {name: default_of(pipe, name) for name in ("num_inference_steps", "guidance_scale")}
    settings = {name: value for name, value in usual.items() if value is not None} | dict(settings)
    plain = (bool, int, float, str, NoneType)
    given = [f"{name}={value!r}" if isinstance(value, plain) else f"{name}={name}" for name, value in settings.items()]
    if hasattr(pipe, "stg_sample"):
        code = getattr(pipe.stg_sample, "code", "pipe.stg_sample(prompt, generator, {})")
        return str(code).format(", ".join(given))
    prompt = ["prompt=prompt"] if takes_prompt(pipe, settings) else []
    return f"pipe({', '.join([*prompt, 'generator=generator', *given])})"


def code_of(place: Place, call: str, is_video: bool) -> str:
    """Write the lines that make such a sample."""
    layers, mode, scale = place
    what, where = ("video", ".frames[0]") if is_video else ("image", ".images[0]")
    *before, call = call.splitlines()
    line = f"{what} = {call}{where if call.startswith('pipe(') else ''}"
    if not layers:
        return "\n".join([*before, line])
    named = "" if mode == "residual" else f", mode={mode!r}"
    return "\n".join([*before, f"with stg.apply(pipe, layers={list(layers)}, scale={scale}{named}):", f"    {line}"])
