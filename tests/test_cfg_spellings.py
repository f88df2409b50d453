"""Custom pipelines spell CFG in many ways: each is guided as its formula says, or refused."""

from __future__ import annotations

import copy
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import stg_hooks as stg
from tests.test_pipeline_code import Denoiser, Pipeline

# What a pipeline of two steps predicts in each, `p`, from `x`, the embeddings `c` and `n`, and the weight `w`; or the
# next `x`. `T` is its denoiser; "; " begins a line, ";; " one that is indented; a method follows "|".
HALVES = "e = T(torch.cat([x, x]), torch.cat([n, c])); "
CALLS = "a = T(x, c); b = T(x, n); "
METHOD = " | eps(self, x, e): return T(x, e)"
READ = {
    "halves": HALVES + "e_u, e_c = e.chunk(2); p = e_u + w * (e_c - e_u)",
    "halves, by a function": HALVES + "a, b = torch.chunk(e, 2, dim=0); p = a + w * (b - a)",
    "halves of a call": "u, k = T(torch.cat([x] * 2), torch.cat([n, c])).chunk(2); p = u + w * (k - u)",
    "halves, one has a name": HALVES + "uncond, k = e.chunk(2); p = uncond + w * (k - uncond)",
    "halves, base": HALVES + "pred_base, pred_text = e.chunk(2); p = pred_base + w * (pred_text - pred_base)",
    "halves, lerp": HALVES + "a, b = e.chunk(2); p = torch.lerp(a, b, w)",
    "halves, lerp of a tensor": HALVES + "a, b = e.chunk(2); p = a.lerp(b, weight=w)",
    "halves, other order": HALVES + "a, b = e.chunk(2); p = (b - a) * w + a",
    "halves, from cond": HALVES + "a, b = e.chunk(2); p = b + (w - 1) * (b - a)",
    "halves, weighted": HALVES + "a, b = e.chunk(2); p = w * b + (1 - w) * a",
    "halves, in place": HALVES + "a, b = e.chunk(2); a += w * (b - a); p = a",
    "halves, annotated": HALVES.replace("e =", "e: Tensor =") + "a, b = e.chunk(2); p = a + w * (b - a)",
    "halves, to a function": HALVES + "a, b = e.chunk(2); x = self.move(x, a + w * (b - a))"
    " | move(self, x, eps): return x - 0.1 * eps",
    "halves, by a method": "a, b = self.eps(x, torch.cat([n, c])).chunk(2); p = a + w * (b - a)"
    " | eps(self, x, e): return T(torch.cat([x, x]), e)",
    "cond first, named": "pred_text, pred_uncond = T(torch.cat([x, x]), torch.cat([c, n])).chunk(2); "
    "p = pred_uncond + w * (pred_text - pred_uncond)",
    "cond first, split": "e = T(torch.cat([x, x]), torch.cat([c, n])); "
    "cond_eps, uncond_eps = torch.split(e, len(e) // 2, dim=0); p = uncond_eps + w * (cond_eps - uncond_eps)",
    "halves of two calls, as GLIGEN's": "with_boxes = T(torch.cat([x, x]), torch.cat([x, c])); "
    "without = T(torch.cat([x, x]), torch.cat([n, x])); _, pred_text = with_boxes.chunk(2); "
    "pred_uncond, _ = without.chunk(2); p = pred_uncond + w * (pred_text - pred_uncond)",
    "two formulas": HALVES + "a, b = e.chunk(2); if w > 1:;; p = a + w * (b - a); else:;; p = b + w * (a - b)",
    "calls": CALLS + "p = b + w * (a - b)",
    "calls, from cond": CALLS + "p = a + (w - 1) * (a - b)",
    "calls, the other sign": CALLS + "p = a + (1 - w) * (b - a)",
    "calls, lerp": CALLS + "p = torch.lerp(b, a, w)",
    "calls, converted": CALLS + "a = a.double().float(); b = b.double().float(); p = b + w * (a - b)",
    "calls, if": "p = T(x, c); if w > 1:;; other = T(x, n);; p = other + w * (p - other)",
    "a method": "a = self.eps(x, c); b = self.eps(x, n); p = b + w * (a - b)" + METHOD,
    "a method, named": "cond = self.eps(x, c); uncond = self.eps(x, n); p = uncond + w * (cond - uncond)"
    " | eps(self, x, e): pred = T(x, e); return pred",
    "a method of a method": "a = self.outer(x, c); b = self.outer(x, n); p = b + w * (a - b)"
    " | outer(self, x, e): return self.eps(x, e)" + METHOD,
}

