"""Custom pipelines spell CFG in many ways: each is guided as its formula says, or refused first."""

from __future__ import annotations

import copy
import textwrap
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import stg_hooks as stg
from tests.test_pipeline_code import Denoiser, Pipeline

SCALE = 0.7

# What a pipeline of two steps does in each, from `x`, the embeddings `c` and `n`, and the weight `w`. A line that
# begins with `def` begins a method instead.
HALVES = "eps = self.transformer(torch.cat([x, x]), torch.cat([n, c]))\n"
CALLS = "a = self.transformer(x, c)\nb = self.transformer(x, n)\n"
READ = {
    "halves": HALVES + "eps_u, eps_c = eps.chunk(2)\nx = x - 0.1 * (eps_u + w * (eps_c - eps_u))",
    "halves, by a function": HALVES + "a, b = torch.chunk(eps, 2, dim=0)\nx = x - 0.1 * (a + w * (b - a))",
    "halves of a call": "u, k = self.transformer(torch.cat([x] * 2), torch.cat([n, c])).chunk(2)\n"
    "x = x - 0.1 * (u + w * (k - u))",
    "one half has a name": "uncond, k = self.transformer(torch.cat([x] * 2), torch.cat([n, c])).chunk(2)\n"
    "x = x - 0.1 * (uncond + w * (k - uncond))",
    "halves, base": HALVES + "pred_base, pred_text = eps.chunk(2)\npred = pred_base + w * (pred_text - pred_base)\n"
    "x = x - 0.1 * pred",
    "halves, lerp": HALVES + "a, b = eps.chunk(2)\nx = x - 0.1 * torch.lerp(a, b, w)",
    "halves, lerp of a tensor": HALVES + "a, b = eps.chunk(2)\nx = x - 0.1 * a.lerp(b, weight=w)",
    "halves, other order": HALVES + "a, b = eps.chunk(2)\nx = x - 0.1 * ((b - a) * w + a)",
    "halves, from cond": HALVES + "a, b = eps.chunk(2)\nx = x - 0.1 * (b + (w - 1) * (b - a))",
    "halves, in place": HALVES + "a, b = eps.chunk(2)\na += w * (b - a)\nx = x - 0.1 * a",
    "halves, annotated": "eps: Tensor = self.transformer(torch.cat([x, x]), torch.cat([n, c]))\n"
    "a, b = eps.chunk(2)\nx = x - 0.1 * (a + w * (b - a))",
    "halves, to a function": HALVES + "a, b = eps.chunk(2)\nx = self.move(x, a + w * (b - a))\n"
    "def move(self, x, eps):\n    return x - 0.1 * eps",
    "calls": CALLS + "x = x - 0.1 * (b + w * (a - b))",
    "calls, from cond": CALLS + "x = x - 0.1 * (a + (w - 1) * (a - b))",
    "calls, lerp": CALLS + "eps = torch.lerp(b, a, w)\nx = x - 0.1 * eps",
    "calls, converted": CALLS + "a = a.double().float()\nb = b.double().float()\nx = x - 0.1 * (b + w * (a - b))",
    "calls, if": "eps = self.transformer(x, c)\nif w > 1:\n    other = self.transformer(x, n)\n"
    "    eps = other + w * (eps - other)\nx = x - 0.1 * eps",
    "a method": "a = self.eps(x, c)\nb = self.eps(x, n)\nx = x - 0.1 * (b + w * (a - b))\n"
    "def eps(self, x, e):\n    return self.transformer(x, e)",
    "a method, named": "cond = self.eps(x, c)\nuncond = self.eps(x, n)\nx = x - 0.1 * (uncond + w * (cond - uncond))\n"
    "def eps(self, x, e):\n    pred = self.transformer(x, e)\n    return pred",
    "a method of a method": "a = self.outer(x, c)\nb = self.outer(x, n)\nx = x - 0.1 * (b + w * (a - b))\n"
    "def outer(self, x, e):\n    return self.eps(x, e)\n"
    "def eps(self, x, e):\n    return self.transformer(x, e)",
}

