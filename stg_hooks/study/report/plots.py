"""Draw a report's heat maps and its cost against effect as PNG files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from stg_hooks.errors import ExtraError
from stg_hooks.study.report.tables import metrics_of
from stg_hooks.study.results import Cell, Profile, ProfileRow, Sweep

_MEASURES = {
    "norm": "strength, ‖d‖ / ‖cond‖",
    "cosine": "cosine of d and cond − uncond",
    "high_frequency": "high spatial frequencies of d",
    "temporal": "part of d that differs between frames",
    "std_ratio": "std(cond + d) / std(cond)",
    "cost": "extra compute of a guided step",
}
_MIDDLE = {"cosine": 0.0, "std_ratio": 1.0}
_MARKERS = "osD^v<>PX"


def draw(profile: Profile | None, sweep: Sweep | None) -> dict[str, bytes]:
    """Draw everything there is to draw.

    Args:
        profile: what `profile` measured, if it has run.
        sweep: what `sweep` has made, if it has run.

    Returns:
        PNG files by name: report-heat-MODE.png, and report-cost.png with one panel per metric.
    """
    pictures = {}
    if profile is not None:
        for mode in profile.modes:
            if rows := [row for row in profile.rows if row.mode == mode]:
                pictures[f"report-heat-{mode}.png"] = _heat_maps(f"{profile.model}, {mode}", rows, profile.noise_kind)
    if sweep is not None:
        done = [cell for cell in sweep.cells if cell.status == "done" and cell.cost is not None]
        if done and (names := metrics_of(sweep)):
            pictures["report-cost.png"] = _scatters(names, done)
    return pictures


def _figure(width: float, height: float) -> Any:
    """Make a figure without pyplot, which would choose a backend for the whole program."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ExtraError("Plots are drawn by matplotlib. Install it with: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    return file.getvalue()


def _heat_maps(title: str, rows: Sequence[ProfileRow], noise_kind: str) -> bytes:
    """Draw one map per measure, layers to the right and noise levels downwards."""
    layers = sorted({row.layer for row in rows})
    levels = sorted({row.noise_level for row in rows}, reverse=True)
    measures = [name for name in _MEASURES if any(getattr(row, name) is not None for row in rows)]
    figure = _figure(max(6.0, 0.16 * len(layers) + 3), 0.7 + len(measures) * (0.8 + 0.16 * len(levels)))
    figure.suptitle(title)
    axes = figure.subplots(len(measures), 1, sharex=True, squeeze=False)[:, 0]
    for panel, name in zip(axes, measures, strict=True):
        values = {(row.noise_level, row.layer): getattr(row, name) for row in rows}
        grid = [[_or_nan(values.get((level, layer))) for layer in layers] for level in levels]
        scale: dict[str, Any] = {"cmap": "cividis"}
        if name in _MIDDLE:
            known = [value for value in values.values() if value is not None]
            reach = max(abs(value - _MIDDLE[name]) for value in known) or 1.0
            scale = {"cmap": "PuOr_r", "vmin": _MIDDLE[name] - reach, "vmax": _MIDDLE[name] + reach}
        image = panel.imshow(grid, aspect="auto", interpolation="nearest", **scale)
        panel.set_title(_MEASURES[name], fontsize=9, loc="left")
        panel.set_yticks(range(len(levels)), [f"{level:.2g}" for level in levels], fontsize=7)
        panel.set_ylabel(f"noise level ({noise_kind})", fontsize=8)
        figure.colorbar(image, ax=panel, pad=0.01).ax.tick_params(labelsize=7)
    every = 1 + len(layers) // 30
    axes[-1].set_xticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]], fontsize=7)
    axes[-1].set_xlabel("layer")
    return _png(figure)


def _scatters(names: Sequence[str], done: Sequence[Cell]) -> bytes:
    """Draw every metric against the extra compute, one marker per mode."""
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = _figure(4.2 * columns, 3.2 * rows + 0.5)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    modes = list(dict.fromkeys(cell.mode for cell in done if cell.layers))  # as on the page
    for panel, name in zip(panels, names, strict=False):
        for index, mode in enumerate(modes):
            chosen = [cell for cell in done if cell.layers and cell.mode == mode]
            _points(panel, chosen, name, label=mode, marker=_MARKERS[index % len(_MARKERS)])
        plain = [cell for cell in done if not cell.layers]
        _points(panel, plain, name, label="unguided", marker="*", color="black", s=80)
        panel.set_title(name.replace("_", " "), fontsize=10)
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        panel.grid(color="#eeeeee")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    figure.supxlabel("extra compute", fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False, fontsize=9)
    return _png(figure)


def _points(panel: Any, cells: Sequence[Cell], metric: str, **style: Any) -> None:
    values = [_or_nan(cell.metrics.get(metric)) for cell in cells]
    panel.scatter([_or_nan(cell.cost) for cell in cells], values, **({"s": 26, "alpha": 0.8} | style))
    small: dict[str, Any] = {"textcoords": "offset points", "fontsize": 5, "color": "#666666"}
    for cell in cells:
        if cell.layers and cell.cost is not None and cell.metrics.get(metric) is not None:
            name = f"{'+'.join(map(str, cell.layers))} × {cell.scale:g}"
            panel.annotate(name, (cell.cost, cell.metrics[metric]), (4, 2), **small)


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value
