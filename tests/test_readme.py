"""The README's code runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

import stg_hooks as stg
from stg_hooks import demo
from tests import stock_pipelines, zoo

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


class TimedDiT(zoo.DiT):
    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return super().forward(x + t.view(-1, 1, 1), text)


def test_the_first_snippet_is_short_and_runs_as_it_stands() -> None:
    assert len(SNIPPETS[0].strip().splitlines()) <= 15
    found: dict[str, object] = {}
    exec(compile(SNIPPETS[0], "README.md", "exec"), found)
    assert isinstance(found["video"], Tensor)
    assert torch.isfinite(found["video"]).all()


def test_the_other_snippets_run() -> None:
    x, prompt, no_prompt, cond, uncond = torch.randn(5, 2, 4, 8).unbind(0)
    names = {"x": x, "t": torch.rand(2), "prompt": prompt, "no_prompt": no_prompt, "cond": cond, "uncond": uncond}
    names |= {"stg": stg, "model": TimedDiT(), "pipe": demo.load()}
    names["inputs"] = {"x": x, "t": names["t"], "text": prompt}
    for snippet in SNIPPETS[1:]:
        exec(compile(snippet, "README.md", "exec"), names)
    assert isinstance(names["pred"], Tensor)
    assert names["pred"].shape == x.shape


def test_every_file_that_the_readme_shows_is_there() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    for link in links:
        assert (Path(__file__).resolve().parents[1] / link).exists(), link


def test_the_readme_lists_the_pipelines_that_tests_run() -> None:
    assert stock_pipelines.readme_table() in README
