"""Write what `choosing.py` found: a page of tables and two figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

OUTCOMES = {
    "all": ("change of all three words right, points", 100.0),
    "frechet_distance": ("change of the Fréchet distance", 1.0),
}
"""Column titles, and by what values are multiplied."""
COLOURS = {"residual": "#1f5fa8", "attention": "#b0632d", "feed-forward": "#2a9d6f"}
MARKERS = {"residual": "o", "attention": "s", "feed-forward": "D"}


def document(results: dict[str, Any]) -> str:
    """Write the results in Markdown."""
    correlations = results["correlations"]
    count = len(correlations[0]["measures"])
    sampled = sum(measure["sampled"] for measure in correlations[0]["measures"].values())
    parts = [
        f"""# Which cheap measure finds the good layers?

Made by `python -m benchmarks.demo_model.choosing`; do not edit. The demo's model, CFG {results["guidance_scale"]:g},
{results["steps"]} steps, {results["clips"]} clips a cell, the same noise and conditions in every cell. Intervals are
95 %. Changes are against the plain pipeline. {_level("It has", results["plain"])};
{_level("as many real clips:", results["real"])}.

{count} measures are tried: {count - sampled} of `stg.profile` ("early", "middle" and "late" are thirds of the steps),
and {sampled} of what `stg.sweep` measures on samples, as changes against the plain pipeline (`difference`: the distance
from it). ρ is Spearman's rank correlation over pairs of layer and mode. Its interval resamples pairs and clips. "Given
depth" is the partial rank correlation with the layer's number held fixed. p is how often the *largest* |ρ| of all
{count} measures is at least as large when the outcomes are dealt to other layers, in every possible way, the same in
all modes: it takes into account that {count} were tried.""",
    ]
    for scale in dict.fromkeys(row["scale"] for row in results["cells"]):
        rows = [row for row in results["cells"] if row["scale"] == scale]
        modes = list(dict.fromkeys(row["mode"] for row in rows))
        parts += [f"## Scale {scale:g}", *(_grid(rows, modes, outcome) for outcome in OUTCOMES)]
        found = {(tuple(c["modes"]), c["outcome"]): c for c in correlations if c["scale"] == scale}
        overall = {outcome: found[tuple(modes), outcome] for outcome in OUTCOMES}
        chance = [
            f"{c['largest_by_chance']['median']:.2f} (95 %: {c['largest_by_chance']['95 %']:.2f})"
            for c in overall.values()
        ]
        text = f"""Rank correlations over {overall["all"]["pairs"]} pairs. By chance, the largest |ρ| of all measures is
{chance[0]} for words right and {chance[1]} for the Fréchet distance."""
        parts += [text, _correlations(overall)]
        if len(modes) > 1:
            parts += ["ρ within one mode, over its layers (words right / Fréchet distance):", _by_mode(found, modes)]
    parts += ["## Does it repeat?", _again(results)]
    return "\n\n".join(parts) + "\n"


def _level(who: str, found: dict[str, Any]) -> str:
    right, distance = 100 * found["all"][0], found["frechet_distance"]
    return f"{who} {right:.1f} % of clips with all three words right and a Fréchet distance of {distance:.2f}"


def _grid(rows: list[dict[str, Any]], modes: list[str], outcome: str) -> str:
    title, factor = OUTCOMES[outcome]
    lines = [f"| layer: {title} | {' | '.join(modes)} |", "| --- |" + " --- |" * len(modes)]
    digits = 1 if factor == 100 else 2
    for layer in dict.fromkeys(row["layer"] for row in rows):
        values = [next(row[outcome] for row in rows if (row["mode"], row["layer"]) == (mode, layer)) for mode in modes]
        cells = ["{:+.{d}f} ({:+.{d}f} … {:+.{d}f})".format(*(factor * v for v in value), d=digits) for value in values]
        lines.append(f"| {layer} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _correlations(overall: dict[str, Any]) -> str:
    lines = [
        "| measure | words right: ρ | given depth | p | Fréchet distance: ρ | given depth | p |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    names = sorted(
        overall["all"]["measures"],
        key=lambda name: (overall["all"]["measures"][name]["sampled"], -_strongest(overall, name)),
    )
    for name in names:
        cells = [f"{name}{' (samples)' if overall['all']['measures'][name]['sampled'] else ''}"]
        for found in overall.values():
            m = found["measures"][name]
            cells += [
                f"{m['rho']:+.2f} ({m['low']:+.2f} … {m['high']:+.2f})",
                f"{m['given_depth']:+.2f}",
                f"{m['p']:.2f}",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _strongest(overall: dict[str, Any], name: str) -> float:
    return max(abs(found["measures"][name]["rho"]) for found in overall.values())


def _by_mode(found: dict[Any, Any], modes: list[str]) -> str:
    lines = [f"| measure | {' | '.join(modes)} |", "| --- |" + " --- |" * len(modes)]
    for name in found[tuple(modes), "all"]["measures"]:
        cells = [
            " / ".join(f"{found[(mode,), outcome]['measures'][name]['rho']:+.2f}" for outcome in OUTCOMES)
            for mode in modes
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    chance = [" / ".join(f"{found[(mode,), o]['largest_by_chance']['95 %']:.2f}" for o in OUTCOMES) for mode in modes]
    lines.append(f"| largest by chance, 95 % | {' | '.join(chance)} |")
    return "\n".join(lines)


def _again(results: dict[str, Any]) -> str:
    lines = ["ρ of the profile with a second one, from other noise:", ""]
    lines += ["| measure | ρ |", "| --- | --- |"]
    lines += [f"| {name} | {rho:+.2f} |" for name, rho in results["profile_again"].items()]
    again = results["outcome_again"]
    if again:
        lines += ["", "ρ with the outcomes of the demo's own sweep, from other noise and conditions, first that of the"]
        lines += ["outcomes above, then that of the profile (words right / Fréchet distance):", ""]
        lines += [f"| | {' | '.join('{mode}, scale {scale:g}'.format(**row) for row in again)} |"]
        lines += ["| --- |" + " --- |" * len(again)]
        lines += [
            f"| {name} | {' | '.join('{:+.2f} / {:+.2f}'.format(*row['rho'][name]) for row in again)} |"
            for name in sorted(again[0]["rho"], key=lambda name: name != "outcome")
        ]
    return "\n".join(lines)


def draw(results: dict[str, Any], folder: Path) -> None:
    """Draw the outcome of every cell, and what predicts it best, as PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    _outcomes(results, folder / "choosing-outcomes.png")
    _predictors(results, folder / "choosing-predictors.png")


