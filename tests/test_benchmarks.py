"""The benchmark runs, and writes what it promises. Its numbers are not tested: machines differ."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks import contestants, cost, every, measure, overhead
from benchmarks.shapes import SHAPES


@pytest.fixture(autouse=True)
def _keep_threads() -> object:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cost.json"
    cost.main(["--quick", "--models", "ltx", "--out", str(out)])
    results = json.loads(out.read_text())
    assert {"cpu", "cores", "threads", "torch", "diffusers"} <= results["machine"].keys()
    (model,) = results["models"]
    assert (model["name"], model["layers"], model["skipped"], model["cfg"]) == ("ltx", 28, 19, True)
    assert model["bound"]["formula"] == pytest.approx((2 * 28 + 28 - 19 - 1) / (2 * 28))
    assert set(model["contestants"]) == set(cost.contestants.USUAL)
    assert set(model["bound"]) == {"flops", "blocks", "formula"}
    for name, entry in model["contestants"].items():
        assert entry["notes"] == []
        assert name == "plain" or len(entry["turns"]["made"]) == entry["turns"]["steady"] == 2
        assert entry["quartiles"][0] <= entry["median"] <= entry["quartiles"][1]
        assert entry["peak_bytes"] > 0
        if name in cost.GUIDED:
            assert entry["difference"] < 1e-4, "every way to compute it must give the same prediction"
    assert set(model["extra_of_full"]) == {"bound", "three", "sequential", "batched"}
    assert [hooks["blocks"] for hooks in results["hooks"]] == [28, 48]
    for hooks in results["hooks"]:
        assert set(hooks["added_us"]) == set(overhead.TITLES)
    table = out.with_suffix(".md").read_text()
    assert "LTX-Video 2B" in table
    assert str(tmp_path) not in out.read_text() + table, "results are published: no paths in them"
    assert "LTX-Video 2B" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["ltx-2", "wan-modular"])
def test_what_others_build_in_predicts_what_ours_does(name: str) -> None:
    """LTX-2's own STG and diffusers' guider are contestants: a comparison of times is one of equal predictions."""
    shape = SHAPES[name]
    model = shape.build(shape.tiny)
    inputs = shape.inputs(model, shape.tiny)
    made = {}
    with torch.no_grad():
        for kind in contestants.of(shape):
            contestant = contestants.build(kind, shape, model, inputs, shape.skipped)
            with contestant.session():
                made[kind] = contestant.step()
    of_others = "own" if name == "ltx-2" else "slg"
    for kind in set(made) - {"plain", of_others}:
        torch.testing.assert_close(made[kind], made[of_others], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(made["plain"], made[of_others], atol=1e-3)


def test_plot(tmp_path: Path) -> None:
    plots = pytest.importorskip("benchmarks.plots")
    entry = {"time_ratio": {"value": 1.2, "low": 1.1, "high": 1.3}}
    model = {"title": "Any", "layers": 3, "skipped": 2, "bound": {"flops": 1.1}}
    field = dict.fromkeys(("three", "full", "sequential"), entry)
    plots.draw({"models": [{**model, "contestants": field}] * 2}, tmp_path / "cost.png")
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


def turns(*seconds: tuple[float, float, float]) -> list[measure.Turn]:
    return [measure.Turn(*one) for one in seconds]


def test_turns_count_in_which_the_machine_kept_its_speed() -> None:
    quiet = turns((1.0, 9.0, 1.0), (2.0, 1.0, 2.1), (1.1, 1.0, 1.0))
    assert sorted(measure.steady([*quiet, *turns((1.0, 1.0, 2.0))])) == sorted(quiet), "whatever was compared with it"


def test_the_ratio_does_not_depend_on_the_speed_of_the_machine() -> None:
    assert measure.ratio(turns((1.0, 1.5, 1.0), (3.0, 4.5, 3.0), (1.0, 3.0, 4.0))) == pytest.approx(1.5)
    found = measure.estimate(measure.ratio, turns((1.0, 1.0, 1.0), (1.0, 2.0, 1.0)))
    assert found == {"value": pytest.approx(2**0.5), "low": pytest.approx(1), "high": pytest.approx(2)}


def test_turns_end_when_the_ratio_is_known() -> None:
    enough = cost.until(time.perf_counter() + 100, 0.03)
    assert not enough(turns((1.0, 1.5, 1.0)) * 8), "too few to tell"
    assert enough(turns((1.0, 1.5, 1.0)) * 12)
    assert not enough(turns((1.0, 1.5, 1.0), (1.0, 2.5, 1.0)) * 6)
    assert cost.until(time.perf_counter() - 1, 0.03)(turns((1.0, 1.5, 1.0), (1.0, 2.5, 1.0)) * 7), "time is up"


def test_peak_memory_counts_what_is_in_use_at_once() -> None:
    def call() -> torch.Tensor:
        kept = torch.zeros(1000)
        for _ in range(3):
            torch.zeros(5000)
        return kept

    _, peak = measure.peak_memory(call, torch.device("cpu"))
    assert peak == pytest.approx(4 * 6000, abs=256)


def test_each_call_stands_between_two_of_the_reference() -> None:
    from contextlib import nullcontext

    log: list[str] = []

    def way(name: str) -> measure.Way:
        return (lambda: log.append(name)), nullcontext

    calls = {"a": way("a"), "b": way("b")}
    made = measure.in_turns(calls, way("r"), torch.device("cpu"), enough=lambda own: len(own) >= 3)
    assert {name: len(own) for name, own in made.items()} == {"a": 3, "b": 3}
    assert log[::2] == ["r"] * 7
    assert sorted(log[1::2]) == ["a"] * 3 + ["b"] * 3


def test_what_is_known_is_not_timed_any_more() -> None:
    from contextlib import nullcontext

    ticks = iter(range(10_000))
    calls = {"a": (lambda: None, nullcontext), "b": (lambda: next(ticks), nullcontext)}
    made = measure.in_turns(
        calls,
        (lambda: None, nullcontext),
        torch.device("cpu"),
        clock=lambda: float(next(ticks)),
        enough=lambda own: len(own) >= (4 if own[0].own > 1 else 2),
    )
    assert {name: len(own) for name, own in made.items()} == {"a": 2, "b": 4}
    assert measure.added(made["b"]) == 1.0


def test_the_error_of_differences_that_are_used_again(tmp_path: Path) -> None:
    out = tmp_path / "every.json"
    results = every.main(["--count", "2", "--steps", "3", "--every", "1", "3", "--out", str(out)])
    exact, same, reused = results["rows"]
    assert [row["weak_passes"] for row in (exact, same, reused)] == [3, 3, 1]
    assert same["error"] == [0, 0, 0]
    assert 0 < reused["error"][0] <= reused["error"][1] <= reused["error"][2]
    assert "| 3 | 1.0 | 1 (exact) | 3 |" in out.with_suffix(".md").read_text()
