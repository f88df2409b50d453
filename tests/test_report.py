"""What a report writes, without a browser: tables, plots, a page that needs nothing, and errors that say what to do."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

Image = pytest.importorskip("PIL.Image", reason="the demo extra is not installed")

import stg_hooks as stg  # noqa: E402
from tests import report_folder  # noqa: E402

ONE = {"layers": [[1], [3]], "modes": ["residual"], "scales": [1.0], "seeds": [7]}


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as text:
        return list(csv.DictReader(text))


def test_tables_hold_every_cell_and_every_row(tmp_path: Path) -> None:
    report_folder.write_profile(tmp_path)
    report_folder.write_sweep(tmp_path, failed=("residual-L5-s2.0",))
    assert stg.report(tmp_path) == tmp_path / "report.html"
    sweep, profile = stg.results.Sweep.load(tmp_path), stg.results.Profile.load(tmp_path)
    everything = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    cells = rows_of(tmp_path / "report.csv")
    assert [row["id"] for row in cells] == [row["id"] for row in everything["cells"]] == [c.id for c in sweep.cells]
    assert len(cells) == 1 + 3 * 2 * 3
    for row, flat, cell in zip(cells, everything["cells"], sweep.cells, strict=True):
        assert row["layers"] == "+".join(map(str, cell.layers))
        assert row["code"] == flat["code"] == cell.code
        assert row["error"] == (cell.error or "")
        for name in ("sharpness", "flicker", "difference"):
            assert flat[name] == cell.metrics.get(name)
            assert row[name] == ("" if flat[name] is None else str(flat[name]))
    assert [row["status"] for row in cells].count("failed") == 1
    measured = rows_of(tmp_path / "report-profile.csv")
    assert [float(row["norm"]) for row in measured] == [row.norm for row in profile.rows]
    assert len(everything["profile"]) == len(profile.rows)


def test_a_profile_alone_is_the_csv(tmp_path: Path) -> None:
    report_folder.write_profile(tmp_path, layers=3)
    stg.report(tmp_path)
    assert len(rows_of(tmp_path / "report.csv")) == 3 * 2 * len(report_folder.LEVELS)
    assert not (tmp_path / "report-profile.csv").exists()


def data_of(page: str) -> dict:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def test_the_page_has_every_picture_and_every_text_once(tmp_path: Path) -> None:
    hostile = "</script><b>&amp;<!--<script>"
    report_folder.write_sweep(tmp_path, **ONE, prompts=[hostile, "two"])
    (tmp_path / "cells" / "residual-L3-s1.0" / "p0-s0.strip.webp").unlink()
    page = stg.report(tmp_path).read_text(encoding="utf-8")
    data = data_of(page)
    assert data["sweep"]["prompts"][0] == hostile
    assert hostile not in page
    strips = [sample["strip"] for cell in data["sweep"]["cells"] for sample in cell["samples"]]
    assert strips == [0, 1, 2, 3, None, 4]
    assert re.findall(r'<script type="image/webp" id="strip-(\d+)">', page) == list("01234")


def test_of_a_large_sweep_the_page_shows_the_same_samples_of_every_cell(tmp_path: Path) -> None:
    report_folder.write_sweep(tmp_path, **{**ONE, "seeds": [7, 8, 9]}, failed=("residual-L3-s1.0",))
    every = stg.report(tmp_path).read_text(encoding="utf-8")
    strips = tmp_path.glob("cells/*/p0-s[01].strip.webp")
    megabytes = 1.2 * sum(path.stat().st_size * 4 / 3 for path in strips) / 1e6  # room for two seeds of a prompt
    some = stg.report(tmp_path, max_megabytes=megabytes).read_text(encoding="utf-8")
    least = stg.report(tmp_path, max_megabytes=0).read_text(encoding="utf-8")
    assert len(every) > len(some) > len(least)
    for page, pairs in ((every, 6), (some, 2), (least, 1)):
        data = data_of(page)
        assert [len(cell["samples"]) for cell in data["sweep"]["cells"]] == [pairs, pairs, 0]
        assert all(sample["strip"] is not None for cell in data["sweep"]["cells"] for sample in cell["samples"])
        assert ["Samples per cell", f"6, the first {pairs} shown" if pairs < 6 else "6"] in data["facts"]


def test_a_profile_and_a_sweep_are_of_one_model(tmp_path: Path) -> None:
    report_folder.write_profile(tmp_path)
    report_folder.write_sweep(tmp_path, **ONE)
    settings = json.loads((tmp_path / "sweep.json").read_text())
    (tmp_path / "sweep.json").write_text(json.dumps({**settings, "model": "MochiTransformer3DModel"}))
    with pytest.raises(stg.ResultsError, match=r"profile of Wan.*sweep of Mochi.*folder of its own"):
        stg.report(tmp_path)


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    report_folder.write_profile(tmp_path)
    page = stg.report(tmp_path).read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\s\"'<)]+", page)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.search(r"""\s(src|href)\s*=\s*["']|@import|url\(""", page)
    assert not re.search(r"\$[a-z]", page), "a placeholder was left"
    assert "default-src 'none'" in page


@pytest.mark.parametrize("word", ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "fetch("])
def test_the_script_reads_no_text_as_html(word: str) -> None:
    folder = Path(stg.report.__code__.co_filename).parent / "page"
    assert len(list(folder.glob("*.js"))) > 5
    assert [file.name for file in folder.glob("*.js") if word in file.read_text(encoding="utf-8")] == []


def test_plots_are_drawn_on_demand(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report_folder.write_profile(tmp_path, layers=3, modes=["residual"])
    report_folder.write_sweep(tmp_path, **ONE)
    stg.report(tmp_path)
    assert list(tmp_path.glob("*.png")) == []
    stg.report(tmp_path, plots=True)
    names = sorted(path.name for path in tmp_path.glob("*.png"))
    assert names == ["report-cost.png", "report-heat-residual.png"]
    for name in names:
        with Image.open(tmp_path / name) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_without_matplotlib_plots_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report_folder.write_profile(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(stg.ExtraError, match="pip install matplotlib"):
        stg.report(tmp_path, plots=True)
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]
    stg.report(tmp_path)  # the page needs no plots


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, "", r"neither profile.json nor sweep.json.*stg.profile\(pipe, \.\.\.\).save\(folder\)"),
        ("profile.json", "{", "is not valid JSON"),
        ("sweep.json", '{"kind": "sweep", "version": 99}', "in version 99"),
    ],
)
def test_folders_that_hold_no_results(tmp_path: Path, name: str | None, content: str, message: str) -> None:
    if name is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(stg.ResultsError, match=message):
        stg.report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ([] if name is None else [name])


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(stg.ResultsError, match="there is no such folder"):
        stg.report(tmp_path / "typo")
    assert not (tmp_path / "typo").exists()


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report_folder.write_profile(tmp_path)
    stg.report(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        stg.report(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_report_needs_neither_pillow_nor_matplotlib(tmp_path: Path) -> None:
    report_folder.write_sweep(tmp_path, **ONE)
    blocked = "import sys\nfor name in ('PIL', 'matplotlib', 'numpy', 'diffusers'): sys.modules[name] = None\n"
    code = f"{blocked}import stg_hooks as stg\nprint(stg.report({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("report.html")
