"""Write docs/recipes.md: the published setting of every model, with the code that uses it.

python -m tests.recipes
"""

from __future__ import annotations

from pathlib import Path

from stg_hooks.adapters import PUBLISHED
from stg_hooks.guidance.published import Published

FILE = Path(__file__).resolve().parents[1] / "docs" / "recipes.md"

PIPELINES = {
    "MochiTransformer3DModel": "MochiPipeline",
    "LTXVideoTransformer3DModel": "LTXPipeline",
    "CogVideoXTransformer3DModel": "CogVideoXPipeline",
    "HunyuanVideoTransformer3DModel": "HunyuanVideoPipeline",
    "WanTransformer3DModel": "WanPipeline",
    "UNetSpatioTemporalConditionModel": "StableVideoDiffusionPipeline",
    "LTX2VideoTransformer3DModel": "LTX2Pipeline",
    "SD3Transformer2DModel": "StableDiffusion3Pipeline",
}
CHECKPOINTS = {
    "Mochi 1": "genmo/mochi-1-preview",
    "LTX-Video 2B (0.9 to 0.9.6-dev)": "Lightricks/LTX-Video",
    "LTX-Video 2B (0.9 to 0.9.6-dev), Lightricks": "Lightricks/LTX-Video",
    "CogVideoX-2B": "THUDM/CogVideoX-2b",
    "CogVideoX-5B": "THUDM/CogVideoX-5b",
    "HunyuanVideo": "hunyuanvideo-community/HunyuanVideo",
    "Wan 2.1 1.3B": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "Wan 2.1 14B": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    "Stable Video Diffusion": "stabilityai/stable-video-diffusion-img2vid-xt",
    "LTX-2": "Lightricks/LTX-2",
    "Stable Diffusion 3.5 medium": "stabilityai/stable-diffusion-3.5-medium",
}
"""Names on the hub; for the rest the reader's own folder."""
FROM_IMAGES = ("UNetSpatioTemporalConditionModel",)
OF_IMAGES = ("SD3Transformer2DModel",)
LTX_2 = "LTX2VideoTransformer3DModel"
LTX_2_NOTE = """\
LTX2Pipeline has this guidance built in and switched on by default; the code switches it off, so that it is not applied
twice. The pipeline's own rescale (`guidance_rescale`, 0.7 by default) then measures against the guided cond prediction.
"""
LTX_2_WHOLE = """\
with stg.apply(
    pipe,
    branches=[
        stg.Branch({layers}, {{"video": 1.0, "audio": 1.0}}, "values"),
        stg.Branch(scale={{"video": 2.0, "audio": 2.0}}, mode="isolated"),
    ],
    rescale={{"video": 0.7, "audio": 0.7}},
):
    video, audio = pipe(
        **inputs,
        guidance_scale=3.0,
        audio_guidance_scale=7.0,
        num_inference_steps={steps},
        stg_scale=0.0,
        audio_stg_scale=0.0,
        modality_scale=1.0,
        audio_modality_scale=1.0,
        return_dict=False,
    )
"""

INTRODUCTION = """\
# Recipes per model

What has been published, with its source. `stg.apply(pipe)` alone takes the first setting that fits the model; the code
below spells it out, so that it can be changed. A size, a number of frames and offloading are up to you.

Layers count from 0 in the order in which blocks run; `stg.layers(pipe)` lists them. The settings are their authors':
nothing here was tuned by us, and no setting is a promise for your prompts.

Written by `python -m tests.recipes` from `adapters/published.py`.
"""


def page() -> str:
    """Return the whole page."""
    return "\n".join([INTRODUCTION, *map(_section, PUBLISHED)])


def code(setting: Published) -> str:
    """Return the code of one recipe."""
    more = "from diffusers.utils import load_image\n" if setting.model in FROM_IMAGES else ""
    pipeline, still = PIPELINES[setting.model], setting.model in OF_IMAGES
    weights = CHECKPOINTS.get(setting.name, f"path/to/{setting.name.replace(' ', '-')}")
    return f"""\
import torch
from diffusers import {pipeline}
{more}
import stg_hooks as stg

name = "{weights}"
pipe = {pipeline}.from_pretrained(name, torch_dtype=torch.bfloat16)

with stg.apply(pipe, {_arguments(setting)}):
    {"image" if still else "video"} = pipe({_lines(_call(setting))}).{"images" if still else "frames"}[0]
"""


