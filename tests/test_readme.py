"""The code in the README and in docs/ runs as it stands, and the pages that are written by programs are up to date."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import stg_hooks as stg
from stg_hooks import adapters, errors
from stg_hooks.adapters import PUBLISHED
from stg_hooks.guidance.published import Published
from tests import api_page, errors_page, included, modular, recipes, stand_ins, stock_pipelines, test_replaced

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {file.name: file for file in sorted((ROOT / "docs").glob("*.md"))}
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


def snippets(text: str) -> list[str]:
    """Find the code of a page; what it shows of a file is tested as a file."""
    text = included.INCLUDED.sub("", text)
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


SNIPPETS = snippets(README)


def mochi() -> dict[str, Any]:
    pipe, inputs = stand_ins.build(setting("Mochi 1"))
    return {"stg": stg, "pipe": pipe, "inputs": inputs | {"num_inference_steps": 6}}


def setting(name: str) -> Published:
    return next(setting for setting in PUBLISHED if setting.name == name)


def for_coming_from(patch: pytest.MonkeyPatch) -> dict[str, str]:
    names = mochi()
    patch.setattr(diffusers.MochiPipeline, "from_pretrained", lambda *_, **__: names["pipe"])
    patch.setattr(stand_ins, "INPUTS", names["inputs"], raising=False)
    return {'{"prompt": "a fox in the snow", "num_frames": 85}': "stand_ins.INPUTS"}


def for_modular(patch: pytest.MonkeyPatch) -> dict[str, str]:
    """A narrow Wan and LTX-2 as deep as the page takes them to be, whose pipelines end before the decoder."""
    wan, inputs = test_replaced.modular_wan(depth=9)
    ltx2 = modular.MODULAR["ltx2"]
    deep = dataclasses.replace(ltx2, config={**ltx2.config, "num_layers": 29}).build()
    pipes = {"Wan-AI/Wan2.1-T2V-1.3B-Diffusers": wan, "Lightricks/LTX-2": deep}
    patch.setattr(diffusers.ModularPipeline, "from_pretrained", lambda name: pipes[name])
    patch.setattr(diffusers.ModularPipeline, "load_components", lambda *_, **__: None)
    patch.setattr(diffusers.ModularPipeline, "to", lambda self, *_: self)
    patch.setattr(diffusers.utils, "export_to_video", lambda *_, **__: None)
    patch.setattr(stand_ins, "INPUTS", inputs, raising=False)
    return {
        '{"prompt": "a fox in the snow", "num_frames": 81}': "stand_ins.INPUTS",
        'prompt="a fox in the snow", num_frames=81, output="videos"': '**stand_ins.INPUTS, output="latents"',
    }


STAND_INS: dict[str, Callable[[pytest.MonkeyPatch], dict[str, str]]] = {
    "coming-from.md": for_coming_from,
    "modular.md": for_modular,
}
"""For pages that load models from the hub: narrow ones of random weights in their place, which have no text encoder,
and so what to write in place of a prompt. All other code runs as it stands, in the order of the page."""
OF_THEIR_OWN = ("recipes.md", "errors.md")
"""Pages whose code has tests of its own, below."""


@pytest.fixture
def _adapters() -> Iterator[None]:
    """Forget what a page states of its models."""
    tables = (adapters.STREAMS, adapters.ATTENTION, adapters.ATTENTION_FUNCTIONS, adapters.TEMPORAL, adapters.OUTPUTS)
    before = [copy.copy(table) for table in tables]
    yield
    for table, kept in zip(tables, before, strict=True):
        table.clear()
        table.update(kept)  # type: ignore[arg-type]


def test_the_first_snippet_guides_a_real_model_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a narrow Mochi of random weights in place of the one on the hub, which has no text encoder."""
    names = mochi()
    pipe, written = names["pipe"], list[Any]()
    monkeypatch.setattr(diffusers.MochiPipeline, "from_pretrained", lambda *_, **__: pipe)
    monkeypatch.setattr(diffusers.MochiPipeline, "enable_model_cpu_offload", lambda _: None)
    monkeypatch.setattr(diffusers.utils, "export_to_video", lambda video, *_, **__: written.append(video))
    prompt = 'pipe("a red fox walks through the snow", num_frames=85)'
    assert prompt in SNIPPETS[0]
    assert len(SNIPPETS[0].strip().splitlines()) <= 15
    found: dict[str, Any] = {"inputs": names["inputs"]}
    exec(compile(SNIPPETS[0].replace(prompt, "pipe(**inputs)"), "README.md", "exec"), found)
    (video,) = written
    again = mochi()
    with stg.apply(again["pipe"], layers=[34], scale=1.0):
        torch.testing.assert_close(video, again["pipe"](**again["inputs"]).frames[0], rtol=0, atol=0)


