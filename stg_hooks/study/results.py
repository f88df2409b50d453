"""The files that `profile` and `sweep` write and that reports read: JSON, written whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stg_hooks.errors import ResultsError

VERSION = 1
PROFILE_FILE = "profile.json"
SWEEP_FILE = "sweep.json"
CELLS = "cells"
CELL_FILE = "cell.json"
SETTINGS_FILE = "settings.json"
BASELINE = "baseline"
"""The id of the cell that holds the plain pipeline's samples."""


@dataclasses.dataclass(frozen=True)
class ProfileRow:
    """What one layer does in one mode at one noise level, mean over prompts; `d = cond - weak`."""

    layer: int
    mode: str
    noise_level: float
    step: int
    norm: float | None
    """`||d|| / ||cond||`."""
    cosine: float | None
    """Between d and the CFG direction, `cond - uncond`; `None` without CFG."""
    high_frequency: float | None
    """Part of d's energy in the upper half of spatial frequencies, 0 to 1; `None` where the picture is not known."""
    temporal: float | None
    """Part of d's energy that differs between frames, 0 to 1; `None` for images."""
    std_ratio: float | None
    """`std(cond + d) / std(cond)`."""
    cost: float | None
    """FLOPs that guidance adds to a step, as a part of a plain step's; `None` where they could not be counted."""


@dataclasses.dataclass(frozen=True)
class Profile:
    """What each layer does along an ordinary run. Prints as a table; `save` writes it for reports."""

    model: str
    layers: tuple[dict[str, Any], ...]
    """Index, name and type of each layer that was measured."""
    modes: tuple[str, ...]
    noise_levels: tuple[float, ...]
    prompts: tuple[str, ...]
    guidance_scale: float | None
    rows: tuple[ProfileRow, ...]
    noise_kind: str = "flow"
    """In which units the noise levels are: see `Step`; `"run"` where only the part of the run that remains is known."""

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain lists, strings and numbers."""
        return {"kind": "profile", "version": VERSION, **dataclasses.asdict(self)}

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `profile.json` into a folder, which is made if it does not exist; return the file."""
        return write_json(Path(folder) / PROFILE_FILE, self.to_dict())

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Profile:
        """Read what `save` wrote.

        Raises:
            ResultsError: the folder has no profile, or another version of stg_hooks wrote it.
        """
        data = read_json(Path(folder) / PROFILE_FILE, "profile")
        rows = tuple(ProfileRow(**_known(ProfileRow, row)) for row in data.pop("rows"))
        values = {key: _tupled(value) for key, value in data.items()}
        return cls(**_known(cls, {**values, "rows": rows}))

    def __repr__(self) -> str:
        """Format as a table: one line per layer and mode, mean over noise levels."""
        levels = ", ".join(f"{level:.2f}" for level in self.noise_levels)
        title = f"{self.model}: {len(self.layers)} layers, mean over noise levels {levels} ({self.noise_kind})"
        names = [field.name for field in dataclasses.fields(ProfileRow)][4:]
        lines = [("layer", "mode", *names)]
        lines += [
            (str(layer["index"]), mode, *(_short(mean(getattr(row, name) for row in rows)) for name in names))
            for mode in self.modes
            for layer in self.layers
            if (rows := [row for row in self.rows if (row.layer, row.mode) == (layer["index"], mode)])
        ]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n  ".join([title, *("  ".join(map(str.rjust, line, widths)) for line in lines)])


