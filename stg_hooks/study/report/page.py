"""Put a page together: its template, style and script lie in the folder page/."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Container
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from stg_hooks.study.report.tables import metrics_of
from stg_hooks.study.results import CELLS, Cell, Profile, Sample, Sweep, grid

_SCRIPTS = ("core", "copy", "hint", "heat", "player", "sheet", "scatter", "table", "chosen")
_TYPES = {".webp": "image/webp", ".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".gif": "image/gif"}


def part(name: str) -> str:
    """Read a file of the page."""
    return (resources.files("stg_hooks.study.report") / "page" / name).read_text(encoding="utf-8")


def render(profile: Profile | None, sweep: Sweep | None, room: float) -> str:
    """Write the page.

    Args:
        profile: what `profile` measured, if it has run.
        sweep: what `sweep` has made, if it has run.
        room: bytes that samples may take.

    Returns:
        HTML that loads nothing from anywhere. Its policy lets the browser run this script and no other, whatever a
        prompt says.
    """
    style = part("base.css") + part("report.css")
    script = '"use strict";\n' + "".join(part(f"{name}.js") for name in _SCRIPTS)
    strips: list[str] = []
    data: dict[str, Any] = {"metrics": [], "own": [], "profile": None, "sweep": None}
    facts: dict[str, Any] = {}
    model = ""
    if profile is not None:
        data["profile"] = {
            "layers": profile.layers,
            "noise_kind": profile.noise_kind,
            "rows": [dataclasses.asdict(row) for row in profile.rows],
        }
        model = profile.model
        facts = {"Guidance scale": profile.guidance_scale, "Prompts": len(profile.prompts)}
    if sweep is not None:
        settings = sweep.settings
        model = str(settings["model"])
        data["metrics"] = metrics_of(sweep)
        data["own"] = settings.get("metrics", [])
        shown = _shown(sweep, room)
        data["sweep"] = {name: settings[name] for name in ("prompts", "seeds", "fps")} | {
            "cells": [_cell(sweep, cell, strips, shown) for cell in sweep.cells]
        }
        facts = _facts(sweep, len(shown))
    data["facts"] = [[name, _short(value)] for name, value in facts.items() if value is not None]
    return Template(part("page.html")).substitute(
        title=escape(model),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        # No text in it can close the element: the only sign that could is written as its code.
        data=json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c"),
        strips="\n".join(strips),
    )


def _shown(sweep: Sweep, room: float) -> set[tuple[int, int]]:
    """Choose the prompts and seeds, by their positions, whose samples find room on the page."""
    prompts, seeds = (range(len(sweep.settings[name])) for name in ("prompts", "seeds"))
    sizes = {(prompt, seed): 0 for prompt in prompts for seed in seeds}
    for cell in sweep.cells:
        for sample in cell.samples:
            path = _strip(sweep, cell, sample)
            sizes[sample.prompt, sample.seed] += 4 * path.stat().st_size // 3 if path.is_file() else 0
    used = list(itertools.accumulate(sizes.values()))
    return {pair for i, pair in enumerate(sizes) if i == 0 or used[i] <= room}


def _strip(sweep: Sweep, cell: Cell, sample: Sample) -> Path:
    return sweep.folder / CELLS / cell.id / sample.strip


def _cell(sweep: Sweep, cell: Cell, strips: list[str], shown: Container[tuple[int, int]]) -> dict[str, Any]:
    """Describe a cell to the page's script, and add its strips of frames as elements that stay text until looked at."""
    samples = []
    for sample in cell.samples:
        if (sample.prompt, sample.seed) not in shown:
            continue
        path = _strip(sweep, cell, sample)
        number = None
        if path.is_file() and (kind := _TYPES.get(path.suffix.lower())):
            number = len(strips)
            encoded = base64.b64encode(path.read_bytes()).decode()
            strips.append(f'<script type="{kind}" id="strip-{number}">{encoded}</script>')
        samples.append(dataclasses.asdict(sample) | {"strip": number})
    return dataclasses.asdict(cell) | {"samples": samples}


def _facts(sweep: Sweep, shown: int) -> dict[str, Any]:
    """List what holds for all cells."""
    settings = sweep.settings
    failed, samples = len(sweep.failed), len(settings["prompts"]) * len(settings["seeds"])
    done = f"{len(sweep.cells) - failed} of {len(grid(settings))} done"
    more = {name.replace("_", " ").capitalize(): value for name, value in settings["settings"].items()}
    return {
        "Pipeline": settings["pipeline"],
        "Guidance scale": settings["guidance_scale"],
        "Cells": f"{done}, {failed} failed" if failed else done,
        "Samples per cell": samples if shown == samples else f"{samples}, the first {shown} shown",
    } | more


def _short(value: Any, limit: int = 60) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _hash(text: str) -> str:
    """Name a style or script as a content security policy does."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
