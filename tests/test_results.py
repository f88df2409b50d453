"""The files that reports read: whole or not at all, and the same after a round trip."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import stg_hooks as stg

ROW = stg.results.ProfileRow(0, "residual", 0.95, 3, 0.1, 0.2, 0.3, 0.4, 1.1, 0.136)
PROFILE = stg.results.Profile(
    model="Model",
    layers=({"index": 0, "name": "blocks.0", "type": "Block"}, {"index": 1, "name": "blocks.1", "type": "Block"}),
    modes=("residual",),
    noise_levels=(0.95, 0.5),
    prompts=("ein Häuschen",),
    guidance_scale=4.5,
    rows=(
        ROW,
        dataclasses.replace(ROW, noise_level=0.5, step=7, norm=0.3),
        dataclasses.replace(ROW, layer=1, cosine=None, temporal=None, cost=None),
    ),
)
SETTINGS: dict[str, Any] = {"layers": [[2], [2, "blocks.5"]], "modes": ["residual", "attention"], "scales": [0.5, 1]}
CELL = stg.results.Cell(
    "baseline", (), "residual", 0.0, "done", None, 1.5, 0.0, {"motion": 0.5, "flicker": None}, "pipe(prompt)", ()
)


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    file = PROFILE.save(tmp_path / "deep" / "folder")
    assert file == tmp_path / "deep" / "folder" / "profile.json"
    assert stg.results.Profile.load(file.parent) == PROFILE
    data = json.loads(file.read_text(encoding="utf-8"))
    assert (data["kind"], data["version"], data["prompts"]) == ("profile", 1, ["ein Häuschen"])
    assert data["rows"][0] == {
        "layer": 0,
        "mode": "residual",
        "noise_level": 0.95,
        "step": 3,
        "norm": 0.1,
        "cosine": 0.2,
        "high_frequency": 0.3,
        "temporal": 0.4,
        "std_ratio": 1.1,
        "cost": 0.136,
    }


def test_a_profile_prints_means_over_noise_levels() -> None:
    lines = repr(PROFILE).splitlines()
    assert lines[0] == "Model: 2 layers, mean over noise levels 0.95, 0.50 (flow)"
    assert lines[1].split() == ["layer", "mode", "norm", "cosine", "high_frequency", "temporal", "std_ratio", "cost"]
    assert lines[2].split() == ["0", "residual", "0.200", "0.200", "0.300", "0.400", "1.100", "0.136"]
    assert lines[3].split() == ["1", "residual", "0.100", "-", "0.300", "-", "1.100", "-"]


def test_fields_of_later_versions_are_passed_over(tmp_path: Path) -> None:
    data = PROFILE.to_dict()
    data["rows"][0]["new"] = 1
    stg.results.write_json(tmp_path / "profile.json", {**data, "also": "new"})
    assert stg.results.Profile.load(tmp_path) == PROFILE


def write_cell(folder: Path, cell: stg.results.Cell) -> None:
    stg.results.write_json(folder / "cells" / cell.id / "cell.json", dataclasses.asdict(cell))


def test_a_sweep_is_read_while_it_runs(tmp_path: Path) -> None:
    stg.results.write_json(tmp_path / "sweep.json", {"kind": "sweep", "version": 1, **SETTINGS})
    assert stg.results.Sweep.load(tmp_path).cells == ()
    sample = stg.results.Sample(0, 0, "p0-s0.mp4", "p0-s0.strip.webp", 16, 160, 90, {"motion": 0.5})
    layers = (2, "blocks.5")
    done = dataclasses.replace(
        CELL, id="attention-L2+blocks.5-s1.0", layers=layers, mode="attention", samples=(sample,)
    )
    failed = dataclasses.replace(CELL, id="residual-L2-s0.5", layers=(2,), status="failed", error="no memory")
    for cell in (done, failed, CELL):
        write_cell(tmp_path, cell)
    found = stg.results.Sweep.load(tmp_path)
    assert found.cells == (CELL, failed, done)
    assert found.failed == (failed,)
    assert repr(found).splitlines()[0] == f"{tmp_path}: 3 of 9 cells"
    assert repr(found).splitlines()[-1] == "  residual-L2-s0.5: failed, no memory"


def test_the_names_of_cells() -> None:
    names = [stg.results.cell_id(*place) for place in stg.results.grid(SETTINGS)]
    assert names[:4] == ["baseline", "residual-L2-s0.5", "residual-L2-s1.0", "residual-L2+blocks.5-s0.5"]
    assert len(set(names)) == len(names) == 9


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    data = {"a": float("nan"), "b": [1.0, float("inf")], "c": ({"d": float("-inf")},), "e": True}
    stg.results.write_json(tmp_path / "x.json", data)
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "b": [1.0, None], "c": [{"d": None}], "e": True}


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = stg.results.write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        stg.results.write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"profile\.json does not exist\. stg\.profile\(\.\.\.\) writes it\."),
        ("{", r"profile\.json is not valid JSON"),
        ("[]", r"holds a list"),
        ('{"kind": "sweep", "version": 1}', r"says it is 'sweep' in version 1"),
        ('{"kind": "profile", "version": 2}', r"reads 'profile' in version 1"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "profile.json").write_text(text)
    with pytest.raises(stg.ResultsError, match=message):
        stg.results.Profile.load(tmp_path)
