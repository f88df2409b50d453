"""Draw how the cost of a guided step depends on the number of tokens and on the place of the skipped layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

_STYLES = {
    "three": ("one row more (published pipelines)", "#b0632d", "s"),
    "full": ("full extra pass (guiders)", "#8a8a8a", "^"),
    "sequential": ("stg_hooks, sequential", "#1f5fa8", "o"),
    "batched": ("stg_hooks, batched", "#2a9d6f", "D"),
}


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw `results["curves"]` into a PNG file."""
    curves, machine = results["curves"], results["machine"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True, layout="constrained")
    _panel(left, curves["position"], "skipped")
    left.set_xlabel(f"skipped layer, of {curves['blocks']} (at {curves['position'][0]['tokens']} tokens)")
    left.set_ylabel("time of a step / time without skip guidance")
    left.axvline(curves["published"], color="#cccccc", zorder=0)
    left.text(
        curves["published"] - 0.6, 1.02, "published", rotation=90, ha="right", va="bottom", color="#888888", size=8
    )
    _panel(right, curves["tokens"], "tokens")
    right.set_xscale("log", base=2)
    right.set_xticks([point["tokens"] for point in curves["tokens"]])
    right.xaxis.set_major_formatter("{x:.0f}")
    right.minorticks_off()
    right.set_xlabel(f"tokens (layer {curves['published']} skipped)")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    threads = machine["threads"]
    where = machine.get("gpu") or f"{machine['cpu']}, {threads} thread{'s' if threads > 1 else ''}"
    figure.suptitle(f"Cost of a guided step: {curves['title']} ({where})", fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _panel(axes: Any, points: list[dict[str, Any]], x: str) -> None:
    xs = [point[x] for point in points]
    for name, (label, color, marker) in _STYLES.items():
        if any(name not in point["ratio"] for point in points):
            continue
        values = [point["ratio"][name] for point in points]
        spread = [[v["value"] - v["low"] for v in values], [v["high"] - v["value"] for v in values]]
        axes.errorbar(
            xs,
            [v["value"] for v in values],
            yerr=[[max(0.0, s) for s in side] for side in spread],
            label=label,
            color=color,
            marker=marker,
            markersize=4.5,
            linewidth=1.4,
            elinewidth=0.8,
            capsize=2,
        )
    axes.plot(xs, [point["bound"] for point in points], "k--", linewidth=1.2, label="bound (FLOPs)", zorder=5)
    axes.set_ylim(bottom=1.0)
    axes.grid(color="#eeeeee")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