ONE = "predicts the same latents twice in a call, and no name in its code tells"
TWO = "predicts the same latents in two calls, and no name in its code tells"
DIFFERENT = "combines predictions of different latents"
UNSEEN = "in a condition, or in a function inside it"
# The end of an error that comes before anything is touched.
BEFORE = r".*stg\.apply\(pipe\.transformer, \.\.\., batched_cfg=True\)"
NAMED = HALVES + "pred_uncond, pred_text = e.chunk(2); p = pred_uncond + w * (pred_text - pred_uncond)"
LOOP = "for i, e in ((0, n), (1, c)):;; "
REFUSED = {
    "cond first": ("a, b = T(torch.cat([x, x]), torch.cat([c, n])).chunk(2); p = b + w * (a - b)", ONE),
    "names that lie": (
        HALVES + "pred_uncond, pred_text = e.chunk(2); p = pred_text + w * (pred_uncond - pred_text)",
        "it calls pred_uncond what it uses as cond",
    ),
    "slices": (HALVES + "p = e[:1] + w * (e[1:] - e[:1])", ONE),
    "items": (HALVES + "p = e[0] + w * (e[1] - e[0])", ONE),
    "items of chunk": (HALVES + "e = e.chunk(2); p = e[0] + w * (e[1] - e[0])", ONE),
    "view": (HALVES + "a, b = e.view(2, -1, *x.shape[1:]); p = a + w * (b - a)", ONE),
    "split": (HALVES + "a, b = torch.split(e, 1); p = a + w * (b - a)", ONE),
    "repeat": (HALVES.replace("torch.cat([x, x])", "x.repeat(2, 1, 1)") + "p = e[:1] + w * (e[1:] - e[:1])", ONE),
    "interleaved": ("e = T(x.repeat(2, 1, 1), torch.cat([n, c])); p = e[::2] + w * (e[1::2] - e[::2])", ONE),
    "thirds": ("e = T(torch.cat([x] * 3), torch.cat([n, c, c])); p = e[:1] + w * (e[1:2] - e[:1])", ONE),
    "a function of halves": (
        HALVES + "p = self.mix(e, w) | mix(self, e, w): a, b = e.chunk(2); return a + w * (b - a)",
        ONE,
    ),
    "an unknown function of doubled latents": (HALVES + "p = self.mix(e, w) | mix(self, *e): return e[0][:1]", ONE),
    "halves that are swapped": (HALVES + "a, b = e.chunk(2); a, b = b, a; p = b + w * (a - b)", ONE),
    "cond first, swapped": (
        HALVES.replace("n, c", "c, n") + "a, b = e.chunk(2); a, b = b, a; p = a + w * (b - a)",
        ONE,
    ),
    "a sum over halves": (HALVES + "p = (e * torch.tensor([1 - w, w])[:, None, None]).sum(0)", ONE),
    "uncond first": ("b = T(x, n); a = T(x, c); p = b + w * (a - b)", TWO),
    "a difference of its own": (CALLS + "d = a - b; p = b + w * d", TWO),
    "scaled": (CALLS + "a = 2 * a; p = b + w * (a - b)", TWO),
    "scaled in place": (CALLS + "a.mul_(2); p = b + w * (a - b)", TWO),
    "a function of both": (CALLS + "p = self.mix(a, b, w) | mix(self, a, b, w): return b + w * (a - b)", TWO),
    "a function inside": (CALLS + "if True:;; def mix():;;; return b + w * (a - b); p = mix()", TWO),
    "a function of copies": ("p = sum(self.mix(T(1 * x, c), T(1 * x, n))) | mix(self, *all): return all", TWO),
    "kept, and combined elsewhere": (
        "self.a = T(x, c); self.b = T(x, n); p = self.mix(w) | mix(self, w): return self.b + w * (self.a - self.b)",
        TWO,
    ),
    "kept for another method": (
        "self.run(x, c); a = self.e; self.run(x, n); p = self.e + w * (a - self.e) | run(self, x, e): self.e = T(x, e)",
        TWO,
    ),
    "a method that returns both": (
        "a, b = self.both(x, c, n); p = b + w * (a - b) | both(self, x, c, n): first = T(x, c); return first, T(x, n)",
        TWO,
    ),
    "a match": (CALLS + "match w:;; case 4.0:;;; p = w * a + (1 - w) * b", TWO),
    "a list": ("f = []; for e in (n, c):;; e = T(x, e);; f.append(e); p = f[0] + w * (f[1] - f[0])", TWO),
    "a list, in the second step": (
        "f = []; for e in (n, c)[1 - i :]:;; e = T(1 * x, e);; f.append(e); p = f[0] + w * (f[-1] - f[0])",
        TWO,
    ),
    "a sum": ("p = 0; for e, g in ((n, 1 - w), (c, w)):;; e = T(x, e);; p += g * e", TWO),
    "a dictionary": ("f = {}; f['a'] = T(x, c); f['b'] = T(x, n); p = f['b'] + w * (f['a'] - f['b'])", TWO),
    "alternating": (LOOP + "if i == 0:;;; b = T(x, e);; else:;;; a = T(x, e); p = b + w * (a - b)", TWO),
    "one in a loop": (LOOP + "e = T(x, e);; if i == 0:;;; b = e;; else:;;; a = e; p = b + w * (a - b)", TWO),
    "in one expression": ("p = T(x, n) + w * (T(x, c) - T(x, n))", TWO),
    "a comprehension": ("a, b = [T(x, e) for e in (c, n)]; p = b + w * (a - b)", UNSEEN),
    "a lambda": ("eps = lambda e: T(x, e); a, b = eps(c), eps(n); p = b + w * (a - b)", UNSEEN),
    "an inner function": ("if True:;; def eps(e):;;; return T(x, e); a = eps(c); b = eps(n); p = a + b", UNSEEN),
    "an extrapolation": (
        "a = T(x, c); b = T(x - a, c); p = b + w * (a - b)",
        "combines predictions of different latents",
    ),
    "weights that do not sum to one": (
        HALVES + "pred_uncond, pred_text = e.chunk(2); p = pred_uncond + self.guidance_scale * pred_text",
        r"the weights in pred_uncond \+ self\.guidance_scale \* pred_text do not sum to one",
    ),
    "thirds whose weights do not sum to one": (
        "uncond, image, text = T(torch.cat([x] * 3), torch.cat([n, c + n, c])).chunk(3); p = uncond + image + text",
        "do not sum to one",
    ),
    "a condition that would have to be computed": (
        "p = T(x, c); if max(w, 0) > 1:;; pred_uncond = T(x, n);; p = pred_uncond + w * (p - pred_uncond)",
        r"cannot evaluate max\(",
    ),
    "neither of two is uncond": (
        "uncond, a, b = T(torch.cat([x] * 3), torch.cat([n, c, c])).chunk(3); p = uncond + w * (a - b)",
        rf"its rows are \[uncond, a, b\]{BEFORE}",
    ),
    "slices, named": (
        "e = T(torch.cat([x, x]), torch.cat([c, n])); cond, uncond = e[:1], e[1:]; p = uncond + w * (cond - uncond)",
        f"guided, but not by uncond and cond calls or halves{BEFORE}",
    ),
    "a call for what it leaves behind": ("T(x, c); " + NAMED, f"it looks into its denoiser after a call{BEFORE}"),
    "two calls for one result": (HALVES + "x = x - e[:1]; " + NAMED, f"does not say which half is which{BEFORE}"),
    "rows of two samples": (
        "a, b = T(torch.cat([x, x + 1]), torch.cat([n, c])).chunk(2); p = a + w * (b - a)",
        DIFFERENT,
    ),
}

