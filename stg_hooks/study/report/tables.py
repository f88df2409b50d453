"""The numbers of a report as flat tables: a row per cell, a row per layer, mode and noise level."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Sequence
from typing import Any

from stg_hooks.study.results import Cell, Profile, Sweep


def metrics_of(sweep: Sweep) -> list[str]:
    """Name all metrics, in the order in which cells report them."""
    return list(dict.fromkeys(name for cell in sweep.cells for name in cell.metrics))


def write(profile: Profile | None, sweep: Sweep | None) -> dict[str, str]:
    """Write the tables.

    Args:
        profile: what `profile` measured, if it has run.
        sweep: what `sweep` has made, if it has run.

    Returns:
        Texts by the name of their file: report.json has everything, report.csv the cells (without a sweep the profile).
    """
    cells = [_flat(cell, metrics_of(sweep)) for cell in sweep.cells] if sweep is not None else []
    rows = [dataclasses.asdict(row) for row in profile.rows] if profile is not None else []
    tables = {"report.json": json.dumps({"cells": cells, "profile": rows}, indent=1, ensure_ascii=False) + "\n"}
    if sweep is not None:
        tables["report.csv"] = _csv(cells)
    if rows:
        tables["report-profile.csv" if sweep is not None else "report.csv"] = _csv(rows)
    return tables


def _flat(cell: Cell, metrics: Sequence[str]) -> dict[str, Any]:
    """Turn a cell into one row; layers are joined by a plus."""
    row = {"id": cell.id, "layers": "+".join(map(str, cell.layers)), "mode": cell.mode, "scale": cell.scale}
    row |= {"status": cell.status, "error": cell.error, "seconds": cell.seconds, "cost": cell.cost}
    return row | {name: cell.metrics.get(name) for name in metrics} | {"code": cell.code}


def _csv(rows: list[dict[str, Any]]) -> str:
    """Write rows that share their columns."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()
