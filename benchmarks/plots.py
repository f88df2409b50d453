"""Draw what a guided step costs: the contestants of each model against the bound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

_STYLES = {
    "sequential": ("stg_hooks", "#1f5fa8", "o"),
    "modular": ("stg_hooks", "#1f5fa8", "o"),
    "three": ("published STG pipelines: a row more", "#b0632d", "s"),
    "full": ("full extra pass", "#8a8a8a", "^"),
    "own": ("LTX2Pipeline's own STG", "#7a4fa3", "D"),
    "slg": ("SkipLayerGuidance of diffusers", "#2a8f7f", "v"),
}


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw the time of a guided step of each model, relative to a step without skip guidance, into a PNG file."""
    models = results["models"]
    figure, axes = plt.subplots(figsize=(8.6, 1.5 + 0.5 * len(models)), layout="constrained")
    seen = set()
    for y, result in enumerate(models):
        bound = result["bound"]["flops"]
        axes.plot([bound, bound], [y - 0.34, y + 0.34], color="black", linewidth=2.2, zorder=4)
        chosen = [name for name in _STYLES if "time_ratio" in result["contestants"].get(name, {})]
        for i, name in enumerate(chosen):
            label, color, marker = _STYLES[name]
            ratio = result["contestants"][name]["time_ratio"]
            at = y + 0.15 * (i - (len(chosen) - 1) / 2)
            sides = [[max(0.0, ratio["value"] - ratio["low"])], [max(0.0, ratio["high"] - ratio["value"])]]
            axes.errorbar(
                [ratio["value"]],
                [at],
                xerr=sides,
                color=color,
                marker=marker,
                markersize=6,
                linewidth=0,
                elinewidth=1.3,
                capsize=2.5,
                label=None if label in seen else label,
                zorder=5,
            )
            seen.add(label)
    axes.plot([], [], color="black", linewidth=2.2, label="bound: operations behind the skipped layer")
    axes.axvline(1.0, color="#bbbbbb", linewidth=1)
    axes.set_yticks(range(len(models)), [f"{r['title']}\nlayer {r['skipped']} of {r['layers']}" for r in models])
    axes.tick_params(axis="y", length=0, labelsize=9)
    axes.invert_yaxis()
    axes.set_xlim(left=0.97)
    axes.set_xlabel("time of a guided step / a step without skip guidance (bars: 95 %)")
    axes.grid(axis="x", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, dpi=140, facecolor="white")
    plt.close(figure)
