"""The code in the README and in docs/ runs as it stands, and the pages that are written by programs are up to date."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import stg_hooks as stg
from stg_hooks.adapters import PUBLISHED
from stg_hooks.guidance.settings import Published
from tests import recipes, stand_ins, stock_pipelines, test_replaced, zoo

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {file.name: file for file in sorted((ROOT / "docs").glob("*.md"))}
INCLUDED = re.compile(r'--8<-- "([^":]+)[^"]*"')
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


def snippets(text: str) -> list[str]:
    """Find the code of a page; what it includes from a file is tested as a file."""
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


SNIPPETS = snippets(README)


class TimedDiT(zoo.DiT):
    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return super().forward(x + t.view(-1, 1, 1), text)


def own_loop() -> dict[str, Any]:
    """Give the names that a page takes for granted where it is about a model."""
    names: dict[str, Any] = dict(
        zip(("x", "prompt", "no_prompt", "cond", "uncond"), torch.randn(5, 2, 4, 8), strict=True)
    )
    names |= {"stg": stg, "model": TimedDiT(), "t": torch.rand(2)}
    names["inputs"] = {"x": names["x"], "t": names["t"], "text": names["prompt"]}
    return names


def mochi() -> dict[str, Any]:
    pipe, inputs = stand_ins.build(setting("Mochi 1"))
    return {"stg": stg, "pipe": pipe, "inputs": inputs | {"num_inference_steps": 6}}


def modular_wan() -> dict[str, Any]:
    pipe, inputs = test_replaced.modular_wan()
    return {"stg": stg, "pipe": pipe, "inputs": inputs}


def setting(name: str) -> Published:
    return next(setting for setting in PUBLISHED if setting.name == name)


NAMES: dict[str, Callable[[], dict[str, Any]]] = {
    "index.md": dict,
    "how-it-works.md": lambda: own_loop() | {"transformer": TimedDiT(), "weak": torch.randn(2, 4, 8)},
    "any-loop.md": dict,
    "choosing-layers.md": dict,
    "coming-from.md": mochi,
    "modular.md": modular_wan,
}
"""What a page takes for granted. Recipes have a test of their own; a page without code needs no entry."""


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


@pytest.mark.parametrize("page", [name for name, file in PAGES.items() if snippets(file.read_text(encoding="utf-8"))])
def test_the_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page == "recipes.md":
        pytest.skip("each recipe has a test of its own")
    monkeypatch.chdir(tmp_path)  # what a page writes
    names = NAMES[page]()
    with warnings.catch_warnings():
        warnings.simplefilter("error", stg.StgWarning)
        for snippet in snippets(PAGES[page].read_text(encoding="utf-8")):
            exec(compile(snippet, page, "exec"), names)


def test_what_pages_include_is_tested_or_written_by_a_program() -> None:
    included = {file for page in PAGES.values() for file in INCLUDED.findall(page.read_text(encoding="utf-8"))}
    assert included
    for file in included:
        assert (ROOT / file).is_file(), file
        assert file.startswith(("examples/", "benchmarks/results/")), file


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
    code = re.sub(r"num_inference_steps=\d+", "num_inference_steps=4", recipes.code(published))
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
    pytest.importorskip("mkdocstrings")
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
    names = {entry["title"] for entry in json.loads((tmp_path / "search/search_index.json").read_text())["docs"]}
    assert {"apply", "Guider", "skip", "combine", "layers", "Branch", "Step"} <= {
        re.sub(r"<[^>]+>", "", name).strip() for name in names
    }


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