# No CFG: what the pipeline does with its predictions, of which every row is cond.
UNGUIDED = {
    "one call": "x = x - 0.1 * T(x, c)",
    "embedded weight": "p = T(x, c + w)",
    "a method": "p = self.eps(x, c)" + METHOD,
    "a method moves": "x = self.move(x, T(x, c)) | move(self, x, eps): return x - 0.1 * eps",
    "x0": "e = T(x, c); x0 = x - 0.5 * e; x = x0 + 0.3 * (x - x0)",
    "the step before": "e = T(x, c); last = e if i == 0 else last; p = e + 0.5 * (e - last); last = e",
    "Heun": "first = T(x, c); second = T(x - 0.1 * first, c); p = first + 0.5 * (second - first)",
    "Heun, a sum": "first = T(x, c); second = T(x - 0.1 * first, c); p = 0.5 * (first + second)",
    "Heun, extrapolated": "first = T(x, c); second = T(x - 0.1 * first, c); p = second + 0.5 * (second - first)",
    "in place": "x = x.clone(); x -= 0.1 * T(x, c)",
    "a variance": "e, var = torch.cat([T(x, c), x], dim=1).chunk(2, dim=1); p = e",
    "a part of the tokens": "e = T(torch.cat([x, x], dim=1), torch.cat([c, c], dim=1)); p = e[:, : x.shape[1]]",
    "one of two branches": "if i == 0:;; e = T(x, c); else:;; e = T(x, c + 1); p = e + 0.1 * e.mean()",
    "tiles": "p = torch.zeros_like(x); for j in range(0, x.shape[1], 2):;; "
    "tile = T(x[:, j : j + 2], c[:, j : j + 2]);; p[:, j : j + 2] += tile",
}


