"""Draw a workflow of ComfyUI as an SVG: `python docs/draw_workflow.py WORKFLOW.json PICTURE.svg`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

TITLE, ROW, PAD = 26, 20, 10
# The page that shows the picture may be light where the system is dark, or the other way round: hence a background.
STYLE = """
    .page { fill: #ffffff }
    .node { fill: #eef1fb; stroke: #8b93ab }
    .ours { fill: #fdf0e4; stroke: #b45309; stroke-width: 2 }
    .field { fill: #ffffff; stroke: #c9cede }
    text { fill: #1f2430 }
    .title { font-weight: 600 }
    .dim { fill: #59606e }
    .link { fill: none; stroke-width: 2.5 }
    .MODEL { stroke: #6d5bd0 } .CLIP { stroke: #b08800 } .VAE { stroke: #d04f4f } .CONDITIONING { stroke: #d2791e }
    .LATENT { stroke: #c2489a } .IMAGE { stroke: #2f7fc1 } .STRING { stroke: #2c8a57 }
    .dot { fill: #59606e }
    @media (prefers-color-scheme: dark) {
      .page { fill: #14171f }
      .node { fill: #262b3a; stroke: #5b637c }
      .ours { fill: #3a2a1a; stroke: #f0a35e }
      .field { fill: #1b1f2b; stroke: #444b61 }
      text { fill: #e6e9f2 }
      .dim { fill: #aab1c2 }
      .dot { fill: #aab1c2 }
      .MODEL { stroke: #b39ddb } .CLIP { stroke: #ffd500 } .VAE { stroke: #ff6e6e } .CONDITIONING { stroke: #ffa931 }
      .LATENT { stroke: #ff9cf9 } .IMAGE { stroke: #64b5f6 } .STRING { stroke: #77ff77 }
    }
"""


def draw(workflow: Mapping[str, Any], names: Mapping[str, Sequence[str]], ours: str, title: str) -> str:
    """Return the picture of a workflow.

    Args:
        workflow: as ComfyUI saves it.
        names: of the fields of some kinds of nodes; of others only the values are shown.
        ours: how the kinds of nodes begin that stand out.
        title: what the picture shows.
    """
    nodes = {node["id"]: node for node in workflow["nodes"]}
    heights = {key: _height(node) for key, node in nodes.items()}
    right = max(node["pos"][0] + node["size"][0] for node in nodes.values()) + 20
    bottom = max(node["pos"][1] + heights[key] for key, node in nodes.items()) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right} {bottom}" role="img" aria-labelledby="title"',
        '     font-family="system-ui, sans-serif" font-size="13">',
        f'  <title id="title">{escape(title)}</title>',
        f"  <style>{STYLE}  </style>",
        '  <rect class="page" width="100%" height="100%" rx="8" />',
    ]
    for _, source, slot, target, place, kind in workflow["links"]:
        (x1, y1), (x2, y2) = _slot(nodes[source], slot, "outputs"), _slot(nodes[target], place, "inputs")
        bend = max(40, abs(x2 - x1) // 2)
        path = f"M{x1} {y1} C{x1 + bend} {y1} {x2 - bend} {y2} {x2} {y2}"
        parts.append(f'  <path class="link {escape(kind)}" d="{path}" />')
    for key, node in nodes.items():
        parts += _node(node, heights[key], names.get(node["type"], ()), node["type"].startswith(ours))
    return "\n".join([*parts, "</svg>", ""])


def _slots(node: Mapping[str, Any]) -> int:
    return max(len(node["inputs"]), len(node["outputs"]))


def _height(node: Mapping[str, Any]) -> int:
    return TITLE + ROW * (_slots(node) + len(node["widgets_values"])) + PAD


def _slot(node: Mapping[str, Any], place: int, side: str) -> tuple[int, int]:
    x, y = node["pos"]
    return x + (node["size"][0] if side == "outputs" else 0), y + TITLE + ROW * place + ROW // 2


def _node(node: Mapping[str, Any], height: int, names: Sequence[str], is_ours: bool) -> list[str]:
    (x, y), width = node["pos"], node["size"][0]
    found = [
        f'  <rect class="{"ours" if is_ours else "node"}" x="{x}" y="{y}" width="{width}" height="{height}" rx="8" />',
        f'  <text class="title" x="{x + PAD}" y="{y + 18}">{escape(node.get("title", node["type"]))}</text>',
    ]
    for side, anchor, shift in (("inputs", "start", PAD), ("outputs", "end", -PAD)):
        for place, slot in enumerate(node[side]):
            at, line = _slot(node, place, side)
            found.append(f'  <circle class="dot" cx="{at}" cy="{line}" r="4" />')
            text = escape(slot["name"])
            found.append(f'  <text class="dim" x="{at + shift}" y="{line + 4}" text-anchor="{anchor}">{text}</text>')
    top = y + TITLE + ROW * _slots(node)
    for place, value in enumerate(node["widgets_values"]):
        line = top + ROW * place
        found.append(
            f'  <rect class="field" x="{x + PAD}" y="{line}" width="{width - 2 * PAD}" height="{ROW - 3}" rx="5" />'
        )
        name = names[place] if place < len(names) else ""
        room = (width - 30) // 7 - len(name)
        text = value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)
        shown = text if len(text) <= room else f"{text[: room - 1]}…"
        if name:
            found.append(f'  <text class="dim" x="{x + PAD + 6}" y="{line + 13}" font-size="12">{escape(name)}</text>')
        place_of = f'x="{x + width - PAD - 6}" y="{line + 13}" text-anchor="end"'
        found.append(f'  <text {place_of} font-size="12">{escape(shown)}</text>')
    return found


def main(source: str, target: str) -> None:
    """Draw the example workflow."""
    from stg_hooks.integrations.comfyui.nodes import NODES

    names = {node.__name__: [name for group in node.INPUT_TYPES().values() for name in group][1:] for node in NODES}
    names |= {
        "KSampler": ["seed", "control_after_generate", "steps", "cfg", "sampler_name", "scheduler", "denoise"],
        "EmptyLTXVLatentVideo": ["width", "height", "length", "batch_size"],
        "LTXVConditioning": ["frame_rate"],
        "CLIPLoader": ["clip_name", "type", "device"],
        "CheckpointLoaderSimple": ["ckpt_name"],
        "SaveAnimatedWEBP": ["filename_prefix", "fps", "lossless", "quality", "method"],
    }
    workflow = json.loads(Path(source).read_text(encoding="utf-8"))
    title = "The example workflow: STG Guidance between the checkpoint and the sampler"
    Path(target).write_text(draw(workflow, names, "STG", title), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
