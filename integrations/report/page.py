"""Put a page together: its template, style and script lie in the folder page/."""

from __future__ import annotations

import base64
import hashlib
import json
from html import escape
from importlib import resources
from string import Template
from typing import Any

from stg_hooks.integrations.report.files import Results

_SCRIPTS = ("core", "copy", "heat", "player", "sheet", "scatter", "table", "chosen")
_TYPES = {".webp": "image/webp", ".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".gif": "image/gif"}


def part(name: str) -> str:
    """Read a file of the page."""
    return (resources.files("stg_hooks.integrations.report") / "page" / name).read_text(encoding="utf-8")


def render(results: Results) -> str:
    """Write the page.

    Args:
        results: what it shows.

    Returns:
        HTML that loads nothing from anywhere. Its policy lets the browser run this script and no other, whatever a
        prompt says.
    """
    style = part("base.css") + part("report.css")
    script = '"use strict";\n' + "".join(part(f"{name}.js") for name in _SCRIPTS)
    data, strips = _data(results)
    return Template(part("page.html")).substitute(
        title=escape(_model(results)),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        # No text in it can close the element: the only sign that could is written as its code.
        data=json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c"),
        strips="\n".join(strips),
    )


def _model(results: Results) -> str:
    return str((results.sweep or results.profile or {})["model"])


def _data(results: Results) -> tuple[dict[str, Any], list[str]]:
    """Choose what the page needs.

    Returns:
        The data for its script, and one element per strip of frames, which stays plain text until it is looked at.
    """
    strips: list[str] = []
    cells = []
    for cell in results.cells:
        samples = []
        for sample in cell["samples"]:
            strip = results.folder / "cells" / cell["id"] / (sample.get("strip") or "")
            number = None
            if strip.is_file() and (kind := _TYPES.get(strip.suffix.lower())):
                number = len(strips)
                encoded = base64.b64encode(strip.read_bytes()).decode()
                strips.append(f'<script type="{kind}" id="strip-{number}">{encoded}</script>')
            samples.append(sample | {"strip": number})
        cells.append(cell | {"samples": samples})
    sweep = None
    if results.sweep is not None:
        sweep = {name: results.sweep[name] for name in ("prompts", "seeds", "fps")} | {"cells": cells}
    profile = None
    if results.profile is not None:
        profile = {name: results.profile[name] for name in ("layers", "rows")}
    return {"facts": _facts(results), "metrics": results.metrics, "profile": profile, "sweep": sweep}, strips


def _facts(results: Results) -> list[list[str]]:
    """List what holds for all cells."""
    sweep, source = results.sweep, results.sweep or results.profile or {}
    facts = {"Pipeline": source.get("pipeline"), "Guidance scale": source["guidance_scale"]}
    if sweep is not None:
        planned = 1 + len(sweep["layers"]) * len(sweep["modes"]) * len(sweep["scales"])
        done = sum(cell["status"] == "done" for cell in results.cells)
        failed = len(results.cells) - done
        facts["Cells"] = f"{done} of {planned} done" + (f", {failed} failed" if failed else "")
        facts["Samples per cell"] = len(sweep["prompts"]) * len(sweep["seeds"])
        facts |= {name.replace("_", " ").capitalize(): value for name, value in sweep["settings"].items()}
    else:
        facts["Prompts"] = len(source["prompts"])
    return [[name, _short(value)] for name, value in facts.items() if value is not None]


def _short(value: Any, limit: int = 60) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _hash(text: str) -> str:
    """Name a style or script as a content security policy does."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