def test_the_other_snippets_run_in_order_as_they_stand() -> None:
    names: dict[str, Any] = {}
    for snippet in SNIPPETS[1:]:
        exec(compile(snippet, "README.md", "exec"), names)
    assert names["video"].isfinite().all()
    torch.testing.assert_close(
        names["pred"],
        stg.combine(names["cond"], names["weak"], names["uncond"], scale=1.0, guidance_scale=2.0),
        rtol=1e-4,
        atol=1e-4,
    )


def test_the_readme_is_short() -> None:
    assert len(re.sub(r"^```python.*?^```", "", README, flags=re.MULTILINE | re.DOTALL).split()) <= 700


WITH_CODE = [name for name, file in PAGES.items() if snippets(file.read_text(encoding="utf-8"))]


@pytest.mark.usefixtures("_adapters")
@pytest.mark.parametrize("page", [page for page in WITH_CODE if page not in OF_THEIR_OWN])
def test_the_code_of_a_page_runs_in_order(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # what a page writes
    replaced = STAND_INS.get(page, lambda _: {})(monkeypatch)
    names: dict[str, Any] = {"stand_ins": stand_ins} if replaced else {}
    text = "".join(snippets(PAGES[page].read_text(encoding="utf-8")))
    assert all(written in text for written in replaced)
    with warnings.catch_warnings():
        warnings.simplefilter("error", stg.StgWarning)
        for snippet in snippets(PAGES[page].read_text(encoding="utf-8")):
            code = snippet
            for written, instead in replaced.items():
                code = code.replace(written, instead)
            exec(compile(code, page, "exec"), names)


def test_errors_say_what_their_page_says() -> None:
    page = PAGES["errors.md"].read_text(encoding="utf-8")
    assert errors_page.filled(page) == page, "run python -m tests.errors_page"
    public = [name for name in stg.__all__ if hasattr(errors, name)]
    assert {*public, "StgError"} <= set(re.findall(r"`(?:stg\.)?(\w+)`", page))


# --- pages as code hosts show them ------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_a_page_is_plain_markdown(page: str) -> None:
    """No include lines, attribute lists or blocks of a site generator; code that is shown is run, here or as a file."""
    text = (PAGES.get(page) or ROOT / page).read_text(encoding="utf-8")
    assert not re.search(r"--8<--|^:::|^!!!|^\?\?\?|^=== |^(```|!?\[).*\{ ?[.:#]", text, re.M)
    assert set(re.findall(r"^``` ?(\w+)", included.INCLUDED.sub("", text), re.M)) <= {"python", "bash", "text"}
    assert included.filled(text) == text, "run python -m tests.included"


def test_what_pages_show_of_files_is_tested_or_written_by_a_program() -> None:
    shown = {found["file"] for page in included.PAGES for found in included.INCLUDED.finditer(page.read_text("utf-8"))}
    assert shown
    for file in shown:
        assert file.startswith(("examples/", "benchmarks/results/")), file


def test_the_api_page_is_current_and_has_every_public_name() -> None:
    page = PAGES["api.md"].read_text(encoding="utf-8")
    assert page == api_page.page(), "run python -m tests.api_page"
    names = [*stg.__all__, *(f"rules.{name}" for name in stg.rules.__all__), "modular.SkipGuidance"]
    shown = [name for names in api_page.SECTIONS.values() for name in names]
    assert set(names) <= set(shown)
    assert set(adapters.__all__) <= {name.removeprefix("adapters.") for name in shown}
    for name in shown:
        assert api_page.summary(name), f"{name} has no docstring"
    titles = re.findall(r"^###? (.*)", page, re.M)
    anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
    assert set(re.findall(r"\]\(#([^)]+)\)", page)) <= set(anchors)


def test_every_file_that_a_page_shows_is_there() -> None:
    for page in [ROOT / "README.md", *PAGES.values()]:
        links = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if not link.startswith("http")]
        assert links or page.name not in ("README.md", "index.md")
        for link in links:
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_page_lists_the_pipelines_that_tests_run() -> None:
    assert stock_pipelines.page_table() in PAGES["how-it-works.md"].read_text(encoding="utf-8")


