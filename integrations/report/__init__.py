"""Show what `profile` and `sweep` measured: one HTML page that needs nothing but itself, CSV, JSON and plots."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from stg_hooks.integrations.report import files, page, tables

__all__ = ["report"]


def report(folder: str | PathLike[str], *, plots: bool = False) -> Path:
    """Write report.html, report.csv and report.json beside the results in a folder.

    Args:
        folder: where `Profile.save` wrote profile.json, or `sweep` its cells, or both. A sweep may still be running.
        plots: also draw PNG files, report-*.png; needs matplotlib.

    Returns:
        The page, which needs no other file and no network.

    Raises:
        SettingError: the folder holds no results, or a file in it that cannot be read.
    """
    results = files.read(Path(folder))
    for name, text in tables.write(results).items():
        files.save(results.folder / name, text.encode())
    if plots:
        from stg_hooks.integrations.report.plots import draw

        for name, picture in draw(results).items():
            files.save(results.folder / name, picture)
    path = results.folder / "report.html"
    files.save(path, page.render(results).encode())
    return path
