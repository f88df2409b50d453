"""The nodes: what users see, and how their fields become a request."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

from torch import nn

import stg_hooks as stg
from stg_hooks.errors import SettingError
from stg_hooks.guidance.published import preset_for, published_names, recommended
from stg_hooks.guidance.request import Request
from stg_hooks.guidance.rules import RULES
from stg_hooks.integrations.comfyui.fields import layers_from, limits_from, schedule_from, with_modes
from stg_hooks.integrations.comfyui.guidance import SkipGuidance
from stg_hooks.modes.modes import MODES, find_mode
from stg_hooks.passes.ways import EXECUTIONS

CATEGORY = "advanced/guidance"
AUTO = "as published"
NONE = "none"

Inputs = dict[str, dict[str, tuple[Any, dict[str, Any]]]]


def _text(default: str, tip: str) -> tuple[str, dict[str, Any]]:
    return "STRING", {"default": default, "tooltip": tip}


def _number(default: float, low: float, high: float, step: float, tip: str) -> tuple[str, dict[str, Any]]:
    return "FLOAT", {"default": default, "min": low, "max": high, "step": step, "round": False, "tooltip": tip}


def _choice(options: list[str], tip: str) -> tuple[list[str], dict[str, Any]]:
    return options, {"default": options[0], "tooltip": tip}


_MODEL = ("MODEL", {"tooltip": "The model to guide. It is not changed: what comes out is a clone."})
_GUIDANCE: dict[str, tuple[Any, dict[str, Any]]] = {
    "model": _MODEL,
    "layers": _text(
        "",
        "Which layers the weak model skips: numbers (14, 19), ranges (8-11), from the end (-2), names "
        "(single_blocks.3). 14:values gives a layer its own mode. Empty: as published for this model. The node STG "
        "Layers lists what there is.",
    ),
    "mode": _choice(
        [AUTO, *MODES],
        "What a skipped layer does instead. residual: hands its input through (STG-R). values: every token attends to "
        "itself (PAG, and the STG of ComfyUI-LTXVideo). attention: likewise, text is still attended to (STG-A). "
        "smoothed: SEG. shuffled: TPG. isolated: video and audio do not see each other; all layers, if none are "
        "named. 'as published' is residual where layers are named.",
    ),
    "scale": _number(1.0, 0.0, 100.0, 0.05, "How strongly (cond - weak) counts. 0 is off, 0.5 to 2 is usual."),
    "rescale": _number(
        0.0, 0.0, 1.0, 0.05, "Pulls the standard deviation of each result back to that of cond; 0.7 tames large scales."
    ),
    "start_percent": _number(0.0, 0.0, 1.0, 0.001, "Where guidance begins, as in ComfyUI's own nodes."),
    "end_percent": _number(1.0, 0.0, 1.0, 0.001, "Where guidance ends; without guidance, a step costs nothing extra."),
}
_ADVANCED: dict[str, tuple[Any, dict[str, Any]]] = {
    "preset": _choice(
        [NONE, *published_names()],
        "A published setting for this model, whole: layers, mode, scale, rescale, rule and what changes by noise "
        "level. It takes the place of those fields; leave layers empty. The text that comes out names its source.",
    ),
    "rule": _choice(list(RULES), "How predictions become one before rescale: CFG, CFG-Zero*, APG, ..."),
    "on": _choice(
        ["cond", "uncond"],
        "cond: adds scale * (cond - weak). uncond: the weak model makes the uncond prediction, without an extra pass "
        "(SLG of KJNodes and core's Simple node); scale then has no meaning.",
    ),
    "sigma_min": _number(-1.0, -1.0, 1e4, 0.001, "Lowest noise level with guidance; -1: no limit."),
    "sigma_max": _number(-1.0, -1.0, 1e4, 0.001, "Highest noise level with guidance; -1: no limit."),
    "sigmas": _text("", "Noise levels of the lists below, as in STG Guider Advanced: 1.0, 0.9933, 0.985. Empty: none."),
    "scale_by_sigma": _text("", "One scale per noise level. Empty: the scale above."),
    "cfg_by_sigma": _text("", "One CFG weight per noise level. Empty: that of the sampler."),
    "rescale_by_sigma": _text("", "One rescale per noise level. Empty: the rescale above."),
    "layers_by_sigma": _text("", "One list of layers per noise level: [29], [29], [11, 25]. Empty: the layers above."),
    "zero_above_sigma": _number(
        -1.0, -1.0, 1e4, 0.001, "Above this noise level the model is not called and predicts 0, as with LTXVideo's "
        "skip_steps_sigma_threshold (0.998 there); -1: off."
    ),
    "execution": _choice(
        list(EXECUTIONS), "How weak predictions are computed. auto shares what comes before the first skipped layer."
    ),
    "mode_values": _text("", "Values of the mode, by their names: sigma=10 for smoothed, p=0.3 for dropout."),
}  # fmt: skip


class STGGuidance:
    """Adds scale * (cond - weak) to every step, where the weak model skips some layers of the model."""

    DESCRIPTION = (
        "Skip guidance (STG, SLG, PAG, SEG) for any model, sampler and guider. The weak pass starts at the first "
        "skipped layer; what comes before it is computed once."
    )
    CATEGORY, FUNCTION = CATEGORY, "guide"
    RETURN_TYPES: ClassVar = ("MODEL", "STRING")
    RETURN_NAMES: ClassVar = ("model", "info")
    DISPLAY_NAME = "STG Guidance"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802 - ComfyUI's name
        """Describe the fields."""
        return {"required": dict(_GUIDANCE)}

    def guide(
        self,
        model: Any,
        layers: str = "",
        mode: str = AUTO,
        scale: float = 1.0,
        rescale: float = 0.0,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        preset: str = NONE,
        rule: str = "cfg",
        on: str = "cond",
        sigma_min: float = -1.0,
        sigma_max: float = -1.0,
        sigmas: str = "",
        scale_by_sigma: str = "",
        cfg_by_sigma: str = "",
        rescale_by_sigma: str = "",
        layers_by_sigma: str = "",
        zero_above_sigma: float = -1.0,
        execution: str = "auto",
        mode_values: str = "",
    ) -> tuple[Any, str]:
        """Return a guided clone of a model, and what holds in it as text.

        Raises:
            StgError: a field that cannot be read, or layers that the model does not have.
        """
        module = model.get_model_object("diffusion_model")
        if mode_values.strip():
            mode = f"{mode}({mode_values.strip()})"
        request, source = request_from(module, layers, mode, scale, rescale, rule, on, preset)
        lists = schedule_from(
            sigmas, scale=scale_by_sigma, guidance_scale=cfg_by_sigma, rescale=rescale_by_sigma, layers=layers_by_sigma
        )
        limits = limits_from(sigma_min, sigma_max)
        request = dataclasses.replace(request, sigma_range=limits, schedule=lists and lists[0])
        guidance = SkipGuidance(
            module,
            request,
            (start_percent, end_percent),
            lists[1] if lists else (),
            zero_above_sigma if zero_above_sigma >= 0 else math.inf,
            execution,
        )
        return guidance.patch(model), describe(module, guidance, source)


class STGGuidanceAdvanced(STGGuidance):
    """`STG Guidance` with presets, rules, noise levels and lists by noise level."""

    DISPLAY_NAME = "STG Guidance (Advanced)"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        """Describe the fields."""
        return {"required": dict(_GUIDANCE), "optional": dict(_ADVANCED)}


class STGLayers:
    """Lists the layers of a model as text, and what is published for it."""

    DESCRIPTION = "What can be typed into layers: the model's own names and numbers. Connect it to Preview as Text."
    CATEGORY, FUNCTION = CATEGORY, "show"
    RETURN_TYPES: ClassVar = ("STRING",)
    RETURN_NAMES: ClassVar = ("layers",)
    OUTPUT_NODE = True
    DISPLAY_NAME = "STG Layers"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        """Describe the fields."""
        return {"required": {"model": _MODEL}}

    def show(self, model: Any) -> dict[str, Any]:
        """Return the table of `stg.layers`."""
        text = str(stg.layers(model.get_model_object("diffusion_model")))
        return {"ui": {"text": [text]}, "result": (text,)}


def request_from(
    module: nn.Module, layers: str, mode: str, scale: float, rescale: float, rule: str, on: str, preset: str
) -> tuple[Request, str]:
    """Turn the fields of a node into a request, and say where its layers come from.

    Raises:
        SettingError: nothing is published for the model, or a preset that is not for it; or layers beside a preset.
    """
    chosen = layers_from(layers)
    if preset != NONE:
        if chosen:
            raise SettingError(f"layers={layers!r} and preset={preset!r}: leave layers empty, or choose preset 'none'.")
        published = preset_for(module, preset)
        return Request(preset=preset, on=on), f"{published.source}. {published.note}".strip()
    own = None if mode == AUTO else mode
    source = "layers as named"
    is_of_model = own is not None and find_mode(own).is_of_model
    if not chosen and is_of_model:
        source = "all layers, as none are named"
    elif not chosen:
        published = recommended(module)
        chosen, own = list(published.layers), own or published.mode
        source = f"layers as published for {published.name}: {published.source}"
    listed = with_modes(chosen, own)
    return Request(
        layers=listed or None,
        mode=None if isinstance(listed, dict) else own,
        scale=scale if on == "cond" else None,
        rescale=rescale,
        rule=rule,
        on=on,
    ), source


def describe(module: nn.Module, guidance: SkipGuidance, source: str) -> str:
    """Say in words what a node does to a model."""
    settings = guidance.settings
    lines = [
        f"{type(module).__name__}: {len([layer for layer in stg.layers(module) if layer.index is not None])} layers"
    ]
    for branch in settings.branches:
        found = stg.check(module, branch.layers, branch.mode, kind=branch.kind)
        names = ", ".join(layer.name for layer in found)
        lines.append(f"skipped: {names} (mode {branch.mode}, scale {branch.scale})")
    lines.append(f"rescale {settings.rescale}, rule {settings.rule}")
    return "\n".join([*lines, source])


NODES = (STGGuidance, STGGuidanceAdvanced, STGLayers)
NODE_CLASS_MAPPINGS = {node.__name__: node for node in NODES}
NODE_DISPLAY_NAME_MAPPINGS = {node.__name__: node.DISPLAY_NAME for node in NODES}
