"""The study of layers runs, and its statistics are those of scipy and of a regression by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks.demo_model import choosing, choosing_report, sweep

PAIRS = [(mode, layer) for mode in ("residual", "attention") for layer in range(6)]


@pytest.fixture(autouse=True)
def _keep_threads() -> object:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_spearman_is_scipys_also_with_ties() -> None:
    random = np.random.default_rng(0)
    measures, outcomes = random.integers(6, size=(24, 3)).astype(float), random.normal(size=(24, 2))
    found = choosing.spearman(measures, outcomes)
    for i in range(3):
        for k in range(2):
            assert found[i, k] == pytest.approx(stats.spearmanr(measures[:, i], outcomes[:, k]).statistic)
    assert (choosing.spearman(np.ones((24, 1)), outcomes) == 0).all()


def test_a_partial_correlation_is_that_of_the_residuals_of_ranks() -> None:
    random = np.random.default_rng(1)
    depth = random.normal(size=24)
    measure, outcome = depth + random.normal(size=24), depth + random.normal(size=24)
    x, y, z = (stats.rankdata(values) for values in (measure, outcome, depth))
    left = [values - np.polyval(np.polyfit(z, values, 1), z) for values in (x, y)]

    def rho(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return choosing.spearman(a[:, None], b[:, None])

    found = choosing.given(rho(measure, outcome), rho(depth, outcome)[0], rho(depth, measure)[0])
    assert found.item() == pytest.approx(np.corrcoef(*left)[0, 1])
    assert abs(found.item() - rho(measure, outcome).item()) > 0.1


def test_a_measure_that_knows_the_outcome_is_told_from_chance() -> None:
    random = np.random.default_rng(2)
    outcomes = random.normal(size=(12, 2))
    measures = np.stack([-outcomes[:, 0], *random.normal(size=(3, 12))], axis=1)
    drawn = outcomes + 0.01 * random.normal(size=(20, 12, 2))
    found, (middle, rare) = choosing.correlate(measures, outcomes, drawn, PAIRS)
    assert found["rho"][0, 0] == pytest.approx(-1)
    assert found["low"][0, 0] <= found["high"][0, 0] < -0.8
    assert found["p"][0, 0] <= 2 / 720, "of all ways to deal six layers hardly another is as good"
    assert (found["p"][1:, 0] > 0.05).all()
    assert (middle > 0).all()
    assert (middle < rare).all()
    assert (rare < 1).all()


def test_the_published_page_is_that_of_the_numbers_and_of_the_shipped_weights() -> None:
    results = json.loads((sweep.RESULTS / "choosing_layers.json").read_text(encoding="utf-8"))
    assert results["weights"] == sweep._fingerprint(), "run python -m benchmarks.demo_model.choosing again"
    assert (sweep.RESULTS / "choosing_layers.md").read_text(encoding="utf-8") == choosing_report.document(results)


@pytest.mark.slow
def test_a_small_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "REFERENCE", 40)
    monkeypatch.setattr(choosing, "CLIP_RESAMPLES", 3)
    monkeypatch.setattr(choosing, "RESAMPLES", 10)
    options = ["--clips", "3", "--steps", "3", "--layers", "6", "7", "--modes", "residual", "attention"]
    options += ["--work", str(tmp_path / "w"), "--results", str(tmp_path), "--images", str(tmp_path), "--seed", "5"]
    choosing.main([*options, "--scales", "1.0"])
    results = json.loads((tmp_path / "choosing_layers.json").read_text())
    assert [(row["mode"], row["layer"]) for row in results["cells"]] == [
        (mode, layer) for mode in ("residual", "attention") for layer in (6, 7)
    ]
    for row in results["cells"]:
        value, low, high = row["frechet_distance"]
        assert low <= value <= high
        assert row["metrics"]["difference"] > 0
    assert [(found["modes"], found["pairs"]) for found in results["correlations"][::2]] == [
        (["residual", "attention"], 4),
        (["residual"], 2),
        (["attention"], 2),
    ]
    measures = results["correlations"][0]["measures"]
    assert {"norm", "cosine, early", "temporal, late", "cost", "sharpness", "difference"} <= measures.keys()
    assert len(results["profile"]) == 4
    assert "## Scale 1\n" in (tmp_path / "choosing_layers.md").read_text()
    for name in ("choosing-outcomes.png", "choosing-predictors.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")

    # Nothing of the second scale has been sampled: it is left out, and what has been is not sampled again.
    monkeypatch.setattr(choosing.Study, "sample", None)
    choosing.main([*options, "--scales", "1.0", "0.5", "--report"])
    assert json.loads((tmp_path / "choosing_layers.json").read_text())["cells"] == results["cells"]
