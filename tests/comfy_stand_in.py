"""Small stand-ins of ComfyUI's extension points, for tests without it: what calls what, with which options."""

from __future__ import annotations

import copy
import sys
import types
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests import zoo


class WrappersMP:
    PREDICT_NOISE = "predict_noise"
    CALC_COND_BATCH = "calc_cond_batch"
    APPLY_MODEL = "apply_model"


class Executor:
    """Calls the wrappers of a function from the outside in; each is given the rest."""

    def __init__(self, function: Callable[..., Any], wrappers: Sequence[Callable[..., Any]], owner: object) -> None:
        self.function, self.wrappers, self.class_obj = function, list(wrappers), owner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.wrappers:
            return self.function(*args, **kwargs)
        return self.wrappers[0](Executor(self.function, self.wrappers[1:], self.class_obj), *args, **kwargs)


def wrapped(function: Callable[..., Any], kind: str, of_model: dict[str, Any], owner: object = None) -> Executor:
    found = of_model.get("wrappers", {}).get(kind, {})
    return Executor(function, [one for some in found.values() for one in some], owner)


class Model:
    """What ComfyUI has around a `diffusion_model`."""

    def __init__(self, diffusion_model: nn.Module) -> None:
        self.diffusion_model = diffusion_model
        self.model_sampling = types.SimpleNamespace(percent_to_sigma=lambda percent: 1.0 - percent)

    def apply_model(self, x: Tensor, t: Tensor, **given: Any) -> Any:
        options = given.pop("transformer_options")
        call = wrapped(self._apply_model, WrappersMP.APPLY_MODEL, options, self)
        return call(x, t, None, given.pop("c_crossattn"), None, options, **given)

    def _apply_model(
        self, x: Tensor, t: Tensor, c_concat: Any, c_crossattn: Tensor, control: Any, transformer_options: Any
    ) -> Any:
        assert len(transformer_options["cond_or_uncond"]) == len(transformer_options["uuids"])
        assert len(x) % len(transformer_options["uuids"]) == 0
        return x - t[:, None, None] * self.diffusion_model(x, c_crossattn, transformer_options)


class Patcher:
    """A `ModelPatcher`: a model, and options that its clones share one by one."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.model_options: dict[str, Any] = {"transformer_options": {}}

    def clone(self) -> Patcher:
        found = Patcher(self.model)
        found.model_options = copy.deepcopy(self.model_options)  # as in 2025
        return found

    def get_model_object(self, name: str) -> Any:
        return getattr(self.model, name)

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Any) -> None:
        wrappers = self.model_options["transformer_options"].setdefault("wrappers", {})
        wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def set_model_sampler_post_cfg_function(self, function: Any, disable_cfg1_optimization: bool = False) -> None:
        self.model_options.setdefault("sampler_post_cfg_function", []).append(function)
        if disable_cfg1_optimization:
            self.model_options["disable_cfg1_optimization"] = True


def calc_cond_batch(model: Model, conds: Any, x: Tensor, timestep: Tensor, options: dict[str, Any]) -> list[Tensor]:
    of_model = options.get("transformer_options", {})
    call = wrapped(_calc_cond_batch, WrappersMP.CALC_COND_BATCH, of_model)
    found: list[Tensor] = call(model, conds, x, timestep, options)
    return found


def _calc_cond_batch(model: Model, conds: Any, x: Tensor, timestep: Tensor, options: dict[str, Any]) -> list[Tensor]:
    todo = [(i, one) for i, some in enumerate(conds) for one in some or ()][::-1]  # uncond first
    size = options.get("per_call", len(todo))
    sums, weights = [torch.zeros_like(x) for _ in conds], [1e-37 for _ in conds]
    for group in (todo[start : start + size] for start in range(0, len(todo), size)):
        of_model = dict(options.get("transformer_options", {}))
        of_model.update(cond_or_uncond=[i for i, _ in group], uuids=[one["uuid"] for _, one in group])
        text = torch.cat([one["text"].expand(len(x), -1, -1) for _, one in group])
        rows, times = torch.cat([x] * len(group)), torch.cat([timestep] * len(group))
        output = model.apply_model(rows, times, c_crossattn=text, transformer_options=of_model)
        for (i, one), part in zip(group, output.chunk(len(group)), strict=True):
            sums[i] += one["strength"] * part
            weights[i] += one["strength"]
    return [total / weight for total, weight in zip(sums, weights, strict=True)]


def prompt(seed: int, strength: float = 1.0) -> dict[str, Any]:
    text = torch.randn(1, *zoo.inputs()["text"].shape[1:], generator=torch.Generator().manual_seed(seed))
    return {"text": text, "uuid": uuid.uuid4(), "strength": strength}


class Guider:
    """A `CFGGuider` in one step of a sampler."""

    def __init__(self, patcher: Patcher, cfg: float, positive: Any, negative: Any, **options: Any) -> None:
        self.patcher, self.cfg, self.positive, self.negative = patcher, cfg, positive, negative
        self.options = options

    def __call__(self, x: Tensor, sigma: float, sigmas: Sequence[float] = (1.0, 0.5, 0.0)) -> Tensor:
        options = {**self.patcher.model_options, **self.options}
        options["transformer_options"] = {**options["transformer_options"], "sample_sigmas": torch.tensor(sigmas)}
        call = wrapped(self.predict_noise, WrappersMP.PREDICT_NOISE, options["transformer_options"], self)
        found: Tensor = call(x, torch.full((len(x),), sigma), options, 0)
        return found

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: dict[str, Any], seed: Any) -> Tensor:
        model, options = self.patcher.model, model_options
        uncond = None if self.cfg == 1 and not options.get("disable_cfg1_optimization") else self.negative
        c, u = calc_cond_batch(model, [self.positive, uncond], x, timestep, options)
        result = u + self.cfg * (c - u)
        for function in options.get("sampler_post_cfg_function", []):
            given = {"denoised": result, "cond": self.positive, "uncond": uncond, "cond_scale": self.cfg}
            given |= {"model": model, "uncond_denoised": u, "cond_denoised": c, "sigma": timestep, "input": x}
            result = function({**given, "model_options": options})
        return result


def attention_pytorch(q: Tensor, k: Tensor, v: Tensor, heads: int, **_: Any) -> Tensor:
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.fixture
def comfy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stand-ins in place of the modules of ComfyUI that the nodes import."""
    parts = {
        "comfy": {},
        "comfy.patcher_extension": {"WrappersMP": WrappersMP},
        "comfy.samplers": {"calc_cond_batch": calc_cond_batch},
        "comfy.ldm": {},
        "comfy.ldm.modules": {},
        "comfy.ldm.modules.attention": {"attention_pytorch": attention_pytorch},
    }
    for name, values in parts.items():
        module = types.ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