def inputs(setting: Published) -> str:
    """Return what a recipe calls its pipeline with, besides guidance and steps."""
    return 'load_image("first_frame.png")' if setting.model in FROM_IMAGES else '"a fox in the snow"'


def _lines(arguments: list[str]) -> str:
    """Write the arguments of a call, in one line or in one each."""
    line = ", ".join(arguments)
    return line if len(line) < 80 else "".join(f"\n        {argument}," for argument in arguments) + "\n    "


def _section(setting: Published) -> str:
    where = ", ".join(f"`{key}={value!r}`" for key, value in setting.where.items())
    rows = [
        ("model", f"`{setting.model}` with {where}"),
        ("skipped", "; ".join(_branch(branch) for branch in setting.branches)),
        ("rescale", f"{setting.rescale:g}" if setting.rescale else "off"),
        ("CFG", f"{setting.guidance_scale:g}" if setting.guidance_scale is not None else "see below"),
        ("steps", setting.steps or "not given"),
        ("source", setting.source),
    ]
    if (setting.start, setting.stop) != (0.0, 1.0):
        rows.insert(2, ("part of the run", f"from {setting.start:g} to {setting.stop:g}"))
    if setting.schedule:
        rows[1:4] = [("skipped, rescale, CFG", "change with the noise level, see the second table")]
    if setting.rule != "cfg":
        rows.insert(-2, ("rule", f"`{setting.rule}`"))
    cells = [f"| {name} | {value} |" for name, value in rows]
    lines = [f"## {setting.name}", "", cells[0], "| --- | --- |", *cells[1:], ""]
    if setting.note:
        lines += [setting.note, ""]
    if setting.model == LTX_2:
        lines.append(LTX_2_NOTE)
    if setting.schedule:
        lines += _levels(setting)
    lines.append(f"```python\n{code(setting)}```\n")
    if setting.model == LTX_2:
        lines += [
            "All that the source does, with weights for video and audio:",
            "",
            f"```python\n{whole(setting)}```",
            "",
        ]
    return "\n".join(lines)


def whole(setting: Published) -> str:
    """Return the code for all guidance of LTX-2, of which a published setting has the skipped layers."""
    return LTX_2_WHOLE.format(layers=list(setting.layers), steps=setting.steps)


def _branch(branch: object) -> str:
    layers, mode, scale, kind = (getattr(branch, name) for name in ("layers", "mode", "scale", "kind"))
    return f"layers {layers}, {f'{kind} ' if kind else ''}`{mode}`, scale {scale:g}"


def _levels(setting: Published) -> list[str]:
    lines = ["| from noise level | layers | scale | CFG | rescale |", "| --- | --- | --- | --- | --- |"]
    for level, values in setting.schedule:
        row = {"scale": setting.scale, "rescale": setting.rescale, "guidance_scale": 1.0, **(values or {})}
        on = row.get("layers") and row["scale"]
        cells = [level, row["layers"] if on else "none", row["scale"] if on else "-", row["guidance_scale"]]
        lines.append(f"| {' | '.join(map(str, [*cells, row['rescale'] or 'off']))} |")
    return [*lines, ""]


def _arguments(setting: Published) -> str:
    if setting.also or setting.schedule or setting.start:  # whose numbers are no round ones
        return f'preset="{setting.name}"'
    more = "" if setting.mode == "residual" else f', mode="{setting.mode}"'
    more += f", rescale={setting.rescale:g}" if setting.rescale else ""
    more += f", stop={setting.stop:g}" if setting.stop != 1 else ""
    return f"layers={list(setting.layers)}, scale={setting.scale}{more}"


def _call(setting: Published) -> list[str]:
    name = "max_guidance_scale" if setting.model == "UNetSpatioTemporalConditionModel" else "guidance_scale"
    # A schedule sets CFG itself, and needs a pipeline that makes both predictions.
    scale = 3.0 if setting.schedule else setting.guidance_scale
    arguments = [inputs(setting)]
    arguments += [f"{name}={scale}"] if scale is not None else []
    arguments += [f"num_inference_steps={setting.steps.split('-')[-1]}"] if setting.steps else []
    if setting.model == LTX_2:  # its pipeline guides by itself unless told not to
        arguments += ["stg_scale=0.0", "audio_stg_scale=0.0"]
    return arguments


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