def pipeline(text: str, folder: Path) -> Any:
    """Build a pipeline whose steps do what a text says."""

    def lines(text: str, depth: int) -> str:
        text = re.sub(";+ ", lambda found: "\n" + "    " * (len(found[0]) - 2), text.replace("T(", "self.transformer("))
        return textwrap.indent(text, "    " * depth)

    step, *methods = text.split(" | ")
    step = step if re.search(r"\bx -?= ", step) else f"{step}; x = x - 0.1 * p"
    parts = ["class Custom(Pipeline):", "    def __call__(self, x, c, n):", "        w = self.guidance_scale"]
    parts += ["        for i in range(2):", lines(step, 3), "        return x"]
    for head, _, body in (method.partition(": ") for method in methods):
        parts += [f"    def {head}:", lines(body, 2)]
    file = folder / "custom.py"
    file.write_text("\n".join(parts), encoding="utf-8")
    names: dict[str, Any] = {"torch": torch, "Tensor": Tensor, "Pipeline": Pipeline}
    exec(compile(file.read_text(encoding="utf-8"), str(file), "exec"), names)
    return names["Custom"](Denoiser())


@pytest.fixture
def arguments() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(1, 6, 8), torch.randn(1, 6, 8), torch.randn(1, 6, 8)


def weak(model: nn.Module) -> nn.Module:
    found = copy.deepcopy(model)
    found.blocks[1] = nn.Identity()
    return found


def by_hand(model: nn.Module, x: Tensor, c: Tensor, n: Tensor, rescale: float = 0.0) -> Tensor:
    for _ in range(2):
        cond, uncond = model(x, c), model(x, n)
        out = uncond + 4.0 * (cond - uncond) + 0.7 * (cond - weak(model)(x, c))
        x = x - 0.1 * out * (rescale * cond.std() / out.std() + 1 - rescale)
    return x


@torch.no_grad()
@pytest.mark.parametrize("rescale", [0.0, 0.6])
@pytest.mark.parametrize("name", READ)
def test_cfg_is_read_from_its_arithmetic(name: str, rescale: float, tmp_path: Path, arguments: Any) -> None:
    pipe, (x, c, n) = pipeline(READ[name], tmp_path), arguments
    with stg.apply(pipe, layers=["blocks.1"], scale=0.7, rescale=rescale) as applied:
        guided = pipe(x, c, n)
    assert applied.stats.weak_passes == 2
    assert (guided - pipe(x, c, n)).abs().max() > 1e-3
    assert_close(guided, by_hand(pipe.transformer, x, c, n, rescale), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_clear_is_refused(name: str, tmp_path: Path, arguments: Any) -> None:
    text, why = REFUSED[name]
    pipe = pipeline(text, tmp_path)
    told = pytest.raises((stg.TargetError, stg.CallError), match=rf"(?s){why}.*[Uu]se stg\.Guider in")
    with told, stg.apply(pipe, layers=["blocks.1"]):
        pipe(*arguments)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.transformer.modules())


@torch.no_grad()
@pytest.mark.parametrize("name", UNGUIDED)
def test_a_pipeline_without_cfg_is_guided(
    name: str, tmp_path: Path, arguments: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = pipeline(UNGUIDED[name], tmp_path)
    plain = pipe(*arguments)
    with stg.apply(pipe, layers=["blocks.1"], scale=0.7) as applied:
        guided = pipe(*arguments)
    assert applied.stats.weak_passes == applied.stats.calls >= 2

    strong, without = pipe.transformer.forward, weak(pipe.transformer).forward
    monkeypatch.setattr(
        pipe.transformer, "forward", lambda *args: strong(*args) + 0.7 * (strong(*args) - without(*args))
    )
    assert (guided - plain).abs().max() > 1e-3
    assert_close(guided, pipe(*arguments), rtol=1e-5, atol=1e-5)