SIDE_BY_SIDE = "combines predictions, and which are cond is not clear"
REFUSED = {
    "cond first": (
        "a, b = self.transformer(torch.cat([x, x]), torch.cat([c, n])).chunk(2)\nx = x - 0.1 * (b + w * (a - b))",
        r"its rows are \[a, b\], and a is used as cond",
    ),
    "names that lie": (
        HALVES + "pred_uncond, pred_text = eps.chunk(2)\nx = x - 0.1 * (pred_text + w * (pred_uncond - pred_text))",
        "it calls pred_uncond what it uses as cond",
    ),
    "slices": (HALVES + "x = x - 0.1 * (eps[:1] + w * (eps[1:] - eps[:1]))", SIDE_BY_SIDE),
    "items": (HALVES + "x = x - 0.1 * (eps[0] + w * (eps[1] - eps[0]))", SIDE_BY_SIDE),
    "items of chunk": (
        HALVES + "parts = eps.chunk(2)\nx = x - 0.1 * (parts[0] + w * (parts[1] - parts[0]))",
        SIDE_BY_SIDE,
    ),
    "view": (HALVES + "a, b = eps.view(2, -1, *x.shape[1:])\nx = x - 0.1 * (a + w * (b - a))", SIDE_BY_SIDE),
    "split": (HALVES + "a, b = torch.split(eps, 1)\nx = x - 0.1 * (a + w * (b - a))", r"takes a prediction apart as"),
    "another formula": (
        HALVES + "a, b = eps.chunk(2)\nx = x - 0.1 * (w * b + (1 - w) * a)",
        "takes a prediction apart",
    ),
    "a weight of the other sign": (
        CALLS + "x = x - 0.1 * (a + (1 - w) * (b - a))",
        SIDE_BY_SIDE,
    ),
    "two formulas": (
        HALVES + "a, b = eps.chunk(2)\nif w > 1:\n    eps = a + w * (b - a)\nelse:\n    eps = b + w * (a - b)\n"
        "x = x - 0.1 * eps",
        "takes a prediction apart",
    ),
    "a difference of its own": (CALLS + "d = a - b\nx = x - 0.1 * (b + w * d)", SIDE_BY_SIDE),
    "uncond first": (
        "b = self.transformer(x, n)\na = self.transformer(x, c)\nx = x - 0.1 * (b + w * (a - b))",
        "for uncond first",
    ),
    "a function of both": (
        CALLS + "x = x - 0.1 * self.mix(a, b, w)\ndef mix(self, *all):\n    pass",
        SIDE_BY_SIDE,
    ),
    "a function of halves": (
        HALVES + "x = x - 0.1 * self.mix(eps, w)\ndef mix(self, eps, w):\n    a, b = eps.chunk(2)\n"
        "    return a + w * (b - a)",
        SIDE_BY_SIDE,
    ),
    "an unknown function of doubled latents": (HALVES + "x = x - 0.1 * self.mix(eps, w)", "the same latents twice"),
    "a method, halves": (
        (
            "a, b = self.eps(x, torch.cat([n, c])).chunk(2)\nx = x - 0.1 * (a + w * (b - a))\n"
            "def eps(self, x, e):\n    return self.transformer(torch.cat([x, x]), e)"
        ),
        "the same latents twice",
    ),
    "halves that are swapped": (
        HALVES + "a, b = eps.chunk(2)\na, b = b, a\nx = x - 0.1 * (b + w * (a - b))",
        "it calls a what it uses as cond",
    ),
    "a function inside, of nothing": (
        CALLS + "if True:\n    def mix():\n        return b + w * (a - b)\nx = x - 0.1 * mix()",
        SIDE_BY_SIDE,
    ),
    "kept, and combined elsewhere": (
        (
            "self.a = self.transformer(x, c)\nself.b = self.transformer(x, n)\nx = x - 0.1 * self.mix(w)\n"
            "def mix(self, w):\n    return self.b + w * (self.a - self.b)"
        ),
        "several predictions side by side",
    ),
    "a match": (
        CALLS + "match w:\n    case 4.0:\n        x = x - 0.1 * (w * a + (1 - w) * b)",
        SIDE_BY_SIDE,
    ),
    "a sum over halves": (
        (
            "twice = torch.cat([x] * 2)\neps = self.transformer(twice, torch.cat([n, c]))\n"
            "x = x - 0.1 * (eps * torch.tensor([1 - w, w])[:, None, None]).sum(0)"
        ),
        "the same latents twice",
    ),
    "a list": (
        (
            "found = []\nfor e in (n, c):\n    eps = self.transformer(x, e)\n    found.append(eps)\n"
            "x = x - 0.1 * (found[0] + w * (found[1] - found[0]))"
        ),
        SIDE_BY_SIDE,
    ),
    "a sum": (
        (
            "total = 0\nfor e, g in ((n, 1 - w), (c, w)):\n    eps = self.transformer(x, e)\n    total += g * eps\n"
            "x = x - 0.1 * total"
        ),
        SIDE_BY_SIDE,
    ),
    "a dictionary": (
        (
            "found = {}\nfound['a'] = self.transformer(x, c)\nfound['b'] = self.transformer(x, n)\n"
            "x = x - 0.1 * (found['b'] + w * (found['a'] - found['b']))"
        ),
        SIDE_BY_SIDE,
    ),
    "alternating": (
        (
            "for i, e in ((0, n), (1, c)):\n    if i == 0:\n        b = self.transformer(x, e)\n    else:\n"
            "        a = self.transformer(x, e)\nx = x - 0.1 * (b + w * (a - b))"
        ),
        SIDE_BY_SIDE,
    ),
    "one in a loop": (
        (
            "for i, e in ((0, n), (1, c)):\n    eps = self.transformer(x, e)\n    if i == 0:\n        b = eps\n"
            "    else:\n        a = eps\nx = x - 0.1 * (b + w * (a - b))"
        ),
        SIDE_BY_SIDE,
    ),
    "a comprehension": (
        "a, b = [self.transformer(x, e) for e in (c, n)]\nx = x - 0.1 * (b + w * (a - b))",
        "in a condition, or in a function inside it",
    ),
    "a lambda": (
        "eps = lambda e: self.transformer(x, e)\na, b = eps(c), eps(n)\nx = x - 0.1 * (b + w * (a - b))",
        "in a condition, or in a function inside it",
    ),
    "an inner function": (
        (
            "if True:\n    def eps(e):\n        return self.transformer(x, e)\na = eps(c)\nb = eps(n)\n"
            "x = x - 0.1 * (b + w * (a - b))"
        ),
        "in a condition, or in a function inside it",
    ),
    "in one expression": (
        "x = x - 0.1 * (self.transformer(x, n) + w * (self.transformer(x, c) - self.transformer(x, n)))",
        SIDE_BY_SIDE,
    ),
    "kept for another method": (
        (
            "self.run(x, c)\nself.a = self.eps\nself.run(x, n)\nx = x - 0.1 * (self.eps + w * (self.a - self.eps))\n"
            "def run(self, x, e):\n    self.eps = self.transformer(x, e)"
        ),
        "looks into its denoiser after a call",
    ),
    "a method that returns both": (
        (
            "a, b = self.both(x, c, n)\nx = x - 0.1 * (b + w * (a - b))\n"
            "def both(self, x, c, n):\n    first = self.transformer(x, c)\n    return first, self.transformer(x, n)"
        ),
        "several predictions side by side",
    ),
}

