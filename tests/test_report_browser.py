"""The report in a real browser: it draws, sorts, plays, copies, fits a phone, and asks nobody for anything."""

from __future__ import annotations

import ast
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("PIL.Image", reason="the demo extra is not installed")

import stg_hooks as stg  # noqa: E402
from tests import report_folder  # noqa: E402

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = os.environ.get("STG_HOOKS_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
HOSTILE = "</script><b id=hurt onclick=alert(1)>bold</b> & \"quoted\" 'prompt' <!-- <script>"

pytestmark = [
    pytest.mark.xdist_group("browser"),
    pytest.mark.skipif(
        CHROMIUM is None, reason="no Chromium here; `.ci/run` installs one, or set STG_HOOKS_CHROMIUM to its path"
    ),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as host:
        browser = host.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    report_folder.write_profile(folder)
    report_folder.write_sweep(folder, prompts=("red 3 blue 7", HOSTILE), failed=("residual-L5-s2.0",))
    return stg.report(folder)


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Open a page; at the end nothing may have been complained about, or asked for from elsewhere."""
    contexts, trouble, asked = [], [], []

    def open_page(path: Path, width: int = 1280, **settings: Any) -> Any:
        # Nothing moves unless a test wants it to: that is easier on the machine.
        settings = {"reduced_motion": "reduce"} | settings
        context = browser.new_context(viewport={"width": width, "height": 900}, **settings)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: trouble.append(message.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert trouble == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert sum(url.startswith("file:") for url in asked) == len(contexts)


def frames(page: Any) -> set[str]:
    """Tell which frame the canvases on the screen show, as `strip:frame`."""
    return set(page.eval_on_selector_all("canvas[data-shown]", "nodes => nodes.map(node => node.dataset.shown)"))


def wait_for(page: Any, condition: str, seconds: float = 60) -> None:
    """Ask again and again: playwright's own way evaluates text, which the page's policy forbids."""
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < end, f"never came true: {condition}"
        page.wait_for_timeout(20)


def show_sheet(page: Any) -> None:
    page.locator("#sheet").scroll_into_view_if_needed()
    wait_for(page, "document.querySelectorAll('#sheet canvas[data-shown]').length >= 8")


def test_everything_is_drawn(visit: Callable[..., Any], written: Path) -> None:
    page = visit(written)
    assert page.inner_text("h1") == "WanTransformer3DModel"
    assert page.locator("#heat figure").count() == 6
    assert page.locator("[data-measure=norm] rect:not(.cursor)").count() == 8 * 5
    assert page.locator("[data-measure=cost] rect:not(.cursor)").count() == 8  # the same at all noise levels
    assert page.locator("[data-measure=cosine] rect.unknown").count() == 1
    assert page.locator("#scatter .point[data-cell]").count() == 18  # 18 settings and the plain cell, one failed
    assert page.locator("#table tbody tr").count() == 18
    assert page.locator("#sheet tbody tr").count() == 3
    assert page.locator("#sheet thead .tile").count() == 4
    assert page.inner_text("#failures") == "Layer 5, residual, scale 2\nOutOfMemoryError: <none> left"
    show_sheet(page)
    # A drawn canvas shows a picture, not one colour.
    colours = page.evaluate(
        """() => { const canvas = document.querySelector('#sheet canvas[data-shown]');
        const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
        return new Set(pixels).size; }"""
    )
    assert colours > 10


def test_a_prompt_is_text_and_nothing_else(visit: Callable[..., Any], written: Path) -> None:
    page = visit(written)
    assert page.locator("#hurt").count() == 0
    assert page.locator("#sheet .prompt").nth(2).text_content() == HOSTILE
    # Even what gets into the page could not run: only the report's own script may.
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<i id=probe></i>')")
    assert page.locator("#probe").count() == 1
    assert "script-src 'sha256-" in page.get_attribute("meta[http-equiv]", "content")


def test_heat_maps_are_read_together(visit: Callable[..., Any], written: Path) -> None:
    page = visit(written)
    page.focus("[data-measure=norm] .plot")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    assert page.inner_text("#heat-place") == "Layer 2 (blocks.2), noise level 0.8"
    assert all(page.locator(".reading").all_inner_texts())
    box = page.locator("[data-measure=temporal] rect").nth(8 * 2 + 7).bounding_box()
    page.mouse.move(box["x"] + 5, box["y"] + 5)
    assert page.inner_text("#heat-place") == "Layer 7 (blocks.7), noise level 0.6"
    before = page.inner_text("[data-measure=norm] .reading")
    page.select_option("#profile-mode", "attention")
    page.mouse.move(box["x"] + 6, box["y"] + 6)
    assert page.inner_text("[data-measure=norm] .reading") != before


def test_a_heading_sorts(visit: Callable[..., Any], written: Path) -> None:
    page = visit(written)
    headings = page.locator("#table thead button").all_inner_texts()
    column = headings.index("Difference")
    seen = []
    for direction in ("ascending", "descending"):
        page.locator("#table thead button").nth(column).click()
        assert page.locator("#table thead th").nth(column).get_attribute("aria-sort") == direction
        seen.append([float(text) for text in page.locator(f"#table td:nth-child({column + 1})").all_inner_texts()])
    assert seen[0] == sorted(seen[0])
    assert seen[1] == sorted(seen[0], reverse=True)
    assert len(set(seen[0])) > 5


def test_clips_play_in_step_and_stop(visit: Callable[..., Any], written: Path) -> None:
    page = visit(written, reduced_motion="no-preference")
    show_sheet(page)
    assert page.inner_text("#play") == "Pause"
    wait_for(page, f"document.getElementById('scrub').value !== '{page.input_value('#scrub')}'")
    page.click("#play")
    still = frames(page)
    assert len({shown.split(":")[1] for shown in still}) == 1
    page.wait_for_timeout(300)  # more than two frames at eight a second
    assert frames(page) == still
    page.click("#play")
    wait_for(page, f"document.getElementById('scrub').value !== '{page.input_value('#scrub')}'")
    page.fill("#scrub", "2")
    assert page.inner_text("#play") == "Play"  # scrubbing stops it


def test_scrubbing_moves_every_clip(visit: Callable[..., Any], written: Path) -> None:
    page = visit(written)
    show_sheet(page)
    assert page.inner_text("#play") == "Play"  # motion waits for those who want less of it
    assert page.input_value("#scrub") == "0"
    for frame in ("4", "1"):
        page.fill("#scrub", frame)
        assert len(frames(page)) > 8
        assert {shown.split(":")[1] for shown in frames(page)} == {frame}


def test_the_slider_changes_the_scale_of_every_row(visit: Callable[..., Any], written: Path) -> None:
    page = visit(written)
    show_sheet(page)
    tiles = "#sheet tbody canvas"
    before = page.locator(tiles).first.get_attribute("data-shown")
    plain = page.locator("#sheet thead canvas").first.get_attribute("data-shown")
    page.fill("#scale", "2")
    assert page.inner_text("#scale-value") == "2"
    assert page.inner_text("#chosen-name") == "Layer 5, residual, scale 2"
    labels = [node.get_attribute("aria-label") for node in page.locator(f"{tiles}:visible").all()]
    assert len(labels) == 8  # two rows of four; the third failed at this scale
    assert all("scale 2:" in label for label in labels)
    assert page.locator("#sheet tbody tr").nth(1).inner_text().count("failed") == 4
    wait_for(page, f"document.querySelector('{tiles}').dataset.shown !== '{before}'")
    assert page.locator("#sheet thead canvas").first.get_attribute("data-shown") == plain
    page.select_option("#mode", "")
    assert page.locator("#sheet tbody tr").count() == 6


def test_the_code_of_the_chosen_cell_is_copied(visit: Callable[..., Any], written: Path) -> None:
    page = visit(written, permissions=["clipboard-read", "clipboard-write"])
    page.click("#table tr[data-cell='attention-L2+5-s1.0'] td:last-child")
    call = "video = pipe(prompt=prompt, generator=generator).frames[0]"
    given = 'prompt = "red 3 blue 7"\ngenerator = torch.Generator().manual_seed(7)\n'
    session = 'with stg.apply(pipe, layers=[2, 5], scale=1.0, mode="attention"):'
    code = f"import torch\nimport stg_hooks as stg\n\n{given}{session}\n    {call}"
    assert page.locator("#code").text_content() == code
    assert page.inner_text("#chosen-name") == "Layers 2 + 5, attention, scale 1"
    page.click("#copy")
    wait_for(page, "document.getElementById('copy').textContent === 'Copied'")
    assert page.evaluate("navigator.clipboard.readText()") == code
    page.click("#copy-settings")
    wait_for(page, "document.getElementById('copy-settings').textContent === 'Copied'")
    copied = json.loads(page.evaluate("navigator.clipboard.readText()"))
    assert copied == {"layers": [2, 5], "scale": 1.0, "mode": "attention"}
    page.locator("#scatter [data-cell='baseline']").focus()
    page.keyboard.press("Enter")
    assert page.locator("#code").text_content() == f"import torch\n\n{given}{call}"
    page.keyboard.press("ArrowRight")
    assert "stg.apply" in page.locator("#code").text_content()
    page.locator("#sheet tbody .tile").nth(5).press("Enter")
    assert page.input_value("#sample") == "1"
    assert "manual_seed(8)" in page.locator("#code").text_content()
    page.select_option("#sample", "2")
    line = page.locator("#code").text_content().split("\n")[3]
    assert ast.literal_eval(line.removeprefix("prompt = ")) == HOSTILE
    page.select_option("#sample", "1")
    assert page.locator(".tile[aria-pressed=true]").count() == 1


def test_the_copied_code_alone_makes_the_shown_sample(visit: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="the demo extra is not installed")
    from PIL import Image

    from stg_hooks import demo

    asked = {"layers": [6], "scales": [1.0], "seeds": [0, 4], "num_inference_steps": 2, "progress": False}
    stg.sweep(demo.load(), "red 3 blue 7", out=tmp_path, **asked)
    page = visit(stg.report(tmp_path), permissions=["clipboard-read", "clipboard-write"])
    page.select_option("#sample", "1")
    for cell in ("baseline", "residual-L6-s1.0"):
        page.click(f"#table tr[data-cell='{cell}'] td:last-child")
        page.click("#copy")
        wait_for(page, "document.getElementById('copy').textContent === 'Copied'")
        code = page.evaluate("navigator.clipboard.readText()")
        top, _, rest = code.partition("\n\n")
        assert all(line.startswith(("import ", "from ")) for line in top.splitlines())
        assert "import" not in rest
        assert rest.startswith("pipe = demo.load()\n")
        names: dict[str, Any] = {}
        exec(code, names)
        with Image.open(tmp_path / "cells" / cell / "p0-s1.strip.webp") as strip:
            frames = [strip.convert("RGB").crop((16 * i, 0, 16 * i + 16, 16)).tobytes() for i in range(6)]
        assert [bytes(frame.numpy().tobytes()) for frame in names["video"]] == frames
        wait_for(page, "document.getElementById('copy').textContent === 'Copy code'")


def test_the_front_has_what_nothing_beats(visit: Callable[..., Any], written: Path) -> None:
    page = visit(written)
    assert page.input_value("#metric") == "flicker"  # here is no metric of the user's, and no contrast
    assert page.input_value("#better") == "none"
    assert page.inner_text("#chosen-name") == "Layer 5, residual, scale 1"
    assert "merely the middle of the grid" in page.inner_text("#effect")
    assert page.get_attribute(".front", "points") == ""  # nothing tells which is best
    page.select_option("#better", "kept")
    assert "rewards doing little" in page.inner_text("#effect")
    page.select_option("#better", "lower")
    points = "document.querySelector('.front').getAttribute('points').split(' ').length"
    assert page.evaluate(points) == 1  # costs nothing, flickers least
    page.select_option("#better", "further")
    assert page.evaluate(points) > 1


def test_a_metric_of_the_users_comes_first(visit: Callable[..., Any], tmp_path: Path) -> None:
    report_folder.write_sweep(tmp_path, own=("difference",))
    page = visit(stg.report(tmp_path))
    assert (page.input_value("#metric"), page.input_value("#better")) == ("difference", "higher")
    assert page.inner_text("#chosen-name") == "Layers 2 + 5, residual, scale 2"  # the best of them
    assert page.inner_text("#table thead th:nth-child(4)") == "Difference"
    page.select_option("#metric", "sharpness")
    assert page.input_value("#better") == "none"
    assert "your metric does: Difference" in page.inner_text("#effect")


@pytest.mark.parametrize("width", [390, 1280])
def test_labels_stay_inside_the_plot(visit: Callable[..., Any], written: Path, width: int) -> None:
    page = visit(written, width=width)
    for better in ("none", "higher", "lower", "kept", "further"):
        page.select_option("#better", better)
        outside = """() => {
            const plot = document.querySelector("#scatter svg").getBoundingClientRect();
            return [...document.querySelectorAll("#scatter .label")].filter((label) => {
                const box = label.getBoundingClientRect();
                return box.left < plot.left + 56 || box.right > plot.right || box.top < plot.top;
            }).map((label) => label.textContent);
        }"""
        assert page.evaluate(outside) == []
    page.select_option("#better", "none")
    assert page.locator("#scatter .label").count() > 5  # not those of the front alone


def test_a_label_crosses_neither_the_line_nor_another_label(visit: Callable[..., Any], written: Path) -> None:
    page = visit(written)
    crossed = """() => {
        const line = document.querySelector("#scatter .front");
        const plot = document.querySelector("#scatter svg").getBoundingClientRect();
        const boxes = [...document.querySelectorAll("#scatter .label")].map((label) => label.getBoundingClientRect());
        const inside = (box, x, y) => x > box.left && x < box.right && y > box.top + 2 && y < box.bottom - 2;
        const long = line.getTotalLength();
        for (let at = 0; at < long; at++) {
            const { x, y } = line.getPointAtLength(at);
            if (boxes.some((box) => inside(box, plot.left + x, plot.top + y))) return "line";
        }
        for (const [i, a] of boxes.entries()) for (const b of boxes.slice(i + 1))
            if (a.left < b.right && b.left < a.right && Math.abs(a.top - b.top) < a.height - 4) return "label";
        return long > 50 ? "" : "no line";
    }"""
    page.select_option("#metric", "difference")
    for better in ("further", "higher"):
        page.select_option("#better", better)
        assert page.evaluate(crossed) == ""


def test_every_measure_can_be_seen(visit: Callable[..., Any], written: Path) -> None:
    page = visit(written)
    box = page.locator("#table")
    assert box.evaluate("box => box.scrollWidth <= box.clientWidth")
    assert page.locator("#table-hint").is_hidden()
    phone = visit(written, width=375, has_touch=True, is_mobile=True)
    assert phone.locator("#table thead th:nth-child(4)").evaluate("cell => cell.getBoundingClientRect().right") <= 375
    assert phone.locator("#table-hint").is_visible()


def test_a_single_sample_has_its_settings_side_by_side(visit: Callable[..., Any], tmp_path: Path) -> None:
    report_folder.write_sweep(tmp_path, prompts=["one"], seeds=[7])
    page = visit(stg.report(tmp_path))
    tops = page.locator("#sheet .tile").evaluate_all("tiles => tiles.map((tile) => tile.getBoundingClientRect().top)")
    assert len(tops) == 4
    assert max(tops) - min(tops) < 4
    assert page.locator("#sheet").evaluate("sheet => sheet.scrollHeight <= sheet.clientHeight")


def luminance(page: Any) -> float:
    """Measure how bright the page's background is, 0 to 255."""
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(map(float, colour.removeprefix("rgb(").removesuffix(")").split(","))) / 3


def test_dark_and_light(visit: Callable[..., Any], written: Path) -> None:
    page = visit(written, color_scheme="dark")
    seen = []
    for _ in range(4):
        seen.append((page.get_attribute("#theme", "aria-label"), luminance(page) < 40, luminance(page) > 200))
        page.click("#theme")
    auto, dark, light = ("Theme: auto", True, False), ("Theme: dark", True, False), ("Theme: light", False, True)
    assert seen == [auto, dark, light, auto]
    page.emulate_media(color_scheme="light")
    assert luminance(page) < 40  # dark was chosen last
    for _ in range(2):
        page.click("#theme")
    assert luminance(page) > 200


def test_a_phone_never_scrolls_sideways(visit: Callable[..., Any], written: Path) -> None:
    page = visit(written, width=390, has_touch=True, is_mobile=True)
    for _ in range(2):
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.evaluate("visualViewport.width") >= 389
        page.tap("#chosen summary")  # folded at first
    page.locator("[data-measure=norm] .plot").tap()
    assert page.inner_text("#heat-place").startswith("Layer")


@pytest.mark.parametrize("kind", ["profile", "sweep"])
def test_half_a_report(visit: Callable[..., Any], tmp_path: Path, kind: str) -> None:
    getattr(report_folder, f"write_{kind}")(tmp_path)
    page = visit(stg.report(tmp_path))
    assert page.is_visible("#heat") == (kind == "profile")
    assert page.is_visible("#table") == (kind == "sweep")


def test_a_sweep_without_a_finished_cell(visit: Callable[..., Any], tmp_path: Path) -> None:
    report_folder.write_sweep(tmp_path, layers=[[1]], modes=["residual"], scales=[1.0])
    for name in ("baseline", "residual-L1-s1.0"):
        (tmp_path / "cells" / name / "cell.json").unlink()
    page = visit(stg.report(tmp_path))
    assert "0 of 2 done" in page.inner_text("#facts")