def _outcomes(results: dict[str, Any], path: Path) -> None:
    scales = list(dict.fromkeys(row["scale"] for row in results["cells"]))
    height = 1.2 + 1.9 * len(scales)
    figure, panels = plt.subplots(len(scales), 2, figsize=(11, height), layout="constrained", squeeze=False)
    for column, (outcome, (title, factor)) in enumerate(OUTCOMES.items()):
        limit = max(abs(factor * row[outcome][0]) for row in results["cells"]) or 1
        for axes, scale in zip(panels[:, column], scales, strict=True):
            rows = [row for row in results["cells"] if row["scale"] == scale]
            modes, layers = (list(dict.fromkeys(row[key] for row in rows)) for key in ("mode", "layer"))
            values = [
                [next(r for r in rows if (r["mode"], r["layer"]) == (m, k))[outcome] for k in layers] for m in modes
            ]
            colours = "RdBu" if factor == 100 else "RdBu_r"  # blue is better
            # The root keeps small changes apart where one is large.
            norm = mpl.colors.FuncNorm((_root, _square), vmin=-limit, vmax=limit)
            axes.imshow([[factor * v[0] for v in row] for row in values], cmap=colours, norm=norm, aspect="auto")
            for y, row in enumerate(values):
                for x, (value, low, high) in enumerate(row):
                    sure = low > 0 or high < 0
                    dark = abs(_root(factor * value)) > 0.7 * _root(limit)
                    axes.text(
                        x,
                        y,
                        f"{factor * value:+.1f}",
                        ha="center",
                        va="center",
                        size=9,
                        weight="bold" if sure else "normal",
                        color="white" if dark else "black",
                    )
            axes.set_xticks(range(len(layers)), layers)
            axes.set_yticks(range(len(modes)), modes)
            axes.set_title(f"{title}, scale {scale:g}", size=10)
            axes.set_xlabel("skipped layer")
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
    figure.suptitle("Blue is better, red is worse; bold where the 95 % interval leaves out 0", fontsize=10)
    figure.savefig(path, dpi=130, facecolor="white")
    plt.close(figure)


def _root(value: Any) -> Any:
    import numpy as np

    return np.sign(value) * np.sqrt(np.abs(value))


def _square(value: Any) -> Any:
    return value * abs(value)


def _predictors(results: dict[str, Any], path: Path) -> None:
    """Draw each outcome over the best measure of the profile, and over the best of samples."""
    scale = results["cells"][0]["scale"]
    rows = [row for row in results["cells"] if row["scale"] == scale]
    profile = {(row["mode"], row["layer"]): row for row in results["profile"]}
    figure, panels = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for column, (outcome, (title, factor)) in enumerate(OUTCOMES.items()):
        found = next(c for c in results["correlations"] if c["outcome"] == outcome and c["scale"] == scale)
        for axes, sampled in zip(panels[:, column], (False, True), strict=True):
            some = {name: m for name, m in found["measures"].items() if m["sampled"] == sampled}
            name = max(some, key=lambda name: abs(some[name]["rho"]))
            for row in rows:
                x = row["metrics"][name] if sampled else profile[row["mode"], row["layer"]][name]
                value, low, high = (factor * v for v in row[outcome])
                colour, marker = COLOURS.get(row["mode"]), MARKERS.get(row["mode"], "o")
                axes.errorbar(x, value, [[value - low], [high - value]], color=colour, elinewidth=0.6, alpha=0.5)
                axes.plot(x, value, marker, color=colour, markersize=5)
                axes.annotate(row["layer"], (x, value), (4, 3), textcoords="offset points", size=8)
            axes.axhline(0, color="#cccccc", zorder=0)
            axes.set_xlabel(f"{name} ({'change in the samples' if sampled else 'profile'})")
            axes.set_ylabel(title)
            m = some[name]
            axes.set_title(f"ρ = {m['rho']:+.2f} ({m['low']:+.2f} … {m['high']:+.2f}), p = {m['p']:.2f}", size=10)
            axes.spines[["top", "right"]].set_visible(False)
    modes = dict.fromkeys(row["mode"] for row in rows)
    handles = [
        plt.Line2D([], [], color=COLOURS.get(m), marker=MARKERS.get(m, "o"), linestyle="", label=m) for m in modes
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"The best of each kind at scale {scale:g}; numbers are layers, bars 95 % intervals", fontsize=10)
    figure.savefig(path, dpi=130, facecolor="white")
    plt.close(figure)