@dataclasses.dataclass(frozen=True)
class Sample:
    """One picture or video of a cell; `prompt` and `seed` are positions in the sweep's lists."""

    prompt: int
    seed: int
    file: str
    strip: str
    frames: int
    width: int
    """Of one frame in the strip, in pixels; so is `height`."""
    height: int
    metrics: Mapping[str, float | None]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One setting of a sweep, and what came out."""

    id: str
    layers: tuple[int | str, ...]
    mode: str
    scale: float
    status: str
    """`"done"` or `"failed"`."""
    error: str | None
    seconds: float
    cost: float | None
    """FLOPs that guidance adds to a run of the denoiser, as a part of a plain run's."""
    metrics: Mapping[str, float | None]
    """Mean over samples."""
    code: str
    samples: tuple[Sample, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """What `apply` is given for it, as in its `settings.json`; the baseline skips no layers."""
        return settings_of((self.layers, self.mode, self.scale))

    @classmethod
    def load(cls, folder: Path) -> Cell:
        """Read a cell's folder.

        Raises:
            ResultsError: it has no cell.
        """
        data = read_json(folder / CELL_FILE, None)
        samples = tuple(Sample(**_known(Sample, sample)) for sample in data.pop("samples"))
        return cls(**_known(cls, {**data, "layers": tuple(data["layers"]), "samples": samples}))


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a sweep has been asked for, and the cells that are finished."""

    folder: Path
    settings: Mapping[str, Any]
    """What `sweep.json` holds."""
    cells: tuple[Cell, ...]
    """The baseline first, then in the order of the grid."""

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Sweep:
        """Read a sweep's folder, also while the sweep is running.

        Raises:
            ResultsError: the folder has no sweep, or another version of stg_hooks wrote it.
        """
        folder = Path(folder)
        settings = read_json(folder / SWEEP_FILE, "sweep")
        names = [cell_id(*place) for place in grid(settings)]
        found = [folder / CELLS / name for name in names if (folder / CELLS / name / CELL_FILE).exists()]
        return cls(folder, settings, tuple(map(Cell.load, found)))

    @property
    def failed(self) -> tuple[Cell, ...]:
        """The cells that could not be made."""
        return tuple(cell for cell in self.cells if cell.status == "failed")

    def __repr__(self) -> str:
        """Format as a table: one line per cell."""
        names = list(dict.fromkeys(name for cell in self.cells for name in cell.metrics))
        lines = [("cell", "cost", *names)]
        lines += [
            (cell.id, _short(cell.cost), *(_short(cell.metrics.get(name)) for name in names))
            for cell in self.cells
            if cell.status == "done"
        ]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        failures = [f"{cell.id}: failed, {cell.error}" for cell in self.failed]
        title = f"{self.folder}: {len(self.cells)} of {len(grid(self.settings))} cells"
        return "\n  ".join([title, *(row.rstrip() for row in rows), *failures])


Place = tuple[tuple[int | str, ...], str, float]
"""Where in the grid a cell lies: layers, mode, scale."""


def grid(settings: Mapping[str, Any]) -> list[Place]:
    """List the cells that a sweep's settings ask for, the baseline first."""
    places: list[Place] = [((), "residual", 0.0)]
    places += [
        (tuple(layers), mode, float(scale))
        for mode in settings["modes"]
        for layers in settings["layers"]
        for scale in settings["scales"]
    ]
    return places


def cell_id(layers: Sequence[int | str], mode: str, scale: float) -> str:
    """Name a cell's folder, such as `residual-L2+5-s0.5`; without layers it is the baseline."""
    return f"{mode}-L{'+'.join(map(str, layers))}-s{scale!r}" if layers else BASELINE


def settings_of(place: Place) -> dict[str, Any]:
    """Return what `apply` is given for a cell."""
    layers, mode, scale = place
    return {"layers": list(layers), "scale": scale, "mode": mode}


def write_json(path: Path, data: Any) -> Path:
    """Write a file whole or not at all, with `null` for numbers that are not finite.

    Args:
        path: where; its folder is made if it does not exist.
        data: lists, dicts, strings and numbers.

    Returns:
        The path.
    """
    text = json.dumps(_finite(data), ensure_ascii=False, indent=1, allow_nan=False)
    return write_whole(path, (text + "\n").encode())


def write_whole(path: Path, data: bytes) -> Path:
    """Write a file whole or not at all, in a folder that is made if it does not exist; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def read_json(path: Path, kind: str | None) -> dict[str, Any]:
    """Read one of our files.

    Args:
        path: the file.
        kind: what it must say that it is, `"profile"` or `"sweep"`; `None` for files that do not say.

    Returns:
        What it holds, without `kind` and `version`.

    Raises:
        ResultsError: it does not exist, is not valid JSON, or something else wrote it.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        made = f" stg.{kind}(...) writes it." if kind else ""
        raise ResultsError(f"{path} does not exist.{made}") from None
    except ValueError as error:
        raise ResultsError(f"{path} is not valid JSON ({error}). Delete it, and make it again.") from error
    if not isinstance(data, dict):
        raise ResultsError(f"{path} holds a {type(data).__name__}, which stg_hooks does not write.")
    found = data.pop("kind", None), data.pop("version", None)
    if kind is not None and found != (kind, VERSION):
        raise ResultsError(
            f"{path} says it is {found[0]!r} in version {found[1]!r}; this stg_hooks reads {kind!r} in version "
            f"{VERSION}."
        )
    return data


def _known(cls: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that a record has: later versions may write more."""
    return {field.name: data[field.name] for field in dataclasses.fields(cls) if field.name in data}


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def mean(values: Iterator[float | None]) -> float | None:
    """Average the numbers that are known and finite; `None` where there is none."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else None


def _short(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.01 else f"{value:.2g}"