# No CFG: what the pipeline does with its predictions, of which every row is cond.
UNGUIDED = {
    "one call": "x = x - 0.1 * self.transformer(x, c)",
    "embedded weight": "eps = self.transformer(x, c + w)\nx = x - 0.1 * eps",
    "a method": "x = x - 0.1 * self.eps(x, c)\ndef eps(self, x, e):\n    return self.transformer(x, e)",
    "a method moves": "x = self.move(x, self.transformer(x, c))\ndef move(self, x, eps):\n    return x - 0.1 * eps",
    "x0": "eps = self.transformer(x, c)\nx0 = x - 0.5 * eps\nx = x0 + 0.3 * (x - x0)",
    "the step before": "eps = self.transformer(x, c)\nlast = eps if i == 0 else last\n"
    "x = x - 0.1 * (eps + 0.5 * (eps - last))\nlast = eps",
    "Heun": "first = self.transformer(x, c)\nsecond = self.transformer(x - 0.1 * first, c)\n"
    "x = x - 0.1 * (first + 0.5 * (second - first))",
    "a variance": "eps, var = torch.cat([self.transformer(x, c), x], dim=1).chunk(2, dim=1)\nx = x - 0.1 * eps ",
    "a part of the tokens": "eps = self.transformer(torch.cat([x, x], dim=1), torch.cat([c, c], dim=1))\n"
    "eps = eps[:, : x.shape[1]]\nx = x - 0.1 * eps",
    "one of two branches": "if i == 0:\n    eps = self.transformer(x, c)\nelse:\n    eps = self.transformer(x, c + 1)\n"
    "x = x - 0.1 * (eps + 0.1 * eps.mean())",
    "tiles": "eps = torch.zeros_like(x)\nfor j in range(0, x.shape[1], 2):\n"
    "    tile = self.transformer(x[:, j : j + 2], c[:, j : j + 2])\n    eps[:, j : j + 2] += tile\nx = x - 0.1 * eps",
}


