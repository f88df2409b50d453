"""Read the files of `profile` and `sweep`, and write files whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from stg_hooks.errors import SettingError


@dataclasses.dataclass(frozen=True)
class Results:
    """What a folder holds: a profile, a sweep, or both."""

    folder: Path
    profile: dict[str, Any] | None
    sweep: dict[str, Any] | None
    cells: list[dict[str, Any]]  # the plain cell first, then in the order of the sweep

    @property
    def metrics(self) -> list[str]:
        """Names of all metrics, in the order in which cells report them."""
        return list(dict.fromkeys(name for cell in self.cells for name in cell["metrics"]))


def read(folder: Path) -> Results:
    """Read a folder.

    Args:
        folder: where profile.json or sweep.json lies, or both.

    Returns:
        Its results. Cells that are not finished yet are not among them.

    Raises:
        SettingError: there is nothing to read, or something that cannot be read.
    """
    profile, sweep = (_load(folder / f"{kind}.json", kind) for kind in ("profile", "sweep"))
    if profile is None and sweep is None:
        exists = "no such folder" if not folder.is_dir() else "it has neither profile.json nor sweep.json"
        raise SettingError(
            f"report({str(folder)!r}): {exists}. Write results there first: stg.profile(pipe, ...).save(folder) or "
            "stg.sweep(pipe, ..., out=folder)."
        )
    cells = []
    if sweep is not None:
        found = (_load(path, None) for path in sorted(folder.glob("cells/*/cell.json")))
        cells = sorted((cell for cell in found if cell is not None), key=lambda cell: _place(cell, sweep))
    return Results(folder, profile, sweep, cells)


def save(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _load(path: Path, kind: str | None) -> dict[str, Any] | None:
    """Read a JSON file, or say which one is broken."""
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise SettingError(f"{path} cannot be read ({error}). Delete it and make it again.") from error
    if kind is not None and (content.get("kind"), content.get("version")) != (kind, 1):
        raise SettingError(f"{path} is not a {kind} of version 1, the one that this stg_hooks reads.")
    return content


def _place(cell: dict[str, Any], sweep: dict[str, Any]) -> tuple[int, int, float, str]:
    """Sort cells as the sweep lists them, the plain one first."""
    if not cell["layers"]:
        return -1, -1, 0.0, cell["id"]
    known, modes = sweep["layers"], sweep["modes"]
    layers = known.index(cell["layers"]) if cell["layers"] in known else len(known)
    mode = modes.index(cell["mode"]) if cell["mode"] in modes else len(modes)
    return layers, mode, cell["scale"], cell["id"]