# --- recipes ----------------------------------------------------------------------------------------------------------


def test_the_recipes_are_the_published_settings() -> None:
    assert PAGES["recipes.md"].read_text(encoding="utf-8") == recipes.page(), "run python -m tests.recipes"


@pytest.mark.slow
@pytest.mark.parametrize("published", PUBLISHED, ids=lambda published: published.name)
def test_a_recipe_runs_with_the_published_setting(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a narrow pipeline with as many blocks as the published one, and fewer steps."""
    import diffusers

    pipe, inputs = stand_ins.build(published)
    sessions: list[stg.apply] = []

    class Noted(stg.apply):
        def __enter__(self) -> stg.apply:
            sessions.append(self)
            return super().__enter__()

    monkeypatch.setattr(
        getattr(diffusers, recipes.PIPELINES[published.model]), "from_pretrained", lambda *_, **__: pipe
    )
    monkeypatch.setattr(stg, "apply", Noted)
    assert f"pipe({recipes.inputs(published)}" in recipes.code(published).replace("(\n        ", "(")
    code = recipes.code(published).replace(recipes.inputs(published), "**inputs")
    code = re.sub(r"num_inference_steps=\d+", "num_inference_steps=4", code)
    if not published.steps:
        inputs["num_inference_steps"] = 4
    if published.start:  # the first of a few steps lies before it
        inputs["num_inference_steps"] = 12
    names = {"inputs": inputs}
    exec(compile(code, published.name, "exec"), names)
    made = names["image" if published.model in recipes.OF_IMAGES else "video"]
    assert torch.isfinite(made).all()

    (session,) = sessions
    assert session.stats.guided_calls
    preset = stg.apply(pipe, preset=published.name)
    for step in (stg.Step(i, 40, 1 - i / 40, "flow") for i in range(40)):
        used, expected = session.plan.at(step), preset.plan.at(step)
        assert used == expected


# --- the site ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_site_builds_and_needs_no_network(tmp_path: Path) -> None:
    pytest.importorskip("material")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    pages = sorted(tmp_path.glob("*.html"))
    assert {f"{Path(name).stem}.html" for name in PAGES} <= {page.name for page in pages}
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*\bsrc="([^"]+)"', text)
        loaded += re.findall(r'<link[^>]*rel="(?:stylesheet|preconnect|icon)"[^>]*href="([^"]+)"', text)
        assert loaded
        assert [url for url in loaded if re.match(r"(?:https?:)?//", url)] == [], page.name
    titles = {entry["title"] for entry in json.loads((tmp_path / "search/search_index.json").read_text())["docs"]}
    assert {f"stg.{name}" for name in stg.__all__} <= {re.sub(r"<[^>]+>", "", title).strip() for title in titles}


def test_every_place_that_the_page_for_developers_names_is_there() -> None:
    text = PAGES["architecture.md"].read_text(encoding="utf-8")
    named = re.findall(r"`([a-z_/]+\.py)(?::([A-Za-z_.]+))?`", text)
    assert len(named) > 40
    for name, places in named:
        (file,) = [path for path in (ROOT / "stg_hooks" / name, ROOT / name) if path.is_file()][:1] or [None]
        assert file is not None, name
        source = file.read_text(encoding="utf-8")
        for part in filter(None, places.split(".")):
            assert re.search(rf"^\s*(async )?(def|class) {part}\b|^{part}\b.* = ", source, re.M), f"{name}:{places}"