def pipeline(text: str, folder: Path) -> Pipeline:
    """Build a pipeline whose steps do this."""
    step, *methods = text.split("\ndef ")
    lines = [
        "import torch",
        "from torch import Tensor",
        "from tests.test_pipeline_code import Pipeline",
        "class Custom(Pipeline):",
        "    def __call__(self, x, c, n):",
        "        w = self.guidance_scale",
        "        for i in range(2):",
        textwrap.indent(step, " " * 12),
        "        return x",
        *(textwrap.indent(f"def {method}", " " * 4) for method in methods),
    ]
    file = folder / "custom.py"
    file.write_text("\n".join(lines), encoding="utf-8")
    names: dict[str, Any] = {"__name__": "custom"}
    exec(compile(file.read_text(encoding="utf-8"), str(file), "exec"), names)
    found = names["Custom"](Denoiser())
    assert isinstance(found, diffusers.DiffusionPipeline)
    return found


@pytest.fixture
def arguments() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(1, 6, 8), torch.randn(1, 6, 8), torch.randn(1, 6, 8)


def weak(model: nn.Module) -> nn.Module:
    found = copy.deepcopy(model)
    found.blocks[1] = nn.Identity()
    return found


def by_hand(pipe: Pipeline, x: Tensor, c: Tensor, n: Tensor) -> Tensor:
    strong, w = pipe.transformer, pipe.guidance_scale
    for _ in range(2):
        cond, uncond = strong(x, c), strong(x, n)
        x = x - 0.1 * (uncond + w * (cond - uncond) + SCALE * (cond - weak(strong)(x, c)))
    return x


@torch.no_grad()
@pytest.mark.parametrize("name", READ)
def test_cfg_is_read_from_its_arithmetic(name: str, tmp_path: Path, arguments: tuple[Tensor, Tensor, Tensor]) -> None:
    pipe = pipeline(READ[name], tmp_path)
    with stg.apply(pipe, layers=["blocks.1"], scale=SCALE) as applied:
        guided = pipe(*arguments)
    assert applied.stats.weak_passes == 2
    assert (guided - pipe(*arguments)).abs().max() > 1e-3
    assert_close(guided, by_hand(pipe, *arguments), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", READ)
def test_its_weight_is_read_as_well(name: str, tmp_path: Path, arguments: tuple[Tensor, Tensor, Tensor]) -> None:
    pipe = pipeline(READ[name], tmp_path)
    x, c, n = arguments
    with stg.apply(pipe, layers=["blocks.1"], scale=SCALE, rescale=0.6):
        guided = pipe(*arguments)
    for _ in range(2):
        cond, uncond = pipe.transformer(x, c), pipe.transformer(x, n)
        out = uncond + 4.0 * (cond - uncond) + SCALE * (cond - weak(pipe.transformer)(x, c))
        x = x - 0.1 * out * (0.6 * cond.std() / out.std() + 0.4)
    assert_close(guided, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_clear_is_refused_before_anything_is_touched(name: str, tmp_path: Path) -> None:
    text, why = REFUSED[name]
    pipe = pipeline(text, tmp_path)
    with pytest.raises(stg.TargetError, match=rf"(?s){why}.*stg\.apply\(pipe\.transformer, \.\.\., batched_cfg=True\)"):
        stg.apply(pipe, layers=["blocks.1"])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.transformer.modules())


@torch.no_grad()
@pytest.mark.parametrize("name", UNGUIDED)
def test_a_pipeline_without_cfg_is_guided(
    name: str, tmp_path: Path, arguments: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = pipeline(UNGUIDED[name], tmp_path)
    plain = pipe(*arguments)
    with stg.apply(pipe, layers=["blocks.1"], scale=SCALE) as applied:
        guided = pipe(*arguments)
    calls = applied.stats.calls
    assert applied.stats.weak_passes == calls >= 2

    strong, without = pipe.transformer.forward, weak(pipe.transformer).forward
    monkeypatch.setattr(
        pipe.transformer, "forward", lambda *args: strong(*args) + SCALE * (strong(*args) - without(*args))
    )
    assert (guided - plain).abs().max() > 1e-3
    assert_close(guided, pipe(*arguments), rtol=1e-5, atol=1e-5)
