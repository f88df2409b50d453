"""The numbers of a report as flat tables: a row per cell, a row per layer, mode and noise level."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

from stg_hooks.integrations.report.files import Results


def write(results: Results) -> dict[str, str]:
    """Write the tables.

    Args:
        results: what to tabulate.

    Returns:
        Texts by the name of their file: report.json has everything, report.csv the cells or, without any, the profile.
    """
    cells = [_flat(cell, results.metrics) for cell in results.cells]
    rows = results.profile["rows"] if results.profile is not None else []
    tables = {"report.json": json.dumps({"cells": cells, "profile": rows}, indent=1, ensure_ascii=False) + "\n"}
    if results.sweep is not None:
        tables["report.csv"] = _csv(cells)
    if rows:
        tables["report-profile.csv" if results.sweep is not None else "report.csv"] = _csv(rows)
    return tables


def _flat(cell: dict[str, Any], metrics: list[str]) -> dict[str, Any]:
    """Turn a cell into one row; layers are joined by a plus."""
    row = {"id": cell["id"], "layers": "+".join(map(str, cell["layers"])), "mode": cell["mode"], "scale": cell["scale"]}
    row |= {name: cell[name] for name in ("status", "error", "seconds", "cost")}
    return row | {name: cell["metrics"].get(name) for name in metrics} | {"code": cell["code"]}


def _csv(rows: list[dict[str, Any]]) -> str:
    """Write rows that share their columns."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()
