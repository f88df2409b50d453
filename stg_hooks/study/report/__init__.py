"""Show what `profile` and `sweep` measured: one HTML page that needs nothing but itself, CSV, JSON and plots."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from stg_hooks.errors import ResultsError
from stg_hooks.study.report import page, tables
from stg_hooks.study.results import PROFILE_FILE, SWEEP_FILE, Profile, Sweep, write_whole

__all__ = ["report"]


def report(folder: str | PathLike[str], *, plots: bool = False, max_megabytes: float = 64.0) -> Path:
    """Write report.html, report.csv and report.json beside the results in a folder.

    Args:
        folder: where `Profile.save` wrote profile.json, or `sweep` its cells, or both. A sweep may still be running.
        plots: also draw PNG files, report-*.png; needs matplotlib.
        max_megabytes: how large the samples on the page may be together. Of larger sweeps the page shows the first
            prompts and seeds only, of every cell the same and at least one; its numbers are means over all.

    Returns:
        The page, which needs no other file and no network.

    Raises:
        ResultsError: the folder holds no results, or a file that cannot be read.
    """
    folder = Path(folder)
    profile = Profile.load(folder) if (folder / PROFILE_FILE).exists() else None
    sweep = Sweep.load(folder) if (folder / SWEEP_FILE).exists() else None
    if profile is None and sweep is None:
        reason = f"it has neither {PROFILE_FILE} nor {SWEEP_FILE}" if folder.is_dir() else "there is no such folder"
        raise ResultsError(
            f"report({str(folder)!r}): {reason}. Write results there first: stg.profile(pipe, ...).save(folder) or "
            "stg.sweep(pipe, ..., out=folder)."
        )
    if profile is not None and sweep is not None and profile.model != sweep.settings["model"]:
        raise ResultsError(
            f"{folder} holds a profile of {profile.model} and a sweep of {sweep.settings['model']}. Give each model a "
            "folder of its own."
        )
    files = {name: text.encode() for name, text in tables.write(profile, sweep).items()}
    if plots:
        from stg_hooks.study.report.plots import draw

        files |= draw(profile, sweep)
    files["report.html"] = page.render(profile, sweep, max_megabytes * 1e6).encode()
    for name, data in files.items():
        write_whole(folder / name, data)
    return folder / "report.html"
